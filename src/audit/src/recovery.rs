//! The state in which an earlier run left a log: the end of the log, its open intents, and a torn tail after a crash.
//!
//! A crash damages only the end of the log: the group of entries that was being written. All other unreadable bytes
//! have a cause other than a crash. The broker does not append to a damaged log, because new entries would hide the
//! damage. If the unreadable bytes were moved to another file, the sequence numbers would have no gap. A loss of power
//! can leave a hole inside the last group, which looks the same as a manual edit. Therefore a hole in the last group is
//! treated as damage, and an operator decides.
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

/// Largest number of changes that are remembered.
const CHANGES_MAX: usize = 16;
/// Length of the period before the end of the log, in microseconds: the changes in this period may be missing in the
/// state directory. One minute is a safe value, because the content of the state directory is at most one second older
/// than the log.
const CHANGES_WITHIN_US: i64 = 60_000_000;

/// Largest size of one torn group, in bytes. The value assumes a generous size for each line.
const TORN_BYTES_MAX: u64 = 4 * 1024 * GROUP_MAX;

/// Returns the intents of a log that have no outcome. This function writes nothing and takes no lock.
pub fn open_intents(directory: &Path) -> Result<Vec<OpenIntent>, Error> {
    Ok(Found::read(directory)?.open.into_values().collect())
}

/// The content of a log.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Number of the newest segment; `None` in a new log.
    pub(super) newest: Option<u64>,
    /// Number of bytes in the newest segment up to the end of its last valid line.
    pub(super) good_bytes: u64,
    /// Number of bytes of the torn tail: the bytes after the last valid line.
    pub(super) torn_bytes: u64,
    /// Sequence number of the last entry.
    pub(super) last_sequence: u64,
    pub(super) open: HashMap<CallId, OpenIntent>,
    /// The newest completed changes, oldest first.
    pub(super) changes: VecDeque<Change>,
    /// Time at which the last entry was written.
    last_at: Option<Timestamp>,
}

impl Found {
    /// Reads the newest segment that began without open intents, and all later segments. Every intent in an older
    /// segment has an outcome.
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

    /// Also reads the changes of the previous segment if this segment was closed shortly before the end of the log,
    /// because it may then contain the newest changes.
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
        // Damage in the older segment is ignored, because `audit verify` reports the damage.
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
                "{} is damaged at byte {good}: someone changed the file, or the machine lost power while the disk \
                 wrote blocks out of order. A crash of the broker does not cause this damage. Keep the log for the \
                 auditors, and start a new log with another `audit.instance`",
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

    /// Copies a torn tail into a separate file. After the copy, the writer truncates the segment.
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
        tracing::warn!(
            file = %path.display(), bytes = self.torn_bytes,
            "the audit log ended with an incomplete line, which was moved to a separate file"
        );
        segment::write_new(&path, &tail)?;
        segment::sync_directory(directory)
    }
}

fn began_without_open_intents(first: Option<&Parsed>) -> bool {
    first.is_some_and(|line| line.action == "segment.opened" && line.count == Some(0))
}
