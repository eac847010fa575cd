//! The scenario `connections`: throughput over many active connections, and memory used by each
//! idle connection.

use std::time::{Duration, Instant};

use keybroker_client::RetryPolicy;
use serde_json::{Value, json};

use crate::cli::{
    exit::{Exit, Failure},
    output::Field,
};

use super::{
    Bench, callers,
    calls::{self, Outcome},
    document::{Results, figure, first_failure, real},
    issuer::Issuer,
    memory::Memory,
    or_default,
    rest::{Rest, Version},
    served::{Changed, Served},
    session::{Session, connect_all, in_parallel},
};

/// Numbers of active connections.
pub(super) const ACTIVE: [u32; 3] = [1, 64, 1_000];
/// Number of idle connections.
pub(super) const IDLE: u32 = 1_000;
/// Number of connections whose throughput is the reference for the other throughputs.
const REFERENCE: u32 = 64;
/// Time between the opening of the last connection and the reading of the memory.
const SETTLE: Duration = Duration::from_secs(2);

/// The API and the protocol of an idle connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Api {
    /// gRPC over HTTP/2, with a client certificate.
    Grpc,
    /// REST over HTTP/1.1, with an access token.
    RestHttp1,
    /// REST over HTTP/2, with an access token.
    RestHttp2,
}

impl Api {
    const ALL: [Self; 3] = [Self::Grpc, Self::RestHttp1, Self::RestHttp2];

    const fn name(self) -> &'static str {
        match self {
            Self::Grpc => "gRPC, client certificate",
            Self::RestHttp1 => "REST, HTTP/1.1",
            Self::RestHttp2 => "REST, HTTP/2",
        }
    }
}

pub(super) async fn run(bench: &Bench<'_>) -> Result<Results, Failure> {
    let arguments = bench.arguments;
    let numbers = or_default(&arguments.connections, &ACTIVE);
    let idle = arguments.idle.unwrap_or(IDLE);
    let mut results = Results {
        arguments: vec![
            ("connections", json!(numbers)),
            ("idle", json!(idle)),
            ("warm_up_s", json!(arguments.warm_up)),
        ],
        ..Results::default()
    };
    // Each measurement starts a new broker, because a process does not return the memory of closed
    // connections immediately.
    for api in Api::ALL {
        bench.context.output.note(&format!(
            "measuring the memory of {idle} idle connections (API {})",
            api.name()
        ));
        results.rows.push(idle_row(bench, api, idle).await?);
    }
    let mut session = Session::open(bench, 1).await?;
    let mut measured = Vec::new();
    for number in numbers {
        bench
            .context
            .output
            .note(&format!("measuring {number} active connections"));
        session.clients = connect_all(
            &arguments.connection,
            &session.broker.endpoint,
            number,
            RetryPolicy::never(),
        )
        .await?;
        let throughput =
            callers::throughput(&session, number, arguments.warm_up(), arguments.duration())
                .await?;
        results.failure = first_failure([results.failure.take(), throughput.tally.failure()]);
        measured.push((number, throughput));
    }
    let reference = measured
        .iter()
        .find(|(number, _)| *number == REFERENCE)
        .map(|(_, throughput)| throughput.per_s)
        .filter(|per_s| *per_s > 0.0);
    for (number, throughput) in measured {
        let tally = &throughput.tally;
        let relative = reference.map(|reference| throughput.per_s / reference);
        results.rows.push(row(
            "active",
            number,
            [
                ("in_time_per_s", figure(throughput.per_s)),
                ("relative_to_64", figure(relative)),
                ("p50_ms", figure(tally.answers.quantile_ms(0.5))),
                ("p99_ms", figure(tally.answers.quantile_ms(0.99))),
                ("calls", json!(tally.calls())),
                ("in_time", json!(tally.in_time)),
                ("late", json!(tally.late)),
                ("refused", json!(tally.refused)),
                ("failed", json!(tally.failed)),
            ],
        ));
    }
    Ok(results)
}

fn row(
    kind: &'static str,
    connections: u32,
    fields: impl IntoIterator<Item = Field>,
) -> Vec<Field> {
    let common: [(_, Value); 2] = [("kind", json!(kind)), ("connections", json!(connections))];
    common.into_iter().chain(fields).collect()
}

/// Opens connections, makes one call on each, and compares the front's memory before and after.
async fn idle_row(bench: &Bench<'_>, api: Api, count: u32) -> Result<Vec<Field>, Failure> {
    let mut changed = Changed::copy_of(bench)?;
    let issuer = Issuer::trusted_by(&mut changed)?;
    let broker = Served::start(bench, Some(changed)).await?;
    // The first calls make the front allocate memory that it keeps for later calls.
    let session = Session::with(bench, broker, 1, RetryPolicy::never()).await?;
    let pid = session.broker.pid;
    let before = Memory::of(pid)?;
    let began = Instant::now();
    let after = match api {
        Api::Grpc => {
            let open = connect_all(
                &bench.arguments.connection,
                &session.broker.endpoint,
                count,
                RetryPolicy::never(),
            )
            .await?;
            in_parallel(count, |number| {
                let client = open[usize::try_from(number).unwrap_or_default()].clone();
                let (user, deadline) = (session.users.any(), session.deadline);
                async move {
                    let done = calls::unwrap(&client, &user, Instant::now(), deadline).await;
                    match done.outcome {
                        Outcome::InTime => Ok(()),
                        _ => Err(unanswered(&done.error.unwrap_or_default())),
                    }
                }
            })
            .await?;
            settled(pid).await?
        }
        Api::RestHttp1 | Api::RestHttp2 => {
            let version = match api {
                Api::RestHttp2 => Version::Http2,
                _ => Version::Http1,
            };
            let rest = Rest::of(bench, &session.broker)?;
            let _open = in_parallel(count, |number| {
                let rest = rest.clone();
                let token = issuer.access_token(&format!("idle-{number:07}"));
                async move {
                    let mut open = rest
                        .connect(version)
                        .await
                        .map_err(|error| unanswered(&error))?;
                    // The user in the access token has no key. Status 404 therefore proves that the
                    // broker accepted the access token.
                    match rest.fetch(&mut open, &token?).await {
                        Ok(answer) if answer.status == 404 => Ok(open),
                        Ok(answer) => Err(unanswered(&answer.describe())),
                        Err(error) => Err(unanswered(&error)),
                    }
                }
            })
            .await?;
            settled(pid).await?
        }
    };
    let kib = real(after.kib.saturating_sub(before.kib));
    Ok(row(
        "idle",
        count,
        [
            ("api", json!(api.name())),
            ("front_kib_before", json!(before.kib)),
            ("front_kib_after", json!(after.kib)),
            ("kib_per_connection", figure(kib / f64::from(count))),
            ("memory", json!(after.measure.name())),
            ("seconds", figure(began.elapsed().as_secs_f64())),
        ],
    ))
}

async fn settled(pid: u32) -> Result<Memory, Failure> {
    tokio::time::sleep(SETTLE).await;
    Memory::of(pid)
}

fn unanswered(what: &str) -> Failure {
    Failure::new(
        Exit::Verification,
        format!("a call on a new connection failed: {what}"),
    )
}
