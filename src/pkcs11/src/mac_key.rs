//! Integrity keys. An integrity key is usually an object on the token. For a token without HMAC keys, the integrity key
//! is a secret in the memory of this process; the token unwraps this secret from a file.
//!
//! An integrity key in memory protects the rows against an attacker who can change the database. An integrity key in
//! memory does not protect the rows against an attacker who can read the memory of a worker. The memory is not locked,
//! so the operating system can swap it out. The memory is overwritten when it is freed.
//!
//! Mitigation: M10 of `THREAT_MODEL.md`.

use std::{fmt, sync::Arc};

use aws_lc_rs::hmac;
use cryptoki::object::ObjectHandle;
use zeroize::Zeroizing;

use keybroker_core::{
    envelope::{Algorithm, MAC_BYTES, Mac},
    key::{ID_BYTES, WrappingKeyId},
};
use keybroker_worker_protocol::{
    integrity_file::{IntegrityFileError, WrappedIntegrityKey},
    oaep::WrapKey,
};

use crate::classify::{Class, Fault};

/// Length of a key in bytes, equal to the length of the hash output (RFC 2104 section 3).
const KEY_BYTES: usize = 32;
/// Prefix of the plaintext of an integrity key's file. Because of this prefix, a wrapped user key cannot be used as an
/// integrity key. The prefix is followed by the id of the wrapping key and the bytes of the integrity key.
const DOMAIN: &[u8] = b"keybroker/integrity-key/v1";
const PLAINTEXT_BYTES: usize = DOMAIN.len() + ID_BYTES + KEY_BYTES;

/// The integrity key of a wrapping key: an object on the token, or a secret of this process.
#[derive(Clone, Debug)]
pub(super) enum MacKey {
    /// An object on the token.
    OnToken(ObjectHandle),
    /// A secret in the memory of this process, or `None` until the secret is unwrapped.
    InWorker(Option<WorkerKey>),
}

impl MacKey {
    /// Returns the object on the token, if there is one.
    pub(super) fn object(&self) -> Option<ObjectHandle> {
        match self {
            Self::OnToken(object) => Some(*object),
            Self::InWorker(_) => None,
        }
    }

    /// Returns the secret in the memory of this process, if it is unwrapped.
    pub(super) fn secret(&self) -> Option<&WorkerKey> {
        match self {
            Self::OnToken(_) => None,
            Self::InWorker(key) => key.as_ref(),
        }
    }
}

impl From<ObjectHandle> for MacKey {
    fn from(object: ObjectHandle) -> Self {
        Self::OnToken(object)
    }
}

/// A key for HMAC-SHA-256 in the memory of this process. The bytes of the key are overwritten when the last copy of
/// this value is dropped. The library that computes the MACs leaves internal states on the stack, which are as useful
/// to an attacker as the key itself.
#[derive(Clone)]
pub(super) struct WorkerKey(Arc<Zeroizing<[u8; KEY_BYTES]>>);

impl fmt::Debug for WorkerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WorkerKey(redacted)")
    }
}

impl WorkerKey {
    /// The key is written directly to its final location in memory, because a copy on the stack would not be
    /// overwritten.
    fn filled(fill: impl FnOnce(&mut [u8; KEY_BYTES]) -> Result<(), Fault>) -> Result<Self, Fault> {
        let mut key = Arc::new(Zeroizing::new([0; KEY_BYTES]));
        fill(Arc::get_mut(&mut key).expect("it was just made"))?;
        Ok(Self(key))
    }

    /// Makes a new random key.
    pub(super) fn random() -> Result<Self, Fault> {
        Self::filled(|key| {
            aws_lc_rs::rand::fill(key)
                .map_err(|_| Fault::new(Class::Configuration, "the random generator failed"))
        })
    }

    /// Reads an integrity key from the plaintext that the token decrypted. Returns `None` if the plaintext is not the
    /// integrity key of this wrapping key.
    pub(super) fn from_plaintext(plaintext: &[u8], id: WrappingKeyId) -> Option<Self> {
        let key = plaintext
            .strip_prefix(DOMAIN)?
            .strip_prefix(id.as_bytes().as_slice())?;
        if key.len() != KEY_BYTES {
            return None;
        }
        Self::filled(|own| {
            own.copy_from_slice(key);
            Ok(())
        })
        .ok()
    }

    fn hmac(&self) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, self.0.as_slice())
    }

    /// Returns the HMAC-SHA-256 of a message.
    pub(super) fn mac(&self, message: &[u8]) -> Mac {
        let tag = hmac::sign(&self.hmac(), message);
        let mut mac = [0; MAC_BYTES];
        mac.copy_from_slice(tag.as_ref());
        mac
    }

    /// Returns whether a MAC is correct. The comparison takes constant time. A MAC with a wrong length is rejected.
    pub(super) fn verifies(&self, message: &[u8], mac: &[u8]) -> bool {
        hmac::verify(&self.hmac(), message, mac).is_ok()
    }

    /// Wraps the integrity key for its file, in software, under the public key of its wrapping key.
    pub(super) fn wrap(
        &self,
        id: WrappingKeyId,
        spki: &[u8],
        algorithm: Algorithm,
    ) -> Result<WrappedIntegrityKey, Fault> {
        // The full capacity is allocated at the start, because a growing vector leaves copies that are not overwritten.
        let mut plaintext = Zeroizing::new(Vec::with_capacity(PLAINTEXT_BYTES));
        plaintext.extend_from_slice(DOMAIN);
        plaintext.extend_from_slice(id.as_bytes());
        plaintext.extend_from_slice(self.0.as_slice());
        let ciphertext = WrapKey::new(spki, algorithm)
            .and_then(|key| key.wrap(&plaintext))
            .map_err(|error| Fault::new(Class::Untrusted, error.to_string()))?;
        Ok(WrappedIntegrityKey {
            wrapping_key: id,
            algorithm,
            ciphertext,
        })
    }
}

impl From<IntegrityFileError> for Fault {
    fn from(error: IntegrityFileError) -> Self {
        let class = if error.is_about_content() {
            Class::Untrusted
        } else {
            Class::Configuration
        };
        Self::new(class, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: WrappingKeyId = WrappingKeyId::from_bytes([7; ID_BYTES]);

    fn plaintext(domain: &[u8], id: WrappingKeyId, key: &[u8]) -> Vec<u8> {
        [domain, id.as_bytes(), key].concat()
    }

    /// The expected MAC comes from RFC 4231, test case 1. The test pads the key with zeros to the length of an
    /// integrity key. The padding does not change the MAC, because HMAC pads short keys with zeros (RFC 2104, section
    /// 2).
    #[test]
    fn a_mac_is_that_of_the_standard() {
        let mut key = [0; KEY_BYTES];
        key[..20].fill(0x0b);
        let key = WorkerKey::from_plaintext(&plaintext(DOMAIN, ID, &key), ID).unwrap();
        let expected = "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7";
        assert_eq!(hex::encode(key.mac(b"Hi There")), expected);
    }

    #[test]
    fn a_forged_mac_and_one_of_another_length_do_not_verify() {
        let key = WorkerKey::random().unwrap();
        let mac = key.mac(b"message");
        assert!(key.verifies(b"message", &mac));
        assert!(!key.verifies(b"massage", &mac));
        for index in 0..MAC_BYTES {
            let mut forged = mac;
            forged[index] ^= 1;
            assert!(!key.verifies(b"message", &forged));
            assert!(!key.verifies(b"message", &mac[..index]));
        }
        assert!(!key.verifies(b"message", &[mac.as_slice(), &[0]].concat()));
        assert!(!WorkerKey::random().unwrap().verifies(b"message", &mac));
    }

    /// A plaintext with a wrong prefix, wrapping key or length is rejected.
    #[test]
    fn only_a_plaintext_of_this_wrapping_key_is_an_integrity_key() {
        let other = WrappingKeyId::from_bytes([8; ID_BYTES]);
        assert!(WorkerKey::from_plaintext(&plaintext(DOMAIN, ID, &[1; 32]), ID).is_some());
        for bad in [
            vec![1; KEY_BYTES],
            plaintext(b"keybroker/integrity-key/v2", ID, &[1; 32]),
            plaintext(DOMAIN, other, &[1; 32]),
            plaintext(DOMAIN, ID, &[1; 31]),
            plaintext(DOMAIN, ID, &[1; 33]),
            Vec::new(),
        ] {
            assert!(WorkerKey::from_plaintext(&bad, ID).is_none());
        }
    }

    #[test]
    fn debug_shows_nothing() {
        let key = MacKey::InWorker(Some(WorkerKey::random().unwrap()));
        assert_eq!(format!("{key:?}"), "InWorker(Some(WorkerKey(redacted)))");
    }
}
