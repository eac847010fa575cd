//! Counts the places that each principal or network has taken, with an upper limit, so that one of them cannot take all
//! places.

use std::{collections::HashMap, hash::Hash};

/// The number of places that each key has taken. Keys without a place have no entry.
#[derive(Debug)]
pub struct Counts<K>(HashMap<K, usize>);

impl<K> Default for Counts<K> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Hash + Eq> Counts<K> {
    /// Takes a place for `key`, unless `key` already has `max` places. Returns whether a place was taken.
    pub fn take(&mut self, key: K, max: usize) -> bool {
        let taken = self.0.get(&key).copied().unwrap_or(0);
        let has_room = taken < max;
        if has_room {
            self.0.insert(key, taken + 1);
        }
        has_room
    }

    /// Releases one of the places that `key` has taken.
    pub fn give_back(&mut self, key: &K) {
        if let Some(count) = self.0.get_mut(key) {
            *count -= 1;
            if *count == 0 {
                self.0.remove(key);
            }
        }
    }

    /// Whether no place is taken.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_key_has_its_own_limit_and_leaves_nothing_behind() {
        let mut counts = Counts::default();
        assert!(counts.take("alice", 2) && counts.take("alice", 2));
        assert!(!counts.take("alice", 2) && counts.take("bob", 2));
        counts.give_back(&"alice");
        assert!(counts.take("alice", 2));
        for key in ["alice", "alice", "bob"] {
            counts.give_back(&key);
        }
        assert!(counts.is_empty() && !counts.take("alice", 0) && counts.is_empty());
    }
}
