//! `keybroker bench`: measures the broker under one of several kinds of load, on the configured token.
//!
//! The scenario `steady` also measures the bare token in the same run. Every scenario produces one
//! [`Document`]. `--json` writes the document to a file, and `keybroker bench-report` makes charts
//! and a table from this file.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};

use crate::{config::Config, output_file};

use super::{
    Context, block_on,
    client::connect::Connection,
    exit::{Exit, Failure},
};

mod bare;
mod callers;
mod calls;
mod connections;
mod cpu;
pub(super) mod document;
mod fairness;
mod issuer;
mod latencies;
mod load;
mod machine;
mod memory;
mod metrics;
mod open;
mod open_loop;
mod overload;
mod preflight;
mod rest;
mod restart;
mod seed;
mod served;
mod session;
mod steady;
mod storm;
pub(super) mod table;
mod users;

use document::{Document, Results};
use users::Users;

/// The kind of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Scenario {
    /// Measures the token alone and the broker in one run; each caller makes its next call as soon
    /// as the previous call is answered
    Steady,
    /// Calls that start on a schedule, at one or more rates, and do not wait for earlier calls
    Open,
    /// More calls than the broker can serve, with short and long deadlines
    Overload,
    /// One principal with few calls, and at the same time another principal whose callers never
    /// pause
    Fairness,
    /// Throughput of many active connections, and memory of each idle connection
    Connections,
    /// Many members, each of whom opens a new connection and fetches a key over REST within a short
    /// time
    Storm,
    /// Restarts of the broker while a client that follows the retry rule makes calls
    Restart,
}

impl Scenario {
    /// The name of the scenario on the command line and in the JSON document.
    pub(super) fn name(self) -> String {
        self.to_possible_value()
            .map(|value| value.get_name().to_owned())
            .unwrap_or_default()
    }
}

#[derive(Args, Debug)]
pub(super) struct Arguments {
    /// Kind of load; docs/performance.md describes each scenario
    #[arg(long, value_name = "NAME", default_value = "steady")]
    scenario: Scenario,
    #[command(flatten)]
    connection: Connection,
    /// Process id of a running broker to measure; requires --endpoint [default: start a broker for the measurement]
    #[arg(long, value_name = "PID", requires = "endpoint")]
    attach: Option<u32>,
    /// Address of the running broker's status listener; required if `status.address` in the
    /// configuration has port 0
    #[arg(long, value_name = "ADDRESS", requires = "attach")]
    status: Option<SocketAddr>,
    /// Number of callers. Each caller makes one call at a time. Up to 256 callers have a TLS
    /// connection each; further callers share these connections. The scenario `connections` takes a
    /// list of numbers, and each caller has its own connection [default: 64; `connections`:
    /// 1,64,1000]
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=10_000))]
    connections: Vec<u32>,
    /// Duration of each measurement of the broker, in seconds. The scenario `steady` also measures
    /// the token alone before and after the broker, each time for about three quarters of this
    /// duration, but at most 45 s. In the scenario `storm`, all members start their requests within this duration
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: u64,
    /// Warm-up time before each measurement of the broker, in seconds
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(0..=3_600))]
    warm_up: u64,
    /// Number of users whose keys `bench` enrols and releases; `bench` reuses the users of an
    /// earlier run
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    users: u32,
    /// Pre-populate the database with this many records, bypassing the broker
    #[arg(
        long, value_name = "RECORDS", conflicts_with = "users",
        value_parser = clap::value_parser!(u32).range(1..=10_000_000)
    )]
    seed: Option<u32>,
    /// Total number of calls per second, for all callers. In the scenario `steady`, the rate is a
    /// maximum [default: unlimited]. In the scenario `open`, the option takes a list of rates
    /// [default: a quarter, half, three quarters and nine tenths of the measured capacity]. In the
    /// scenario `fairness`, the rate applies to the principal with few calls [default: 5]. In the
    /// scenario `restart`, the rate applies to the client [default: 100]
    #[arg(
        long, value_name = "CALLS", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=1_000_000)
    )]
    rate: Vec<u32>,
    /// Number of threads that measure the token alone (scenario `steady`) [default: number of
    /// processors]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=256))]
    token_threads: Option<u32>,
    /// Rates of calls, as multiples of the measured capacity (scenario `overload`) [default: 3,10]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=100))]
    times: Vec<u32>,
    /// Deadlines of the calls in milliseconds (scenario `overload`) [default: 200,1000,5000]
    #[arg(
        long, value_name = "LIST", value_delimiter = ',', value_parser = clap::value_parser!(u64).range(1..=600_000)
    )]
    deadlines_ms: Vec<u64>,
    /// Numbers of callers that never pause (scenario `fairness`) [default: 0,16,250,1000]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(0..=10_000))]
    callers: Vec<u32>,
    /// PEM file with the certificate of the principal with few calls; this principal needs the role
    /// `release` (scenario `fairness`)
    #[arg(long, value_name = "FILE", requires = "light_key")]
    light_cert: Option<PathBuf>,
    /// PEM file with the private key of the certificate in --light-cert (scenario `fairness`)
    #[arg(long, value_name = "FILE", requires = "light_cert")]
    light_key: Option<PathBuf>,
    /// Number of idle connections whose memory is measured (scenario `connections`) [default: 1000]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    idle: Option<u32>,
    /// Number of members that fetch their keys (scenario `storm`) [default: 1000]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    members: Option<u32>,
    /// Number of restarts (scenario `restart`) [default: 1]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=100))]
    restarts: Option<u32>,
    /// Seed for the random start times of calls (scenarios `open`, `overload`, `fairness`, `storm`,
    /// `restart`) [default: 1]
    #[arg(long, value_name = "NUMBER")]
    schedule_seed: Option<u64>,
    /// Also write the results to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Note to include in the JSON document, such as the name of the machine or the token's
    /// settings
    #[arg(long, value_name = "TEXT")]
    note: Option<String>,
    /// Commit of the measured program, to include in the JSON document
    #[arg(long, value_name = "ID")]
    commit: Option<String>,
}

impl Arguments {
    /// Rejects an option that the scenario would ignore. Also rejects a list of values for an
    /// option that takes a single value in this scenario.
    fn check(&self) -> Result<(), Failure> {
        use Scenario::{Connections, Fairness, Open, Overload, Restart, Steady, Storm};
        let options: [(&str, bool, &[Scenario]); 14] = [
            (
                "--attach",
                self.attach.is_some(),
                &[Steady, Open, Overload, Fairness],
            ),
            (
                "--connections",
                !self.connections.is_empty(),
                &[Steady, Open, Overload, Fairness, Connections, Restart],
            ),
            (
                "--seed",
                self.seed.is_some(),
                &[Steady, Open, Overload, Fairness, Connections, Restart],
            ),
            (
                "--rate",
                !self.rate.is_empty(),
                &[Steady, Open, Fairness, Restart],
            ),
            ("--token-threads", self.token_threads.is_some(), &[Steady]),
            ("--times", !self.times.is_empty(), &[Overload]),
            ("--deadlines-ms", !self.deadlines_ms.is_empty(), &[Overload]),
            ("--callers", !self.callers.is_empty(), &[Fairness]),
            ("--light-cert", self.light_cert.is_some(), &[Fairness]),
            ("--light-key", self.light_key.is_some(), &[Fairness]),
            ("--idle", self.idle.is_some(), &[Connections]),
            ("--members", self.members.is_some(), &[Storm]),
            ("--restarts", self.restarts.is_some(), &[Restart]),
            (
                "--schedule-seed",
                self.schedule_seed.is_some(),
                &[Open, Overload, Fairness, Storm, Restart],
            ),
        ];
        let unused = options
            .iter()
            .find(|(_, is_given, scenarios)| *is_given && !scenarios.contains(&self.scenario));
        let scenario = self.scenario.name();
        if let Some((option, _, scenarios)) = unused {
            let names: Vec<String> = scenarios.iter().map(|one| one.name()).collect();
            let what = format!("--scenario {scenario} does not use {option}");
            return Err(Failure::new(Exit::Usage, what)
                .hint(format!("{option} applies to: {}", names.join(", "))));
        }
        let lists = [
            ("--rate", self.rate.len(), Open),
            ("--connections", self.connections.len(), Connections),
        ];
        for (option, count, scenario_with_list) in lists {
            if count > 1 && self.scenario != scenario_with_list {
                let what =
                    format!("--scenario {scenario} takes one value for {option}, not {count}");
                return Err(Failure::new(Exit::Usage, what));
            }
        }
        if self.scenario == Fairness && self.light_cert.is_none() {
            let what = "no certificate of a second principal specified";
            return Err(Failure::new(Exit::Usage, what).hint(
                "pass --light-cert and --light-key: a client certificate of another [[principal]] with the role `release`",
            ));
        }
        Ok(())
    }

    /// The number of callers, for scenarios that accept only one number.
    fn connections(&self) -> u32 {
        self.connections.first().copied().unwrap_or(64)
    }

    fn warm_up(&self) -> Duration {
        Duration::from_secs(self.warm_up)
    }

    fn duration(&self) -> Duration {
        Duration::from_secs(self.seconds)
    }

    fn schedule_seed(&self) -> u64 {
        self.schedule_seed.unwrap_or(1)
    }

    fn users(&self) -> Users {
        Users::new(self.seed.unwrap_or(self.users))
    }
}

/// The given list, or the default if the given list is empty.
fn or_default<T: Copy>(list: &[T], default: &[T]) -> Vec<T> {
    if list.is_empty() { default } else { list }.to_vec()
}

/// The arguments, the configuration and the facts about the token that a scenario needs.
struct Bench<'a> {
    arguments: &'a Arguments,
    context: &'a Context,
    config: &'a Config,
    token: bare::Facts,
}

pub(super) fn run(arguments: &Arguments, context: &Context) -> Result<(), Failure> {
    arguments.check()?;
    let config = context.config_for_token()?;
    arguments.connection.certificate()?;
    preflight::check(arguments, &config)?;
    let bench = Bench {
        arguments,
        context,
        config: &config,
        token: bare::facts(&config)?,
    };
    if let Some(count) = arguments.seed {
        let tenant = seed::tenant(&arguments.connection, &config)?;
        seed::seed(context, &config, tenant, Users::new(count))?;
    }
    let clock = document::Clock::start();
    let results = match arguments.scenario {
        Scenario::Steady => steady::run(&bench)?,
        Scenario::Open => block_on_until_interrupted(open::run(&bench))?,
        Scenario::Overload => block_on_until_interrupted(overload::run(&bench))?,
        Scenario::Fairness => block_on_until_interrupted(fairness::run(&bench))?,
        Scenario::Connections => block_on_until_interrupted(connections::run(&bench))?,
        Scenario::Storm => storm::run(&bench)?,
        Scenario::Restart => block_on_until_interrupted(restart::run(&bench))?,
    };
    finish(&bench, &clock, results)
}

/// Writes and shows the results. If a call failed, the command writes the results and then fails.
fn finish(bench: &Bench<'_>, clock: &document::Clock, results: Results) -> Result<(), Failure> {
    let (arguments, output) = (bench.arguments, bench.context.output);
    let failure = results.failure.clone();
    let steady = (arguments.scenario == Scenario::Steady)
        .then(|| results.rows.first().cloned())
        .flatten();
    let document = Document::new(bench, clock, results);
    if let Some(path) = &arguments.json {
        write_json(path, &document)?;
    }
    match steady {
        Some(fields) => output.fields(fields)?,
        None if output.is_json() => output.json(&document.to_value())?,
        None => output.text(&table::text(&document))?,
    }
    match failure {
        Some(what) => Err(Failure::new(Exit::Verification, what)),
        None => Ok(()),
    }
}

fn processors() -> u32 {
    let number = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    u32::try_from(number).unwrap_or(1)
}

/// Stops the measurement at SIGINT or SIGTERM, so that the command can also stop the broker that it
/// started.
fn block_on_until_interrupted<T>(
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    let internal = |error: std::io::Error| Failure::new(Exit::Internal, error.to_string());
    block_on(async {
        let mut interrupt = signal(SignalKind::interrupt()).map_err(internal)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(internal)?;
        tokio::select! {
            done = work => done,
            _ = interrupt.recv() => Err(Failure::new(Exit::Interrupted, "interrupted; nothing was measured")),
            _ = terminate.recv() => Err(Failure::new(Exit::Interrupted, "terminated; nothing was measured")),
        }
    })?
}

fn write_json(path: &std::path::Path, document: &Document) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(&document.to_value()).unwrap_or_default();
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

fn internal(error: impl std::fmt::Display) -> Failure {
    Failure::new(Exit::Internal, error.to_string())
}
