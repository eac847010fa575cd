//! The messages that an integrity key authenticates. Each kind of message has its own domain string, so that a MAC for
//! one kind is never valid for another kind. The length of a field of variable length precedes the field, so that two
//! different inputs never result in the same message.
//!
//! Mitigation: M10 of `THREAT_MODEL.md`.

use std::fmt;

use aws_lc_rs::digest;
use zeroize::Zeroizing;

use crate::{
    approval::ApprovalState,
    key::{
        AccessRequestId, ApprovalId, ClientId, Fingerprint, ObjectIds, Purpose, WrappingKeyId,
        WrappingKeyState,
    },
    organization::Guid,
};

use super::{Algorithm, Context};

const ENVELOPE_DOMAIN: &[u8] = b"keybroker/envelope/v1";
const REGISTRY_DOMAIN: &[u8] = b"keybroker/registry/v1";
/// The domain of a registry row that contains object ids. A row without object ids uses the domain of earlier releases,
/// so that the MACs of earlier releases stay valid.
const REGISTRY_OBJECTS_DOMAIN: &[u8] = b"keybroker/registry/v2";
/// The domain of the registry row of a destroyed key, which another key authenticates.
const TOMBSTONE_DOMAIN: &[u8] = b"keybroker/registry-tombstone/v1";
/// The domain of the registry row of a destroyed key whose objects must still be removed from the tokens.
const UNREMOVED_DOMAIN: &[u8] = b"keybroker/registry-tombstone-unremoved/v1";
const PLACE_DOMAIN: &[u8] = b"keybroker/registry-place/v1";
const DESTRUCTION_DOMAIN: &[u8] = b"keybroker/key-destruction/v1";
const REMOVAL_DOMAIN: &[u8] = b"keybroker/key-removal/v1";
const MEMBER_KEY_DOMAIN: &[u8] = b"keybroker/bitwarden-member-key/v1";
const APPROVAL_DOMAIN: &[u8] = b"keybroker/approval/v1";
const DEVICE_DOMAIN: &[u8] = b"keybroker/device/v1";
const ACCESS_REQUEST_DOMAIN: &[u8] = b"keybroker/access-request/v1";
const ACCESS_CODE_DOMAIN: &[u8] = b"keybroker/access-code/v1";
const CLIENT_CREDENTIAL_DOMAIN: &[u8] = b"keybroker/client-credential/v1";
const REQUEST_DOMAIN: &[u8] = b"keybroker/request/v1";

const REQUEST_RESULT_DOMAIN: &[u8] = b"keybroker/request-result/v1";

/// Longest message, in bytes. The message for an envelope with the longest context is shorter than this limit.
pub const MESSAGE_BYTES_MAX: usize = 2_048;

/// Bytes that an integrity key authenticates. Only the functions of this module can create a message, so that each message begins
/// with its domain. A message can contain key material (see [`MacMessage::request`]), so it is treated as a secret.
#[derive(Clone, PartialEq, Eq)]
pub struct MacMessage(Zeroizing<Vec<u8>>);

impl fmt::Debug for MacMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MacMessage({} bytes)", self.0.len())
    }
}

impl MacMessage {
    /// The bytes that the MAC covers.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The message for the MAC of an envelope.
    pub(super) fn envelope(
        algorithm: Algorithm,
        wrapping_key: WrappingKeyId,
        wrapped: &[u8],
        context: &Context<'_>,
    ) -> Self {
        let mut message = Message::new(ENVELOPE_DOMAIN);
        message.envelope_head(algorithm, wrapping_key, context);
        message.sized(wrapped);
        message.context(context);
        message.finish()
    }

    /// The message for the MAC of an envelope without the wrapped bytes, which are not known yet: the bytes before and
    /// the bytes after the wrapped bytes. `wrapped_length` is the number of wrapped bytes.
    pub(super) fn around_envelope(
        algorithm: Algorithm,
        wrapping_key: WrappingKeyId,
        wrapped_length: usize,
        context: &Context<'_>,
    ) -> [Vec<u8>; 2] {
        let mut before = Message::new(ENVELOPE_DOMAIN);
        before.envelope_head(algorithm, wrapping_key, context);
        before.fixed(&length_u16(wrapped_length));
        let mut after = Message(Zeroizing::new(Vec::with_capacity(MESSAGE_BYTES_MAX)));
        after.context(context);
        [before, after].map(|part| part.finish().as_bytes().to_vec())
    }

    /// The message for the MAC of a registry row: all fields except the MAC.
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
        message.rest_of_registry_row(row);
        message.finish()
    }

    /// The message for the MAC of the registry row of a destroyed key. The integrity key of a destroyed key is destroyed, too, so
    /// the integrity key of another wrapping key makes this MAC.
    pub fn tombstone(row: &RegistryFields<'_>) -> Self {
        Self::tombstone_in(TOMBSTONE_DOMAIN, row)
    }

    /// The message for the MAC of the registry row of a destroyed key whose objects must still be removed from the tokens: the
    /// fields of [`tombstone`](Self::tombstone) in another domain. A person who can write to the database can therefore not make the
    /// brokers forget the removal.
    pub fn unremoved_tombstone(row: &RegistryFields<'_>) -> Self {
        Self::tombstone_in(UNREMOVED_DOMAIN, row)
    }

    fn tombstone_in(domain: &[u8], row: &RegistryFields<'_>) -> Self {
        let mut message = Message::new(domain);
        message.fixed(row.id.as_bytes());
        message.sized(row.objects.private_bytes());
        message.sized(row.objects.integrity_bytes());
        message.rest_of_registry_row(row);
        message.finish()
    }

    /// The message for the MAC of a row that registers a wrapping key for another token: all fields of the row except
    /// the MAC.
    pub fn place(row: &PlaceFields<'_>) -> Self {
        let mut message = Message::new(PLACE_DOMAIN);
        message.fixed(row.key.as_bytes());
        message.sized(row.token.as_bytes());
        message.sized(row.token_serial.as_bytes());
        message.sized(row.objects.private_bytes());
        message.sized(row.objects.integrity_bytes());
        message.fixed(&row.registered_us.to_be_bytes());
        message.fixed(&row.backup_confirmed_us.unwrap_or(0).to_be_bytes());
        message.finish()
    }

    /// The message for the MAC of the scheduled destruction of a wrapping key: all fields except the MAC.
    pub fn destruction(row: &DestructionFields<'_>) -> Self {
        Self::destruction_in(DESTRUCTION_DOMAIN, row)
    }

    /// The message for the MAC of a destruction after the wrapping key was marked as destroyed: the fields of
    /// [`destruction`](Self::destruction) in another domain, because a schedule alone must not permit the removal.
    pub fn removal(row: &DestructionFields<'_>) -> Self {
        Self::destruction_in(REMOVAL_DOMAIN, row)
    }

    fn destruction_in(domain: &[u8], row: &DestructionFields<'_>) -> Self {
        let mut message = Message::new(domain);
        message.fixed(row.key.as_bytes());
        message.fixed(row.signer.as_bytes());
        message.fixed(&row.sequence.to_be_bytes());
        message.fixed(&row.requested_us.to_be_bytes());
        message.fixed(&row.due_us.to_be_bytes());
        message.sized(row.requested_by.as_bytes());
        message.finish()
    }

    /// The message for the MAC of a request for approval: its id, the wrapping key whose integrity key makes the MAC, and the
    /// SHA-256 of all other fields, because the names of principals and the requested change may be longer than the input that a
    /// token accepts. A missing time is 0.
    pub fn approval(row: &ApprovalFields<'_>) -> Self {
        let mut fields = digest::Context::new(&digest::SHA256);
        for part in [
            row.state.as_str().as_bytes(),
            row.action.as_bytes(),
            row.document,
            row.digest,
            row.requested_by.as_bytes(),
            row.requested_person.as_bytes(),
            &row.requested_us.to_be_bytes(),
            &row.expires_us.to_be_bytes(),
            row.decided_by.as_bytes(),
            row.decided_person.as_bytes(),
            &row.decided_us.unwrap_or(0).to_be_bytes(),
            &row.used_us.unwrap_or(0).to_be_bytes(),
        ] {
            fields.update(&length_u16(part.len()));
            fields.update(part);
        }
        let mut message = Message::new(APPROVAL_DOMAIN);
        message.fixed(row.id.as_bytes());
        message.fixed(row.signer.as_bytes());
        message.fixed(fields.finish().as_ref());
        message.finish()
    }

    /// The message for the MAC of the row that pins a member's wrapped key: all fields except the MAC. The integrity key of the
    /// organisation's key makes the MAC.
    pub fn member_key(row: &MemberKeyFields<'_>) -> Self {
        let mut message = Message::new(MEMBER_KEY_DOMAIN);
        message.fixed(row.organization.as_bytes());
        message.fixed(row.member.as_bytes());
        message.fixed(row.digest);
        message.fixed(row.email);
        message.fixed(&row.pinned_us.to_be_bytes());
        message.finish()
    }

    /// The message for the MAC of an API client: its id, the revision of its document, and the document's SHA-256. The message
    /// contains a digest of the document, because a document may be longer than the input that a token accepts.
    pub fn client_credential(id: ClientId, revision: u64, document: &[u8; 32]) -> Self {
        let mut message = Message::new(CLIENT_CREDENTIAL_DOMAIN);
        message.fixed(id.as_bytes());
        message.fixed(&revision.to_be_bytes());
        message.fixed(document);
        message.finish()
    }

    /// The message for the MAC of the stored answer to a request id. The message contains the SHA-256 of the fields of the
    /// answer, because the answer may be longer than the input that a token accepts.
    pub fn request_result(parts: &[&[u8]]) -> Self {
        Self::digest_in(REQUEST_RESULT_DOMAIN, parts)
    }

    /// The message for the MAC of the row of a device: the SHA-256 of all its fields, because the encrypted keys of a device may
    /// be longer than the input that a token accepts. The fields begin with tenant, user and device.
    pub fn device(parts: &[&[u8]]) -> Self {
        Self::digest_in(DEVICE_DOMAIN, parts)
    }

    /// The message for the MAC of the row of a request for access, like [`device`](Self::device).
    pub fn access_request(parts: &[&[u8]]) -> Self {
        Self::digest_in(ACCESS_REQUEST_DOMAIN, parts)
    }

    /// The message whose MAC the broker keeps in place of the access code of a request for access. The store keeps a MAC and not
    /// a plain hash, so that a reader of the table cannot test guesses.
    pub fn access_code(request: AccessRequestId, code: &[u8]) -> Self {
        let mut message = Message::new(ACCESS_CODE_DOMAIN);
        message.fixed(request.as_bytes());
        message.sized(code);
        message.finish()
    }

    /// A message with the SHA-256 of the fields, each with its length.
    fn digest_in(domain: &[u8], parts: &[&[u8]]) -> Self {
        let mut fields = digest::Context::new(&digest::SHA256);
        for part in parts {
            fields.update(&length_u16(part.len()));
            fields.update(part);
        }
        let mut message = Message::new(domain);
        message.fixed(fields.finish().as_ref());
        message.finish()
    }

    /// The message whose MAC shows whether two mutations with one request id have the same content. The store keeps a MAC
    /// and not a plain hash, because a reader of the table could guess key material of low entropy from a hash.
    pub fn request(parts: &[&[u8]]) -> Self {
        let mut message = Message::new(REQUEST_DOMAIN);
        for part in parts {
            message.sized(part);
        }
        message.finish()
    }
}

/// The authenticated fields of a registry row.
#[derive(Clone, Copy, Debug)]
pub struct RegistryFields<'a> {
    /// The id of the wrapping key.
    pub id: WrappingKeyId,
    /// The `CKA_ID` of the RSA private key, and the place of the integrity key.
    pub objects: &'a ObjectIds,
    /// The fingerprint of the public key.
    pub fingerprint: Fingerprint,
    /// The purpose of the wrapping key.
    pub purpose: Purpose,
    /// SP 800-57 state.
    pub state: WrappingKeyState,
    /// Serial number of the token that contains the key.
    pub token_serial: &'a str,
    /// A number that grows with each change of any registry row.
    pub sequence: u64,
    /// When the key was registered, in UTC microseconds.
    pub registered_us: i64,
    /// When a backup of the key was confirmed, in UTC microseconds; never 0.
    pub backup_confirmed_us: Option<i64>,
}

/// The authenticated fields of a row that registers a wrapping key for another token.
#[derive(Clone, Copy, Debug)]
pub struct PlaceFields<'a> {
    /// The id of the wrapping key.
    pub key: WrappingKeyId,
    /// The configured name of the token.
    pub token: &'a str,
    /// Serial number of the token.
    pub token_serial: &'a str,
    /// The `CKA_ID` of the RSA private key on this token, and the place of the integrity key.
    pub objects: &'a ObjectIds,
    /// When the key was registered for this token, in UTC microseconds.
    pub registered_us: i64,
    /// When a backup of the token was confirmed, in UTC microseconds; never 0.
    pub backup_confirmed_us: Option<i64>,
}

/// The authenticated part of the scheduled destruction of a wrapping key.
#[derive(Clone, Copy, Debug)]
pub struct DestructionFields<'a> {
    /// The id of the wrapping key.
    pub key: WrappingKeyId,
    /// The id of the wrapping key whose integrity key makes the MAC.
    pub signer: WrappingKeyId,
    /// The number of the registry row of the wrapping key.
    pub sequence: u64,
    /// When the destruction was requested, in UTC microseconds.
    pub requested_us: i64,
    /// When the wrapping key is destroyed, in UTC microseconds.
    pub due_us: i64,
    /// The principal that requested the destruction, at most 255 bytes.
    pub requested_by: &'a str,
}

/// The authenticated fields of the row that pins a member's wrapped key.
#[derive(Clone, Copy, Debug)]
pub struct MemberKeyFields<'a> {
    /// The Bitwarden organisation.
    pub organization: Guid,
    /// The member to whom the wrapped key belongs.
    pub member: Guid,
    /// SHA-256 of the wrapped key.
    pub digest: &'a [u8; 32],
    /// SHA-256 of the member's e-mail address in lower case.
    pub email: &'a [u8; 32],
    /// When the wrapped key was first seen, or last accepted by a person, in UTC microseconds.
    pub pinned_us: i64,
}

/// The authenticated fields of a request for approval.
#[derive(Clone, Copy, Debug)]
pub struct ApprovalFields<'a> {
    /// The id of the request.
    pub id: ApprovalId,
    /// The id of the wrapping key whose integrity key makes the MAC.
    pub signer: WrappingKeyId,
    /// The stored state.
    pub state: ApprovalState,
    /// The name of the action for which the approval is requested.
    pub action: &'a str,
    /// The requested change, as canonical JSON.
    pub document: &'a [u8],
    /// The digest by which the broker finds the request when the change is requested again.
    pub digest: &'a [u8; 32],
    /// The principal that requested the change.
    pub requested_by: &'a str,
    /// The person to whom this principal belongs.
    pub requested_person: &'a str,
    /// When the change was requested, in UTC microseconds.
    pub requested_us: i64,
    /// When the request expires, in UTC microseconds.
    pub expires_us: i64,
    /// The principal that approved or rejected the request; empty before.
    pub decided_by: &'a str,
    /// The person to whom this principal belongs; empty before.
    pub decided_person: &'a str,
    /// When the request was approved or rejected, in UTC microseconds; never 0.
    pub decided_us: Option<i64>,
    /// When the change was made, in UTC microseconds; never 0.
    pub used_us: Option<i64>,
}

struct Message(Zeroizing<Vec<u8>>);

impl Message {
    fn new(domain: &[u8]) -> Self {
        // Reserve the full capacity now: a vector that grows leaves copies that are not overwritten.
        let mut message = Self(Zeroizing::new(Vec::with_capacity(MESSAGE_BYTES_MAX)));
        message.sized(domain);
        message
    }

    /// Adds the fields of a registry row that follow the ids.
    fn rest_of_registry_row(&mut self, row: &RegistryFields<'_>) {
        self.fixed(&row.fingerprint.0);
        self.sized(row.purpose.as_str().as_bytes());
        self.sized(row.state.as_str().as_bytes());
        self.sized(row.token_serial.as_bytes());
        self.fixed(&row.sequence.to_be_bytes());
        self.fixed(&row.registered_us.to_be_bytes());
        self.fixed(&row.backup_confirmed_us.unwrap_or(0).to_be_bytes());
    }

    /// Adds a field whose length is fixed by the format.
    fn fixed(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
    }

    /// Adds the fields of an envelope that precede its wrapped bytes.
    fn envelope_head(
        &mut self,
        algorithm: Algorithm,
        wrapping_key: WrappingKeyId,
        context: &Context<'_>,
    ) {
        self.fixed(&[context.kind().number(), algorithm.number()]);
        self.fixed(wrapping_key.as_bytes());
    }

    /// Adds the context of an envelope.
    fn context(&mut self, context: &Context<'_>) {
        match context {
            Context::Record {
                address,
                record_id,
                revision,
            } => {
                self.sized(address.tenant.as_str().as_bytes());
                self.fixed(record_id.as_bytes());
                self.sized(address.user.as_str().as_bytes());
                self.sized(address.name.as_str().as_bytes());
                self.fixed(&revision.get().to_be_bytes());
            }
            Context::Client { tenant, context } => {
                self.sized(tenant.as_str().as_bytes());
                self.sized(context.as_bytes());
            }
        }
    }

    /// Adds the length of a field of variable length, and then the field.
    fn sized(&mut self, bytes: &[u8]) {
        self.0.extend(length_u16(bytes.len()));
        self.0.extend(bytes);
    }

    fn finish(self) -> MacMessage {
        assert!(
            self.0.len() <= MESSAGE_BYTES_MAX,
            "every field has a maximum length"
        );
        MacMessage(self.0)
    }
}

/// The length of a field. The type of each field checks a maximum length, which is far below 65,536.
pub(super) fn length_u16(length: usize) -> [u8; 2] {
    u16::try_from(length)
        .expect("every field has a maximum length below 65,536")
        .to_be_bytes()
}
