//! The retry policy: which failed attempts are repeated, when, and how often. This module only decides about retries;
//! the caller of the module waits.

use std::time::{Duration, Instant};

/// Full jitter: each pause is multiplied by a random factor from 0 to 2, as `docs/errors.md`
/// requires. Therefore the next attempts of callers that failed at the same moment are spread over
/// the time from 0 to twice the pause.
const JITTER_SPAN: f64 = 2.0;
/// The jitter of a delay that the broker asks for. The client never shortens this delay, and
/// prolongs it by at most this fraction of the delay.
const DELAY_SPAN: f64 = 0.2;
/// One retry, in thousandths of a retry, which is the unit of the bucket.
const MILLI: u64 = 1_000;

/// How often and how fast a client repeats a failed attempt.
///
/// Only safe calls are repeated: reads, and changes under the request id of their first attempt.
/// The pauses start at `initial_backoff` and double up to `max_backoff`, each multiplied by a
/// random factor from 0 to 2. If the broker asks for a delay (`google.rpc.RetryInfo`), the pause is
/// between this delay and 1.2 times this delay. No attempt starts after the call's deadline. A call
/// whose next pause would outlast its deadline fails immediately with the last error. Attempts of
/// one call never run in parallel (no hedging).
///
/// The default (14 attempts, 50 ms to 1 s) waits about ten seconds in total, which is longer than the restart of a
/// worker or of a broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Maximum number of attempts per call, including the first attempt. 1 means no retries; 0 counts as 1. Default 14.
    pub max_attempts: u32,
    /// Maximum number of attempts per call that may fail because of the connection. When this maximum is reached, the
    /// call fails with the last connection error. A value above `max_attempts` has no effect. The default of 14
    /// attempts outlasts the restart of a broker. Use 3 for an interactive program: a broker that rejects a client
    /// certificate also closes the connection, and a person should not wait for 14 attempts. 0 counts as 1.
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
/// The bucket contains a number of permitted retries, and each repeated attempt removes one of
/// these retries. The bucket fills over time, and by a fifth of a retry with each call that
/// succeeds. In the long run, a client thus makes at most `per_second` retries per second, plus one
/// retry for every five calls that succeed. While the bucket is empty, a failed call is not
/// repeated and returns its error.
///
/// A call that waits for a restart of about one second needs five to six retries. The default capacity of 100 retries
/// is therefore enough for about 16 calls that wait at the same time. Set `capacity` to six times the number of
/// concurrent calls if all these calls must succeed despite a restart of the broker.
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

    /// Adds a fifth of a retry to the bucket, for a call that succeeded.
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

    /// Returns the pause before the next attempt, or `None` when the call must not be repeated.
    /// `random` is a random number from the complete range of its type; `remaining` is the time
    /// until the deadline.
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
        let own = scaled(backoff, JITTER_SPAN * random);
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

    /// Returns all pauses of a call whose attempts all fail, with this random number.
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

    /// Pseudo-random numbers (Knuth's MMIX generator), the same in each run.
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u32 {
            self.0 = self
                .0
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            u32::try_from(self.0 >> 32).unwrap()
        }
    }

    #[test]
    fn the_pauses_together_outlast_a_restart() {
        let mut random = Random(1);
        let now = Instant::now();
        let too_short = (0..10_000).filter(|_| {
            let mut bucket = bucket(100, 0, now);
            let mut retries = Retries::new(RetryPolicy::default());
            let pauses = std::iter::from_fn(|| {
                retries.after_failure(TRANSIENT, LONG, &mut bucket, now, random.next())
            });
            let pauses: Vec<Duration> = pauses.collect();
            assert_eq!(pauses.len(), 13);
            pauses.iter().sum::<Duration>() < Duration::from_secs(4)
        });
        assert!(too_short.count() < 50);
    }

    /// Clients that are refused at the same moment do not retry at the same moment.
    #[test]
    fn refused_calls_spread_their_next_attempts() {
        const CLIENTS: usize = 2_000;
        let now = Instant::now();
        for (delay_ms, window_ms) in [(None, 10), (Some(500), 10)] {
            let mut random = Random(2);
            let delay = delay_ms.map(Duration::from_millis);
            let mut windows = std::collections::BTreeMap::<u128, usize>::new();
            for _ in 0..CLIENTS {
                let mut retries = Retries::new(RetryPolicy::default());
                let verdict = Verdict::Transient { delay };
                let pause = retries
                    .after_failure(verdict, LONG, &mut bucket(9, 0, now), now, random.next())
                    .unwrap();
                *windows.entry(pause.as_millis() / window_ms).or_default() += 1;
            }
            // Of ten windows of the same width, each has about a tenth of the attempts, and none has a fifth of the
            // attempts.
            let most = windows.values().max().unwrap();
            assert!(*most < CLIENTS / 5, "{windows:?}");
        }
    }

    /// A minute with 500 calls per second. For every share of refused attempts, the retries stay within the budget.
    #[test]
    fn a_client_does_not_multiply_the_load_of_an_overloaded_broker() {
        const CALLS_PER_SECOND: u32 = 500;
        const SECONDS: u32 = 60;
        for refused_percent in [10, 50, 90, 100] {
            let mut random = Random(u64::from(refused_percent));
            let start = Instant::now();
            let budget = RetryBudget::default();
            let mut bucket = Bucket::full(budget, start);
            // The attempts by time, each with the retries of its call.
            let mut due = std::collections::BTreeMap::new();
            for number in 0..CALLS_PER_SECOND * SECONDS {
                let at = Duration::from_secs(1) * number / CALLS_PER_SECOND;
                due.insert((at, number), Retries::new(RetryPolicy::default()));
            }
            let (mut attempts, mut succeeded) = (0_u32, 0_u32);
            let mut last = Duration::ZERO;
            while let Some(((at, number), mut retries)) = due.pop_first() {
                attempts += 1;
                last = at;
                if random.next() % 100 >= refused_percent {
                    succeeded += 1;
                    bucket.deposit();
                    continue;
                }
                let delay = Some(Duration::from_millis(20));
                let pause = retries.after_failure(
                    Verdict::Transient { delay },
                    LONG,
                    &mut bucket,
                    start + at,
                    random.next(),
                );
                if let Some(pause) = pause {
                    due.insert((at + pause, number), retries);
                }
            }
            let calls = CALLS_PER_SECOND * SECONDS;
            let seconds = u32::try_from(last.as_secs()).unwrap() + 1;
            let most = budget.capacity + budget.per_second * seconds + succeeded / 5;
            let retries = attempts - calls;
            assert!(
                retries > 0 && retries <= most,
                "{retries} of {calls}, at most {most}"
            );
        }
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
        // At ten retries per second, one retry is permitted after 100 ms, and a second retry is not.
        let later = start + Duration::from_millis(100);
        assert!(bucket.withdraw(later));
        assert!(!bucket.withdraw(later));
        for _ in 0..4 {
            bucket.deposit();
        }
        assert!(!bucket.withdraw(later));
        bucket.deposit();
        assert!(bucket.withdraw(later));
        // The bucket never contains more than its capacity.
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
                // Floating-point seconds have rounding errors of less than a microsecond.
                prop_assert!(pause + Duration::from_micros(1) >= asked);
                prop_assert!(pause <= Duration::from_millis(asked_ms.max(1_000)) * 2);
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
