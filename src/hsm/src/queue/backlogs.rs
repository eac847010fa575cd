//! Jobs that wait, in one queue for each principal, and whose turn it is: deficit round robin by cost (Shreedhar and
//! Varghese, 1995), so that a principal with a thousand jobs delays another one by one job and not by a thousand.
//!
//! Within a principal the oldest job is first. When a principal's jobs use up so much of their time waiting that they are about
//! to be too late, the newest is first (adaptive LIFO), except for a job that has waited for half as long as it has left.
//! Everything here is computed from the times that are passed in.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::{Duration, Instant},
};

use crate::caller::Lane;

/// Background work gets at least one of so many jobs.
const BACKGROUND_TURNS: u32 = 16;
/// How long a queue has to stand before it is served from the other end.
const STANDING_INTERVAL: Duration = Duration::from_millis(100);
/// A job that waited for more than this part of the whole time it was given is late.
const STANDING_PARTS: u32 = 4;

/// By how much the expected wait of a principal is raised, in thousandths, when a job of it turned out to be too late after all; and
/// by how much it falls with each job that was in time. The estimate can be too low: the token slows down, or other
/// principals come.
const CAUTION_STEP: u32 = 50;
const CAUTION_FALL: u32 = 1;
const CAUTION_MAX: u32 = 1_000;

/// Whether a job that had its turn could still be done in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Served {
    InTime,
    Late,
}

/// What the order depends on.
pub(super) trait Waiting {
    /// When it came.
    fn queued(&self) -> Instant;
    /// When its result is due.
    fn deadline(&self) -> Instant;
    /// Whether nobody waits for it any more.
    fn is_abandoned(&self) -> bool;
}

/// All jobs that wait.
#[derive(Debug)]
pub(super) struct Backlogs<J> {
    waiting: HashMap<Lane, Backlog<J>>,
    /// Principals that have jobs, in the order of their turns.
    turns: VecDeque<Lane>,
    weights: BTreeMap<String, u32>,
    /// Jobs since the last one of the background.
    since_background: u32,
    length: usize,
    cost: Duration,
}

/// The jobs of one lane, at least one.
#[derive(Debug)]
struct Backlog<J> {
    jobs: VecDeque<Costed<J>>,
    cost: Duration,
    /// What is left of its turns.
    credit: Duration,
    /// Whether it was given the credit of the turn that it has now.
    has_turn: bool,
    pressure: Pressure,
    /// What the expected wait is raised by, in thousandths.
    caution: u32,
}

#[derive(Debug)]
struct Costed<J> {
    job: J,
    cost: Duration,
}

/// Whether a queue stands: for a whole interval its oldest job had used up a quarter of its time, whenever one was served.
#[derive(Clone, Copy, Debug, Default)]
struct Pressure {
    /// Since when the oldest job was late each time.
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

    /// Work on the token that all of them are together.
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

    /// Adds a job behind the others of its lane.
    pub(super) fn push(&mut self, lane: &Lane, job: J, cost: Duration) {
        self.backlog(lane, false).push_back(Costed { job, cost });
        self.count(lane, cost);
    }

    /// Adds a job that had its turn before: it is the next one.
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

    /// Takes note of what became of a job of that lane when its turn came. An empty lane forgets it.
    pub(super) fn note(&mut self, lane: &Lane, served: Served) {
        if let Some(backlog) = self.waiting.get_mut(lane) {
            backlog.caution = match served {
                Served::InTime => backlog.caution.saturating_sub(CAUTION_FALL),
                Served::Late => (backlog.caution + CAUTION_STEP).min(CAUTION_MAX),
            };
        }
    }

    /// The expected wait of a lane, raised while its jobs turn out to be too late.
    pub(super) fn cautious(&self, lane: &Lane, wait: Duration) -> Duration {
        let caution = self.waiting.get(lane).map_or(0, |backlog| backlog.caution);
        wait + wait / CAUTION_MAX * caution
    }

    /// Work on the token that is done before a new job of that lane and cost, when every lane keeps to its turns.
    pub(super) fn work_before(&self, lane: &Lane, cost: Duration) -> Duration {
        let own = self
            .waiting
            .get(lane)
            .map_or(Duration::ZERO, |own| own.cost);
        let others = self.cost.saturating_sub(own);
        // While this lane does its own work and the new job, another one does at most as much for each unit of weight.
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

    /// The job whose turn it is. `quantum` is the cost of the most expensive job: with each turn at least one is served.
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
                // Credit that a job made longer than its estimate cannot grow without bound.
                backlog.credit = (backlog.credit + credit).min(credit * 2);
            }
            let next = backlog.next(now)?;
            // The cost was estimated when the job came; a turn serves at least one job even if the estimate fell since.
            let next = backlog.jobs[next].cost.min(credit);
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

    /// Takes the newest job of the lane with the most work, if that has several jobs and still has more work than this lane would
    /// have with a new job of that cost: a full queue is the doing of that lane.
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

    /// Removes and returns the jobs that are abandoned or due.
    pub(super) fn take_useless(&mut self, now: Instant) -> Vec<J> {
        let mut useless = Vec::new();
        for backlog in self.waiting.values_mut() {
            let (keep, drop): (VecDeque<_>, VecDeque<_>) = std::mem::take(&mut backlog.jobs)
                .into_iter()
                .partition(|costed| !costed.job.is_abandoned() && costed.job.deadline() > now);
            backlog.jobs = keep;
            for costed in drop {
                backlog.cost = backlog.cost.saturating_sub(costed.cost);
                self.length -= 1;
                self.cost = self.cost.saturating_sub(costed.cost);
                useless.push(costed.job);
            }
        }
        self.waiting.retain(|_, backlog| !backlog.jobs.is_empty());
        let waiting = &self.waiting;
        self.turns.retain(|lane| waiting.contains_key(lane));
        useless
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
    /// Which of its jobs is next.
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
