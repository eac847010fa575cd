//! The front's side of the token: a [`Token`] that the broker calls, and the [`Supervisor`] behind it.
//!
//! The vendor's module never shares a process with the network. [`Supervisor`] starts worker processes, which load the
//! module, log in once and serve a closed set of jobs over a socket pair; it replaces a worker that crashes, hangs or loses
//! its token. The worker is in crate `pkcs11`, which this crate does not know: what both sides share is in
//! `worker-protocol`. No mechanism, attribute, handle or return code reaches this crate; a failure is an [`Error`] class
//! with text for the log.
//!
//! What is not promised: isolation from an attacker who runs code as the same user as the worker.

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use keybroker_core::{
    call::Timestamp,
    envelope::{Algorithm, Context, Envelope, Mac, mac::MacMessage},
    error::{self, Reason},
    key::{Fingerprint, WrappingKeyId},
    secret::KeyMaterial,
};

pub mod admin;
mod caller;
mod job;
mod link;
mod process;
mod queue;
mod start;
mod supervisor;

pub use caller::Caller;
pub use keybroker_worker_protocol::{ExpectedKey, Settings, TokenInfo, unpadded};
pub use supervisor::{StartupError, Supervisor};

/// What the broker asks of a token. The RSA key is used by [`Token::unwrap`] alone, after the MAC has verified.
#[async_trait]
pub trait Token: Send + Sync + fmt::Debug + 'static {
    /// Wraps key material: the public key in software, the MAC on the token.
    async fn wrap(
        &self,
        key: WrappingKeyId,
        context: Context<'_>,
        material: &KeyMaterial,
        caller: &Caller,
    ) -> Result<Envelope, Error>;

    /// Verifies the MAC over context and wrapped bytes, and only then decrypts: one job on the token.
    async fn unwrap(
        &self,
        envelope: &Envelope,
        context: Context<'_>,
        caller: &Caller,
    ) -> Result<KeyMaterial, Error>;

    /// Verifies the MAC of the old context and makes one for the new. The RSA key is not used.
    async fn rebind(
        &self,
        envelope: &Envelope,
        old: Context<'_>,
        new: Context<'_>,
        caller: &Caller,
    ) -> Result<Envelope, Error>;

    /// Makes a MAC with the integrity key of that id.
    async fn mac(
        &self,
        key: WrappingKeyId,
        message: &MacMessage,
        caller: &Caller,
    ) -> Result<Mac, Error>;

    /// Verifies a MAC on the token. [`Error::MacRefused`] when it does not.
    async fn verify_mac(
        &self,
        key: WrappingKeyId,
        message: &MacMessage,
        mac: &Mac,
        caller: &Caller,
    ) -> Result<(), Error>;

    /// [`Error::QueueFull`] when any job of this caller is certain to be refused. For refusals that cost little: before policy and
    /// store are asked.
    fn check_admission(&self, caller: &Caller) -> Result<(), Error>;

    /// The state as last seen; never waits for the token.
    fn state(&self) -> TokenState;
}

/// What is known of the token and its workers.
#[derive(Clone, Debug)]
pub struct TokenState {
    /// Whether it serves.
    pub serving: Serving,
    /// What an administrator must know although it serves, such as a latched PIN. The last worker that is lost then ends
    /// the service.
    pub note: Option<String>,
    /// The token information; absent until a worker was ready once.
    pub info: Option<TokenInfo>,
    /// Keys found on the token by the last worker that became ready.
    pub keys: Arc<[TokenKey]>,
    /// The workers now alive.
    pub workers: Vec<WorkerInfo>,
    /// Jobs waiting in the queue.
    pub queue_length: usize,
    /// When a self-test last passed.
    pub last_self_test: Option<Timestamp>,
}

/// Whether the token serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Serving {
    /// At least one worker is ready and its self-test passes, or one was lost less than five seconds ago and the next is due:
    /// calls wait for it within their deadlines.
    Up,
    /// No worker is ready; the supervisor keeps trying. With the cause, for the log and administrators.
    Down(String),
    /// Attributes, self-test, keys or PIN are wrong. With the cause.
    Untrusted(String),
}

/// A wrapping key as found on the token and accepted by the attribute check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenKey {
    /// Its id.
    pub id: WrappingKeyId,
    /// Of the public key below.
    pub fingerprint: Fingerprint,
    /// Computed from modulus and exponent of the private object, DER SubjectPublicKeyInfo.
    pub spki: Vec<u8>,
    /// Modulus length in bits.
    pub modulus_bits: u32,
    /// What the capability probe chose for this token.
    pub algorithm: Algorithm,
}

/// One worker process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerInfo {
    /// Process id.
    pub pid: u32,
    /// Session threads.
    pub sessions: usize,
    /// Jobs it holds now.
    pub jobs_in_flight: usize,
    /// Grows by one with each worker started.
    pub generation: u64,
}

/// Class of a token failure: what its caller can act on. Return codes end here.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// A MAC does not verify: the bytes are not what was stored for that context.
    #[error("the MAC does not verify")]
    MacRefused,
    /// The MAC verified, the RSA operation failed and the self-test passes: the wrapped bytes were damaged before the MAC.
    #[error("unwrap failed after a good MAC while the self-test passes: {0}")]
    Damaged(String),
    /// The deadline passed before a token call began, or before its result came.
    #[error("deadline passed before the token answered")]
    Deadline,
    /// The token has more work than it can do before the deadline, or the queue is full.
    #[error("the token has more work than it can do in time")]
    QueueFull {
        /// When to come again, at random within a range.
        retry_after: Duration,
    },
    /// The token is unavailable.
    #[error("token unavailable: {cause}")]
    Down {
        /// Why, for the log.
        cause: String,
        /// When a worker is expected to be ready.
        retry_after: Duration,
    },
    /// The token must not be used.
    #[error("token not trusted: {0}")]
    Untrusted(String),
    /// The key is not on the token, or was not registered when the workers started.
    #[error("wrapping key {0} is not on the token")]
    UnknownKey(WrappingKeyId),
}

impl From<Error> for error::Error {
    fn from(error: Error) -> Self {
        let detail = error.to_string();
        match error {
            Error::MacRefused | Error::Damaged(_) => Self::new(Reason::RecordDamaged, detail),
            Error::Deadline => Self::new(Reason::Deadline, detail),
            Error::QueueFull { retry_after } => {
                Self::new(Reason::QueueFull, detail).retry_after(retry_after)
            }
            Error::Down { retry_after, .. } => {
                Self::new(Reason::TokenDown, detail).retry_after(retry_after)
            }
            Error::Untrusted(_) => Self::new(Reason::TokenUntrusted, detail),
            // The registry and the token disagree: only an operator can repair that.
            Error::UnknownKey(_) => Self::new(Reason::TokenUntrusted, detail),
        }
    }
}
