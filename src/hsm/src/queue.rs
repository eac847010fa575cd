//! Jobs waiting for a session, and the workers that take them: one bounded queue in the front, where fairness and waiting
//! time are known. A worker holds at most one job per session thread.
//!
//! Mitigation: M8 of `THREAT_MODEL.md`.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use keybroker_core::metrics;

use crate::{Error, job::Job, link::Link};

/// Retry hint when the queue is full and nothing is known of the token's speed yet.
const RETRY_MIN: Duration = Duration::from_millis(10);
/// One job is this part of the average of service time, and the past is the rest.
const AVERAGE_PARTS: u32 = 16;

/// The queue, and the workers it feeds.
#[derive(Debug)]
pub(super) struct Queue {
    state: Mutex<State>,
    length_max: usize,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Job>,
    links: Vec<Arc<Link>>,
    /// Average time of a job in the module.
    service: Duration,
}

impl Queue {
    pub(super) fn new(length_max: usize) -> Self {
        Self {
            state: Mutex::default(),
            length_max,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a job in, and hands it to a free session at once if there is one.
    pub(super) fn push(&self, job: Job) -> Result<(), Error> {
        let mut state = self.state();
        if state.waiting.len() >= self.length_max {
            // A job whose caller has gone keeps no place.
            state.waiting.retain(|job| !job.done.is_closed());
        }
        if state.waiting.len() >= self.length_max {
            return Err(Error::QueueFull {
                retry_after: state.expected_wait(),
            });
        }
        state.waiting.push_back(job);
        state.dispatch();
        Ok(())
    }

    /// Takes back a job whose session or worker was lost: to the front, since it waited its turn before.
    pub(super) fn push_again(&self, job: Job) {
        let mut state = self.state();
        state.waiting.push_front(job);
        state.dispatch();
    }

    /// Hands waiting jobs to free sessions.
    pub(super) fn dispatch(&self) {
        self.state().dispatch();
    }

    /// Takes note of a job's time in the module.
    pub(super) fn served(&self, spent: Duration) {
        let mut state = self.state();
        state.service = (state.service * (AVERAGE_PARTS - 1) + spent) / AVERAGE_PARTS;
    }

    pub(super) fn add(&self, link: Arc<Link>) {
        let mut state = self.state();
        state.links.push(link);
        state.dispatch();
    }

    /// Whether it was there.
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

    pub(super) fn len(&self) -> usize {
        self.state().waiting.len()
    }

    /// Answers every waiting job with the same error.
    pub(super) fn fail_all(&self, error: &Error) {
        for job in std::mem::take(&mut self.state().waiting) {
            job.answer(Err(error.clone()), Duration::ZERO);
        }
    }
}

impl State {
    fn dispatch(&mut self) {
        while !self.waiting.is_empty() {
            // The emptiest worker first, so that no process idles while another has two jobs.
            let Some(link) = self
                .links
                .iter()
                .filter(|link| link.has_room())
                .min_by_key(|link| link.in_flight())
            else {
                break;
            };
            let Some(mut job) = self.waiting.pop_front() else {
                break;
            };
            if job.done.is_closed() {
                continue;
            }
            if job.deadline.remaining().is_zero() {
                job.answer(Err(Error::Deadline), Duration::ZERO);
                continue;
            }
            job.waited = job.queued.elapsed();
            metrics::TOKEN_QUEUE_WAIT.handle().record(job.waited);
            link.assign(job);
        }
    }

    fn expected_wait(&self) -> Duration {
        let sessions: usize = self.links.iter().map(|link| link.sessions()).sum();
        let jobs = u32::try_from(self.waiting.len()).unwrap_or(u32::MAX);
        let sessions = u32::try_from(sessions.max(1)).unwrap_or(u32::MAX);
        (self.service.saturating_mul(jobs) / sessions).max(RETRY_MIN)
    }
}
