//! The database as tables: what is done to all of it at once, by commands. Rows are read in the order of their keys, a page
//! at a time, so that memory stays bounded and a job that was cut short can begin again; a row that does not decode is seen
//! and not skipped.

use std::fmt;

use async_trait::async_trait;

use keybroker_core::{
    call::{CallId, Timestamp},
    key::{KeyAddress, RecordId, Revision, WrappingKeyId},
};

use super::{
    Error, RecordInfo, RecordState, Store, StoreId, rows,
    session::{Columns, Value},
};

/// Rows per page.
pub const PAGE_ROWS: usize = 500;

/// The tables. A copy is filled in the order of [`Table::ALL`]: each after those that its rows refer to, and the
/// registry last, because no broker serves from a database without it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// The registry of wrapping keys.
    WrappingKeys,
    /// Records.
    Records,
    /// Their revisions.
    Revisions,
    /// What tells after a crash which mutations were committed.
    Changes,
    /// Request ids.
    Requests,
    /// When records were last released.
    LastUses,
    /// API clients.
    Clients,
    /// When their secrets were last accepted.
    ClientUses,
}

/// What a column holds.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Bytes,
    Text,
    Integer,
    OptionalInteger,
}

impl Table {
    /// All of them, in the order in which rows can be added.
    pub const ALL: [Self; 8] = [
        Self::Records,
        Self::Revisions,
        Self::Changes,
        Self::Requests,
        Self::LastUses,
        Self::Clients,
        Self::ClientUses,
        Self::WrappingKeys,
    ];

    /// As the database names it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::WrappingKeys => "wrapping_keys",
            Self::Records => "records",
            Self::Revisions => "revisions",
            Self::Changes => "changes",
            Self::Requests => "requests",
            Self::LastUses => "last_uses",
            Self::Clients => "clients",
            Self::ClientUses => "client_uses",
        }
    }

    /// How many columns, of the first ones, are the key.
    pub(super) const fn key_columns(self) -> usize {
        match self {
            Self::WrappingKeys | Self::Records | Self::Changes | Self::LastUses | Self::Clients => {
                1
            }
            Self::Revisions | Self::ClientUses => 2,
            Self::Requests => 3,
        }
    }

    /// What the columns hold, in the order in which the statements name them.
    pub(super) const fn columns(self) -> &'static [Kind] {
        use Kind::{Bytes, Integer, OptionalInteger, Text};
        match self {
            Self::WrappingKeys => &[
                Bytes,
                Bytes,
                Text,
                Text,
                Text,
                Integer,
                Integer,
                OptionalInteger,
                Bytes,
            ],
            Self::Records => &[
                Bytes,
                Text,
                Text,
                Text,
                Text,
                Integer,
                Integer,
                Integer,
                OptionalInteger,
            ],
            Self::Revisions => &[Bytes, Integer, Bytes, Bytes, Integer],
            Self::Changes => &[Bytes, Bytes, Integer],
            Self::LastUses => &[Bytes, Integer],
            Self::Clients => &[Bytes, Integer, Bytes, Bytes, Bytes, Integer, Integer],
            Self::ClientUses => &[Bytes, Integer, Integer],
            Self::Requests => &[
                Text,
                Text,
                Bytes,
                Bytes,
                Bytes,
                Bytes,
                Text,
                Text,
                Text,
                Integer,
                Bytes,
                Integer,
                Integer,
                OptionalInteger,
                Integer,
                Bytes,
            ],
        }
    }
}

/// One row as it is stored. A value that the engine could not hand over is absent.
#[derive(Clone, PartialEq, Eq)]
pub struct Row {
    key_columns: usize,
    values: Vec<Option<Value>>,
}

/// Without its values: there are many.
impl fmt::Debug for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Row({} columns)", self.values.len())
    }
}

impl Row {
    pub(super) fn read(table: Table, row: &impl Columns) -> Self {
        let read = |(index, kind): (usize, &Kind)| match kind {
            Kind::Bytes => row.bytes(index).ok().map(Value::from),
            Kind::Text => row.text(index).ok().map(Value::from),
            Kind::Integer => row.integer(index).ok().map(Value::Integer),
            Kind::OptionalInteger => row.optional_integer(index).ok().map(Value::OptionalInteger),
        };
        Self {
            key_columns: table.key_columns(),
            values: table.columns().iter().enumerate().map(read).collect(),
        }
    }

    /// What orders the rows of a table, the same on every engine: bytewise.
    pub(super) fn key(&self) -> &[Option<Value>] {
        &self.values[..self.key_columns]
    }

    fn has_readable_key(&self) -> bool {
        self.key().iter().all(Option::is_some)
    }

    /// Which row it is, for people: its table and its key.
    pub(super) fn place(&self, table: Table) -> String {
        let mut text = table.name().to_owned();
        for value in self.key() {
            text.push(' ');
            match value {
                Some(Value::Bytes(bytes)) => text += &hex::encode(bytes),
                Some(Value::Text(name)) => text += name,
                Some(Value::Integer(number)) => text += &number.to_string(),
                Some(Value::OptionalInteger(_)) | None => text.push('?'),
            }
        }
        text
    }

    /// All values, for writing. An error when one of them could not be read.
    pub(super) fn to_values(&self, table: Table) -> Result<Vec<Value>, Error> {
        let all: Option<Vec<Value>> = self.values.iter().cloned().collect();
        all.ok_or_else(|| Error::Corrupt(format!("a row of {}", table.name())))
    }

    fn value(&self, index: usize) -> Result<&Value, sqlx::Error> {
        let value = self.values.get(index).and_then(Option::as_ref);
        value.ok_or_else(|| sqlx::Error::ColumnIndexOutOfBounds {
            index,
            len: self.values.len(),
        })
    }
}

/// So that a row is decoded by the same code wherever it came from.
impl Columns for Row {
    fn bytes(&self, index: usize) -> Result<&[u8], sqlx::Error> {
        match self.value(index)? {
            Value::Bytes(bytes) => Ok(bytes),
            _ => Err(sqlx::Error::RowNotFound),
        }
    }

    fn text(&self, index: usize) -> Result<&str, sqlx::Error> {
        match self.value(index)? {
            Value::Text(text) => Ok(text),
            _ => Err(sqlx::Error::RowNotFound),
        }
    }

    fn integer(&self, index: usize) -> Result<i64, sqlx::Error> {
        match self.value(index)? {
            Value::Integer(number) => Ok(*number),
            _ => Err(sqlx::Error::RowNotFound),
        }
    }

    fn optional_integer(&self, index: usize) -> Result<Option<i64>, sqlx::Error> {
        match self.value(index)? {
            Value::OptionalInteger(number) => Ok(*number),
            _ => Err(sqlx::Error::RowNotFound),
        }
    }
}

/// A row of the records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// Its identity.
    pub id: RecordId,
    /// Where it lives.
    pub address: KeyAddress,
    /// Whether it can be unwrapped.
    pub state: RecordState,
    /// Current revision.
    pub revision: Revision,
    /// When it was created.
    pub created: Timestamp,
    /// When it last changed.
    pub updated: Timestamp,
    /// When it was deleted; absent while active.
    pub deleted: Option<Timestamp>,
}

impl Head {
    /// Reads a row of [`Table::Records`].
    pub(super) fn decode(row: &Row) -> Result<Self, Error> {
        rows::head(row)
    }

    /// Whether it has been deleted since before then.
    pub fn is_deleted_since(&self, before: Timestamp) -> bool {
        self.state == RecordState::Deleted && self.deleted.is_some_and(|at| at < before)
    }
}

/// A row of the revisions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RevisionRow {
    /// Whose revision it is.
    pub record: RecordId,
    /// Which.
    pub revision: Revision,
    /// As bytes not yet parsed.
    pub envelope: Vec<u8>,
    /// Wrapping key named in the row.
    pub wrapping_key: WrappingKeyId,
    /// When it became current.
    pub created: Timestamp,
}

impl RevisionRow {
    /// Reads a row of [`Table::Revisions`].
    pub(super) fn decode(row: &Row) -> Result<Self, Error> {
        rows::revision(row)
    }
}

/// What the commands that look after a whole database need beside [`Store`].
#[async_trait]
pub trait Tables: Store {
    /// What time it is at the server; nothing for a file.
    async fn clock(&self) -> Result<Option<Timestamp>, Error>;

    /// How many rows a table has.
    async fn count(&self, table: Table) -> Result<u64, Error>;

    /// How many rows of all tables have NULL in a column that they are found by: no page has them, and no call finds them.
    async fn keyless_rows(&self) -> Result<u64, Error>;

    /// The rows after a row, or the first ones, in the order of their keys, without the first `skip` of them; at most
    /// [`PAGE_ROWS`].
    async fn page(&self, table: Table, after: Option<&Row>, skip: u64) -> Result<Vec<Row>, Error>;

    /// Adds rows as they are, all of them or none. [`Error::Exists`] when the place of one is taken.
    async fn insert(&self, table: Table, rows: &[Row]) -> Result<(), Error>;

    /// What is known of a record, by its identity.
    async fn record_by_id(&self, record: RecordId) -> Result<Option<RecordInfo>, Error>;

    /// Removes superseded revisions. Returns those that were removed; one that is current is left alone.
    async fn purge_revisions(
        &self,
        revisions: &[(RecordId, Revision)],
    ) -> Result<Vec<(RecordId, Revision)>, Error>;

    /// Removes records that are still deleted, and were before then, with all of their revisions. Returns those that were
    /// removed.
    async fn purge_records(
        &self,
        records: &[RecordId],
        deleted_before: Timestamp,
    ) -> Result<Vec<RecordId>, Error>;

    /// Gives the database the identity of another one that was copied into it.
    async fn adopt_identity(&self, id: StoreId) -> Result<(), Error>;

    /// Forgets that these calls were committed. Returns how many were known.
    async fn forget_changes(&self, calls: &[CallId]) -> Result<u64, Error>;
}

/// Rows of one table, one after another.
#[derive(Debug)]
pub(super) struct Cursor {
    table: Table,
    page: std::vec::IntoIter<Row>,
    next: Option<Row>,
    /// The last row whose key could be read, and how many rows came after it: the next page begins there.
    last: Option<Row>,
    skip: u64,
    at_end: bool,
}

impl Cursor {
    pub(super) fn new(table: Table) -> Self {
        Self {
            table,
            page: Vec::new().into_iter(),
            next: None,
            last: None,
            skip: 0,
            at_end: false,
        }
    }

    /// The row that [`Self::take`] will give.
    pub(super) async fn peek(&mut self, store: &dyn Tables) -> Result<Option<&Row>, Error> {
        if self.next.is_none() {
            self.next = self.page.next();
        }
        if self.next.is_none() && !self.at_end {
            let page = store
                .page(self.table, self.last.as_ref(), self.skip)
                .await?;
            self.at_end = page.len() < PAGE_ROWS;
            match page.iter().rposition(Row::has_readable_key) {
                Some(at) => {
                    self.last = page.get(at).cloned();
                    self.skip = rows_number(page.len() - 1 - at);
                }
                None => self.skip += rows_number(page.len()),
            }
            self.page = page.into_iter();
            self.next = self.page.next();
        }
        Ok(self.next.as_ref())
    }

    pub(super) async fn take(&mut self, store: &dyn Tables) -> Result<Option<Row>, Error> {
        self.peek(store).await?;
        Ok(self.next.take())
    }
}

fn rows_number(rows: usize) -> u64 {
    u64::try_from(rows).unwrap_or(u64::MAX)
}
