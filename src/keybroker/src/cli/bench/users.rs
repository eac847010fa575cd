//! The users of a measurement. The name and the key of a user are derived from the user's number,
//! so nothing needs to be stored.

use aws_lc_rs::{hmac, rand};
use keybroker_client::{KeyMaterial, UserKeyRef};

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
}

/// A user and their key of 32 bytes.
#[derive(Debug)]
pub(super) struct User {
    pub(super) key: UserKeyRef,
    pub(super) material: KeyMaterial,
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
        }
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
