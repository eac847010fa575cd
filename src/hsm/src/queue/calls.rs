//! Limits how many calls the front works on before their jobs reach the queue of the token. A call needs one of a fixed
//! number of places.
//!
//! If the processors are slower than the token, unlimited calls would wait in the run queue of the
//! async runtime, which ignores principals and deadlines. Therefore the front works on only a few
//! calls concurrently. The other calls wait here, in the same order as in the token's queue: the
//! principals are served in turns. A call that cannot be completed in time is refused before the
//! front works on the call.
//!
//! A call gives its place back when its job reaches the queue of the token, or when the call waits for something other
//! than the processors.
//!
//! Mitigation: M8 of `THREAT_MODEL.md`.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    sync::oneshot,
    time::{timeout, timeout_at},
};

use keybroker_core::{
    call::{Deadline, abandoned::Abandoned},
    metrics,
};

use crate::{Caller, Error, caller::Lane};

use super::{
    backlogs::{Backlogs, Load, Served, Waiting},
    estimate::Estimate,
    refusal,
};

/// Number of places for each processor. With few places, a call ends soon after its start. With too few places, a
/// processor is idle while calls wait for the database.
const PLACES_PER_PROCESSOR: usize = 16;
/// Largest number of waiting calls. A further call displaces the newest call of the principal with the most waiting
/// calls, or is refused.
const WAITING_MAX: usize = 8_192;
/// Assumed time for which a call needs its place, before the first measurement.
const FIRST: Duration = Duration::from_micros(200);
/// The quantum is less than the cost of every call. Therefore a turn serves one call for each unit
/// of weight, regardless of the estimates.
const QUANTUM: Duration = Duration::from_nanos(1);
/// A call gives back its place after it has waited this long for the database.
const SLOW: Duration = Duration::from_millis(50);
/// At most 1/`RESERVE_DIVISOR` of the remaining time is reserved for the answer.
const RESERVE_DIVISOR: u32 = 4;

tokio::task_local! {
    static CURRENT: Arc<Current>;
}

/// The places, and the calls that wait for a place.
#[derive(Clone, Debug)]
pub struct Calls(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    places: u32,
    /// The time that a call needs after the token has answered, in microseconds.
    answer_us: AtomicU64,
}

#[derive(Debug)]
struct State {
    waiting: Backlogs<Waiter>,
    taken: u32,
    /// Estimate of the time for which a call keeps its place.
    holds: Estimate,
    answers: Estimate,
}

/// A waiting call.
#[derive(Debug)]
struct Waiter {
    lane: Lane,
    queued: Instant,
    deadline: Instant,
    abandoned: Abandoned,
    granted: oneshot::Sender<Result<(), Error>>,
}

impl Waiting for Waiter {
    fn queued(&self) -> Instant {
        self.queued
    }

    fn deadline(&self) -> Instant {
        self.deadline
    }

    fn is_abandoned(&self) -> bool {
        self.granted.is_closed() || self.abandoned.is_set()
    }
}

impl Calls {
    /// Creates places for the processors of this machine. The weights are the weights of the token's queue.
    pub fn new(weights: BTreeMap<String, u32>) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self::with_places(weights, processors * PLACES_PER_PROCESSOR)
    }

    fn with_places(weights: BTreeMap<String, u32>, places: usize) -> Self {
        Self(Arc::new(Shared {
            state: Mutex::new(State {
                waiting: Backlogs::new(weights),
                taken: 0,
                holds: Estimate::first(FIRST),
                answers: Estimate::default(),
            }),
            places: u32::try_from(places).unwrap_or(u32::MAX),
            answer_us: AtomicU64::new(0),
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a place. Returns an error if the call cannot be completed in time.
    pub async fn enter(&self, caller: &Caller) -> Result<Entered, Error> {
        if let Some(turn) = self.ask(caller)? {
            turn.wait(caller.deadline()).await?;
        }
        Ok(Entered(Arc::new(Current {
            held: Mutex::new(Some(Held {
                calls: self.clone(),
                since: Instant::now(),
            })),
            answered: Mutex::default(),
            calls: self.clone(),
        })))
    }

    /// Returns the deadline of a call's job on the token. The time between this deadline and the deadline of the call
    /// is for the answer.
    pub fn job_deadline(&self, call: Deadline) -> Deadline {
        let answer = Duration::from_micros(self.0.answer_us.load(Ordering::Relaxed));
        let reserve = answer.min(call.remaining() / RESERVE_DIVISOR);
        let instant = call.instant();
        Deadline::at(instant.checked_sub(reserve).unwrap_or(instant))
    }

    /// Takes a free place. If no place is free, adds the call to the waiting calls.
    fn ask(&self, caller: &Caller) -> Result<Option<Turn>, Error> {
        let now = Instant::now();
        let mut state = self.state();
        if state.taken < self.0.places && state.waiting.is_empty() {
            state.taken += 1;
            return Ok(None);
        }
        let (lane, deadline) = (caller.lane(), caller.deadline().instant());
        let load = Load {
            sessions: self.0.places,
            busy: state.taken,
        };
        let left = deadline.saturating_duration_since(now);
        if left.is_zero() {
            return Err(Error::Deadline);
        }
        let mean = state.holds.mean.max(QUANTUM);
        let in_time = state.waiting.check_in_time(lane, state.holds, left, load);
        in_time.map_err(refusal)?;
        if state.waiting.len() >= WAITING_MAX {
            let wait = state.waiting.work() / self.0.places;
            let Some(evicted) = state.waiting.evict_for(lane, mean) else {
                return Err(refusal(wait));
            };
            evicted.answer(Err(refusal(wait)));
        }
        let (granted, answer) = oneshot::channel();
        let waiter = Waiter {
            lane: lane.clone(),
            queued: now,
            deadline,
            abandoned: Abandoned::current(),
            granted,
        };
        state.waiting.push(lane, waiter, mean);
        metrics::CALLS_WAITING.handle().increment(1.0);
        Ok(Some(Turn {
            calls: self.clone(),
            answer,
        }))
    }

    /// Gives a place to the next call.
    fn release(&self, held: Option<Duration>) {
        let mut state = self.state();
        state.taken = state.taken.saturating_sub(1);
        if let Some(held) = held {
            state.holds.add(held);
        }
        state.dispatch(self.0.places);
    }

    /// Records the time that a call needed after the token's answer.
    fn note_answer(&self, took: Duration) {
        let mut state = self.state();
        state.answers.add(took);
        let upper = u64::try_from(state.answers.upper().as_micros()).unwrap_or(u64::MAX);
        self.0.answer_us.store(upper, Ordering::Relaxed);
    }
}

impl State {
    fn dispatch(&mut self, places: u32) {
        while self.taken < places {
            let mean = self.holds.mean;
            let now = Instant::now();
            let Some(next) = self.waiting.pop(QUANTUM, now) else {
                return;
            };
            let left = next.deadline.saturating_duration_since(now);
            if next.is_abandoned() || left.is_zero() {
                self.waiting.note(&next.lane, Served::Late);
                next.answer(Err(Error::Deadline));
            } else if self.waiting.is_too_late(left, mean) {
                self.waiting.note(&next.lane, Served::Late);
                let wait = self.waiting.work() / places;
                next.answer(Err(refusal(wait)));
            } else {
                self.waiting.note(&next.lane, Served::InTime);
                if next.granted.send(Ok(())).is_ok() {
                    self.taken += 1;
                }
            }
        }
    }
}

impl Waiter {
    fn answer(self, answer: Result<(), Error>) {
        let _gone = self.granted.send(answer);
    }
}

/// The place for which a call waits, or which the call has just got.
struct Turn {
    calls: Calls,
    answer: oneshot::Receiver<Result<(), Error>>,
}

impl Turn {
    async fn wait(mut self, deadline: Deadline) -> Result<(), Error> {
        match timeout_at(deadline.instant().into(), &mut self.answer).await {
            Ok(Ok(granted)) => granted,
            Ok(Err(_)) | Err(_) => Err(Error::Deadline),
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        metrics::CALLS_WAITING.handle().decrement(1.0);
        // If a place was granted but not taken, gives the place to the next call.
        self.answer.close();
        if let Ok(Ok(())) = self.answer.try_recv() {
            self.calls.release(None);
        }
    }
}

/// A call with a place.
#[derive(Debug)]
pub struct Entered(Arc<Current>);

#[derive(Debug)]
struct Current {
    held: Mutex<Option<Held>>,
    /// Time at which the token last answered.
    answered: Mutex<Option<Instant>>,
    calls: Calls,
}

/// A place in use. Dropping this value gives the place back.
#[derive(Debug)]
struct Held {
    calls: Calls,
    since: Instant,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.calls.release(Some(self.since.elapsed()));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Entered {
    /// Runs the work of the call.
    pub async fn run<T>(self, work: impl Future<Output = T>) -> T {
        let result = CURRENT.scope(Arc::clone(&self.0), work).await;
        if let Some(answered) = *lock(&self.0.answered) {
            self.0.calls.note_answer(answered.elapsed());
        }
        result
    }
}

/// Gives back the place of the current call, before the call waits for something other than the processors.
pub fn leave() {
    CURRENT
        .try_with(|current| drop(lock(&current.held).take()))
        .ok();
}

/// Gives back the place of the current call if the work takes long, because slow work waits for the database.
pub async fn leave_if_slow<T>(work: impl Future<Output = T>) -> T {
    if CURRENT.try_with(|_| ()).is_err() {
        return work.await;
    }
    tokio::pin!(work);
    if let Ok(result) = timeout(SLOW, work.as_mut()).await {
        return result;
    }
    leave();
    work.await
}

/// Notes that the token has answered the current call.
pub(crate) fn note_answered() {
    CURRENT
        .try_with(|current| *lock(&current.answered) = Some(Instant::now()))
        .ok();
}

#[cfg(test)]
mod tests;
