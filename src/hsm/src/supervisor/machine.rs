//! Decides when the supervisor starts a worker, and which state the supervisor reports to callers. The state machine
//! has no side effects: it receives events with their time and returns actions. `ARCHITECTURE.md` contains the table of
//! states and events, and a test compares the table with the code.

use std::time::Duration;

use keybroker_core::alert::Alert;

use crate::{Serving, start::NotReady};

/// A worker that ends within this time after it became ready is restarted only after a pause, so that repeated crashes
/// do not cause many logins.
const SHORT_LIFE: Duration = Duration::from_secs(1);
const START_SPACING: Duration = Duration::from_millis(100);
/// Longest time for which calls wait for a replacement worker. Most calls reach their own deadlines earlier.
const DUE_MAX: Duration = Duration::from_secs(5);
/// Bounds of the pause between starts while the token is unavailable.
const DOWN_MIN: Duration = Duration::from_millis(250);
const DOWN_MAX: Duration = Duration::from_secs(1);
/// Bounds of the pause between starts while logins fail for reasons that do not concern the PIN.
const LOGIN_MIN: Duration = Duration::from_secs(1);
const LOGIN_MAX: Duration = Duration::from_secs(3);
/// Number of consecutive failed logins after which the pause between logins becomes longer (reached after about five
/// minutes).
const LOGINS_FREQUENT: u32 = 100;
const LOGIN_SELDOM: Duration = Duration::from_secs(15);
/// Pause between starts while the PIN is latched. A worker that starts with a latched PIN finds the token and compares
/// the PIN with the record of PINs. The worker logs in only if the PIN or the token has changed, or after `keybroker
/// token retry-pin`.
const LATCHED: Duration = Duration::from_secs(2);
/// Pause between starts while a key, an attribute or a self-test is wrong.
const UNTRUSTED: Duration = Duration::from_secs(3);
/// The assumed duration of a worker's start, until the first start was measured.
const START_EXPECTED: Duration = Duration::from_millis(300);

/// An event to which the state machine reacts.
#[derive(Clone, Debug)]
pub(super) enum Event {
    /// Time has passed.
    Tick,
    /// The worker that was being started is ready.
    Ready,
    /// The worker that was being started did not become ready.
    NotReady(NotReady, String),
    /// A ready worker was lost.
    Lost(Loss, String),
    /// The broker stops.
    Stop,
}

/// The reason why a worker was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Loss {
    /// The worker's process ended or hung, or the token returned an error.
    Ended,
    /// The worker gave a wrong answer.
    Untrusted,
}

/// An action of the supervisor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Start one worker.
    Start,
    /// Report this state to callers and to the health check.
    Serve(Serving),
    /// Raise an alert.
    Alert(Alert, String),
    /// Let one of the workers that must be replaced finish its jobs and then end.
    Retire,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    /// No attempt to start a worker has ended yet.
    Starting,
    /// At least one worker is ready.
    Up,
    /// The last worker was just lost and its replacement is starting. Calls wait for the replacement worker.
    Due {
        since: Duration,
        cause: String,
    },
    Down(String),
    Untrusted(String),
    Stopped,
}

/// The state machine. All times are durations since a fixed moment.
#[derive(Debug)]
pub(super) struct Machine {
    wanted: usize,
    ready: usize,
    /// Number of ready workers that must be replaced, because the expected keys have changed since they started.
    outdated: usize,
    phase: Phase,
    /// Time at which the current start began.
    starting: Option<Duration>,
    next_start: Duration,
    backoff: Duration,
    failed_logins: u32,
    latched: Option<String>,
    /// Time at which the last worker became ready.
    ready_at: Option<Duration>,
    /// Duration of the last successful start.
    start_takes: Duration,
}

impl Machine {
    pub(super) fn new(wanted: usize) -> Self {
        Self {
            wanted,
            ready: 0,
            outdated: 0,
            phase: Phase::Starting,
            starting: None,
            next_start: Duration::ZERO,
            backoff: Duration::ZERO,
            failed_logins: 0,
            latched: None,
            ready_at: None,
            start_takes: START_EXPECTED,
        }
    }

    /// Returns the reason why the broker does not log in with the current PIN, or `None` while logins are allowed.
    pub(super) fn latched(&self) -> Option<&str> {
        self.latched.as_deref()
    }

    /// Returns the cause of the last loss while calls wait for a replacement worker.
    pub(super) fn due(&self) -> Option<&str> {
        match &self.phase {
            Phase::Due { cause, .. } => Some(cause),
            _ => None,
        }
    }

    /// Sets the number of ready workers that must be replaced. An outdated worker is retired only while more workers
    /// are ready than configured. Therefore a replacement never reduces the number of sessions.
    pub(super) fn set_outdated(&mut self, count: usize) {
        self.outdated = count;
    }

    pub(super) fn is_full(&self) -> bool {
        self.ready >= self.wanted + usize::from(self.outdated > 0)
    }

    /// Returns the expected time until a worker is ready.
    pub(super) fn expected_wait(&self, now: Duration) -> Duration {
        let begins = match self.starting {
            Some(since) => since,
            None => self.next_start.max(now),
        };
        (begins + self.start_takes)
            .saturating_sub(now)
            .max(START_SPACING)
    }

    /// Processes an event. Returns the actions in the order in which they must be carried out.
    pub(super) fn on(&mut self, now: Duration, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.phase == Phase::Stopped {
            return actions;
        }
        match event {
            Event::Tick => {}
            Event::Ready => {
                if let Some(since) = self.starting.take() {
                    self.start_takes = now.saturating_sub(since);
                }
                self.ready += 1;
                self.ready_at = Some(now);
                self.latched = None;
                self.failed_logins = 0;
                self.backoff = Duration::ZERO;
                self.next_start = now;
                self.enter(Phase::Up, &mut actions);
                if self.ready > self.wanted && self.outdated > 0 {
                    self.ready -= 1;
                    self.outdated -= 1;
                    actions.push(Action::Retire);
                }
            }
            Event::NotReady(why, detail) => self.not_ready(now, why, detail, &mut actions),
            Event::Lost(loss, cause) => self.lost(now, loss, cause, &mut actions),
            Event::Stop => {
                self.phase = Phase::Stopped;
                return actions;
            }
        }
        if let Phase::Due { since, cause } = &self.phase
            && now >= *since + DUE_MAX
        {
            let cause = cause.clone();
            self.enter(Phase::Down(cause), &mut actions);
        }
        if self.starting.is_none() && !self.is_full() && now >= self.next_start {
            self.starting = Some(now);
            actions.push(Action::Start);
        }
        actions
    }

    fn not_ready(
        &mut self,
        now: Duration,
        why: NotReady,
        detail: String,
        actions: &mut Vec<Action>,
    ) {
        self.starting = None;
        let double = |least: Duration, most: Duration| (self.backoff * 2).clamp(least, most);
        self.backoff = match why {
            NotReady::Crashed => double(START_SPACING, DOWN_MAX),
            NotReady::Busy | NotReady::Unavailable => double(DOWN_MIN, DOWN_MAX),
            NotReady::Login if self.failed_logins >= LOGINS_FREQUENT => LOGIN_SELDOM,
            NotReady::Login => double(LOGIN_MIN, LOGIN_MAX),
            NotReady::Pin => LATCHED,
            NotReady::Untrusted => UNTRUSTED,
        };
        self.next_start = now + self.backoff;
        match why {
            NotReady::Pin => {
                self.latched = Some(detail.clone());
                actions.push(Action::Alert(Alert::PinLatched, detail.clone()));
            }
            // A crash does not concern the PIN, so the PIN latch does not change.
            NotReady::Crashed => {}
            NotReady::Login => {
                self.failed_logins += 1;
                self.latched = None;
                actions.push(Action::Alert(Alert::TokenLogin, detail.clone()));
            }
            NotReady::Busy | NotReady::Unavailable | NotReady::Untrusted => self.latched = None,
        }
        if self.ready > 0 {
            return;
        }
        let passing = matches!(why, NotReady::Crashed | NotReady::Busy);
        let next = match &self.latched {
            Some(cause) => Phase::Untrusted(cause.clone()),
            None if why == NotReady::Untrusted => Phase::Untrusted(detail),
            // The replacement worker is still expected.
            None if passing && matches!(self.phase, Phase::Due { .. }) => return,
            None => Phase::Down(detail),
        };
        self.enter(next, actions);
    }

    fn lost(&mut self, now: Duration, loss: Loss, cause: String, actions: &mut Vec<Action>) {
        self.ready = self.ready.saturating_sub(1);
        if self.latched.is_none() {
            let lived_short = self.ready_at.is_some_and(|at| now < at + SHORT_LIFE);
            self.backoff = Duration::ZERO;
            self.next_start = if lived_short {
                now + START_SPACING
            } else {
                now
            };
        }
        if self.ready > 0 {
            return;
        }
        let next = match (&self.latched, loss) {
            (Some(latched), _) => Phase::Untrusted(latched.clone()),
            (None, Loss::Untrusted) => Phase::Untrusted(cause),
            (None, Loss::Ended) => Phase::Due { since: now, cause },
        };
        self.enter(next, actions);
    }

    fn enter(&mut self, next: Phase, actions: &mut Vec<Action>) {
        if self.phase == next {
            return;
        }
        let was_told = std::mem::replace(&mut self.phase, next);
        let same_kind = std::mem::discriminant(&was_told) == std::mem::discriminant(&self.phase);
        match &self.phase {
            Phase::Up => {
                if !matches!(was_told, Phase::Due { .. }) {
                    actions.push(Action::Serve(Serving::Up));
                }
            }
            // No state is reported to callers, because they wait for the replacement worker.
            Phase::Due { .. } | Phase::Starting | Phase::Stopped => {}
            Phase::Down(cause) => {
                actions.push(Action::Serve(Serving::Down(cause.clone())));
                if !same_kind {
                    actions.push(Action::Alert(Alert::TokenDown, cause.clone()));
                }
            }
            Phase::Untrusted(cause) => {
                actions.push(Action::Serve(Serving::Untrusted(cause.clone())));
                if !same_kind && self.latched.is_none() {
                    actions.push(Action::Alert(Alert::TokenUntrusted, cause.clone()));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
