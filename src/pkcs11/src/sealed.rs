//! Sealed release: the token unwraps a user key into a session object, and wraps this object under the public key of
//! the recipient. The user key is never in the memory of this process, unless the token is software that the module runs
//! in this process.
//!
//! Not protected: a holder of the PIN, or a program that controls this process, can wrap the session object under
//! another key. PKCS #11 cannot prevent this, because only the security officer can mark a recipient's key as trusted
//! (`CKA_WRAP_WITH_TRUSTED`).
//!
//! Mitigation: M26 of `THREAT_MODEL.md`.

use cryptoki::{
    error::Error,
    object::{Attribute, AttributeType, ObjectHandle},
};
use keybroker_core::{envelope::Algorithm, key::Sealing};
use keybroker_pkcs11_ffi::Session;

use crate::{
    attribute_check::{self, Expected, Rule},
    calling,
    classify::{Class, Fault, is_a_refusal},
    keys::{KeySession, object_template},
    oaep,
    recipients::Recipient,
};

mod pair;

pub(crate) use pair::RecipientPair;

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

/// The values of `CKA_SENSITIVE` in a template with which a token must not make a readable object: true, false, or absent.
pub(crate) const SENSITIVE_IN_TEMPLATE: [Option<bool>; 3] = [Some(true), Some(false), None];

/// Returns the template of an unwrapped object with this value of `CKA_SENSITIVE`.
pub(crate) fn object_template_with(sensitive: Option<bool>) -> Vec<Attribute> {
    let mut template = object_template();
    template.retain(|it| it.attribute_type() != AttributeType::Sensitive);
    template.extend(sensitive.map(Attribute::Sensitive));
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
        let mechanism = oaep::mechanism(self.algorithm);
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

    /// Finds the protection of this wrapping key: tries to unwrap into a readable object. Each attempt uses a new session.
    pub(crate) fn sealing(
        &self,
        open: impl Fn() -> Result<KeySession, Fault>,
    ) -> Result<Sealing, Fault> {
        for sensitive in SENSITIVE_IN_TEMPLATE {
            let session = open()?.session;
            match self.unwraps_readable(&session, sensitive) {
                Ok(false) => {}
                Ok(true) => return Ok(Sealing::Worker),
                Err(error) if is_a_refusal(&error) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Sealing::Enforced)
    }

    /// Unwraps with this value of `CKA_SENSITIVE` in the template. Returns whether the object is readable.
    pub(crate) fn unwraps_readable(
        &self,
        session: &Session,
        sensitive: Option<bool>,
    ) -> Result<bool, Error> {
        let object = self.unwrap(session, &object_template_with(sensitive))?;
        let is_readable = is_readable(session, object);
        calling::next("C_DestroyObject");
        // If the removal fails, the token removes the object when the session ends.
        let _removed = session.destroy_object(object);
        is_readable
    }
}

/// Whether an unwrapped object is not sensitive, or shows its value.
pub(crate) fn is_readable(session: &Session, object: ObjectHandle) -> Result<bool, Error> {
    let is_sensitive = matches!(
        session.attribute(object, AttributeType::Sensitive)?,
        Some(Attribute::Sensitive(true))
    );
    Ok(!is_sensitive || attribute_check::reveals(session, object, AttributeType::Value)?)
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
