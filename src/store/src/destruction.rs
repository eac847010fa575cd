//! The scheduled destructions of wrapping keys. The row of a destruction stays until the key is removed from every token, so that a
//! broker that is interrupted forgets no key.

use std::fmt;

use async_trait::async_trait;

use keybroker_core::{
    call::Timestamp,
    envelope::{
        Mac,
        mac::{DestructionFields, MacMessage},
    },
    key::WrappingKeyId,
};

use super::error::Error;

/// Longest name of the principal that requested a destruction, in bytes.
pub const REQUESTED_BY_BYTES_MAX: usize = 255;

/// The scheduled destruction of a wrapping key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DestructionRow {
    /// The wrapping key.
    pub key: WrappingKeyId,
    /// The wrapping key whose integrity key made the MAC. The integrity key of `key` may be known to others.
    pub signer: WrappingKeyId,
    /// The number of the key's registry row. If the registry row has another number, the destruction is not valid.
    pub sequence: u64,
    /// When the destruction was requested.
    pub requested: Timestamp,
    /// When the key is destroyed. After the mark: when the objects are removed.
    pub due: Timestamp,
    /// The principal that requested the destruction, at most [`REQUESTED_BY_BYTES_MAX`] bytes.
    pub requested_by: String,
    /// A MAC over all fields above by the integrity key of `signer`, so that a person who can write to the database cannot destroy a
    /// key, and cannot bring the time forward.
    pub mac: Mac,
}

impl DestructionRow {
    /// The message that the row's MAC must cover until the key is marked as destroyed.
    pub fn mac_message(&self) -> MacMessage {
        MacMessage::destruction(&self.fields())
    }

    /// The message that the row's MAC must cover after the key was marked as destroyed. Only then may the objects be removed.
    pub fn removal_message(&self) -> MacMessage {
        MacMessage::removal(&self.fields())
    }

    fn fields(&self) -> DestructionFields<'_> {
        DestructionFields {
            key: self.key,
            signer: self.signer,
            sequence: self.sequence,
            requested_us: self.requested.micros(),
            due_us: self.due.micros(),
            requested_by: &self.requested_by,
        }
    }
}

/// All rows of scheduled destructions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FoundDestructions {
    /// The rows that can be read, ordered by key.
    pub rows: Vec<DestructionRow>,
    /// The rows that cannot be read.
    pub unreadable: Vec<UnreadableDestruction>,
}

impl FoundDestructions {
    /// Whether there is a row of this key, readable or not.
    pub fn has(&self, key: WrappingKeyId) -> bool {
        self.rows.iter().any(|row| row.key == key) || self.unreadable_row(key).is_some()
    }

    /// The row of this key that cannot be read.
    pub fn unreadable_row(&self, key: WrappingKeyId) -> Option<&UnreadableDestruction> {
        self.unreadable.iter().find(|row| row.key == Some(key))
    }
}

/// A row of a scheduled destruction that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnreadableDestruction {
    /// The wrapping key; `None` if the id of the key cannot be read, either.
    pub key: Option<WrappingKeyId>,
    /// The cause, with the name of the damaged column.
    pub cause: String,
}

impl fmt::Display for UnreadableDestruction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.key {
            Some(key) => write!(f, "the row of key {key} ")?,
            None => f.write_str("a row without a readable key id ")?,
        }
        write!(
            f,
            "in the table key_destructions cannot be read: {}",
            self.cause
        )
    }
}

/// A change of a scheduled destruction, together with a change of the registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DestructionChange {
    /// Adds the row, and replaces an earlier row of the same key.
    Schedule(DestructionRow),
    /// Removes the row of this key, if there is one.
    Remove(WrappingKeyId),
}

/// The operations of a store for scheduled destructions. [`RegistryChange`](crate::RegistryChange) adds and removes the rows.
#[async_trait]
pub trait Destructions: Send + Sync {
    /// All scheduled destructions. A row that cannot be read does not hide the other rows.
    async fn destructions(&self) -> Result<FoundDestructions, Error>;

    /// Makes an instance the holder of a destruction until `until`, or prolongs its lease. Returns `false` if another instance holds
    /// the destruction at `now`, or if there is no row with this MAC. A lease of another instance that ends long after `until` counts
    /// as ended, because only a clock that was wrong gives such a lease.
    async fn hold_destruction(
        &self,
        row: &DestructionRow,
        holder: &str,
        now: Timestamp,
        until: Timestamp,
    ) -> Result<bool, Error>;

    /// Removes a destruction that is done or not valid. Returns `false` if the row was changed meanwhile.
    async fn end_destruction(&self, row: &DestructionRow) -> Result<bool, Error>;
}
