//! One registered key with the result of its last check.

use keybroker_core::{
    error::{Error, Reason},
    key::{KeyUse, WrappingKeyId, WrappingKeyState},
};
use keybroker_hsm::MISSING_KEY_RETRY;
use keybroker_store::RegistryRow;

use super::Refusal;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) row: RegistryRow,
    pub(super) standing: Standing,
    pub(super) floor: Floor,
    /// Whether the MAC of a destroyed key's row says that the objects of the key must still be removed from the tokens.
    pub(super) is_unremoved: bool,
}

/// The lowest number that a later row of the key may have. The MAC of an older row is valid, too, so the MAC alone would allow
/// an attacker to restore a former state of the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Floor {
    /// The number of the last verified row or, if no row was verified yet, of the first row.
    pub(super) sequence: u64,
    /// The state in that row.
    pub(super) state: WrappingKeyState,
    pub(super) is_verified: bool,
}

impl Floor {
    /// Rejects a row whose number is below the floor. Also rejects another state with the number of
    /// the verified row, and every usable state of a compromised key.
    pub(super) fn check(&self, after: &RegistryRow) -> Result<(), RefusedChange> {
        let went_back = after.sequence < self.sequence;
        let without_a_number =
            self.is_verified && after.sequence == self.sequence && after.state != self.state;
        let is_usable_again = self.is_verified && !after.state.may_follow(self.state);
        if !went_back && !without_a_number && !is_usable_again {
            return Ok(());
        }
        Err(RefusedChange::SetBack {
            id: after.id,
            row: (after.sequence, after.state),
            verified: (self.sequence, self.state),
        })
    }
}

/// The result of the last check of a registered key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// The token has verified the row, so the state in the row determines how the key may be used.
    Verified,
    /// The workers have not checked the key yet, because it was registered recently.
    Unproved,
    /// The key is missing from the token.
    Missing(String),
    /// No token can verify the row now, because the token with the key does not answer.
    Unverified(String),
    /// The key on the token failed the attribute check, the self-test or a comparison.
    Untrusted(String),
    /// The row does not match the token, or the MAC of the row is wrong.
    Altered(String),
}

/// Reason for rejecting a change of a stored row.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum RefusedChange {
    /// The row would undo a later change, or make a compromised key usable again. An attacker can restore an older row, because
    /// its MAC is valid.
    #[error(
        "registry row of wrapping key {id}: the row has number {} ({}) and cannot follow the last verified row, which had number {} ({})",
        row.0, row.1, verified.0, verified.1
    )]
    SetBack {
        id: WrappingKeyId,
        /// Number and state of the row.
        row: (u64, WrappingKeyState),
        /// Number and state of the last verified row.
        verified: (u64, WrappingKeyState),
    },
    /// The row does not match the token, or the MAC of the row is wrong.
    #[error("{cause}")]
    Standing { id: WrappingKeyId, cause: String },
    /// The token cannot verify the row at present.
    #[error("registry row of wrapping key {0}: the token cannot verify the changed row")]
    Unverified(WrappingKeyId),
    /// The row does not exist any more.
    #[error("the row of wrapping key {0} was deleted from the registry")]
    Deleted(WrappingKeyId),
    /// A row that names a further token of a wrapping key cannot be read.
    #[error("a row that names a further token of a wrapping key cannot be read: {0}")]
    UnreadablePlace(String),
}

impl RefusedChange {
    /// Returns the reason for rejecting a new row whose last check had the result `standing`.
    pub(super) fn of(id: WrappingKeyId, standing: Standing) -> Self {
        match standing {
            Standing::Missing(cause) | Standing::Untrusted(cause) | Standing::Altered(cause) => {
                Self::Standing { id, cause }
            }
            Standing::Unproved | Standing::Unverified(_) | Standing::Verified => {
                Self::Unverified(id)
            }
        }
    }

    /// The key whose change was refused.
    pub(super) const fn key(&self) -> Option<WrappingKeyId> {
        match self {
            Self::SetBack { id, .. }
            | Self::Standing { id, .. }
            | Self::Unverified(id)
            | Self::Deleted(id) => Some(*id),
            Self::UnreadablePlace(_) => None,
        }
    }
}

impl Entry {
    /// The entry of a key whose row is read for the first time.
    pub(super) fn first(row: RegistryRow, standing: Standing) -> Self {
        let floor = Floor {
            sequence: row.sequence,
            state: row.state,
            is_verified: false,
        };
        Self {
            row: row.clone(),
            standing: Standing::Unproved,
            floor,
            is_unremoved: false,
        }
        .followed_by(row, standing)
    }

    /// The entry after another examination of the key. A row that is not verified does not raise the floor.
    pub(super) fn followed_by(&self, row: RegistryRow, standing: Standing) -> Self {
        let floor = match &standing {
            Standing::Verified => Floor {
                sequence: row.sequence,
                state: row.state,
                is_verified: true,
            },
            // The first row was altered, so its number is not reliable.
            Standing::Altered(_) if !self.floor.is_verified && row == self.row => Floor {
                sequence: 0,
                ..self.floor
            },
            _ => self.floor,
        };
        Self {
            is_unremoved: self.is_unremoved && row == self.row,
            row,
            standing,
            floor,
        }
    }

    /// The entry with what the MAC of its row says about the objects of a destroyed key.
    pub(super) fn with_removal(self, is_unremoved: bool) -> Self {
        Self {
            is_unremoved,
            ..self
        }
    }

    /// The row by which the workers search for the key. The workers also search for a key that is marked as destroyed
    /// until this state is verified, because a key that exists must not be recorded as lost.
    pub(super) fn searched_row(&self) -> RegistryRow {
        let is_doubtful = self.is_tombstone() && self.standing != Standing::Verified;
        let state = if is_doubtful {
            WrappingKeyState::Suspended
        } else {
            self.row.state
        };
        RegistryRow {
            state,
            ..self.row.clone()
        }
    }

    /// Checks that the key may be used for `key_use`. An altered row may contain a false state, so its key is refused
    /// in every state. An untrusted key on the token is also refused in every state.
    pub(super) fn check(&self, key_use: KeyUse) -> Result<(), Refusal> {
        let id = self.row.id;
        let refused = |reason, detail: String| Err(Refusal::Refused(Error::new(reason, detail)));
        match &self.standing {
            Standing::Untrusted(cause) | Standing::Altered(cause) => {
                refused(Reason::TokenUntrusted, cause.clone())
            }
            Standing::Unverified(cause) if self.is_tombstone() => {
                let error = Error::new(Reason::TokenDown, cause.clone());
                Err(Refusal::Refused(error.retry_after(MISSING_KEY_RETRY)))
            }
            _ if !self.row.state.allows(key_use) => refused(
                Reason::KeyState,
                format!("wrapping key {id} is {}", self.row.state),
            ),
            Standing::Verified => Ok(()),
            Standing::Unproved => Err(Refusal::Unproved(id)),
            Standing::Missing(cause) | Standing::Unverified(cause) => {
                let detail = format!("wrapping key {id} cannot be used now: {cause}");
                let error = Error::new(Reason::TokenDown, detail);
                Err(Refusal::Refused(error.retry_after(MISSING_KEY_RETRY)))
            }
        }
    }

    /// Whether the key is destroyed, so that another key authenticates its row.
    pub(super) fn is_tombstone(&self) -> bool {
        self.row.state == WrappingKeyState::Destroyed
    }

    /// A problem that prevents the use of the key in any state.
    pub(super) fn problem(&self) -> Option<&str> {
        match &self.standing {
            Standing::Verified => None,
            Standing::Unproved => Some("the token workers have not checked the key yet"),
            Standing::Missing(cause)
            | Standing::Unverified(cause)
            | Standing::Untrusted(cause)
            | Standing::Altered(cause) => Some(cause),
        }
    }
}
