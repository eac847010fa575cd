//! A gRPC client for Keybroker, which keeps users' keys wrapped under a key in an HSM.
//!
//! This library extends the generated stubs of [`keybroker_proto`] with the features that every program needs: TLS,
//! credentials, a deadline on every call, safe retries, and errors that a program can act on.
//!
//! ```no_run
//! use std::{error::Error, time::Duration};
//!
//! use keybroker_client::{Client, KeyMaterial, Reason, UserKeyRef};
//!
//! #[tokio::main]
//! async fn main() -> Result<(), Box<dyn Error>> {
//!     let client = Client::builder("https://keys.example.org:8443")
//!         .ca_file("/etc/vault/keybroker-ca.pem")
//!         .identity_files("/etc/vault/client.pem", "/etc/vault/client.key")
//!         .deadline(Duration::from_secs(5))
//!         .build()?;
//!
//!     // Enrol. All attempts carry one request id, so the key is stored once.
//!     let key = UserKeyRef::parse("ada@example.org", "vault")?;
//!     let material = KeyMaterial::new(vec![7; 32])?;
//!     match client.create_user_key(&key, &material).await {
//!         Ok(record) => println!("stored as revision {}", record.revision),
//!         Err(error) if error.reason() == Some(Reason::KeyExists) => println!("already enrolled"),
//!         Err(error) => return Err(error.into()),
//!     }
//!
//!     // Release the key, with a deadline for this call only.
//!     let released = client
//!         .unwrap_user_key(&key)
//!         .deadline(Duration::from_secs(2))
//!         .await?;
//!     println!("{} bytes", released.key_material.expose().len());
//!     Ok(())
//! }
//! ```
//!
//! # Credentials
//!
//! A client has one of three kinds of credentials: a certificate ([`identity_files`](ClientBuilder::identity_files)),
//! access tokens of an OpenID provider ([`bearer_token_provider`](ClientBuilder::bearer_token_provider)), or the id and
//! secret of an API client ([`api_client`](ClientBuilder::api_client)).
//!
//! # Deadlines and retries
//!
//! Every call has a deadline: 10 s, unless the client or the call sets another deadline. The deadline covers the
//! connection, all attempts and the pauses between them. Each attempt sends the remaining time to the broker.
//!
//! [`RetryPolicy`] describes the retries. The library repeats [reads](Read), and [changes](Change) with their request id.
//! The library never repeats a change without a request id ([`NonIdempotent`]). A call is repeated if the broker's reason
//! is `QUEUE_FULL`, `RATE`, `TOKEN_DOWN`, `STORE_DOWN`, `AUDIT_DOWN`, `IDENTITY_DOWN` or `DEADLINE`, or if the connection
//! failed. After any other error, a repeated call would fail again. A pause is never shorter than the delay in the broker's
//! `RetryInfo`. A [`RetryBudget`] limits the retries of all calls of the client together.
//!
//! Connections are not balanced: a client has one connection to one address of its endpoint. The client opens a new
//! connection when the existing connection is lost, or when a call reached its deadline and the connection received no
//! answer during the call. [`Client::connect`] opens the connection before the first call, and
//! [`Client::with_separate_connection`] returns a client with another connection.
//!
//! # Errors
//!
//! A failed call returns an [`Error`]. [`Error::kind`] and [`Error::reason`] say why the call failed, and
//! [`Error::outcome_unknown`] says whether a change may have been made although the call failed. If the broker refused
//! the call, [`Error::refusal`] has the [fields](Refusal::violations) that the broker did not accept, the
//! [delay](Refusal::retry_delay) that the broker asks for, and the [call id](Refusal::call_id) that identifies the call
//! in the broker's log. [`Error::status`] returns the gRPC status; its types [`Status`] and [`Code`] are the types of
//! [`tonic`].
//!
//! # Sealed release
//!
//! [`Client::unwrap_user_key_for`] lets the broker's token encrypt the user key to a public key, so that the user key is
//! never in the memory of the broker's front. [`RecipientKeyPair`] makes key pairs and opens the answers.
//!
//! # Secrets in memory
//!
//! [`KeyMaterial`], [`BearerToken`] and [`ClientSecret`] overwrite their memory when they are dropped, and their `Debug`
//! output is redacted. The library also overwrites the key material of a request message after the message was encoded.
//!
//! The libraries that this library uses make copies that are not overwritten: the encoded message in tonic's buffer,
//! the HTTP/2 frames and TLS records of hyper, h2 and rustls, the received message before it is decoded, and the
//! `authorization` header. Copies that are not overwritten stay in freed memory until the memory is used for other
//! data. A memory dump or swap of your process can therefore contain keys that were released to the process. Turn off
//! core dumps and swap if keys must not reach a disk.

use std::sync::Arc;

pub use keybroker_core::{
    call::{CallId, RequestId, Timestamp},
    envelope::Algorithm,
    error::Reason,
    key::{
        AccessRequestId, ApprovalId, ClientId, DeviceId, Fingerprint, KeyName, RecordId, Revision,
        Sealing, UserId, WrappingKeyId,
    },
    secret::KeyMaterial,
};
pub use keybroker_proto as proto;
pub use pace::PacedConnector;
pub use tonic::{Code, Status};

mod builder;
mod call;
mod control;
mod credential;
mod devices;
mod error;
mod health;
mod link;
mod pace;
mod retry;
mod sealed;
mod sensitive;
mod user_keys;

pub use builder::ClientBuilder;
pub use call::{CallFuture, Change, NonIdempotent, Read, new_request_id, parse_request_id};
pub use control::IssuedSecret;
pub use credential::{BearerToken, ClientSecret};
pub use error::{BoxError, BuildError, Error, ErrorKind, FieldViolation, InvalidField, Refusal};
pub use health::{Service, ServiceHealth};
pub use retry::{RetryBudget, RetryPolicy};
pub use sealed::{RecipientError, RecipientKeyPair, SealedKey};
pub use user_keys::{
    DamagedUserKey, ListUserKeys, ReleasedKey, UserKey, UserKeyPage, UserKeyRef, UserKeyState,
};

/// A client of one broker. Clones are cheap and share the connection and the retry budget of the client.
#[derive(Clone, Debug)]
pub struct Client(Arc<call::Shared>);

impl Client {
    /// Returns a builder for a client of the broker at `endpoint`, which has the form `https://host:port`.
    pub fn builder(endpoint: impl Into<String>) -> ClientBuilder {
        ClientBuilder::to_endpoint(endpoint.into())
    }

    /// Returns a builder for a client over a channel of your own, for a transport that [`builder`](Self::builder) does not
    /// support. The builder's settings for CA, identity, server name and connection timeout have no effect on a client with
    /// a channel of your own.
    ///
    /// **The channel must authenticate the broker and encrypt the traffic**: this library does not encrypt the keys and
    /// credentials that it sends over the channel.
    pub fn builder_with_channel(channel: tonic::transport::Channel) -> ClientBuilder {
        ClientBuilder::with_channel(channel)
    }

    /// Connects immediately, in one attempt within the client's deadline. Use this method to find out before the first
    /// call whether the broker can be reached. If you do not use this method, the first call opens the connection. For
    /// a client over a channel of your own, this method does nothing.
    ///
    /// # Errors
    /// Returns an error of the kind [`ErrorKind::Connection`], with the cause as its [source](std::error::Error::source),
    /// or of the kind [`ErrorKind::DeadlineExceeded`].
    pub async fn connect(&self) -> Result<(), Error> {
        self.0.connect().await
    }

    /// Returns a client with the same settings and with its own connection and retry budget, for programs that need more
    /// than one connection. If this client uses a channel of your own, both clients share the channel.
    ///
    /// This method must be called within a tokio runtime.
    #[must_use]
    pub fn with_separate_connection(&self) -> Self {
        Self::new(self.0.separate())
    }

    fn new(shared: call::Shared) -> Self {
        Self(Arc::new(shared))
    }

    fn shared(&self) -> &call::Shared {
        &self.0
    }
}
