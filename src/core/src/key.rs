//! The names and ids of stored data. Each value is validated once, when it is parsed from a request or a row, and is valid
//! from then on.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::error::Error;

mod id;
mod state;

pub use id::{AccessRequestId, ApprovalId, ClientId, DeviceId, ID_BYTES, RecordId, WrappingKeyId};
pub use state::{IllegalTransition, KeyUse, WrappingKeyState};

/// Longest tenant name and key name, in bytes.
pub const NAME_BYTES_MAX: usize = 64;
/// Longest user id, in bytes of UTF-8.
pub const USER_BYTES_MAX: usize = 255;

fn is_name(text: &str) -> bool {
    (1..=NAME_BYTES_MAX).contains(&text.len())
        && text
            .bytes()
            .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-'))
}

/// The owner of a set of records. A tenant has 1 to 64 bytes of `[a-z0-9._-]`. The tenant of a call comes from the principal,
/// never from the request.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Tenant(String);

/// The name of a user key, with 1 to 64 bytes of `[a-z0-9._-]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyName(String);

/// A user id, with 1 to 255 bytes of UTF-8 and no control characters. User ids are compared byte by byte.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UserId(String);

impl Tenant {
    /// Parses a tenant.
    pub fn parse(text: &str) -> Result<Self, Error> {
        if is_name(text) {
            Ok(Self(text.to_owned()))
        } else {
            Err(Error::violation("tenant", "1 to 64 bytes of [a-z0-9._-]"))
        }
    }

    /// The value as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for Tenant {
    fn default() -> Self {
        Self("default".to_owned())
    }
}

impl TryFrom<String> for Tenant {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::parse(&text).map_err(|_| "a tenant is 1 to 64 bytes of [a-z0-9._-]")
    }
}

impl From<Tenant> for String {
    fn from(tenant: Tenant) -> Self {
        tenant.0
    }
}

impl KeyName {
    /// Parses a key name.
    pub fn parse(text: &str) -> Result<Self, Error> {
        if is_name(text) {
            Ok(Self(text.to_owned()))
        } else {
            Err(Error::violation("key_name", "1 to 64 bytes of [a-z0-9._-]"))
        }
    }

    /// The value as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl UserId {
    /// Parses a user.
    pub fn parse(text: &str) -> Result<Self, Error> {
        if (1..=USER_BYTES_MAX).contains(&text.len()) && !text.chars().any(char::is_control) {
            Ok(Self(text.to_owned()))
        } else {
            Err(Error::violation(
                "user",
                "1 to 255 bytes of UTF-8 without control characters",
            ))
        }
    }

    /// The value as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

macro_rules! as_text {
    ($($name:ty),*) => {$(
        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = Error;

            fn from_str(text: &str) -> Result<Self, Error> {
                Self::parse(text)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    )*};
}
as_text!(Tenant, KeyName, UserId);

/// The address of a record: the tenant, the user and the key name, which identify one user key.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyAddress {
    /// Owner of the record.
    pub tenant: Tenant,
    /// The user to whom the user key belongs.
    pub user: UserId,
    /// The name that distinguishes the user keys of one user.
    pub name: KeyName,
}

/// `CKA_ID` of an object on a token: 1 to 255 bytes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectId(Box<[u8]>);

impl ObjectId {
    /// Longest id, in bytes.
    pub const BYTES_MAX: usize = 255;

    /// Returns the id in a slice, or `None` if its length is not permitted.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        (1..=Self::BYTES_MAX)
            .contains(&bytes.len())
            .then(|| Self(bytes.into()))
    }

    /// Parses hexadecimal digits.
    pub fn from_hex(text: &str) -> Option<Self> {
        hex::decode(text)
            .ok()
            .and_then(|bytes| Self::from_slice(&bytes))
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl From<WrappingKeyId> for ObjectId {
    fn from(id: WrappingKeyId) -> Self {
        Self(id.as_bytes().as_slice().into())
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(&self.0))
    }
}

impl fmt::Debug for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ObjectId({self})")
    }
}

/// The place of an integrity key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum IntegrityPlace {
    /// The integrity key is on the token, with the same `CKA_ID` as the RSA private key.
    #[default]
    Token,
    /// The integrity key is on the token, with this separate `CKA_ID`.
    Object(ObjectId),
    /// The integrity key is in the memory of the workers, which unwrap it from a file. The place `Worker` is for tokens
    /// that do not support HMAC keys.
    Worker,
}

impl IntegrityPlace {
    /// The bytes that the broker stores and sends instead of a `CKA_ID` for
    /// [`IntegrityPlace::Worker`]. No object can be registered with the bytes of `WORKER` as its
    /// `CKA_ID`. An earlier release of the broker treats the bytes as a `CKA_ID`, finds no object
    /// with this `CKA_ID`, and refuses the wrapping key.
    const WORKER: &[u8] = b"keybroker/integrity-key-in-worker/v1";

    /// The bytes that are stored and sent.
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Token => &[],
            Self::Object(id) => id.as_bytes(),
            Self::Worker => Self::WORKER,
        }
    }

    /// Parses the place of an integrity key from the bytes that are stored and sent. Returns `None`
    /// if there are too many bytes.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [] => Some(Self::Token),
            Self::WORKER => Some(Self::Worker),
            bytes => ObjectId::from_slice(bytes).map(Self::Object),
        }
    }
}

/// The places of the RSA private key and the integrity key. By default, the `CKA_ID` of the RSA private key and of the integrity
/// key is the id of the wrapping key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ObjectIds {
    /// The `CKA_ID` of the RSA private key.
    pub private: Option<ObjectId>,
    /// The place of the integrity key.
    pub integrity: IntegrityPlace,
}

impl ObjectIds {
    /// Parses the two places from the byte strings that are stored and sent. An empty string means
    /// the id of the wrapping key. Returns `None` if a byte string is too long.
    pub fn from_slices(private: &[u8], integrity: &[u8]) -> Option<Self> {
        let private = match private {
            [] => None,
            bytes => Some(ObjectId::from_slice(bytes)?),
        };
        Some(Self {
            private,
            integrity: IntegrityPlace::from_slice(integrity)?,
        })
    }

    /// Returns the `CKA_ID` of the RSA private key of the wrapping key with this id.
    pub fn private_object(&self, id: WrappingKeyId) -> ObjectId {
        self.private.clone().unwrap_or_else(|| id.into())
    }

    /// The `CKA_ID` of the integrity key; absent if the integrity key is in the memory of the workers.
    pub fn integrity_object(&self, id: WrappingKeyId) -> Option<ObjectId> {
        match &self.integrity {
            IntegrityPlace::Token => Some(self.private_object(id)),
            IntegrityPlace::Object(own) => Some(own.clone()),
            IntegrityPlace::Worker => None,
        }
    }

    /// The `CKA_ID` of the RSA private key, as stored and sent.
    pub fn private_bytes(&self) -> &[u8] {
        self.private.as_ref().map_or(&[], ObjectId::as_bytes)
    }

    /// The `CKA_ID` of the integrity key, as stored and sent.
    pub fn integrity_bytes(&self) -> &[u8] {
        self.integrity.as_bytes()
    }
}

/// Number of a record's revision, from 1 to `i64::MAX`, which every SQL engine can store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Revision(u64);

impl Revision {
    /// The revision of a new record.
    pub const FIRST: Self = Self(1);

    /// Returns the revision with this number, or `None` if the number is out of range.
    pub fn new(number: u64) -> Option<Self> {
        (number >= 1 && i64::try_from(number).is_ok()).then_some(Self(number))
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The next revision. In practice, a record cannot reach the highest revision, because no
    /// hardware lasts for 2^63 replacements.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// SHA-256 of a DER SubjectPublicKeyInfo. A fingerprint identifies a public key, regardless of the
/// source from which the key was read.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// Parses 64 hexadecimal digits.
    pub fn from_hex(text: &str) -> Option<Self> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes).ok()?;
        Some(Self(bytes))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

/// The purpose of a wrapping key. An RSA key has one purpose, so that no key can both decrypt and unwrap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Purpose {
    /// `CKA_DECRYPT`: user keys are released in plain text.
    #[default]
    Plain,
    /// `CKA_UNWRAP`: user keys are released only encrypted to the public key of a recipient.
    Sealed,
}

impl Purpose {
    /// The name in the database and in output.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Sealed => "sealed",
        }
    }

    /// Parses the stored text.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Plain, Self::Sealed]
            .into_iter()
            .find(|purpose| purpose.as_str() == text)
    }
}

/// The protection of a sealed wrapping key against a program that controls a worker, from best to worst. A test at each
/// start of a worker finds it by the behaviour of the token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sealing {
    /// The token refuses to unwrap a user key into a readable object.
    Enforced,
    /// The worker requests an object that is not readable, but the token would also make a readable object.
    Worker,
}

impl Sealing {
    /// The name in output and in answers.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Enforced => "enforced",
            Self::Worker => "worker",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_keep_their_limits() {
        for good in ["a", "a.b_c-9", &"x".repeat(64)] {
            assert_eq!(KeyName::parse(good).unwrap().as_str(), good);
        }
        for bad in ["", "A", "a b", "ä", &"x".repeat(65), "a/b"] {
            assert!(KeyName::parse(bad).is_err(), "{bad:?}");
            assert!(Tenant::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn users_are_bytes_without_control_characters() {
        for good in ["a", "Ä ö", &"x".repeat(255)] {
            assert_eq!(UserId::parse(good).unwrap().as_str(), good);
        }
        for bad in [
            "",
            "a\nb",
            "a\u{7f}",
            "\u{85}",
            &"x".repeat(256),
            &"ä".repeat(128),
        ] {
            assert!(UserId::parse(bad).is_err(), "{bad:?}");
        }
    }

    /// A place keeps its meaning when its `CKA_ID` is stored and read back.
    #[test]
    fn the_place_of_an_integrity_key_is_stored_and_read_back() {
        let id = ObjectId::from_slice(&[7]).unwrap();
        let places = [
            IntegrityPlace::Token,
            IntegrityPlace::Object(id),
            IntegrityPlace::Worker,
        ];
        for place in places {
            assert_eq!(
                IntegrityPlace::from_slice(place.as_bytes()),
                Some(place.clone())
            );
        }
        let stored = b"keybroker/integrity-key-in-worker/v1";
        assert_eq!(
            IntegrityPlace::from_slice(stored),
            Some(IntegrityPlace::Worker)
        );
        let longer = [stored.as_slice(), &[0]].concat();
        assert!(matches!(
            IntegrityPlace::from_slice(&longer),
            Some(IntegrityPlace::Object(_))
        ));
        assert_eq!(IntegrityPlace::from_slice(&[7; 256]), None);
    }

    #[test]
    fn ids_of_objects_have_any_length_up_to_their_limit() {
        for (private, integrity, is_good) in [
            (0, 0, true),
            (1, 255, true),
            (256, 0, false),
            (0, 256, false),
        ] {
            let ids = ObjectIds::from_slices(&vec![7; private], &vec![8; integrity]);
            assert_eq!(ids.is_some(), is_good, "{private} {integrity}");
            if let Some(ids) = ids {
                assert_eq!(ids.private_bytes(), vec![7; private]);
                assert_eq!(ids.integrity_bytes(), vec![8; integrity]);
            }
        }
        assert_eq!(ObjectId::from_hex("0a").unwrap().to_string(), "0a");
        for bad in ["", "0", "0g"] {
            assert_eq!(ObjectId::from_hex(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn revisions_start_at_one_and_fit_sql() {
        assert_eq!(Revision::new(0), None);
        assert_eq!(Revision::new(1), Some(Revision::FIRST));
        assert_eq!(Revision::new(1 << 63), None);
        assert_eq!(Revision::FIRST.next().get(), 2);
    }
}
