//! The progress of a run. The holder of the run stores the progress as JSON once a second, so that every broker can
//! show it.

use serde::{Deserialize, Serialize};

use keybroker_core::{call::Timestamp, metrics};
use keybroker_store::RUN_DOCUMENT_BYTES_MAX;

/// Highest number of failed rows that are listed. Further failed rows are only counted.
const FAILURES_MAX: usize = 50;

/// The current activity of a run's holder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Rows are moved.
    #[default]
    Moving,
    /// The token verifies every row under the target key.
    Verifying,
}

/// A row that could not be moved, or whose verification failed after the move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedRow {
    /// The id of the record, of the API client or of the device, as hexadecimal digits; empty if the id cannot be read.
    pub id: String,
    /// The revision of the record or of the API client; 0 if the revision cannot be read, and for a device.
    pub revision: u64,
    /// The problem, as `store check` names it.
    pub problem: String,
}

/// The progress of a run, as its holder stores it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Progress {
    /// The principal that requested the run.
    pub requested_by: String,
    /// Whether the source is a compromised wrapping key, from which only listed rows are moved.
    pub from_compromised: bool,
    /// The current activity of the holder.
    pub phase: Phase,
    /// Revisions that were moved.
    pub revisions_moved: u64,
    /// API clients that were moved.
    pub clients_moved: u64,
    /// Devices that were moved.
    pub devices_moved: u64,
    /// Rows that another change or another broker altered before they could be swapped.
    pub changed_meanwhile: u64,
    /// Rows that could not be moved because they are damaged.
    pub failed: u64,
    /// Rows under the target key that the token verified after the last row was moved.
    pub verified: u64,
    /// The first failed rows, including rows whose verification failed.
    pub failures: Vec<FailedRow>,
    /// Number of rows that are moved per second, as a moving average.
    pub rows_per_second: u64,
    /// Time at which the progress was stored, in UTC microseconds.
    pub updated_us: i64,
    /// Time at which the run ended, in UTC microseconds; 0 if the run has not ended.
    pub ended_us: i64,
    /// Reason why the run cannot continue at present; empty if the run can continue.
    pub blocked_by: String,
}

impl Progress {
    /// Reads a stored document. If the document cannot be read, returns the progress of a new run. The document is only
    /// for display.
    pub(super) fn read(document: &[u8]) -> Self {
        serde_json::from_slice(document).unwrap_or_else(|error| {
            tracing::warn!(%error, "the stored progress of the re-wrap cannot be read");
            Self::default()
        })
    }

    /// Returns the document to store. The document always fits the database column.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut short = self.clone();
        short.updated_us = Timestamp::now().micros();
        loop {
            let bytes = serde_json::to_vec(&short).unwrap_or_default();
            if bytes.len() <= RUN_DOCUMENT_BYTES_MAX {
                return bytes;
            }
            if short.failures.pop().is_none() {
                short.blocked_by.clear();
                short.requested_by.clear();
            }
        }
    }

    /// Counts a failed row, and adds it to the list unless the list is full.
    pub(super) fn fail(&mut self, row: FailedRow) {
        self.failed = self.failed.saturating_add(1);
        metrics::REWRAP_ROWS.with(["failed"]).increment(1);
        if self.failures.len() < FAILURES_MAX {
            self.failures.push(row);
        }
    }

    /// Counts the rows that a batch did not move because they changed in the meantime.
    pub(super) fn note_changed(&mut self, rows: u64) {
        self.changed_meanwhile = self.changed_meanwhile.saturating_add(rows);
        metrics::REWRAP_ROWS
            .with(["changed-meanwhile"])
            .increment(rows);
    }

    /// Counts revisions that were moved. The addition saturates, because an attacker who can write to the database can
    /// store any number.
    pub(super) fn count_revisions(&mut self, rows: u64) {
        self.revisions_moved = self.revisions_moved.saturating_add(rows);
    }

    /// Counts API clients that were moved.
    pub(super) fn count_clients(&mut self, rows: u64) {
        self.clients_moved = self.clients_moved.saturating_add(rows);
    }

    /// Counts devices that were moved.
    pub(super) fn count_devices(&mut self, rows: u64) {
        self.devices_moved = self.devices_moved.saturating_add(rows);
    }

    /// Counts a row that the token verified after the move.
    pub(super) fn count_verified(&mut self) {
        self.verified = self.verified.saturating_add(1);
    }

    /// Returns the number of rows that were moved.
    pub fn moved(&self) -> u64 {
        self.revisions_moved
            .saturating_add(self.clients_moved)
            .saturating_add(self.devices_moved)
    }

    /// Clears the failed rows before another pass tries all rows again.
    pub(super) fn begin_pass(&mut self) {
        self.phase = Phase::Moving;
        self.failed = 0;
        self.verified = 0;
        self.failures.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An attacker who can write to the database can store any number.
    #[test]
    fn no_stored_number_stops_the_broker() {
        let largest = u64::MAX;
        let document = format!(
            "{{\"revisions_moved\":{largest},\"clients_moved\":{largest},\"verified\":{largest},\"failed\":{largest},\"changed_meanwhile\":{largest}}}"
        );
        let mut progress = Progress::read(document.as_bytes());
        assert_eq!(progress.verified, largest);
        progress.count_revisions(1);
        progress.count_clients(1);
        progress.count_verified();
        progress.note_changed(1);
        progress.fail(FailedRow {
            id: String::new(),
            revision: 1,
            problem: "mac-refused".to_owned(),
        });
        assert_eq!((progress.moved(), progress.failed), (largest, largest));
    }

    #[test]
    fn a_document_is_read_back_and_never_too_long() {
        let mut progress = Progress {
            requested_by: "URI:admin".to_owned(),
            revisions_moved: 7,
            ..Progress::default()
        };
        for revision in 0..1_000 {
            progress.fail(FailedRow {
                id: "0f".repeat(16),
                revision,
                problem: "mac-refused".to_owned(),
            });
        }
        let bytes = progress.to_bytes();
        assert!(bytes.len() <= RUN_DOCUMENT_BYTES_MAX);
        let read = Progress::read(&bytes);
        assert_eq!((read.failed, read.failures.len()), (1_000, FAILURES_MAX));
        assert_eq!((read.moved(), read.requested_by.as_str()), (7, "URI:admin"));
        progress.requested_by = "\u{1}".repeat(RUN_DOCUMENT_BYTES_MAX);
        assert!(progress.to_bytes().len() <= RUN_DOCUMENT_BYTES_MAX);
        assert_eq!(Progress::read(b"no JSON"), Progress::default());
        assert_eq!(Progress::read(b"{}"), Progress::default());
    }
}
