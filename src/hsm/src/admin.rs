//! The command's side of an admin worker. A command uses this module to administer tokens and keys; the admin worker
//! process loads the vendor's module.
//!
//! In `serve` and in commands, the vendor's module always runs in a process without network and database. If the module
//! crashes, the command gets an [`AdminError`] with the signal, the function and the path of the module. If the module
//! hangs, the command gets the error after a timeout.
//!
//! Mitigation: M7 of `THREAT_MODEL.md`.

use std::{
    fmt,
    io::{self, Read as _, Write as _},
    ops::RangeInclusive,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, ExitStatus},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use keybroker_core::{
    envelope::{Algorithm, Mac, mac::MacMessage},
    key::{Fingerprint, ObjectId, ObjectIds, Purpose, Sealing, WrappingKeyId},
    state::StateDirectory,
};
use keybroker_worker_protocol::{
    PathError, PinError, PinSource, Proof, Settings, TokenInfo, check_environment,
    frame::{Inbox, Outbox},
    oaep::{self, OaepError},
    report::{Identity, Report},
    wire::{
        self, AdminFailureClass, AdminReply, AdminRequest, CheckKey, DecryptLoop, GenerateKey,
        Identify, InitToken, KnowKeys, ListKeys, ListTokens, LoopCount, MadeSignature, MakeReport,
        MakeSigningKey, OpenToken, RemoveKey, SetUserPin, Sign, TokenEntry, VerifyMac,
        admin_reply::Outcome, admin_request::Job,
    },
};
use zeroize::Zeroize as _;

use crate::process;

mod key_admin;
mod organization;
mod wrapper;

pub use key_admin::KeyAdmin;
pub use organization::{DeviceRelease, OrganizationKey};
pub use wrapper::Wrapper;

/// Name of the hidden command that runs the admin worker.
const WORKER: &str = "token-admin-worker";
/// Shortest timeout for a call that makes a key or initialises a token. Some devices need minutes to make a key.
const SLOW_CALL_TIMEOUT_MIN: Duration = Duration::from_mins(5);
/// Longest time for a worker to end after its socket was closed. The worker's own timeout for the
/// module is shorter.
const EXIT_TIMEOUT: Duration = Duration::from_secs(6);
/// Maximum number of keys in one message. A message with this number of keys is far shorter than
/// the longest frame.
const KEYS_PER_FRAME: usize = 64;
const EXIT_PAUSE: Duration = Duration::from_millis(5);

/// Class of an administrative failure, with its message.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The token refused the request, the module crashed or hung, or the request does not match the
    /// token.
    #[error("{0}")]
    Token(String),
    /// The module cannot be loaded, or no token matches the settings. The module's environment may be incomplete.
    #[error("{0}")]
    NoToken(String),
    /// No PIN was given, or the token rejected the PIN.
    #[error("{0}")]
    Pin(String),
    /// A key, an attribute or a MAC does not have the required value.
    #[error("{0}")]
    Untrusted(String),
    /// The PIN cannot be read.
    #[error(transparent)]
    PinSource(#[from] PinError),
    /// The module's environment refers to a file that a user other than root and the user of this
    /// process can change.
    #[error(transparent)]
    Environment(#[from] PathError),
    /// The public key of a key on the token cannot be used.
    #[error(transparent)]
    PublicKey(#[from] OaepError),
    /// The worker cannot be started.
    #[error("cannot start an admin worker: {0}")]
    Start(#[source] io::Error),
}

impl From<wire::AdminFailure> for AdminError {
    fn from(failure: wire::AdminFailure) -> Self {
        match failure.class() {
            AdminFailureClass::Pin => Self::Pin(failure.detail),
            AdminFailureClass::Untrusted => Self::Untrusted(failure.detail),
            AdminFailureClass::NoToken => Self::NoToken(failure.detail),
            AdminFailureClass::Token | AdminFailureClass::Unspecified => {
                Self::Token(failure.detail)
            }
        }
    }
}

/// A token as `token list` shows it.
#[derive(Clone, Debug)]
pub struct Listed {
    /// Slot number. Slot numbers may change when tokens are initialised.
    pub slot: u64,
    /// Label, serial number and model of the token.
    pub info: TokenInfo,
    /// Whether the token is initialised.
    pub initialised: bool,
    /// Whether the user PIN is locked, or will be locked after one more wrong PIN.
    pub pin_state: String,
    /// The supported modulus lengths of RSA-OAEP, in bits; `None` if the token does not list the mechanism.
    pub oaep_bits: Option<RangeInclusive<u64>>,
    /// Whether the token lists HMAC with SHA-256.
    pub sha256_hmac: bool,
    /// Whether the settings choose this token.
    pub is_chosen: bool,
    /// The shortest and the longest PIN that the token accepts, in bytes.
    pub pin_bytes: PinBytes,
}

/// The lengths of PINs that a token accepts, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PinBytes {
    min: u64,
    max: u64,
}

impl PinBytes {
    /// Whether a token accepts a PIN of this length. A token that reports a longest PIN of 0, or one below the shortest PIN, reports no
    /// limit.
    pub fn accept(self, bytes: usize) -> bool {
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        let has_limit = self.max >= self.min.max(1);
        bytes >= self.min && (!has_limit || bytes <= self.max)
    }
}

impl fmt::Display for PinBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {} bytes", self.min, self.max)
    }
}

/// A key on the token, with the results of its attribute check and its self-test.
#[derive(Clone, Debug)]
pub struct CheckedKey {
    /// The id of the key.
    pub id: WrappingKeyId,
    /// The `CKA_ID` of the key's objects on the token.
    pub objects: ObjectIds,
    /// Fingerprint of the public key.
    pub fingerprint: Fingerprint,
    /// DER SubjectPublicKeyInfo.
    pub spki: Vec<u8>,
    /// Modulus length in bits.
    pub modulus_bits: usize,
    /// The algorithm that the capability probe chose; `None` if the key was rejected.
    pub algorithm: Option<Algorithm>,
    /// The results of the attribute check of the RSA private key.
    pub private: Vec<Finding>,
    /// The results of the attribute check of the integrity key.
    pub integrity: Vec<Finding>,
    /// Reason why the key must not be used; `None` if the key passed all checks.
    pub problem: Option<String>,
    /// Names of the negative tests that cannot be run on this token.
    pub not_tried: Vec<String>,
    /// The content of the integrity key's file, if the integrity key was made in the memory of the worker. The caller
    /// must store the content: no other copy of the integrity key exists after the worker has ended.
    pub integrity_key_file: Option<String>,
    /// The purpose of the key, according to its attributes.
    pub purpose: Purpose,
    /// The protection of a sealed wrapping key; `None` for a plain wrapping key, and for a key that was rejected.
    pub sealing: Option<Sealing>,
}

/// The result of the attribute check for one attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The name of the attribute in the standard, such as `CKA_SENSITIVE`.
    pub attribute: String,
    /// The value that was found and the value that is required.
    pub verdict: String,
    /// Whether this attribute permits the use of the key.
    pub passes: bool,
}

/// A key that signs the transcript of a ceremony.
#[derive(Clone, Debug)]
pub struct SigningKey {
    /// `CKA_ID` of its objects.
    pub object: ObjectId,
    /// DER SubjectPublicKeyInfo.
    pub spki: Vec<u8>,
    /// The results of the attribute check.
    pub attributes: Vec<Finding>,
}

/// Lists all slots with a token, initialised or not. Needs no PIN.
pub fn list_tokens(program: &Path, settings: &Settings) -> Result<Vec<Listed>, AdminError> {
    let mut worker = Worker::start(program, settings)?;
    let job = Job::ListTokens(ListTokens {
        setup: Some(settings.to_setup(Path::new(""))),
    });
    match worker.ask(job, Duration::ZERO)? {
        Outcome::Tokens(list) => Ok(list.tokens.into_iter().map(listed).collect()),
        _ => Err(unexpected()),
    }
}

/// Initialises a token with a label and sets its user PIN. If the token is already initialised, `erase_serial` must be
/// its serial number. Initialising a token again erases its content permanently. The PINs of this token are removed
/// from the record of PINs. Returns the token and a note for the operator, if there is one.
pub fn init_token(
    program: &Path,
    settings: &Settings,
    state: &StateDirectory,
    label: &str,
    so_pin: &PinSource,
    user_pin: &PinSource,
    erase_serial: Option<&str>,
) -> Result<(TokenInfo, Option<String>), AdminError> {
    let mut worker = Worker::start(program, settings)?;
    let job = Job::InitToken(InitToken {
        setup: Some(settings.to_setup(state.path())),
        label: label.to_owned(),
        so_pin: Some(so_pin.to_wire()?),
        user_pin: Some(user_pin.to_wire()?),
        erase_serial: erase_serial.unwrap_or_default().to_owned(),
    });
    match worker.ask(job, SLOW_CALL_TIMEOUT_MIN)? {
        Outcome::Token(entry) => {
            let note = (!entry.note.is_empty()).then(|| entry.note.clone());
            Ok((listed(entry).info, note))
        }
        _ => Err(unexpected()),
    }
}

/// Sets the user PIN of an initialised token, which also unlocks a locked user PIN. The PIN of the security officer is
/// presented only to the token with this serial number. The PINs of this token are removed from the record of PINs. Returns
/// the token and a note for the operator, if there is one.
pub fn set_user_pin(
    program: &Path,
    settings: &Settings,
    state: &StateDirectory,
    serial: &str,
    so_pin: &PinSource,
    user_pin: &PinSource,
) -> Result<(TokenInfo, Option<String>), AdminError> {
    let mut worker = Worker::start(program, settings)?;
    let job = Job::SetUserPin(SetUserPin {
        setup: Some(settings.to_setup(state.path())),
        so_pin: Some(so_pin.to_wire()?),
        user_pin: Some(user_pin.to_wire()?),
        serial: serial.to_owned(),
    });
    match worker.ask(job, SLOW_CALL_TIMEOUT_MIN)? {
        Outcome::Token(entry) => {
            let note = (!entry.note.is_empty()).then(|| entry.note.clone());
            Ok((listed(entry).info, note))
        }
        _ => Err(unexpected()),
    }
}

/// A token to which an admin worker is logged in.
#[derive(Debug)]
pub struct Admin {
    worker: Mutex<Worker>,
    pid: u32,
    info: TokenInfo,
    is_login_of_another: bool,
}

impl Admin {
    /// Logs in if the record of PINs in the state directory allows the login. If `write` is true, the session is
    /// read-write, so that keys can be made. `program` is the running binary, which also contains the worker. If
    /// several tokens match the settings, the token whose serial number is in the registry is used.
    pub fn open(
        program: &Path,
        settings: &Settings,
        state: &StateDirectory,
        pin: &PinSource,
        write: bool,
        serials: &[&str],
    ) -> Result<Self, AdminError> {
        let mut worker = Worker::start(program, settings)?;
        let job = Job::Open(OpenToken {
            setup: Some(settings.to_setup(state.path())),
            pin: Some(pin.to_wire()?),
            write,
            serials: serials.iter().copied().map(str::to_owned).collect(),
        });
        match worker.ask(job, Duration::ZERO)? {
            Outcome::Token(entry) => Ok(Self {
                pid: worker.child.id(),
                worker: Mutex::new(worker),
                is_login_of_another: entry.is_login_of_another,
                info: listed(entry).info,
            }),
            _ => Err(unexpected()),
        }
    }

    /// Returns the information of the open token.
    pub fn info(&self) -> &TokenInfo {
        &self.info
    }

    /// Whether the token answered the login with `CKR_USER_ALREADY_LOGGED_IN`, because another process was already
    /// logged in.
    pub fn is_login_of_another(&self) -> bool {
        self.is_login_of_another
    }

    /// Process id of the worker.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    fn worker(&self) -> MutexGuard<'_, Worker> {
        self.worker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the worker the `CKA_ID` of each key's objects. For other keys, the worker looks for the `CKA_ID` that `key
    /// generate` sets.
    pub fn know<'a>(
        &self,
        keys: impl IntoIterator<Item = (WrappingKeyId, &'a ObjectIds)>,
    ) -> Result<(), AdminError> {
        let keys: Vec<wire::setup::Key> = keys
            .into_iter()
            .map(|(id, objects)| wire::setup::Key {
                id: id.as_bytes().to_vec(),
                fingerprint: Vec::new(),
                private_cka_id: objects.private_bytes().to_vec(),
                integrity_cka_id: objects.integrity_bytes().to_vec(),
                token_serial: String::new(),
                may_be_elsewhere: false,
                proofs: Vec::new(),
                // The worker takes the purpose from the attributes of the key.
                is_sealed: false,
            })
            .collect();
        for some in keys.chunks(KEYS_PER_FRAME) {
            let job = Job::KnowKeys(KnowKeys {
                keys: some.to_vec(),
            });
            match self.worker().ask(job, Duration::ZERO)? {
                Outcome::Known(_) => {}
                _ => return Err(unexpected()),
            }
        }
        Ok(())
    }

    /// Returns the `CKA_ID` of all RSA private keys on the token.
    pub fn key_ids(&self) -> Result<Vec<ObjectId>, AdminError> {
        match self
            .worker()
            .ask(Job::ListKeys(ListKeys {}), Duration::ZERO)?
        {
            Outcome::KeyIds(list) => list
                .ids
                .iter()
                .map(|id| ObjectId::from_slice(id).ok_or_else(unexpected))
                .collect(),
            _ => Err(unexpected()),
        }
    }

    /// Whether the token has a key of [`Admin::make_signing_key`].
    pub fn has_signing_key(&self) -> Result<bool, AdminError> {
        match self
            .worker()
            .ask(Job::ListKeys(ListKeys {}), Duration::ZERO)?
        {
            Outcome::KeyIds(list) => Ok(list.has_signing_key),
            _ => Err(unexpected()),
        }
    }

    /// Makes a wrapping key and its integrity key, reads back every attribute and runs a self-test with both. If a
    /// check fails, the worker removes the keys from the token. Making a key does not add the key to the registry.
    pub fn generate_key(
        &self,
        purpose: Purpose,
        modulus_bits: u32,
    ) -> Result<CheckedKey, AdminError> {
        self.generate(GenerateKey {
            modulus_bits,
            is_sealed: purpose == Purpose::Sealed,
            ..GenerateKey::default()
        })
    }

    /// Makes a plain wrapping key with this id, as [`Admin::generate_key`] does. The worker refuses an id that an object on the
    /// token has.
    pub fn generate_key_with_id(
        &self,
        modulus_bits: u32,
        id: WrappingKeyId,
    ) -> Result<CheckedKey, AdminError> {
        self.generate(GenerateKey {
            modulus_bits,
            key_id: id.as_bytes().to_vec(),
            is_sealed: false,
        })
    }

    fn generate(&self, job: GenerateKey) -> Result<CheckedKey, AdminError> {
        let job = Job::GenerateKey(job);
        match self.worker().ask(job, SLOW_CALL_TIMEOUT_MIN)? {
            Outcome::Key(key) => checked(key),
            _ => Err(unexpected()),
        }
    }

    /// Describes the token and its module, with the SHA-256 of the module's file.
    pub fn identity(&self) -> Result<Identity, AdminError> {
        match self
            .worker()
            .ask(Job::Identify(Identify {}), Duration::ZERO)?
        {
            Outcome::Identity(text) => serde_json::from_str(&text).map_err(|_| unexpected()),
            _ => Err(unexpected()),
        }
    }

    /// Makes an RSA key pair on the token that can only sign, and reads back every attribute. A token has at most one
    /// such key.
    pub fn make_signing_key(&self) -> Result<SigningKey, AdminError> {
        let job = Job::MakeSigningKey(MakeSigningKey {});
        match self.worker().ask(job, SLOW_CALL_TIMEOUT_MIN)? {
            Outcome::SigningKey(key) => Ok(SigningKey {
                object: ObjectId::from_slice(&key.cka_id).ok_or_else(unexpected)?,
                spki: key.spki,
                attributes: found(key.attributes),
            }),
            _ => Err(unexpected()),
        }
    }

    /// Signs a message with a key of [`Admin::make_signing_key`].
    pub fn sign(&self, object: &ObjectId, message: &[u8]) -> Result<MadeSignature, AdminError> {
        let job = Job::Sign(Sign {
            cka_id: object.as_bytes().to_vec(),
            message: message.to_vec(),
        });
        match self.worker().ask(job, Duration::ZERO)? {
            Outcome::MadeSignature(made) => Ok(made),
            _ => Err(unexpected()),
        }
    }

    /// Checks the attributes of one key and runs a self-test with it.
    pub fn check(&self, id: WrappingKeyId) -> Result<CheckedKey, AdminError> {
        self.check_key(id, false)
    }

    /// Makes an integrity key in the memory of the worker for an RSA key that has no integrity key, and checks both
    /// keys.
    pub fn check_with_new_integrity_key(
        &self,
        id: WrappingKeyId,
    ) -> Result<CheckedKey, AdminError> {
        self.check_key(id, true)
    }

    fn check_key(
        &self,
        id: WrappingKeyId,
        make_integrity_key: bool,
    ) -> Result<CheckedKey, AdminError> {
        let job = Job::CheckKey(CheckKey {
            key_id: id.as_bytes().to_vec(),
            make_integrity_key,
        });
        match self.worker().ask(job, Duration::ZERO)? {
            Outcome::Key(key) => checked(key),
            _ => Err(unexpected()),
        }
    }

    /// Permanently removes the objects of a wrapping key and its integrity key from the token. Returns the number of
    /// removed objects, which is 0 if the token has none of them.
    pub fn remove_key(&self, id: WrappingKeyId) -> Result<u32, AdminError> {
        self.remove(RemoveKey {
            key_id: id.as_bytes().to_vec(),
            ..RemoveKey::default()
        })
    }

    /// Removes the objects of a registered wrapping key, as [`remove_key`](Self::remove_key) does. The token refuses with
    /// [`AdminError::Untrusted`] if the RSA private key that it found has another fingerprint, or if the integrity key that it
    /// found did not make the MAC of the row that names the objects. `place` is this row; `None` if the objects were authenticated
    /// before.
    pub fn remove_registered(
        &self,
        id: WrappingKeyId,
        fingerprint: Fingerprint,
        place: Option<&Proof>,
    ) -> Result<u32, AdminError> {
        let (place_message, place_mac) = place.map_or_else(Default::default, |proof| {
            (proof.message.clone(), proof.mac.to_vec())
        });
        self.remove(RemoveKey {
            key_id: id.as_bytes().to_vec(),
            fingerprint: fingerprint.0.to_vec(),
            place_message,
            place_mac,
            check_only: false,
        })
    }

    /// Removes nothing. Fails if the token has a private key with this fingerprint, under any `CKA_ID`.
    pub fn check_removed(
        &self,
        id: WrappingKeyId,
        fingerprint: Fingerprint,
    ) -> Result<(), AdminError> {
        let checked = self.remove(RemoveKey {
            key_id: id.as_bytes().to_vec(),
            fingerprint: fingerprint.0.to_vec(),
            check_only: true,
            ..RemoveKey::default()
        });
        checked.map(drop)
    }

    fn remove(&self, job: RemoveKey) -> Result<u32, AdminError> {
        let job = Job::RemoveKey(job);
        match self.worker().ask(job, SLOW_CALL_TIMEOUT_MIN)? {
            Outcome::Removed(count) => Ok(count),
            _ => Err(unexpected()),
        }
    }

    /// Computes a MAC with the integrity key of this wrapping key.
    pub fn mac(&self, id: WrappingKeyId, message: &MacMessage) -> Result<Mac, AdminError> {
        let job = Job::Mac(wire::Mac {
            key_id: id.as_bytes().to_vec(),
            message: message.as_bytes().to_vec(),
        });
        match self.worker().ask(job, Duration::ZERO)? {
            Outcome::Mac(mac) => mac.try_into().map_err(|_| unexpected()),
            _ => Err(unexpected()),
        }
    }

    /// Returns whether a MAC is correct. The worker searches for each integrity key once and then keeps the key's
    /// handle.
    pub fn verify(
        &self,
        id: WrappingKeyId,
        message: &MacMessage,
        mac: &Mac,
    ) -> Result<bool, AdminError> {
        let job = Job::VerifyMac(VerifyMac {
            key_id: id.as_bytes().to_vec(),
            message: message.as_bytes().to_vec(),
            mac: mac.to_vec(),
        });
        match self.worker().ask(job, Duration::ZERO)? {
            Outcome::Verified(verified) => Ok(verified),
            _ => Err(unexpected()),
        }
    }

    /// Decrypts in a loop with `threads` threads for `seconds` seconds, to measure the token without the broker.
    /// Returns the number of operations, and the number of times that a thread waited for something other than the CPU.
    pub fn decrypt_loop(
        &self,
        id: WrappingKeyId,
        threads: u32,
        seconds: u32,
    ) -> Result<LoopCount, AdminError> {
        let job = Job::DecryptLoop(DecryptLoop {
            key_id: id.as_bytes().to_vec(),
            threads,
            seconds,
        });
        let mut worker = self.worker();
        let least = worker.call_timeout + Duration::from_secs(seconds.into());
        match worker.ask(job, least)? {
            Outcome::Count(count) => Ok(count),
            _ => Err(unexpected()),
        }
    }

    /// Tests the capabilities of the token. If `write` is true, the worker also makes temporary
    /// keys on the token, and removes them. Logs out at the end.
    pub fn report(&self, pin: &PinSource, write: bool, serial: bool) -> Result<Report, AdminError> {
        let job = Job::MakeReport(MakeReport {
            pin: Some(pin.to_wire()?),
            write,
            serial,
        });
        match self.worker().ask(job, SLOW_CALL_TIMEOUT_MIN)? {
            Outcome::Report(text) => serde_json::from_str(&text).map_err(|_| unexpected()),
            _ => Err(unexpected()),
        }
    }
}

fn unexpected() -> AdminError {
    AdminError::Token("the admin worker sent an unexpected reply".to_owned())
}

fn listed(entry: TokenEntry) -> Listed {
    Listed {
        slot: entry.slot,
        info: entry.token.unwrap_or_default().into(),
        initialised: entry.initialised,
        pin_state: entry.pin_state,
        oaep_bits: entry.oaep.map(|oaep| oaep.bits_min..=oaep.bits_max),
        sha256_hmac: entry.sha256_hmac,
        is_chosen: entry.is_chosen,
        pin_bytes: PinBytes {
            min: entry.pin_bytes_min,
            max: entry.pin_bytes_max,
        },
    }
}

fn found(findings: Vec<wire::AttributeFinding>) -> Vec<Finding> {
    findings
        .into_iter()
        .map(|finding| Finding {
            attribute: finding.attribute,
            verdict: finding.verdict,
            passes: finding.passes,
        })
        .collect()
}

fn checked(checked: wire::CheckedKey) -> Result<CheckedKey, AdminError> {
    let key = checked.key.ok_or_else(unexpected)?;
    let sealing = key.sealing().to_key();
    let algorithm = match key.algorithm {
        0 => None,
        number => Some(
            u8::try_from(number)
                .ok()
                .and_then(Algorithm::from_number)
                .ok_or_else(unexpected)?,
        ),
    };
    Ok(CheckedKey {
        id: WrappingKeyId::from_slice(&key.id).ok_or_else(unexpected)?,
        objects: ObjectIds::from_slices(&checked.private_cka_id, &checked.integrity_cka_id)
            .ok_or_else(unexpected)?,
        fingerprint: oaep::fingerprint(&key.spki),
        spki: key.spki,
        modulus_bits: usize::try_from(checked.modulus_bits).map_err(|_| unexpected())?,
        algorithm,
        private: found(checked.private_key),
        integrity: found(checked.integrity_key),
        problem: (!checked.problem.is_empty()).then_some(checked.problem),
        not_tried: checked.not_tried,
        integrity_key_file: Some(checked.integrity_key_file).filter(|text| !text.is_empty()),
        purpose: if checked.is_sealed {
            Purpose::Sealed
        } else {
            Purpose::Plain
        },
        sealing,
    })
}

/// An admin worker: its process and the command's end of the socket. Dropping this value ends the process.
#[derive(Debug)]
struct Worker {
    child: Child,
    stream: UnixStream,
    inbox: Inbox,
    outbox: Outbox,
    module: PathBuf,
    call_timeout: Duration,
    /// The function of the module that the worker called last.
    calling: Option<String>,
    /// The reason why the worker can no longer be used; `None` while it can be used.
    lost: Option<String>,
}

impl Worker {
    fn start(program: &Path, settings: &Settings) -> Result<Self, AdminError> {
        check_environment(&settings.environment)?;
        let (mut command, stream) =
            process::command(program, settings, WORKER).map_err(AdminError::Start)?;
        let child = command.spawn().map_err(AdminError::Start)?;
        // `command` contains the worker's end of the socket. If this process kept the worker's end open, it could not
        // detect that the worker ended.
        drop(command);
        Ok(Self {
            child,
            stream,
            inbox: Inbox::default(),
            outbox: Outbox::default(),
            module: settings.module.clone(),
            call_timeout: Duration::from_millis(settings.call_timeout_ms),
            calling: None,
            lost: None,
        })
    }

    /// Sends a job and waits for its answer. Each call of the module may take as long as the configured timeout or
    /// `least`, whichever is longer.
    fn ask(&mut self, job: Job, least: Duration) -> Result<Outcome, AdminError> {
        if let Some(lost) = &self.lost {
            return Err(AdminError::Token(lost.clone()));
        }
        let asked = self.exchange(job, self.call_timeout.max(least));
        let failure = match asked {
            Ok(Outcome::Failure(failure)) => return Err(failure.into()),
            Ok(outcome) => return Ok(outcome),
            Err(error) => self.explain(&error, self.call_timeout.max(least)),
        };
        self.lost = Some(failure.clone());
        Err(AdminError::Token(failure))
    }

    fn exchange(&mut self, job: Job, timeout: Duration) -> io::Result<Outcome> {
        let mut request = AdminRequest { job: Some(job) };
        self.outbox.push(&request);
        match &mut request.job {
            Some(Job::Mac(job)) => job.message.zeroize(),
            Some(Job::VerifyMac(job)) => job.message.zeroize(),
            Some(Job::ImportOrganizationKey(job)) => job.pkcs8.zeroize(),
            _ => {}
        }
        drop(request);
        self.stream.set_write_timeout(Some(timeout))?;
        let written = self.stream.write_all(self.outbox.rest());
        self.outbox.sent(self.outbox.rest().len());
        written?;
        let mut deadline = Instant::now() + timeout;
        loop {
            while let Some(reply) = self.inbox.take::<AdminReply>()? {
                match reply.outcome {
                    Some(Outcome::Calling(function)) => {
                        self.calling = Some(function);
                        deadline = Instant::now() + timeout;
                    }
                    Some(outcome) => return Ok(outcome),
                    None => return Err(io::ErrorKind::InvalidData.into()),
                }
            }
            let remaining = deadline.saturating_duration_since(Instant::now());
            if remaining.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.stream.set_read_timeout(Some(remaining))?;
            match self.stream.read(self.inbox.room()) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.inbox.received(count),
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                    ) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Returns a message that explains why the worker did not answer.
    fn explain(&mut self, error: &io::Error, timeout: Duration) -> String {
        let place = process::describe_call(self.calling.as_deref(), &self.module);
        match error.kind() {
            io::ErrorKind::TimedOut => format!(
                "the PKCS#11 module did not answer within {} s {place}; its process was ended. If the device needs longer, raise \
                 `token.call_timeout_ms`",
                timeout.as_secs()
            ),
            _ => match self.wait(EXIT_TIMEOUT) {
                Some(status) => format!(
                    "the process of the PKCS#11 module {} {place}; the defect is in the module or in a library that it loads",
                    process::describe_end(status)
                ),
                None => format!("the process of the PKCS#11 module failed {place}: {error}"),
            },
        }
    }

    /// Waits for the worker to end, for at most `timeout`.
    fn wait(&mut self, timeout: Duration) -> Option<ExitStatus> {
        let until = Instant::now() + timeout;
        loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Some(status);
            }
            if Instant::now() > until {
                return None;
            }
            thread::sleep(EXIT_PAUSE);
        }
    }
}

impl Drop for Worker {
    /// Gives the worker time to close its sessions. If the module hangs, the worker ends itself. SIGKILL is sent only
    /// if the worker does not end, because SIGKILL in the middle of a login can damage a SoftHSM token.
    fn drop(&mut self) {
        let _already_closed = self.stream.shutdown(std::net::Shutdown::Write);
        if self.wait(EXIT_TIMEOUT).is_none() {
            let _ended_meanwhile = self.child.kill();
            let _reaped = self.child.wait();
        }
    }
}
