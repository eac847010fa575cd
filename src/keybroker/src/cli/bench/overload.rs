//! The scenario `overload`: an open loop with several times as many calls as the broker can serve,
//! and with deadlines.

use std::time::Duration;

use serde_json::json;

use crate::cli::exit::Failure;

use super::{
    Bench,
    document::{Results, figure, first_failure, real},
    memory::Memory,
    open::{capacity, counts},
    open_loop::{self, Arrivals},
    or_default,
    session::{self, Session},
};

const TIMES: [u32; 2] = [3, 10];
const DEADLINES_MS: [u64; 3] = [200, 1_000, 5_000];

pub(super) async fn run(bench: &Bench<'_>) -> Result<Results, Failure> {
    let arguments = bench.arguments;
    let times = or_default(&arguments.times, &TIMES);
    let deadlines_ms = or_default(&arguments.deadlines_ms, &DEADLINES_MS);
    let connections = arguments.connections().min(session::CONNECTIONS_MAX);
    let session = Session::open(bench, connections).await?;
    let mut results = Results {
        arguments: vec![
            ("connections", json!(connections)),
            ("times", json!(times)),
            ("deadlines_ms", json!(deadlines_ms)),
            ("schedule_seed", json!(arguments.schedule_seed())),
            ("warm_up_s", json!(arguments.warm_up)),
        ],
        ..Results::default()
    };
    for times in times {
        for &deadline_ms in &deadlines_ms {
            // The capacity is measured before each row, because other load on the machine changes it.
            let capacity = capacity(bench, &session).await?;
            bench.context.output.note(&format!(
                "measuring a load of {times} times the capacity, with a deadline of {deadline_ms} ms"
            ));
            let rate = capacity * f64::from(times);
            let before = Memory::of(session.broker.pid)?;
            let offered = open_loop::unwraps(
                &session.clients,
                &session.users,
                Arrivals::new(rate, arguments.duration(), arguments.schedule_seed()),
                Duration::from_millis(deadline_ms),
                |_| {},
            )
            .await?;
            let after = Memory::of(session.broker.pid)?;
            results.failure = first_failure([results.failure.take(), offered.tally.failure()]);
            let goodput = real(offered.tally.in_time) / offered.seconds / capacity;
            let mut row = vec![
                ("times", json!(times)),
                ("deadline_ms", json!(deadline_ms)),
                ("capacity_per_s", figure(capacity)),
                ("offered_per_s", figure(rate)),
                ("goodput", figure(goodput)),
                ("front_kib_before", json!(before.kib)),
                ("front_kib_after", json!(after.kib)),
                ("memory", json!(after.measure.name())),
            ];
            row.extend(counts(&offered));
            results.rows.push(row);
        }
    }
    Ok(results)
}
