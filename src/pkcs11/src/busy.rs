//! A token that refuses good inputs while it is busy.
//!
//! Some devices answer `CKR_FUNCTION_FAILED` if they have more operations than they can do at the same time. The same code
//! also means a damaged input. One refusal therefore says little: a session repeats the job, and runs a self-test after each
//! refusal. The more often a token refuses good inputs, the more refusals are needed before a refusal counts as an answer
//! about the input.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use keybroker_worker_protocol::frame;

/// Refusals of one job, each followed by a self-test that passes, after which the job has failed.
const REFUSALS: u32 = 5;
/// The same while the token is known to refuse good inputs. A token that refuses a quarter of all inputs refuses a good
/// input this often about once in a million jobs.
const REFUSALS_OF_A_BUSY_TOKEN: u32 = 10;
/// For how long a token counts as busy after it has refused a good input.
const BUSY: Duration = Duration::from_mins(1);
/// Pause after the first refusal. Each further pause is twice as long as the one before.
const FIRST_PAUSE: Duration = Duration::from_micros(250);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_millis(2);

/// When the token last refused a good input, and when it last answered. All sessions of a worker share this. Times are
/// `CLOCK_MONOTONIC` in nanoseconds; 0 stands for never.
#[derive(Debug, Default)]
pub(super) struct BusyToken {
    refused_ns: AtomicU64,
    answered_ns: AtomicU64,
}

impl BusyToken {
    /// Notes that an operation of any session succeeded.
    pub(super) fn note_answer(&self) {
        self.answered_ns
            .store(frame::monotonic_ns(), Ordering::Relaxed);
    }

    /// Whether an operation of any session has succeeded since this time, in nanoseconds of `CLOCK_MONOTONIC`.
    pub(super) fn has_answered_since(&self, since_ns: u64) -> bool {
        self.answered_ns.load(Ordering::Relaxed) >= since_ns
    }

    /// Notes that the token refused an input that it accepted at another time.
    pub(super) fn note_refused_good_input(&self) {
        self.refused_ns
            .store(frame::monotonic_ns(), Ordering::Relaxed);
    }

    /// The refusals of one job after which the refusal counts as an answer about the input.
    pub(super) fn refusals_needed(&self) -> u32 {
        self.refusals_needed_at(frame::monotonic_ns())
    }

    fn refusals_needed_at(&self, now_ns: u64) -> u32 {
        let refused = self.refused_ns.load(Ordering::Relaxed);
        let ago = Duration::from_nanos(now_ns.saturating_sub(refused));
        if refused != 0 && ago < BUSY {
            REFUSALS_OF_A_BUSY_TOKEN
        } else {
            REFUSALS
        }
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

    #[test]
    fn a_token_that_refused_good_inputs_is_believed_less_for_a_minute() {
        let token = BusyToken::default();
        assert_eq!(token.refusals_needed(), REFUSALS);
        token.note_refused_good_input();
        assert_eq!(token.refusals_needed(), REFUSALS_OF_A_BUSY_TOKEN);
        let later = Duration::from_nanos(frame::monotonic_ns()) + BUSY;
        let later = u64::try_from(later.as_nanos()).unwrap();
        assert_eq!(token.refusals_needed_at(later), REFUSALS);
    }

    #[test]
    fn an_answer_to_any_session_shows_that_the_token_is_there() {
        let token = BusyToken::default();
        let now = frame::monotonic_ns();
        assert!(!token.has_answered_since(now));
        token.note_answer();
        assert!(token.has_answered_since(now));
    }

    #[test]
    fn pauses_grow_to_their_limit() {
        let pauses: Vec<u128> = (1..6).map(|count| pause_after(count).as_micros()).collect();
        assert_eq!(pauses, [250, 500, 1_000, 2_000, 2_000]);
        assert_eq!(pause_after(u32::MAX), PAUSE_MAX);
    }
}
