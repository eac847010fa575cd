//! The database as tables, for commands that process all rows. Rows are read in the order of their
//! keys, page by page, so that memory use is bounded and an interrupted job can start again. A row
//! that cannot be decoded is reported instead of skipped.

use std::fmt;

use async_trait::async_trait;

use keybroker_core::{
    call::{CallId, Timestamp},
    key::{RecordId, Revision},
};

use super::{
    Error, MemberKeys, RecordInfo, Store, StoreId,
    columns::{Column, Kind},
    session::{Columns, Value},
};

pub use super::{
    columns::Table,
    rows::{Head, RevisionRow},
};

/// Rows per page.
pub const PAGE_ROWS: usize = 500;

/// One stored row. A value that the driver could not decode is absent.
#[derive(Clone, PartialEq, Eq)]
pub struct Row {
    table: Table,
    /// The values in the order of [`Table::columns`].
    values: Vec<Option<Value>>,
}

/// The output omits the values, because a row has many values.
impl fmt::Debug for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Row({})", self.table.name())
    }
}

impl Row {
    pub(super) fn read(table: Table, row: &impl Columns) -> Self {
        let read = |column: &Column| match column.kind {
            Kind::Bytes => row.bytes(column.name).ok().map(Value::from),
            Kind::Text => row.text(column.name).ok().map(Value::from),
            Kind::Integer => row.integer(column.name).ok().map(Value::Integer),
            Kind::OptionalInteger => {
                let number = row.optional_integer(column.name);
                number.ok().map(Value::OptionalInteger)
            }
        };
        Self {
            table,
            values: table.columns().iter().map(read).collect(),
        }
    }

    /// Creates a row with `values`, which are in the order of [`Table::columns`].
    #[cfg(test)]
    pub(super) fn new(table: Table, values: Vec<Value>) -> Self {
        assert_eq!(values.len(), table.columns().len(), "{}", table.name());
        Self {
            table,
            values: values.into_iter().map(Some).collect(),
        }
    }

    /// The key, which determines the order of the rows of a table. The order is bytewise on every engine.
    pub(super) fn key(&self) -> &[Option<Value>] {
        &self.values[..self.table.key().len()]
    }

    fn has_readable_key(&self) -> bool {
        self.key().iter().all(Option::is_some)
    }

    /// Identifies the row in messages by its table and its key.
    pub(super) fn place(&self) -> String {
        let mut text = self.table.name().to_owned();
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

    /// Returns all values of the row, in order to write the row. Returns an error if a value could
    /// not be read.
    pub(super) fn to_values(&self) -> Result<Vec<Value>, Error> {
        let all: Option<Vec<Value>> = self.values.iter().cloned().collect();
        all.ok_or_else(|| Error::Corrupt(format!("a row of {}", self.table.name()).into()))
    }

    fn value(&self, column: &str) -> Result<&Value, sqlx::Error> {
        let mut columns = self.table.columns().iter().zip(&self.values);
        let value = columns.find(|(known, _)| known.name == column);
        value
            .and_then(|(_, value)| value.as_ref())
            .ok_or_else(|| sqlx::Error::ColumnNotFound(column.to_owned()))
    }
}

/// Allows the same code to decode a row of a query and a row of a page. A value that does not have
/// the requested type is treated as not found.
impl Columns for Row {
    fn bytes(&self, column: &str) -> Result<&[u8], sqlx::Error> {
        match self.value(column)? {
            Value::Bytes(bytes) => Ok(bytes),
            _ => Err(sqlx::Error::ColumnNotFound(column.to_owned())),
        }
    }

    fn text(&self, column: &str) -> Result<&str, sqlx::Error> {
        match self.value(column)? {
            Value::Text(text) => Ok(text),
            _ => Err(sqlx::Error::ColumnNotFound(column.to_owned())),
        }
    }

    fn integer(&self, column: &str) -> Result<i64, sqlx::Error> {
        match self.value(column)? {
            Value::Integer(number) => Ok(*number),
            _ => Err(sqlx::Error::ColumnNotFound(column.to_owned())),
        }
    }

    fn optional_integer(&self, column: &str) -> Result<Option<i64>, sqlx::Error> {
        match self.value(column)? {
            Value::OptionalInteger(number) => Ok(*number),
            _ => Err(sqlx::Error::ColumnNotFound(column.to_owned())),
        }
    }
}

/// Additional operations for commands that process all rows of a database.
#[async_trait]
pub trait Tables: Store + MemberKeys {
    /// Returns the current time of the database server, or `None` for a SQLite file.
    async fn clock(&self) -> Result<Option<Timestamp>, Error>;

    /// Returns the number of rows of a table.
    async fn count(&self, table: Table) -> Result<u64, Error>;

    /// Returns the number of rows, in all tables, that have NULL in a column of the key. Pages and
    /// calls do not find rows with NULL in the key.
    async fn keyless_rows(&self) -> Result<u64, Error>;

    /// Returns at most [`PAGE_ROWS`] rows of a table, in the order of their keys. The page begins
    /// `skip` rows after the row `after`, or `skip` rows after the beginning if `after` is `None`.
    async fn page(&self, table: Table, after: Option<&Row>, skip: u64) -> Result<Vec<Row>, Error>;

    /// Adds all rows unchanged. If an error occurs, no row is added. Returns [`Error::Exists`] if a
    /// new row conflicts with an existing row.
    async fn insert(&self, table: Table, rows: &[Row]) -> Result<(), Error>;

    /// Returns the stored data of the record with the id `record`.
    async fn record_by_id(&self, record: RecordId) -> Result<Option<RecordInfo>, Error>;

    /// Removes superseded revisions, and returns the removed revisions. A current revision is not removed.
    async fn purge_revisions(
        &self,
        revisions: &[(RecordId, Revision)],
    ) -> Result<Vec<(RecordId, Revision)>, Error>;

    /// Removes the records that were deleted before the time `before` and are still deleted, with
    /// all their revisions. Returns the removed records.
    async fn purge_records(
        &self,
        records: &[RecordId],
        deleted_before: Timestamp,
    ) -> Result<Vec<RecordId>, Error>;

    /// Replaces the identity of the database with the identity of another database that was copied
    /// into this database.
    async fn adopt_identity(&self, id: StoreId) -> Result<(), Error>;

    /// Removes the marks of calls, and returns the number of removed marks.
    async fn forget_changes(&self, calls: &[CallId]) -> Result<u64, Error>;
}

/// Reads the rows of one table, one after another.
#[derive(Debug)]
pub(super) struct Cursor {
    table: Table,
    page: std::vec::IntoIter<Row>,
    next: Option<Row>,
    /// The last row with a readable key; `skip` is the number of rows that were read after this
    /// row. The next page begins after the last row that was read.
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

    /// Returns the row that [`Self::take`] will return next.
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
