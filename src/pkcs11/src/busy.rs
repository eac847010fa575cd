//! Handles tokens that refuse valid inputs while the tokens are busy.
//!
//! Some devices return `CKR_FUNCTION_FAILED` if they have too many concurrent operations. The same return code can mean
//! a damaged input. Therefore a single refusal does not show the cause. A session repeats a refused job, and runs
//! self-tests after each refusal until one passes. The self-tests show how often the token currently refuses valid
//! inputs. The job fails when it has been refused so often that its input is almost certainly damaged.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use keybroker_worker_protocol::frame;

/// The input of a job counts as invalid, and the job fails, if the token would refuse a valid input
/// equally often with at most this probability.
const DOUBT_MAX: f64 = 1e-6;
/// Number of refusals after which the session stops repeating a job. The job then waits for its next turn.
pub(super) const REFUSALS_MAX: u32 = 64;
/// Pause after the first refusal. Each further pause is twice as long as the previous pause.
const FIRST_PAUSE: Duration = Duration::from_micros(250);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_millis(2);

/// Time at which the token last answered any session of a worker.
#[derive(Debug, Default)]
pub(super) struct LastAnswer {
    /// `CLOCK_MONOTONIC` in nanoseconds; 0 means never.
    answered_ns: AtomicU64,
}

impl LastAnswer {
    /// Records that an operation of a session succeeded now.
    pub(super) fn note(&self) {
        self.answered_ns
            .store(frame::monotonic_ns(), Ordering::Relaxed);
    }

    /// Whether an operation of any session has succeeded since this time, in nanoseconds of `CLOCK_MONOTONIC`.
    pub(super) fn is_since(&self, since_ns: u64) -> bool {
        self.answered_ns.load(Ordering::Relaxed) >= since_ns
    }
}

/// The number of refusals of one job, and of the self-tests that ran between these refusals.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Refusals {
    job: u32,
    self_tests: u32,
}

impl Refusals {
    /// Counts a refusal of the job, and the number of self-tests that the token refused before a self-test passed.
    pub(super) fn add(&mut self, self_tests_refused: u32) {
        self.job = self.job.saturating_add(1);
        self.self_tests = self.self_tests.saturating_add(self_tests_refused);
    }

    /// Returns the number of refusals of the job.
    pub(super) fn count(self) -> u32 {
        self.job
    }

    /// Whether the number of refusals proves that the input of the job is damaged.
    pub(super) fn are_conclusive(self) -> bool {
        // One self-test passed after each refusal of the job. The refusal rate is Laplace's estimate, which remains
        // cautious with few self-tests. A self-test has more operations than the job, so it is refused more often.
        let refused = f64::from(self.self_tests.saturating_add(1));
        let all = f64::from(self.self_tests.saturating_add(self.job).saturating_add(2));
        let exponent = i32::try_from(self.job).unwrap_or(i32::MAX);
        (refused / all).powi(exponent) <= DOUBT_MAX
    }
}

/// Returns the pause after this number of refusals. The first refusal has the number 1.
pub(super) fn pause_after(refusals: u32) -> Duration {
    let doublings = refusals.saturating_sub(1).min(31);
    FIRST_PAUSE.saturating_mul(1 << doublings).min(PAUSE_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the number of refusals that proves that the input is damaged, if this number of self-tests is refused
    /// after each refusal.
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
