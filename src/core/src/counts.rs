//! Counts the places or bytes that each principal or network has taken, with an upper limit, so that one of them cannot
//! take all.

use std::{collections::HashMap, hash::Hash};

/// The number of places or bytes that each key has taken. Keys that have taken none have no entry.
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
        self.take_several(key, 1, max)
    }

    /// Takes `count` places for `key`, unless `key` would then have more than `max` places. Returns whether the places
    /// were taken.
    pub fn take_several(&mut self, key: K, count: usize, max: usize) -> bool {
        let taken = self.0.get(&key).copied().unwrap_or(0);
        let has_room = count <= max.saturating_sub(taken);
        if has_room && count > 0 {
            self.0.insert(key, taken + count);
        }
        has_room
    }

    /// Releases one of the places that `key` has taken.
    pub fn give_back(&mut self, key: &K) {
        self.give_back_several(key, 1);
    }

    /// Releases `count` of the places that `key` has taken.
    pub fn give_back_several(&mut self, key: &K, count: usize) {
        if let Some(taken) = self.0.get_mut(key) {
            *taken -= count;
            if *taken == 0 {
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

    #[test]
    fn several_places_are_taken_together_or_not_at_all() {
        let mut counts = Counts::default();
        assert!(counts.take_several("alice", 60, 100));
        assert!(!counts.take_several("alice", 41, 100));
        assert!(counts.take_several("alice", 40, 100) && counts.take_several("bob", 100, 100));
        assert!(counts.take_several("alice", 0, 100) && counts.take_several("carol", 0, 100));
        counts.give_back_several(&"alice", 100);
        counts.give_back_several(&"bob", 100);
        assert!(counts.is_empty());
    }
}
