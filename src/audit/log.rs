//! The handle of a log, and how one is opened.

use std::{
    collections::HashMap,
    fmt, fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
};

use crossbeam_channel::{Sender, TrySendError};
use tokio::sync::oneshot;

use crate::call::{CallId, Timestamp};

use super::{
    APPEND_TIMEOUT, Entry, EntryKind, Error, OpenIntent, Outcome,
    line::Parsed,
    segment,
    writer::{Command, Down, Writer},
};

/// Entries that may wait for the writer; more are refused at once.
const QUEUE_MAX: usize = 8_192;

/// The audit log of one instance. Clones share it; the last one to go, or [`AuditLog::close`], ends it.
#[derive(Clone)]
pub struct AuditLog(Arc<Inner>);

struct Inner {
    directory: PathBuf,
    commands: Sender<Command>,
    down: Down,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl fmt::Debug for AuditLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AuditLog")
            .field("directory", &self.0.directory)
            .finish_non_exhaustive()
    }
}

impl AuditLog {
    /// Opens the log in a directory, makes it if its parent exists, and returns the intents that have no outcome. A torn
    /// tail is set aside, and that is recorded.
    pub fn open(
        directory: &Path,
        segment_bytes_max: u64,
    ) -> Result<(Self, Vec<OpenIntent>), Error> {
        segment::prepare_directory(directory)?;
        let lock = segment::lock(directory)?;
        let log_id = segment::log_id(directory)?;
        let found = Found::read(directory)?;
        let down: Down = Arc::default();
        let open: Vec<OpenIntent> = found.open.values().cloned().collect();
        let mut writer = Writer {
            directory: directory.to_owned(),
            log_id,
            segment_bytes_max,
            down: Arc::clone(&down),
            _lock: lock,
            current: None,
            newest: found.newest,
            durable_bytes: found.good_bytes,
            sequence: found.next_sequence,
            open: found.open,
        };
        writer.ensure_open()?;
        let mut opened = Entry::new(EntryKind::System, "log.opened", Outcome::Ok);
        opened.count = u64::try_from(open.len()).ok();
        writer.write(&[&opened])?;
        if found.torn {
            let torn = "log.torn_tail_set_aside";
            writer.write(&[&Entry::new(EntryKind::System, torn, Outcome::Ok)])?;
        }
        let (commands, receiver) = crossbeam_channel::bounded(QUEUE_MAX);
        let thread = std::thread::Builder::new()
            .name("audit".to_owned())
            .spawn(move || writer.run(&receiver))
            .map_err(|error| Error::new(format!("cannot start the audit thread: {error}")))?;
        let log = Self(Arc::new(Inner {
            directory: directory.to_owned(),
            commands,
            down,
            thread: Mutex::new(Some(thread)),
        }));
        Ok((log, open))
    }

    /// Makes an entry durable and returns its sequence number. An error within [`APPEND_TIMEOUT`] otherwise; such an entry
    /// may still appear in the log, so that the log may say more than happened, never less.
    pub async fn append(&self, entry: Entry) -> Result<u64, Error> {
        let done = self.send(entry)?;
        match tokio::time::timeout(APPEND_TIMEOUT, done).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(stopped()),
            Err(_) => Err(stalled()),
        }
    }

    /// [`AuditLog::append`] for code that is not async.
    pub fn append_blocking(&self, entry: Entry) -> Result<u64, Error> {
        self.send(entry)?.blocking_recv().map_err(|_| stopped())?
    }

    fn send(&self, entry: Entry) -> Result<oneshot::Receiver<Result<u64, Error>>, Error> {
        let (done, receiver) = oneshot::channel();
        let entry = Box::new(entry);
        match self.0.commands.try_send(Command::Append((entry, done))) {
            Ok(()) => Ok(receiver),
            Err(TrySendError::Full(_)) => Err(stalled()),
            Err(TrySendError::Disconnected(_)) => Err(stopped()),
        }
    }

    /// Whether the log was writable when last seen; asks nobody.
    pub fn writable(&self) -> Result<(), Error> {
        let down = self.0.down.lock().unwrap_or_else(PoisonError::into_inner);
        down.clone().map_or(Ok(()), Err)
    }

    /// The last lines, oldest first, without their LF.
    pub fn tail(&self, limit: usize) -> Result<Vec<String>, Error> {
        tail(&self.0.directory, limit)
    }

    /// Writes what is queued and a closing entry, and waits for the thread.
    pub fn close(self) {
        if self.0.commands.send(Command::Close).is_err() {
            return;
        }
        let thread = self
            .0
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("the audit thread panicked");
        }
    }
}

fn stopped() -> Error {
    Error::new("the log is closed".to_owned())
}

fn stalled() -> Error {
    Error::new(format!(
        "no entry became durable within {} ms; look at the disk",
        APPEND_TIMEOUT.as_millis()
    ))
}

/// The last lines of the log in a directory, oldest first, without their LF.
pub fn tail(directory: &Path, limit: usize) -> Result<Vec<String>, Error> {
    let mut lines: Vec<String> = Vec::new();
    for number in segment::segments(directory)?.into_iter().rev() {
        let path = segment::segment_path(directory, number);
        let text = fs::read_to_string(&path)
            .map_err(|error| Error::new(format!("cannot read {}: {error}", path.display())))?;
        let mut earlier: Vec<String> = text.lines().map(str::to_owned).collect();
        earlier.append(&mut lines);
        lines = earlier;
        if lines.len() >= limit {
            break;
        }
    }
    let surplus = lines.len().saturating_sub(limit);
    lines.drain(..surplus);
    Ok(lines)
}

/// What an earlier run left.
struct Found {
    newest: u64,
    good_bytes: u64,
    next_sequence: u64,
    open: HashMap<CallId, OpenIntent>,
    torn: bool,
}

impl Found {
    /// Reads back from the newest segment to the first one that began with no intent open: an intent without an outcome
    /// cannot be older.
    fn read(directory: &Path) -> Result<Self, Error> {
        let numbers = segment::segments(directory)?;
        let mut found = Self {
            newest: numbers.last().copied().unwrap_or(0),
            good_bytes: 0,
            next_sequence: 1,
            open: HashMap::new(),
            torn: false,
        };
        let mut segments = Vec::new();
        for number in numbers.iter().rev() {
            let path = segment::segment_path(directory, *number);
            let read = segment::read(&path)?;
            if *number == found.newest {
                found.good_bytes = read.good_bytes;
                found.torn = set_aside(directory, *number, &read)?;
            } else if !read.tail.is_empty() {
                return Err(Error::new(format!(
                    "{} is damaged at byte {}; keep the log for the auditors and start another \
                     one with another `audit.instance`",
                    path.display(),
                    read.good_bytes
                )));
            }
            let reaches_back = read.lines.is_empty() || began_with_open_intents(&read.lines);
            segments.push(read.lines);
            if !reaches_back {
                break;
            }
        }
        for lines in segments.iter().rev() {
            for line in lines {
                found.next_sequence = line.sequence + 1;
                found.track(line);
            }
        }
        Ok(found)
    }

    fn track(&mut self, line: &Parsed) {
        let Some(call) = line.call_id.as_deref().and_then(CallId::parse) else {
            return;
        };
        match line.kind.as_str() {
            "intent" => {
                let intent = OpenIntent {
                    call,
                    action: line.action.clone(),
                    at: Timestamp::from_micros(line.time_us),
                };
                self.open.insert(call, intent);
            }
            "outcome" | "recovered" => {
                self.open.remove(&call);
            }
            _ => {}
        }
    }
}

fn began_with_open_intents(lines: &[Parsed]) -> bool {
    !matches!(lines.first(), Some(first) if first.action == "segment.opened" && first.count == Some(0))
}

/// Moves what follows the last good line into a file of its own; the writer then cuts the segment back.
fn set_aside(directory: &Path, number: u64, read: &segment::Read) -> Result<bool, Error> {
    if read.tail.is_empty() {
        return Ok(false);
    }
    let path = directory.join(format!(
        "torn-{number:08}-{}.bin",
        Timestamp::now().micros()
    ));
    tracing::warn!(file = %path.display(), bytes = read.tail.len(), "a torn tail of the audit log was set aside");
    segment::write_new(&path, &read.tail)?;
    segment::sync_directory(directory)?;
    Ok(true)
}
