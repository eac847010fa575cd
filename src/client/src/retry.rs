//! The retry policy: which failed attempts are repeated, when, and how often. This module only decides about retries;
//! the caller of the module waits.

use std::time::{Duration, Instant};

/// The jitter: each pause is multiplied by a random factor from 0.5 to 1.5, as `docs/errors.md` asks.
const JITTER_LOW: f64 = 0.5;
const JITTER_SPAN: f64 = 1.0;
/// The jitter of a delay that the broker asks for. A delay that the broker asks for is never shortened, only prolonged
/// by up to this share.
const DELAY_SPAN: f64 = 0.2;
/// One retry in the unit of the bucket, which counts thousandths of a retry.
const MILLI: u64 = 1_000;

/// How often and how fast a client repeats a failed attempt.
///
/// Only safe calls are repeated: reads, and changes under the request id of their first attempt. The pauses start at
/// `initial_backoff` and double up to `max_backoff`, each with a jitter of ±50 %. A pause is at least as long as the
/// broker asks for (`google.rpc.RetryInfo`). No attempt starts after the call's deadline. A call whose next pause would
/// outlast its deadline fails immediately with the last error. Attempts of one call never run in parallel (no hedging).
///
/// The default (14 attempts, 50 ms to 1 s) waits about ten seconds in total, which outlasts the restart of a worker or
/// of a broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Maximum number of attempts per call, including the first attempt. 1 means no retries; 0 counts as 1. Default 14.
    pub max_attempts: u32,
    /// Maximum number of attempts per call that may fail because of the connection. When this maximum is reached, the
    /// call fails with the last connection error. A value above `max_attempts` has no effect. The default of 14
    /// attempts outlasts the restart of a broker. Use 3 for an interactive program: a broker that does not accept a
    /// client certificate also closes the connection, and the person should not wait for 14 attempts. 0 counts as 1.
    pub max_connection_attempts: u32,
    /// Pause before the second attempt, before jitter. Default 50 ms.
    pub initial_backoff: Duration,
    /// Longest pause, before jitter. Default 1 s.
    pub max_backoff: Duration,
    /// Limits the retries of all calls of a client together.
    pub budget: RetryBudget,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            max_attempts: 14,
            max_connection_attempts: 14,
            initial_backoff: Duration::from_millis(50),
            max_backoff: Duration::from_secs(1),
            budget: RetryBudget::default(),
        }
    }
}

impl RetryPolicy {
    /// Returns a policy that never repeats an attempt. Use this policy for a load generator that counts every refusal,
    /// or when your program has its own retry layer.
    #[must_use]
    pub fn never() -> Self {
        Self {
            max_attempts: 1,
            ..Self::default()
        }
    }

    /// Returns the pause after this number of failed attempts, before jitter.
    fn backoff(&self, failed: u32) -> Duration {
        let doubled = 2_u32.saturating_pow(failed.saturating_sub(1));
        self.initial_backoff
            .saturating_mul(doubled)
            .min(self.max_backoff)
    }
}

/// A token bucket that limits the retries of a client and all its clones, so that clients of an overloaded broker do
/// not multiply its load.
///
/// The bucket contains a number of retries, and each retry takes one of them. The bucket fills over time, and by a
/// fifth of a retry with each call that succeeds. While the bucket is empty, a failed call is not repeated and returns
/// its error.
///
/// A call that waits for a restart of about one second needs five to six retries. The default capacity of 100 retries
/// is therefore enough for about 16 calls that wait at the same time. Set `capacity` to six times the number of
/// concurrent calls if all of them must outlast a restart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryBudget {
    /// Number of retries in the full bucket; the bucket starts full. Default 100.
    pub capacity: u32,
    /// Retries added per second. Default 10.
    pub per_second: u32,
}

impl Default for RetryBudget {
    fn default() -> Self {
        Self {
            capacity: 100,
            per_second: 10,
        }
    }
}

/// Whether an attempt may be repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// A repeated attempt would fail in the same way, or is not safe.
    Permanent,
    /// The connection failed. The attempt may succeed on the next connection.
    Disconnected,
    /// The attempt may succeed later, but not before the delay that the broker asked for.
    Transient {
        /// The delay from `google.rpc.RetryInfo`.
        delay: Option<Duration>,
    },
}

/// The state of the bucket.
#[derive(Debug)]
pub(crate) struct Bucket {
    budget: RetryBudget,
    millis: u64,
    filled: Instant,
}

impl Bucket {
    pub(crate) fn full(budget: RetryBudget, now: Instant) -> Self {
        Self {
            budget,
            millis: u64::from(budget.capacity) * MILLI,
            filled: now,
        }
    }

    /// Adds a fifth of a retry for a call that succeeded.
    pub(crate) fn deposit(&mut self) {
        self.add(MILLI / 5);
    }

    /// Takes one retry. Returns false if the bucket is empty.
    fn withdraw(&mut self, now: Instant) -> bool {
        let elapsed = now.saturating_duration_since(self.filled);
        let elapsed_ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
        // One retry per second is one thousandth of a retry per millisecond.
        let fresh = elapsed_ms.saturating_mul(u64::from(self.budget.per_second));
        if fresh > 0 {
            self.add(fresh);
            self.filled = now;
        }
        match self.millis.checked_sub(MILLI) {
            Some(rest) => {
                self.millis = rest;
                true
            }
            None => false,
        }
    }

    fn add(&mut self, millis: u64) {
        let full = u64::from(self.budget.capacity) * MILLI;
        self.millis = self.millis.saturating_add(millis).min(full);
    }
}

/// The retries of one call.
#[derive(Debug)]
pub(crate) struct Retries {
    policy: RetryPolicy,
    failed: u32,
    disconnected: u32,
}

impl Retries {
    pub(crate) fn new(policy: RetryPolicy) -> Self {
        Self {
            policy,
            failed: 0,
            disconnected: 0,
        }
    }

    /// Returns the pause before the next attempt, or `None` when the call must not be repeated. `random` is a random
    /// number from the whole range of its type; `remaining` is the time until the deadline.
    pub(crate) fn after_failure(
        &mut self,
        verdict: Verdict,
        remaining: Duration,
        bucket: &mut Bucket,
        now: Instant,
        random: u32,
    ) -> Option<Duration> {
        self.failed = self.failed.saturating_add(1);
        let delay = match verdict {
            Verdict::Permanent => return None,
            Verdict::Disconnected => {
                self.disconnected = self.disconnected.saturating_add(1);
                if self.disconnected >= self.policy.max_connection_attempts {
                    return None;
                }
                None
            }
            Verdict::Transient { delay } => delay,
        };
        if self.failed >= self.policy.max_attempts {
            return None;
        }
        let random = f64::from(random) / f64::from(u32::MAX);
        let backoff = self.policy.backoff(self.failed);
        let own = scaled(backoff, JITTER_LOW + JITTER_SPAN * random);
        let asked = scaled(delay.unwrap_or_default(), 1.0 + DELAY_SPAN * random);
        let pause = own.max(asked);
        // The budget is checked last, so that it is only charged for a retry that takes place.
        (pause < remaining && bucket.withdraw(now)).then_some(pause)
    }
}

/// Multiplies a duration. A product that is too large becomes the longest duration, because a server may ask for any
/// delay.
fn scaled(duration: Duration, factor: f64) -> Duration {
    Duration::try_from_secs_f64(duration.as_secs_f64() * factor).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LONG: Duration = Duration::from_mins(1);
    const TRANSIENT: Verdict = Verdict::Transient { delay: None };

    fn bucket(capacity: u32, per_second: u32, now: Instant) -> Bucket {
        Bucket::full(
            RetryBudget {
                capacity,
                per_second,
            },
            now,
        )
    }

    /// All pauses of a call whose every attempt fails, with this random number.
    fn pauses(random: u32) -> Vec<Duration> {
        let now = Instant::now();
        let mut bucket = bucket(100, 0, now);
        let mut retries = Retries::new(RetryPolicy::default());
        std::iter::from_fn(|| retries.after_failure(TRANSIENT, LONG, &mut bucket, now, random))
            .collect()
    }

    #[test]
    fn pauses_double_from_50_ms_to_a_second() {
        let middle: Vec<u128> = pauses(u32::MAX / 2)
            .iter()
            .map(|pause| (*pause + Duration::from_micros(1)).as_millis())
            .collect();
        assert_eq!(middle[..6], [50, 100, 200, 400, 800, 1_000]);
        assert_eq!(middle[6..], [1_000; 7]);
    }

    #[test]
    fn the_shortest_pauses_together_outlast_a_restart() {
        let total: Duration = pauses(0).iter().sum();
        assert!(total > Duration::from_millis(1_800), "{total:?}");
        assert_eq!(pauses(0).len(), 13);
    }

    #[test]
    fn a_final_failure_is_not_repeated() {
        let now = Instant::now();
        let mut retries = Retries::new(RetryPolicy::default());
        let pause = retries.after_failure(Verdict::Permanent, LONG, &mut bucket(9, 0, now), now, 0);
        assert_eq!(pause, None);
    }

    #[test]
    fn a_policy_without_retries_makes_one_attempt() {
        for max_attempts in [0, 1] {
            let now = Instant::now();
            let mut retries = Retries::new(RetryPolicy {
                max_attempts,
                ..RetryPolicy::never()
            });
            let pause = retries.after_failure(TRANSIENT, LONG, &mut bucket(9, 0, now), now, 0);
            assert_eq!(pause, None);
        }
    }

    #[test]
    fn failures_of_the_connection_have_their_own_limit() {
        let now = Instant::now();
        let mut bucket = bucket(100, 0, now);
        let mut retries = Retries::new(RetryPolicy {
            max_connection_attempts: 3,
            ..RetryPolicy::default()
        });
        let mut after = |verdict| {
            retries
                .after_failure(verdict, LONG, &mut bucket, now, 0)
                .is_some()
        };
        for _ in 0..5 {
            assert!(after(TRANSIENT));
        }
        assert!(after(Verdict::Disconnected) && after(Verdict::Disconnected));
        assert!(!after(Verdict::Disconnected));
    }

    #[test]
    fn no_pause_outlasts_the_deadline_and_none_that_is_not_made_costs_budget() {
        let now = Instant::now();
        let mut bucket = bucket(1, 0, now);
        let mut retries = Retries::new(RetryPolicy::default());
        let asked = Verdict::Transient {
            delay: Some(Duration::from_secs(2)),
        };
        let short = Duration::from_secs(2);
        assert_eq!(
            retries.after_failure(asked, short, &mut bucket, now, 0),
            None
        );
        assert!(
            retries
                .after_failure(asked, LONG, &mut bucket, now, 0)
                .is_some()
        );
    }

    #[test]
    fn the_bucket_empties_and_fills_with_time_and_success() {
        let start = Instant::now();
        let mut bucket = bucket(2, 10, start);
        assert!(bucket.withdraw(start) && bucket.withdraw(start));
        assert!(!bucket.withdraw(start));
        // Ten a second: one after 100 ms, and not a second one.
        let later = start + Duration::from_millis(100);
        assert!(bucket.withdraw(later));
        assert!(!bucket.withdraw(later));
        for _ in 0..4 {
            bucket.deposit();
        }
        assert!(!bucket.withdraw(later));
        bucket.deposit();
        assert!(bucket.withdraw(later));
        // Never more than it holds.
        let much_later = start + Duration::from_hours(1);
        assert!(bucket.withdraw(much_later) && bucket.withdraw(much_later));
        assert!(!bucket.withdraw(much_later));
    }

    proptest! {
        #[test]
        fn a_pause_is_never_shorter_than_the_broker_asks(
            asked_ms in 0_u64..5_000, random: u32, failures in 1_u32..8
        ) {
            let now = Instant::now();
            let mut bucket = bucket(100, 0, now);
            let mut retries = Retries::new(RetryPolicy::default());
            let asked = Duration::from_millis(asked_ms);
            for _ in 0..failures.min(7) {
                let verdict = Verdict::Transient { delay: Some(asked) };
                let pause = retries.after_failure(verdict, LONG, &mut bucket, now, random).unwrap();
                // Floating-point seconds: to the microsecond.
                prop_assert!(pause + Duration::from_micros(1) >= asked);
                prop_assert!(pause <= Duration::from_millis(asked_ms.max(1_000)) * 3 / 2);
            }
        }

        #[test]
        fn any_delay_that_a_server_names_is_survived(seconds: u64, nanos in 0_u32..1_000_000_000) {
            let now = Instant::now();
            let mut retries = Retries::new(RetryPolicy::default());
            let delay = Some(Duration::new(seconds, nanos));
            let verdict = Verdict::Transient { delay };
            let pause = retries.after_failure(verdict, LONG, &mut bucket(9, 9, now), now, u32::MAX);
            prop_assert!(pause.is_none_or(|pause| pause < LONG));
        }
    }
}
