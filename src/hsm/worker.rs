//! The token worker: the process that holds the vendor's module, and nothing else.
//!
//! Life: the first frame on standard input says which token and which keys; the worker reads the PIN itself, opens its
//! sessions one after another, proves every key, says so, and serves jobs until its socket ends. It ignores SIGINT and
//! SIGTERM: the front decides when it ends, by closing the socket, so that jobs under way in a drain are finished.
//!
//! A process that ends while threads are inside the module crashes in most vendors' clean-up code. So the threads are
//! joined first; if one does not come back, the worker kills itself, which runs no clean-up at all.
//!
//! Mitigation: M7 of `THREAT_MODEL.md`.

use std::{
    io::{self, BufReader},
    os::{fd::AsFd as _, unix::net::UnixStream},
    path::PathBuf,
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crossbeam_channel::{RecvTimeoutError, Sender};
use prost::Message as _;
use zeroize::Zeroize as _;

use crate::key::{Fingerprint, WrappingKeyId};

use super::{
    ExpectedKey, Pin, Settings,
    classify::{Class, Fault},
    frame,
    open::OpenToken,
    session::{self, Shared, Worker},
    wire::{FailureClass, Ready, ReadyKey, Reply, Request, Setup, reply::Outcome, request::Job},
};

/// How long session threads may take to come back when the socket has ended.
const JOIN_TIMEOUT: Duration = Duration::from_secs(5);
const JOIN_PAUSE: Duration = Duration::from_millis(10);
/// How long the module may take to open the token: longer than the front waits for it.
const OPEN_TIMEOUT: Duration = Duration::from_mins(1);

/// Body of the hidden command `keybroker token-worker`.
pub fn run() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "token worker");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> io::Result<()> {
    let _signals = ignore_signals()?;
    let stream = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut input = BufReader::with_capacity(frame::FRAME_BYTES_MAX, stream.try_clone()?);
    let mut buffer = Vec::new();
    if !frame::read(&mut input, &mut buffer)? {
        return Ok(());
    }
    let Some(Job::Setup(setup)) = Request::decode(buffer.as_slice())?.job else {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "no setup"));
    };
    let output = Arc::new(Mutex::new(stream));
    let sessions = usize::try_from(setup.sessions).unwrap_or(1).max(1);
    let limit = limit_opening();
    let opened = open(&setup, sessions);
    drop(limit);
    let (token, shared, workers) = match opened {
        Ok(opened) => opened,
        Err(fault) => {
            let class = startup_class(fault.class);
            let failure = session::failure(class, fault.to_string());
            return reply(&output, 0, Outcome::Failure(failure), Duration::ZERO);
        }
    };
    reply(
        &output,
        0,
        Outcome::Ready(ready(&token, &shared)),
        Duration::ZERO,
    )?;
    let input = Arc::new(Mutex::new(input));
    let (ended, end) = crossbeam_channel::bounded(sessions);
    let threads = start(workers, &input, &output, &ended)?;
    // The first session thread that finds the socket at its end says so; the others follow.
    let ended = end.recv().unwrap_or(Ok(()));
    join(threads);
    drop(token);
    ended
}

/// Replaces the default action of both signals, which would end the process, by one that notes them for nobody. (The
/// handler is installed with the listener and stays.)
fn ignore_signals() -> io::Result<(tokio::runtime::Runtime, [tokio::signal::unix::Signal; 2])> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    let guard = runtime.enter();
    let signals = [
        signal(SignalKind::interrupt())?,
        signal(SignalKind::terminate())?,
    ];
    drop(guard);
    Ok((runtime, signals))
}

/// Ends this process when the module hangs while it opens the token. The front does so, too, but it may be gone: then
/// nobody else would. What is returned ends the watch when it is dropped.
fn limit_opening() -> Sender<()> {
    let (opened, is_open) = crossbeam_channel::bounded(0);
    thread::spawn(move || {
        if is_open.recv_timeout(OPEN_TIMEOUT) == Err(RecvTimeoutError::Timeout) {
            kill_ourselves();
        }
    });
    opened
}

/// Runs no clean-up: that of most modules crashes while threads are inside.
fn kill_ourselves() {
    let ourselves = rustix::process::getpid();
    let _never_returns = rustix::process::kill_process(ourselves, rustix::process::Signal::KILL);
}

fn open(setup: &Setup, sessions: usize) -> Result<(OpenToken, Arc<Shared>, Vec<Worker>), Fault> {
    let settings = settings(setup);
    let pin_file = settings
        .pin_file
        .as_deref()
        .ok_or_else(|| Fault::new(Class::Configuration, "no PIN file: set `token.pin_file`"))?;
    let pin = Pin::from_file(pin_file).map_err(|what| Fault::new(Class::Pin, what))?;
    let token = OpenToken::login(&settings, &pin, false)?;
    drop(pin);
    let mut keys = Vec::new();
    for key in &setup.keys {
        keys.push(token.prove(&settings, &expected(key)?)?);
    }
    let ids: Vec<_> = keys.iter().map(|key| key.id).collect();
    let shared = Arc::new(Shared {
        module: token.module.clone(),
        slot: token.slot,
        keys,
    });
    // One after another: a token that refuses the second session says so before the third is asked for.
    let mut workers = Vec::with_capacity(sessions);
    for _ in 0..sessions {
        workers.push(Worker::new(Arc::clone(&shared), token.session(&ids)?));
    }
    Ok((token, shared, workers))
}

fn settings(setup: &Setup) -> Settings {
    let given = |text: &String| (!text.is_empty()).then(|| text.clone());
    Settings {
        module: PathBuf::from(&setup.module),
        label: given(&setup.label),
        serial: given(&setup.serial),
        uri: given(&setup.uri),
        pin_file: given(&setup.pin_file).map(PathBuf::from),
        workers: 1,
        sessions_per_worker: 1,
        queue_length_max: 1,
        allow_oaep_sha1: setup.allow_oaep_sha1,
        attribute_exceptions: setup.attribute_exceptions.clone(),
        environment: std::collections::BTreeMap::new(),
    }
}

fn expected(key: &super::wire::setup::Key) -> Result<ExpectedKey, Fault> {
    let id = WrappingKeyId::from_slice(&key.id);
    let fingerprint: Option<[u8; 32]> = key.fingerprint.as_slice().try_into().ok();
    match (id, fingerprint) {
        (Some(id), Some(fingerprint)) => Ok(ExpectedKey {
            id,
            fingerprint: Fingerprint(fingerprint),
        }),
        _ => Err(Fault::new(
            Class::Configuration,
            "a malformed key in the setup",
        )),
    }
}

/// The class that the front acts on. A key that is missing at start is not a token that is lost.
fn startup_class(class: Class) -> FailureClass {
    match class {
        Class::Pin => FailureClass::Pin,
        Class::Untrusted | Class::Input => FailureClass::Untrusted,
        Class::Configuration => FailureClass::Configuration,
        Class::BackOff => FailureClass::BackOff,
        Class::SessionLost | Class::TokenLost | Class::Ambiguous => FailureClass::TokenLost,
    }
}

fn ready(token: &OpenToken, shared: &Shared) -> Ready {
    Ready {
        label: token.info.label.clone(),
        serial: token.info.serial.clone(),
        model: token.info.model.clone(),
        keys: shared
            .keys
            .iter()
            .map(|key| ReadyKey {
                id: key.id.as_bytes().to_vec(),
                spki: key.public.spki.clone(),
                algorithm: key.canary.algorithm().number().into(),
            })
            .collect(),
    }
}

type Input = Mutex<BufReader<UnixStream>>;

fn start(
    workers: Vec<Worker>,
    input: &Arc<Input>,
    output: &Arc<Mutex<UnixStream>>,
    ended: &Sender<io::Result<()>>,
) -> io::Result<Vec<JoinHandle<()>>> {
    workers
        .into_iter()
        .enumerate()
        .map(|(number, mut worker)| {
            let (input, output, ended) = (Arc::clone(input), Arc::clone(output), ended.clone());
            thread::Builder::new()
                .name(format!("session-{number}"))
                .spawn(move || {
                    let result = work(&mut worker, &input, &output);
                    // The first to end is heard; there is room for each.
                    let _heard = ended.send(result);
                })
        })
        .collect()
}

/// Takes the next job from the socket by turns with the other session threads: none stands between the socket and the
/// session that does the work.
fn work(worker: &mut Worker, input: &Input, output: &Mutex<UnixStream>) -> io::Result<()> {
    let mut buffer = Vec::new();
    loop {
        let more = {
            let mut input = input.lock().unwrap_or_else(PoisonError::into_inner);
            frame::read(&mut *input, &mut buffer)?
        };
        if !more {
            return Ok(());
        }
        let request = Request::decode(buffer.as_slice());
        buffer.zeroize();
        let request = request?;
        let id = request.id;
        let (outcome, spent) = worker.run(request);
        let outcome = match outcome {
            Ok(mut bytes) => Outcome::Output(std::mem::take(&mut *bytes)),
            Err(failure) => Outcome::Failure(failure),
        };
        reply(output, id, outcome, spent)?;
    }
}

fn reply(output: &Mutex<UnixStream>, id: u64, outcome: Outcome, spent: Duration) -> io::Result<()> {
    let mut message = Reply {
        id,
        outcome: Some(outcome),
        token_ns: u64::try_from(spent.as_nanos()).unwrap_or(u64::MAX),
    };
    let mut stream = output.lock().unwrap_or_else(PoisonError::into_inner);
    let written = frame::write(&mut *stream, &message);
    if let Some(Outcome::Output(bytes)) = &mut message.outcome {
        bytes.zeroize();
    }
    written
}

/// Waits for the session threads; a process that must not wait any longer kills itself.
fn join(threads: Vec<JoinHandle<()>>) {
    let until = Instant::now() + JOIN_TIMEOUT;
    while threads.iter().any(|thread| !thread.is_finished()) {
        if Instant::now() > until {
            kill_ourselves();
        }
        thread::sleep(JOIN_PAUSE);
    }
    for thread in threads {
        if thread.join().is_err() {
            tracing::error!("a session thread panicked");
        }
    }
}
