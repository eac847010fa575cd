//! An open loop: calls start on a schedule and do not wait for earlier calls. The latency of a call
//! is measured from the time when the call was due. Therefore, the results also show the delay that
//! a slow broker causes for later calls (no coordinated omission).

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use keybroker_client::Client;
use tokio::{
    runtime::Handle,
    sync::{Semaphore, mpsc},
};

use crate::cli::exit::Failure;

use super::{
    calls::{self, Done, Tally},
    internal,
    users::Users,
};

/// Maximum number of calls in progress. At the maximum, further calls are counted but not sent,
/// because more calls in progress would exhaust the memory of this program.
const IN_PROGRESS_MAX: usize = 65_536;
/// Maximum interval at which the thread that starts calls checks whether the measurement was
/// stopped.
const PAUSE_MAX: Duration = Duration::from_millis(100);

/// The random number generator `SplitMix64`. Two measurements with the same seed have the same
/// schedule.
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Returns a random number that is at least 0 and less than 1.
    pub(super) fn fraction(&mut self) -> f64 {
        let bits = u32::try_from(self.next() >> 32).unwrap_or(u32::MAX);
        f64::from(bits) / (f64::from(u32::MAX) + 1.0)
    }
}

/// The due times of calls from independent callers: a Poisson process with exponentially
/// distributed intervals.
#[derive(Clone, Debug)]
pub(super) struct Arrivals {
    random: Random,
    per_s: f64,
    until: f64,
    at: f64,
}

impl Arrivals {
    pub(super) fn new(per_s: f64, duration: Duration, seed: u64) -> Self {
        Self {
            random: Random::new(seed),
            per_s,
            until: duration.as_secs_f64(),
            at: 0.0,
        }
    }
}

impl Iterator for Arrivals {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        self.at += -(1.0 - self.random.fraction()).ln() / self.per_s;
        (self.at < self.until).then(|| Duration::from_secs_f64(self.at))
    }
}

/// Starts a call at each of the given times, which are relative to now, and passes each result to
/// `each`. Returns the number of calls that were not started because too many calls were in
/// progress.
pub(super) async fn run<T, F>(
    due: impl Iterator<Item = Duration> + Send + 'static,
    call: impl Fn(usize, Instant) -> F + Send + 'static,
    mut each: impl FnMut(T),
) -> Result<u64, Failure>
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let (results, mut received) = mpsc::unbounded_channel();
    let (runtime, places) = (Handle::current(), Arc::new(Semaphore::new(IN_PROGRESS_MAX)));
    // A separate thread starts the calls, because the runtime's timers have a resolution of only
    // one millisecond.
    let dispatch = thread::Builder::new().spawn(move || {
        let (began, mut unsent) = (Instant::now(), 0);
        for (number, due) in due.enumerate() {
            let due = began + due;
            while let Some(pause) = due.checked_duration_since(Instant::now())
                && !pause.is_zero()
            {
                thread::sleep(pause.min(PAUSE_MAX));
                if results.is_closed() {
                    return unsent;
                }
            }
            let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
                unsent += 1;
                continue;
            };
            let (work, results) = (call(number, due), results.clone());
            runtime.spawn(async move {
                let result = work.await;
                // Sending fails only if the measurement was stopped, and then the result is not
                // needed.
                results.send(result).ok();
                drop(place);
            });
        }
        unsent
    });
    let dispatch = dispatch.map_err(internal)?;
    while let Some(result) = received.recv().await {
        each(result);
    }
    dispatch
        .join()
        .map_err(|_| internal("the thread that starts the calls ended early"))
}

/// The outcomes of the calls of an open loop.
pub(super) struct Offered {
    pub(super) tally: Tally,
    /// The number of calls that were due but not sent, because too many calls were in progress.
    pub(super) unsent: u64,
    /// Time from the start of the loop to the last answer, in seconds.
    pub(super) seconds: f64,
}

impl Offered {
    /// The number of calls that were due.
    pub(super) fn due(&self) -> u64 {
        self.tally.calls() + self.unsent
    }
}

/// Unwraps keys of random users in an open loop. The calls use the clients in turn. The closure
/// `each` receives every finished call.
pub(super) async fn unwraps(
    clients: &[Client],
    users: &Users,
    arrivals: Arrivals,
    deadline: Duration,
    mut each: impl FnMut(&Done),
) -> Result<Offered, Failure> {
    let (clients, users) = (clients.to_vec(), users.clone());
    let began = Instant::now();
    let mut tally = Tally::new();
    let unsent = run(
        arrivals,
        move |number, due| {
            let client = clients[number % clients.len()].clone();
            let user = users.any();
            async move { calls::unwrap(&client, &user, due, deadline).await }
        },
        |done| {
            each(&done);
            tally.count(done);
        },
    )
    .await?;
    Ok(Offered {
        tally,
        unsent,
        seconds: began.elapsed().as_secs_f64(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_have_the_rate_and_are_the_same_for_the_same_seed() {
        let times =
            |seed| Arrivals::new(1_000.0, Duration::from_secs(10), seed).collect::<Vec<_>>();
        let (one, again, other) = (times(1), times(1), times(2));
        assert_eq!(one, again);
        assert_ne!(one, other);
        assert!((9_500..10_500).contains(&one.len()), "{}", one.len());
        assert!(one.is_sorted());
        // In a Poisson process, 63 % of the intervals are shorter than the mean.
        let mean = Duration::from_millis(1);
        let short = one
            .windows(2)
            .filter(|pair| pair[1].saturating_sub(pair[0]) < mean)
            .count();
        assert!((6_000..6_700).contains(&short), "{short}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn calls_start_while_earlier_calls_wait() {
        let (first, started) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
        let due = (0..10).map(Duration::from_millis);
        let mut finished = Vec::new();
        let unsent = run(
            due,
            move |number, _| {
                let (first, started) = (Arc::clone(&first), Arc::clone(&started));
                async move {
                    // The first call ends after the last call has started.
                    if number == 0 {
                        started.acquire_many(9).await.unwrap().forget();
                        first.add_permits(1);
                    } else {
                        started.add_permits(1);
                    }
                    number
                }
            },
            |number| finished.push(number),
        )
        .await
        .unwrap();
        finished.sort_unstable();
        assert_eq!((unsent, finished), (0, (0..10).collect()));
    }
}
