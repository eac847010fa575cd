//! The scenario `fairness`: a principal that makes few calls, first alone and then while callers of
//! another principal call without pauses.

use keybroker_client::RetryPolicy;
use serde_json::json;

use crate::cli::{
    client::connect::Connection,
    exit::{Exit, Failure},
    output::Field,
};

use super::{
    Bench,
    callers::Callers,
    calls::Tally,
    document::{Results, figure, first_failure, real},
    open::counts,
    open_loop::{self, Arrivals, Offered},
    or_default, seed,
    session::{self, Session, connect_all},
};

/// Number of connections of the principal that makes few calls.
pub(super) const LIGHT_CONNECTIONS: u32 = 1;
const CALLERS: [u32; 4] = [0, 16, 250, 1_000];
/// Calls per second of the principal that makes few calls.
const RATE: u32 = 5;

pub(super) async fn run(bench: &Bench<'_>) -> Result<Results, Failure> {
    let arguments = bench.arguments;
    let (Some(cert), Some(key)) = (&arguments.light_cert, &arguments.light_key) else {
        return Err(super::internal("the arguments were checked before"));
    };
    let light = arguments.connection.with_identity(cert, key);
    check_principals(bench, &light)?;
    let numbers = or_default(&arguments.callers, &CALLERS);
    let rate = arguments.rate.first().copied().unwrap_or(RATE);
    let connections = arguments.connections().min(session::CONNECTIONS_MAX);
    let session = Session::open(bench, connections).await?;
    let light = connect_all(
        &light,
        &session.broker.endpoint,
        LIGHT_CONNECTIONS,
        RetryPolicy::never(),
    )
    .await
    .map_err(of_light)?;
    let mut results = Results {
        arguments: vec![
            ("callers", json!(numbers)),
            ("connections", json!(connections)),
            ("deadline_ms", json!(session.deadline.as_millis())),
            ("rate", json!(rate)),
            ("schedule_seed", json!(arguments.schedule_seed())),
            ("warm_up_s", json!(arguments.warm_up)),
        ],
        ..Results::default()
    };
    for number in numbers {
        bench
            .context
            .output
            .note(&format!("measuring beside {number} callers"));
        let heavy = Callers::start(&session, number, None);
        tokio::time::sleep(arguments.warm_up()).await;
        heavy.measure(true);
        let offered = open_loop::unwraps(
            &light,
            &session.users,
            Arrivals::new(
                f64::from(rate),
                arguments.duration(),
                arguments.schedule_seed(),
            ),
            session.deadline,
            |_| {},
        )
        .await?;
        heavy.measure(false);
        let heavy = heavy.stop().await?;
        results.failure = first_failure([
            results.failure.take(),
            offered.tally.failure(),
            heavy.failure(),
        ]);
        results.rows.push(row(number, &heavy, &offered));
    }
    Ok(results)
}

/// The two certificates must identify different principals.
fn check_principals(bench: &Bench<'_>, light: &Connection) -> Result<(), Failure> {
    let heavy = seed::principal(&bench.arguments.connection, bench.config);
    let light = seed::principal(light, bench.config).map_err(of_light)?;
    match heavy {
        // The broker later rejects a certificate that identifies no configured principal.
        Ok(heavy) if heavy.name() == light.name() => {
            let name = light.name();
            let what = format!("--light-cert and --cert identify the same principal, {name}");
            Err(Failure::new(Exit::Usage, what)
                .hint("pass a certificate of another [[principal]] with --light-cert"))
        }
        _ => Ok(()),
    }
}

fn row(callers: u32, heavy: &Tally, light: &Offered) -> Vec<Field> {
    let heavy_per_s = real(heavy.in_time) / light.seconds;
    let mut row = vec![
        ("callers", json!(callers)),
        ("callers_in_time_per_s", figure(heavy_per_s)),
        ("callers_refused", json!(heavy.refused)),
        ("callers_late", json!(heavy.late)),
        ("callers_failed", json!(heavy.failed)),
    ];
    row.extend(counts(light));
    row
}

/// Replaces the names of options in the message of a connection failure with the names of the
/// second principal's options.
fn of_light(failure: Failure) -> Failure {
    let renamed = |text: &str| {
        text.replace("--cert", "--light-cert")
            .replace("--key", "--light-key")
    };
    Failure {
        message: renamed(&failure.message),
        hint: failure.hint.as_deref().map(renamed),
        ..failure
    }
}
