//! The load: a closed loop of callers. Each caller has one call in progress and compares every released key with the
//! enrolled key.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, interval_at},
};

use crate::cli::{
    client::{connect, refusal},
    exit::{Exit, Failure},
    output::Output,
    progress::Progress,
};
use keybroker_client::{Client, Reason};

use super::{
    cpu::CpuTime,
    metrics::Added,
    users::{User, Users},
};

/// Maximum number of TLS connections. If there are more callers than connections, several callers share a connection.
/// The number is far below the default limit of a listener.
const CONNECTIONS_MAX: u32 = 256;
/// Number of concurrent calls during the enrolment.
const ENROL_AT_ONCE: u32 = 16;
const ENROL_STEP: usize = 16;
/// Longest latency that the histogram can record, in microseconds.
const LATENCY_US_MAX: u64 = 600_000_000;

/// What to measure.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// A client that is not connected yet and does not retry.
    pub(super) client: Client,
    pub(super) endpoint: String,
    pub(super) connections: u32,
    pub(super) users: Users,
    /// Whether the users have their keys already.
    pub(super) enrolled: bool,
    /// Maximum calls per second of all callers together.
    pub(super) rate: Option<u32>,
    pub(super) warm_up: Duration,
    pub(super) duration: Duration,
    /// Process id of the front.
    pub(super) front: u32,
    /// Address of the broker's status listener.
    pub(super) status: SocketAddr,
}

impl Plan {
    /// The time of a caller's first call, and the interval between its calls. The callers begin one after another, so
    /// that their calls are spread evenly.
    fn pace(&self, number: u32) -> Option<(tokio::time::Instant, Duration)> {
        let pace = Duration::from_secs(1) * self.connections / self.rate?;
        let first = tokio::time::Instant::now() + pace * number / self.connections;
        Some((first, pace))
    }
}

/// Result of the broker's measurement.
#[derive(Debug)]
pub(super) struct Measured {
    pub(super) channels: usize,
    pub(super) operations: u64,
    pub(super) errors: u64,
    pub(super) first_error: String,
    pub(super) seconds: f64,
    pub(super) latency_us: Histogram<u64>,
    pub(super) front_cpu_ms: f64,
    pub(super) worker_cpu_ms: f64,
    pub(super) load_cpu_ms: f64,
    /// The time that the broker added to each call.
    pub(super) added: Option<Added>,
}

impl Measured {
    /// The number of operations as a divisor, which is at least 1.
    pub(super) fn operations_f64(&self) -> f64 {
        f64::from(u32::try_from(self.operations.max(1)).unwrap_or(u32::MAX))
    }
}

/// Results of one caller.
struct Seen {
    operations: u64,
    errors: u64,
    first_error: String,
    latency_us: Histogram<u64>,
}

impl Seen {
    fn new() -> Result<Self, Failure> {
        Ok(Self {
            operations: 0,
            errors: 0,
            first_error: String::new(),
            latency_us: Histogram::new_with_bounds(1, LATENCY_US_MAX, 3).map_err(internal)?,
        })
    }

    fn add(&mut self, other: Self) -> Result<(), Failure> {
        self.operations += other.operations;
        self.errors += other.errors;
        if self.first_error.is_empty() {
            self.first_error = other.first_error;
        }
        self.latency_us.add(&other.latency_us).map_err(internal)
    }
}

/// The CPU times of the measured processes and the broker's histogram, at one moment.
struct Moment {
    at: Instant,
    front: CpuTime,
    workers: CpuTime,
    load: CpuTime,
    added: Option<Added>,
}

impl Moment {
    fn now(plan: &Plan) -> Result<Self, Failure> {
        Ok(Self {
            added: Added::read(plan.status),
            at: Instant::now(),
            front: CpuTime::of(plan.front)?,
            workers: CpuTime::of_children(plan.front)?,
            load: CpuTime::of(std::process::id())?,
        })
    }
}

pub(super) async fn run(plan: &Plan, output: Output) -> Result<Measured, Failure> {
    let mut clients = Vec::new();
    for _ in 0..plan.connections.min(CONNECTIONS_MAX) {
        let client = plan.client.with_separate_connection();
        connect::connect(&client, &plan.endpoint).await?;
        clients.push(client);
    }
    if !plan.enrolled {
        let progress = Progress::new(output, "enrolling users", plan.users.count().into());
        enrol(plan, &clients, progress).await?;
    }
    let measuring = Arc::new(AtomicBool::new(false));
    let stop = Arc::new(AtomicBool::new(false));
    let mut callers = JoinSet::new();
    for (number, client) in (0..plan.connections).zip(clients.iter().cycle()) {
        callers.spawn(
            Caller {
                client: client.clone(),
                users: plan.users.clone(),
                pace: plan.pace(number),
                measuring: Arc::clone(&measuring),
                stop: Arc::clone(&stop),
            }
            .run(),
        );
    }
    tokio::time::sleep(plan.warm_up).await;
    let before = Moment::now(plan)?;
    measuring.store(true, Ordering::Relaxed);
    tokio::time::sleep(plan.duration).await;
    measuring.store(false, Ordering::Relaxed);
    let after = Moment::now(plan)?;
    stop.store(true, Ordering::Relaxed);
    let mut all = Seen::new()?;
    while let Some(seen) = callers.join_next().await {
        all.add(seen.map_err(internal)??)?;
    }
    if !after.workers.is_of_the_same(&before.workers) {
        let what = "a token worker was replaced during the measurement, so its CPU time is unknown";
        return Err(Failure::new(Exit::Verification, what).hint("the broker's log shows the cause"));
    }
    let added = after.added.zip(before.added);
    Ok(Measured {
        channels: clients.len(),
        operations: all.operations,
        errors: all.errors,
        first_error: all.first_error,
        seconds: (after.at - before.at).as_secs_f64(),
        latency_us: all.latency_us,
        front_cpu_ms: after.front.since_ms(&before.front),
        worker_cpu_ms: after.workers.since_ms(&before.workers),
        load_cpu_ms: after.load.since_ms(&before.load),
        added: added.map(|(after, before)| after.since(&before)),
    })
}

/// Creates the users' keys. Keys of an earlier run are used again.
async fn enrol(plan: &Plan, clients: &[Client], progress: Progress) -> Result<(), Failure> {
    let progress = Arc::new(progress);
    let mut tasks = JoinSet::new();
    for (first, client) in (0..ENROL_AT_ONCE).zip(clients.iter().cycle()) {
        let client = client.clone();
        let users = plan.users.clone();
        let progress = Arc::clone(&progress);
        tasks.spawn(async move {
            for number in (first..users.count()).step_by(ENROL_STEP) {
                let user = users.user(number);
                match client.create_user_key(&user.key, &user.material).await {
                    Err(error) if error.reason() != Some(Reason::KeyExists) => {
                        return Err(refusal::failure(&error));
                    }
                    _ => progress.step(),
                }
            }
            Ok(())
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.map_err(internal)??;
    }
    Ok(())
}

struct Caller {
    client: Client,
    users: Users,
    /// The time of the first call, and the interval between calls.
    pace: Option<(tokio::time::Instant, Duration)>,
    measuring: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
}

impl Caller {
    async fn run(self) -> Result<Seen, Failure> {
        let mut seen = Seen::new()?;
        let mut ticks = self.pace.map(|(first, pace)| interval_at(first, pace));
        if let Some(ticks) = &mut ticks {
            // After a late call, the next calls do not follow in a burst.
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        while !self.stop.load(Ordering::Relaxed) {
            if let Some(ticks) = &mut ticks {
                ticks.tick().await;
            }
            let user = self.users.any();
            let began = Instant::now();
            let counted = self.measuring.load(Ordering::Relaxed);
            let result = self.call(&user).await;
            if !counted {
                continue;
            }
            match result {
                Ok(()) => {
                    seen.operations += 1;
                    let micros = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
                    seen.latency_us.saturating_record(micros.max(1));
                }
                Err(error) => {
                    seen.errors += 1;
                    seen.first_error = error.message;
                }
            }
        }
        Ok(seen)
    }

    async fn call(&self, user: &User) -> Result<(), Failure> {
        match self.client.unwrap_user_key(&user.key).await {
            Ok(released) if released.key_material.expose() == user.material.expose() => Ok(()),
            Ok(_) => Err(Failure::new(
                Exit::Verification,
                "a released key differs from the enrolled key",
            )),
            Err(error) => Err(refusal::failure(&error)),
        }
    }
}

fn internal(error: impl std::fmt::Display) -> Failure {
    Failure::new(Exit::Internal, error.to_string())
}
