//! Records whether the database answers, separately for reads and writes.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use crate::Error;

use super::{OUTAGE_WAITED_OUT, Purpose};

/// Time for which the result of a failed probe is used. The broker sends a probe every second.
const PROBE_COUNTS: Duration = Duration::from_millis(1_500);

/// The results of the last probes, and the times of the last answers.
#[derive(Debug, Default)]
pub(super) struct Probe {
    reads: Mutex<Seen>,
    writes: Mutex<Seen>,
    /// The number of connections that are lent now.
    read_leases: AtomicU32,
    write_leases: AtomicU32,
}

/// Counts one connection as lent until this value is dropped.
#[derive(Debug)]
pub(super) struct Leased<'p>(&'p AtomicU32);

impl Drop for Leased<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Debug, Default)]
struct Seen {
    /// The time of the last failed probe; `None` after an answer.
    failed: Option<Instant>,
    answered: Option<Instant>,
    /// The time at which calls or probes began to fail; `None` after an answer.
    failing_since: Option<Instant>,
}

impl Probe {
    fn seen(&self, purpose: Purpose) -> MutexGuard<'_, Seen> {
        let seen = match purpose {
            Purpose::Read => &self.reads,
            Purpose::Write => &self.writes,
        };
        seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn counter(&self, purpose: Purpose) -> &AtomicU32 {
        match purpose {
            Purpose::Read => &self.read_leases,
            Purpose::Write => &self.write_leases,
        }
    }

    /// Counts a connection as lent for `purpose` until the returned value is dropped.
    pub(super) fn leased(&self, purpose: Purpose) -> Leased<'_> {
        let counter = self.counter(purpose);
        counter.fetch_add(1, Ordering::Relaxed);
        Leased(counter)
    }

    /// The number of connections that are lent for `purpose`.
    pub(super) fn leases(&self, purpose: Purpose) -> u32 {
        self.counter(purpose).load(Ordering::Relaxed)
    }

    /// Whether a call for `purpose` got an answer after `moment`.
    pub(super) fn has_answered_since(&self, purpose: Purpose, moment: Instant) -> bool {
        self.seen(purpose).answered.is_some_and(|at| at >= moment)
    }

    /// Records that a call got an answer.
    pub(super) fn answered(&self, purpose: Purpose) {
        let mut seen = self.seen(purpose);
        seen.answered = Some(Instant::now());
        seen.failed = None;
        seen.failing_since = None;
    }

    /// Records that a call lost its connection or got no connection.
    pub(super) fn lost(&self, purpose: Purpose) {
        self.seen(purpose)
            .failing_since
            .get_or_insert_with(Instant::now);
    }

    /// Records the result of a probe that began at the moment `begun`. A probe waits for a
    /// connection like every call. If a probe fails while calls get answers, the database is busy,
    /// but not unavailable.
    pub(super) fn record<T>(
        &self,
        purpose: Purpose,
        begun: Instant,
        result: Result<T, Error>,
    ) -> Result<(), Error> {
        let mut seen = self.seen(purpose);
        if seen.answered.is_some_and(|at| at >= begun) {
            return Ok(());
        }
        if result.is_err() {
            seen.failed = Some(Instant::now());
            seen.failing_since.get_or_insert(begun);
        } else {
            seen.failed = None;
            seen.failing_since = None;
        }
        result.map(drop)
    }

    /// Fails immediately if the database has just failed a probe, so that callers do not wait in a
    /// queue. Callers still wait while an outage is shorter than [`OUTAGE_WAITED_OUT`].
    pub(super) fn check(&self, purpose: Purpose) -> Result<(), Error> {
        let failed = self.seen(purpose).failed;
        if failed.is_some_and(|at| at.elapsed() < PROBE_COUNTS) && self.is_long_outage(purpose) {
            return Err(Error::Down(
                "the database did not answer the last health check".into(),
            ));
        }
        Ok(())
    }

    /// Whether no call got an answer for longer than [`OUTAGE_WAITED_OUT`].
    pub(super) fn is_long_outage(&self, purpose: Purpose) -> bool {
        self.seen(purpose)
            .failing_since
            .is_some_and(|at| at.elapsed() >= OUTAGE_WAITED_OUT)
    }
}
