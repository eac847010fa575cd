//! The users of a measurement. Who they are and which keys they have follows from a number, so that nothing has to be
//! remembered between runs, nor held in memory for a million.

use aws_lc_rs::{hmac, rand};

/// The key name that belongs to this command.
pub(super) const KEY_NAME: &str = "bench";

/// A number of users, numbered from 0.
#[derive(Clone, Debug)]
pub(super) struct Users {
    key: hmac::Key,
    count: u32,
}

/// A user and their key of 32 bytes.
#[derive(Debug)]
pub(super) struct User {
    pub(super) name: String,
    pub(super) material: Vec<u8>,
}

impl Users {
    pub(super) fn new(count: u32) -> Self {
        let key = hmac::Key::new(hmac::HMAC_SHA256, b"keybroker bench");
        Self { key, count }
    }

    pub(super) fn count(&self) -> u32 {
        self.count
    }

    pub(super) fn user(&self, number: u32) -> User {
        let name = format!("bench-{number:07}");
        let material = hmac::sign(&self.key, name.as_bytes()).as_ref().to_vec();
        User { name, material }
    }

    /// Any of them, each as likely as the other: a database cannot guess who comes next.
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
        assert_eq!(few.user(2).name, "bench-0000002");
        assert_eq!(few.user(2).material, many.user(2).material);
        assert_ne!(few.user(2).material, few.user(1).material);
    }

    #[test]
    fn every_user_and_no_other_is_drawn() {
        let users = Users::new(5);
        let seen: BTreeSet<String> = (0..1_000).map(|_| users.any().name).collect();
        let all: BTreeSet<String> = (0..5).map(|number| users.user(number).name).collect();
        assert_eq!(seen, all);
    }
}
