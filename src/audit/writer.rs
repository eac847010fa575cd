//! The one thread that writes a log. It takes what is queued, writes it in one go, syncs once, and only then answers: the
//! sync under way is the natural group, so there is no delay to tune.
//!
//! After any failure nothing is assumed of the file. A failed sync may have dropped dirty pages for good (Linux reports the
//! loss once and then calls the file clean), so the segment is cut back to what was durable and a new one is begun.
//!
//! Mitigation: M14 of `THREAT_MODEL.md`.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::Write as _,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use tokio::sync::oneshot;

use crate::call::{CallId, Timestamp};

use super::{
    Entry, EntryKind, Error, OpenIntent, Outcome,
    line::{self, Place},
    segment,
};

/// Entries in one group at most.
const GROUP_MAX: usize = 1_024;
/// While the log is down, how often it is tried without being asked.
const PROBE_INTERVAL: Duration = Duration::from_millis(500);

/// An entry, and whoever waits for it to be durable.
pub(super) type Waiting = (Box<Entry>, oneshot::Sender<Result<u64, Error>>);

pub(super) enum Command {
    Append(Waiting),
    Close,
}

/// Why the log is not writable, as last seen; shared with the handles.
pub(super) type Down = Arc<Mutex<Option<Error>>>;

pub(super) struct Writer {
    pub(super) directory: PathBuf,
    pub(super) log_id: String,
    pub(super) segment_bytes_max: u64,
    pub(super) down: Down,
    /// Held for its lock.
    pub(super) _lock: File,
    /// Absent after a failure.
    pub(super) current: Option<Current>,
    /// Number of the newest segment, whether open or not.
    pub(super) newest: u64,
    /// Durable bytes of the newest segment.
    pub(super) durable_bytes: u64,
    /// Sequence of the next entry.
    pub(super) sequence: u64,
    /// Intents without an outcome.
    pub(super) open: HashMap<CallId, OpenIntent>,
}

pub(super) struct Current {
    pub(super) file: File,
    pub(super) path: PathBuf,
}

impl Writer {
    /// Runs until closed or until every handle is gone.
    pub(super) fn run(mut self, commands: &Receiver<Command>) {
        loop {
            let first = match commands.recv_timeout(PROBE_INTERVAL) {
                Ok(command) => command,
                Err(RecvTimeoutError::Timeout) => {
                    self.probe();
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let mut group = Vec::new();
            let mut closing = false;
            for command in std::iter::once(first).chain(commands.try_iter().take(GROUP_MAX - 1)) {
                match command {
                    Command::Append(waiting) => group.push(waiting),
                    Command::Close => closing = true,
                }
            }
            self.commit(group);
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

    /// Writes and syncs, or leaves the log without a current segment.
    pub(super) fn write(&mut self, entries: &[&Entry]) -> Result<(), Error> {
        let result = self.try_write(entries);
        if let Err(error) = &result {
            self.current = None;
            self.set_down(Some(error.clone()));
        }
        result
    }

    fn try_write(&mut self, entries: &[&Entry]) -> Result<(), Error> {
        let Some(current) = &mut self.current else {
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
        current.file.write_all(&bytes).map_err(failed)?;
        current.file.sync_data().map_err(failed)?;
        if !segment::still_there(&current.file, &current.path) {
            return Err(Error::new(format!(
                "{} was unlinked or replaced while in use; keep what is there for the auditors",
                current.path.display()
            )));
        }
        self.durable_bytes += count(bytes.len());
        self.sequence += count(entries.len());
        Ok(())
    }

    fn track(&mut self, entry: &Entry) {
        let Some(call) = entry.call_id else { return };
        match entry.kind {
            EntryKind::Intent => {
                let intent = OpenIntent {
                    call,
                    action: entry.action.to_owned(),
                    at: Timestamp::now(),
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
            Ok(()) => self.set_down(None),
            Err(error) => {
                self.current = None;
                self.set_down(Some(error.clone()));
            }
        }
        result
    }

    fn begin_segment(&mut self) -> Result<(), Error> {
        self.cut_back()?;
        let number = self.newest + 1;
        let file = segment::create_segment(&self.directory, number)?;
        self.newest = number;
        self.durable_bytes = 0;
        self.current = Some(Current {
            file,
            path: segment::segment_path(&self.directory, number),
        });
        let mut opened = Entry::new(EntryKind::System, "segment.opened", Outcome::Ok);
        opened.count = Some(count(self.open.len()));
        self.try_write(&[&opened])
    }

    /// Cuts the newest segment back to what was durable, so that no torn line stays in the middle of the log. A segment
    /// that is gone is left to the auditors: its missing sequence numbers show.
    fn cut_back(&self) -> Result<(), Error> {
        let path = segment::segment_path(&self.directory, self.newest);
        let file = match OpenOptions::new().write(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => {
                return Err(Error::new(format!(
                    "cannot open {}: {error}",
                    path.display()
                )));
            }
        };
        let cut = || -> std::io::Result<()> {
            if file.metadata()?.len() > self.durable_bytes {
                file.set_len(self.durable_bytes)?;
                file.sync_all()?;
            }
            Ok(())
        };
        cut().map_err(|error| Error::new(format!("cannot cut back {}: {error}", path.display())))
    }

    /// A full segment is closed when no intent is open, so that recovery never reads further back than the first segment
    /// that began without one; at twice its size it is closed whatever is open.
    fn rotate_if_full(&mut self) {
        let full = self.durable_bytes >= self.segment_bytes_max;
        let overfull = self.durable_bytes >= self.segment_bytes_max.saturating_mul(2);
        if overfull || (full && self.open.is_empty()) {
            self.current = None;
            if let Err(error) = self.ensure_open() {
                tracing::error!(%error, "no new audit segment");
            }
        }
    }

    /// Once in a while without being asked: finds out that the log is gone, or that it is back.
    fn probe(&mut self) {
        if let Some(current) = &self.current
            && !segment::still_there(&current.file, &current.path)
        {
            let path = current.path.display();
            let error = Error::new(format!("{path} was unlinked or replaced while in use"));
            tracing::error!(alarm = "audit-log", %error, "the audit log was tampered with");
            self.current = None;
            self.set_down(Some(error));
        }
        if self.current.is_none() && self.ensure_open().is_ok() {
            tracing::info!("the audit log is writable again");
        }
    }

    fn set_down(&self, cause: Option<Error>) {
        metrics::gauge!("keybroker_audit_writable").set(if cause.is_some() { 0.0 } else { 1.0 });
        let mut down = self.down.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = &cause
            && down.is_none()
        {
            tracing::error!(alarm = "audit-log", %error, "nothing is released or changed until the audit log is writable");
        }
        *down = cause;
    }
}

fn count(number: usize) -> u64 {
    u64::try_from(number).expect("a count fits in 64 bits")
}
