//! A token that refuses good inputs while it is busy.
//!
//! Some devices answer `CKR_FUNCTION_FAILED` if they have more operations than they can do at the same time. The same code
//! also means a damaged input. One refusal therefore says little. A session repeats a refused job, and runs self-tests after
//! each refusal until one passes. The self-tests show how often the token refuses good inputs at this time. The job has
//! failed when a good input would very rarely be refused so often.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use keybroker_worker_protocol::frame;

/// Largest probability that a good input is refused as often as the input of the job.
const DOUBT_MAX: f64 = 1e-6;
/// Refusals of one job after which the session gives up. The job then waits for its next turn.
pub(super) const REFUSALS_MAX: u32 = 64;
/// Pause after the first refusal. Each further pause is twice as long as the one before.
const FIRST_PAUSE: Duration = Duration::from_micros(250);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_millis(2);

/// When the token last answered, for all sessions of a worker.
#[derive(Debug, Default)]
pub(super) struct LastAnswer {
    /// `CLOCK_MONOTONIC` in nanoseconds; 0 stands for never.
    answered_ns: AtomicU64,
}

impl LastAnswer {
    /// Notes that an operation of any session succeeded.
    pub(super) fn note(&self) {
        self.answered_ns
            .store(frame::monotonic_ns(), Ordering::Relaxed);
    }

    /// Whether an operation of any session has succeeded since this time, in nanoseconds of `CLOCK_MONOTONIC`.
    pub(super) fn is_since(&self, since_ns: u64) -> bool {
        self.answered_ns.load(Ordering::Relaxed) >= since_ns
    }
}

/// The refusals of one job, and of the self-tests between them.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Refusals {
    job: u32,
    self_tests: u32,
}

impl Refusals {
    /// Counts a refusal of the job, after which this number of self-tests was refused before one passed.
    pub(super) fn add(&mut self, self_tests_refused: u32) {
        self.job = self.job.saturating_add(1);
        self.self_tests = self.self_tests.saturating_add(self_tests_refused);
    }

    /// The refusals of the job.
    pub(super) fn count(self) -> u32 {
        self.job
    }

    /// Whether the refusals of the job say something about its input.
    pub(super) fn are_conclusive(self) -> bool {
        // One self-test passed after each refusal of the job. The estimate is that of Laplace: with few self-tests, it does
        // not depend on luck. A self-test has more operations than the refused one, so it is refused more often.
        let refused = f64::from(self.self_tests.saturating_add(1));
        let all = f64::from(self.self_tests.saturating_add(self.job).saturating_add(2));
        let exponent = i32::try_from(self.job).unwrap_or(i32::MAX);
        (refused / all).powi(exponent) <= DOUBT_MAX
    }
}

/// The pause after this number of refusals, from 1.
pub(super) fn pause_after(refusals: u32) -> Duration {
    let doublings = refusals.saturating_sub(1).min(31);
    FIRST_PAUSE.saturating_mul(1 << doublings).min(PAUSE_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The refusals of a job that are needed if this number of self-tests is refused after each of them.
    fn needed(self_tests_refused: u32) -> Option<u32> {
        let mut refusals = Refusals::default();
        (1..=REFUSALS_MAX).find(|_| {
            refusals.add(self_tests_refused);
            refusals.are_conclusive()
        })
    }

    #[test]
    fn the_busier_the_token_the_more_refusals_are_needed() {
        assert_eq!(needed(0), Some(7));
        assert_eq!(needed(1), Some(20));
        assert_eq!(needed(3), Some(48));
        assert_eq!(needed(6), None);
    }

    #[test]
    fn an_answer_to_any_session_shows_that_the_token_is_there() {
        let last = LastAnswer::default();
        let now = frame::monotonic_ns();
        assert!(!last.is_since(now));
        last.note();
        assert!(last.is_since(now));
    }

    #[test]
    fn pauses_grow_to_their_limit() {
        let pauses: Vec<u128> = (1..6).map(|count| pause_after(count).as_micros()).collect();
        assert_eq!(pauses, [250, 500, 1_000, 2_000, 2_000]);
        assert_eq!(pause_after(u32::MAX), PAUSE_MAX);
    }
}
