//! The envelope: the versioned bytes of one wrapped user key, and the message that its MAC covers.
//!
//! Format 1 has these fields; all integers are big-endian:
//!
//! | offset | length | what |
//! |---|---|---|
//! | 0 | 1 | format version, 1 |
//! | 1 | 1 | kind: 1 record, 2 client |
//! | 2 | 1 | algorithm: 1 RSA-OAEP-SHA-256, 2 RSA-OAEP-SHA-1 |
//! | 3 | 16 | wrapping key id (`CKA_ID`) |
//! | 19 | 2 | length of the wrapped bytes, 256 to 512 |
//! | 21 | n | wrapped bytes |
//! | 21 + n | 32 | MAC: HMAC-SHA-256 under the integrity key over [`Envelope::mac_message`] |
//!
//! The MAC protects against these changes: a row is moved to another tenant, user, key name, record or revision; a row
//! is forged with the public key alone; a row is altered. A changed row is refused before the RSA key is used.
//!
//! The MAC does not protect against the deletion of a row. The MAC also does not protect against a rollback: an earlier
//! row of the same record and revision number still has a valid MAC. A comparison of the store with the audit log finds
//! deletions and rollbacks.
//!
//! Mitigation: M6 of `THREAT_MODEL.md`.

use std::fmt;

use crate::key::{ID_BYTES, KeyAddress, RecordId, Revision, Tenant, WrappingKeyId};

pub mod mac;
#[cfg(test)]
mod tests;

use mac::MacMessage;

/// The only format version that this release writes.
pub const FORMAT_VERSION: u8 = 1;
/// Length of an HMAC-SHA-256, in bytes.
pub const MAC_BYTES: usize = 32;
/// Shortest wrapped key: the modulus of RSA-2048, in bytes.
pub const WRAPPED_BYTES_MIN: usize = 256;
/// Longest wrapped key: the modulus of RSA-4096, in bytes.
pub const WRAPPED_BYTES_MAX: usize = 512;
/// Longest context to which a client may bind its own envelope, in bytes.
pub const CLIENT_CONTEXT_BYTES_MAX: usize = 1_024;

const HEADER_BYTES: usize = 3 + ID_BYTES + 2;
/// Longest envelope, in bytes.
pub const ENVELOPE_BYTES_MAX: usize = HEADER_BYTES + WRAPPED_BYTES_MAX + MAC_BYTES;

/// A MAC under an integrity key.
pub type Mac = [u8; MAC_BYTES];

/// The algorithm with which key material is wrapped. Every envelope contains the number of its algorithm, and a number
/// is never reused for another algorithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// RSA-OAEP with SHA-256 for hash and MGF1, empty label (RFC 8017 section 7.1).
    RsaOaepSha256,
    /// RSA-OAEP with SHA-1 for hash and MGF1, empty label. This algorithm is only for tokens whose OAEP supports no
    /// other hash, and only if the operator sets `allow_oaep_sha1`. The collision attacks on SHA-1 do not apply to
    /// OAEP, but no new design should use SHA-1.
    RsaOaepSha1,
}

impl Algorithm {
    /// Number in the envelope.
    pub const fn number(self) -> u8 {
        match self {
            Self::RsaOaepSha256 => 1,
            Self::RsaOaepSha1 => 2,
        }
    }

    /// Returns the algorithm with this number.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::RsaOaepSha256),
            2 => Some(Self::RsaOaepSha1),
            _ => None,
        }
    }

    /// The name for people, such as `RSA-OAEP-SHA-256`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::RsaOaepSha256 => "RSA-OAEP-SHA-256",
            Self::RsaOaepSha1 => "RSA-OAEP-SHA-1",
        }
    }
}

/// The context to which an envelope is bound: a record of the store, or a context that a client chose. An envelope of
/// one kind is never valid as an envelope of another kind.
#[derive(Clone, Copy, Debug)]
pub enum Context<'a> {
    /// One revision of one record in the store.
    Record {
        /// Tenant, user and key name.
        address: &'a KeyAddress,
        /// The id of the record; each create uses a new id.
        record_id: RecordId,
        /// The revision.
        revision: Revision,
    },
    /// An envelope that a client stores itself. This kind of envelope is reserved for later releases. The MAC of a
    /// client's envelope is never valid for a record.
    Client {
        /// The client's tenant.
        tenant: &'a Tenant,
        /// The client's own context, at most 1,024 bytes.
        context: &'a ClientContext,
    },
}

impl Context<'_> {
    const fn kind(&self) -> Kind {
        match self {
            Self::Record { .. } => Kind::Record,
            Self::Client { .. } => Kind::Client,
        }
    }
}

/// The context to which a client binds its own envelope: at most 1,024 bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientContext(Vec<u8>);

impl ClientContext {
    /// Creates a context from at most 1,024 bytes.
    pub fn new(bytes: Vec<u8>) -> Option<Self> {
        (bytes.len() <= CLIENT_CONTEXT_BYTES_MAX).then_some(Self(bytes))
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// The party that stores the envelope.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The store.
    Record,
    /// A client.
    Client,
}

impl Kind {
    const fn number(self) -> u8 {
        match self {
            Self::Record => 1,
            Self::Client => 2,
        }
    }
}

/// The reason why bytes are not a valid envelope. The cause is logged, and is not returned to callers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// The bytes end before the last field of the envelope.
    #[error("the envelope is truncated")]
    Truncated,
    /// A format version that this release does not support.
    #[error("unknown envelope format version {0}")]
    Version(u8),
    /// A kind of envelope that this release does not support.
    #[error("unknown envelope kind {0}")]
    Kind(u8),
    /// An algorithm that this release does not support.
    #[error("unknown envelope algorithm {0}")]
    Algorithm(u8),
    /// A wrapped key whose length does not fit any permitted RSA key.
    #[error("a wrapped key cannot have {0} bytes")]
    WrappedLength(usize),
    /// Bytes after the end.
    #[error("{0} bytes after the end of the envelope")]
    Trailing(usize),
}

/// One wrapped user key.
#[derive(Clone, PartialEq, Eq)]
pub struct Envelope {
    kind: Kind,
    algorithm: Algorithm,
    wrapping_key: WrappingKeyId,
    wrapped: Vec<u8>,
    mac: Mac,
}

/// An envelope that has no MAC yet.
#[derive(Clone, Debug)]
pub struct Unsealed {
    algorithm: Algorithm,
    wrapping_key: WrappingKeyId,
    wrapped: Vec<u8>,
}

impl Unsealed {
    /// Creates an envelope from wrapped bytes of a permitted length, their algorithm and their wrapping key.
    pub fn new(
        algorithm: Algorithm,
        wrapping_key: WrappingKeyId,
        wrapped: Vec<u8>,
    ) -> Result<Self, ParseError> {
        check_wrapped_length(wrapped.len())?;
        Ok(Self {
            algorithm,
            wrapping_key,
            wrapped,
        })
    }

    /// The message that the MAC of the envelope covers.
    pub fn mac_message(&self, context: &Context<'_>) -> MacMessage {
        MacMessage::envelope(self.algorithm, self.wrapping_key, &self.wrapped, context)
    }

    /// Returns the parts of the MAC message before and after the wrapped bytes, for an envelope that is not complete
    /// yet. Use this function to make the wrapped bytes and the MAC in one step. `wrapped_length` is the number of
    /// wrapped bytes: 256 to 512.
    pub fn message_around(
        algorithm: Algorithm,
        wrapping_key: WrappingKeyId,
        wrapped_length: usize,
        context: &Context<'_>,
    ) -> Result<[Vec<u8>; 2], ParseError> {
        check_wrapped_length(wrapped_length)?;
        Ok(MacMessage::around_envelope(
            algorithm,
            wrapping_key,
            wrapped_length,
            context,
        ))
    }

    /// Adds the MAC over the result of [`Self::mac_message`] for this context.
    pub fn seal(self, context: &Context<'_>, mac: Mac) -> Envelope {
        Envelope {
            kind: context.kind(),
            algorithm: self.algorithm,
            wrapping_key: self.wrapping_key,
            wrapped: self.wrapped,
            mac,
        }
    }
}

impl Envelope {
    /// Reads an envelope without verifying its MAC.
    pub fn parse(bytes: &[u8]) -> Result<Self, ParseError> {
        let mut rest = bytes;
        match take_byte(&mut rest)? {
            FORMAT_VERSION => {}
            other => return Err(ParseError::Version(other)),
        }
        let kind = match take_byte(&mut rest)? {
            1 => Kind::Record,
            2 => Kind::Client,
            other => return Err(ParseError::Kind(other)),
        };
        let algorithm = take_byte(&mut rest)?;
        let algorithm =
            Algorithm::from_number(algorithm).ok_or(ParseError::Algorithm(algorithm))?;
        let wrapping_key = WrappingKeyId::from_bytes(take_array(&mut rest)?);
        let length = usize::from(u16::from_be_bytes(take_array(&mut rest)?));
        check_wrapped_length(length)?;
        let wrapped = take(&mut rest, length)?.to_vec();
        let mac = take_array(&mut rest)?;
        if !rest.is_empty() {
            return Err(ParseError::Trailing(rest.len()));
        }
        Ok(Self {
            kind,
            algorithm,
            wrapping_key,
            wrapped,
            mac,
        })
    }

    /// The bytes to store.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + self.wrapped.len() + MAC_BYTES);
        bytes.extend([FORMAT_VERSION, self.kind.number(), self.algorithm.number()]);
        bytes.extend(self.wrapping_key.as_bytes());
        bytes.extend(mac::length_u16(self.wrapped.len()));
        bytes.extend(&self.wrapped);
        bytes.extend(self.mac);
        bytes
    }

    /// The party that stores the envelope: the broker or the client.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The algorithm that wrapped the user key.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// The id of the wrapping key under which the user key is wrapped.
    pub fn wrapping_key(&self) -> WrappingKeyId {
        self.wrapping_key
    }

    /// The wrapped bytes, which are as long as the modulus of the RSA key.
    pub fn wrapped(&self) -> &[u8] {
        &self.wrapped
    }

    /// The MAC.
    pub fn mac(&self) -> &Mac {
        &self.mac
    }

    /// The message that the MAC must cover if the envelope belongs to the context. The message contains the kind of the
    /// context, so an envelope of another kind fails the MAC check even if its kind byte was changed.
    pub fn mac_message(&self, context: &Context<'_>) -> MacMessage {
        MacMessage::envelope(self.algorithm, self.wrapping_key, &self.wrapped, context)
    }

    /// The wrapped bytes of this envelope without its MAC, for a MAC over another context.
    pub fn to_unsealed(&self) -> Unsealed {
        Unsealed {
            algorithm: self.algorithm,
            wrapping_key: self.wrapping_key,
            wrapped: self.wrapped.clone(),
        }
    }
}

impl fmt::Debug for Envelope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Envelope")
            .field("kind", &self.kind)
            .field("algorithm", &self.algorithm)
            .field("wrapping_key", &self.wrapping_key)
            .field("wrapped_bytes", &self.wrapped.len())
            .finish_non_exhaustive()
    }
}

fn check_wrapped_length(length: usize) -> Result<(), ParseError> {
    if (WRAPPED_BYTES_MIN..=WRAPPED_BYTES_MAX).contains(&length) {
        Ok(())
    } else {
        Err(ParseError::WrappedLength(length))
    }
}

fn take<'a>(rest: &mut &'a [u8], count: usize) -> Result<&'a [u8], ParseError> {
    let (head, tail) = rest.split_at_checked(count).ok_or(ParseError::Truncated)?;
    *rest = tail;
    Ok(head)
}

fn take_array<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], ParseError> {
    take(rest, N)?.try_into().map_err(|_| ParseError::Truncated)
}

fn take_byte(rest: &mut &[u8]) -> Result<u8, ParseError> {
    take_array(rest).map(|[byte]| byte)
}
