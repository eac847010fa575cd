//! The front's end of one worker: the worker's process, its socket and its current jobs.

use std::{
    collections::HashMap,
    fmt, io,
    path::Path,
    process::ExitStatus,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    net::UnixStream,
    process::{Child, Command},
    sync::Notify,
};
use tokio_util::sync::CancellationToken;

use keybroker_worker_protocol::{
    Settings,
    frame::{self, Inbox, Outbox},
    wire::{Reply, Request, reply::Outcome},
};

use crate::{found::Found, job::Job, process};

/// If a job is unanswered for this time after its deadline, its worker counts as hanging.
const WEDGED_AFTER: Duration = Duration::from_secs(2);
/// Number of session objects after which a worker is replaced. SoftHSM 2.6 and 2.7 never free about 250 bytes of each session
/// object, so a worker's memory grows by at most about 50 MB.
const OBJECTS_MAX: u64 = 200_000;
/// Interval at which a retired worker is checked for unfinished jobs.
const RETIREMENT_PAUSE: Duration = Duration::from_millis(5);

/// The front's data about one worker, and its connection to the worker.
pub(super) struct Link {
    generation: u64,
    pid: u32,
    sessions: usize,
    stream: UnixStream,
    /// The keys that the worker found.
    found: Arc<Found>,
    /// Whether the worker must be replaced, because the expected keys have changed since it started.
    is_outdated: AtomicBool,
    /// Number of jobs in `held`, except self-tests. The number can be read without the lock.
    busy: AtomicUsize,
    state: Mutex<State>,
    next_id: AtomicU64,
    /// Number of session objects that the worker may have made for its jobs.
    objects: AtomicU64,
    flush: Notify,
    /// Cancelled when the worker must end now; `State` contains the cause.
    ended: CancellationToken,
    /// Cancelled when another worker has replaced this worker. The replaced worker ends after its jobs.
    retired: CancellationToken,
}

#[derive(Default)]
struct State {
    held: HashMap<u64, Job>,
    /// Bytes that have not fitted into the socket yet.
    unsent: Outbox,
    cause: Option<String>,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link")
            .field("generation", &self.generation)
            .field("pid", &self.pid)
            .finish_non_exhaustive()
    }
}

/// Starts a worker process. Returns the process with the front's end of its socket.
pub(super) fn spawn(program: &Path, settings: &Settings) -> io::Result<(Child, UnixStream)> {
    let (command, ours) = process::command(program, settings, "token-worker")?;
    ours.set_nonblocking(true)?;
    let child = Command::from(command)
        // When the handle is dropped, the process must not be killed: it may be inside `C_Login`, where SIGKILL can
        // damage a SoftHSM token.
        .spawn()?;
    Ok((child, UnixStream::from_std(ours)?))
}

impl Link {
    pub(super) fn new(
        generation: u64,
        pid: u32,
        sessions: usize,
        stream: UnixStream,
        found: Arc<Found>,
    ) -> Arc<Self> {
        Arc::new(Self {
            generation,
            pid,
            sessions,
            stream,
            found,
            is_outdated: AtomicBool::new(false),
            busy: AtomicUsize::new(0),
            state: Mutex::default(),
            next_id: AtomicU64::new(1),
            objects: AtomicU64::new(0),
            flush: Notify::new(),
            ended: CancellationToken::new(),
            retired: CancellationToken::new(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    pub(super) fn sessions(&self) -> usize {
        self.sessions
    }

    pub(super) fn found(&self) -> &Arc<Found> {
        &self.found
    }

    pub(super) fn is_outdated(&self) -> bool {
        self.is_outdated.load(Ordering::Relaxed)
    }

    /// Marks the worker for replacement.
    pub(super) fn outdate(&self) {
        self.is_outdated.store(true, Ordering::Relaxed);
    }

    /// Counts the session objects of a job. Returns true once, when the worker has made so many that it must be replaced. A
    /// worker without sealed wrapping keys makes no session objects.
    pub(super) fn note_objects(&self, job: &Job) -> bool {
        let has_sealed = self.found.keys.iter().any(|key| key.sealing.is_some());
        let count = if has_sealed {
            job.work.session_objects()
        } else {
            0
        };
        let before = self.objects.fetch_add(count, Ordering::Relaxed);
        before < OBJECTS_MAX && before.saturating_add(count) >= OBJECTS_MAX
    }

    /// Lets the worker end after its jobs. The worker must no longer be in the queue.
    pub(super) fn retire(&self) {
        self.retired.cancel();
    }

    /// Waits until the worker is retired and has finished its jobs.
    pub(super) async fn finished(&self) {
        self.retired.cancelled().await;
        while self.in_flight() > 0 {
            tokio::time::sleep(RETIREMENT_PAUSE).await;
        }
    }

    pub(super) fn in_flight(&self) -> usize {
        self.busy.load(Ordering::Relaxed)
    }

    pub(super) fn has_room(&self) -> bool {
        self.in_flight() < self.sessions && !self.ended.is_cancelled()
    }

    /// Sends a job to the worker directly, not through another task. The socket buffer is many times larger than the
    /// jobs that a worker may have.
    pub(super) fn assign(&self, mut job: Job) {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        if !job.work.is_self_test() {
            self.busy.fetch_add(1, Ordering::Relaxed);
        }
        let deadline_ns = frame::monotonic_ns().saturating_add(
            u64::try_from(job.caller.deadline().remaining().as_nanos()).unwrap_or(u64::MAX),
        );
        tracing::debug!(
            parent: &job.span, pid = self.pid, generation = self.generation, job = id,
            "a token job was sent to a worker"
        );
        let mut state = self.state();
        state.unsent.push(job.work.stamped(id, deadline_ns));
        state.held.insert(id, job);
        self.send(&mut state);
    }

    fn send(&self, state: &mut State) {
        while !state.unsent.is_empty() {
            match self.stream.try_write(state.unsent.rest()) {
                Ok(count) => state.unsent.sent(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.flush.notify_one();
                    return;
                }
                Err(error) => {
                    state
                        .cause
                        .get_or_insert(format!("the socket of the worker failed: {error}"));
                    self.ended.cancel();
                    return;
                }
            }
        }
    }

    /// Sends bytes that did not fit into the socket. Runs until the worker ends.
    pub(super) async fn keep_flushing(&self) {
        loop {
            self.flush.notified().await;
            while !self.state().unsent.is_empty() {
                if self.stream.writable().await.is_err() {
                    return;
                }
                self.send(&mut self.state());
            }
        }
    }

    /// Reads replies and passes each reply to `take` with its job. If the socket is closed or a reply is invalid,
    /// returns the reason.
    pub(super) async fn read_replies(&self, mut take: impl FnMut(Job, Reply)) -> String {
        let mut inbox = Inbox::default();
        loop {
            if let Err(error) = self.stream.readable().await {
                return format!("the socket of the worker failed: {error}");
            }
            match self.stream.try_read(inbox.room()) {
                Ok(0) => return "the worker process ended".to_owned(),
                Ok(count) => inbox.received(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return format!("the socket of the worker failed: {error}"),
            }
            loop {
                match inbox.take::<Reply>() {
                    Ok(Some(reply)) => {
                        let Some(job) = self.take_job(reply.id) else {
                            return format!(
                                "the worker answered job {}, but the front did not send this job to the worker",
                                reply.id
                            );
                        };
                        take(job, reply);
                    }
                    Ok(None) => break,
                    Err(error) => return format!("the worker sent an invalid message: {error}"),
                }
            }
        }
    }

    fn take_job(&self, id: u64) -> Option<Job> {
        let job = self.state().held.remove(&id)?;
        if !job.work.is_self_test() {
            self.busy.fetch_sub(1, Ordering::Relaxed);
        }
        Some(job)
    }

    /// Marks the worker as lost, so that its worker monitor ends it.
    pub(super) fn give_up(&self, cause: impl Into<String>) {
        self.state().cause.get_or_insert(cause.into());
        self.ended.cancel();
    }

    /// Waits until the worker must end. Returns the cause.
    pub(super) async fn given_up(&self) -> String {
        self.ended.cancelled().await;
        self.state().cause.clone().unwrap_or_default()
    }

    /// Whether the worker has a job that is long past its deadline. The caller of this job already has an answer, but
    /// the session thread that runs the job hangs.
    pub(super) fn is_wedged(&self) -> bool {
        let now = Instant::now();
        self.state()
            .held
            .values()
            .any(|job| job.caller.deadline().instant() + WEDGED_AFTER < now)
    }

    /// Removes and returns all jobs of the worker.
    pub(super) fn take_jobs(&self) -> Vec<Job> {
        self.busy.store(0, Ordering::Relaxed);
        self.state().held.drain().map(|(_, job)| job).collect()
    }

    /// Closes the sending half of the socket. A worker whose socket is closed finishes its jobs and ends.
    pub(super) fn close(&self) {
        close(&self.stream);
    }
}

/// Closes the sending half of a worker's socket.
pub(super) fn close(stream: &UnixStream) {
    if let Err(error) = rustix::net::shutdown(stream, rustix::net::Shutdown::Write) {
        tracing::debug!(%error, "the worker's socket was already closed");
    }
}

/// Waits for a worker to end, or kills it after the timeout, and reaps it. Returns the exit status of a worker that was
/// not killed.
pub(super) async fn reap(mut child: Child, timeout: Duration) -> Option<ExitStatus> {
    if let Ok(ended) = tokio::time::timeout(timeout, child.wait()).await {
        return ended.ok();
    }
    if let Err(error) = child.kill().await {
        tracing::error!(%error, "cannot kill a token worker");
    }
    None
}

/// Sends the setup and reads the reply, before the worker serves jobs. While this function waits, it sets `calling` to
/// each function of the module that the worker calls.
pub(super) async fn exchange(
    stream: &UnixStream,
    request: &Request,
    calling: &mut Option<String>,
) -> io::Result<Reply> {
    let mut outbox = Outbox::default();
    outbox.push(request);
    while !outbox.is_empty() {
        stream.writable().await?;
        match stream.try_write(outbox.rest()) {
            Ok(count) => outbox.sent(count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    let mut inbox = Inbox::default();
    loop {
        stream.readable().await?;
        match stream.try_read(inbox.room()) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => inbox.received(count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        }
        while let Some(reply) = inbox.take::<Reply>()? {
            match reply.outcome {
                Some(Outcome::Calling(function)) => *calling = Some(function),
                _ => return Ok(reply),
            }
        }
    }
}
