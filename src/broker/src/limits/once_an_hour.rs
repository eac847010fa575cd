//! Limits how often an alert about the same thing is raised: at most once an hour, for a bounded number of things.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// The shortest time between two alerts about the same thing.
const INTERVAL: Duration = Duration::from_hours(1);
/// Maximum number of things for which the time of the last alert is kept. After a thousand alerts within an hour, further things
/// cause no alert until the oldest alert is an hour old.
const KEYS_MAX: usize = 1_000;

#[derive(Debug)]
pub(super) struct OnceAnHour<K>(Mutex<HashMap<K, Instant>>);

impl<K> Default for OnceAnHour<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + Hash> OnceAnHour<K> {
    /// Whether to raise an alert now.
    pub(super) fn may_alert(&self, key: K) -> bool {
        self.may_alert_at(key, Instant::now())
    }

    fn may_alert_at(&self, key: K, now: Instant) -> bool {
        let mut alerts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_recent = |at: &Instant| now.saturating_duration_since(*at) < INTERVAL;
        if alerts.get(&key).is_some_and(is_recent) {
            return false;
        }
        if alerts.len() >= KEYS_MAX {
            alerts.retain(|_, at| is_recent(at));
        }
        if alerts.len() >= KEYS_MAX {
            return false;
        }
        alerts.insert(key, now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alerts_come_once_an_hour_and_a_bounded_number_is_remembered() {
        let alerts = OnceAnHour::default();
        let start = Instant::now();
        for number in 0..KEYS_MAX {
            assert!(alerts.may_alert_at(number, start));
            assert!(!alerts.may_alert_at(number, start));
        }
        let later = start + Duration::from_mins(59);
        assert!(!alerts.may_alert_at(0, later));
        assert!(!alerts.may_alert_at(KEYS_MAX, later));
        let next = start + INTERVAL;
        assert!(alerts.may_alert_at(0, next));
        assert!(alerts.may_alert_at(KEYS_MAX, next));
        assert_eq!(alerts.0.lock().unwrap().len(), 2);
    }
}
