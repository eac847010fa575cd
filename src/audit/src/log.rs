//! The handle of an audit log, and the steps of opening a log.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use crossbeam_channel::{Receiver, RecvTimeoutError, TrySendError};
use tokio::sync::oneshot;

use super::{
    APPEND_TIMEOUT, CLOSE_TIMEOUT, Change, Entry, EntryKind, Error, OpenIntent, Outcome, Recorded,
    commands::{Command, Commands, Waiting},
    extent,
    integrity::Files,
    memory::{Acknowledgement, Mark, Memory},
    recovery::Found,
    segment,
    state::{Shared, slow},
    tail::{self, last_lines},
    writer::{self, Writer},
};

/// Largest number of entries that wait for the writer. Entries beyond this number are refused immediately.
const QUEUE_MAX: usize = 8_192;

/// The audit log of one instance. Clones share the same log. The writer ends when the last clone is dropped, or after
/// [`AuditLog::close`].
#[derive(Clone)]
pub struct AuditLog(Arc<Inner>);

struct Inner {
    directory: PathBuf,
    /// The id at the time when the log was opened.
    log_id: String,
    /// The facts about this log in the state directory; `None` for the log of a command.
    memory: Option<Memory>,
    is_binding_required: bool,
    commands: Commands,
    shared: Arc<Shared>,
    /// A channel that is disconnected when the writer's thread has ended.
    ended: Receiver<()>,
    /// The newest changes in the log when it was opened.
    changes: Vec<Change>,
}

impl fmt::Debug for AuditLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AuditLog")
            .field("directory", &self.0.directory)
            .finish_non_exhaustive()
    }
}

impl AuditLog {
    /// Opens the log in a directory, and creates the directory if its parent exists. Returns the intents without an
    /// outcome. If a crash has left a torn tail, the tail is moved to a separate file, and an audit entry records the
    /// move.
    pub fn open(
        directory: &Path,
        segment_bytes_max: u64,
    ) -> Result<(Self, Vec<OpenIntent>), Error> {
        Self::open_with(directory, segment_bytes_max, None)
    }

    pub(super) fn open_remembered(
        directory: &Path,
        segment_bytes_max: u64,
        memory: &Memory,
    ) -> Result<(Self, Vec<OpenIntent>), Error> {
        Self::open_with(directory, segment_bytes_max, Some(memory))
    }

    fn open_with(
        directory: &Path,
        segment_bytes_max: u64,
        memory: Option<&Memory>,
    ) -> Result<(Self, Vec<OpenIntent>), Error> {
        let acknowledgement = match memory {
            Some(memory) => acknowledgement(memory, directory)?,
            None => None,
        };
        segment::prepare_directory(directory)?;
        let lock = segment::lock(directory)?;
        // Before the log is created, the state directory records that the database must list the
        // log. Therefore, after an interrupted start, a new log is not mistaken for the log of an
        // earlier release.
        if let Some(memory) = memory
            && acknowledgement.is_none()
            && !directory.join(segment::LOG_ID).exists()
        {
            memory.require_binding()?;
        }
        let log_id = segment::log_id(directory)?;
        let mut found = Found::read(directory)?;
        if let Some(memory) = memory {
            compare_with_mark(
                memory,
                &log_id,
                &mut found,
                &Files::read(directory)?,
                acknowledgement.is_some(),
            )?;
        }
        found.set_aside(directory)?;
        let shared = Arc::<Shared>::default();
        let open: Vec<OpenIntent> = found.open.values().cloned().collect();
        let changes = found.changes.iter().cloned().collect();
        let mut writer = Writer::new(
            directory,
            log_id.clone(),
            lock,
            &found,
            Arc::clone(&shared),
            memory.cloned(),
        )?;
        writer.segment_bytes_max = segment_bytes_max;
        writer.open = found.open;
        writer.ensure_open()?;
        let mut opened = Entry::new(EntryKind::System, "log.opened", Outcome::Ok);
        opened.count = u64::try_from(open.len()).ok();
        writer.write(&[&opened])?;
        if found.torn_bytes > 0 {
            let mut torn = Entry::new(EntryKind::System, "log.torn_tail_set_aside", Outcome::Ok);
            torn.bytes = Some(found.torn_bytes);
            writer.write(&[&torn])?;
        }
        if let (Some(acknowledgement), Some(memory)) = (acknowledgement, memory) {
            writer.write(&[&writer::acknowledged(&acknowledgement.principal)])?;
            memory.forget_tampering()?;
        }
        writer.try_removal();
        let is_binding_required = match memory {
            Some(memory) => memory.is_binding_required()?,
            None => false,
        };
        let (commands, ended) = Self::start(writer)?;
        let log = Self(Arc::new(Inner {
            directory: directory.to_owned(),
            log_id,
            memory: memory.cloned(),
            is_binding_required,
            commands,
            shared,
            ended,
            changes,
        }));
        Ok((log, open))
    }

    /// Starts the writer's thread. The returned receiver is disconnected when the thread has ended.
    fn start(writer: Writer) -> Result<(Commands, Receiver<()>), Error> {
        let (queue, receiver) = crossbeam_channel::bounded(QUEUE_MAX);
        let (ending, ended) = crossbeam_channel::bounded(0);
        let thread = std::thread::Builder::new()
            .name("audit".to_owned())
            .spawn(move || {
                let _until_the_end = ending;
                writer.run(&receiver);
            })
            .map_err(|error| Error::new(format!("cannot start the audit thread: {error}")))?;
        Ok((Commands::new(queue, thread.thread().clone()), ended))
    }

    /// The id of the log when it was opened, 32 hexadecimal digits.
    pub fn id(&self) -> &str {
        &self.0.log_id
    }

    /// Whether a database that was used with other logs of this instance must also list this log.
    /// Two kinds of logs need not be listed: a log of an earlier release until
    /// [`AuditLog::require_binding`] is called, and a log with acknowledged tampering.
    pub fn is_binding_required(&self) -> bool {
        self.0.is_binding_required
    }

    /// Records that the database lists this log. At the next start of the broker,
    /// [`AuditLog::is_binding_required`] is true.
    pub fn require_binding(&self) -> Result<(), Error> {
        match &self.0.memory {
            Some(memory) => memory.require_binding(),
            None => Ok(()),
        }
    }

    /// Latches the log until an operator acknowledges the finding, because the log has replaced a
    /// log that the database lists. Returns the error for the caller.
    pub fn refuse_unknown(&self) -> Error {
        let finding = unknown_to_database(&self.0.directory);
        match &self.0.memory {
            Some(memory) => found_at_start(memory, finding),
            None => Error::tampered(finding),
        }
    }

    /// The newest changes in the log when it was opened, at most 16, oldest first.
    pub fn changes_before(&self) -> &[Change] {
        &self.0.changes
    }

    /// Returns the newest entry of an action among the last `bytes_max` bytes of the log. Reads files, so the function must not be
    /// called on an async thread.
    pub fn newest(&self, action: &str, bytes_max: u64) -> Result<Option<Recorded>, Error> {
        tail::newest(&self.0.directory, action, bytes_max)
    }

    /// Makes an entry durable and returns its sequence number. If the entry does not become durable, returns an error
    /// within [`APPEND_TIMEOUT`], or immediately while the disk hangs. After an error, the entry may still appear in
    /// the log. Therefore the log can contain actions that did not happen, but every action that happened is in the
    /// log. A `recovered` entry for an intent that is not open is unnecessary and is not written.
    pub async fn append(&self, entry: Entry) -> Result<u64, Error> {
        Self::written(self.send(entry, Command::Append)?).await
    }

    /// Does the same as [`AuditLog::append`], but the entry may wait a few milliseconds for other
    /// entries, so that one sync makes all entries durable. Use this function if the callers have
    /// to wait for another operation in any case.
    pub async fn append_unhurried(&self, entry: Entry) -> Result<u64, Error> {
        Self::written(self.send(entry, Command::AppendUnhurried)?).await
    }

    async fn written(done: oneshot::Receiver<Result<u64, Error>>) -> Result<u64, Error> {
        match tokio::time::timeout(APPEND_TIMEOUT, done).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(stopped()),
            Err(_) => Err(slow()),
        }
    }

    /// Makes an entry durable as [`AuditLog::append`] does, for code that is not async.
    pub fn append_blocking(&self, entry: Entry) -> Result<u64, Error> {
        let done = self.send(entry, Command::Append)?;
        done.blocking_recv().map_err(|_| stopped())?
    }

    fn send(
        &self,
        entry: Entry,
        command: fn(Waiting) -> Command,
    ) -> Result<oneshot::Receiver<Result<u64, Error>>, Error> {
        self.0.shared.moving()?;
        let (done, receiver) = oneshot::channel();
        let entry = Box::new(entry);
        match self.0.commands.try_send(command((entry, done))) {
            Ok(()) => Ok(receiver),
            Err(TrySendError::Full(_)) => Err(full()),
            Err(TrySendError::Disconnected(_)) => Err(stopped()),
        }
    }

    /// Whether the log was writable at the last check and its disk does not hang. Reads only memory.
    pub fn writable(&self) -> Result<(), Error> {
        self.0.shared.writable()
    }

    /// Returns the last durable lines, oldest first, without their LF.
    pub fn tail(&self, limit: usize) -> Result<Vec<String>, Error> {
        last_lines(&self.0.directory, limit, Some(self.0.shared.durable()))
    }

    /// Writes the queued entries and a closing entry, and waits at most [`CLOSE_TIMEOUT`] until the
    /// entries are durable. If the closing is interrupted, the next start opens the log as after a
    /// crash.
    pub fn close(self) {
        let until = Instant::now() + CLOSE_TIMEOUT;
        let asked = self.0.commands.send_deadline(Command::Close, until).is_ok();
        let ended = self.0.ended.recv_deadline(until);
        if !asked || ended != Err(RecvTimeoutError::Disconnected) {
            keybroker_core::alert!(
                AuditLog,
                "the audit log was not closed cleanly because its disk does not respond"
            );
        }
    }
}

/// The log of an instance that this process has examined but not opened.
#[derive(Debug)]
pub struct ClosedLog {
    directory: PathBuf,
    memory: Memory,
    id: Option<String>,
    is_binding_required: bool,
}

impl ClosedLog {
    pub(super) fn examine(directory: PathBuf, memory: Memory) -> Result<Self, Error> {
        // If an operator has acknowledged tampering, this function and the broker accept a log that
        // the database does not list.
        let is_acknowledged = acknowledgement(&memory, &directory)?.is_some();
        let id = segment::existing_log_id(&directory)?;
        let is_binding_required =
            !is_acknowledged && (id.is_none() || memory.is_binding_required()?);
        Ok(Self {
            directory,
            memory,
            id,
            is_binding_required,
        })
    }

    /// The id of the log, or `None` before the first start of the broker instance.
    pub fn id(&self) -> Option<&str> {
        self.id.as_deref()
    }

    /// The value of [`AuditLog::is_binding_required`] for this log.
    pub fn is_binding_required(&self) -> bool {
        self.is_binding_required
    }

    /// Latches the log as [`AuditLog::refuse_unknown`] does.
    pub fn refuse_unknown(&self) -> Error {
        found_at_start(&self.memory, unknown_to_database(&self.directory))
    }
}

fn unknown_to_database(directory: &Path) -> String {
    format!(
        "the log in {} is new, but the database was used with other logs of this instance. If this host or replica is \
         new, give it a unique instance name with `audit.instance`, or with KEYBROKER_AUDIT_INSTANCE in the environment, \
         and start again. Otherwise, the log was replaced, lost or moved while the broker was stopped",
        directory.display()
    )
}

/// Returns the operator's acknowledgement of earlier tampering. Returns an error if tampering was found and not
/// acknowledged, or if the log contained entries and its directory is missing.
fn acknowledgement(memory: &Memory, directory: &Path) -> Result<Option<Acknowledgement>, Error> {
    let acknowledgement = memory.acknowledgement()?;
    if acknowledgement.is_some() {
        return Ok(acknowledgement);
    }
    if let Some(tampering) = memory.tampering()? {
        return Err(Error::tampered(tampering.finding).latched());
    }
    if mark(memory)?.is_some() && !directory.join(segment::LOG_ID).exists() {
        let finding = format!("the log in {} was removed or renamed", directory.display());
        return Err(found_at_start(memory, finding));
    }
    Ok(None)
}

/// Reads the mark. A damaged mark is reported as tampering, so that an operator can acknowledge it.
fn mark(memory: &Memory) -> Result<Option<Mark>, Error> {
    match memory.mark() {
        Err(error) if error.is_tampering() => {
            Err(found_at_start(memory, error.finding().to_owned()))
        }
        read => read,
    }
}

/// Compares the directory with the mark, which contains the last entry that is known to be durable
/// and the segments that existed. After an operator acknowledged tampering, entries may be missing.
/// The sequence then continues after the missing entries, so that the gap stays visible.
fn compare_with_mark(
    memory: &Memory,
    log_id: &str,
    found: &mut Found,
    files: &Files,
    is_acknowledged: bool,
) -> Result<(), Error> {
    if is_acknowledged {
        // The mark is not used if it is damaged, because the damaged mark may be the tampering that was acknowledged.
        if let Ok(Some(mark)) = memory.mark()
            && mark.log_id == log_id
        {
            found.last_sequence = found.last_sequence.max(mark.sequence);
        }
        return Ok(());
    }
    let Some(mark) = mark(memory)? else {
        return Ok(());
    };
    if mark.log_id != log_id {
        let finding = format!(
            "the log has the id {log_id}, but entries were written to the log {}",
            mark.log_id
        );
        return Err(found_at_start(memory, finding));
    }
    if found.last_sequence < mark.sequence {
        let finding = format!(
            "the log ends with entry {}, but entry {} was already durable",
            found.last_sequence, mark.sequence
        );
        return Err(found_at_start(memory, finding));
    }
    let lengths = files.lengths().collect();
    let missing = mark
        .segments
        .iter()
        .find_map(|extent| extent::missing(extent, &lengths));
    match missing {
        Some(finding) => Err(found_at_start(memory, finding)),
        None => Ok(()),
    }
}

fn found_at_start(memory: &Memory, finding: String) -> Error {
    let error = Error::tampered(finding);
    // If the finding cannot be stored, the next start detects the tampering again.
    if let Err(unwritten) = memory.set_tampering(error.finding()) {
        tracing::warn!(error = %unwritten, "cannot store the finding that the audit log was tampered with");
    }
    error.latched()
}

fn stopped() -> Error {
    Error::new("the log is closed".to_owned())
}

fn full() -> Error {
    Error::new(format!(
        "{QUEUE_MAX} audit entries are already waiting to be written; check the disk"
    ))
}
