//! Detects records that are replaced unusually often. The times are read from the stored revisions, so that all brokers
//! of one database share the count, and a restart loses nothing. Only the times of raised alerts are kept in memory.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use keybroker_core::key::{RecordId, Revision};

/// The shortest time between two alerts about the same record.
const INTERVAL: Duration = Duration::from_hours(1);
/// Maximum number of records for which the time of the last alert is kept. After a thousand alerts
/// within an hour, further records cause no alert until the oldest alert is an hour old.
const RECORDS_MAX: usize = 1_000;

#[derive(Debug)]
pub(super) struct Replacements {
    per_hour: u64,
    alerts: Mutex<HashMap<RecordId, Instant>>,
}

impl Replacements {
    pub(super) fn new(per_hour: u32) -> Self {
        Self {
            per_hour: per_hour.into(),
            alerts: Mutex::default(),
        }
    }

    pub(super) fn telling_revision(&self, current: Revision) -> Option<Revision> {
        let number = current.get().checked_sub(self.per_hour)?;
        // The first revision is not a replacement.
        Revision::new(number).filter(|revision| *revision > Revision::FIRST)
    }

    pub(super) fn may_alert(&self, record: RecordId) -> bool {
        self.may_alert_at(record, Instant::now())
    }

    fn may_alert_at(&self, record: RecordId, now: Instant) -> bool {
        let mut alerts = self.alerts.lock().unwrap_or_else(PoisonError::into_inner);
        let is_recent = |at: &Instant| now.saturating_duration_since(*at) < INTERVAL;
        if alerts.get(&record).is_some_and(is_recent) {
            return false;
        }
        if alerts.len() >= RECORDS_MAX {
            alerts.retain(|_, at| is_recent(at));
        }
        if alerts.len() >= RECORDS_MAX {
            return false;
        }
        alerts.insert(record, now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn revision(number: u64) -> Revision {
        Revision::new(number).unwrap()
    }

    #[test]
    fn the_revision_that_tells_is_a_replacement() {
        let replacements = Replacements::new(3);
        for number in 1..=4 {
            assert_eq!(replacements.telling_revision(revision(number)), None);
        }
        // Revisions 2, 3, 4 and 5 are four replacements.
        assert_eq!(
            replacements.telling_revision(revision(5)),
            Some(revision(2))
        );
        assert_eq!(
            replacements.telling_revision(revision(9)),
            Some(revision(6))
        );
    }

    #[test]
    fn alerts_come_once_an_hour_for_each_record_and_a_bounded_number_is_remembered() {
        let replacements = Replacements::new(3);
        let start = Instant::now();
        let record = |number: usize| {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&number.to_be_bytes());
            RecordId::from_bytes(bytes)
        };
        for number in 0..RECORDS_MAX {
            assert!(replacements.may_alert_at(record(number), start));
            assert!(!replacements.may_alert_at(record(number), start));
        }
        let later = start + Duration::from_mins(59);
        assert!(!replacements.may_alert_at(record(0), later));
        assert!(!replacements.may_alert_at(record(RECORDS_MAX), later));
        let next = start + INTERVAL;
        assert!(replacements.may_alert_at(record(0), next));
        assert!(replacements.may_alert_at(record(RECORDS_MAX), next));
        assert_eq!(replacements.alerts.lock().unwrap().len(), 2);
    }
}
