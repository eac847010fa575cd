//! The only thread that writes a log. The thread takes the queued entries, writes them together, syncs once, and only
//! then answers the callers. During a sync, the entries of the next group collect in the queue. If the first entry of a
//! group may wait, the thread first sleeps for a short time to collect more entries. Larger groups need fewer syncs,
//! and each sync costs processor time that a token on the same machine needs.
//!
//! After a failure, the state of the file is unknown. A failed sync may have dropped dirty pages permanently: Linux
//! reports the loss once and then treats the file as clean. Therefore, after a failure, the segment is truncated to its
//! durable length and a new segment is begun.
//!
//! If another process has removed, replaced, truncated or added files, the cause is tampering and not a disk failure.
//! After tampering, the log is latched, and nothing is written until an operator acknowledges the finding.
//!
//! Mitigation: M14 of `THREAT_MODEL.md`.

use std::{
    collections::HashMap,
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, RecvTimeoutError};

use keybroker_core::{
    call::{CallId, Timestamp},
    metrics,
    remedy::remedy,
};

use super::{
    Entry, EntryKind, Error, OpenIntent, Outcome,
    commands::{Command, Waiting, receive},
    extent::{Extent, extents},
    integrity::{Files, Written},
    line::{self, Place},
    memory::{Mark, Memory, Removal},
    recovery::Found,
    segment::{self, GROUP_MAX},
    state::Shared,
};

/// Interval at which all files are checked, and at which the writer retries while the log is unavailable. Twice the
/// interval is less than one second, the time within which tampering must be detected.
const PROBE_INTERVAL: Duration = Duration::from_millis(400);

/// Time for which further entries are collected if the first entry of a group may wait.
const COLLECTED_FOR: Duration = Duration::from_millis(3);
/// If at least this many entries already wait, the group is written without waiting for `COLLECTED_FOR`.
const COLLECTED_MAX: usize = 64;

/// The action of the entry that records the removal of old segments.
pub(super) const SEGMENTS_REMOVED: &str = "log.segments_removed";
/// Longest name of an operator, in characters.
const PRINCIPAL_MAX: usize = 256;
/// The operations whose repeated failures are logged only once.
const MARK: &str = "mark";
const REMOVAL: &str = "removal";
const ACKNOWLEDGEMENT: &str = "acknowledgement";

pub(super) struct Writer {
    directory: PathBuf,
    log_id: String,
    pub(super) segment_bytes_max: u64,
    shared: Arc<Shared>,
    /// The file that holds the lock of the log; `None` while the lock is taken again.
    lock: Option<File>,
    /// Every file of the log, in the state in which this process last wrote it.
    files: Files,
    /// The facts in the state directory; `None` for the log of a command.
    memory: Option<Memory>,
    /// The sequence number in the last stored mark.
    marked: u64,
    /// When the files were last checked.
    compared: Instant,
    /// The detected tampering. While this field is set, nothing is written to the log.
    latched: Option<Error>,
    /// The description of the tampering that is stored in the state directory.
    finding: String,
    /// The last logged message about each subject, so that a repeated failure is logged only once.
    complaints: HashMap<&'static str, String>,
    /// The open segment; `None` after a failure.
    current: Option<Current>,
    /// The newest segment, which may be open or closed; `None` in a new log.
    newest: Option<Newest>,
    /// Sequence number of the next entry.
    sequence: u64,
    /// Intents without an outcome.
    pub(super) open: HashMap<CallId, OpenIntent>,
}

struct Current {
    file: File,
    path: PathBuf,
}

struct Newest {
    number: u64,
    durable_bytes: u64,
}

impl Writer {
    /// Creates a writer that continues the log of an earlier run.
    pub(super) fn new(
        directory: &Path,
        log_id: String,
        lock: File,
        found: &Found,
        shared: Arc<Shared>,
        memory: Option<Memory>,
    ) -> Result<Self, Error> {
        Ok(Self {
            directory: directory.to_owned(),
            log_id,
            segment_bytes_max: u64::MAX,
            shared,
            lock: Some(lock),
            files: Files::read(directory)?,
            memory,
            marked: 0,
            compared: Instant::now(),
            latched: None,
            finding: String::new(),
            complaints: HashMap::new(),
            current: None,
            newest: newest(found),
            sequence: found.last_sequence + 1,
            open: HashMap::new(),
        })
    }

    /// Runs until the log is closed or every handle is dropped.
    pub(super) fn run(mut self, commands: &Receiver<Command>) {
        self.shared.idle();
        loop {
            let first = match receive(commands, PROBE_INTERVAL) {
                Ok(command) => command,
                Err(RecvTimeoutError::Timeout) => {
                    self.probe();
                    self.shared.idle();
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => return,
            };
            if matches!(first, Command::AppendUnhurried(_)) && commands.len() < COLLECTED_MAX {
                // The thread sleeps and does not wait on the channel, because each further entry would wake the thread.
                std::thread::sleep(COLLECTED_FOR);
            }
            let mut group = Vec::new();
            let mut closing = false;
            let more = commands.try_iter();
            // The range is the first operand of `zip`, because `zip` would otherwise take one command that the loop
            // does not handle.
            for (_, command) in (0..GROUP_MAX).zip(std::iter::once(first).chain(more)) {
                match command {
                    Command::Append(waiting) | Command::AppendUnhurried(waiting) => {
                        group.push(waiting);
                    }
                    Command::Close => closing = true,
                }
            }
            self.commit(group);
            // A busy log has no idle time in which the probe could run, so the probe also runs after each group.
            if self.compared.elapsed() >= PROBE_INTERVAL {
                self.probe();
            }
            self.shared.idle();
            if closing {
                let closed = Entry::new(EntryKind::System, "log.closed", Outcome::Ok);
                if let Err(error) = self.write(&[&closed]) {
                    tracing::error!(%error, "cannot close the audit log cleanly");
                }
                self.remember();
                return;
            }
        }
    }

    fn commit(&mut self, mut group: Vec<Waiting>) {
        // If a caller stopped waiting, its API call was refused. Therefore no entry may record that the action of the
        // refused call was done.
        group.retain(|(_, done)| !done.is_closed());
        let group = self.without_moot(group);
        if group.is_empty() {
            return;
        }
        let first = self.sequence;
        let entries: Vec<&Entry> = group.iter().map(|(entry, _)| entry.as_ref()).collect();
        let result = self.ensure_open().and_then(|()| self.write(&entries));
        if result.is_ok() {
            for entry in entries {
                self.track(entry);
            }
        }
        metrics::AUDIT_GROUP_ENTRIES
            .handle()
            .record(metrics::to_float(group.len()));
        for (position, (_, done)) in (first..).zip(group) {
            // If the receiver was dropped in the meantime, the API call was refused. Therefore the log may contain an
            // action that did not happen, but every action that happened is in the log.
            let _gone = done.send(result.clone().map(|()| position));
        }
        self.rotate_if_full();
    }

    /// Drops each `recovered` entry for which there is no open intent. If the caller of an intent stopped waiting, the
    /// intent may not have been written.
    fn without_moot(&self, group: Vec<Waiting>) -> Vec<Waiting> {
        let mut needed = Vec::with_capacity(group.len());
        for (entry, done) in group {
            let open = entry
                .call_id
                .is_some_and(|call| self.open.contains_key(&call));
            if entry.kind == EntryKind::Recovered && !open {
                let _gone = done.send(Ok(self.sequence - 1));
            } else {
                needed.push((entry, done));
            }
        }
        needed
    }

    /// Writes and syncs entries. After a failure, no segment is open.
    pub(super) fn write(&mut self, entries: &[&Entry]) -> Result<(), Error> {
        let result = self.try_write(entries);
        if let Err(error) = &result {
            self.note_failure(error);
        }
        result
    }

    /// Closes the open segment, whose state is unknown. Latches a log whose files were tampered with.
    fn note_failure(&mut self, error: &Error) {
        self.current = None;
        if !error.is_tampering() {
            self.shared.set_down(Some(error.clone()));
            return;
        }
        if self.latched.is_some() {
            return;
        }
        // The mark is stored, so that a later check detects if durable entries were lost.
        self.remember();
        let latched = error.clone().latched();
        keybroker_core::alert!(AuditTampered, error = %latched, "the files of the audit log were tampered with");
        self.shared.set_down(Some(latched.clone()));
        self.latched = Some(latched);
        error.finding().clone_into(&mut self.finding);
        self.remember_tampering();
    }

    /// Stores the finding in the state directory, for the next start and for the operator's command. If the finding
    /// cannot be stored, a later probe stores it. A probe also stores a finding that has disappeared, because the state
    /// directory may be on a volume that was unmounted and mounted again.
    fn remember_tampering(&mut self) {
        let Some(memory) = &self.memory else { return };
        let remembered = match memory.tampering() {
            Ok(None) => memory.set_tampering(&self.finding),
            read => read.map(|_| ()),
        };
        match remembered {
            Ok(()) => {}
            Err(error) if self.is_news("tampering", &error) => {
                tracing::warn!(%error, "the audit log was tampered with, and this finding cannot be stored in the state directory; trying again");
            }
            Err(_) => {}
        }
    }

    /// Whether the error differs from the last error of the same operation.
    fn is_news(&mut self, subject: &'static str, error: &Error) -> bool {
        let text = error.to_string();
        let is_news = self.complaints.get(subject) != Some(&text);
        self.complaints.insert(subject, text);
        is_news
    }

    fn try_write(&mut self, entries: &[&Entry]) -> Result<(), Error> {
        let (Some(current), Some(newest)) = (&mut self.current, &mut self.newest) else {
            return Err(Error::new("no segment is open".to_owned()));
        };
        let mut bytes = Vec::with_capacity(entries.len() * 512);
        for (sequence, entry) in (self.sequence..).zip(entries) {
            let place = Place {
                log_id: &self.log_id,
                sequence,
                at: Timestamp::now(),
            };
            line::encode(entry, place, &mut bytes);
        }
        let failed = |error| {
            let path = &current.path;
            let remedy = remedy(path, &error);
            let remedy = remedy.as_deref().unwrap_or("check the disk");
            Error::new(format!(
                "cannot write {}: {error}; {remedy}",
                path.display()
            ))
        };
        self.shared.busy();
        // The segment is checked before the write, because a truncated segment could have the expected length again
        // after the write.
        self.files.check_newest(newest.number)?;
        current.file.write_all(&bytes).map_err(failed)?;
        current.file.sync_data().map_err(failed)?;
        let written = Written::of(&current.file.metadata().map_err(failed)?);
        newest.durable_bytes += count(bytes.len());
        self.files.note(
            newest.number,
            Written {
                bytes: newest.durable_bytes,
                ..written
            },
        );
        self.files.check_newest(newest.number)?;
        self.shared.set_durable(newest.number, newest.durable_bytes);
        self.sequence += count(entries.len());
        Ok(())
    }

    fn track(&mut self, entry: &Entry) {
        let Some(call) = entry.call_id else { return };
        match entry.kind {
            EntryKind::Intent => {
                let intent = OpenIntent {
                    call,
                    at: Timestamp::now(),
                    intent: entry.clone(),
                };
                self.open.insert(call, intent);
            }
            EntryKind::Outcome | EntryKind::Recovered => {
                self.open.remove(&call);
            }
            EntryKind::Decision | EntryKind::System => {}
        }
    }

    /// Opens a new segment if no segment is open: at the start, after a failure, or when the last segment is full.
    pub(super) fn ensure_open(&mut self) -> Result<(), Error> {
        if let Some(latched) = &self.latched {
            return Err(latched.clone());
        }
        if self.current.is_some() {
            return Ok(());
        }
        let result = self.begin_segment();
        match &result {
            Ok(()) => self.shared.set_down(None),
            Err(error) => self.note_failure(error),
        }
        result
    }

    fn begin_segment(&mut self) -> Result<(), Error> {
        self.shared.busy();
        let number = self.clear_newest()?;
        self.files.check_all()?;
        let path = segment::segment_path(&self.directory, number);
        let file = segment::create(&path)?;
        // `newest` is set before another step can fail, so that the next attempt removes the new file and uses the
        // file's number again.
        self.newest = Some(Newest {
            number,
            durable_bytes: 0,
        });
        let meta = file
            .metadata()
            .map_err(|error| Error::new(format!("cannot examine {}: {error}", path.display())))?;
        self.files.note(number, Written::of(&meta));
        segment::sync_directory(&self.directory)?;
        self.current = Some(Current { file, path });
        let mut opened = Entry::new(EntryKind::System, "segment.opened", Outcome::Ok);
        opened.count = Some(count(self.open.len()));
        self.try_write(&[&opened])
    }

    /// Truncates the newest segment to its durable bytes, so that no torn line remains in the middle of the log.
    /// Returns the number of the next segment. If the newest segment has no durable bytes, its number is used again: on
    /// a full disk, each attempt would otherwise leave an empty segment.
    fn clear_newest(&mut self) -> Result<u64, Error> {
        let Some(newest) = &self.newest else {
            return Ok(1);
        };
        let path = segment::segment_path(&self.directory, newest.number);
        self.files.check_identity(newest.number)?;
        if newest.durable_bytes > 0 {
            segment::cut_back(&path, newest.durable_bytes)?;
            self.files.cut_back(newest.number, newest.durable_bytes);
            return Ok(newest.number + 1);
        }
        segment::remove(&path)?;
        self.files.forget(newest.number);
        Ok(newest.number)
    }

    /// Closes a full segment if no intent is open. Therefore the recovery reads only the segments since the newest
    /// segment that began without an open intent. If the segment reaches twice the maximum size, it is closed even if
    /// intents are open.
    fn rotate_if_full(&mut self) {
        let bytes = self
            .newest
            .as_ref()
            .map_or(0, |newest| newest.durable_bytes);
        let full = bytes >= self.segment_bytes_max;
        let overfull = bytes >= self.segment_bytes_max.saturating_mul(2);
        if overfull || (full && self.open.is_empty()) {
            self.current = None;
            if let Err(error) = self.ensure_open() {
                tracing::error!(%error, "cannot open a new audit segment");
            }
        }
    }

    /// Runs at a fixed interval: checks the files, reopens a log that failed, and stores the position of the last
    /// durable entry.
    fn probe(&mut self) {
        self.shared.busy();
        self.compared = Instant::now();
        if self.latched.is_some() {
            self.remember_tampering();
            self.try_acknowledgement();
            return;
        }
        if self.current.is_some()
            && let Err(error) = self.files.check_all()
        {
            self.note_failure(&error);
            return;
        }
        if self.current.is_none() && self.ensure_open().is_ok() {
            tracing::info!("the audit log is writable again");
        }
        self.remember();
        self.try_removal();
    }

    /// Stores the mark of the last entry. If the mark cannot be stored, a later probe stores it; until then, the mark
    /// may be older than the log.
    fn remember(&mut self) {
        let sequence = self.sequence - 1;
        let Some(memory) = &self.memory else { return };
        if self.latched.is_some() || self.marked == sequence {
            return;
        }
        let mark = self.mark(extents(self.files.lengths()));
        match memory.set_mark(&mark) {
            Ok(()) => {
                self.marked = sequence;
                self.complaints.remove(MARK);
            }
            Err(error) if self.is_news(MARK, &error) => {
                tracing::warn!(%error, "cannot store the position of the last audit entry in the state directory; trying again");
            }
            Err(_) => {}
        }
    }

    fn mark(&self, segments: Vec<Extent>) -> Mark {
        Mark {
            log_id: self.log_id.clone(),
            sequence: self.sequence - 1,
            segments,
        }
    }

    /// Carries out an operator's request to remove old segments. The removal waits until no intent is open, because a
    /// recovery needs the segments since the oldest open intent.
    pub(super) fn try_removal(&mut self) {
        let Some(memory) = self.memory.clone() else {
            return;
        };
        let removal = match memory.removal() {
            Ok(Some(removal)) => removal,
            Ok(None) => return,
            Err(error) => {
                if self.is_news(REMOVAL, &error) {
                    tracing::warn!(%error, "cannot read the request to remove audit segments");
                }
                return;
            }
        };
        if self.current.is_none() || !self.open.is_empty() {
            return;
        }
        let removed = self.remove_segments(&memory, &removal);
        // The operator's request is removed even if the removal of the segments failed. The operator's command reports
        // which segments remain.
        let finished = removed.and_then(|()| memory.forget_removal());
        if let Err(error) = finished
            && self.is_news(REMOVAL, &error)
        {
            tracing::error!(%error, "cannot remove old audit segments; repair the cause and run the command again");
            if let Err(error) = memory.forget_removal() {
                tracing::warn!(%error, "cannot delete the failed request to remove audit segments");
            }
        }
    }

    /// Writes the audit entry, then stores a mark without the segments, then removes the files. Because of the order of
    /// these steps, an interruption does not look like tampering.
    fn remove_segments(&mut self, memory: &Memory, removal: &Removal) -> Result<(), Error> {
        let newest = self.newest.as_ref().map_or(0, |newest| newest.number);
        let is_old = |number: u64| number <= removal.through && number < newest;
        let old: Vec<(u64, u64)> = self
            .files
            .lengths()
            .filter(|(number, _)| is_old(*number))
            .collect();
        let Some(&(last, _)) = old.last() else {
            return Ok(());
        };
        let mut entry = Entry::new(EntryKind::System, SEGMENTS_REMOVED, Outcome::Ok);
        entry.count = Some(last);
        entry.bytes = Some(old.iter().map(|(_, bytes)| bytes).sum());
        entry.principal = Some(shortened(&removal.principal));
        entry.peer = Some("local".to_owned());
        self.write(&[&entry])?;
        let left = self.files.lengths().filter(|(number, _)| !is_old(*number));
        memory.set_mark(&self.mark(extents(left)))?;
        self.marked = self.sequence - 1;
        for (number, _) in old {
            segment::remove(&segment::segment_path(&self.directory, number))?;
            self.files.forget(number);
        }
        segment::sync_directory(&self.directory)?;
        tracing::info!(through = last, principal = %removal.principal, "old audit segments were removed");
        Ok(())
    }

    /// Continues the log if an operator has acknowledged the finding.
    fn try_acknowledgement(&mut self) {
        let Some(memory) = self.memory.clone() else {
            return;
        };
        let acknowledgement = match memory.acknowledgement() {
            Ok(Some(acknowledgement)) => acknowledgement,
            Ok(None) => return,
            Err(error) => {
                if self.is_news(ACKNOWLEDGEMENT, &error) {
                    tracing::warn!(%error, "cannot read the operator's acknowledgement that the audit log was tampered with");
                }
                return;
            }
        };
        match self.go_on_after_tampering(&memory, &acknowledgement.principal) {
            Ok(()) => {
                self.complaints.clear();
                tracing::warn!(
                    principal = %acknowledgement.principal,
                    "an operator acknowledged the tampering; the audit log continues"
                );
            }
            Err(error) => {
                if self.is_news(ACKNOWLEDGEMENT, &error) {
                    tracing::error!(
                        %error,
                        "an operator acknowledged the tampering with the audit log, but the audit log cannot continue \
                         yet"
                    );
                }
                self.current = None;
                let latched = error.latched();
                self.shared.set_down(Some(latched.clone()));
                self.latched = Some(latched);
            }
        }
    }

    /// Reads the log's directory again, as at a start of the broker. If entries are missing, the sequence has a gap.
    fn go_on_after_tampering(&mut self, memory: &Memory, principal: &str) -> Result<(), Error> {
        segment::prepare_directory(&self.directory)?;
        // The lock is taken again, because the locked file may have been removed.
        self.lock = None;
        self.lock = Some(segment::lock(&self.directory)?);
        let log_id = segment::log_id(&self.directory)?;
        let found = Found::read(&self.directory)?;
        found.set_aside(&self.directory)?;
        let went_on = log_id == self.log_id;
        self.log_id = log_id;
        self.sequence = if went_on {
            self.sequence.max(found.last_sequence + 1)
        } else {
            found.last_sequence + 1
        };
        self.newest = newest(&found);
        self.open.extend(found.open);
        self.files = Files::read(&self.directory)?;
        self.latched = None;
        self.ensure_open()?;
        self.write(&[&acknowledged(principal)])?;
        self.remember();
        memory.forget_tampering()
    }
}

/// The entry that records that a log continues after tampering was acknowledged.
pub(super) fn acknowledged(principal: &str) -> Entry {
    let mut entry = Entry::new(EntryKind::System, "log.tampering_acknowledged", Outcome::Ok);
    entry.principal = Some(shortened(principal));
    entry.peer = Some("local".to_owned());
    entry
}

/// Shortens a principal from a state file to the length that fits into a line.
fn shortened(principal: &str) -> String {
    principal.chars().take(PRINCIPAL_MAX).collect()
}

fn newest(found: &Found) -> Option<Newest> {
    found.newest.map(|number| Newest {
        number,
        durable_bytes: found.good_bytes,
    })
}

fn count(number: usize) -> u64 {
    u64::try_from(number).expect("a count fits in 64 bits")
}
