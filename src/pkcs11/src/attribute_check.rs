//! The attribute check: what a key must be before it is used, read back from the token one attribute at a time.
//!
//! One purpose per RSA key (decrypt, never unwrap or sign) leaves the wrap/decrypt attack on PKCS#11 (Clulow 2003) nothing
//! to work with; MODIFIABLE and COPYABLE false keep it so.
//!
//! Mitigation: M16 of `THREAT_MODEL.md`.

use std::{borrow::Cow, fmt};

use cryptoki::{
    error::{Error, RvError},
    mechanism::MechanismType,
    object::{Attribute, AttributeType, KeyType, ObjectHandle},
};
use keybroker_pkcs11_ffi::Session;

use keybroker_worker_protocol::AccessControl;

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
    /// A number that is not smaller.
    AtLeastBytes(u16),
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
    /// Not there, or not readable, and a named exception of the configuration says that this token cannot express it.
    Excepted,
    /// Not there, and the type of the key says the same (`CKK_SHA256_HMAC`).
    ImpliedByType,
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
        let expected: Cow<'_, str> = match self.expected {
            Expected::Flag(true) => "true".into(),
            Expected::Flag(false) => "false".into(),
            Expected::OnlyMechanism(Mechanism::RsaOaep) => "exactly CKM_RSA_PKCS_OAEP".into(),
            Expected::OnlyMechanism(Mechanism::Sha256Hmac) => "exactly CKM_SHA256_HMAC".into(),
            Expected::AtLeastBytes(bytes) => format!("at least {bytes} bytes").into(),
        };
        let found = match self.found {
            Found::AsExpected => "is",
            Found::Wrong => "is not",
            Found::Excepted => "is absent and excepted, should be",
            Found::ImpliedByType => "is absent, and the type of the key implies",
            Found::Missing => "is absent, must be",
        };
        write!(f, "{} {found} {expected}", self.attribute)
    }
}

impl Finding {
    /// Whether the key may be used as far as this attribute goes.
    pub fn passes(&self) -> bool {
        matches!(
            self.found,
            Found::AsExpected | Found::Excepted | Found::ImpliedByType
        )
    }

    /// Whether the token does not have the attribute.
    pub(crate) fn is_absent(&self) -> bool {
        matches!(self.found, Found::Missing | Found::Excepted)
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

/// What `access_control = "outside-pkcs11"` permits, in one sentence without its end.
pub const ACCESS_OUTSIDE_PKCS11: &str = "every program that has the vendor's credentials can use the keys, because the token demands no login";

/// What `integrity_key = "worker"` permits, in one sentence without its end.
pub const INTEGRITY_KEY_IN_WORKER: &str = "a person who reads the memory of a worker, decrypts the file with the token and its PIN, or \
     changes both the file and the configuration can forge rows, also later and without the token; the rows stay protected against a \
     thief or a writer of the database";

/// The rules for keys to which access is controlled in this way.
pub(super) fn adapted(rules: &[Rule], access: AccessControl) -> Vec<Rule> {
    rules
        .iter()
        .map(|(name, kind, expected)| match (access, kind) {
            (AccessControl::OutsidePkcs11, AttributeType::Private) => (*name, *kind, FALSE),
            _ => (*name, *kind, *expected),
        })
        .collect()
}

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
pub(super) const INTEGRITY_KEY: &[Rule] = &with_those_of_every_key::<9, 18>([
    ("CKA_SIGN", AttributeType::Sign, TRUE),
    ("CKA_VERIFY", AttributeType::Verify, TRUE),
    ("CKA_ENCRYPT", AttributeType::Encrypt, FALSE),
    ("CKA_DECRYPT", AttributeType::Decrypt, FALSE),
    ("CKA_WRAP", AttributeType::Wrap, FALSE),
    ("CKA_UNWRAP", AttributeType::Unwrap, FALSE),
    ("CKA_DERIVE", AttributeType::Derive, FALSE),
    (
        "CKA_VALUE_LEN",
        AttributeType::ValueLen,
        // As long as the output of the hash function (NIST SP 800-107, section 5.3.4). A thief of the database could find a shorter
        // key by trying all values.
        Expected::AtLeastBytes(32),
    ),
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

/// An attribute that `token.attribute_exceptions` may name, because tokens exist that cannot express it, and the risk
/// of the exception. No exception lets a key leave the token: that `CKA_TOKEN`, `CKA_PRIVATE`, `CKA_SENSITIVE`,
/// `CKA_EXTRACTABLE`,
/// `CKA_ALWAYS_SENSITIVE` and `CKA_NEVER_EXTRACTABLE` are right is always required.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Name in the standard.
    pub attribute: &'static str,
    /// What a holder of the user PIN can do with the keys that the attribute would prevent, in one sentence.
    pub gives_away: &'static str,
}

const fn exception(attribute: &'static str, gives_away: &'static str) -> Exception {
    Exception {
        attribute,
        gives_away,
    }
}

/// Everything that may be excepted.
pub const EXCEPTIONS: &[Exception] = &[
    exception(
        "CKA_LOCAL",
        "the token does not say whether a key was made on it, so copies of a key may exist elsewhere",
    ),
    exception(
        "CKA_MODIFIABLE",
        "a holder of the user PIN may change those attributes of the keys that the token itself does not fix",
    ),
    exception(
        "CKA_COPYABLE",
        "a holder of the user PIN may copy the keys on the token",
    ),
    exception(
        "CKA_ALLOWED_MECHANISMS",
        "a holder of the user PIN may decrypt with the wrapping key without OAEP, which allows padding oracles, and use the \
         integrity key with another hash",
    ),
    exception(
        "CKA_SIGN",
        "a holder of the user PIN may sign with the wrapping key; of the integrity key nothing, because it must sign",
    ),
    exception(
        "CKA_SIGN_RECOVER",
        "a holder of the user PIN may make signatures with the wrapping key that hold the signed data",
    ),
    exception(
        "CKA_VERIFY",
        "nothing: the integrity key must verify, and the self-test shows that it does",
    ),
    exception(
        "CKA_ENCRYPT",
        "a holder of the user PIN may encrypt with the integrity key",
    ),
    exception(
        "CKA_DECRYPT",
        "a holder of the user PIN may decrypt with the integrity key; of the wrapping key nothing, because it must decrypt",
    ),
    exception(
        "CKA_WRAP",
        "a holder of the user PIN may wrap extractable keys with the integrity key",
    ),
    exception(
        "CKA_UNWRAP",
        "a holder of the user PIN may unwrap stored user keys into objects on the token",
    ),
    exception(
        "CKA_DERIVE",
        "a holder of the user PIN may derive keys of full length from the integrity key and use them",
    ),
];

/// Whether an attribute of that name is checked.
pub fn is_checked(attribute: &str) -> bool {
    RSA_PRIVATE
        .iter()
        .chain(INTEGRITY_KEY)
        .any(|(name, ..)| *name == attribute)
}

/// The exceptions of the settings, with the risk of each. The configuration refuses names that are not in the list.
pub fn exceptions_in_use(names: &[String]) -> impl Iterator<Item = Exception> {
    EXCEPTIONS
        .iter()
        .copied()
        .filter(|exception| names.iter().any(|name| name == exception.attribute))
}

/// The name of an attribute that may be excepted.
pub(super) fn exceptable(kind: AttributeType) -> Option<Exception> {
    let (name, ..) = RSA_PRIVATE
        .iter()
        .chain(INTEGRITY_KEY)
        .find(|(_, checked, _)| *checked == kind)?;
    EXCEPTIONS
        .iter()
        .copied()
        .find(|exception| exception.attribute == *name)
}

/// Reads every attribute of the rules. An excepted one may be absent, and may fail to be read, because some tokens fail when they
/// are asked for an attribute that they do not know; it must not be wrong.
pub(super) fn inspect(
    session: &Session,
    object: ObjectHandle,
    rules: &[Rule],
    exceptions: &[String],
) -> Result<Vec<Finding>, Fault> {
    rules
        .iter()
        .map(|(name, kind, expected)| {
            let is_excepted =
                exceptions.iter().any(|exception| exception == name) && exceptable(*kind).is_some();
            let found = match try_read(session, object, *kind) {
                Ok(Some(attribute)) if is_expected(&attribute, *expected) => Found::AsExpected,
                Ok(Some(_)) => Found::Wrong,
                Ok(None) if is_implied_by_type(session, object, *expected)? => Found::ImpliedByType,
                Ok(None) if is_excepted => Found::Excepted,
                Ok(None) => Found::Missing,
                Err(error) if is_another_value(&error) => Found::Wrong,
                Err(error) => {
                    let fault = Fault::from(error);
                    if !is_excepted || !is_about_the_attribute(&fault) {
                        return Err(unreadable(fault, name, *kind));
                    }
                    Found::Excepted
                }
            };
            Ok(Finding {
                attribute: name,
                expected: *expected,
                found,
            })
        })
        .collect()
}

/// A key of type `CKK_SHA256_HMAC` is for one mechanism (PKCS #11 v3.0, section 2.20.8): tokens that have such keys have no need of a
/// list of allowed mechanisms. Some of them do not show the length either, because their tools make such keys in one length only
/// (32 bytes, or the 64 of a block).
fn is_implied_by_type(
    session: &Session,
    object: ObjectHandle,
    expected: Expected,
) -> Result<bool, Fault> {
    let may_be_implied = match expected {
        Expected::OnlyMechanism(mechanism) => mechanism == Mechanism::Sha256Hmac,
        Expected::AtLeastBytes(_) => true,
        Expected::Flag(_) => false,
    };
    if !may_be_implied {
        return Ok(false);
    }
    let key_type = read(session, object, AttributeType::KeyType)?;
    Ok(matches!(
        key_type,
        Some(Attribute::KeyType(KeyType::SHA256_HMAC))
    ))
}

/// Whether the token gave a value that cannot be the expected one: `cryptoki` does not know it, such as a vendor's mechanism in a list.
fn is_another_value(error: &Error) -> bool {
    matches!(
        error,
        Error::NotSupported | Error::InvalidValue | Error::TryFromInt(_) | Error::TryFromSlice(_)
    )
}

/// A failed read, with the setting that helps if the token cannot express the attribute.
fn unreadable(fault: Fault, name: &str, kind: AttributeType) -> Fault {
    let is_about_it = is_about_the_attribute(&fault);
    let fault = fault.about(name);
    match exceptable(kind) {
        Some(exception) if is_about_it => fault.with(&format!(
            "if the token cannot express it, {}",
            accept(&[exception])
        )),
        _ => fault,
    }
}

/// Whether a failed read says something of the attribute, and not of the token or the session.
fn is_about_the_attribute(fault: &Fault) -> bool {
    !matches!(
        fault.class,
        Class::TokenLost | Class::BackOff | Class::SessionLost
    )
}

/// Whether the findings are those of a key that was made elsewhere and then brought onto the token: it was not made there, and was
/// extractable or readable once. Such a key never holds records.
pub(super) fn is_imported(findings: &[Finding]) -> bool {
    let lacks = |name| {
        findings
            .iter()
            .any(|finding| finding.attribute == name && !finding.passes())
    };
    lacks("CKA_LOCAL") && (lacks("CKA_NEVER_EXTRACTABLE") || lacks("CKA_ALWAYS_SENSITIVE"))
}

/// Refuses a key with any finding that does not pass, naming all of them.
pub(super) fn require(what: &str, findings: &[Finding]) -> Result<(), Fault> {
    let wrong: Vec<&Finding> = findings
        .iter()
        .filter(|finding| !finding.passes())
        .collect();
    if wrong.is_empty() {
        return Ok(());
    }
    let named: Vec<String> = wrong.iter().map(ToString::to_string).collect();
    if is_imported(findings) {
        return Err(Fault::new(
            Class::Untrusted,
            format!(
                "{what} was imported: {}. It has been outside of the token, so copies of it may exist, and it must never protect \
                 user keys. No setting accepts that; make a key on the token, with `keybroker key generate` or with the vendor's tool",
                named.join("; ")
            ),
        ));
    }
    Err(Fault::new(
        Class::Untrusted,
        format!(
            "{what} must not be used: {}. A key with these attributes may have been copied or may be misused. {}",
            named.join("; "),
            remedy(&wrong)
        ),
    ))
}

/// Names the setting that would help, and only where it would.
fn remedy(wrong: &[&Finding]) -> String {
    if let [finding] = wrong
        && finding.attribute == "CKA_PRIVATE"
    {
        return match finding.expected {
            Expected::Flag(false) => {
                "The token demands a login for this key: remove `access_control` from [token]"
                    .to_owned()
            }
            _ => format!(
                "If the vendor controls access to the keys outside PKCS#11, set `access_control = \"outside-pkcs11\"` in [token]; \
                 the accepted risk: {ACCESS_OUTSIDE_PKCS11}"
            ),
        };
    }
    // An exception is for what is absent: it accepts no other value.
    let helps: Vec<Exception> = wrong
        .iter()
        .filter(|finding| finding.found == Found::Missing)
        .filter_map(|finding| {
            EXCEPTIONS
                .iter()
                .copied()
                .find(|exception| exception.attribute == finding.attribute)
        })
        .collect();
    if helps.len() < wrong.len() {
        return "No setting accepts that; make another key with `keybroker key generate`"
            .to_owned();
    }
    format!(
        "Make another key with `keybroker key generate`; or, if the token cannot express them, {}",
        accept(&helps)
    )
}

/// How an operator accepts exceptions, and what that means.
pub(super) fn accept(exceptions: &[Exception]) -> String {
    let names: Vec<String> = exceptions
        .iter()
        .map(|exception| format!("\"{}\"", exception.attribute))
        .collect();
    let gives_away: Vec<&str> = exceptions
        .iter()
        .map(|exception| exception.gives_away)
        .collect();
    format!(
        "set `attribute_exceptions = [{}]` in [token]; the accepted risk: {}",
        names.join(", "),
        gives_away.join("; ")
    )
}

/// One attribute, or `None` when the token does not have it. A list of no mechanisms is that of a key whose mechanisms are not
/// restricted: some tokens show it instead of an absent attribute.
pub(super) fn read(
    session: &Session,
    object: ObjectHandle,
    kind: AttributeType,
) -> Result<Option<Attribute>, Fault> {
    Ok(try_read(session, object, kind)?)
}

fn try_read(
    session: &Session,
    object: ObjectHandle,
    kind: AttributeType,
) -> Result<Option<Attribute>, Error> {
    calling::next("C_GetAttributeValue");
    match session.attribute(object, kind) {
        Ok(Some(Attribute::AllowedMechanisms(list))) if list.is_empty() => Ok(None),
        Ok(attribute) => Ok(attribute),
        Err(Error::Pkcs11(RvError::AttributeTypeInvalid | RvError::AttributeSensitive, _)) => {
            Ok(None)
        }
        Err(error) => Err(error),
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
        (Attribute::ValueLen(found), Expected::AtLeastBytes(bytes)) => **found >= bytes.into(),
        _ => false,
    }
}
