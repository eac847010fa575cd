//! The one thread that writes a log. It takes what is queued, writes it in one go, syncs once, and only then answers: the
//! sync under way is the natural group, so there is no delay to tune.
//!
//! After any failure nothing is assumed of the file. A failed sync may have dropped dirty pages for good (Linux reports the
//! loss once and then calls the file clean), so the segment is cut back to what was durable and a new one is begun.
//!
//! Mitigation: M14 of `THREAT_MODEL.md`.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use tokio::sync::oneshot;

use crate::call::{CallId, Timestamp};

use super::{
    Entry, EntryKind, Error, OpenIntent, Outcome,
    line::{self, Place},
    recovery::Found,
    segment::{self, FileId},
    state::Shared,
};

/// Entries in one group at most.
pub(super) const GROUP_MAX: u64 = 1_024;
/// While the log is down, how often it is tried without being asked.
const PROBE_INTERVAL: Duration = Duration::from_millis(500);

/// An entry, and whoever waits for it to be durable.
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
    /// Held for its lock.
    _lock: File,
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
    /// The file as it was made or found; absent when it was gone.
    id: Option<FileId>,
}

impl Current {
    /// Whether the path still leads to the open file: a log that was unlinked or replaced takes writes that nobody can
    /// read.
    fn still_there(&self) -> bool {
        let open = self.file.metadata().ok().map(|meta| FileId::of(&meta));
        open.is_some() && open == FileId::at(&self.path)
    }
}

impl Writer {
    /// Goes on where an earlier run ended.
    pub(super) fn new(
        directory: &Path,
        log_id: String,
        lock: File,
        found: &Found,
        shared: Arc<Shared>,
    ) -> Self {
        let newest = found.newest.map(|number| Newest {
            number,
            durable_bytes: found.good_bytes,
            id: FileId::at(&segment::segment_path(directory, number)),
        });
        Self {
            directory: directory.to_owned(),
            log_id,
            segment_bytes_max: u64::MAX,
            shared,
            _lock: lock,
            current: None,
            newest,
            sequence: found.last_sequence + 1,
            open: HashMap::new(),
        }
    }

    /// Runs until closed or until every handle is gone.
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
            self.shared.idle();
            if closing {
                let closed = Entry::new(EntryKind::System, "log.closed", Outcome::Ok);
                if let Err(error) = self.write(&[&closed]) {
                    tracing::error!(%error, "the audit log could not be closed in order");
                }
                return;
            }
        }
    }

    fn commit(&mut self, mut group: Vec<Waiting>) {
        // Whoever gave up waiting has refused their call: nothing is to be recorded as done for them.
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
        metrics::histogram!("keybroker_audit_group_entries")
            .record(f64::from(u32::try_from(group.len()).unwrap_or(u32::MAX)));
        for (position, (_, done)) in (first..).zip(group) {
            // A receiver that is gone since then has refused its call; the entry says more than happened, never less.
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
            self.current = None;
            self.shared.set_down(Some(error.clone()));
        }
        result
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
            let path = current.path.display();
            Error::new(format!(
                "cannot write {path}: {error}; free the disk or mend it"
            ))
        };
        self.shared.busy();
        current.file.write_all(&bytes).map_err(failed)?;
        current.file.sync_data().map_err(failed)?;
        if !current.still_there() {
            return Err(Error::new(format!(
                "{} was unlinked or replaced while in use; keep what is there for the auditors",
                current.path.display()
            )));
        }
        newest.durable_bytes += count(bytes.len());
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
        if self.current.is_some() {
            return Ok(());
        }
        let result = self.begin_segment();
        match &result {
            Ok(()) => self.shared.set_down(None),
            Err(error) => {
                self.current = None;
                self.shared.set_down(Some(error.clone()));
            }
        }
        result
    }

    fn begin_segment(&mut self) -> Result<(), Error> {
        self.shared.busy();
        let number = self.clear_newest()?;
        let path = segment::segment_path(&self.directory, number);
        let file = segment::create(&path)?;
        // Known before anything else can fail: the next attempt begins with this file, and makes none beside it.
        self.newest = Some(Newest {
            number,
            durable_bytes: 0,
            id: file.metadata().ok().map(|meta| FileId::of(&meta)),
        });
        segment::sync_directory(&self.directory)?;
        self.current = Some(Current { file, path });
        let mut opened = Entry::new(EntryKind::System, "segment.opened", Outcome::Ok);
        opened.count = Some(count(self.open.len()));
        self.try_write(&[&opened])
    }

    /// Leaves of the newest segment what was durable, so that no torn line stays in the middle of the log, and says which
    /// number is next. A segment of which nothing is durable is made anew: on a full disk each attempt would leave an
    /// empty one. A file that is not the one that was written here is left to the auditors: missing sequence numbers show.
    fn clear_newest(&self) -> Result<u64, Error> {
        let Some(newest) = &self.newest else {
            return Ok(1);
        };
        let path = segment::segment_path(&self.directory, newest.number);
        let found = FileId::at(&path);
        let ours = found.is_some() && found == newest.id;
        if newest.durable_bytes > 0 {
            if ours {
                segment::cut_back(&path, newest.durable_bytes)?;
            }
            return Ok(newest.number + 1);
        }
        if ours {
            fs::remove_file(&path).map_err(|error| {
                Error::new(format!(
                    "cannot remove the empty {}: {error}",
                    path.display()
                ))
            })?;
        }
        let taken = found.is_some() && !ours;
        Ok(newest.number + u64::from(taken))
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

    /// Once in a while without being asked: finds out that the log is gone, or that it is back.
    fn probe(&mut self) {
        self.shared.busy();
        if let Some(current) = &self.current
            && !current.still_there()
        {
            let path = current.path.display();
            let error = Error::new(format!("{path} was unlinked or replaced while in use"));
            tracing::error!(alarm = "audit-log", %error, "the audit log was tampered with");
            self.current = None;
            self.shared.set_down(Some(error));
        }
        if self.current.is_none() && self.ensure_open().is_ok() {
            tracing::info!("the audit log is writable again");
        }
    }
}

fn count(number: usize) -> u64 {
    u64::try_from(number).expect("a count fits in 64 bits")
}
