//! `keybroker bench`: measures the bare token and the served broker in one run on one machine. Other load on the machine affects
//! both measurements alike, so their ratio stays valid.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::Args;
use keybroker_client::RetryPolicy;
use serde_json::{Map, json};
use tokio::signal::unix::{SignalKind, signal};

use crate::{config::Config, output_file};

use super::{
    Context, block_on,
    client::connect::{self, Connection},
    exit::{Exit, Failure},
    output::Field,
};

mod bare;
mod cpu;
mod load;
mod metrics;
mod seed;
mod served;
mod users;

use bare::Bare;
use load::Measured;
use metrics::Added;
use served::Served;
use users::Users;

#[derive(Args, Debug)]
pub(super) struct Arguments {
    #[command(flatten)]
    connection: Connection,
    /// Process id of a running broker to measure; requires --endpoint [default: start a broker for the measurement]
    #[arg(long, value_name = "PID", requires = "endpoint")]
    attach: Option<u32>,
    /// Address of the running broker's status listener, if `status.address` has port 0
    #[arg(long, value_name = "ADDRESS", requires = "attach")]
    status: Option<SocketAddr>,
    /// Number of callers; each makes one call at a time on its own TLS connection (more than 256 callers share 256 connections)
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4_096))]
    connections: u32,
    /// Seconds for which the broker is measured; the token alone is measured before and after the broker, each time for about
    /// three quarters of these seconds
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: u64,
    /// Warm-up in seconds before the broker is measured
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(0..=3_600))]
    warm_up: u64,
    /// Number of users whose keys are enrolled and released; users of an earlier run are reused
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    users: u32,
    /// Pre-populate the database with this many records, bypassing the broker
    #[arg(
        long, value_name = "RECORDS", conflicts_with = "users",
        value_parser = clap::value_parser!(u32).range(1..=10_000_000)
    )]
    seed: Option<u32>,
    /// Maximum calls per second of all callers together [default: unlimited]
    #[arg(long, value_name = "CALLS", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rate: Option<u32>,
    /// Threads that measure the token alone [default: number of processors]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=256))]
    token_threads: Option<u32>,
    /// Also write the results to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub(super) fn run(arguments: &Arguments, context: &Context) -> Result<(), Failure> {
    let config = context.config_for_token()?;
    arguments.connection.certificate()?;
    let (key, rsa_bits) = bare::wrapping_key(&config)?;
    let threads = arguments.token_threads.unwrap_or_else(processors);
    if let Some(count) = arguments.seed {
        let tenant = seed::tenant(&arguments.connection, &config)?;
        seed::seed(context, &config, tenant, Users::new(count))?;
    }
    // Half of the token's measurement runs before the broker's measurement and half after it, so that other load on the machine
    // affects both measurements alike.
    let measure_bare = || -> Result<[Bare; 2], Failure> {
        context.output.note("measuring the bare token");
        Ok([
            bare::measure(context, &key, 1, arguments.seconds.div_ceil(4))?,
            bare::measure(context, &key, threads, arguments.seconds.div_ceil(2))?,
        ])
    };
    let [single, bare] = measure_bare()?;
    context.output.note("measuring the served broker");
    let load = block_on(until_interrupted(measure_served(
        arguments, context, &config,
    )))??;
    let [single_after, bare_after] = measure_bare()?;
    let (single, bare) = (single.and(single_after), bare.and(bare_after));
    let mut fields = vec![
        ("rsa_bits", json!(rsa_bits)),
        ("connections", json!(arguments.connections)),
        ("users", json!(arguments.seed.unwrap_or(arguments.users))),
        ("rate", json!(arguments.rate)),
        ("tls_connections", json!(load.channels)),
        ("token_threads", json!(threads)),
    ];
    fields.extend(figures(&single, &bare, &load));
    if let Some(path) = &arguments.json {
        write_json(path, &fields)?;
    }
    context.output.fields(fields)?;
    if !single.is_local() {
        context.output.note(
            "note: the token's work takes no CPU time on this machine, so `share` is null; compare `broker_ops_per_s` with \
             `token_ops_per_s`",
        );
    }
    if load.errors > 0 {
        let what = format!(
            "{} calls failed; the error of the first failed call: {}",
            load.errors, load.first_error
        );
        return Err(Failure::new(Exit::Verification, what));
    }
    Ok(())
}

fn processors() -> u32 {
    let number = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    u32::try_from(number).unwrap_or(1)
}

async fn measure_served(
    arguments: &Arguments,
    context: &Context,
    config: &Config,
) -> Result<Measured, Failure> {
    let broker = Served::start(arguments, context, config).await?;
    // The client does not retry, so that every refusal is counted.
    let builder = arguments.connection.client(&broker.endpoint)?;
    let plan = load::Plan {
        client: connect::build(builder.retry(RetryPolicy::never()))?,
        endpoint: broker.endpoint.clone(),
        connections: arguments.connections,
        users: Users::new(arguments.seed.unwrap_or(arguments.users)),
        enrolled: arguments.seed.is_some(),
        rate: arguments.rate,
        warm_up: Duration::from_secs(arguments.warm_up),
        duration: Duration::from_secs(arguments.seconds),
        front: broker.pid,
        status: broker.status,
    };
    load::run(&plan, context.output).await
}

/// Stops the measurement at a signal, so that the command can also stop the broker that it started.
async fn until_interrupted<T>(
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    let internal = |error: std::io::Error| Failure::new(Exit::Internal, error.to_string());
    let mut interrupt = signal(SignalKind::interrupt()).map_err(internal)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(internal)?;
    tokio::select! {
        done = work => done,
        _ = interrupt.recv() => Err(Failure::new(Exit::Interrupted, "interrupted; nothing was measured")),
        _ = terminate.recv() => Err(Failure::new(Exit::Interrupted, "terminated; nothing was measured")),
    }
}

fn write_json(path: &std::path::Path, fields: &[Field]) -> Result<(), Failure> {
    let object: Map<_, _> = fields
        .iter()
        .map(|(name, value)| ((*name).to_owned(), value.clone()))
        .collect();
    let text = serde_json::to_string_pretty(&object).unwrap_or_default();
    output_file::replace(path, &(text + "\n")).map_err(|error| {
        Failure::new(
            Exit::Usage,
            format!(
                "cannot write {}: {error} (`--output json` prints the figures)",
                path.display()
            ),
        )
    })
}

/// The results of both measurements, as output fields.
fn figures(single: &Bare, bare: &Bare, load: &Measured) -> Vec<Field> {
    let token_cpu = bare.cpu_ms_per_op();
    let operations = load.operations_f64();
    let (front_cpu, worker_cpu) = (
        load.front_cpu_ms / operations,
        load.worker_cpu_ms / operations,
    );
    let broker_rate = operations / load.seconds;
    let ms = |quantile: f64| {
        let micros = u32::try_from(load.latency_us.value_at_quantile(quantile)).unwrap_or(u32::MAX);
        f64::from(micros) / 1_000.0
    };
    let added = |figure: fn(&Added) -> Option<f64>| load.added.as_ref().and_then(figure);
    [
        ("token_ops_per_s", Some(bare.ops_per_s())),
        ("token_ops_per_s_one_thread", Some(single.ops_per_s())),
        ("broker_ops_per_s", Some(broker_rate)),
        // The broker's operations per CPU second, divided by the operations per CPU second of the bare loop. If the token uses no
        // CPU time of this machine, the quotient is meaningless.
        (
            "share",
            single
                .is_local()
                .then_some(token_cpu / (front_cpu + worker_cpu)),
        ),
        (
            "share_of_one_thread",
            Some(broker_rate / single.ops_per_s()),
        ),
        ("p50_ms", Some(ms(0.5))),
        ("p99_ms", Some(ms(0.99))),
        ("p999_ms", Some(ms(0.999))),
        ("added_mean_ms", added(Added::mean_ms)),
        ("added_p50_ms", added(|added| added.quantile_ms(0.5))),
        ("added_p99_ms", added(|added| added.quantile_ms(0.99))),
        ("token_cpu_ms_per_op", Some(token_cpu)),
        ("front_cpu_ms_per_op", Some(front_cpu)),
        ("worker_cpu_ms_per_op", Some(worker_cpu)),
        (
            "broker_cpu_ms_per_op_beyond_token",
            Some(front_cpu + worker_cpu - token_cpu),
        ),
        ("load_cpu_ms_per_op", Some(load.load_cpu_ms / operations)),
        ("seconds", Some(load.seconds)),
    ]
    .into_iter()
    .map(|(name, value)| (name, json!(value.map(round))))
    .chain([
        ("operations", json!(load.operations)),
        ("errors", json!(load.errors)),
        ("token_cpu_is_local", json!(single.is_local())),
    ])
    .collect()
}

/// Rounds to four decimal places, because the measurement is not more accurate.
fn round(value: f64) -> f64 {
    (value * 10_000.0).round() / 10_000.0
}

#[cfg(test)]
mod tests {
    use hdrhistogram::Histogram;

    use super::*;

    #[test]
    fn the_figures_are_those_that_were_promised_and_the_share_is_one_of_cpu_time() {
        let bare = Bare::new(1_000, 1.0, 500.0);
        let single = Bare::new(600, 1.0, 500.0);
        let load = Measured {
            channels: 64,
            operations: 800,
            errors: 0,
            first_error: String::new(),
            seconds: 1.0,
            latency_us: Histogram::new_with_bounds(1, 1_000, 3).unwrap(),
            front_cpu_ms: 100.0,
            worker_cpu_ms: 400.0,
            load_cpu_ms: 80.0,
            added: None,
        };
        let figures: Map<_, _> = figures(&single, &bare, &load)
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect();
        let expected = [
            ("token_ops_per_s", 1_000.0),
            ("broker_ops_per_s", 800.0),
            ("share", 0.8),
            ("share_of_one_thread", 1.3333),
            ("token_cpu_ms_per_op", 0.5),
            ("front_cpu_ms_per_op", 0.125),
            ("worker_cpu_ms_per_op", 0.5),
            ("broker_cpu_ms_per_op_beyond_token", 0.125),
            ("load_cpu_ms_per_op", 0.1),
        ];
        for (name, value) in expected {
            assert_eq!(figures[name], json!(value), "{name}");
        }
        let remote = single.waiting(600);
        let figures_of_remote = super::figures(&remote, &bare, &load);
        let value = |name| {
            let mut fields = figures_of_remote.iter();
            fields.find(|field| field.0 == name).unwrap().1.clone()
        };
        assert_eq!(value("share"), json!(null));
        assert_eq!(value("token_cpu_is_local"), json!(false));
        for name in [
            "p50_ms",
            "p99_ms",
            "p999_ms",
            "errors",
            "operations",
            "added_mean_ms",
            "added_p50_ms",
            "added_p99_ms",
        ] {
            assert!(figures.contains_key(name), "{name}");
        }
    }
}
