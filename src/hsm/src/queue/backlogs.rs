//! The waiting jobs, in one queue for each principal, and the order in which the queues are served. The order is
//! deficit round robin by cost (Shreedhar and Varghese, 1995): a principal with a thousand jobs delays another
//! principal by only one job.
//!
//! The oldest job of a principal normally comes first. When the jobs of a principal have waited so long that they are
//! about to be late, the newest job comes first (adaptive LIFO). Exception: if the oldest job has waited for at least
//! half of its remaining time, the oldest job still comes first. All functions take the current time as a parameter.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::{Duration, Instant},
};

use crate::caller::Lane;

use super::estimate::Estimate;

/// While background jobs wait, at least one of `BACKGROUND_TURNS` jobs is a background job.
const BACKGROUND_TURNS: u32 = 16;
/// Time for which the oldest job of a queue must have been late continuously before the newest job comes first.
const STANDING_INTERVAL: Duration = Duration::from_millis(100);
/// A job is late when it has waited for more than this fraction of the time between its arrival and
/// its deadline.
const STANDING_PARTS: u32 = 4;

/// The caution of a principal increases the expected wait of its jobs, in thousandths of the wait.
/// The caution increases by `CAUTION_STEP` when an accepted job is too late, and decreases by
/// `CAUTION_FALL` with each job that is in time. The caution corrects an expected wait that is too
/// short because the token slows down or more principals send jobs.
///
/// The caution is never less than `CAUTION_MIN`. The expected wait is a sum of estimates, so its error is proportional
/// to the wait. Therefore the margin is also proportional to the wait. With a fixed margin, jobs with a long wait would
/// be late as soon as the estimate is a few percent too low. The margin makes the queue an eighth shorter, but every
/// session still has work.
const CAUTION_STEP: u32 = 50;
const CAUTION_FALL: u32 = 1;
const CAUTION_MIN: u32 = 125;
const CAUTION_MAX: u32 = 1_000;

/// After the token's answer, a call needs time to write the audit entry and to send the response. The reserved time is
/// 1/`ANSWER_PARTS` of the remaining time, but at most `ANSWER_MAX`.
const ANSWER_PARTS: u32 = 10;
const ANSWER_MAX: Duration = Duration::from_millis(20);

/// The sessions of all workers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    /// Number of all sessions, at least 1.
    pub(super) sessions: u32,
    /// Number of sessions that are running a job.
    pub(super) busy: u32,
}

/// Whether a job could still be completed in time when its turn came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Served {
    InTime,
    Late,
}

/// The properties of a job that determine its place in the queue.
pub(super) trait Waiting {
    /// Returns the time at which the job arrived.
    fn queued(&self) -> Instant;
    /// The deadline of the job.
    fn deadline(&self) -> Instant;
    /// Whether the caller has stopped waiting for the job.
    fn is_abandoned(&self) -> bool;
}

/// All waiting jobs.
#[derive(Debug)]
pub(super) struct Backlogs<J> {
    waiting: HashMap<Lane, Backlog<J>>,
    /// The principals that have jobs, in the order of their turns.
    turns: VecDeque<Lane>,
    weights: BTreeMap<String, u32>,
    /// Number of jobs taken since the last background job.
    since_background: u32,
    length: usize,
    cost: Duration,
}

/// The jobs of one lane. A backlog has at least one job.
#[derive(Debug)]
struct Backlog<J> {
    jobs: VecDeque<Costed<J>>,
    cost: Duration,
    /// The credit that the lane has not used yet in this turn.
    credit: Duration,
    /// Whether the lane has already received the credit of its current turn.
    has_turn: bool,
    pressure: Pressure,
    /// The increase of the expected wait, in thousandths of the wait.
    caution: u32,
}

#[derive(Debug)]
struct Costed<J> {
    job: J,
    cost: Duration,
}

/// Detects a queue that is late for a complete `STANDING_INTERVAL`. A queue is late if its oldest job has waited for
/// more than a quarter of the time between the job's arrival and the job's deadline.
#[derive(Clone, Copy, Debug, Default)]
struct Pressure {
    /// Start of the period in which the oldest job was always late.
    since: Option<Instant>,
}

impl Pressure {
    fn note(&mut self, oldest: &impl Waiting, now: Instant) {
        let waited = now.saturating_duration_since(oldest.queued());
        let given = oldest.deadline().saturating_duration_since(oldest.queued());
        if waited * STANDING_PARTS <= given {
            self.since = None;
        } else {
            self.since.get_or_insert(now);
        }
    }

    fn is_standing(self, now: Instant) -> bool {
        self.since
            .is_some_and(|since| now.saturating_duration_since(since) >= STANDING_INTERVAL)
    }
}

impl<J: Waiting> Backlogs<J> {
    pub(super) fn new(weights: BTreeMap<String, u32>) -> Self {
        Self {
            waiting: HashMap::new(),
            turns: VecDeque::new(),
            weights,
            since_background: 0,
            length: 0,
            cost: Duration::ZERO,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.length
    }

    /// Returns the estimated work of all waiting jobs.
    pub(super) fn work(&self) -> Duration {
        self.cost
    }

    pub(super) fn is_empty(&self) -> bool {
        self.length == 0
    }

    fn weight(&self, lane: &Lane) -> u32 {
        match lane {
            Lane::Principal(name) => self.weights.get(&**name).copied().unwrap_or(1).max(1),
            Lane::Background => 1,
        }
    }

    /// Adds a job behind the other jobs of its lane.
    pub(super) fn push(&mut self, lane: &Lane, job: J, cost: Duration) {
        self.backlog(lane, false).push_back(Costed { job, cost });
        self.count(lane, cost);
    }

    /// Adds a job again as the next job of its lane, because the job already had its turn.
    pub(super) fn push_again(&mut self, lane: &Lane, job: J, cost: Duration) {
        let backlog = self.backlog(lane, true);
        backlog.push_front(Costed { job, cost });
        self.count(lane, cost);
        if let Some(backlog) = self.waiting.get_mut(lane) {
            backlog.credit += cost;
        }
    }

    fn backlog(&mut self, lane: &Lane, is_next: bool) -> &mut VecDeque<Costed<J>> {
        let takes_turns = *lane != Lane::Background && !self.waiting.contains_key(lane);
        if takes_turns && is_next {
            self.turns.push_front(lane.clone());
        } else if takes_turns {
            self.turns.push_back(lane.clone());
        }
        &mut self
            .waiting
            .entry(lane.clone())
            .or_insert_with(|| Backlog {
                jobs: VecDeque::new(),
                cost: Duration::ZERO,
                credit: Duration::ZERO,
                has_turn: false,
                pressure: Pressure::default(),
                caution: 0,
            })
            .jobs
    }

    fn count(&mut self, lane: &Lane, cost: Duration) {
        self.length += 1;
        self.cost += cost;
        if let Some(backlog) = self.waiting.get_mut(lane) {
            backlog.cost += cost;
        }
    }

    /// Records whether a job of this lane was in time when its turn came. The caution of a lane is reset when the lane
    /// becomes empty.
    pub(super) fn note(&mut self, lane: &Lane, served: Served) {
        if let Some(backlog) = self.waiting.get_mut(lane) {
            backlog.caution = match served {
                Served::InTime => backlog.caution.saturating_sub(CAUTION_FALL),
                Served::Late => (backlog.caution + CAUTION_STEP).min(CAUTION_MAX),
            };
        }
    }

    /// Whether a new job of this lane can be completed before its deadline. If the job would be too late, returns the
    /// expected wait.
    pub(super) fn check_in_time(
        &self,
        lane: &Lane,
        job: Estimate,
        left: Duration,
        load: Load,
    ) -> Result<(), Duration> {
        // On average, half of each running job remains.
        let under_way = job.mean * load.busy / 2;
        let needed = job.upper() + (left / ANSWER_PARTS).min(ANSWER_MAX);
        let wait_for = |work: Duration| self.cautious(lane, (work + under_way) / load.sessions);
        // Most jobs would be in time even behind all waiting jobs. This quick check usually avoids a search through all
        // lanes.
        if wait_for(self.cost) + needed <= left {
            return Ok(());
        }
        let wait = wait_for(self.work_before(lane, job.mean));
        if wait + needed <= left {
            Ok(())
        } else {
            Err(wait)
        }
    }

    /// Whether a job whose turn has come can no longer be completed in time, so that the token should not run it. If no
    /// other job waits, a job is always tried, because its duration shows how fast the token is now.
    pub(super) fn is_too_late(&self, left: Duration, mean: Duration) -> bool {
        left < mean && !self.is_empty()
    }

    /// Raises the expected wait of a lane by the caution of that lane.
    pub(super) fn cautious(&self, lane: &Lane, wait: Duration) -> Duration {
        let caution = self.waiting.get(lane).map_or(0, |backlog| backlog.caution);
        wait + wait / CAUTION_MAX * (CAUTION_MIN + caution)
    }

    /// Returns the work that the token completes before a new job of this lane, if the lanes are served in turns.
    /// `cost` is the cost of the new job.
    pub(super) fn work_before(&self, lane: &Lane, cost: Duration) -> Duration {
        let own = self
            .waiting
            .get(lane)
            .map_or(Duration::ZERO, |own| own.cost);
        let others = self.cost.saturating_sub(own);
        // Until the new job is done, each other lane gets at most the same work per unit of weight as this lane.
        let share = (own + cost) / self.weight(lane);
        if others <= share {
            return self.cost;
        }
        let limited = self.waiting.iter().filter(|(other, _)| *other != lane);
        let limited: Duration = limited
            .map(|(other, backlog)| backlog.cost.min(share * self.weight(other)))
            .sum();
        own + limited
    }

    /// Takes the next job. The lanes take turns. Each turn serves jobs with a total cost of
    /// `quantum`, multiplied by the weight of the principal. A job costs at most one quantum. If
    /// the quantum is the cost of the most expensive job, each lane gets the same time. With a tiny
    /// quantum, each lane gets the same number of jobs.
    pub(super) fn pop(&mut self, quantum: Duration, now: Instant) -> Option<J> {
        let background = self.waiting.contains_key(&Lane::Background);
        if background && (self.turns.is_empty() || self.since_background >= BACKGROUND_TURNS - 1) {
            self.since_background = 0;
            return self.take(&Lane::Background, now);
        }
        loop {
            let lane = self.turns.front()?.clone();
            let credit = quantum * self.weight(&lane);
            let backlog = self.waiting.get_mut(&lane)?;
            if !backlog.has_turn {
                backlog.has_turn = true;
                // Unused credit is limited to the credit of one turn, so that a lane cannot collect credit over many
                // turns.
                backlog.credit = (backlog.credit + credit).min(credit * 2);
            }
            let next = backlog.next(now)?;
            // The cost of a job was estimated when the job arrived, and the estimates may be lower now.
            let next = backlog.jobs[next].cost.min(quantum);
            if next <= backlog.credit {
                backlog.credit -= next;
                if background {
                    self.since_background += 1;
                }
                return self.take(&lane, now);
            }
            backlog.has_turn = false;
            self.turns.rotate_left(1);
        }
    }

    fn take(&mut self, lane: &Lane, now: Instant) -> Option<J> {
        let backlog = self.waiting.get_mut(lane)?;
        let at = backlog.next(now)?;
        let oldest = &backlog.jobs.front()?.job;
        backlog.pressure.note(oldest, now);
        let Costed { job, cost } = backlog.jobs.remove(at)?;
        backlog.cost = backlog.cost.saturating_sub(cost);
        self.length -= 1;
        self.cost = self.cost.saturating_sub(cost);
        self.forget_if_empty(lane);
        Some(job)
    }

    fn forget_if_empty(&mut self, lane: &Lane) {
        if self
            .waiting
            .get(lane)
            .is_some_and(|backlog| backlog.jobs.is_empty())
        {
            self.waiting.remove(lane);
            if self.turns.front() == Some(lane) {
                self.turns.pop_front();
            } else {
                self.turns.retain(|other| other != lane);
            }
        }
    }

    /// Makes room for a job of this lane. Among the lanes with several jobs, removes the newest job of the lane with
    /// the most work per weight. Removes no job if this lane, with the new job, would have at least as much work.
    pub(super) fn evict_for(&mut self, lane: &Lane, cost: Duration) -> Option<J> {
        let own = self
            .waiting
            .get(lane)
            .map_or(Duration::ZERO, |own| own.cost);
        let several = self
            .waiting
            .iter()
            .filter(|(_, backlog)| backlog.jobs.len() > 1);
        let (longest, most) = several
            .map(|(lane, backlog)| (lane, backlog.cost / self.weight(lane)))
            .max_by_key(|(_, cost)| *cost)?;
        if longest == lane || most <= (own + cost) / self.weight(lane) {
            return None;
        }
        let longest = longest.clone();
        let backlog = self.waiting.get_mut(&longest)?;
        let Costed { job, cost } = backlog.jobs.pop_back()?;
        backlog.cost = backlog.cost.saturating_sub(cost);
        self.length -= 1;
        self.cost = self.cost.saturating_sub(cost);
        Some(job)
    }

    /// Removes and returns the jobs that are abandoned or past their deadline.
    pub(super) fn take_useless(&mut self, now: Instant) -> Vec<J> {
        self.take_if(|job| job.is_abandoned() || job.deadline() <= now)
    }

    /// Removes and returns the jobs that fulfil a condition.
    pub(super) fn take_if(&mut self, is_taken: impl Fn(&J) -> bool) -> Vec<J> {
        let mut taken = Vec::new();
        for backlog in self.waiting.values_mut() {
            let (keep, drop): (VecDeque<_>, VecDeque<_>) = std::mem::take(&mut backlog.jobs)
                .into_iter()
                .partition(|costed| !is_taken(&costed.job));
            backlog.jobs = keep;
            for costed in drop {
                backlog.cost = backlog.cost.saturating_sub(costed.cost);
                self.length -= 1;
                self.cost = self.cost.saturating_sub(costed.cost);
                taken.push(costed.job);
            }
        }
        self.waiting.retain(|_, backlog| !backlog.jobs.is_empty());
        let waiting = &self.waiting;
        self.turns.retain(|lane| waiting.contains_key(lane));
        taken
    }

    /// Removes and returns every job.
    pub(super) fn take_all(&mut self) -> Vec<J> {
        self.turns.clear();
        self.length = 0;
        self.cost = Duration::ZERO;
        let backlogs = std::mem::take(&mut self.waiting).into_values();
        backlogs
            .flat_map(|backlog| backlog.jobs)
            .map(|costed| costed.job)
            .collect()
    }
}

impl<J: Waiting> Backlog<J> {
    /// Returns the index of the next job of this lane.
    fn next(&self, now: Instant) -> Option<usize> {
        let oldest = &self.jobs.front()?.job;
        let waited = now.saturating_duration_since(oldest.queued());
        let left = oldest.deadline().saturating_duration_since(now);
        let is_old = waited * 2 >= left;
        if self.pressure.is_standing(now) && !is_old {
            Some(self.jobs.len() - 1)
        } else {
            Some(0)
        }
    }
}

#[cfg(test)]
mod tests;
