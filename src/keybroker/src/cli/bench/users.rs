//! The users of a measurement. The name and the key of a user are derived from the user's number,
//! so nothing needs to be stored.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use aws_lc_rs::{hmac, rand};
use keybroker_client::{KeyMaterial, RecipientKeyPair, SealedKey, UserKeyRef};

use crate::cli::exit::{Exit, Failure};

/// One of this number of sealed releases is opened. Opening every answer would take CPU time from the measured broker.
const OPENED_ONE_OF: u64 = 50;

/// The key name of the users of the gRPC API.
const KEY_NAME: &str = "bench";
/// The key name that the REST API uses.
const MEMBER_KEY_NAME: &str = "bitwarden";

/// A set of users with numbers from 0.
#[derive(Clone, Debug)]
pub(super) struct Users {
    key: hmac::Key,
    key_name: &'static str,
    count: u32,
    recipient: Option<Arc<Recipient>>,
}

/// The recipient of all sealed releases of a measurement.
#[derive(Debug)]
pub(super) struct Recipient {
    pair: RecipientKeyPair,
    releases: AtomicU64,
}

impl Recipient {
    /// The public key as DER SubjectPublicKeyInfo.
    pub(super) fn public_key(&self) -> &[u8] {
        self.pair.public_key()
    }

    /// Whether the recipient opens a sealed release to this material. Most releases are not opened, and count as good.
    pub(super) fn opens(&self, sealed: &SealedKey, material: &KeyMaterial) -> bool {
        let number = self.releases.fetch_add(1, Ordering::Relaxed);
        if !number.is_multiple_of(OPENED_ONE_OF) {
            return true;
        }
        let opened = self.pair.open(sealed);
        opened.is_ok_and(|opened| opened.expose() == material.expose())
    }
}

/// A user and their key of 32 bytes.
#[derive(Debug)]
pub(super) struct User {
    pub(super) key: UserKeyRef,
    pub(super) material: KeyMaterial,
    /// The recipient, if the key is released sealed.
    pub(super) recipient: Option<Arc<Recipient>>,
}

impl Users {
    pub(super) fn new(count: u32) -> Self {
        Self::with_key_name(count, KEY_NAME)
    }

    /// Users who fetch their keys over REST.
    pub(super) fn members(count: u32) -> Self {
        Self::with_key_name(count, MEMBER_KEY_NAME)
    }

    fn with_key_name(count: u32, key_name: &'static str) -> Self {
        Self {
            key: hmac::Key::new(hmac::HMAC_SHA256, b"keybroker bench"),
            key_name,
            count,
            recipient: None,
        }
    }

    /// The same users, whose keys are released sealed to a new recipient.
    pub(super) fn sealed(self) -> Result<Self, Failure> {
        let pair = RecipientKeyPair::generate()
            .map_err(|error| Failure::new(Exit::Internal, error.to_string()))?;
        let recipient = Recipient {
            pair,
            releases: AtomicU64::new(0),
        };
        Ok(Self {
            recipient: Some(Arc::new(recipient)),
            ..self
        })
    }

    pub(super) fn count(&self) -> u32 {
        self.count
    }

    pub(super) fn user(&self, number: u32) -> User {
        let name = format!("bench-{number:07}");
        let material = hmac::sign(&self.key, name.as_bytes()).as_ref().to_vec();
        User {
            key: UserKeyRef::parse(&name, self.key_name)
                .expect("both keep the limits of the protocol"),
            material: KeyMaterial::new(material).expect("the digest has 32 bytes"),
            recipient: self.recipient.clone(),
        }
    }

    /// Returns a random user. All users are equally likely, so a database cache cannot benefit from
    /// the order of users.
    pub(super) fn any(&self) -> User {
        let mut bytes = [0; 8];
        rand::fill(&mut bytes).expect("the generator is seeded at its first use, by TLS");
        let number = u64::from_ne_bytes(bytes) % u64::from(self.count);
        self.user(u32::try_from(number).expect("below the count, which is a u32"))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_number_is_always_the_same_user() {
        let (few, many) = (Users::new(3), Users::new(1_000));
        assert_eq!(few.user(2).key.to_string(), "bench-0000002/bench");
        let material = |users: &Users, number| users.user(number).material.expose().to_vec();
        assert_eq!(material(&few, 2), material(&many, 2));
        assert_ne!(material(&few, 2), material(&few, 1));
    }

    #[test]
    fn every_user_and_no_other_is_drawn() {
        let users = Users::new(5);
        let seen: BTreeSet<_> = (0..1_000).map(|_| users.any().key).collect();
        let all: BTreeSet<_> = (0..5).map(|number| users.user(number).key).collect();
        assert_eq!(seen, all);
    }
}
