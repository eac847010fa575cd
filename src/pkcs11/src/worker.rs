//! The token worker: the process that loads the vendor's module and has no other task.
//!
//! The first frame on standard input contains the token and its keys. The worker reads the PIN itself, opens its
//! sessions one after another and checks every key. After its checks, the worker reports the usable keys, and serves
//! jobs until its socket is closed. The worker ignores SIGINT and SIGTERM, so that it can finish running jobs during a
//! drain. The worker process ends when the front process closes its end of the socket.
//!
//! If a process ends while threads are inside the module, the clean-up code of most modules crashes. Therefore the
//! worker waits for its threads before it ends. If a thread does not return, the worker kills itself with SIGKILL,
//! which runs no clean-up code.
//!
//! Mitigation: M7, M11 of `THREAT_MODEL.md`.

use std::{
    io::{self, Write as _},
    os::{fd::AsFd as _, unix::net::UnixStream},
    path::Path,
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError, atomic::AtomicUsize},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crossbeam_channel::{RecvTimeoutError, Sender};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use zeroize::Zeroize as _;

use keybroker_core::{
    key::{Fingerprint, ObjectIds, Purpose, WrappingKeyId},
    state::StateDirectory,
};
use keybroker_worker_protocol::{
    ExpectedKey, Pin, Proof, Settings, Work,
    frame::{Inbox, Outbox},
    unpadded,
    wire::{
        self, FailureClass, Ready, Reply, Request, Setup, TokenKey, UnusableKey, reply::Outcome,
        request::Job,
    },
};

use crate::{
    PinRecord,
    busy::LastAnswer,
    calling,
    classify::{Class, Fault},
    keys::Place,
    open::{OpenToken, ProvedKey},
    operation,
    select::Registered,
    session::{self, SessionThread, Shared},
};

/// Longest time for the session threads to return after the socket was closed.
const JOIN_TIMEOUT: Duration = Duration::from_secs(5);
/// Interval at which the worker checks that the front is running.
const FRONT_INTERVAL: Duration = Duration::from_secs(1);
const JOIN_PAUSE: Duration = Duration::from_millis(10);
/// Longest time for the module to open the token. The corresponding timeout of the front is
/// shorter.
const OPEN_TIMEOUT: Duration = Duration::from_mins(1);

/// Niceness that is added to a worker, so that its CPU priority is lower than the front's priority.
const NICENESS: i32 = 5;

/// Runs the hidden command `keybroker token-worker`.
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
    end_with_front(stream.try_clone()?);
    let mut input = Input {
        stream: stream.try_clone()?,
        inbox: Inbox::default(),
    };
    let Some(first) = input.receive()? else {
        return Ok(());
    };
    let Some(Job::Setup(setup)) = first.job else {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "no setup"));
    };
    let output = Arc::new(Mutex::new(stream));
    let mut first_reply = Replies::to(&output);
    let mut progress = Replies::to(&output);
    calling::report_to(move |function| {
        let calling = Outcome::Calling(function.to_owned());
        // A failed report is ignored: if the front has ended, the socket is closed, and this process ends, too.
        let _sent = progress.send(0, calling, Duration::ZERO);
    });
    let sessions = usize::try_from(setup.sessions).unwrap_or(1).max(1);
    let settings = Settings::from_setup(&setup);
    let limit = limit_opening();
    let opened = read_pin(&setup).and_then(|pin| open(&setup, &settings, pin.as_ref(), sessions));
    drop(limit);
    calling::report_no_more();
    let Opened {
        token,
        shared,
        sessions: sessions_open,
        unusable,
    } = match opened {
        Ok(opened) => opened,
        Err(fault) => {
            let class = startup_class(fault.class);
            let failure = session::failure(class, fault.to_string());
            return first_reply.send(0, Outcome::Failure(failure), Duration::ZERO);
        }
    };
    let ready = ready(&token, &shared, unusable);
    first_reply.send(0, Outcome::Ready(ready), Duration::ZERO)?;
    let input = Arc::new(Mutex::new(input));
    let (ended, end) = crossbeam_channel::bounded(sessions);
    // The start itself has the same priority as the front, because calls may wait for the worker.
    give_way_to_front();
    let threads = start(sessions_open, &input, &output, &ended)?;
    // The first session thread that reads the end of the socket reports that the socket was closed.
    // The other session threads also end.
    let ended = end.recv().unwrap_or(Ok(()));
    join(threads);
    drop(token);
    ended
}

/// Replaces the default action of SIGINT and SIGTERM, which would end the process. The returned values keep the
/// handlers installed. The signals themselves are never read.
pub(crate) fn ignore_signals()
-> io::Result<(tokio::runtime::Runtime, [tokio::signal::unix::Signal; 2])> {
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

/// Lowers the CPU priority of this thread, and of the threads that it starts, below the priority of the front. A module
/// that computes in software, such as SoftHSM, would otherwise take most of the processors under load. The front could
/// then not refuse calls in time, or answer them within their deadlines. Without the permission to change its priority,
/// the process keeps its priority.
fn give_way_to_front() {
    if let Err(error) = rustix::process::nice(NICENESS) {
        tracing::debug!(%error, "the worker keeps the CPU priority of the front");
    }
}

/// Ends this process if the module hangs while it opens the token. The front would also end this process, but the front
/// itself may have ended. The limit applies until the returned value is dropped.
fn limit_opening() -> Sender<()> {
    let (opened, is_open) = crossbeam_channel::bounded(0);
    thread::spawn(move || {
        if is_open.recv_timeout(OPEN_TIMEOUT) == Err(RecvTimeoutError::Timeout) {
            kill_ourselves();
        }
    });
    opened
}

/// Ends this process without running clean-up code. The clean-up code of most modules crashes while threads are inside
/// the module.
fn kill_ourselves() {
    let ourselves = rustix::process::getpid();
    let _never_returns = rustix::process::kill_process(ourselves, rustix::process::Signal::KILL);
}

/// Ends this process a few seconds after the front has closed its end of the socket or has ended. The process ends even
/// if it hangs in the module or does not read the socket yet. If this process continued to run, the next front could
/// not use the sessions that this process has open on the token.
///
/// The function does not use the parent-death signal, because Linux sends this signal when the *thread* that started
/// this process ends. The function also checks the parent process, because another process may have a copy of the
/// front's end of the socket.
pub(crate) fn end_with_front(stream: UnixStream) {
    let front = rustix::process::getppid();
    thread::spawn(move || {
        let interval = Timespec::try_from(FRONT_INTERVAL).ok();
        loop {
            let mut watched = [PollFd::new(&stream, PollFlags::RDHUP)];
            let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
            let heard = poll(&mut watched, interval.as_ref()).is_ok_and(|count| count > 0);
            if heard && watched[0].revents().intersects(gone) {
                break;
            }
            if rustix::process::getppid() != front {
                break;
            }
        }
        thread::sleep(JOIN_TIMEOUT);
        kill_ourselves();
    });
}

/// Reads the PIN. Returns `None` for a token that is used without a login.
fn read_pin(setup: &Setup) -> Result<Option<Pin>, Fault> {
    if setup.pin_file.is_empty() {
        return Ok(None);
    }
    Pin::from_file(Path::new(&setup.pin_file))
        .map(Some)
        .map_err(|error| Fault::new(Class::Pin, error.to_string()))
}

/// A token that is ready for jobs.
struct Opened {
    token: OpenToken,
    shared: Arc<Shared>,
    sessions: Vec<SessionThread>,
    /// The expected keys that cannot be used.
    unusable: Vec<UnusableKey>,
}

fn open(
    setup: &Setup,
    settings: &Settings,
    pin: Option<&Pin>,
    sessions: usize,
) -> Result<Opened, Fault> {
    let record = PinRecord::new(StateDirectory::at(Path::new(&setup.state_directory)))
        .of_token(&setup.token_name)
        .of_copy(&setup.pin_record_name);
    let expected = setup
        .keys
        .iter()
        .map(expected)
        .collect::<Result<Vec<_>, _>>()?;
    let serials: Vec<&str> = expected
        .iter()
        .map(|key| key.token_serial.as_str())
        .collect();
    let token = OpenToken::login_to(
        settings,
        &record,
        pin,
        false,
        Registered::Required(&serials),
    )?;
    let (keys, unusable) = prove(&token, settings, &expected)?;
    let places: Vec<Place> = keys.iter().map(|key| key.place.clone()).collect();
    let shared = Arc::new(Shared {
        module: token.module.clone(),
        slot: token.slot,
        keys,
        turn: AtomicUsize::new(0),
        last_answer: LastAnswer::default(),
    });
    // The sessions are opened one after another. If the token refuses a session, no further session is opened.
    let mut open = Vec::with_capacity(sessions);
    for _ in 0..sessions {
        open.push(SessionThread::new(
            Arc::clone(&shared),
            token.session(&places)?,
        ));
    }
    Ok(Opened {
        token,
        shared,
        sessions: open,
        unusable,
    })
}

/// Checks every expected key. A key that is missing or wrong does not prevent the use of the other keys. Returns an
/// error if no expected key can be used, or if the token itself failed.
fn prove(
    token: &OpenToken,
    settings: &Settings,
    expected: &[ExpectedKey],
) -> Result<(Vec<ProvedKey>, Vec<UnusableKey>), Fault> {
    let (mut keys, mut unusable, mut first) = (Vec::new(), Vec::new(), None);
    for key in expected.iter().filter(|key| is_here(key, token)) {
        let place = Place {
            purpose: key.purpose,
            ..Place::of(key.id, key.objects.clone())
        };
        let proved = token.prove(settings, &place, key.fingerprint);
        let proved = proved.and_then(|proved| {
            verify_proofs(token, &proved.place, key)?;
            Ok(proved)
        });
        let fault = match proved {
            Ok(proved) => {
                keys.push(proved);
                continue;
            }
            // The key may be on a declared copy of this token, which has the same serial number. If
            // the key is missing from both tokens, the regular search finds the key when it is
            // available again.
            Err(fault) if key.may_be_elsewhere && fault.class == Class::KeyMissing => {
                tracing::warn!(key = %key.id, %fault, "a registered key is not on this token");
                unusable.push(unusable_key(key, &fault));
                continue;
            }
            Err(fault) => token.explained(fault),
        };
        if !concerns_one_key(fault.class) {
            return Err(fault);
        }
        unusable.push(unusable_key(key, &fault));
        first.get_or_insert(fault);
    }
    match first {
        Some(fault) if keys.is_empty() => Err(fault),
        _ => Ok((keys, unusable)),
    }
}

fn unusable_key(key: &ExpectedKey, fault: &Fault) -> UnusableKey {
    UnusableKey {
        id: key.id.as_bytes().to_vec(),
        is_missing: fault.class == Class::KeyMissing,
        detail: fault.to_string(),
    }
}

/// Whether a fault of this class during the check of a key concerns only this key.
const fn concerns_one_key(class: Class) -> bool {
    matches!(
        class,
        Class::KeyMissing | Class::Untrusted | Class::Configuration
    )
}

/// Whether a key is expected on this token. A key that may be on another token is expected only on the token with its serial
/// number.
fn is_here(key: &ExpectedKey, token: &OpenToken) -> bool {
    !key.may_be_elsewhere || unpadded(&key.token_serial) == token.info.serial
}

/// Verifies the registry's MACs with the integrity key of this token. A token with another integrity key would reject
/// every row under the wrapping key, so the wrapping key must not be used on this token.
fn verify_proofs(token: &OpenToken, place: &Place, key: &ExpectedKey) -> Result<(), Fault> {
    if key.proofs.is_empty() {
        return Ok(());
    }
    let session = token.session(std::slice::from_ref(place))?;
    let pair = session.pair(key.id).ok_or_else(|| {
        let what = format!(
            "wrapping key {} was found before, but is no longer on the token",
            key.id
        );
        Fault::new(Class::KeyMissing, what)
    })?;
    for proof in &key.proofs {
        operation::verify(&session.session, pair, &proof.message, &proof.mac).map_err(|fault| {
            // The self-test of the integrity key has just passed, so an ambiguous code means a wrong MAC, too.
            if !matches!(fault.class, Class::Input | Class::Ambiguous) {
                return fault;
            }
            let what = format!(
                "the integrity key of wrapping key {} on this token does not verify the MAC of the registry: the token has \
                 another integrity key under the same CKA_ID, or the registry was altered",
                key.id
            );
            Fault::new(Class::Untrusted, what)
        })?;
    }
    Ok(())
}

fn expected(key: &wire::setup::Key) -> Result<ExpectedKey, Fault> {
    let id = WrappingKeyId::from_slice(&key.id);
    let fingerprint: Option<[u8; 32]> = key.fingerprint.as_slice().try_into().ok();
    let objects = ObjectIds::from_slices(&key.private_cka_id, &key.integrity_cka_id);
    let proofs: Option<Vec<Proof>> = key.proofs.iter().map(proof).collect();
    match (id, fingerprint, objects, proofs) {
        (Some(id), Some(fingerprint), Some(objects), Some(proofs)) => Ok(ExpectedKey {
            id,
            objects,
            token_serial: key.token_serial.clone(),
            fingerprint: Fingerprint(fingerprint),
            purpose: if key.is_sealed {
                Purpose::Sealed
            } else {
                Purpose::Plain
            },
            may_be_elsewhere: key.may_be_elsewhere,
            proofs,
        }),
        _ => Err(Fault::new(
            Class::Configuration,
            "the setup contains a malformed key",
        )),
    }
}

fn proof(proof: &wire::setup::Proof) -> Option<Proof> {
    Some(Proof {
        message: proof.message.clone(),
        mac: proof.mac.as_slice().try_into().ok()?,
    })
}

/// Translates a failure class into the class that is reported to the front.
fn startup_class(class: Class) -> FailureClass {
    match class {
        Class::Pin => FailureClass::Pin,
        Class::Login => FailureClass::Login,
        Class::Untrusted => FailureClass::Untrusted,
        Class::KeyMissing => FailureClass::KeyMissing,
        Class::Configuration | Class::NoToken => FailureClass::Configuration,
        Class::BackOff => FailureClass::BackOff,
        // At this time, a rejected input can only be the input of the worker's own self-test, so the failure may be
        // temporary.
        Class::Input | Class::SessionLost | Class::TokenLost | Class::Ambiguous => {
            FailureClass::TokenLost
        }
    }
}

fn ready(token: &OpenToken, shared: &Shared, unusable: Vec<UnusableKey>) -> Ready {
    Ready {
        token: Some(token.info.clone().into()),
        keys: shared
            .keys
            .iter()
            .map(|key| TokenKey {
                id: key.place.id.as_bytes().to_vec(),
                spki: key.public.spki.clone(),
                algorithm: key.self_test.algorithm().number().into(),
                sealing: wire::Sealing::of(key.sealing).into(),
            })
            .collect(),
        unusable,
    }
}

/// The socket, with the bytes that were received after the last message.
struct Input {
    stream: UnixStream,
    inbox: Inbox,
}

impl Input {
    fn receive(&mut self) -> io::Result<Option<Request>> {
        self.inbox.receive(&mut self.stream)
    }
}

fn start(
    sessions: Vec<SessionThread>,
    input: &Arc<Mutex<Input>>,
    output: &Arc<Mutex<UnixStream>>,
    ended: &Sender<io::Result<()>>,
) -> io::Result<Vec<JoinHandle<()>>> {
    sessions
        .into_iter()
        .enumerate()
        .map(|(number, mut session)| {
            let (input, ended) = (Arc::clone(input), ended.clone());
            let mut replies = Replies::to(output);
            thread::Builder::new()
                .name(format!("session-{number}"))
                .spawn(move || {
                    let result = work(&mut session, &input, &mut replies);
                    // Only the first result is read, but the channel has space for all results.
                    let _heard = ended.send(result);
                })
        })
        .collect()
}

/// Reads jobs from the socket, in turn with the other session threads. Each thread uses its own
/// session to run the jobs that it reads.
fn work(
    session: &mut SessionThread,
    input: &Mutex<Input>,
    replies: &mut Replies,
) -> io::Result<()> {
    loop {
        let received = input
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .receive()?;
        let Some(request) = received else {
            return Ok(());
        };
        let work = Work::from_wire(request);
        let id = work.id();
        let (outcome, spent) = session.run(&work);
        drop(work);
        let outcome = match outcome {
            Ok(mut bytes) => Outcome::Output(std::mem::take(&mut *bytes)),
            Err(failure) => Outcome::Failure(failure),
        };
        replies.send(id, outcome, spent)?;
    }
}

/// The sending side of the socket, which the session threads share. Each thread prepares its frames in its own buffer.
struct Replies {
    stream: Arc<Mutex<UnixStream>>,
    outbox: Outbox,
}

impl Replies {
    fn to(stream: &Arc<Mutex<UnixStream>>) -> Self {
        Self {
            stream: Arc::clone(stream),
            outbox: Outbox::default(),
        }
    }

    fn send(&mut self, id: u64, outcome: Outcome, spent: Duration) -> io::Result<()> {
        let mut message = Reply {
            id,
            outcome: Some(outcome),
            token_ns: u64::try_from(spent.as_nanos()).unwrap_or(u64::MAX),
        };
        self.outbox.push(&message);
        if let Some(Outcome::Output(bytes)) = &mut message.outcome {
            bytes.zeroize();
        }
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let written = stream.write_all(self.outbox.rest());
        drop(stream);
        self.outbox.sent(self.outbox.rest().len());
        written
    }
}

/// Waits for the session threads. If the threads take too long, the process kills itself.
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
