//! A closed loop of callers: each caller has one call in progress and compares every released key with the
//! enrolled key.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use keybroker_client::Client;
use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, interval_at},
};

use crate::cli::exit::Failure;

use super::{
    calls::{self, Outcome, Tally},
    document::real,
    internal,
    session::Session,
    users::Users,
};

const FIRST_ANSWER_PAUSE: Duration = Duration::from_millis(20);

/// Callers that run until they are stopped or dropped.
pub(super) struct Callers {
    tasks: JoinSet<Tally>,
    measuring: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Callers {
    /// Starts callers and distributes them over the clients. If a rate is set, all callers together
    /// make this number of calls per second.
    pub(super) fn start(session: &Session, count: u32, rate: Option<u32>) -> Self {
        let mut callers = Self {
            tasks: JoinSet::new(),
            measuring: Arc::default(),
            answered: Arc::default(),
            stop: Arc::default(),
        };
        for (number, client) in (0..count).zip(session.clients.iter().cycle()) {
            let caller = Caller {
                client: client.clone(),
                users: session.users.clone(),
                deadline: session.deadline,
                pace: rate.map(|rate| pace(number, count, rate)),
                measuring: Arc::clone(&callers.measuring),
                answered: Arc::clone(&callers.answered),
                stop: Arc::clone(&callers.stop),
            };
            callers.tasks.spawn(caller.run());
        }
        callers
    }

    /// Starts or ends the measurement. A call is counted if it ended during the measurement.
    pub(super) fn measure(&self, measuring: bool) {
        self.measuring.store(measuring, Ordering::Relaxed);
    }

    /// The number of calls answered in this measurement so far.
    fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Waits for the last calls and returns the counts.
    pub(super) async fn stop(mut self) -> Result<Tally, Failure> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Tally::new();
        while let Some(tally) = self.tasks.join_next().await {
            all.add(&tally.map_err(internal)?);
        }
        Ok(all)
    }
}

/// The time of a caller's first call, and the interval between its calls. The callers start one
/// after another, so that their calls are spread evenly.
fn pace(number: u32, count: u32, rate: u32) -> (tokio::time::Instant, Duration) {
    let pace = Duration::from_secs(1) * count / rate;
    (tokio::time::Instant::now() + pace * number / count, pace)
}

/// The counts of a closed loop, and the number of answered calls per second.
pub(super) struct Throughput {
    pub(super) tally: Tally,
    pub(super) per_s: f64,
}

/// Measures the throughput of callers that call without pauses.
pub(super) async fn throughput(
    session: &Session,
    count: u32,
    warm_up: Duration,
    duration: Duration,
) -> Result<Throughput, Failure> {
    let callers = Callers::start(session, count, None);
    tokio::time::sleep(warm_up).await;
    let began = Instant::now();
    callers.measure(true);
    tokio::time::sleep(duration).await;
    // On a busy machine, a short measurement may end before the first answer.
    while callers.answered() == 0 && began.elapsed() < session.deadline {
        tokio::time::sleep(FIRST_ANSWER_PAUSE).await;
    }
    callers.measure(false);
    let seconds = began.elapsed().as_secs_f64();
    let tally = callers.stop().await?;
    Ok(Throughput {
        per_s: real(tally.answered()) / seconds,
        tally,
    })
}

struct Caller {
    client: Client,
    users: Users,
    deadline: Duration,
    /// The time of the first call, and the interval between calls.
    pace: Option<(tokio::time::Instant, Duration)>,
    measuring: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Caller {
    async fn run(self) -> Tally {
        let mut tally = Tally::new();
        let mut ticks = self.pace.map(|(first, pace)| interval_at(first, pace));
        if let Some(ticks) = &mut ticks {
            // After a late call, the interval prevents a burst of calls that would make up for the
            // delay.
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        while !self.stop.load(Ordering::Relaxed) {
            if let Some(ticks) = &mut ticks {
                ticks.tick().await;
            }
            let user = self.users.any();
            let done = calls::unwrap(&self.client, &user, Instant::now(), self.deadline).await;
            if self.measuring.load(Ordering::Relaxed) {
                self.answered.fetch_add(
                    u64::from(done.outcome == Outcome::InTime),
                    Ordering::Relaxed,
                );
                tally.count(done);
            }
        }
        tally
    }
}
