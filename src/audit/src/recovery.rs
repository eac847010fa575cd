//! What an earlier run left in a log: its end, its open intents, and a tail that a crash has torn.
//!
//! A crash tears what was being written: at most one group, at the very end. Anything else that cannot be read is
//! damage, and the broker does not append to a damaged log: that would hide the damage, since what is set aside leaves
//! the sequence without a gap. A machine that loses its power may leave a hole inside that last group, which cannot be
//! distinguished from a manual edit; it counts as damage, and an operator decides.
//!
//! Mitigation: M14 of `THREAT_MODEL.md`.

use std::{
    collections::{HashMap, VecDeque},
    fs::File,
    io::{Read as _, Seek as _, SeekFrom},
    path::Path,
};

use keybroker_core::call::{CallId, Timestamp};

use super::{
    Change, Error, OpenIntent,
    line::Parsed,
    segment::{self, GROUP_MAX, Line},
};

/// Changes that are remembered.
const CHANGES_MAX: usize = 16;
/// Changes before the end of the log that the state directory may lack, in microseconds: a minute, where it is at most a second
/// old.
const CHANGES_WITHIN_US: i64 = 60_000_000;

/// What one group may leave behind, with an ample measure for a line.
const TORN_BYTES_MAX: u64 = 4 * 1024 * GROUP_MAX;

/// The intents of a log that have no outcome. Writes nothing and takes no lock.
pub fn open_intents(directory: &Path) -> Result<Vec<OpenIntent>, Error> {
    Ok(Found::read(directory)?.open.into_values().collect())
}

/// What is in a log.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Number of the newest segment; absent in a new log.
    pub(super) newest: Option<u64>,
    /// Bytes of the newest segment up to the end of its last good line.
    pub(super) good_bytes: u64,
    /// Bytes that follow: a torn tail.
    pub(super) torn_bytes: u64,
    /// Of the last entry.
    pub(super) last_sequence: u64,
    pub(super) open: HashMap<CallId, OpenIntent>,
    /// The newest changes that were made, oldest first.
    pub(super) changes: VecDeque<Change>,
    /// When the last entry was written.
    last_at: Option<Timestamp>,
}

impl Found {
    /// Reads from the newest segment that began with no intent open: an intent without an outcome cannot be older.
    pub(super) fn read(directory: &Path) -> Result<Self, Error> {
        let numbers = segment::segments(directory)?;
        let mut found = Self {
            newest: numbers.last().copied(),
            ..Self::default()
        };
        let mut first = numbers.len();
        while first > 0 {
            first -= 1;
            let path = segment::segment_path(directory, numbers[first]);
            if began_without_open_intents(segment::first_line(&path)?.as_ref()) {
                break;
            }
        }
        for number in &numbers[first..] {
            found.read_segment(directory, *number)?;
        }
        if let Some(before) = first.checked_sub(1) {
            found.read_older_changes(directory, numbers[before], numbers[first])?;
        }
        Ok(found)
    }

    /// Reads the changes of the segment before those that were read, if it was closed shortly before the log ended: it may have
    /// the newest ones.
    fn read_older_changes(
        &mut self,
        directory: &Path,
        number: u64,
        next: u64,
    ) -> Result<(), Error> {
        let opened = segment::first_line(&segment::segment_path(directory, next))?;
        let (Some(opened), Some(end)) = (opened, self.last_at) else {
            return Ok(());
        };
        if end.micros() - opened.at().micros() > CHANGES_WITHIN_US {
            return Ok(());
        }
        let mut older = Self::default();
        // Damage there is the business of `audit verify`.
        segment::lines(&segment::segment_path(directory, number), |line: Line| {
            if let Some(entry) = line.entry {
                older.track(&entry);
            }
        })?;
        older.changes.append(&mut self.changes);
        self.changes = older.changes;
        self.drop_old_changes();
        Ok(())
    }

    fn drop_old_changes(&mut self) {
        let surplus = self.changes.len().saturating_sub(CHANGES_MAX);
        self.changes.drain(..surplus);
    }

    fn read_segment(&mut self, directory: &Path, number: u64) -> Result<(), Error> {
        let path = segment::segment_path(directory, number);
        let (mut good, mut bad, mut good_after_bad) = (0, 0, false);
        segment::lines(&path, |line: Line| match line.entry {
            Some(entry) if bad == 0 => {
                good += line.bytes;
                self.track(&entry);
            }
            entry => {
                bad += line.bytes;
                good_after_bad |= entry.is_some();
            }
        })?;
        let torn = bad <= TORN_BYTES_MAX && !good_after_bad && self.newest == Some(number);
        if bad > 0 && !torn {
            return Err(Error::new(format!(
                "{} is damaged at byte {good}, but not as a crash of the broker would leave it: it was changed, or the \
                 machine lost its power while the disk wrote in another order; keep the log for the auditors and start \
                 another one with another `audit.instance`",
                path.display()
            )));
        }
        (self.good_bytes, self.torn_bytes) = (good, bad);
        Ok(())
    }

    fn track(&mut self, line: &Parsed) {
        self.last_sequence = self.last_sequence.max(line.sequence);
        self.last_at = Some(line.at());
        if let Some(intent) = line.intent() {
            self.open.insert(intent.call, intent);
        } else if line.closes_intent()
            && let Some(call) = line.call_id
            && let Some(intent) = self.open.remove(&call)
            && line.is_done()
        {
            self.changes.push_back(Change {
                call,
                at: intent.at,
                action: line.action.clone(),
            });
            self.drop_old_changes();
        }
    }

    /// Copies a torn tail into a separate file; the writer then cuts the segment back.
    pub(super) fn set_aside(&self, directory: &Path) -> Result<(), Error> {
        let Some(number) = self.newest.filter(|_| self.torn_bytes > 0) else {
            return Ok(());
        };
        let from = segment::segment_path(directory, number);
        let mut tail = Vec::new();
        File::open(&from)
            .and_then(|mut file| {
                file.seek(SeekFrom::Start(self.good_bytes))?;
                file.take(self.torn_bytes).read_to_end(&mut tail)
            })
            .map_err(|error| Error::new(format!("cannot read {}: {error}", from.display())))?;
        let name = format!("torn-{number:08}-{}.bin", Timestamp::now().micros());
        let path = directory.join(name);
        tracing::warn!(file = %path.display(), bytes = self.torn_bytes, "a torn tail of the audit log was set aside");
        segment::write_new(&path, &tail)?;
        segment::sync_directory(directory)
    }
}

fn began_without_open_intents(first: Option<&Parsed>) -> bool {
    first.is_some_and(|line| line.action == "segment.opened" && line.count == Some(0))
}
