//! The queue of jobs that wait for a session, and the workers that take them. The front has only one queue. The queue
//! is bounded, and determines fairness and waiting times. A worker has at most one job per session thread.
//!
//! A job that cannot be done in time is refused when it arrives, so that the token works only for callers who still
//! wait. The token serves the principals in turns ([`backlogs`]). The duration of a job is estimated for each key
//! ([`estimate`]).
//!
//! Mitigation: M8 of `THREAT_MODEL.md`.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use keybroker_core::{
    call::{Deadline, spread},
    metrics::HistogramHandle,
};

use crate::{
    Error, Settings,
    caller::{Caller, Lane},
    job::Job,
    link::Link,
    measures::Measures,
};

use backlogs::{Backlogs, Load, Served, Waiting};
use estimate::{Estimate, Estimates};
pub(crate) use estimate::{Kind, Operation};

mod backlogs;
mod calls;
mod estimate;

pub(crate) use calls::note_answered;
pub use calls::{Calls, Entered, leave, leave_if_slow};
pub use estimate::Planned;

/// The shortest retry delay that an error contains.
const RETRY_MIN: Duration = Duration::from_millis(10);
/// Shortest interval between two searches of a full queue for abandoned jobs, so that refusals stay
/// cheap.
const SEARCH_INTERVAL: Duration = Duration::from_millis(20);

/// The queue and its workers.
#[derive(Debug)]
pub(super) struct Queue {
    state: Mutex<State>,
    length_max: usize,
    /// Number of principals' jobs that arrived since the start of the broker.
    of_principals: AtomicU64,
}

#[derive(Debug)]
struct State {
    waiting: Backlogs<Job>,
    links: Vec<Arc<Link>>,
    estimates: Estimates,
    searched: Option<Instant>,
    queue_wait: HistogramHandle,
}

/// Estimate of the time at which a token would complete a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Offer {
    /// No worker is ready.
    NoWorker,
    /// The job would be completed after this time, before its deadline.
    InTime(Duration),
    /// The job would be completed after this time, but too late.
    TooLate(Duration),
}

impl Waiting for Job {
    fn queued(&self) -> Instant {
        self.queued
    }

    fn deadline(&self) -> Instant {
        self.caller.deadline().instant()
    }

    fn is_abandoned(&self) -> bool {
        self.done.is_closed() || self.abandoned.is_set()
    }
}

impl Queue {
    pub(super) fn new(settings: &Settings, measures: &Measures) -> Self {
        Self {
            state: Mutex::new(State {
                waiting: Backlogs::new(settings.weights.clone()),
                links: Vec::new(),
                estimates: Estimates::default(),
                searched: None,
                queue_wait: measures.queue_wait.clone(),
            }),
            length_max: settings.queue_length_max,
            of_principals: AtomicU64::new(0),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a job. If a session is free, the session gets the job immediately. Refuses a job that cannot be done in
    /// time.
    pub(super) fn push(&self, job: Job) -> Result<(), Error> {
        let now = Instant::now();
        let mut state = self.state();
        let estimate = state.estimates.of(Kind::of(&job.work));
        let lane = job.caller.lane().clone();
        if lane != Lane::Background {
            self.of_principals.fetch_add(1, Ordering::Relaxed);
        }
        state.check_in_time(&lane, estimate, job.caller.deadline(), now)?;
        if state.waiting.len() >= self.length_max {
            state.make_room(&lane, estimate.mean, now)?;
        }
        state.waiting.push(&lane, job, estimate.mean);
        state.dispatch();
        Ok(())
    }

    /// Returns an error if all jobs of this caller would certainly be refused, for every key. The check is cheap,
    /// because it reads only the state of the queue.
    pub(super) fn check_admission(&self, caller: &Caller, planned: Planned) -> Result<(), Error> {
        let state = self.state();
        let least = state.estimates.least(planned);
        state.check_in_time(caller.lane(), least, caller.deadline(), Instant::now())
    }

    /// Estimates the time at which a job of this kind would be completed. Does not change the queue.
    pub(super) fn offer(&self, kind: Kind, caller: &Caller) -> Offer {
        let state = self.state();
        let (sessions, busy) = state.sessions();
        if sessions == 0 {
            return Offer::NoWorker;
        }
        let job = state.estimates.of(Some(kind));
        // On average, half of each running job remains.
        let wait = (state.waiting.work() + job.mean * count(busy) / 2) / count(sessions);
        let deadline = caller.deadline();
        let in_time = state.check_in_time(caller.lane(), job, deadline, Instant::now());
        if in_time.is_ok() && job.mean <= deadline.remaining() {
            Offer::InTime(wait + job.mean)
        } else {
            Offer::TooLate(wait + job.mean)
        }
    }

    /// Adds a job again after its session or its worker was lost. The job becomes the next job of its principal,
    /// because it has already waited for its turn.
    pub(super) fn push_again(&self, job: Job) {
        let mut state = self.state();
        let cost = state.estimates.of(Kind::of(&job.work)).mean;
        let lane = job.caller.lane().clone();
        state.waiting.push_again(&lane, job, cost);
        state.dispatch();
    }

    /// Gives waiting jobs to free sessions.
    pub(super) fn dispatch(&self) {
        self.state().dispatch();
    }

    /// Records the time for which a job occupied its session, as the front measures it. A module that computes in
    /// software uses the same processors as the front. With a module of this kind, a job occupies its session for much
    /// longer than the module needs, because the session thread also waits for a processor.
    pub(super) fn served(&self, job: &Job) {
        if let Some(kind) = Kind::of(&job.work) {
            self.state().estimates.add(kind, job.occupied());
        }
    }

    /// Records the duration of a job of this kind.
    #[cfg(test)]
    pub(super) fn measured_for_test(&self, kind: Kind, spent: Duration) {
        self.state().estimates.add(kind, spent);
    }

    pub(super) fn add(&self, link: Arc<Link>) {
        let mut state = self.state();
        state.links.push(link);
        state.dispatch();
    }

    /// Removes a worker. Returns whether the worker was in the queue.
    pub(super) fn remove(&self, generation: u64) -> bool {
        let links = &mut self.state().links;
        let before = links.len();
        links.retain(|link| link.generation() != generation);
        links.len() < before
    }

    pub(super) fn links(&self) -> Vec<Arc<Link>> {
        self.state().links.clone()
    }

    pub(super) fn has_links(&self) -> bool {
        !self.state().links.is_empty()
    }

    pub(super) fn jobs_of_principals(&self) -> u64 {
        self.of_principals.load(Ordering::Relaxed)
    }

    pub(super) fn len(&self) -> usize {
        self.state().waiting.len()
    }

    /// Fails each waiting job that another token can do, with this error, so that the other token
    /// gets the job.
    pub(super) fn fail_with_alternative(&self, error: &Error) {
        let passed_on = self.state().waiting.take_if(|job| job.has_alternative);
        for job in passed_on {
            job.answer(Err(error.clone()), Duration::ZERO);
        }
    }

    /// Answers every waiting job with this error.
    pub(super) fn fail_all(&self, error: &Error) {
        let waiting = self.state().waiting.take_all();
        for job in waiting {
            job.answer(Err(error.clone()), Duration::ZERO);
        }
    }
}

impl State {
    fn dispatch(&mut self) {
        let quantum = self.estimates.most();
        while !self.waiting.is_empty() {
            // The worker with the fewest jobs gets the job, so that no worker is idle while another worker has two
            // jobs.
            let Some(link) = self
                .links
                .iter()
                .filter(|link| link.has_room())
                .min_by_key(|link| link.in_flight())
                .map(Arc::clone)
            else {
                break;
            };
            let now = Instant::now();
            let Some(mut job) = self.waiting.pop(quantum, now) else {
                break;
            };
            if job.is_abandoned() {
                job.answer(Err(Error::Deadline), Duration::ZERO);
                continue;
            }
            let left = job.caller.deadline().remaining();
            if left.is_zero() {
                self.waiting.note(job.caller.lane(), Served::Late);
                job.answer(Err(Error::Deadline), Duration::ZERO);
                continue;
            }
            job.waited = now.saturating_duration_since(job.queued);
            let mean = self.estimates.of(Kind::of(&job.work)).mean;
            if self.waiting.is_too_late(left, mean) {
                self.waiting.note(job.caller.lane(), Served::Late);
                let refusal = refusal(self.expected_wait());
                job.answer(Err(refusal), Duration::ZERO);
                continue;
            }
            self.waiting.note(job.caller.lane(), Served::InTime);
            self.queue_wait.record(job.waited);
            link.assign(job);
        }
    }

    /// Refuses a job that would finish too late because of the jobs that already wait. A job that a
    /// free session takes immediately is always accepted, because its duration shows how fast the
    /// token is now.
    fn check_in_time(
        &self,
        lane: &Lane,
        job: Estimate,
        deadline: Deadline,
        now: Instant,
    ) -> Result<(), Error> {
        let (sessions, busy) = self.sessions();
        if deadline.remaining().is_zero() {
            return Err(Error::Deadline);
        }
        // Without a worker, the speed of the token is unknown, and a replacement worker is starting. A background job
        // is not refused, because background jobs have a guaranteed share of the turns (`BACKGROUND_TURNS`).
        if sessions == 0
            || *lane == Lane::Background
            || (busy < sessions && self.waiting.is_empty())
        {
            return Ok(());
        }
        let load = Load {
            sessions: count(sessions),
            busy: count(busy),
        };
        let left = deadline.instant().saturating_duration_since(now);
        self.waiting
            .check_in_time(lane, job, left, load)
            .map_err(refusal)
    }

    /// Returns the number of sessions, and the number of sessions that run a job.
    fn sessions(&self) -> (usize, usize) {
        self.links.iter().fold((0, 0), |(sessions, busy), link| {
            (sessions + link.sessions(), busy + link.in_flight())
        })
    }

    /// Makes room in a full queue. Removes abandoned and expired jobs. If the queue has no
    /// abandoned or expired jobs, removes the newest job of the lane with the most work.
    fn make_room(&mut self, lane: &Lane, cost: Duration, now: Instant) -> Result<(), Error> {
        let is_due = self
            .searched
            .is_none_or(|at| now.saturating_duration_since(at) >= SEARCH_INTERVAL);
        if is_due {
            self.searched = Some(now);
            let useless = self.waiting.take_useless(now);
            let found = !useless.is_empty();
            for job in useless {
                job.answer(Err(Error::Deadline), Duration::ZERO);
            }
            if found {
                return Ok(());
            }
        }
        let wait = self.expected_wait();
        match self.waiting.evict_for(lane, cost) {
            Some(evicted) => {
                evicted.answer(Err(refusal(wait)), Duration::ZERO);
                Ok(())
            }
            None => Err(refusal(wait)),
        }
    }

    fn expected_wait(&self) -> Duration {
        let (sessions, _) = self.sessions();
        self.waiting.work() / count(sessions.max(1))
    }
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// Returns an error with the delay before a retry. The delay is random within a range, so that callers who were refused
/// together do not retry together.
fn refusal(wait: Duration) -> Error {
    let wait = wait.max(RETRY_MIN);
    Error::QueueFull {
        retry_after: spread(wait, wait),
    }
}
