//! Starts one worker: starts the process, sends the setup, and compares the keys on the token with the expected keys.

use std::{collections::HashMap, path::Path, sync::Arc, time::Duration};

use tokio::{net::UnixStream, process::Child};
use tokio_util::sync::CancellationToken;

use keybroker_core::{
    envelope::Algorithm,
    key::{Purpose, WrappingKeyId},
    state::StateDirectory,
};
use keybroker_worker_protocol::{
    ExpectedKey, Settings, check_environment,
    oaep::{self, WrapKey},
    resolve_pin_file,
    wire::{self, FailureClass, Ready, Request, Setup, reply::Outcome, request},
};

use crate::{KeyProblem, TokenKey, UnusableKey, found::Found, link, process};

/// Longest time for a worker to become ready: login, attribute check and self-test on a slow device.
const READY_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest time for a worker to end after its socket was closed.
pub(super) const EXIT_TIMEOUT: Duration = Duration::from_secs(6);

/// A worker that is ready for jobs.
pub(super) struct Started {
    pub(super) child: Child,
    pub(super) stream: UnixStream,
    pub(super) pid: u32,
    pub(super) found: Found,
}

/// A failure that prevented a worker from becoming ready.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    /// The class that the worker reported; `None` if the worker failed before it could report a class.
    pub(super) class: Option<FailureClass>,
    pub(super) detail: String,
}

/// The reason why a worker did not become ready. The state machine reacts differently to each reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotReady {
    /// The process ended, hung or could not be started; this failure does not show a problem of the token.
    Crashed,
    /// The token has no free session.
    Busy,
    /// The token is unavailable, or the configuration does not match the token.
    Unavailable,
    /// A login failed with a return code that does not concern the PIN.
    Login,
    /// The PIN was rejected or cannot be read, or the token must not be given the PIN again.
    Pin,
    /// A key, an attribute or a self-test is wrong.
    Untrusted,
}

impl NotReady {
    /// Classifies a failure. `first` is true for the first attempt of this process. In a later attempt, a missing key
    /// means that the token is unavailable, because an earlier worker found the key.
    pub(crate) fn of(class: FailureClass, first: bool) -> Self {
        match class {
            FailureClass::BackOff => Self::Busy,
            FailureClass::Login => Self::Login,
            FailureClass::Pin => Self::Pin,
            FailureClass::Untrusted => Self::Untrusted,
            FailureClass::KeyMissing if first => Self::Untrusted,
            _ => Self::Unavailable,
        }
    }
}

impl Failure {
    fn new(class: FailureClass, detail: impl Into<String>) -> Self {
        Self {
            class: Some(class),
            detail: detail.into(),
        }
    }

    /// Creates a failure that the worker did not report itself.
    fn crashed(detail: impl Into<String>) -> Self {
        Self {
            class: None,
            detail: detail.into(),
        }
    }

    /// Returns the reason for the failure, for the state machine. `first` is true for the first attempt of this
    /// process.
    pub(super) fn why(&self, first: bool) -> NotReady {
        self.class
            .map_or(NotReady::Crashed, |class| NotReady::of(class, first))
    }
}

/// Starts a worker and waits until it is ready. If the worker fails or the broker stops before the worker is ready,
/// this function tells the worker to end and waits for its end. A worker gets time to end before it is killed, because
/// it may be logging in.
pub(super) async fn worker(
    program: &Path,
    settings: &Settings,
    expected: &[ExpectedKey],
    state: &StateDirectory,
    stop: &CancellationToken,
) -> Result<Started, Failure> {
    let setup = setup(settings, expected, state)?;
    let mut calling = None;
    let (child, stream) = link::spawn(program, settings).map_err(|error| {
        Failure::crashed(format!("cannot start {}: {error}", program.display()))
    })?;
    let pid = child.id().unwrap_or(0);
    let ready = tokio::select! {
        () = stop.cancelled() => Err(Failure::crashed("the broker is stopping")),
        ready = ready(&stream, setup, expected, &mut calling) => ready,
    };
    match ready {
        Ok(found) => Ok(Started {
            child,
            stream,
            pid,
            found,
        }),
        Err(mut failure) => {
            link::close(&stream);
            let ended = link::reap(child, EXIT_TIMEOUT).await;
            // The worker reported no failure, so its exit status and the function that it called last are the best
            // explanation.
            if failure.class.is_none() && !stop.is_cancelled() {
                let place = process::describe_call(calling.as_deref(), &settings.module);
                let end =
                    ended.map(|status| format!(": the worker {}", process::describe_end(status)));
                failure.detail = format!("{} {place}{}", failure.detail, end.unwrap_or_default());
            }
            Err(failure)
        }
    }
}

/// Sends the setup and waits for the worker's report.
async fn ready(
    stream: &UnixStream,
    setup: Setup,
    expected: &[ExpectedKey],
    calling: &mut Option<String>,
) -> Result<Found, Failure> {
    let request = Request {
        id: 0,
        deadline_ns: 0,
        job: Some(request::Job::Setup(Box::new(setup))),
    };
    let reply = tokio::time::timeout(READY_TIMEOUT, link::exchange(stream, &request, calling))
        .await
        .map_err(|_| {
            Failure::crashed(
                "the token worker was not ready within 30 s because the PKCS#11 module hangs",
            )
        })?
        .map_err(|error| {
            Failure::crashed(format!(
                "the token worker ended before it was ready ({error})"
            ))
        })?;
    match reply.outcome {
        Some(Outcome::Ready(ready)) => check(ready, expected),
        Some(Outcome::Failure(failure)) => Err(Failure {
            class: Some(failure.class()),
            detail: failure.detail,
        }),
        Some(Outcome::Output(_) | Outcome::Calling(_)) | None => {
            Err(Failure::crashed("the worker sent an unexpected reply"))
        }
    }
}

fn setup(
    settings: &Settings,
    expected: &[ExpectedKey],
    state: &StateDirectory,
) -> Result<Setup, Failure> {
    if settings.pin_file.is_none() && !settings.is_without_login() {
        return Err(Failure::new(
            FailureClass::Configuration,
            "no PIN: set `token.pin_file` to a file that only this user can read",
        ));
    }
    check_environment(&settings.environment)
        .map_err(|error| Failure::new(FailureClass::Configuration, error.to_string()))?;
    // The front resolves the path, because the worker does not have the front's environment.
    let pin_file = settings
        .pin_file
        .as_deref()
        .map(resolve_pin_file)
        .transpose();
    let pin_file = pin_file
        .map_err(|error| Failure::new(FailureClass::Configuration, error.to_string()))?
        .map(|path| path.to_string_lossy().into_owned());
    Ok(Setup {
        pin_file: pin_file.unwrap_or_default(),
        sessions: u32::try_from(settings.sessions_per_worker).unwrap_or(1),
        keys: expected
            .iter()
            .map(|key| wire::setup::Key {
                id: key.id.as_bytes().to_vec(),
                fingerprint: key.fingerprint.0.to_vec(),
                private_cka_id: key.objects.private_bytes().to_vec(),
                integrity_cka_id: key.objects.integrity_bytes().to_vec(),
                token_serial: key.token_serial.clone(),
                may_be_elsewhere: key.may_be_elsewhere,
                is_sealed: key.purpose == Purpose::Sealed,
                proofs: key
                    .proofs
                    .iter()
                    .map(|proof| wire::setup::Proof {
                        message: proof.message.clone(),
                        mac: proof.mac.to_vec(),
                    })
                    .collect(),
            })
            .collect(),
        ..settings.to_setup(state.path())
    })
}

/// Compares the keys that a worker found with the keys that must be on the token.
fn check(ready: Ready, expected: &[ExpectedKey]) -> Result<Found, Failure> {
    let untrusted = |what: String| Failure::new(FailureClass::Untrusted, what);
    let mut keys = Vec::new();
    let mut wrap = HashMap::new();
    for key in ready.keys {
        let id = WrappingKeyId::from_slice(&key.id).ok_or_else(|| {
            untrusted("the worker reported a key id that does not have 16 bytes".to_owned())
        })?;
        let algorithm = u8::try_from(key.algorithm)
            .ok()
            .and_then(Algorithm::from_number)
            .ok_or_else(|| untrusted("the worker reported an unknown algorithm".to_owned()))?;
        let public =
            WrapKey::new(&key.spki, algorithm).map_err(|error| untrusted(error.to_string()))?;
        keys.push(TokenKey {
            id,
            fingerprint: oaep::fingerprint(&key.spki),
            modulus_bits: public.modulus_bits(),
            algorithm,
            sealing: key.sealing().to_key(),
            spki: key.spki,
        });
        wrap.insert(id, Arc::new(public));
    }
    let unusable = unusable(ready.unusable)?;
    let is_of = |key: &TokenKey, wanted: &ExpectedKey| {
        key.id == wanted.id
            && key.fingerprint == wanted.fingerprint
            && key.sealing.is_some() == (wanted.purpose == Purpose::Sealed)
    };
    let is_reported = |wanted: &ExpectedKey| {
        wanted.may_be_elsewhere
            || keys.iter().any(|key| is_of(key, wanted))
            || unusable.iter().any(|key| key.id == wanted.id)
    };
    let same = keys
        .iter()
        .all(|key| expected.iter().any(|wanted| is_of(key, wanted)))
        && unusable
            .iter()
            .all(|key| expected.iter().any(|wanted| key.id == wanted.id))
        && expected.iter().all(is_reported);
    if !same {
        return Err(untrusted(
            "the keys that the worker reported are not the expected keys".to_owned(),
        ));
    }
    Ok(Found {
        info: ready.token.unwrap_or_default().into(),
        keys: keys.into(),
        unusable: unusable.into(),
        wrap,
    })
}

/// Reads the worker's report about the keys that the worker could not use.
fn unusable(reported: Vec<wire::UnusableKey>) -> Result<Vec<UnusableKey>, Failure> {
    let unusable = reported.into_iter().map(|key| {
        let id = WrappingKeyId::from_slice(&key.id).ok_or_else(|| {
            Failure::new(
                FailureClass::Untrusted,
                "the worker reported a key id that does not have 16 bytes",
            )
        })?;
        let problem = if key.is_missing {
            KeyProblem::Missing(key.detail)
        } else {
            KeyProblem::Untrusted(key.detail)
        };
        Ok(UnusableKey { id, problem })
    });
    unusable.collect()
}
