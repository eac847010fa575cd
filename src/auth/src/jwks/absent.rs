//! Key ids of earlier key sets. Without them, a token of a withdrawn key could not be told from one of a new key that was not fetched
//! yet.

use aws_lc_rs::digest;

/// Key ids that are remembered. A provider decides them, and no caller.
const WITHDRAWN_MAX: usize = 256;

/// SHA-256 of a key id, whose length a provider decides.
type Name = [u8; 32];

fn name_of(kid: &str) -> Name {
    let digest = digest::digest(&digest::SHA256, kid.as_bytes());
    digest.as_ref().try_into().expect("SHA-256 gives 32 bytes")
}

/// Key ids of earlier sets that the set in use does not have, the oldest first.
#[derive(Clone, Debug, Default)]
pub(super) struct Withdrawn(Vec<Name>);

impl Withdrawn {
    /// The same after another set took the place of `before`.
    pub(super) fn after<'a>(
        &self,
        before: impl Iterator<Item = &'a str>,
        now: impl Iterator<Item = &'a str>,
    ) -> Self {
        let now: Vec<Name> = now.map(name_of).collect();
        let mut names = self.0.clone();
        for name in before.map(name_of) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names.retain(|name| !now.contains(name));
        let excess = names.len().saturating_sub(WITHDRAWN_MAX);
        names.drain(..excess);
        Self(names)
    }

    pub(super) fn contains(&self, kid: &str) -> bool {
        self.0.contains(&name_of(kid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_withdrawn_key_is_known_until_it_returns_and_a_bounded_number_is_remembered() {
        let none = Withdrawn::default();
        let one = none.after(["a", "b"].into_iter(), ["b", "c"].into_iter());
        assert!(one.contains("a") && !one.contains("b") && !one.contains("c"));
        let two = one.after(["b", "c"].into_iter(), ["a"].into_iter());
        assert!(!two.contains("a") && two.contains("b") && two.contains("c"));
        let mut many = two;
        for number in 0..2 * WITHDRAWN_MAX {
            let (before, now) = (number.to_string(), (number + 1).to_string());
            many = many.after([before.as_str()].into_iter(), [now.as_str()].into_iter());
        }
        assert_eq!(many.0.len(), WITHDRAWN_MAX);
        assert!(!many.contains("0") && many.contains(&(2 * WITHDRAWN_MAX - 1).to_string()));
    }
}
