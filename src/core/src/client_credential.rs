//! API clients: services that have no certificate and no access token, and authenticate with an id and a secret.
//!
//! The store keeps each API client as a document with a MAC under the integrity key. Therefore, a person who can write to the
//! database cannot create a client that releases user keys, or give a client another secret or role.
//!
//! The MAC does not prevent a rollback: an older document of the same client still has a valid MAC. If a client must
//! never become valid again, set an expiry for its secrets or limit its roles.

use std::{collections::BTreeSet, fmt};

use aws_lc_rs::{digest, rand};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::{
    call::Timestamp,
    key::{ClientId, KeyName, Tenant, UserId},
    principal::{Grant, Reach, Role},
};

/// Maximum length of a document, in bytes: the size of the database column. This limit applies to changes that add no
/// secret, such as a revocation.
pub const DOCUMENT_BYTES_MAX: usize = 32 * 1_024;
/// Maximum length of a document, in bytes, when a client is created or gets a new secret. The bytes between this limit
/// and [`DOCUMENT_BYTES_MAX`] are reserved for changes that must never be refused: the dates of revocations, and
/// stronger hashes.
pub const GROWING_DOCUMENT_BYTES_MAX: usize = 24 * 1_024;
/// Longest label, in bytes.
pub const LABEL_BYTES_MAX: usize = 128;
/// Highest number of valid secrets of a client: the old and the new secret during a rotation.
pub const LIVE_SECRETS_MAX: usize = 2;
/// Highest number of stored secrets of a client, including expired and revoked secrets.
const SECRETS_MAX: usize = 16;
/// Length of a secret, in random bytes.
const SECRET_BYTES: usize = 32;
/// Prefix by which scanners of source code and logs recognise a secret.
const SECRET_PREFIX: &str = "kbs_";

/// An API client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientCredential {
    /// The id that the client sends with its secret.
    pub id: ClientId,
    /// The revision of the document, which starts at 1 and grows with each change.
    pub revision: u64,
    /// The properties of the client except its id and revision.
    pub document: Document,
}

/// The stored properties of an API client, except its id and revision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Document {
    /// A description for people.
    pub label: String,
    /// The tenant whose records the client can access.
    pub tenant: Tenant,
    /// The roles of the client.
    pub roles: BTreeSet<Role>,
    /// The users whose keys a client with the role `release` may release.
    pub users: Option<Reach<UserId>>,
    /// The key names that a client with the role `release` may release.
    pub key_names: Option<Reach<KeyName>>,
    /// Time at which the client was created.
    pub created: Timestamp,
    /// Time at which the client was revoked with all its secrets.
    pub revoked: Option<Timestamp>,
    /// The secrets, in the order in which they were created.
    pub secrets: Vec<Secret>,
}

/// One secret of an API client, as a hash.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Secret {
    /// The number of the secret. The numbers of a client's secrets start at 1, and no number is used twice.
    pub number: u32,
    /// The Argon2id hash, as a PHC string.
    pub phc: String,
    /// Time at which the secret was created.
    pub created: Timestamp,
    /// The time from which the secret is no longer accepted.
    pub expires: Option<Timestamp>,
    /// Time at which the secret was revoked.
    pub revoked: Option<Timestamp>,
}

/// Omits the hash, because a reader of the hash could test guesses of the secret.
impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secret")
            .field("number", &self.number)
            .field("expires", &self.expires)
            .field("revoked", &self.revoked)
            .finish_non_exhaustive()
    }
}

impl Secret {
    /// Whether the secret is accepted at the given time.
    pub fn is_live(&self, now: Timestamp) -> bool {
        self.revoked.is_none() && self.expires.is_none_or(|expires| now < expires)
    }
}

impl Document {
    /// The rights of the client.
    pub fn grant(&self) -> Grant {
        Grant {
            tenant: self.tenant.clone(),
            roles: self.roles.clone(),
            users: self.users.clone(),
            key_names: self.key_names.clone(),
        }
    }

    /// The rights and the numbers of the valid secrets in one line, for the audit log.
    pub fn summary(&self) -> String {
        let texts = |names: Vec<&str>| names.join(",");
        let roles = texts(self.roles.iter().map(|role| role.as_str()).collect());
        let live: Vec<_> = self
            .live_secrets(Timestamp::now())
            .map(|secret| secret.number.to_string())
            .collect();
        let live = live.join(",");
        if !self.roles.contains(&Role::Release) {
            return format!("roles={roles} live_secrets={live}");
        }
        let users = match &self.users {
            Some(Reach::Only(named)) => format!("{} named", named.len()),
            _ => "*".to_owned(),
        };
        let names = match &self.key_names {
            Some(Reach::Only(named)) => texts(named.iter().map(KeyName::as_str).collect()),
            _ => "*".to_owned(),
        };
        format!("roles={roles} users={users} key_names={names} live_secrets={live}")
    }

    /// The secrets that are accepted at the given time. A revoked client has no accepted secrets.
    pub fn live_secrets(&self, now: Timestamp) -> impl Iterator<Item = &Secret> {
        let is_revoked = self.revoked.is_some();
        self.secrets
            .iter()
            .filter(move |secret| !is_revoked && secret.is_live(now))
    }

    /// Adds a secret. If the client already has the maximum number of secrets, the oldest expired or revoked secret is
    /// removed.
    pub fn add_secret(&mut self, phc: String, now: Timestamp, expires: Option<Timestamp>) -> u32 {
        let number = self.secrets.last().map_or(1, |last| last.number + 1);
        if self.secrets.len() >= SECRETS_MAX
            && let Some(dead) = self.secrets.iter().position(|secret| !secret.is_live(now))
        {
            self.secrets.remove(dead);
        }
        self.secrets.push(Secret {
            number,
            phc,
            created: now,
            expires,
            revoked: None,
        });
        number
    }

    /// The bytes to store; `None` if they are longer than [`DOCUMENT_BYTES_MAX`].
    pub fn to_bytes(&self) -> Option<Vec<u8>> {
        let bytes = serde_json::to_vec(self).ok()?;
        (bytes.len() <= DOCUMENT_BYTES_MAX).then_some(bytes)
    }

    /// Whether the document is short enough to be stored now and to record the revocation of each secret later.
    pub fn may_grow(&self) -> bool {
        let bytes = self.to_bytes();
        bytes.is_some_and(|bytes| bytes.len() <= GROWING_DOCUMENT_BYTES_MAX)
    }

    /// Reads what [`Document::to_bytes`] wrote.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.len() > DOCUMENT_BYTES_MAX {
            return None;
        }
        serde_json::from_slice(bytes).ok()
    }
}

/// SHA-256 of a document. The MAC of an API client covers the digest instead of the document, because a document may be
/// longer than the input that a token accepts.
pub fn digest_of(document: &[u8]) -> [u8; 32] {
    let digest = digest::digest(&digest::SHA256, document);
    digest.as_ref().try_into().expect("SHA-256 gives 32 bytes")
}

/// The secret in plain text, shown once to the administrator who created it: a prefix and 32 random bytes in base64url.
pub struct PlainSecret(Zeroizing<String>);

impl PlainSecret {
    /// A new secret; `None` if the system returns no random bytes.
    pub fn fresh() -> Option<Self> {
        use base64ct::{Base64UrlUnpadded, Encoding as _};
        let mut bytes = Zeroizing::new([0; SECRET_BYTES]);
        rand::fill(&mut bytes[..]).ok()?;
        let encoded = Zeroizing::new(Base64UrlUnpadded::encode_string(&bytes[..]));
        Some(Self(Zeroizing::new(format!("{SECRET_PREFIX}{}", *encoded))))
    }

    /// The secret as text, for the only answer that shows the secret.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for PlainSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PlainSecret(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp::from_micros(1_000);

    fn document() -> Document {
        Document {
            label: "backup service".to_owned(),
            tenant: Tenant::default(),
            roles: BTreeSet::from([Role::Release]),
            users: None,
            key_names: Some(Reach::Only(BTreeSet::from([
                KeyName::parse("vault").unwrap()
            ]))),
            created: NOW,
            revoked: None,
            secrets: Vec::new(),
        }
    }

    #[test]
    fn a_document_reads_back() {
        let mut document = document();
        document.add_secret(
            "$argon2id$x".to_owned(),
            NOW,
            Some(Timestamp::from_micros(2_000)),
        );
        let bytes = document.to_bytes().unwrap();
        assert_eq!(Document::from_bytes(&bytes).unwrap(), document);
        let text = String::from_utf8(bytes).unwrap();
        for bad in [
            text.replace("\"label\"", "\"lable\""),
            text.replace("release", "everything"),
            text.replace("vault", "VAULT"),
            text.replace('}', ""),
        ] {
            assert!(Document::from_bytes(bad.as_bytes()).is_none(), "{bad}");
        }
        document.label = "x".repeat(DOCUMENT_BYTES_MAX);
        assert!(document.to_bytes().is_none());
    }

    #[test]
    fn a_secret_is_live_until_it_expires_or_is_revoked() {
        let mut document = document();
        let later = Timestamp::from_micros(2_000);
        assert_eq!(document.add_secret("a".to_owned(), NOW, Some(later)), 1);
        assert_eq!(document.add_secret("b".to_owned(), NOW, None), 2);
        let live = |document: &Document, at| -> Vec<u32> {
            document
                .live_secrets(at)
                .map(|secret| secret.number)
                .collect()
        };
        assert_eq!(live(&document, NOW), [1, 2]);
        assert_eq!(live(&document, later), [2]);
        document.secrets[1].revoked = Some(NOW);
        assert_eq!(live(&document, NOW), [1]);
        document.revoked = Some(NOW);
        assert_eq!(live(&document, NOW), [0; 0]);
    }

    #[test]
    fn numbers_of_secrets_are_never_used_again() {
        let mut document = document();
        for number in 1..=40 {
            let expires = Timestamp::from_micros(1_000 + i64::from(number));
            let now = Timestamp::from_micros(expires.micros() - 1);
            assert_eq!(
                document.add_secret("a".to_owned(), now, Some(expires)),
                number
            );
        }
        assert_eq!(document.secrets.len(), SECRETS_MAX);
    }

    #[test]
    fn the_longest_client_that_can_be_made_can_be_revoked_secret_by_secret() {
        let mut document = document();
        let (phc, dear) = [
            "$argon2id$v=19$m=19456,t=2,p=1$",
            "$argon2id$v=19$m=1048576,t=16,p=16$",
        ]
        .map(|parameters| format!("{parameters}{}", "x".repeat(66)))
        .into();
        let late = Timestamp::now();
        for _ in 0..SECRETS_MAX {
            document.add_secret(phc.clone(), late, Some(late));
        }
        while document.may_grow() {
            document.label.push('x');
        }
        document.label.pop();
        assert!(document.may_grow());
        for secret in &mut document.secrets {
            secret.phc.clone_from(&dear);
            secret.revoked = Some(late);
        }
        document.revoked = Some(late);
        assert!(!document.may_grow() && document.to_bytes().is_some());
    }

    #[test]
    fn a_secret_is_known_by_its_prefix_and_not_shown() {
        let [one, other] = [(); 2].map(|()| PlainSecret::fresh().unwrap());
        assert_ne!(one.expose(), other.expose());
        assert!(one.expose().starts_with("kbs_") && one.expose().len() == 47);
        assert!(!format!("{one:?}").contains(one.expose()));
    }
}
