//! The states of a request for approval and the legal transitions between them. `docs/approvals.md` has the same table, and a test
//! compares the page with this module.
//!
//! Mitigation: M25 of `THREAT_MODEL.md`.

use std::fmt;

use crate::call::Timestamp;

/// The state of a request for approval: a change that a second person must approve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ApprovalState {
    /// No second person has decided about the request yet.
    Pending,
    /// A second person approved the request. The requesting person may make the change once.
    Approved,
    /// A person rejected the request.
    Rejected,
    /// The change was made.
    Used,
    /// The request was not used in time. This state is computed from the time and is never stored.
    Expired,
}

impl ApprovalState {
    /// All states, in the order of the documentation.
    pub const ALL: [Self; 5] = [
        Self::Pending,
        Self::Approved,
        Self::Rejected,
        Self::Used,
        Self::Expired,
    ];

    /// The name of the state in the database and in output.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Approved => "approved",
            Self::Rejected => "rejected",
            Self::Used => "used",
            Self::Expired => "expired",
        }
    }

    /// Parses the stored text.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == text)
    }

    /// The states to which a request in this state may change. A request whose state has no successor never changes again.
    pub const fn next(self) -> &'static [Self] {
        match self {
            Self::Pending => &[Self::Approved, Self::Rejected, Self::Expired],
            Self::Approved => &[Self::Rejected, Self::Used, Self::Expired],
            Self::Rejected | Self::Used | Self::Expired => &[],
        }
    }

    /// Whether a request in this state may change to the state `to`.
    pub fn may_become(self, to: Self) -> bool {
        self.next().contains(&to)
    }

    /// Whether a person can still decide about the request or use it.
    pub const fn is_open(self) -> bool {
        !self.next().is_empty()
    }

    /// The state at the time `now` of a request with this stored state. `expires` is the time after which an open request can no
    /// longer be approved or used.
    #[must_use]
    pub fn at(self, expires: Timestamp, now: Timestamp) -> Self {
        if self.may_become(Self::Expired) && now >= expires {
            Self::Expired
        } else {
            self
        }
    }
}

impl fmt::Display for ApprovalState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The table of the documentation has each state with its successors, and no other state.
    #[test]
    fn the_documentation_has_every_transition() {
        let page = include_str!("../../../docs/approvals.md");
        let (_, table) = page.split_once("| State | Next states |").unwrap();
        let (table, _) = table.split_once("\n\n").unwrap();
        let cells = |line: &str| -> Vec<String> {
            line.split('|').map(|cell| cell.trim().to_owned()).collect()
        };
        let documented: Vec<(String, String)> = table
            .lines()
            .skip(2)
            .map(|line| (cells(line)[1].clone(), cells(line)[2].clone()))
            .collect();
        let names = |states: &[ApprovalState]| {
            let names: Vec<&str> = states.iter().map(|state| state.as_str()).collect();
            names.join(", ")
        };
        let expected = ApprovalState::ALL.map(|state| (state.to_string(), names(state.next())));
        assert_eq!(documented, expected);
    }

    #[test]
    fn each_state_has_a_name_that_is_read_back() {
        for state in ApprovalState::ALL {
            assert_eq!(ApprovalState::parse(state.as_str()), Some(state));
        }
        assert_eq!(ApprovalState::parse("Pending"), None);
    }

    fn any_state() -> impl Strategy<Value = ApprovalState> {
        prop::sample::select(ApprovalState::ALL.to_vec())
    }

    proptest! {
        /// After any sequence of attempts, a request has passed through at most three states, and never returned to an earlier
        /// state. A request is used only after an approval that was not withdrawn, and does not change after its last state.
        #[test]
        fn no_sequence_of_changes_uses_a_request_twice(
            attempts in prop::collection::vec(any_state(), 0..40)
        ) {
            let mut passed = vec![ApprovalState::Pending];
            for to in attempts {
                let state = *passed.last().unwrap();
                if state.may_become(to) {
                    prop_assert!(state.is_open());
                    passed.push(to);
                }
            }
            prop_assert!(passed.len() <= 3, "{passed:?}");
            // A rejection, also of an approved request, is the last state.
            if let Some(place) = passed.iter().position(|&state| state == ApprovalState::Rejected) {
                prop_assert_eq!(place, passed.len() - 1);
            }
            if passed.contains(&ApprovalState::Used) {
                let all = [ApprovalState::Pending, ApprovalState::Approved, ApprovalState::Used];
                prop_assert_eq!(&passed[..], &all[..]);
            }
        }

        /// Only an open request expires, exactly at its time.
        #[test]
        fn time_changes_only_open_requests(
            state in any_state(), expires in any::<i64>(), now in any::<i64>()
        ) {
            let shown = state.at(Timestamp::from_micros(expires), Timestamp::from_micros(now));
            let expected = if state.is_open() && now >= expires {
                ApprovalState::Expired
            } else {
                state
            };
            prop_assert_eq!(shown, expected);
        }
    }
}
