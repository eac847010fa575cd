//! The front's side of the token: the [`Token`] that the broker calls, and the [`Supervisor`] that implements it.
//!
//! The vendor's module never shares a process with the network. The [`Supervisor`] starts worker
//! processes. A worker loads the module, logs in once and serves a fixed set of jobs over a socket
//! pair. The [`Supervisor`] replaces a worker that crashes, hangs or loses its token. The worker is
//! in the crate `pkcs11`, on which this crate does not depend. The crate `worker-protocol` contains
//! the code that the front and the workers share. Only the worker uses PKCS#11 mechanisms,
//! attributes, handles and return codes. In this crate, a failure is an [`Error`] class with a
//! description for the log.
//!
//! Not protected: an attacker who runs code as the operating-system user of the worker is not isolated from the worker.

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use keybroker_core::{
    call::Timestamp,
    envelope::{Algorithm, Context, Envelope, Mac, mac::MacMessage},
    error::{self, Reason},
    key::{Fingerprint, Sealing, WrappingKeyId},
    secret::KeyMaterial,
};

pub mod admin;
mod caller;
mod found;
mod job;
mod link;
mod measures;
mod pool;
mod process;
mod queue;
mod release;
mod rewrap;
mod start;
mod supervisor;

pub use caller::Caller;
pub use keybroker_worker_protocol::{
    Assurance, ExpectedKey, Proof, Settings, TokenInfo,
    recipient::{RecipientError, RecipientKey, SPKI_BYTES_MAX},
    unpadded,
};
pub use pool::{Entry, Pool};
pub use queue::{Calls, Entered, Planned, leave, leave_if_slow};
pub use release::{Recipient, Sealed};
pub use supervisor::{StartupError, Supervisor};

/// The operations of a token that the broker needs. Only [`Token::unwrap`], [`Token::release`] and [`Token::rewrap`] use the RSA
/// key, after the verification of the MAC.
#[async_trait]
pub trait Token: Send + Sync + fmt::Debug + 'static {
    /// Wraps key material. The public-key operation runs in software, and the token computes the MAC.
    async fn wrap(
        &self,
        key: WrappingKeyId,
        context: Context<'_>,
        material: &KeyMaterial,
        caller: &Caller,
    ) -> Result<Envelope, Error>;

    /// Verifies the MAC of the context and the wrapped bytes, then decrypts the wrapped bytes. The verification and the
    /// decryption are one job on the token.
    async fn unwrap(
        &self,
        envelope: &Envelope,
        context: Context<'_>,
        caller: &Caller,
    ) -> Result<KeyMaterial, Error>;

    /// Makes a sealed release: verifies the MAC of the context and the wrapped bytes, then lets the token encrypt the key
    /// material to the recipient. The wrapping key must be a sealed wrapping key. The key material never reaches this process.
    async fn release(
        &self,
        envelope: &Envelope,
        context: Context<'_>,
        recipient: &Recipient,
        caller: &Caller,
    ) -> Result<Sealed, Error>;

    /// Verifies the MAC for the old context and computes a MAC for the new context. The RSA key is not used.
    async fn rebind(
        &self,
        envelope: &Envelope,
        old: Context<'_>,
        new: Context<'_>,
        caller: &Caller,
    ) -> Result<Envelope, Error>;

    /// Computes a MAC with the integrity key of this wrapping key.
    async fn mac(
        &self,
        key: WrappingKeyId,
        message: &MacMessage,
        caller: &Caller,
    ) -> Result<Mac, Error>;

    /// Verifies a MAC on the token. Returns [`Error::MacRefused`] if the MAC is wrong.
    async fn verify_mac(
        &self,
        key: WrappingKeyId,
        message: &MacMessage,
        mac: &Mac,
        caller: &Caller,
    ) -> Result<(), Error>;

    /// Moves an envelope to another wrapping key: verifies the MAC, decrypts, wraps again and computes the new MAC. The
    /// key material stays inside the worker process. If the new wrapping key is on another token, the other token
    /// computes the new MAC. The job is idempotent. The new envelope has the algorithm of the new wrapping key.
    async fn rewrap(
        &self,
        envelope: &Envelope,
        context: Context<'_>,
        to: WrappingKeyId,
        caller: &Caller,
    ) -> Result<Envelope, Error>;

    /// Number of principals' jobs that were queued since the start. A background task slows down
    /// while this number increases.
    fn jobs_of_principals(&self) -> u64;

    /// Returns [`Error::QueueFull`] if any planned job of this caller would certainly be refused. The broker calls this
    /// function before it asks the policy and the store, so that a refusal costs little.
    fn check_admission(&self, caller: &Caller, planned: Planned) -> Result<(), Error>;

    /// Whether jobs wait for a free session.
    fn is_saturated(&self) -> bool;

    /// Returns the last known state, without waiting for the token.
    fn state(&self) -> TokenState;

    /// Sets the keys that must be on each token according to the registry. The configured name identifies a token. If
    /// the keys changed, the workers are replaced one after another, without an interruption. The function does not
    /// wait until the workers are replaced. A key can be used as soon as [`TokenState::keys`] contains the key.
    fn expect_keys(&self, keys: Vec<(String, Vec<ExpectedKey>)>);
}

/// The last known state of the token and its workers.
#[derive(Clone, Debug)]
pub struct TokenState {
    /// The configured name of the token; empty for the state of several tokens together.
    pub name: String,
    /// The configured priority of the token. The state of several tokens together contains the highest priority.
    pub priority: u8,
    /// Whether the token serves calls.
    pub serving: Serving,
    /// A problem that an administrator must know about although the token is still usable, such as
    /// a latched PIN. When the last worker is lost, the problem prevents the start of a new worker.
    pub note: Option<String>,
    /// The token information; `None` until the first worker is ready.
    pub info: Option<TokenInfo>,
    /// What is known about the protection of the keys; `None` until the first worker is ready, and for the state of several tokens
    /// together.
    pub assurance: Option<Assurance>,
    /// The keys that every worker found on the token.
    pub keys: Arc<[TokenKey]>,
    /// The expected keys that cannot be used, although the token serves the other keys.
    pub unusable: Arc<[UnusableKey]>,
    /// The running workers.
    pub workers: Vec<WorkerInfo>,
    /// Number of jobs in the queue.
    pub queue_length: usize,
    /// Time at which a self-test last passed.
    pub last_self_test: Option<Timestamp>,
    /// Whether workers are being replaced because the registered keys changed. Until the
    /// replacement ends, `keys` may lack a key that was just registered. With several tokens, only
    /// the tokens that serve calls are counted.
    pub is_checking_keys: bool,
    /// The state of each token, if this is the state of several tokens together. With several tokens, `serving` is
    /// `Up` while every registered key is on a token that serves calls, and the other fields contain the data of all
    /// tokens.
    pub tokens: Vec<TokenState>,
}

impl TokenState {
    /// Whether at least one key has an available token.
    pub fn serves_a_key(&self) -> bool {
        self.serving == Serving::Up || self.tokens.iter().any(|token| token.serving == Serving::Up)
    }

    /// Whether the token with this name serves calls and has this key.
    pub fn serves_on(&self, token: &str, key: WrappingKeyId) -> bool {
        let each = if self.tokens.is_empty() {
            std::slice::from_ref(self)
        } else {
            &self.tokens
        };
        let mut of_token = each.iter().filter(|one| one.name == token);
        of_token
            .any(|one| one.serving == Serving::Up && one.keys.iter().any(|found| found.id == key))
    }

    /// Whether a token with this key serves calls.
    pub fn serves(&self, key: WrappingKeyId) -> bool {
        let has_key = |state: &Self| {
            state.serving == Serving::Up && state.keys.iter().any(|found| found.id == key)
        };
        if self.tokens.is_empty() {
            has_key(self)
        } else {
            self.tokens.iter().any(has_key)
        }
    }
}

/// Whether the token serves calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Serving {
    /// At least one worker is ready and its self-test passes. The state is also `Up` for up to five seconds after the
    /// last worker was lost, while the next worker starts. Calls wait for the next worker until their deadlines.
    Up,
    /// No worker is ready, and the supervisor repeatedly tries to start a worker. The text is the cause, for the log
    /// and for administrators.
    Down(String),
    /// The attributes, the self-test, the keys or the PIN are wrong; the text is the cause.
    Untrusted(String),
}

/// A wrapping key that was found on the token and passed the attribute check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenKey {
    /// The id of the key.
    pub id: WrappingKeyId,
    /// The fingerprint of the public key.
    pub fingerprint: Fingerprint,
    /// The public key as DER SubjectPublicKeyInfo, computed from modulus and exponent of the private key object.
    pub spki: Vec<u8>,
    /// Modulus length in bits.
    pub modulus_bits: u32,
    /// The algorithm that the capability probe chose for this token.
    pub algorithm: Algorithm,
    /// The protection of a sealed wrapping key, by the behaviour of the token; `None` for a plain wrapping key.
    pub sealing: Option<Sealing>,
}

/// An expected key that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnusableKey {
    /// The id of the key.
    pub id: WrappingKeyId,
    /// Reason why the key cannot be used.
    pub problem: KeyProblem,
}

/// Reason why an expected key cannot be used. Each text is a cause, for the log and for
/// administrators.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyProblem {
    /// The key is missing from the token. The key may reappear, for example when the token is restored.
    Missing(String),
    /// The public key, an attribute, the self-test or a negative test is wrong.
    Untrusted(String),
}

impl KeyProblem {
    /// The cause, for the log and for administrators.
    pub fn cause(&self) -> &str {
        match self {
            Self::Missing(cause) | Self::Untrusted(cause) => cause,
        }
    }
}

/// One worker process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerInfo {
    /// Process id.
    pub pid: u32,
    /// Number of session threads.
    pub sessions: usize,
    /// Number of jobs that the worker currently has.
    pub jobs_in_flight: usize,
    /// Sequence number of the worker among all workers of this token.
    pub generation: u64,
}

/// Delay after which a caller may retry if the wrapping key is missing from the token.
pub const MISSING_KEY_RETRY: Duration = Duration::from_secs(5);

/// The class of a token failure. Each class requires a different reaction from the caller. PKCS#11
/// return codes never leave the worker.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The MAC is wrong: the bytes differ from the bytes that were stored for this context.
    #[error("the MAC does not verify")]
    MacRefused,
    /// The RSA operation failed, although the MAC is valid and the self-test passes. The wrapped bytes were already
    /// damaged when the MAC was computed.
    #[error(
        "unwrap failed, although the MAC of the envelope is valid and the self-test passes: {0}"
    )]
    Damaged(String),
    /// The token refuses the public key of the recipient, although the self-test passes.
    #[error("the token refuses the key of the recipient: {0}")]
    Recipient(String),
    /// The token does not support the algorithm that the caller requires for the answer.
    #[error("the token encrypts to recipients only with {}", .0.as_str())]
    RecipientAlgorithm(Algorithm),
    /// The deadline passed before the token call began, or before the result arrived.
    #[error("the deadline passed before the token answered")]
    Deadline,
    /// The token cannot do the work before the deadline, or the queue is full.
    #[error("the token cannot do the work in time")]
    QueueFull {
        /// Delay before a retry, random within a range.
        retry_after: Duration,
    },
    /// The token is unavailable.
    #[error("token unavailable: {cause}")]
    Down {
        /// The cause, for the log.
        cause: String,
        /// The expected time until a worker is ready.
        retry_after: Duration,
    },
    /// The token must not be used.
    #[error("token not trusted: {0}")]
    Untrusted(String),
    /// The key is missing from the token, although the token serves other keys.
    #[error("wrapping key {key} is missing: {cause}")]
    KeyMissing {
        /// The id of the key.
        key: WrappingKeyId,
        /// The cause, for the log.
        cause: String,
    },
    /// The key is not among the expected keys of the workers.
    #[error(
        "the token workers have not loaded wrapping key {0}; try again, and run `keybroker token check` if the error persists"
    )]
    UnknownKey(WrappingKeyId),
}

impl From<Error> for error::Error {
    fn from(error: Error) -> Self {
        let detail = error.to_string();
        match error {
            Error::MacRefused | Error::Damaged(_) => Self::new(Reason::RecordDamaged, detail),
            Error::Recipient(_) => {
                let what = "a key that the token accepts; the token refused this key";
                Self::violation("recipient.public_key", what)
            }
            Error::RecipientAlgorithm(algorithm) => Self::violation(
                "recipient.hash",
                format!("absent, or the hash of {}", algorithm.as_str()),
            ),
            Error::Deadline => Self::new(Reason::Deadline, detail),
            Error::QueueFull { retry_after } => {
                Self::new(Reason::QueueFull, detail).retry_after(retry_after)
            }
            Error::Down { retry_after, .. } => {
                Self::new(Reason::TokenDown, detail).retry_after(retry_after)
            }
            Error::KeyMissing { .. } => {
                Self::new(Reason::TokenDown, detail).retry_after(MISSING_KEY_RETRY)
            }
            Error::Untrusted(_) => Self::new(Reason::TokenUntrusted, detail),
            // The registry and the token differ, and only an operator can repair the difference.
            Error::UnknownKey(_) => Self::new(Reason::TokenUntrusted, detail),
        }
    }
}
