//! One session thread of a worker. The thread takes one job at a time and runs the job on its own session.
//!
//! Mitigations: M8, M10 of `THREAT_MODEL.md`.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use cryptoki::slot::Slot;
use keybroker_pkcs11_ffi::Module;
use zeroize::Zeroizing;

use keybroker_core::{
    envelope::Algorithm,
    key::{Purpose, WrappingKeyId},
};
use keybroker_worker_protocol::{
    Work, frame,
    wire::{self, FailureClass, request::Job},
};

use crate::{
    busy::{LastAnswer, REFUSALS_MAX, Refusals, pause_after},
    classify::{Class, Fault},
    keys::{KeyPair, KeySession, Place},
    open::ProvedKey,
    operation,
};

mod release;
mod rewrap;

/// Number of consecutive self-tests that a token may refuse with an ambiguous code before the token counts as lost.
/// Including the pauses, a lost token is detected within a tenth of a second.
const SELF_TESTS_MAX: u32 = 16;

/// The state that all session threads of a worker share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) module: Module,
    pub(super) slot: Slot,
    pub(super) keys: Vec<ProvedKey>,
    /// Total number of self-tests that the threads have begun. The number of self-tests selects the key of the next
    /// self-test.
    pub(super) turn: AtomicUsize,
    /// Time at which the token last answered any session.
    pub(super) last_answer: LastAnswer,
}

impl Shared {
    fn open(&self) -> Result<KeySession, Fault> {
        let places: Vec<Place> = self.keys.iter().map(|key| key.place.clone()).collect();
        KeySession::open(&self.module, self.slot, &places)
    }
}

/// The result of a job: bytes for the front, or a failure.
pub(super) type Outcome = Result<Zeroizing<Vec<u8>>, wire::Failure>;

/// A session thread with its session. The session is replaced after every failed token call, because some tokens leave
/// an operation active in the session.
#[derive(Debug)]
pub(super) struct SessionThread {
    shared: Arc<Shared>,
    current: Option<KeySession>,
    target: Option<rewrap::Target>,
}

/// Reason why an attempt returned no bytes.
enum Stop {
    /// The job has failed.
    Failed(wire::Failure),
    /// The session was lost before the job had an effect. The job may be repeated once on another session.
    SessionLost(Fault),
    /// The token refused the job, although the self-test passes. The token may be busy, so the job is repeated. If the
    /// token refuses the job often enough, the job has failed: see [`Refusals`].
    Doubted {
        refusal: wire::Failure,
        /// Number of self-tests that the token refused before a self-test passed.
        self_tests_refused: u32,
    },
}

impl SessionThread {
    pub(super) fn new(shared: Arc<Shared>, session: KeySession) -> Self {
        Self {
            shared,
            current: Some(session),
            target: None,
        }
    }

    /// Runs a job. Returns the outcome and the time that the job spent in the module.
    pub(super) fn run(&mut self, work: &Work) -> (Outcome, Duration) {
        let started = Instant::now();
        let outcome = match work.job() {
            Some(job) => self.run_job(job, work.deadline_ns()),
            None => Err(failure(FailureClass::Unspecified, "the request has no job")),
        };
        (outcome, started.elapsed())
    }

    /// Runs a job. Repeats the job at most once after a lost session, and several times after refusals by the token.
    fn run_job(&mut self, job: &Job, deadline: u64) -> Outcome {
        let (mut lost, mut refusals, mut refused_as) = (false, Refusals::default(), None);
        loop {
            match self.attempt(job, deadline) {
                Ok(bytes) => return Ok(bytes),
                Err(Stop::Failed(failure)) => return Err(after_refusals(failure, refused_as)),
                Err(Stop::SessionLost(fault)) if lost => {
                    return Err(failure(FailureClass::SessionLost, fault.to_string()));
                }
                Err(Stop::SessionLost(_)) => lost = true,
                Err(Stop::Doubted {
                    refusal,
                    self_tests_refused,
                }) => {
                    refusals.add(self_tests_refused);
                    let before = *refused_as.get_or_insert(refusal.class);
                    if before != refusal.class {
                        let what = format!(
                            "the token returned inconsistent errors on retry: {}",
                            refusal.detail
                        );
                        return Err(failure(FailureClass::BackOff, what));
                    }
                    if refusals.are_conclusive() {
                        return Err(refusal);
                    }
                    if refusals.count() == REFUSALS_MAX {
                        let what = format!("the token is busy: {}", refusal.detail);
                        return Err(failure(FailureClass::BackOff, what));
                    }
                    thread::sleep(pause_after(refusals.count()));
                }
            }
        }
    }

    fn attempt(&mut self, job: &Job, deadline: u64) -> Result<Zeroizing<Vec<u8>>, Stop> {
        // Opening a session is also a call to the token, so the deadline is checked first.
        check_deadline(deadline)?;
        if self.current.is_none() {
            let session = self
                .shared
                .open()
                .map_err(|fault| Stop::from_open(&fault))?;
            self.current = Some(session);
        }
        match job {
            Job::Setup(_) => Err(Stop::failed(FailureClass::Unspecified, "setup twice")),
            Job::SelfTest(_) => self.self_test(deadline).map(|()| Zeroizing::default()),
            Job::Mac(job) => self.mac(&job.key_id, &job.message, deadline),
            Job::VerifyMac(job) => {
                self.verify(&job.key_id, &job.message, &job.mac, deadline)?;
                Ok(Zeroizing::default())
            }
            Job::Rebind(job) => {
                self.verify(&job.key_id, &job.message, &job.mac, deadline)?;
                self.mac(&job.key_id, &job.new_message, deadline)
            }
            Job::Unwrap(job) => {
                // The MAC is verified first, so that the RSA key only decrypts bytes that were stored for this context.
                self.verify(&job.key_id, &job.message, &job.mac, deadline)?;
                self.decrypt(job, deadline)
            }
            Job::Rewrap(job) => self.rewrap(job, deadline),
            Job::Release(job) => self.release(job, deadline),
        }
    }

    fn mac(
        &mut self,
        key: &[u8],
        message: &[u8],
        deadline: u64,
    ) -> Result<Zeroizing<Vec<u8>>, Stop> {
        check_deadline(deadline)?;
        let (session, pair) = self.session(key)?;
        let made = operation::mac(&session.session, pair, message);
        made.inspect(|_| self.shared.last_answer.note())
            .map(|mac| Zeroizing::new(mac.to_vec()))
            // A caller's input cannot make the computation of a MAC fail, so the failure means that the token is busy.
            .map_err(|fault| self.stop(fault, key, deadline, FailureClass::BackOff))
    }

    fn verify(
        &mut self,
        key: &[u8],
        message: &[u8],
        mac: &[u8],
        deadline: u64,
    ) -> Result<(), Stop> {
        check_deadline(deadline)?;
        let (session, pair) = self.session(key)?;
        let verified = operation::verify(&session.session, pair, message, mac);
        verified
            .inspect(|()| self.shared.last_answer.note())
            .map_err(|fault| self.stop(fault, key, deadline, FailureClass::MacRefused))
    }

    fn decrypt(&mut self, job: &wire::Unwrap, deadline: u64) -> Result<Zeroizing<Vec<u8>>, Stop> {
        let algorithm = algorithm(job.algorithm)
            .ok_or_else(|| Stop::failed(FailureClass::Damaged, "unknown algorithm"))?;
        check_deadline(deadline)?;
        let (session, pair) = self.session(&job.key_id)?;
        require(pair, Purpose::Plain)?;
        let decrypted = operation::decrypt(&session.session, pair, algorithm, &job.wrapped);
        // The MAC was valid, so the caller did not cause the failure. The self-test shows whether the row is damaged or
        // the token is faulty.
        decrypted
            .inspect(|_| self.shared.last_answer.note())
            .map_err(|fault| self.stop(fault, &job.key_id, deadline, FailureClass::Damaged))
    }

    fn session(&self, key: &[u8]) -> Result<(&KeySession, &KeyPair), Stop> {
        let session = self.current.as_ref().ok_or_else(|| {
            Stop::SessionLost(Fault::new(Class::SessionLost, "the session was lost"))
        })?;
        let pair = WrappingKeyId::from_slice(key)
            .and_then(|id| session.pair(id))
            .ok_or_else(|| {
                Stop::failed(
                    FailureClass::UnknownKey,
                    "the key was not in the setup of the worker",
                )
            })?;
        Ok((session, pair))
    }

    /// Determines the consequence of a fault for a job with this key. `refusal` is the failure class if the token
    /// refuses the job although the self-test passes.
    fn stop(&mut self, fault: Fault, key: &[u8], deadline: u64, refusal: FailureClass) -> Stop {
        if fault.class == Class::Input && refusal == FailureClass::MacRefused {
            // When a MAC is verified, the return codes of this class have a definite meaning.
            return Stop::failed(refusal, fault.to_string());
        }
        self.current = None;
        match fault.class {
            Class::SessionLost => Stop::SessionLost(fault),
            Class::TokenLost | Class::KeyMissing => {
                Stop::failed(FailureClass::TokenLost, fault.to_string())
            }
            Class::BackOff => Stop::failed(FailureClass::BackOff, fault.to_string()),
            Class::Pin | Class::Login | Class::Untrusted => {
                Stop::failed(FailureClass::Untrusted, fault.to_string())
            }
            Class::Input | Class::Ambiguous | Class::Configuration | Class::NoToken => {
                match self.revive(key, deadline) {
                    Ok(self_tests_refused) => Stop::Doubted {
                        refusal: failure(refusal, fault.to_string()),
                        self_tests_refused,
                    },
                    Err(Stop::Failed(mut self_test)) => {
                        self_test.detail = format!("{fault}; then {}", self_test.detail);
                        Stop::Failed(self_test)
                    }
                    Err(other) => other,
                }
            }
        }
    }

    /// Opens a new session and runs the self-test of this key on it. Repeats the self-test if its failure is ambiguous,
    /// because a busy token refuses self-tests, too.
    ///
    /// If the token refuses every self-test, but answers another session meanwhile, the token is busy and not lost.
    /// Returns the number of refused self-tests before a self-test passed.
    fn revive(&mut self, key: &[u8], deadline: u64) -> Result<u32, Stop> {
        let (mut refusals, since) = (0, frame::monotonic_ns());
        loop {
            let Err(fault) = self.open_and_test(key, deadline)? else {
                return Ok(refusals);
            };
            refusals += 1;
            if !fault.is_ambiguous() {
                return Err(Stop::from_self_test(&fault));
            }
            if refusals == SELF_TESTS_MAX {
                return Err(if self.shared.last_answer.is_since(since) {
                    Stop::failed(FailureClass::BackOff, format!("the token is busy: {fault}"))
                } else {
                    Stop::from_self_test(&fault)
                });
            }
            thread::sleep(pause_after(refusals));
        }
    }

    /// Opens a new session and runs the self-test of this key on it once. The session is kept if the self-test passes.
    /// Returns the fault of the self-test as the inner error.
    fn open_and_test(&mut self, key: &[u8], deadline: u64) -> Result<Result<(), Fault>, Stop> {
        check_deadline(deadline)?;
        let session = self
            .shared
            .open()
            .map_err(|fault| Stop::from_open(&fault))?;
        check_deadline(deadline)?;
        let proved = self
            .shared
            .keys
            .iter()
            .find(|known| known.place.id.as_bytes() == key);
        let tested = proved.map_or(Ok(()), |proved| check(proved, &session));
        if tested.is_ok() {
            self.current = Some(session);
        }
        Ok(tested)
    }

    /// Each call tests the next key in turn, so that a self-test takes the same time on a token with many keys.
    fn self_test(&mut self, deadline: u64) -> Result<(), Stop> {
        check_deadline(deadline)?;
        let turn = self.shared.turn.fetch_add(1, Ordering::Relaxed);
        let keys = &self.shared.keys;
        let proved = turn.checked_rem(keys.len()).and_then(|turn| keys.get(turn));
        let (Some(session), Some(proved)) = (&self.current, proved) else {
            return Ok(());
        };
        let Err(fault) = check(proved, session) else {
            return Ok(());
        };
        let key = proved.place.id;
        self.current = None;
        match fault.class {
            Class::SessionLost => Err(Stop::SessionLost(fault)),
            Class::TokenLost
            | Class::KeyMissing
            | Class::BackOff
            | Class::Untrusted
            | Class::Pin
            | Class::Login => Err(Stop::from_self_test(&fault)),
            // A self-test that failed with an error of one of the four classes may pass later, so the failure is no
            // reason to replace the worker. A self-test in another session decides whether the worker is replaced.
            Class::Input | Class::Ambiguous | Class::Configuration | Class::NoToken => {
                tracing::warn!(%fault, "a self-test failed and is repeated in another session");
                self.revive(key.as_bytes(), deadline).map(drop)
            }
        }
    }
}

fn check(key: &ProvedKey, session: &KeySession) -> Result<(), Fault> {
    let Some(pair) = session.pair(key.place.id) else {
        let detail = format!("key {} is no longer on the token", key.place.id);
        return Err(Fault::new(Class::TokenLost, detail));
    };
    key.self_test.check(session, pair)
}

/// Returns the algorithm with this number in a job.
fn algorithm(number: u32) -> Option<Algorithm> {
    u8::try_from(number).ok().and_then(Algorithm::from_number)
}

/// Refuses a job for a key of another purpose, which the token would refuse, too.
fn require(pair: &KeyPair, purpose: Purpose) -> Result<(), Stop> {
    if pair.purpose == purpose {
        return Ok(());
    }
    let what = format!(
        "the job needs a {} wrapping key, but key {} is a {} wrapping key; the registry and the token disagree about this key: \
         run `keybroker token check`",
        purpose.as_str(),
        pair.id,
        pair.purpose.as_str()
    );
    Err(Stop::failed(FailureClass::UnknownKey, what))
}

/// A failure that ends a job. A job that ran out of time is told apart if the token had refused its recipient before.
fn after_refusals(mut failure: wire::Failure, refused_as: Option<i32>) -> wire::Failure {
    let is_late = failure.class() == FailureClass::Deadline;
    if is_late && refused_as == Some(FailureClass::Recipient.into()) {
        failure.set_class(FailureClass::RecipientDeadline);
    }
    failure
}

fn check_deadline(deadline: u64) -> Result<(), Stop> {
    if frame::monotonic_ns() < deadline {
        Ok(())
    } else {
        Err(Stop::failed(
            FailureClass::Deadline,
            "the deadline passed before the call to the token",
        ))
    }
}

impl Stop {
    fn failed(class: FailureClass, detail: impl Into<String>) -> Self {
        Self::Failed(failure(class, detail))
    }

    /// If a session cannot be opened or a key is not found, the token counts as lost. If the token was removed or ended
    /// the login, its keys cannot be found.
    fn from_open(fault: &Fault) -> Self {
        let class = match fault.class {
            Class::BackOff => FailureClass::BackOff,
            Class::Untrusted => FailureClass::Untrusted,
            _ => FailureClass::TokenLost,
        };
        Self::failed(class, fault.to_string())
    }

    /// A token that returns a wrong result must not be used.
    fn from_self_test(fault: &Fault) -> Self {
        let class = match fault.class {
            Class::BackOff => FailureClass::BackOff,
            Class::Untrusted => FailureClass::Untrusted,
            _ => FailureClass::TokenLost,
        };
        Self::failed(class, format!("the self-test failed: {fault}"))
    }
}

pub(super) fn failure(class: FailureClass, detail: impl Into<String>) -> wire::Failure {
    wire::Failure {
        class: class.into(),
        detail: detail.into(),
    }
}
