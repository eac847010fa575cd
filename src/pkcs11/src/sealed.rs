//! Sealed release: the token unwraps a user key into a session object, and wraps this object under the public key of
//! the recipient. The user key is never in the memory of this process, unless the token is software that the module runs
//! in this process.
//!
//! Not protected: a holder of the PIN, or a program that controls this process, can wrap the session object under
//! another key. PKCS #11 cannot prevent this, because only the security officer can mark a recipient's key as trusted
//! (`CKA_WRAP_WITH_TRUSTED`).

use std::collections::VecDeque;

use cryptoki::{
    error::Error,
    object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle},
};
use keybroker_core::{envelope::Algorithm, key::Fingerprint};
use keybroker_pkcs11_ffi::Session;
use keybroker_worker_protocol::recipient::RecipientKey;

use crate::{
    attribute_check::{self, Expected, Rule},
    calling,
    classify::{Class, Fault},
    keys,
    negative::is_a_refusal,
    operation,
};

/// Largest number of recipients' keys that one session keeps. SoftHSM 2.6 never frees about 250 bytes of each session
/// object, so the keys of frequent recipients are imported only once.
pub(crate) const RECIPIENTS_MAX: usize = 64;
/// Size of the buffer for a wrapped key, in bytes: the length of the longest modulus of a recipient.
const WRAPPED_BYTES_MAX: usize = 512;

/// The required attributes of an unwrapped object. Only an extractable object can be wrapped under the recipient's key.
const UNWRAPPED: [Rule; 3] = [
    ("CKA_TOKEN", AttributeType::Token, Expected::Flag(false)),
    (
        "CKA_SENSITIVE",
        AttributeType::Sensitive,
        Expected::Flag(true),
    ),
    (
        "CKA_EXTRACTABLE",
        AttributeType::Extractable,
        Expected::Flag(true),
    ),
];

/// Returns the attributes of `CKA_UNWRAP_TEMPLATE`. With this template, the token itself refuses to make an object that
/// is readable or outlives its session.
pub(crate) fn unwrap_template() -> [Attribute; 2] {
    [Attribute::Token(false), Attribute::Sensitive(true)]
}

/// Returns the template of an unwrapped object. The template omits `CKA_VALUE_LEN`, which SoftHSM refuses. SoftHSM
/// requires that the template repeats the attributes of `CKA_UNWRAP_TEMPLATE`.
pub(crate) fn object_template() -> Vec<Attribute> {
    let mut template = vec![
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(KeyType::GENERIC_SECRET),
        Attribute::Private(true),
        Attribute::Extractable(true),
    ];
    template.extend(unwrap_template());
    template
}

/// A user key that is wrapped under a sealed wrapping key.
#[derive(Clone, Debug)]
pub(crate) struct SealedKey {
    /// The private object of the sealed wrapping key.
    pub(crate) private: ObjectHandle,
    /// The algorithm with which the user key is wrapped.
    pub(crate) algorithm: Algorithm,
    pub(crate) wrapped: Vec<u8>,
}

impl SealedKey {
    /// Unwraps into an object (`C_UnwrapKey`).
    pub(crate) fn unwrap(
        &self,
        session: &Session,
        template: &[Attribute],
    ) -> Result<ObjectHandle, Error> {
        calling::next("C_UnwrapKey");
        let mechanism = operation::oaep(self.algorithm);
        session.unwrap_key(&mechanism, self.private, &self.wrapped, template)
    }

    /// Unwraps into a session object that cannot be read, passes the object to `work`, and removes the object. After an
    /// error, the caller must close the session, which also removes an object that `C_DestroyObject` did not remove.
    pub(crate) fn with_unwrapped<T>(
        &self,
        session: &Session,
        work: impl FnOnce(ObjectHandle) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        let object = self.unwrap(session, &object_template())?;
        let done = require_sealed(session, object).and_then(|()| work(object));
        calling::next("C_DestroyObject");
        let removed = session.destroy_object(object).map_err(|error| {
            Fault::from(error).about("the token did not remove the object of a sealed release")
        });
        let done = done?;
        removed?;
        Ok(done)
    }

    /// Wraps the user key under the public key of the recipient, with an empty OAEP label.
    pub(crate) fn release(
        &self,
        session: &Session,
        recipient: Recipient,
        algorithm: Algorithm,
    ) -> Result<Vec<u8>, Fault> {
        self.with_unwrapped(session, |object| recipient.wrap(session, object, algorithm))
    }
}

/// Checks that the token honoured the template: some tokens accept a template and make a readable object.
fn require_sealed(session: &Session, object: ObjectHandle) -> Result<(), Fault> {
    let findings = attribute_check::inspect(session, object, &UNWRAPPED, &[])?;
    let mut wrong: Vec<String> = findings
        .iter()
        .filter(|finding| !finding.passes())
        .map(ToString::to_string)
        .collect();
    match attribute_check::reveals(session, object, AttributeType::Value) {
        Ok(true) => wrong.push("CKA_VALUE can be read".to_owned()),
        Err(error) if !is_a_refusal(&error) => return Err(error.into()),
        Ok(false) | Err(_) => {}
    }
    if wrong.is_empty() {
        return Ok(());
    }
    Err(Fault::new(
        Class::Untrusted,
        format!(
            "the object of a sealed release is not protected: {}",
            wrong.join("; ")
        ),
    ))
}

/// The public key of a recipient, as a session object.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Recipient {
    object: ObjectHandle,
    modulus_bytes: usize,
}

impl Recipient {
    /// Wraps an object under the public key (`C_WrapKey`).
    fn wrap(
        self,
        session: &Session,
        object: ObjectHandle,
        algorithm: Algorithm,
    ) -> Result<Vec<u8>, Fault> {
        let mut wrapped = vec![0; WRAPPED_BYTES_MAX];
        calling::next("C_WrapKey");
        let mechanism = operation::oaep(algorithm);
        let length = session.wrap_key_into(&mechanism, self.object, object, &mut wrapped)?;
        if length != self.modulus_bytes {
            return Err(Fault::new(
                Class::Untrusted,
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
    /// Returns the session object of a recipient's key. Imports the key if the session does not have it, and then
    /// removes the least recently used key if the session has too many keys.
    pub(crate) fn object(
        &mut self,
        session: &Session,
        key: &RecipientKey,
    ) -> Result<Recipient, Fault> {
        let fingerprint = key.fingerprint();
        let known = self.0.iter().position(|(known, _)| *known == fingerprint);
        let recipient = match known.and_then(|at| self.0.remove(at)) {
            Some((_, recipient)) => recipient,
            None => import(session, key)?,
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
    let template = keys::recipient_template(Attribute::Modulus(key.modulus().to_vec()));
    calling::next("C_CreateObject");
    Ok(Recipient {
        object: session.create_object(&template)?,
        modulus_bytes: key.modulus().len(),
    })
}
