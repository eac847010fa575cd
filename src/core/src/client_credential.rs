//! API clients: services that have neither a certificate nor a provider of tokens, and show an id and a secret.
//!
//! An API client is a document, kept in SQL under a MAC of the token: a person who can write to the database cannot
//! make a client that releases keys, nor give one another secret or another role. Not protected: an older document of
//! the same client, put back, verifies; a client that must never come back is ended by an expiry in its secrets, or
//! by its roles.

use std::{collections::BTreeSet, fmt};

use aws_lc_rs::{digest, rand};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::{
    call::Timestamp,
    key::{ClientId, KeyName, Tenant, UserId},
    principal::{Grant, Reach, Role},
};

/// Longest document, in bytes: what its column holds. It limits what is only ever made smaller or ended.
pub const DOCUMENT_BYTES_MAX: usize = 32 * 1_024;
/// Longest document of a client that is made or given a secret. The rest is kept for what must never be refused: the dates of
/// revocations, and better hashes.
pub const GROWING_DOCUMENT_BYTES_MAX: usize = 24 * 1_024;
/// Longest label, in bytes.
pub const LABEL_BYTES_MAX: usize = 128;
/// Secrets of a client that may be good at once: the old one and the new one, while it is rotated.
pub const LIVE_SECRETS_MAX: usize = 2;
/// Secrets that a client remembers, dead ones too.
const SECRETS_MAX: usize = 16;
/// Length of a secret, in random bytes.
const SECRET_BYTES: usize = 32;
/// Prefix by which scanners of source code and logs recognise a secret.
const SECRET_PREFIX: &str = "kbs_";

/// An API client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientCredential {
    /// Its id, which it sends with its secret.
    pub id: ClientId,
    /// Grows with each change, from 1.
    pub revision: u64,
    /// All else.
    pub document: Document,
}

/// The document of an API client, without its id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Document {
    /// For people.
    pub label: String,
    /// Whose records it can reach.
    pub tenant: Tenant,
    /// Its roles.
    pub roles: BTreeSet<Role>,
    /// With the role `release`: whose keys.
    pub users: Option<Reach<UserId>>,
    /// With the role `release`: which of their keys.
    pub key_names: Option<Reach<KeyName>>,
    /// When it was created.
    pub created: Timestamp,
    /// When it was revoked, with all its secrets.
    pub revoked: Option<Timestamp>,
    /// In the order in which they were made.
    pub secrets: Vec<Secret>,
}

/// One secret of an API client, as a hash.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Secret {
    /// From 1, never used again.
    pub number: u32,
    /// Argon2id, as a PHC string.
    pub phc: String,
    /// When it was made.
    pub created: Timestamp,
    /// From when on it is not accepted any more.
    pub expires: Option<Timestamp>,
    /// When it was revoked.
    pub revoked: Option<Timestamp>,
}

/// Without the hash: it can be guessed against.
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
    /// Whether the secret is accepted at a moment.
    pub fn is_live(&self, now: Timestamp) -> bool {
        self.revoked.is_none() && self.expires.is_none_or(|expires| now < expires)
    }
}

impl Document {
    /// What it may do.
    pub fn grant(&self) -> Grant {
        Grant {
            tenant: self.tenant.clone(),
            roles: self.roles.clone(),
            users: self.users.clone(),
            key_names: self.key_names.clone(),
        }
    }

    /// What it may do and with which secrets, in one line for the audit log.
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

    /// Its secrets that are accepted at that moment; none once it is revoked.
    pub fn live_secrets(&self, now: Timestamp) -> impl Iterator<Item = &Secret> {
        let is_revoked = self.revoked.is_some();
        self.secrets
            .iter()
            .filter(move |secret| !is_revoked && secret.is_live(now))
    }

    /// Adds a secret. The oldest dead ones are forgotten when there are many.
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

    /// As it is stored; `None` when it is longer than [`DOCUMENT_BYTES_MAX`].
    pub fn to_bytes(&self) -> Option<Vec<u8>> {
        let bytes = serde_json::to_vec(self).ok()?;
        (bytes.len() <= DOCUMENT_BYTES_MAX).then_some(bytes)
    }

    /// Whether it is short enough to be stored now and revoked later, secret by secret.
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

/// SHA-256 of a document: what the MAC covers, because a document may be longer than what a token takes at once.
pub fn digest_of(document: &[u8]) -> [u8; 32] {
    let digest = digest::digest(&digest::SHA256, document);
    digest.as_ref().try_into().expect("SHA-256 gives 32 bytes")
}

/// The secret itself, shown once to the administrator who made it: a prefix and 32 random bytes in base64url.
pub struct PlainSecret(Zeroizing<String>);

impl PlainSecret {
    /// A new one; `None` when the system gives no random bytes.
    pub fn fresh() -> Option<Self> {
        use base64ct::{Base64UrlUnpadded, Encoding as _};
        let mut bytes = Zeroizing::new([0; SECRET_BYTES]);
        rand::fill(&mut bytes[..]).ok()?;
        let encoded = Zeroizing::new(Base64UrlUnpadded::encode_string(&bytes[..]));
        Some(Self(Zeroizing::new(format!("{SECRET_PREFIX}{}", *encoded))))
    }

    /// As text, for the one answer that shows it.
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
