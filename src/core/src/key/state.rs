//! The states of a wrapping key, the legal transitions between them, and what each state allows. `docs/keys.md` has the same
//! tables, and a test compares the page with this module.

use std::fmt;

use serde::{Deserialize, Serialize};

/// State of a wrapping key (NIST SP 800-57 part 1 revision 5, section 7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WrappingKeyState {
    /// The wrapping key is registered and checked, and is not used yet.
    PreActive,
    /// The wrapping key wraps and unwraps.
    Active,
    /// The wrapping key temporarily neither wraps nor unwraps.
    Suspended,
    /// The wrapping key unwraps, and no longer wraps.
    Deactivated,
    /// The wrapping key neither wraps nor unwraps, because others may know its private half.
    Compromised,
    /// The wrapping key is no longer on any token, and no row needs it.
    Destroyed,
}

/// A use of a wrapping key or of its integrity key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyUse {
    /// Wrap new key material.
    Wrap,
    /// Unwrap a stored envelope to release its user key.
    Unwrap,
    /// Verify the MACs of rows: envelopes, API clients and answers to request ids. The MAC of the key's own registry row is
    /// verified in every state.
    VerifyMac,
    /// Make MACs for rows.
    MakeMac,
    /// Unwrap stored envelopes inside a worker during a re-wrap, to wrap their user keys under another wrapping key.
    RewrapFrom,
    /// Be the source of a re-wrap of the rows in a list, which the audit log or a backup proves.
    RewrapListed,
}

impl KeyUse {
    /// All uses, in the order of the documentation.
    pub const ALL: [Self; 6] = [
        Self::Wrap,
        Self::Unwrap,
        Self::VerifyMac,
        Self::MakeMac,
        Self::RewrapFrom,
        Self::RewrapListed,
    ];
}

impl WrappingKeyState {
    /// All states, in the order of a key's life cycle.
    pub const ALL: [Self; 6] = [
        Self::PreActive,
        Self::Active,
        Self::Suspended,
        Self::Deactivated,
        Self::Compromised,
        Self::Destroyed,
    ];

    /// The name of the state in the database and in output.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::PreActive => "pre-active",
            Self::Active => "active",
            Self::Suspended => "suspended",
            Self::Deactivated => "deactivated",
            Self::Compromised => "compromised",
            Self::Destroyed => "destroyed",
        }
    }

    /// Parses the stored text.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == text)
    }

    /// The states to which a key in this state may change.
    ///
    /// Two transitions are not in SP 800-57. A deactivated key may become active again, so that a rotation can be undone. A
    /// deactivated key may be suspended, so that the release of its user keys can be stopped until an incident is understood.
    pub const fn next(self) -> &'static [Self] {
        match self {
            Self::PreActive => &[Self::Active, Self::Compromised, Self::Destroyed],
            Self::Active => &[Self::Suspended, Self::Deactivated, Self::Compromised],
            Self::Suspended => &[Self::Active, Self::Deactivated, Self::Compromised],
            Self::Deactivated => &[
                Self::Active,
                Self::Suspended,
                Self::Compromised,
                Self::Destroyed,
            ],
            Self::Compromised => &[Self::Destroyed],
            Self::Destroyed => &[],
        }
    }

    /// Checks that a key in this state may change to the state `to`.
    pub fn check_change(self, to: Self) -> Result<(), IllegalTransition> {
        if self.next().contains(&to) {
            Ok(())
        } else {
            Err(IllegalTransition { from: self, to })
        }
    }

    /// Whether a later row of a key may have this state if an earlier row had the state `earlier`. The rows between them may be
    /// unknown. Nothing leads back from [`Compromised`](Self::Compromised): others may know the integrity key, so that the MAC of
    /// such a row proves nothing.
    pub const fn may_follow(self, earlier: Self) -> bool {
        !matches!(earlier, Self::Compromised) || matches!(self, Self::Compromised | Self::Destroyed)
    }

    /// Whether a key in this state may be used in this way. All other functions about the use of a key call this function.
    ///
    /// A deactivated key makes MACs, because restoring an earlier revision of a record makes a new MAC for this
    /// revision without unwrapping it. A compromised key is only the source of a re-wrap of listed rows: a person who
    /// knows its private half may also have made a row, and only the list shows that the broker made it.
    pub const fn allows(self, key_use: KeyUse) -> bool {
        match self {
            Self::PreActive | Self::Suspended | Self::Destroyed => false,
            Self::Compromised => matches!(key_use, KeyUse::RewrapListed),
            Self::Active => true,
            Self::Deactivated => !matches!(key_use, KeyUse::Wrap),
        }
    }

    /// Whether the wrapping key may wrap new key material.
    pub const fn may_wrap(self) -> bool {
        self.allows(KeyUse::Wrap)
    }

    /// Whether the wrapping key may unwrap stored envelopes.
    pub const fn may_unwrap(self) -> bool {
        self.allows(KeyUse::Unwrap)
    }

    /// Whether rows may be moved from this wrapping key to another wrapping key.
    pub const fn may_rewrap_from(self) -> bool {
        self.allows(KeyUse::RewrapFrom)
    }
}

impl fmt::Display for WrappingKeyState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A change of a state that is not in the table of transitions. The error message lists the legal
/// changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IllegalTransition {
    /// The state of the key.
    pub from: WrappingKeyState,
    /// The requested state.
    pub to: WrappingKeyState,
}

impl fmt::Display for IllegalTransition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { from, to } = self;
        write!(f, "a key that is {from} cannot become {to}; ")?;
        let next: Vec<&str> = from.next().iter().map(|state| state.as_str()).collect();
        match next.split_last() {
            None => write!(f, "the state of this key can never change"),
            Some((only, [])) => write!(f, "the next state can only be {only}"),
            Some((last, most)) => write!(f, "the next state can be {} or {last}", most.join(", ")),
        }
    }
}

impl std::error::Error for IllegalTransition {}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        KeyUse,
        WrappingKeyState::{
            self, Active, Compromised, Deactivated, Destroyed, PreActive, Suspended,
        },
    };

    fn state() -> impl Strategy<Value = WrappingKeyState> {
        proptest::sample::select(WrappingKeyState::ALL.as_slice())
    }

    /// The matrix, written by hand: wrap, unwrap, verify MACs, make MACs, source of a re-wrap, source of a re-wrap of listed rows.
    #[test]
    fn each_state_allows_what_the_matrix_says() {
        for (state, expected) in [
            (PreActive, [false, false, false, false, false, false]),
            (Active, [true, true, true, true, true, true]),
            (Suspended, [false, false, false, false, false, false]),
            (Deactivated, [false, true, true, true, true, true]),
            (Compromised, [false, false, false, false, false, true]),
            (Destroyed, [false, false, false, false, false, false]),
        ] {
            assert_eq!(
                KeyUse::ALL.map(|one| state.allows(one)),
                expected,
                "{state}"
            );
            assert_eq!(state.may_wrap(), expected[0], "{state}");
            assert_eq!(state.may_unwrap(), expected[1], "{state}");
            assert_eq!(state.may_rewrap_from(), expected[4], "{state}");
        }
    }

    /// The table of transitions, written by hand for each pair of states.
    #[test]
    fn each_transition_is_legal_or_refused_with_the_legal_ones() {
        let legal = [
            (PreActive, Active),
            (PreActive, Compromised),
            (PreActive, Destroyed),
            (Active, Suspended),
            (Active, Deactivated),
            (Active, Compromised),
            (Suspended, Active),
            (Suspended, Deactivated),
            (Suspended, Compromised),
            (Deactivated, Active),
            (Deactivated, Suspended),
            (Deactivated, Compromised),
            (Deactivated, Destroyed),
            (Compromised, Destroyed),
        ];
        for from in WrappingKeyState::ALL {
            for to in WrappingKeyState::ALL {
                let checked = from.check_change(to);
                assert_eq!(checked.is_ok(), legal.contains(&(from, to)), "{from} {to}");
                let Err(illegal) = checked else { continue };
                let text = illegal.to_string();
                for (_, next) in legal.iter().filter(|(known, _)| *known == from) {
                    assert!(text.contains(next.as_str()), "{text}");
                }
            }
        }
        let refused = Active.check_change(Destroyed).unwrap_err().to_string();
        assert_eq!(
            refused,
            "a key that is active cannot become destroyed; the next state can be suspended, deactivated or compromised"
        );
    }

    proptest! {
        /// In every sequence of states, a compromised key is never used again, and no state follows `destroyed`.
        #[test]
        fn no_sequence_of_changes_leads_back_from_compromise(changes in proptest::collection::vec(state(), 0..40)) {
            let (mut state, mut was_compromised) = (PreActive, false);
            for to in changes {
                if state.check_change(to).is_err() {
                    continue;
                }
                prop_assert!(state != to && state != Destroyed);
                prop_assert!(to.may_follow(state) && (!was_compromised || to.may_follow(Compromised)));
                state = to;
                was_compromised |= state == Compromised;
                let mut uses = KeyUse::ALL.iter().filter(|one| **one != KeyUse::RewrapListed);
                let is_used = uses.any(|one| state.allows(*one));
                prop_assert!(!(was_compromised && is_used), "{state}");
            }
        }

        /// The stored name of each state can be parsed, and no other string is the name of a state.
        #[test]
        fn the_stored_text_is_read_back(state in state(), text in "[a-z-]{0,12}") {
            prop_assert_eq!(WrappingKeyState::parse(state.as_str()), Some(state));
            let known = WrappingKeyState::ALL.iter().any(|one| one.as_str() == text);
            prop_assert_eq!(WrappingKeyState::parse(&text).is_some(), known);
        }
    }
}
