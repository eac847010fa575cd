//! Log lines about what a flood can cause many times a second: one in a while, with the number of those that were left out.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Between two lines.
const INTERVAL: Duration = Duration::from_secs(10);

/// Decides which of many events is worth a line.
#[derive(Debug, Default)]
pub(super) struct Rarely(Mutex<Counted>);

#[derive(Debug, Default)]
struct Counted {
    said: Option<Instant>,
    left_out: u64,
}

impl Rarely {
    /// Counts an event. How many were left out since the last line, when this one gets a line.
    pub(super) fn count(&self) -> Option<u64> {
        self.count_at(Instant::now())
    }

    fn count_at(&self, now: Instant) -> Option<u64> {
        let mut counted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = counted
            .said
            .is_none_or(|said| now.duration_since(said) >= INTERVAL);
        if !is_due {
            counted.left_out += 1;
            return None;
        }
        counted.said = Some(now);
        Some(std::mem::take(&mut counted.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_in_an_interval_tells_of_all() {
        let rarely = Rarely::default();
        let start = Instant::now();
        assert_eq!(rarely.count_at(start), Some(0));
        for _ in 0..5 {
            assert_eq!(rarely.count_at(start), None);
        }
        assert_eq!(rarely.count_at(start + INTERVAL), Some(5));
        assert_eq!(rarely.count_at(start + 2 * INTERVAL), Some(0));
    }
}
