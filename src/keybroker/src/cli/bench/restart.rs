//! The scenario `restart`: the broker is stopped with SIGTERM and started again, while a client
//! that follows the retry rule makes calls.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use keybroker_client::RetryPolicy;
use serde_json::json;
use tokio::sync::oneshot;

use crate::cli::{exit::Failure, output::Field};

use super::{
    Bench,
    calls::Outcome,
    document::{Results, figure},
    internal,
    open::counts,
    open_loop::{self, Arrivals},
    served::{RestartTime, Served},
    session::{self, Session},
};

const RESTARTS: u32 = 1;
/// Calls per second.
const RATE: u32 = 100;
/// Length of an interval of the timeline, in milliseconds.
const INTERVAL_MS: u64 = 100;

pub(super) async fn run(bench: &Bench<'_>) -> Result<Results, Failure> {
    let arguments = bench.arguments;
    let restarts = arguments.restarts.unwrap_or(RESTARTS);
    let rate = arguments.rate.first().copied().unwrap_or(RATE);
    let connections = arguments.connections().min(session::CONNECTIONS_MAX);
    let broker = Served::start_with_fixed_addresses(bench).await?;
    let Session {
        mut broker,
        clients,
        users,
        deadline,
    } = Session::with(bench, broker, connections, RetryPolicy::default()).await?;
    bench
        .context
        .output
        .note(&format!("measuring {restarts} restarts"));
    let began = Instant::now();
    // The restarts are spread over the measurement, so that the timeline shows calls before and
    // after each restart.
    let pause = arguments.duration() / (restarts + 1);
    let (ended, calls_ended) = oneshot::channel::<()>();
    let restarting = async {
        let mut times = Vec::new();
        for number in 1..=restarts {
            let due = began + pause * number;
            tokio::time::sleep_until(due.into()).await;
            times.push(broker.restart().await?);
        }
        // The broker must run until the last call is answered.
        calls_ended.await.map_err(internal)?;
        Ok::<_, Failure>(times)
    };
    let mut timeline = Timeline::new(began);
    let arrivals = Arrivals::new(
        f64::from(rate),
        arguments.duration(),
        arguments.schedule_seed(),
    );
    let calling = async {
        let offered = open_loop::unwraps(&clients, &users, arrivals, deadline, |done| {
            timeline.add(done.at, done.outcome);
        })
        .await;
        let _restarts_failed = ended.send(());
        offered
    };
    let (times, offered) = tokio::try_join!(restarting, calling)?;
    let longest = |time: fn(&RestartTime) -> Duration| {
        let milliseconds = times.iter().map(|one| time(one).as_secs_f64() * 1_000.0);
        milliseconds.max_by(f64::total_cmp)
    };
    let mut row = vec![
        ("restarts", json!(restarts)),
        ("offered_per_s", json!(rate)),
        ("stop_ms", figure(longest(|time| time.stop))),
        ("start_ms", figure(longest(|time| time.start))),
        ("gap_ms", figure(timeline.longest_gap_ms())),
    ];
    row.extend(counts(&offered));
    Ok(Results {
        arguments: vec![
            ("connections", json!(connections)),
            ("deadline_ms", json!(deadline.as_millis())),
            ("rate", json!(rate)),
            ("restarts", json!(restarts)),
            ("schedule_seed", json!(arguments.schedule_seed())),
        ],
        rows: vec![row],
        timeline: timeline.rows(),
        failure: offered.tally.failure(),
    })
}

/// The calls that ended in each interval, and the times of the answers.
struct Timeline {
    began: Instant,
    answers: Vec<Instant>,
    intervals: BTreeMap<u64, [u64; 2]>,
}

impl Timeline {
    fn new(began: Instant) -> Self {
        Self {
            began,
            answers: Vec::new(),
            intervals: BTreeMap::new(),
        }
    }

    fn add(&mut self, at: Instant, outcome: Outcome) {
        let since = at.saturating_duration_since(self.began).as_millis();
        let interval = u64::try_from(since).unwrap_or(u64::MAX) / INTERVAL_MS;
        let is_answer = outcome == Outcome::InTime;
        if is_answer {
            self.answers.push(at);
        }
        self.intervals.entry(interval).or_default()[usize::from(!is_answer)] += 1;
    }

    /// The longest time between two consecutive answers, in milliseconds.
    fn longest_gap_ms(&mut self) -> Option<f64> {
        self.answers.sort_unstable();
        let gaps = self.answers.windows(2).map(|pair| pair[1] - pair[0]);
        gaps.max().map(|gap| gap.as_secs_f64() * 1_000.0)
    }

    /// All intervals from the first to the last, including intervals without an answer.
    fn rows(&self) -> Vec<Vec<Field>> {
        let last = self.intervals.last_key_value();
        let intervals = last.map_or(0..0, |(last, _)| 0..*last + 1);
        intervals
            .map(|number| {
                let [answered, unanswered] =
                    self.intervals.get(&number).copied().unwrap_or_default();
                vec![
                    ("ms", json!(number * INTERVAL_MS)),
                    ("in_time", json!(answered)),
                    ("not_in_time", json!(unanswered)),
                ]
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gap_is_the_longest_time_without_an_answer() {
        let began = Instant::now();
        let mut timeline = Timeline::new(began);
        for (ms, outcome) in [
            (10, Outcome::InTime),
            (920, Outcome::InTime),
            (950, Outcome::InTime),
            (120, Outcome::InTime),
            (500, Outcome::Failed),
        ] {
            timeline.add(began + Duration::from_millis(ms), outcome);
        }
        let gap = timeline.longest_gap_ms().unwrap();
        assert!((gap - 800.0).abs() < 0.001, "{gap}");
        let rows = timeline.rows();
        assert_eq!(rows.len(), 10);
        assert_eq!(
            rows[5],
            [
                ("ms", json!(500)),
                ("in_time", json!(0)),
                ("not_in_time", json!(1))
            ]
        );
    }
}
