//! Pages of rows. A page contains the start of the next page, and a result for each row, because a
//! row may be damaged.

use keybroker_core::key::{ClientId, KeyName, RecordId, UserId};

use super::Error;

/// Highest number of rows that a page token can make the database skip. The skipped rows are
/// damaged and have no readable key.
pub const SKIPPED_MAX: u32 = 100_000;

/// The start of a page: the position after a row with a readable key and after a number of further
/// rows without a readable key.
///
/// Therefore a list can continue after at most [`SKIPPED_MAX`] consecutive damaged rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position<K> {
    /// Key of the last row with a readable key; `None` at the beginning.
    pub after: Option<K>,
    /// The number of rows without a readable key that follow the row of `after`.
    pub skip: u32,
}

impl<K> Default for Position<K> {
    fn default() -> Self {
        Self {
            after: None,
            skip: 0,
        }
    }
}

impl<K> From<Option<K>> for Position<K> {
    fn from(after: Option<K>) -> Self {
        Self { after, skip: 0 }
    }
}

impl<K> Position<K> {
    /// Refuses a position that would make the database skip too many rows.
    pub(super) fn check_skipped(&self) -> Result<(), Error> {
        if self.skip <= SKIPPED_MAX {
            return Ok(());
        }
        let what = format!(
            "more than {SKIPPED_MAX} consecutive rows have an unreadable key; run `keybroker store check`"
        );
        Err(Error::Corrupt(what.into()))
    }

    /// Moves past one row. `key` is `None` if the key of the row could not be read.
    pub fn advance(&mut self, key: Option<K>) {
        match key {
            Some(key) => *self = Some(key).into(),
            None => self.skip = self.skip.saturating_add(1),
        }
    }
}

/// The damage of a stored row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// A column cannot be decoded, or the current revision is missing.
    Unreadable,
    /// The row of the record has an earlier revision than the newest stored revision.
    SetBack,
    /// The MAC of the row is wrong, or the registry does not have the wrapping key of this MAC.
    MacRefused,
}

impl Damage {
    /// Returns the name that lists show for the damage. The name must never change.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unreadable => "unreadable",
            Self::SetBack => "set-back",
            Self::MacRefused => "mac-refused",
        }
    }
}

/// A damaged row of the records, with the parts of its address that could be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DamagedRecord {
    /// Identity of the record.
    pub id: Option<RecordId>,
    /// The user of the record.
    pub user: Option<UserId>,
    /// The name of the user key.
    pub name: Option<KeyName>,
    /// What is wrong.
    pub damage: Damage,
    /// Table and column, or the revisions that contradict each other. The text never contains bytes of the row.
    pub detail: String,
}

impl DamagedRecord {
    /// The row's position in the order of a list, if the position could be read.
    pub fn key(&self) -> Option<(UserId, KeyName)> {
        Some((self.user.clone()?, self.name.clone()?))
    }
}

/// A damaged row of the API clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DamagedClient {
    /// The id of the client, if the id could be read.
    pub id: Option<ClientId>,
    /// What is wrong.
    pub damage: Damage,
    /// Table and column. The text never contains bytes of the row.
    pub detail: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_advances_past_rows_without_a_key() {
        let mut position = Position::default();
        position.advance(None);
        position.advance(None);
        assert_eq!((position.after, position.skip), (None, 2));
        position.advance(Some(7));
        position.advance(None);
        assert_eq!((position.after, position.skip), (Some(7), 1));
        position.skip = u32::MAX;
        position.advance(None);
        assert_eq!(position.skip, u32::MAX);
    }
}
