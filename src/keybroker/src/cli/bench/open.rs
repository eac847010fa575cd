//! The scenario `open`: latency at one or more rates that do not depend on the broker's answers.

use serde_json::json;

use crate::cli::exit::Failure;

use super::{
    Bench, callers,
    document::{Results, figure, first_failure, nothing, real},
    open_loop::{self, Arrivals, Offered},
    session::{self, Session},
};

/// The default rates, in percent of the measured capacity.
const LOADS_PERCENT: [u32; 4] = [25, 50, 75, 90];

pub(super) async fn run(bench: &Bench<'_>) -> Result<Results, Failure> {
    let arguments = bench.arguments;
    let connections = arguments.connections().min(session::CONNECTIONS_MAX);
    let session = Session::open(bench, connections).await?;
    let capacity = capacity(bench, &session).await?;
    let rates: Vec<f64> = if arguments.rate.is_empty() {
        let shares = LOADS_PERCENT.map(|percent| capacity * f64::from(percent) / 100.0);
        shares.to_vec()
    } else {
        arguments.rate.iter().map(|rate| f64::from(*rate)).collect()
    };
    let mut results = Results {
        arguments: vec![
            ("connections", json!(connections)),
            ("deadline_ms", json!(session.deadline.as_millis())),
            ("schedule_seed", json!(arguments.schedule_seed())),
            ("warm_up_s", json!(arguments.warm_up)),
        ],
        ..Results::default()
    };
    for rate in rates {
        bench
            .context
            .output
            .note(&format!("measuring an open-loop load of {rate:.0} calls/s"));
        let arrivals = Arrivals::new(rate, arguments.duration(), arguments.schedule_seed());
        let offered = open_loop::unwraps(
            &session.clients,
            &session.users,
            arrivals,
            session.deadline,
            |_| {},
        )
        .await?;
        results.failure = first_failure([results.failure.take(), offered.tally.failure()]);
        let mut row = vec![
            ("offered_per_s", figure(rate)),
            ("capacity_per_s", figure(capacity)),
            ("load", figure(rate / capacity)),
        ];
        row.extend(counts(&offered));
        results.rows.push(row);
    }
    Ok(results)
}

/// Measures the capacity: the answered calls per second of callers that call without pauses.
pub(super) async fn capacity(bench: &Bench<'_>, session: &Session) -> Result<f64, Failure> {
    let arguments = bench.arguments;
    bench.context.output.note("measuring the capacity");
    let measured = callers::throughput(
        session,
        arguments.connections(),
        arguments.warm_up(),
        arguments.duration().div_f64(2.0),
    )
    .await?;
    let errors = measured.tally.errors();
    if measured.tally.answered() == 0 {
        let first = &measured.tally.first_error;
        return Err(nothing(&format!(
            "no call was answered while the capacity was measured, and {errors} calls failed; the error of the first \
             failed call: {first}"
        )));
    }
    Ok(measured.per_s)
}

/// The fields that are in every row of an open loop. The other counts add up to `due`.
pub(super) fn counts(offered: &Offered) -> Vec<crate::cli::output::Field> {
    let tally = &offered.tally;
    vec![
        ("due", json!(offered.due())),
        ("in_time", json!(tally.in_time)),
        ("late", json!(tally.late)),
        ("refused", json!(tally.refused)),
        ("failed", json!(tally.failed)),
        ("unsent", json!(offered.unsent)),
        ("seconds", figure(offered.seconds)),
        (
            "in_time_per_s",
            figure(real(tally.in_time) / offered.seconds),
        ),
        ("p50_ms", figure(tally.answers.quantile_ms(0.5))),
        ("p99_ms", figure(tally.answers.quantile_ms(0.99))),
        ("p999_ms", figure(tally.answers.quantile_ms(0.999))),
        ("max_ms", figure(tally.answers.max_ms())),
        ("refusal_p50_ms", figure(tally.refusals.quantile_ms(0.5))),
        ("refusal_p99_ms", figure(tally.refusals.quantile_ms(0.99))),
        ("dispatch_p99_ms", figure(tally.dispatch.quantile_ms(0.99))),
    ]
}
