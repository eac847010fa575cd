//! A rate limit for log lines about events that may occur many times per second. Each interval has
//! at most one log line, which contains the number of suppressed events.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Minimum time between two log lines.
const INTERVAL: Duration = Duration::from_secs(10);

/// Decides which events to log.
#[derive(Debug, Default)]
pub(super) struct LogLimit(Mutex<Counted>);

#[derive(Debug, Default)]
struct Counted {
    last_line: Option<Instant>,
    left_out: u64,
}

impl LogLimit {
    /// Counts an event. Returns the number of suppressed events since the last line if the event is
    /// to be logged, and otherwise `None`.
    pub(super) fn count(&self) -> Option<u64> {
        self.count_at(Instant::now())
    }

    fn count_at(&self, now: Instant) -> Option<u64> {
        let mut counted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = counted
            .last_line
            .is_none_or(|last_line| now.duration_since(last_line) >= INTERVAL);
        if !is_due {
            counted.left_out += 1;
            return None;
        }
        counted.last_line = Some(now);
        Some(std::mem::take(&mut counted.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_in_an_interval_tells_of_all() {
        let limit = LogLimit::default();
        let start = Instant::now();
        assert_eq!(limit.count_at(start), Some(0));
        for _ in 0..5 {
            assert_eq!(limit.count_at(start), None);
        }
        assert_eq!(limit.count_at(start + INTERVAL), Some(5));
        assert_eq!(limit.count_at(start + 2 * INTERVAL), Some(0));
    }
}
