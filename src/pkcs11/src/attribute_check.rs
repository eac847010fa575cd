//! The attribute check: what a key must be before it is used, read back from the token one attribute at a time.
//!
//! One purpose per RSA key (decrypt, never unwrap or sign) leaves the wrap/decrypt attack on PKCS#11 (Clulow 2003) nothing
//! to work with; MODIFIABLE and COPYABLE false keep it so.
//!
//! Mitigation: M16 of `THREAT_MODEL.md`.

use std::fmt;

use cryptoki::{
    mechanism::MechanismType,
    object::{Attribute, AttributeType, ObjectHandle},
    session::Session,
};

use crate::{
    calling,
    classify::{Class, Fault},
};

/// What an attribute must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// `CK_TRUE` or `CK_FALSE`.
    Flag(bool),
    /// Exactly this one mechanism is allowed.
    OnlyMechanism(Mechanism),
}

/// A mechanism that a key may be bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mechanism {
    /// `CKM_RSA_PKCS_OAEP`.
    RsaOaep,
    /// `CKM_SHA256_HMAC`.
    Sha256Hmac,
}

impl Mechanism {
    pub(super) const fn to_type(self) -> MechanismType {
        match self {
            Self::RsaOaep => MechanismType::RSA_PKCS_OAEP,
            Self::Sha256Hmac => MechanismType::SHA256_HMAC,
        }
    }
}

/// What the token said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// As it must be.
    AsExpected,
    /// Something else.
    Wrong,
    /// Not there, and a named exception of the configuration says that this token cannot express it.
    Excepted,
    /// Not there.
    Missing,
}

/// The verdict on one attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Name in the standard, such as `CKA_SENSITIVE`.
    pub attribute: &'static str,
    /// What it must be.
    pub expected: Expected,
    /// What it is.
    pub found: Found,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let expected = match self.expected {
            Expected::Flag(true) => "true",
            Expected::Flag(false) => "false",
            Expected::OnlyMechanism(Mechanism::RsaOaep) => "exactly CKM_RSA_PKCS_OAEP",
            Expected::OnlyMechanism(Mechanism::Sha256Hmac) => "exactly CKM_SHA256_HMAC",
        };
        let found = match self.found {
            Found::AsExpected => "is",
            Found::Wrong => "is not",
            Found::Excepted | Found::Missing => "is absent, must be",
        };
        write!(f, "{} {found} {expected}", self.attribute)
    }
}

impl Finding {
    /// Whether the key may be used as far as this attribute goes.
    pub fn passes(&self) -> bool {
        matches!(self.found, Found::AsExpected | Found::Excepted)
    }
}

/// One row: name, type, expected value.
pub(super) type Rule = (&'static str, AttributeType, Expected);

const TRUE: Expected = Expected::Flag(true);
const FALSE: Expected = Expected::Flag(false);

/// The rules of every key: a secret that was made on the token, stays there and does not change.
const EVERY_KEY: [Rule; 9] = [
    ("CKA_TOKEN", AttributeType::Token, TRUE),
    ("CKA_PRIVATE", AttributeType::Private, TRUE),
    ("CKA_SENSITIVE", AttributeType::Sensitive, TRUE),
    ("CKA_ALWAYS_SENSITIVE", AttributeType::AlwaysSensitive, TRUE),
    (
        "CKA_NEVER_EXTRACTABLE",
        AttributeType::NeverExtractable,
        TRUE,
    ),
    ("CKA_LOCAL", AttributeType::Local, TRUE),
    ("CKA_EXTRACTABLE", AttributeType::Extractable, FALSE),
    ("CKA_MODIFIABLE", AttributeType::Modifiable, FALSE),
    ("CKA_COPYABLE", AttributeType::Copyable, FALSE),
];

/// The RSA private key of purpose *plain*.
pub(super) const RSA_PRIVATE: &[Rule] = &with_those_of_every_key::<6, 15>([
    ("CKA_DECRYPT", AttributeType::Decrypt, TRUE),
    ("CKA_SIGN", AttributeType::Sign, FALSE),
    ("CKA_SIGN_RECOVER", AttributeType::SignRecover, FALSE),
    ("CKA_UNWRAP", AttributeType::Unwrap, FALSE),
    ("CKA_DERIVE", AttributeType::Derive, FALSE),
    (
        "CKA_ALLOWED_MECHANISMS",
        AttributeType::AllowedMechanisms,
        Expected::OnlyMechanism(Mechanism::RsaOaep),
    ),
]);

/// The integrity key.
pub(super) const BINDING: &[Rule] = &with_those_of_every_key::<8, 17>([
    ("CKA_SIGN", AttributeType::Sign, TRUE),
    ("CKA_VERIFY", AttributeType::Verify, TRUE),
    ("CKA_ENCRYPT", AttributeType::Encrypt, FALSE),
    ("CKA_DECRYPT", AttributeType::Decrypt, FALSE),
    ("CKA_WRAP", AttributeType::Wrap, FALSE),
    ("CKA_UNWRAP", AttributeType::Unwrap, FALSE),
    ("CKA_DERIVE", AttributeType::Derive, FALSE),
    (
        "CKA_ALLOWED_MECHANISMS",
        AttributeType::AllowedMechanisms,
        Expected::OnlyMechanism(Mechanism::Sha256Hmac),
    ),
]);

/// [`EVERY_KEY`] and the rules of one kind of key, `N` in all. Another number does not compile.
const fn with_those_of_every_key<const OWN: usize, const N: usize>(own: [Rule; OWN]) -> [Rule; N] {
    assert!(EVERY_KEY.len() + OWN == N, "the number of rules");
    let mut rules = [EVERY_KEY[0]; N];
    let mut at = 0;
    while at < N {
        rules[at] = if at < EVERY_KEY.len() {
            EVERY_KEY[at]
        } else {
            own[at - EVERY_KEY.len()]
        };
        at += 1;
    }
    rules
}

/// Names of all attributes that are checked: what `token.attribute_exceptions` may hold.
pub fn attribute_names() -> impl Iterator<Item = &'static str> {
    RSA_PRIVATE.iter().chain(BINDING).map(|(name, ..)| *name)
}

/// Reads every attribute of the rules. The verdict on each, in their order.
pub(super) fn inspect(
    session: &Session,
    object: ObjectHandle,
    rules: &[Rule],
    exceptions: &[String],
) -> Result<Vec<Finding>, Fault> {
    rules
        .iter()
        .map(|(name, kind, expected)| {
            let found = match read(session, object, *kind)? {
                Some(attribute) if is_expected(&attribute, *expected) => Found::AsExpected,
                Some(_) => Found::Wrong,
                None if exceptions.iter().any(|exception| exception == name) => Found::Excepted,
                None => Found::Missing,
            };
            Ok(Finding {
                attribute: name,
                expected: *expected,
                found,
            })
        })
        .collect()
}

/// Refuses a key with any finding that does not pass, naming all of them.
pub(super) fn require(what: &str, findings: &[Finding]) -> Result<(), Fault> {
    let wrong: Vec<String> = findings
        .iter()
        .filter(|finding| !finding.passes())
        .map(ToString::to_string)
        .collect();
    if wrong.is_empty() {
        return Ok(());
    }
    Err(Fault::new(
        Class::Untrusted,
        format!(
            "{what} must not be used: {}. A key with these attributes may have been copied or may be \
             misused; make another with `keybroker key generate`, or where the token cannot express \
             an attribute name it in `token.attribute_exceptions`",
            wrong.join("; ")
        ),
    ))
}

/// One attribute, or `None` when the token does not have it. An empty list is how an absent attribute reads.
pub(super) fn read(
    session: &Session,
    object: ObjectHandle,
    kind: AttributeType,
) -> Result<Option<Attribute>, Fault> {
    use cryptoki::error::{Error, RvError};
    calling::next("C_GetAttributeValue");
    match session.get_attributes(object, &[kind]) {
        Ok(attributes) => Ok(attributes.into_iter().next()),
        Err(Error::Pkcs11(RvError::AttributeTypeInvalid | RvError::AttributeSensitive, _)) => {
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

fn is_expected(attribute: &Attribute, expected: Expected) -> bool {
    match (attribute, expected) {
        (Attribute::AllowedMechanisms(found), Expected::OnlyMechanism(only)) => {
            found.as_slice() == [only.to_type()]
        }
        (
            Attribute::Token(found)
            | Attribute::Private(found)
            | Attribute::Sensitive(found)
            | Attribute::AlwaysSensitive(found)
            | Attribute::NeverExtractable(found)
            | Attribute::Local(found)
            | Attribute::Extractable(found)
            | Attribute::Modifiable(found)
            | Attribute::Copyable(found)
            | Attribute::Encrypt(found)
            | Attribute::Decrypt(found)
            | Attribute::Sign(found)
            | Attribute::SignRecover(found)
            | Attribute::Verify(found)
            | Attribute::Wrap(found)
            | Attribute::Unwrap(found)
            | Attribute::Derive(found),
            Expected::Flag(flag),
        ) => *found == flag,
        _ => false,
    }
}
