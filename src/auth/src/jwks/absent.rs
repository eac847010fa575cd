//! Key ids of earlier key sets. The remembered key ids show whether an access token was signed with
//! a withdrawn key, or with a new key that the broker has not fetched yet.

use aws_lc_rs::digest;
use keybroker_core::call::Timestamp;

/// Largest number of key ids that are remembered. Only key ids from the provider's key sets are remembered.
const WITHDRAWN_MAX: usize = 256;

/// The SHA-256 of a key id. The hash is stored because a key id can be of any length.
type Name = [u8; 32];

fn name_of(kid: &str) -> Name {
    let digest = digest::digest(&digest::SHA256, kid.as_bytes());
    digest.as_ref().try_into().expect("SHA-256 gives 32 bytes")
}

/// Key ids of earlier sets that are missing in the current set, oldest first.
#[derive(Clone, Debug, Default)]
pub(super) struct Withdrawn(Vec<Former>);

/// A key id of an earlier set.
#[derive(Clone, Debug)]
struct Former {
    name: Name,
    /// The start of the last fetch whose key set contained the key.
    seen: Timestamp,
}

impl Withdrawn {
    /// Returns the withdrawn keys after the previous set was replaced with the current set.
    /// `before` contains the key ids of the previous set, which was last fetched at `seen`; `now`
    /// contains the key ids of the current set.
    pub(super) fn after<'a>(
        &self,
        before: impl Iterator<Item = &'a str>,
        seen: Timestamp,
        now: impl Iterator<Item = &'a str>,
    ) -> Self {
        let now: Vec<Name> = now.map(name_of).collect();
        let before: Vec<Name> = before.map(name_of).collect();
        let mut former = self.0.clone();
        former.retain(|former| !now.contains(&former.name) && !before.contains(&former.name));
        let gone = before.into_iter().filter(|name| !now.contains(name));
        former.extend(gone.map(|name| Former { name, seen }));
        let excess = former.len().saturating_sub(WITHDRAWN_MAX);
        former.drain(..excess);
        Self(former)
    }

    /// Returns the start of the last fetch whose key set contained this key. Returns `None` if the
    /// current set contains the key, or if no earlier set contained the key.
    pub(super) fn last_seen(&self, kid: &str) -> Option<Timestamp> {
        let name = name_of(kid);
        let found = self.0.iter().find(|former| former.name == name)?;
        Some(found.seen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_withdrawn_key_is_known_until_it_returns_and_a_bounded_number_is_remembered() {
        let at = Timestamp::from_micros;
        let none = Withdrawn::default();
        let one = none.after(["a", "b"].into_iter(), at(1), ["b", "c"].into_iter());
        assert_eq!(one.last_seen("a"), Some(at(1)));
        assert!(one.last_seen("b").is_none() && one.last_seen("c").is_none());
        let two = one.after(["b", "c"].into_iter(), at(2), ["a"].into_iter());
        assert!(two.last_seen("a").is_none());
        assert_eq!(two.last_seen("b"), Some(at(2)));
        // The last fetch whose set contained the key counts, and not the first such fetch.
        let back = two.after(["a"].into_iter(), at(3), ["b"].into_iter());
        let gone = back.after(["b"].into_iter(), at(4), ["c"].into_iter());
        assert_eq!(gone.last_seen("b"), Some(at(4)));
        let mut many = two;
        for number in 0..2 * WITHDRAWN_MAX {
            let (before, now) = (number.to_string(), (number + 1).to_string());
            many = many.after(
                [before.as_str()].into_iter(),
                at(5),
                [now.as_str()].into_iter(),
            );
        }
        assert_eq!(many.0.len(), WITHDRAWN_MAX);
        assert!(many.last_seen("0").is_none());
        assert!(
            many.last_seen(&(2 * WITHDRAWN_MAX - 1).to_string())
                .is_some()
        );
    }
}
