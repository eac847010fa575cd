//! Reports the age of the wrapping key that is in use: with a metric, a note in the health details, and an alert.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use keybroker_core::{key::WrappingKeyId, metrics};

use crate::Broker;

use super::rotation::age;

const DAY: Duration = Duration::from_hours(24);

/// The age limit of wrapping keys, and the last alert that was raised.
#[derive(Debug)]
pub(crate) struct KeyAge {
    limit: Option<Duration>,
    told: Mutex<Option<(WrappingKeyId, Instant)>>,
}

impl KeyAge {
    /// `limit` is the age after which the key must be rotated; `None` for no limit.
    pub(crate) fn new(limit: Option<Duration>) -> Self {
        Self {
            limit,
            told: Mutex::default(),
        }
    }

    /// Whether an alert about this key is due. The alert is repeated once a day.
    fn is_due(&self, id: WrappingKeyId) -> bool {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let is_told = told.is_some_and(|(key, at)| key == id && at.elapsed() < DAY);
        if !is_told {
            *told = Some((id, Instant::now()));
        }
        !is_told
    }
}

impl Broker {
    /// Returns the wrapping key in use and its age, or `None` if no key is in use.
    fn key_in_use(&self) -> Option<(WrappingKeyId, Duration)> {
        let registry = self.registry.load_full()?;
        let id = registry.wrapping_key().ok()?;
        Some((id, age(registry.row(id)?)))
    }

    /// Publishes the age of the key in use, and raises an alert about a key that is too old.
    pub(crate) fn publish_key_age(&self) {
        let in_use = self.key_in_use();
        let seconds = in_use.map_or(0.0, |(_, age)| age.as_secs_f64());
        metrics::WRAPPING_KEY_AGE.handle().set(seconds);
        let Some((id, days, limit)) = self.overdue_key() else {
            return;
        };
        if self.key_age.is_due(id) {
            keybroker_core::alert!(
                KeyAge, wrapping_key = %id, days, limit_days = limit,
                "the wrapping key is older than `wrapping_keys.rotate_after_days`; rotate it with `keybroker key rotate`"
            );
        }
    }

    /// If the key in use is too old, returns the key, its age in days and the limit in days.
    fn overdue_key(&self) -> Option<(WrappingKeyId, u64, u64)> {
        let limit = self.key_age.limit?;
        let (id, age) = self.key_in_use()?;
        let days = |duration: Duration| duration.as_secs() / DAY.as_secs();
        (age > limit).then(|| (id, days(age), days(limit)))
    }

    /// If the key in use is too old, returns a sentence without a full stop for the health details.
    pub(crate) fn key_age_note(&self) -> Option<String> {
        let (id, days, limit) = self.overdue_key()?;
        Some(format!(
            "wrapping key {id} is {days} days old, and `wrapping_keys.rotate_after_days` is {limit}"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_key_is_reported_once_a_day_and_each_key_separately() {
        let age = KeyAge::new(Some(DAY));
        let [first, second] = [1, 2].map(|byte| WrappingKeyId::from_bytes([byte; 16]));
        assert!(age.is_due(first));
        assert!(!age.is_due(first));
        assert!(age.is_due(second));
    }
}
