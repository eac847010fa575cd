//! One session thread of a worker: takes jobs, one at a time, on the one session that it owns.
//!
//! Mitigations: M8, M10 of `THREAT_MODEL.md`.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use cryptoki::{context::Pkcs11, slot::Slot};
use zeroize::Zeroizing;

use crate::{envelope::Algorithm, key::WrappingKeyId};

use super::{
    classify::{Class, Fault},
    frame,
    keys::KeyPair,
    open::{KeySession, ProvedKey},
    operation,
    wire::{self, FailureClass, Request, request::Job},
};

/// What every session thread of a worker shares.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) module: Pkcs11,
    pub(super) slot: Slot,
    pub(super) keys: Vec<ProvedKey>,
}

impl Shared {
    fn ids(&self) -> Vec<WrappingKeyId> {
        self.keys.iter().map(|key| key.id).collect()
    }

    fn open(&self) -> Result<KeySession, Fault> {
        KeySession::open(&self.module, self.slot, &self.ids())
    }
}

/// A job's end: bytes for the front, or a failure.
pub(super) type Outcome = Result<Zeroizing<Vec<u8>>, wire::Failure>;

/// One thread's session. It is replaced after every failure of a token call: some tokens leave an operation stuck in it.
#[derive(Debug)]
pub(super) struct Worker {
    shared: Arc<Shared>,
    current: Option<KeySession>,
}

/// How an attempt ended, when it was not with bytes.
enum Stop {
    /// The job's own end.
    Failed(wire::Failure),
    /// The session is gone, and nothing was done: one more attempt on another.
    Again(Fault),
}

impl Worker {
    pub(super) fn new(shared: Arc<Shared>, session: KeySession) -> Self {
        Self {
            shared,
            current: Some(session),
        }
    }

    /// Runs a job; says how long the module had it.
    pub(super) fn run(&mut self, request: Request) -> (Outcome, Duration) {
        let started = Instant::now();
        let deadline = request.deadline_ns;
        let Some(job) = request.job else {
            let outcome = Err(failure(
                FailureClass::Unspecified,
                "a request without a job",
            ));
            return (outcome, Duration::ZERO);
        };
        let outcome = match self.attempt(&job, deadline) {
            Ok(bytes) => Ok(bytes),
            Err(Stop::Failed(failure)) => Err(failure),
            Err(Stop::Again(_)) => match self.attempt(&job, deadline) {
                Ok(bytes) => Ok(bytes),
                Err(Stop::Failed(failure)) => Err(failure),
                Err(Stop::Again(fault)) => {
                    Err(failure(FailureClass::SessionLost, fault.to_string()))
                }
            },
        };
        (outcome, started.elapsed())
    }

    fn attempt(&mut self, job: &Job, deadline: u64) -> Result<Zeroizing<Vec<u8>>, Stop> {
        if self.current.is_none() {
            let session = self
                .shared
                .open()
                .map_err(|fault| Stop::from_open(&fault))?;
            self.current = Some(session);
        }
        match job {
            Job::Setup(_) => Err(Stop::failed(FailureClass::Unspecified, "setup twice")),
            Job::Canary(_) => self.canary(deadline).map(|()| Zeroizing::default()),
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
                // The MAC first: bytes that were not stored for this context never reach the RSA key.
                self.verify(&job.key_id, &job.message, &job.mac, deadline)?;
                self.decrypt(job, deadline)
            }
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
        made.map(|mac| Zeroizing::new(mac.to_vec()))
            .map_err(|fault| self.stop(fault, None))
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
        verified.map_err(|fault| self.stop(fault, Some(FailureClass::MacRefused)))
    }

    fn decrypt(&mut self, job: &wire::Unwrap, deadline: u64) -> Result<Zeroizing<Vec<u8>>, Stop> {
        let algorithm = u8::try_from(job.algorithm)
            .ok()
            .and_then(Algorithm::from_number)
            .ok_or_else(|| Stop::failed(FailureClass::Damaged, "unknown algorithm"))?;
        check_deadline(deadline)?;
        let (session, pair) = self.session(&job.key_id)?;
        let decrypted = operation::decrypt(&session.session, pair, algorithm, &job.wrapped);
        // After a good MAC this is never the caller's fault: the canary tells a damaged row from a sick token.
        decrypted.map_err(|fault| self.stop(fault, Some(FailureClass::Damaged)))
    }

    fn session(&self, key: &[u8]) -> Result<(&KeySession, &KeyPair), Stop> {
        let session = self
            .current
            .as_ref()
            .ok_or_else(|| Stop::Again(Fault::new(Class::SessionLost, "the session was lost")))?;
        let pair = WrappingKeyId::from_slice(key)
            .and_then(|id| session.pair(id))
            .ok_or_else(|| {
                Stop::failed(FailureClass::UnknownKey, "the key was not in the setup")
            })?;
        Ok((session, pair))
    }

    /// What a fault means for the job. `input` is what the job's own input being at fault would be called.
    fn stop(&mut self, fault: Fault, input: Option<FailureClass>) -> Stop {
        if fault.class == Class::Input
            && let Some(class @ FailureClass::MacRefused) = input
        {
            return Stop::failed(class, fault.to_string());
        }
        self.current = None;
        match fault.class {
            Class::SessionLost => Stop::Again(fault),
            Class::TokenLost => Stop::failed(FailureClass::TokenLost, fault.to_string()),
            Class::BackOff => Stop::failed(FailureClass::BackOff, fault.to_string()),
            Class::Pin | Class::Untrusted => {
                Stop::failed(FailureClass::Untrusted, fault.to_string())
            }
            Class::Input | Class::Ambiguous | Class::Configuration => {
                match (self.revive(), input) {
                    (Ok(()), Some(class)) => Stop::failed(class, fault.to_string()),
                    (Ok(()), None) => Stop::failed(FailureClass::BackOff, fault.to_string()),
                    (Err(canary), _) => Stop::failed(
                        FailureClass::TokenLost,
                        format!("{fault}; then the canary failed: {canary}"),
                    ),
                }
            }
        }
    }

    /// A new session whose canary passes, or why there is none.
    fn revive(&mut self) -> Result<(), Fault> {
        let session = self.shared.open()?;
        check_all(&self.shared, &session)?;
        self.current = Some(session);
        Ok(())
    }

    fn canary(&mut self, deadline: u64) -> Result<(), Stop> {
        check_deadline(deadline)?;
        let Some(session) = &self.current else {
            return Ok(());
        };
        check_all(&self.shared, session).map_err(|fault| match fault.class {
            // A wrong answer is worse than none: this token must not be used.
            Class::Untrusted => Stop::failed(FailureClass::Untrusted, fault.to_string()),
            Class::SessionLost => {
                self.current = None;
                Stop::Again(fault)
            }
            Class::BackOff => Stop::failed(FailureClass::BackOff, fault.to_string()),
            _ => Stop::failed(FailureClass::TokenLost, fault.to_string()),
        })
    }
}

fn check_all(shared: &Shared, session: &KeySession) -> Result<(), Fault> {
    for key in &shared.keys {
        let Some(pair) = session.pair(key.id) else {
            let detail = format!("key {} is gone", key.id);
            return Err(Fault::new(Class::TokenLost, detail));
        };
        key.canary.check(&session.session, pair)?;
    }
    Ok(())
}

fn check_deadline(deadline: u64) -> Result<(), Stop> {
    if frame::monotonic_ns() < deadline {
        Ok(())
    } else {
        Err(Stop::failed(
            FailureClass::Deadline,
            "deadline passed before the token call",
        ))
    }
}

impl Stop {
    fn failed(class: FailureClass, detail: impl Into<String>) -> Self {
        Self::Failed(failure(class, detail))
    }

    /// A session that cannot be opened, or whose keys are not found, means that the token is gone: the module shows a
    /// token that went away as one that is empty.
    fn from_open(fault: &Fault) -> Self {
        let class = match fault.class {
            Class::BackOff => FailureClass::BackOff,
            Class::Untrusted => FailureClass::Untrusted,
            _ => FailureClass::TokenLost,
        };
        Self::failed(class, fault.to_string())
    }
}

pub(super) fn failure(class: FailureClass, detail: impl Into<String>) -> wire::Failure {
    wire::Failure {
        class: class.into(),
        detail: detail.into(),
    }
}
