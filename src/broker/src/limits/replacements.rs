//! Detects records that are replaced unusually often. The times are read from the stored revisions, so that all brokers
//! of one database share the count, and a restart loses nothing. Only the times of raised alerts are kept in memory.

use keybroker_core::key::{RecordId, Revision};

use super::once_an_hour::OnceAnHour;

#[derive(Debug)]
pub(super) struct Replacements {
    per_hour: u64,
    alerts: OnceAnHour<RecordId>,
}

impl Replacements {
    pub(super) fn new(per_hour: u32) -> Self {
        Self {
            per_hour: per_hour.into(),
            alerts: OnceAnHour::default(),
        }
    }

    pub(super) fn telling_revision(&self, current: Revision) -> Option<Revision> {
        let number = current.get().checked_sub(self.per_hour)?;
        // The first revision is not a replacement.
        Revision::new(number).filter(|revision| *revision > Revision::FIRST)
    }

    pub(super) fn may_alert(&self, record: RecordId) -> bool {
        self.alerts.may_alert(record)
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
}
