//! Controls how fast rows are moved. While principals make calls, the run gets a small share of the token. A run never
//! exceeds the rate that an administrator set.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use keybroker_hsm::Token;

/// Principals count as active until this time has passed after their last job.
const QUIET_AFTER: Duration = Duration::from_secs(2);
/// While principals are active, the run uses one session for about 1/16 of the time.
const SHARE_PARTS: u32 = 16;
/// Longest pause after a job. A network HSM has many sessions, so a longer pause would not help callers.
const PAUSE_MAX: Duration = Duration::from_millis(50);
/// Largest number of concurrent jobs of the run while no principal is active.
const IN_FLIGHT_MAX: usize = 16;

/// The pace of a run.
#[derive(Debug)]
pub(crate) struct Pace {
    /// Rows per second; 0 for no limit.
    rate: Mutex<u32>,
    /// Time at which the next row may be moved.
    next: Mutex<Instant>,
    /// The last known number of principals' jobs, and the time of its last increase.
    seen: Mutex<(u64, Option<Instant>)>,
    /// Lock that limits the run to one job at a time while principals are active.
    turn: tokio::sync::Mutex<()>,
}

impl Pace {
    pub(crate) fn new(rate: u32, token: &dyn Token) -> Self {
        Self {
            rate: Mutex::new(rate),
            next: Mutex::new(Instant::now()),
            seen: Mutex::new((token.jobs_of_principals(), None)),
            turn: tokio::sync::Mutex::default(),
        }
    }

    /// Changes the rate.
    pub(super) fn set_rate(&self, rate: u32) {
        *lock(&self.rate) = rate;
    }

    pub(super) fn rate(&self) -> u32 {
        *lock(&self.rate)
    }

    /// Returns the number of concurrent jobs of the run while no principal is active. The run uses half of the
    /// sessions, so that a new call finds a free session.
    pub(crate) fn in_flight(token: &dyn Token) -> usize {
        let workers = token.state().workers;
        let sessions: usize = workers.iter().map(|worker| worker.sessions).sum();
        (sessions / 2).clamp(1, IN_FLIGHT_MAX)
    }

    /// Runs a job of the re-wrap. The rate and the share of the run can delay the job.
    pub(super) async fn run<T>(&self, token: &dyn Token, job: impl Future<Output = T>) -> T {
        if let Some(wait) = self.wait_for_rate(Instant::now()) {
            tokio::time::sleep(wait).await;
        }
        self.give_way(token, job).await
    }

    /// Runs a job that waits if the run has used up its share of the token. The limit on rows per
    /// second does not apply to this job.
    pub(crate) async fn give_way<T>(&self, token: &dyn Token, job: impl Future<Output = T>) -> T {
        if !self.is_called(token, Instant::now()) {
            return job.await;
        }
        let _turn = self.turn.lock().await;
        let begun = Instant::now();
        let done = job.await;
        if self.is_called(token, Instant::now()) {
            tokio::time::sleep(pause(begun.elapsed())).await;
        }
        done
    }

    /// Returns the time until the limit on rows per second allows the move of the next row.
    fn wait_for_rate(&self, now: Instant) -> Option<Duration> {
        let gap = Duration::from_secs(1).checked_div(self.rate())?;
        let mut next = lock(&self.next);
        let slot = (*next).max(now);
        *next = slot + gap;
        Some(slot - now).filter(|wait| !wait.is_zero())
    }

    /// Returns whether principals use the token.
    fn is_called(&self, token: &dyn Token, now: Instant) -> bool {
        self.is_called_at(token.jobs_of_principals(), now)
    }

    fn is_called_at(&self, jobs: u64, now: Instant) -> bool {
        let mut seen = lock(&self.seen);
        if seen.0 != jobs {
            *seen = (jobs, Some(now));
        }
        seen.1
            .is_some_and(|last| now.saturating_duration_since(last) < QUIET_AFTER)
    }
}

/// Returns the pause after a job that took the time `job`.
fn pause(job: Duration) -> Duration {
    (job * (SHARE_PARTS - 1)).min(PAUSE_MAX)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace(rate: u32) -> Pace {
        Pace {
            rate: Mutex::new(rate),
            next: Mutex::new(Instant::now()),
            seen: Mutex::new((5, None)),
            turn: tokio::sync::Mutex::default(),
        }
    }

    #[test]
    fn a_rate_spreads_rows_evenly_and_saves_up_nothing() {
        let pace = pace(100);
        let begun = Instant::now() + Duration::from_secs(10);
        let waits: Vec<_> = (0..3)
            .map(|_| pace.wait_for_rate(begun).unwrap_or_default().as_millis())
            .collect();
        assert_eq!(waits, [0, 10, 20]);
        let later = begun + Duration::from_mins(1);
        assert_eq!(pace.wait_for_rate(later), None);
        let next = pace.wait_for_rate(later).unwrap();
        assert_eq!(
            next.as_millis(),
            10,
            "the time without rows was not saved up"
        );
        pace.set_rate(0);
        assert_eq!(pace.wait_for_rate(later), None);
    }

    #[test]
    fn principals_count_as_calling_for_a_while() {
        let pace = pace(0);
        let begun = Instant::now();
        assert!(!pace.is_called_at(5, begun));
        assert!(pace.is_called_at(6, begun));
        assert!(pace.is_called_at(6, begun + QUIET_AFTER / 2));
        assert!(!pace.is_called_at(6, begun + QUIET_AFTER));
        assert!(pace.is_called_at(7, begun + QUIET_AFTER));
    }

    #[test]
    fn a_pause_leaves_a_sixteenth_and_has_an_end() {
        let job = Duration::from_micros(500);
        assert_eq!(pause(job), job * 15);
        assert_eq!(pause(Duration::from_secs(1)), PAUSE_MAX);
    }
}
