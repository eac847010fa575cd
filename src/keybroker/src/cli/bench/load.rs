//! The load of the scenario `steady`: a closed loop of callers, and the CPU times of the front, the
//! workers and this program.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use crate::cli::exit::{Exit, Failure};

use super::{callers::Callers, calls::Tally, cpu::CpuTime, metrics::Added, session::Session};

/// The parameters of the measurement.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) callers: u32,
    /// Maximum number of calls per second, for all callers together.
    pub(super) rate: Option<u32>,
    pub(super) warm_up: Duration,
    pub(super) duration: Duration,
}

/// The result of measuring the broker.
#[derive(Debug)]
pub(super) struct Measured {
    pub(super) channels: usize,
    pub(super) tally: Tally,
    pub(super) seconds: f64,
    pub(super) front_cpu_ms: f64,
    pub(super) worker_cpu_ms: f64,
    pub(super) load_cpu_ms: f64,
    /// The time that the broker itself needs for each call.
    pub(super) added: Option<Added>,
}

/// The CPU times of the measured processes and the broker's histogram at one point in time.
struct Moment {
    at: Instant,
    front: CpuTime,
    workers: CpuTime,
    load: CpuTime,
    added: Option<Added>,
}

impl Moment {
    fn now(front: u32, status: SocketAddr) -> Result<Self, Failure> {
        Ok(Self {
            added: Added::read(status),
            at: Instant::now(),
            front: CpuTime::of(front)?,
            workers: CpuTime::of_children(front)?,
            load: CpuTime::of(std::process::id())?,
        })
    }
}

pub(super) async fn run(plan: &Plan, session: &Session) -> Result<Measured, Failure> {
    let now = || Moment::now(session.broker.pid, session.broker.status);
    let callers = Callers::start(session, plan.callers, plan.rate);
    tokio::time::sleep(plan.warm_up).await;
    let before = now()?;
    callers.measure(true);
    tokio::time::sleep(plan.duration).await;
    callers.measure(false);
    let after = now()?;
    let tally = callers.stop().await?;
    if !after.workers.is_of_the_same(&before.workers) {
        let what = "a token worker was replaced during the measurement, so its CPU time is unknown";
        return Err(Failure::new(Exit::Verification, what).hint("the broker's log shows the cause"));
    }
    let added = after.added.zip(before.added);
    Ok(Measured {
        channels: session.clients.len(),
        tally,
        seconds: (after.at - before.at).as_secs_f64(),
        front_cpu_ms: after.front.since_ms(&before.front),
        worker_cpu_ms: after.workers.since_ms(&before.workers),
        load_cpu_ms: after.load.since_ms(&before.load),
        added: added.map(|(after, before)| after.since(&before)),
    })
}
