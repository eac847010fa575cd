//! The identity of a database: 16 random bytes that `store migrate` writes once. A broker stores
//! the identity next to its audit log, in order to detect a different database. The identifier of a
//! database server is not suitable, because the identifier can change for legitimate reasons and
//! SQLite has no identifier.

use std::fmt;

use uuid::Uuid;

/// Highest number of changes in one call of [`crate::Store::evidence`].
pub const CHANGES_MAX: usize = 16;

/// The identity of a database: 16 random bytes, shown as 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct StoreId([u8; 16]);

/// Evidence that a database is the database that a broker used before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Evidence {
    /// The identity of the database; absent if its row was removed.
    pub store: Option<StoreId>,
    /// The number of queried changes whose marks are in the database.
    pub marks: usize,
}

/// Whether a database was used with an audit log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KnownLog {
    /// The database was used with this audit log.
    This,
    /// The database was used only with other audit logs of the same instance.
    Another,
    /// The database was used with no audit log of the instance.
    None,
}

impl StoreId {
    pub(super) fn fresh() -> Self {
        Self(*Uuid::new_v4().as_bytes())
    }

    /// Reads an identity from 32 hexadecimal digits.
    pub fn from_hex(text: &str) -> Option<Self> {
        let bytes = hex::decode(text).ok()?;
        Self::from_slice(&bytes)
    }

    pub(super) fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// The 16 bytes.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for StoreId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for StoreId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StoreId({self})")
    }
}
