//! The public keys of the recipients of sealed releases, as session objects of the token.

use std::collections::VecDeque;

use cryptoki::object::{Attribute, KeyType, ObjectClass, ObjectHandle};
use keybroker_core::{envelope::Algorithm, key::Fingerprint};
use keybroker_pkcs11_ffi::Session;
use keybroker_worker_protocol::{oaep, recipient::RecipientKey};

use crate::{
    calling,
    classify::{Class, Fault},
    oaep::mechanism,
};

/// Largest number of recipients' keys that one session keeps. SoftHSM 2.6 never frees about 250 bytes of each session
/// object, so the keys of frequent recipients are imported only once.
pub(crate) const RECIPIENTS_MAX: usize = 64;
/// Size of the buffer for a wrapped key, in bytes: the length of the longest modulus of a recipient.
const WRAPPED_BYTES_MAX: usize = 512;
/// Length of the modulus of the recipient in the self-tests, in bytes: see `RecipientPair::of_process`.
const SELF_TEST_MODULUS_BYTES: usize = 256;

/// The public exponent 65537, big-endian.
const PUBLIC_EXPONENT: [u8; 3] = [0x01, 0x00, 0x01];

/// Returns the template of a session object with this modulus, under which other objects are wrapped.
pub(crate) fn recipient_template(modulus: Attribute) -> [Attribute; 6] {
    [
        Attribute::Class(ObjectClass::PUBLIC_KEY),
        Attribute::KeyType(KeyType::RSA),
        modulus,
        Attribute::PublicExponent(PUBLIC_EXPONENT.to_vec()),
        Attribute::Token(false),
        Attribute::Wrap(true),
    ]
}

/// The public key of a recipient, as a session object.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Recipient {
    object: ObjectHandle,
    modulus_bytes: usize,
}

impl Recipient {
    /// Wraps an object under the public key (`C_WrapKey`).
    pub(crate) fn wrap(
        self,
        session: &Session,
        object: ObjectHandle,
        algorithm: Algorithm,
    ) -> Result<Vec<u8>, Fault> {
        let mut wrapped = vec![0; WRAPPED_BYTES_MAX];
        calling::next("C_WrapKey");
        let mechanism = mechanism(algorithm);
        let length = session.wrap_key_into(&mechanism, self.object, object, &mut wrapped)?;
        if length != self.modulus_bytes {
            // A ciphertext is as long as the modulus (RFC 8017 section 7.1.1), so only a faulty token returns another
            // length. The self-tests of the worker prove the length of their own recipient, so a token that returns a wrong
            // result for this length must not be used. The self-tests do not prove the other lengths, and callers choose
            // the length: one caller could take a token that fails only with another length out of service for all. For
            // another length, only this recipient is refused, if the self-tests still pass. No caller gets the bytes.
            let class = if self.modulus_bytes == SELF_TEST_MODULUS_BYTES {
                Class::Untrusted
            } else {
                Class::Ambiguous
            };
            return Err(Fault::new(
                class,
                format!(
                    "C_WrapKey returned {length} bytes for a recipient's key of {} bytes",
                    self.modulus_bytes
                ),
            ));
        }
        wrapped.truncate(length);
        Ok(wrapped)
    }
}

/// The recipients' keys that one session has imported, beginning with the least recently used key.
#[derive(Debug, Default)]
pub(crate) struct Recipients(VecDeque<(Fingerprint, Recipient)>);

impl Recipients {
    /// Returns the session object of a recipient's key, a DER SubjectPublicKeyInfo. Checks and imports the key if the
    /// session does not have it, and then removes the least recently used key if the session has too many keys.
    pub(crate) fn object(&mut self, session: &Session, spki: &[u8]) -> Result<Recipient, Fault> {
        let fingerprint = oaep::fingerprint(spki);
        let known = self.0.iter().position(|(known, _)| *known == fingerprint);
        let recipient = if let Some((_, recipient)) = known.and_then(|at| self.0.remove(at)) {
            recipient
        } else {
            let key = RecipientKey::from_spki(spki).map_err(|error| {
                Fault::new(Class::Input, format!("the key of the recipient: {error}"))
            })?;
            import(session, &key)?
        };
        self.0.push_back((fingerprint, recipient));
        if self.0.len() > RECIPIENTS_MAX
            && let Some((_, oldest)) = self.0.pop_front()
        {
            calling::next("C_DestroyObject");
            session.destroy_object(oldest.object)?;
        }
        Ok(recipient)
    }
}

fn import(session: &Session, key: &RecipientKey) -> Result<Recipient, Fault> {
    let template = recipient_template(Attribute::Modulus(key.modulus().to_vec()));
    calling::next("C_CreateObject");
    Ok(Recipient {
        object: session.create_object(&template)?,
        modulus_bytes: key.modulus().len(),
    })
}
