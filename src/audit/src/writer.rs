//! The one thread that writes a log. It takes what is queued, writes it in one go, syncs once, and only then answers: the
//! sync under way is the natural group, so there is no delay to tune.
//!
//! After any failure nothing is assumed of the file. A failed sync may have dropped dirty pages permanently (Linux reports the
//! loss once and then calls the file clean), so the segment is cut back to what was durable and a new one is begun.
//!
//! Files that another process removed, replaced, truncated or added are no failure of the disk: the log is latched, and nothing
//! is written until an operator acknowledges what was found.
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
use tokio::sync::oneshot;

use keybroker_core::{
    call::{CallId, Timestamp},
    metrics,
    remedy::remedy,
};

use super::{
    Entry, EntryKind, Error, OpenIntent, Outcome,
    extent::{Extent, extents},
    integrity::{Files, Written},
    line::{self, Place},
    memory::{Mark, Memory, Removal},
    recovery::Found,
    segment::{self, GROUP_MAX},
    state::Shared,
};

/// How often all files are compared and, while the log is down, the writer tries it again. Twice this is less than the second
/// within which tampering is noticed.
const PROBE_INTERVAL: Duration = Duration::from_millis(400);

/// The action of the entry that records a removal of old segments.
pub(super) const SEGMENTS_REMOVED: &str = "log.segments_removed";
/// Longest name of an operator, in characters.
const PRINCIPAL_MAX: usize = 256;
/// Subjects of complaints.
const MARK: &str = "mark";
const REMOVAL: &str = "removal";
const ACKNOWLEDGEMENT: &str = "acknowledgement";

/// An entry, and the channel on which its caller learns that it is durable.
pub(super) type Waiting = (Box<Entry>, oneshot::Sender<Result<u64, Error>>);

pub(super) enum Command {
    Append(Waiting),
    Close,
}

pub(super) struct Writer {
    directory: PathBuf,
    log_id: String,
    pub(super) segment_bytes_max: u64,
    shared: Arc<Shared>,
    /// Held for its lock; absent while it is taken anew.
    lock: Option<File>,
    /// Every file of the log, as this process left it.
    files: Files,
    /// What outlives the directory; absent for the log of one command.
    memory: Option<Memory>,
    /// The mark that was remembered last.
    marked: u64,
    /// When the files were compared last.
    compared: Instant,
    /// What was found. Nothing is written while it is there.
    latched: Option<Error>,
    /// What was found, for the state directory.
    finding: String,
    /// What was logged last, by its subject: what fails with each probe is logged once.
    complaints: HashMap<&'static str, String>,
    /// Absent after a failure.
    current: Option<Current>,
    /// The newest segment, whether open or not; absent in a new log.
    newest: Option<Newest>,
    /// Sequence of the next entry.
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
    /// Goes on where an earlier run ended.
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

    /// Runs until closed or until every handle is dropped.
    pub(super) fn run(mut self, commands: &Receiver<Command>) {
        self.shared.idle();
        loop {
            let first = match commands.recv_timeout(PROBE_INTERVAL) {
                Ok(command) => command,
                Err(RecvTimeoutError::Timeout) => {
                    self.probe();
                    self.shared.idle();
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let mut group = Vec::new();
            let mut closing = false;
            let more = commands.try_iter();
            // In this order: the other would take one command more than it handles.
            for (_, command) in (0..GROUP_MAX).zip(std::iter::once(first).chain(more)) {
                match command {
                    Command::Append(waiting) => group.push(waiting),
                    Command::Close => closing = true,
                }
            }
            self.commit(group);
            // A busy log has no pause in which the probe runs.
            if self.compared.elapsed() >= PROBE_INTERVAL {
                self.probe();
            }
            self.shared.idle();
            if closing {
                let closed = Entry::new(EntryKind::System, "log.closed", Outcome::Ok);
                if let Err(error) = self.write(&[&closed]) {
                    tracing::error!(%error, "the audit log could not be closed cleanly");
                }
                self.remember();
                return;
            }
        }
    }

    fn commit(&mut self, mut group: Vec<Waiting>) {
        // A caller that gave up waiting has refused its call, so nothing must be recorded as done for it.
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
            // A receiver that was dropped since then has refused its call; the entry says more than happened, never less.
            let _gone = done.send(result.clone().map(|()| position));
        }
        self.rotate_if_full();
    }

    /// An intent that its caller gave up may have been left out: then there is nothing to close.
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

    /// Writes and syncs, or leaves the log without a current segment.
    pub(super) fn write(&mut self, entries: &[&Entry]) -> Result<(), Error> {
        let result = self.try_write(entries);
        if let Err(error) = &result {
            self.note_failure(error);
        }
        result
    }

    /// Nothing is assumed of the open segment any more, and a log whose files were tampered with is latched.
    fn note_failure(&mut self, error: &Error) {
        self.current = None;
        if !error.is_tampering() {
            self.shared.set_down(Some(error.clone()));
            return;
        }
        if self.latched.is_some() {
            return;
        }
        // What was durable until now must be missed by a later check.
        self.remember();
        let latched = error.clone().latched();
        keybroker_core::alert!(AuditTampered, error = %latched, "the files of the audit log were tampered with");
        self.shared.set_down(Some(latched.clone()));
        self.latched = Some(latched);
        error.finding().clone_into(&mut self.finding);
        self.remember_tampering();
    }

    /// Writes what was found to the state directory, for a restart and for the operator's command. What cannot be written is
    /// written with a later probe, and so is what is gone again: the directory may be on a volume that was unmounted and is back.
    fn remember_tampering(&mut self) {
        let Some(memory) = &self.memory else { return };
        let remembered = match memory.tampering() {
            Ok(None) => memory.set_tampering(&self.finding),
            read => read.map(|_| ()),
        };
        match remembered {
            Ok(()) => {}
            Err(error) if self.is_news("tampering", &error) => {
                tracing::warn!(%error, "the tampering is not in the state directory yet; the broker tries again");
            }
            Err(_) => {}
        }
    }

    /// Whether an error of this subject is another one than the last.
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
            let remedy = remedy.as_deref().unwrap_or("repair the disk");
            Error::new(format!(
                "cannot write {}: {error}; {remedy}",
                path.display()
            ))
        };
        self.shared.busy();
        // Before the write: a segment that was cut short would have the right length again after it.
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

    /// Opens a new segment if there is none: at start, after a failure, when the last is full.
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
        // Known before anything else can fail: the next attempt begins with this file, and makes none beside it.
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

    /// Leaves of the newest segment what was durable, so that no torn line stays in the middle of the log, and says which
    /// number is next. A segment of which nothing is durable is made anew: on a full disk each attempt would leave an
    /// empty one.
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

    /// A full segment is closed when no intent is open, so that recovery never reads further back than the first segment
    /// that began without one; at twice its size it is closed whatever is open.
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
                tracing::error!(%error, "no new audit segment");
            }
        }
    }

    /// Once in a while without being asked: compares the files, finds out that the log is back, and remembers how far it is
    /// durable.
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

    /// Remembers the last entry. A mark that cannot be written is written later: it may lag behind.
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
                tracing::warn!(%error, "the end of the audit log is not in the state directory yet; the broker tries again");
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

    /// Carries out the operator's request to remove old segments. It waits until no intent is open: recovery reads no segment
    /// that is older than the current one then.
    pub(super) fn try_removal(&mut self) {
        let Some(memory) = self.memory.clone() else {
            return;
        };
        let removal = match memory.removal() {
            Ok(Some(removal)) => removal,
            Ok(None) => return,
            Err(error) => {
                if self.is_news(REMOVAL, &error) {
                    tracing::warn!(%error, "the request to remove audit segments cannot be read");
                }
                return;
            }
        };
        if self.current.is_none() || !self.open.is_empty() {
            return;
        }
        let removed = self.remove_segments(&memory, &removal);
        // A request that failed is withdrawn: the operator's command reports which segments are left.
        let finished = removed.and_then(|()| memory.forget_removal());
        if let Err(error) = finished
            && self.is_news(REMOVAL, &error)
        {
            tracing::error!(%error, "old audit segments were not removed; run the command again once the cause is repaired");
            if let Err(error) = memory.forget_removal() {
                tracing::warn!(%error, "the request to remove audit segments cannot be withdrawn");
            }
        }
    }

    /// The entry first, then the mark that does not miss the segments, then the files: whatever is cut short is no tampering.
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

    /// Goes on when an operator has acknowledged what was found.
    fn try_acknowledgement(&mut self) {
        let Some(memory) = self.memory.clone() else {
            return;
        };
        let acknowledgement = match memory.acknowledgement() {
            Ok(Some(acknowledgement)) => acknowledgement,
            Ok(None) => return,
            Err(error) => {
                if self.is_news(ACKNOWLEDGEMENT, &error) {
                    tracing::warn!(%error, "the acknowledgement cannot be read");
                }
                return;
            }
        };
        match self.go_on_after_tampering(&memory, &acknowledgement.principal) {
            Ok(()) => {
                self.complaints.clear();
                tracing::warn!(
                    principal = %acknowledgement.principal,
                    "the tampering was acknowledged; the audit log continues"
                );
            }
            Err(error) => {
                if self.is_news(ACKNOWLEDGEMENT, &error) {
                    tracing::error!(%error, "the tampering was acknowledged, but the audit log cannot continue yet");
                }
                self.current = None;
                let latched = error.latched();
                self.shared.set_down(Some(latched.clone()));
                self.latched = Some(latched);
            }
        }
    }

    /// Takes the directory as it is now, as a start would. Entries that are gone leave a gap in the sequence.
    fn go_on_after_tampering(&mut self, memory: &Memory, principal: &str) -> Result<(), Error> {
        segment::prepare_directory(&self.directory)?;
        // Ours is of the file that may be gone.
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

/// The entry that records that a log continues after its files were tampered with.
pub(super) fn acknowledged(principal: &str) -> Entry {
    let mut entry = Entry::new(EntryKind::System, "log.tampering_acknowledged", Outcome::Ok);
    entry.principal = Some(shortened(principal));
    entry.peer = Some("local".to_owned());
    entry
}

/// A principal from a state file, of a length that a line of the log can hold.
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
