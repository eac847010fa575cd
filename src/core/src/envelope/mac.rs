//! The messages that an integrity key authenticates. Each use has its own domain string, so that a MAC made for one
//! never verifies for another, and every field of variable length is preceded by its length, so that no two different
//! inputs give the same message.
//!
//! Mitigation: M10 of `THREAT_MODEL.md`.

use std::fmt;

use aws_lc_rs::digest;
use zeroize::Zeroizing;

use crate::key::{ClientId, Fingerprint, ObjectIds, Purpose, WrappingKeyId, WrappingKeyState};

use super::{Algorithm, Context};

const ENVELOPE_DOMAIN: &[u8] = b"keybroker/envelope/v1";
const REGISTRY_DOMAIN: &[u8] = b"keybroker/registry/v1";
/// Of a row that says where the objects of the key are. A row of an earlier release does not, and keeps its MAC.
const REGISTRY_OBJECTS_DOMAIN: &[u8] = b"keybroker/registry/v2";
const CLIENT_CREDENTIAL_DOMAIN: &[u8] = b"keybroker/client-credential/v1";
const REQUEST_DOMAIN: &[u8] = b"keybroker/request/v1";

const REQUEST_RESULT_DOMAIN: &[u8] = b"keybroker/request-result/v1";

/// Longest message, in bytes: an envelope with the longest context fits with room to spare.
pub const MESSAGE_BYTES_MAX: usize = 2_048;

/// Bytes to be authenticated by an integrity key. Can be made only by the functions here, so that domains stay apart.
/// May hold key material (see [`MacMessage::request`]), so it is treated as a secret.
#[derive(Clone, PartialEq, Eq)]
pub struct MacMessage(Zeroizing<Vec<u8>>);

impl fmt::Debug for MacMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MacMessage({} bytes)", self.0.len())
    }
}

impl MacMessage {
    /// The bytes for the token.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// What the MAC of an envelope covers.
    pub(super) fn envelope(
        algorithm: Algorithm,
        wrapping_key: WrappingKeyId,
        wrapped: &[u8],
        context: &Context<'_>,
    ) -> Self {
        let mut message = Message::new(ENVELOPE_DOMAIN);
        message.fixed(&[context.kind().number(), algorithm.number()]);
        message.fixed(wrapping_key.as_bytes());
        message.sized(wrapped);
        match context {
            Context::Record {
                address,
                record_id,
                revision,
            } => {
                message.sized(address.tenant.as_str().as_bytes());
                message.fixed(record_id.as_bytes());
                message.sized(address.user.as_str().as_bytes());
                message.sized(address.name.as_str().as_bytes());
                message.fixed(&revision.get().to_be_bytes());
            }
            Context::Client { tenant, context } => {
                message.sized(tenant.as_str().as_bytes());
                message.sized(context.as_bytes());
            }
        }
        message.finish()
    }

    /// What the MAC of a registry row covers: all of the row but the MAC.
    pub fn registry(row: &RegistryFields<'_>) -> Self {
        let has_objects = *row.objects != ObjectIds::default();
        let mut message = Message::new(if has_objects {
            REGISTRY_OBJECTS_DOMAIN
        } else {
            REGISTRY_DOMAIN
        });
        message.fixed(row.id.as_bytes());
        if has_objects {
            message.sized(row.objects.private_bytes());
            message.sized(row.objects.integrity_bytes());
        }
        message.fixed(&row.fingerprint.0);
        message.sized(row.purpose.as_str().as_bytes());
        message.sized(row.state.as_str().as_bytes());
        message.sized(row.token_serial.as_bytes());
        message.fixed(&row.sequence.to_be_bytes());
        message.fixed(&row.registered_us.to_be_bytes());
        message.fixed(&row.backup_confirmed_us.unwrap_or(0).to_be_bytes());
        message.finish()
    }

    /// What the MAC of an API client covers: its id, the revision of its document, and the document's SHA-256, because a
    /// document may be longer than what a token takes at once.
    pub fn client_credential(id: ClientId, revision: u64, document: &[u8; 32]) -> Self {
        let mut message = Message::new(CLIENT_CREDENTIAL_DOMAIN);
        message.fixed(id.as_bytes());
        message.fixed(&revision.to_be_bytes());
        message.fixed(document);
        message.finish()
    }

    /// What the MAC of the stored answer to a request id covers. The answer may be longer than what a token takes at once, so
    /// it is the SHA-256 of its fields.
    pub fn request_result(parts: &[&[u8]]) -> Self {
        let mut fields = digest::Context::new(&digest::SHA256);
        for part in parts {
            fields.update(&length_u16(part.len()));
            fields.update(part);
        }
        let mut message = Message::new(REQUEST_RESULT_DOMAIN);
        message.fixed(fields.finish().as_ref());
        message.finish()
    }

    /// What decides whether two mutations with one request id have the same content. Under a key of the token, because
    /// a plain hash of key material of low entropy could be guessed by a reader of the table.
    pub fn request(parts: &[&[u8]]) -> Self {
        let mut message = Message::new(REQUEST_DOMAIN);
        for part in parts {
            message.sized(part);
        }
        message.finish()
    }
}

/// The authenticated part of a registry row.
#[derive(Clone, Copy, Debug)]
pub struct RegistryFields<'a> {
    /// Its id.
    pub id: WrappingKeyId,
    /// Where its objects are on the token.
    pub objects: &'a ObjectIds,
    /// Of the public key.
    pub fingerprint: Fingerprint,
    /// What the key is for.
    pub purpose: Purpose,
    /// SP 800-57 state.
    pub state: WrappingKeyState,
    /// Serial number of the token that holds the key.
    pub token_serial: &'a str,
    /// Grows with each change of any row.
    pub sequence: u64,
    /// When the key was registered, UTC microseconds.
    pub registered_us: i64,
    /// When a backup was confirmed, UTC microseconds; never 0.
    pub backup_confirmed_us: Option<i64>,
}

struct Message(Zeroizing<Vec<u8>>);

impl Message {
    fn new(domain: &[u8]) -> Self {
        // The whole capacity at once: a vector that grows leaves copies that are not overwritten.
        let mut message = Self(Zeroizing::new(Vec::with_capacity(MESSAGE_BYTES_MAX)));
        message.sized(domain);
        message
    }

    /// A field whose length is part of the format.
    fn fixed(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
    }

    /// A field of variable length.
    fn sized(&mut self, bytes: &[u8]) {
        self.0.extend(length_u16(bytes.len()));
        self.0.extend(bytes);
    }

    fn finish(self) -> MacMessage {
        assert!(
            self.0.len() <= MESSAGE_BYTES_MAX,
            "every field has a maximum"
        );
        MacMessage(self.0)
    }
}

/// The length of a field. Every field has a maximum far below 65,536, checked where its type is made.
pub(super) fn length_u16(length: usize) -> [u8; 2] {
    u16::try_from(length)
        .expect("every field has a maximum below 65,536")
        .to_be_bytes()
}
