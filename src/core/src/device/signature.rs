//! Signatures by devices. A change that could lock a member out needs the signature of a key that was registered when the trust
//! of a device was established, because an access token of the member alone must not be sufficient.
//!
//! The signed bytes are a list of fields, each with its length as four bytes in big-endian order: the domain, the name of the
//! change, tenant, user, the signing device, the time of the signature in microseconds since 1970 as eight bytes, and the fields of
//! the change. Two different lists never result in the same bytes.

use std::fmt;

use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED, ED25519, UnparsedPublicKey};
use zeroize::Zeroizing;

use crate::{
    call::Timestamp,
    key::{DeviceId, Tenant, UserId},
};

use super::SIGNATURE_SKEW_US;

const DOMAIN: &[u8] = b"keybroker/device-signature/v1";
/// Length of a signature of both algorithms, in bytes.
pub const SIGNATURE_BYTES: usize = 64;
/// Length of a public key of Ed25519, in bytes.
const ED25519_BYTES: usize = 32;
/// Length of an uncompressed point of P-256, in bytes.
const P256_BYTES: usize = 65;
/// First byte of an uncompressed point.
const UNCOMPRESSED: u8 = 4;

/// The public key with which the broker verifies the signatures of a device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VerificationKey(Vec<u8>);

impl VerificationKey {
    /// A public key of Ed25519 (32 bytes), or an uncompressed point of P-256 for ECDSA with SHA-256 (65 bytes).
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        let is_known = match bytes.len() {
            ED25519_BYTES => true,
            P256_BYTES => bytes[0] == UNCOMPRESSED,
            _ => false,
        };
        is_known.then(|| Self(bytes.to_vec()))
    }

    /// The bytes of the public key.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    fn accepts(&self, message: &[u8], signature: &[u8; SIGNATURE_BYTES]) -> bool {
        let verified = if self.0.len() == ED25519_BYTES {
            UnparsedPublicKey::new(&ED25519, &self.0).verify(message, signature)
        } else {
            UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, &self.0).verify(message, signature)
        };
        verified.is_ok()
    }
}

/// What a device signs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatementKind {
    /// The trust of a device is established.
    Establish,
    /// The trust of devices is ended.
    Untrust,
    /// The user key and the encrypted keys of all devices are replaced.
    Rotate,
    /// The request for access of another device is approved.
    Approve,
}

impl StatementKind {
    /// All kinds.
    pub const ALL: [Self; 4] = [Self::Establish, Self::Untrust, Self::Rotate, Self::Approve];

    /// The name in the signed bytes.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Establish => "establish",
            Self::Untrust => "untrust",
            Self::Rotate => "rotate",
            Self::Approve => "approve",
        }
    }
}

/// A signature of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceSignature {
    /// The device that signed.
    pub device: DeviceId,
    /// When the device signed.
    pub at: Timestamp,
    /// Ed25519, or ECDSA as `r` and `s` with 32 bytes each.
    pub bytes: [u8; SIGNATURE_BYTES],
}

/// Why a signature does not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignatureRefused {
    /// The key did not sign these bytes.
    #[error(
        "the signature does not verify; check the signed fields, their order and the signature key"
    )]
    Wrong,
    /// The time of the signature is too far from the time of the broker.
    #[error(
        "the time of the signature differs from the broker's time by more than five minutes; check the clock of the device"
    )]
    Time,
    /// The broker has already accepted a signature of the same key with the same or a later time.
    #[error(
        "the broker has already accepted a signature with the same or a later time; sign again with the current time"
    )]
    Replayed,
}

/// The signed bytes. They may contain a user key, so they are overwritten when they are dropped.
pub struct Statement(Zeroizing<Vec<u8>>);

impl Statement {
    /// A statement of a device about its own member. `fields` are the fields of the change, in the order of the documentation.
    pub fn new(
        kind: StatementKind,
        tenant: &Tenant,
        user: &UserId,
        device: DeviceId,
        at: Timestamp,
        fields: &[&[u8]],
    ) -> Self {
        let head: [&[u8]; 6] = [
            DOMAIN,
            kind.as_str().as_bytes(),
            tenant.as_str().as_bytes(),
            user.as_str().as_bytes(),
            device.as_bytes(),
            &at.micros().to_be_bytes(),
        ];
        let all = || head.iter().chain(fields);
        // Reserve the full capacity now: a vector that grows leaves copies that are not overwritten.
        let length = all().map(|field| field.len() + 4).sum();
        let mut bytes = Zeroizing::new(Vec::with_capacity(length));
        for field in all() {
            let length = u32::try_from(field.len()).expect("a message has at most 64 KiB");
            bytes.extend_from_slice(&length.to_be_bytes());
            bytes.extend_from_slice(field);
        }
        Self(bytes)
    }

    /// The bytes to sign.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Verifies a signature of this statement. `last` is the time of the last accepted signature of the key: each key signs with
    /// increasing times, so that a signature is accepted only once.
    pub fn verify(
        &self,
        key: &VerificationKey,
        signature: &DeviceSignature,
        last: Option<Timestamp>,
        now: Timestamp,
    ) -> Result<(), SignatureRefused> {
        if !key.accepts(&self.0, &signature.bytes) {
            return Err(SignatureRefused::Wrong);
        }
        if signature.at.micros().abs_diff(now.micros()) > SIGNATURE_SKEW_US.unsigned_abs() {
            return Err(SignatureRefused::Time);
        }
        if last.is_some_and(|last| signature.at <= last) {
            return Err(SignatureRefused::Replayed);
        }
        Ok(())
    }
}

impl fmt::Debug for Statement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Statement({} bytes)", self.0.len())
    }
}
