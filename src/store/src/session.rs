//! One connection of any engine: statements with their values, and rows that are read by the names
//! of their columns. The drivers of all engines support statements and named columns, but do not
//! have a common trait for statements and rows.

use std::{fmt, time::Instant};

use sqlx::{
    MySqlConnection, PgConnection, Row as _, SqliteConnection, mysql::MySqlRow, postgres::PgRow,
    sqlite::SqliteRow,
};

use keybroker_core::{
    call::{CallId, RequestId, Timestamp},
    envelope::Mac,
    key::{AccessRequestId, ApprovalId, ClientId, DeviceId, RecordId, Revision, WrappingKeyId},
    organization::Guid,
};

use super::{StoreId, slow};

/// A value for a statement. A value is owned, because a statement can run longer than its caller
/// waits.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Value {
    Bytes(Vec<u8>),
    Text(String),
    Integer(i64),
    OptionalInteger(Option<i64>),
}

/// The output omits the content, because envelopes and names must not be logged.
impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Value")
    }
}

/// A connection that runs statements. The placeholders in a statement have the syntax of the
/// engine. Values are in the order of the statement's placeholders.
pub(super) trait Session: Send {
    type Row: Columns + Send + 'static;

    /// Runs a statement and returns the number of matching rows, including rows that already had the new values.
    fn execute(
        &mut self,
        statement: &'static str,
        values: Vec<Value>,
    ) -> impl Future<Output = Result<u64, sqlx::Error>> + Send;

    /// Runs a query.
    fn rows(
        &mut self,
        statement: &'static str,
        values: Vec<Value>,
    ) -> impl Future<Output = Result<Vec<Self::Row>, sqlx::Error>> + Send;

    /// Runs a statement such as `BEGIN`, which has no values and cannot be prepared on every engine.
    fn control(
        &mut self,
        statement: &'static str,
    ) -> impl Future<Output = Result<(), sqlx::Error>> + Send;
}

/// A row, read by the names of its columns.
pub(super) trait Columns {
    fn bytes(&self, column: &str) -> Result<&[u8], sqlx::Error>;
    fn text(&self, column: &str) -> Result<&str, sqlx::Error>;
    fn integer(&self, column: &str) -> Result<i64, sqlx::Error>;
    fn optional_integer(&self, column: &str) -> Result<Option<i64>, sqlx::Error>;
}

/// Converts bytes to a string. On MySQL, strings are stored as bytes, because MySQL's text types
/// have no collation that compares bytewise on every server.
fn utf8<'r>(column: &str, bytes: &'r [u8]) -> Result<&'r str, sqlx::Error> {
    std::str::from_utf8(bytes).map_err(|error| sqlx::Error::ColumnDecode {
        index: column.to_owned(),
        source: error.into(),
    })
}

async fn timed<T>(statement: &'static str, work: impl Future<Output = T>) -> T {
    let begun = Instant::now();
    let done = work.await;
    slow::note(statement, begun.elapsed());
    done
}

/// Implements `Session` and `Columns` for an engine. `$bound` converts the string `$text` for
/// sending, and `$read` reads a string from the column `$column` of the row `$self`.
macro_rules! engine {
    ($connection:ty, $row:ty, $text:ident => $bound:expr, $self:ident, $column:ident => $read:expr) => {
        impl Session for $connection {
            type Row = $row;

            async fn execute(
                &mut self,
                statement: &'static str,
                values: Vec<Value>,
            ) -> Result<u64, sqlx::Error> {
                let query = engine!(bind statement, values, $text => $bound);
                let done = timed(statement, query.execute(self)).await;
                Ok(done?.rows_affected())
            }

            async fn rows(
                &mut self,
                statement: &'static str,
                values: Vec<Value>,
            ) -> Result<Vec<$row>, sqlx::Error> {
                let query = engine!(bind statement, values, $text => $bound);
                timed(statement, query.fetch_all(self)).await
            }

            async fn control(&mut self, statement: &'static str) -> Result<(), sqlx::Error> {
                let done = timed(statement, sqlx::raw_sql(statement).execute(self)).await;
                done.map(drop)
            }
        }

        impl Columns for $row {
            fn bytes(&self, column: &str) -> Result<&[u8], sqlx::Error> {
                self.try_get(column)
            }

            fn text(&$self, $column: &str) -> Result<&str, sqlx::Error> {
                $read
            }

            fn integer(&self, column: &str) -> Result<i64, sqlx::Error> {
                self.try_get(column)
            }

            fn optional_integer(&self, column: &str) -> Result<Option<i64>, sqlx::Error> {
                self.try_get(column)
            }
        }
    };
    (bind $statement:expr, $values:expr, $text:ident => $bound:expr) => {{
        let mut query = sqlx::query($statement);
        for value in $values {
            query = match value {
                Value::Bytes(bytes) => query.bind(bytes),
                Value::Text($text) => query.bind($bound),
                Value::Integer(number) => query.bind(number),
                Value::OptionalInteger(number) => query.bind(number),
            };
        }
        query
    }};
}

engine!(SqliteConnection, SqliteRow, text => text, self, column => self.try_get(column));
engine!(PgConnection, PgRow, text => text, self, column => self.try_get(column));
engine!(MySqlConnection, MySqlRow, text => text.into_bytes(),
        self, column => utf8(column, self.try_get(column)?));

impl From<&[u8]> for Value {
    fn from(bytes: &[u8]) -> Self {
        Self::Bytes(bytes.to_vec())
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<i64> for Value {
    fn from(number: i64) -> Self {
        Self::Integer(number)
    }
}

impl From<u32> for Value {
    fn from(number: u32) -> Self {
        Self::Integer(number.into())
    }
}

/// All numbers that the program stores are far below 2^63.
impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Self::Integer(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

impl From<Revision> for Value {
    fn from(revision: Revision) -> Self {
        revision.get().into()
    }
}

impl From<Timestamp> for Value {
    fn from(at: Timestamp) -> Self {
        Self::Integer(at.micros())
    }
}

impl From<Option<Timestamp>> for Value {
    fn from(at: Option<Timestamp>) -> Self {
        Self::OptionalInteger(at.map(Timestamp::micros))
    }
}

impl From<&Mac> for Value {
    fn from(mac: &Mac) -> Self {
        mac.as_slice().into()
    }
}

macro_rules! by_its_bytes {
    ($($id:ty),*) => {$(
        impl From<$id> for Value {
            fn from(id: $id) -> Self {
                id.as_bytes().as_slice().into()
            }
        }
    )*};
}
by_its_bytes!(
    AccessRequestId,
    ApprovalId,
    DeviceId,
    Guid,
    RecordId,
    ClientId,
    WrappingKeyId,
    CallId,
    RequestId,
    StoreId
);
