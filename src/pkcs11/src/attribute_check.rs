//! The attribute check: the properties that a key must have before it is used. Each attribute is read back from the
//! token individually.
//!
//! Each RSA key has one purpose: a plain wrapping key only decrypts, a sealed wrapping key only unwraps, and the signing
//! key of a ceremony only signs. One purpose for each key prevents the wrap/decrypt attack on PKCS#11 (Clulow 2003).
//! `CKA_MODIFIABLE` and `CKA_COPYABLE` are false, so that the purpose of a key cannot be changed.
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

/// The required value of an attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// `CK_TRUE` or `CK_FALSE`.
    Flag(bool),
    /// The list of allowed mechanisms contains exactly this mechanism.
    OnlyMechanism(Mechanism),
    /// A length of at least this many bytes.
    AtLeastBytes(u16),
}

/// A mechanism to which a key may be restricted.
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

/// The result of reading an attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// The attribute has the required value.
    AsExpected,
    /// The attribute has a wrong value.
    Wrong,
    /// The attribute is absent or cannot be read, but the configuration contains an exception for the attribute.
    Excepted,
    /// The attribute is absent, but the key type implies the required value (`CKK_SHA256_HMAC`).
    ImpliedByType,
    /// The attribute is absent.
    Missing,
}

/// The result for one attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The name of the attribute in the standard, such as `CKA_SENSITIVE`.
    pub attribute: &'static str,
    /// The required value.
    pub expected: Expected,
    /// The result of reading the attribute.
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
            Found::Excepted => "is absent (accepted by an exception); the expected value is",
            Found::ImpliedByType => "is absent, but the type of the key implies",
            Found::Missing => "is absent; the required value is",
        };
        write!(f, "{} {found} {expected}", self.attribute)
    }
}

impl Finding {
    /// Whether this attribute permits the use of the key.
    pub fn passes(&self) -> bool {
        matches!(
            self.found,
            Found::AsExpected | Found::Excepted | Found::ImpliedByType
        )
    }

    /// Whether the token lacks the attribute.
    pub(crate) fn is_absent(&self) -> bool {
        matches!(self.found, Found::Missing | Found::Excepted)
    }
}

/// A rule: name, type and required value of an attribute.
pub(super) type Rule = (&'static str, AttributeType, Expected);

const TRUE: Expected = Expected::Flag(true);
const FALSE: Expected = Expected::Flag(false);

/// The rules for every key: the token made the key, keeps it secret, and neither exports nor changes it.
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

/// The risk of `access_control = "outside-pkcs11"`, as a sentence without a full stop.
pub const ACCESS_OUTSIDE_PKCS11: &str = "every program that has the vendor's credentials can use the keys, because the token demands no login";

/// The risk of `integrity_key = "worker"`, as a sentence without a full stop.
pub const INTEGRITY_KEY_IN_WORKER: &str = "a person who reads the memory of a worker, decrypts the file with the token and its PIN, or \
     changes both the file and the configuration can forge rows, also later and without the token; the rows stay protected against a \
     thief or a writer of the database";

/// Adapts the rules to the access control of the token.
pub(super) fn adapted(rules: &[Rule], access: AccessControl) -> Vec<Rule> {
    rules
        .iter()
        .map(|(name, kind, expected)| match (access, kind) {
            (AccessControl::OutsidePkcs11, AttributeType::Private) => (*name, *kind, FALSE),
            _ => (*name, *kind, *expected),
        })
        .collect()
}

/// The rules for the RSA private key of a plain wrapping key, which may only decrypt.
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

/// The rules for the RSA private key of a sealed wrapping key, which may only unwrap.
pub(super) const RSA_SEALED: &[Rule] = &with_those_of_every_key::<6, 15>([
    ("CKA_UNWRAP", AttributeType::Unwrap, TRUE),
    ("CKA_DECRYPT", AttributeType::Decrypt, FALSE),
    ("CKA_SIGN", AttributeType::Sign, FALSE),
    ("CKA_SIGN_RECOVER", AttributeType::SignRecover, FALSE),
    ("CKA_DERIVE", AttributeType::Derive, FALSE),
    (
        "CKA_ALLOWED_MECHANISMS",
        AttributeType::AllowedMechanisms,
        Expected::OnlyMechanism(Mechanism::RsaOaep),
    ),
]);

/// The rules for a key that signs the transcript of a ceremony, and does nothing else.
pub(super) const SIGNING_KEY: &[Rule] = &with_those_of_every_key::<5, 14>([
    ("CKA_SIGN", AttributeType::Sign, TRUE),
    ("CKA_SIGN_RECOVER", AttributeType::SignRecover, FALSE),
    ("CKA_DECRYPT", AttributeType::Decrypt, FALSE),
    ("CKA_UNWRAP", AttributeType::Unwrap, FALSE),
    ("CKA_DERIVE", AttributeType::Derive, FALSE),
]);

/// The rules for the imported key of a Bitwarden organisation: it may do what the key of sealed releases may do.
pub(super) const ORGANIZATION_KEY: &[Rule] = RSA_SEALED;

/// The attributes that show that a key was outside the token. For an imported key, they must be false or absent: a token
/// that sets one of them to true claims something about a key that it cannot know.
const SHOW_AN_IMPORT: [&str; 3] = ["CKA_LOCAL", "CKA_NEVER_EXTRACTABLE", "CKA_ALWAYS_SENSITIVE"];

/// Checks the attributes of an imported key. All rules apply, except the three that no imported key can meet.
pub(super) fn inspect_imported(
    session: &Session,
    object: ObjectHandle,
    rules: &[Rule],
    exceptions: &[String],
) -> Result<Vec<Finding>, Fault> {
    let shows_import = |name: &str| SHOW_AN_IMPORT.contains(&name);
    let rules: Vec<Rule> = rules
        .iter()
        .map(|(name, kind, expected)| {
            let expected = if shows_import(name) { FALSE } else { *expected };
            (*name, *kind, expected)
        })
        .collect();
    let mut findings = inspect(session, object, &rules, exceptions)?;
    for finding in &mut findings {
        if shows_import(finding.attribute) && finding.found == Found::Missing {
            finding.found = Found::Excepted;
        }
    }
    Ok(findings)
}

/// The rules for an integrity key.
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
        // The length of the hash function's output (NIST SP 800-107, section 5.3.4). With a copy of the database, an
        // attacker could find a shorter integrity key by brute force.
        Expected::AtLeastBytes(32),
    ),
    (
        "CKA_ALLOWED_MECHANISMS",
        AttributeType::AllowedMechanisms,
        Expected::OnlyMechanism(Mechanism::Sha256Hmac),
    ),
]);

/// Combines [`EVERY_KEY`] with the rules of one kind of key. `N` must be the total number of rules; with another
/// number, the code does not compile.
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

/// An attribute that `token.attribute_exceptions` may list, with the risk of the exception. Some tokens do not support
/// the attribute. No exception allows a key to leave the token: `CKA_TOKEN`, `CKA_PRIVATE`, `CKA_SENSITIVE`,
/// `CKA_EXTRACTABLE`, `CKA_ALWAYS_SENSITIVE` and `CKA_NEVER_EXTRACTABLE` are always required.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// The attribute's name in the standard.
    pub attribute: &'static str,
    /// A sentence that describes how a person with the user PIN could misuse a key without this attribute.
    pub gives_away: &'static str,
}

const fn exception(attribute: &'static str, gives_away: &'static str) -> Exception {
    Exception {
        attribute,
        gives_away,
    }
}

/// All attributes for which an exception is permitted.
pub const EXCEPTIONS: &[Exception] = &[
    exception(
        "CKA_LOCAL",
        "the token does not show whether a key was made on the token, so copies of a key may exist elsewhere",
    ),
    exception(
        "CKA_MODIFIABLE",
        "a holder of the user PIN may change those attributes of the keys that the token itself does not protect",
    ),
    exception(
        "CKA_COPYABLE",
        "a holder of the user PIN may copy the keys on the token",
    ),
    exception(
        "CKA_ALLOWED_MECHANISMS",
        "a holder of the user PIN may decrypt with the wrapping key without OAEP (this allows padding oracles), and may use the integrity key with another hash",
    ),
    exception(
        "CKA_SIGN",
        "a holder of the user PIN may sign with the wrapping key; for the integrity key there is no risk, because an \
         integrity key must sign",
    ),
    exception(
        "CKA_SIGN_RECOVER",
        "a holder of the user PIN may use the wrapping key to make signatures that contain the signed data",
    ),
    exception(
        "CKA_VERIFY",
        "there is no risk: the integrity key must verify MACs, and the self-test shows that the integrity key verifies MACs",
    ),
    exception(
        "CKA_ENCRYPT",
        "a holder of the user PIN may encrypt with the integrity key",
    ),
    exception(
        "CKA_DECRYPT",
        "a holder of the user PIN may decrypt with the integrity key; for the wrapping key there is no risk, because a \
         wrapping key must decrypt",
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
        "a holder of the user PIN may derive other keys of the same length from the integrity key, and use the derived keys",
    ),
];

/// Whether an attribute of this name is checked.
pub fn is_checked(attribute: &str) -> bool {
    RSA_PRIVATE
        .iter()
        .chain(INTEGRITY_KEY)
        .any(|(name, ..)| *name == attribute)
}

/// Returns the exceptions in the settings, each with its risk. The check of the configuration refuses names that are
/// not in `EXCEPTIONS`.
pub fn exceptions_in_use(names: &[String]) -> impl Iterator<Item = Exception> {
    EXCEPTIONS
        .iter()
        .copied()
        .filter(|exception| names.iter().any(|name| name == exception.attribute))
}

/// Returns the exception for an attribute, if an exception is permitted.
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

/// Reads every attribute of the rules. An attribute with an exception may be absent or unreadable, because some tokens
/// return an error for an unknown attribute. An attribute with an exception must not have a wrong value.
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

/// Whether the key type implies the required mechanism. A key of type `CKK_SHA256_HMAC` has only one mechanism (PKCS
/// #11 v3.0, section 2.20.8), so such keys need no list of allowed mechanisms. Some tokens also omit the length of
/// these keys, because their tools make keys of only one length (32 bytes, or the block size of 64 bytes).
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

/// Whether a read failed because `cryptoki` does not support the returned value, for example a vendor's mechanism in a
/// list. An unsupported value is never the required value.
fn is_another_value(error: &Error) -> bool {
    matches!(
        error,
        Error::NotSupported | Error::InvalidValue | Error::TryFromInt(_) | Error::TryFromSlice(_)
    )
}

/// Adds a hint to the error of a failed read: the setting for tokens that do not support the attribute.
fn unreadable(fault: Fault, name: &str, kind: AttributeType) -> Fault {
    let is_about_it = is_about_the_attribute(&fault);
    let fault = fault.about(name);
    match exceptable(kind) {
        Some(exception) if is_about_it => fault.with(&format!(
            "if the token does not support this attribute, {}",
            accept(&[exception])
        )),
        _ => fault,
    }
}

/// Whether a failed read concerns the attribute itself, and not the token or the session.
fn is_about_the_attribute(fault: &Fault) -> bool {
    !matches!(
        fault.class,
        Class::TokenLost | Class::BackOff | Class::SessionLost
    )
}

/// Whether the findings show an imported key: the key was not made on the token, and was once extractable or readable.
/// The broker never uses an imported key.
pub(super) fn is_imported(findings: &[Finding]) -> bool {
    let lacks = |name| {
        findings
            .iter()
            .any(|finding| finding.attribute == name && !finding.passes())
    };
    lacks("CKA_LOCAL") && (lacks("CKA_NEVER_EXTRACTABLE") || lacks("CKA_ALWAYS_SENSITIVE"))
}

/// Refuses a key unless all findings pass. The error lists all findings that do not pass.
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
                "{what} was imported: {}. The key was outside the token, so copies of the key may exist, and the key \
                 must never protect user keys. No setting accepts an imported key; make a key on the token with \
                 `keybroker key generate` or with the vendor's tool",
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

/// Returns a hint: the setting with which the key would be accepted, or another remedy.
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
    // An exception permits an absent attribute, but not an attribute with a wrong value.
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
        return "No setting accepts these attributes; make another key with `keybroker key generate`"
            .to_owned();
    }
    format!(
        "Make another key with `keybroker key generate`. If the token does not support these attributes, {}",
        accept(&helps)
    )
}

/// Describes how an operator accepts exceptions, and their risks.
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

/// Reads one attribute. Returns `None` if the token does not have the attribute. An empty list of mechanisms counts as
/// an absent attribute, because some tokens without the attribute return an empty list.
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

/// Whether the token reveals a secret value of an object.
pub(super) fn reveals(
    session: &Session,
    object: ObjectHandle,
    kind: AttributeType,
) -> Result<bool, Error> {
    calling::next("C_GetAttributeValue");
    Ok(match session.attribute_or_leak(object, kind)? {
        Some(
            Attribute::PrivateExponent(value) | Attribute::Prime1(value) | Attribute::Value(value),
        ) => !value.is_empty(),
        _ => false,
    })
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
