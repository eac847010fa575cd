//! The scenario `steady`: measures the token alone and the running broker in one run. Other load on
//! the machine affects both measurements in the same way, so their ratio remains meaningful.

use std::time::Duration;

use serde_json::json;

use crate::cli::{exit::Failure, output::Field};

use super::{
    Bench,
    bare::{self, Bare},
    block_on_until_interrupted,
    document::{Results, real, round},
    load::{self, Measured},
    metrics::Added,
    processors,
    session::{self, Session},
};

/// Maximum duration of which the measurements of the token alone are fractions, in seconds. A longer
/// measurement of the token would not be more precise, and would delay the end of a long run.
const TOKEN_SECONDS_MAX: u64 = 60;

/// Measures the token and the broker. The only row of the result has the fields of [`figures`].
pub(super) fn run(bench: &Bench<'_>) -> Result<Results, Failure> {
    let (arguments, output) = (bench.arguments, bench.context.output);
    let connections = arguments.connections();
    let rate = arguments.rate.first().copied();
    let threads = arguments.token_threads.unwrap_or_else(processors);
    // Half of the token's measurement runs before the broker's measurement and half after, so that
    // other load affects both in the same way.
    let measure_bare = || -> Result<[Bare; 2], Failure> {
        output.note("measuring the bare token");
        let (key, seconds) = (&bench.token.key, arguments.seconds.min(TOKEN_SECONDS_MAX));
        Ok([
            bare::measure(bench.context, key, 1, seconds.div_ceil(4))?,
            bare::measure(bench.context, key, threads, seconds.div_ceil(2))?,
        ])
    };
    let [single, bare] = measure_bare()?;
    output.note("measuring the served broker");
    let load = block_on_until_interrupted(async {
        let session = Session::open(bench, connections.min(session::CONNECTIONS_MAX)).await?;
        let plan = load::Plan {
            callers: connections,
            rate,
            warm_up: arguments.warm_up(),
            duration: Duration::from_secs(arguments.seconds),
        };
        load::run(&plan, &session).await
    })?;
    let [single_after, bare_after] = measure_bare()?;
    let (single, bare) = (single.and(single_after), bare.and(bare_after));
    let mut fields = vec![
        ("rsa_bits", json!(bench.token.rsa_bits)),
        ("purpose", json!(bench.token.key.purpose.as_str())),
        ("connections", json!(connections)),
        ("users", json!(arguments.seed.unwrap_or(arguments.users))),
        ("rate", json!(rate)),
        ("tls_connections", json!(load.channels)),
        ("token_threads", json!(threads)),
    ];
    fields.extend(figures(&single, &bare, &load));
    if !single.is_local() {
        output.note(
            "note: the token's work uses no CPU time on this machine, so `share` is null; compare `broker_ops_per_s` with \
             `token_ops_per_s`",
        );
    }
    let errors = load.tally.errors();
    let failure = (errors > 0).then(|| {
        let first = &load.tally.first_error;
        format!("{errors} calls failed; the error of the first failed call: {first}")
    });
    Ok(Results {
        arguments: vec![
            ("connections", json!(connections)),
            ("rate", json!(rate)),
            ("warm_up_s", json!(arguments.warm_up)),
        ],
        rows: vec![fields],
        failure,
        ..Results::default()
    })
}

/// The results of both measurements, as output fields.
fn figures(single: &Bare, bare: &Bare, load: &Measured) -> Vec<Field> {
    let token_cpu = bare.cpu_ms_per_op();
    let operations = real(load.tally.answered()).max(1.0);
    let (front_cpu, worker_cpu) = (
        load.front_cpu_ms / operations,
        load.worker_cpu_ms / operations,
    );
    let broker_rate = operations / load.seconds;
    let ms = |quantile: f64| load.tally.answers.quantile_ms(quantile).unwrap_or_default();
    let added = |figure: fn(&Added) -> Option<f64>| load.added.as_ref().and_then(figure);
    [
        ("token_ops_per_s", Some(bare.ops_per_s())),
        ("token_ops_per_s_one_thread", Some(single.ops_per_s())),
        ("broker_ops_per_s", Some(broker_rate)),
        // The broker's operations per CPU second, divided by the operations per CPU second of the
        // token alone. If the token uses no CPU time of this machine, the quotient is meaningless.
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
        ("operations", json!(load.tally.answered())),
        ("errors", json!(load.tally.errors())),
        ("token_cpu_is_local", json!(single.is_local())),
    ])
    .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::Map;

    use crate::cli::bench::calls::Tally;

    use super::*;

    #[test]
    fn the_figures_are_those_that_were_promised_and_the_share_is_one_of_cpu_time() {
        let bare = Bare::new(1_000, 1.0, 500.0);
        let single = Bare::new(600, 1.0, 500.0);
        let load = Measured {
            channels: 64,
            tally: Tally {
                in_time: 800,
                ..Tally::new()
            },
            seconds: 1.0,
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
