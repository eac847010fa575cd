//! A connection that reads on the calling thread.
//!
//! The driver has a thread for each connection. For a row that is in memory, the switch to this thread and back costs several
//! times as much as the read. Therefore single records are read by the thread that needs them.
//!
//! A thread of the async runtime that waits for a disk runs no other call meanwhile. Therefore there is only one such connection,
//! and it is used only if the runtime has another thread. While a read takes long, all other reads use the driver's connections.
//! After such a read, they do so for ten times as long as it took, so that the runtime waits for the disk during less than a tenth
//! of one thread's time.
//!
//! After every problem, the caller repeats the read with the driver, which classifies errors.

use std::{
    path::Path,
    sync::Mutex,
    time::{Duration, Instant},
};

use rusqlite::{
    CachedStatement, Connection, OpenFlags, Row, ToSql, params_from_iter,
    types::{ToSqlOutput, ValueRef},
};
use tokio::runtime::Handle;

use crate::{
    Error,
    engine::NoDirectRead,
    session::{Columns, Value},
    slow,
};

/// A read that takes longer than this time was waiting for the disk, or for a processor.
const SLOW: Duration = Duration::from_millis(1);
/// How long the connection is not used after a slow read, as a multiple of the read.
const PAUSE_FACTOR: u32 = 10;
/// How long the connection is not used after a failed read, and at most after a slow read.
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// The connection, or nothing if it could not be opened.
#[derive(Debug)]
pub(super) struct Direct(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    connection: Option<Connection>,
    /// The connection is not used before this time.
    paused_until: Option<Instant>,
}

impl Direct {
    /// Opens the connection to an existing database.
    pub(super) fn open(path: &Path) -> Self {
        let connection = connect(path)
            .inspect_err(|error| {
                tracing::debug!(%error, "all reads use the connections of the driver");
            })
            .ok();
        Self(Mutex::new(State {
            connection,
            paused_until: None,
        }))
    }

    /// Decodes the first row of a query. Fails if this connection must not be used now, if the query fails, or if the row is not
    /// as expected.
    pub(super) fn first<T>(
        &self,
        statement: &'static str,
        values: &[Value],
        decode: impl FnOnce(&Row<'_>) -> Result<T, Error>,
    ) -> Result<Option<T>, NoDirectRead> {
        if !has_other_threads() {
            return Err(NoDirectRead);
        }
        let mut state = self.0.try_lock().map_err(|_| NoDirectRead)?;
        let begun = Instant::now();
        if state.paused_until.is_some_and(|until| begun < until) {
            return Err(NoDirectRead);
        }
        let connection = state.connection.as_ref().ok_or(NoDirectRead)?;
        let found = first(connection, statement, values, decode);
        let took = begun.elapsed();
        slow::note(statement, took);
        if matches!(found, Err(Problem::Query(_))) {
            state.paused_until = Some(begun + PAUSE_MAX);
        } else if took > SLOW {
            state.paused_until = Some(begun + took + (took * PAUSE_FACTOR).min(PAUSE_MAX));
        }
        found.map_err(|error| {
            tracing::debug!(%error, "a direct read of the database failed");
            NoDirectRead
        })
    }

    /// Closes the connection. A running read ends first.
    pub(super) fn close(&self) {
        if let Ok(mut state) = self.0.lock() {
            drop(state.connection.take());
        }
    }
}

/// Whether the runtime of this thread has other threads that run calls while this one waits.
fn has_other_threads() -> bool {
    Handle::try_current().is_ok_and(|runtime| runtime.metrics().num_workers() > 1)
}

fn connect(path: &Path) -> rusqlite::Result<Connection> {
    // A mutex of this crate protects the connection.
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    // Waiting for a lock is for the driver's connections.
    connection.busy_timeout(Duration::ZERO)?;
    connection.pragma_update(None, "trusted_schema", "OFF")?;
    connection.query_row("SELECT count(*) FROM sqlite_master", [], |_| Ok(()))?;
    Ok(connection)
}

#[derive(Debug, thiserror::Error)]
enum Problem {
    #[error(transparent)]
    Query(#[from] rusqlite::Error),
    #[error(transparent)]
    Row(Error),
}

fn first<T>(
    connection: &Connection,
    statement: &'static str,
    values: &[Value],
    decode: impl FnOnce(&Row<'_>) -> Result<T, Error>,
) -> Result<Option<T>, Problem> {
    let mut statement: CachedStatement<'_> = connection.prepare_cached(statement)?;
    let mut rows = statement.query(params_from_iter(values))?;
    let row = rows.next()?;
    row.map(decode).transpose().map_err(Problem::Row)
}

impl ToSql for Value {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(match self {
            Self::Bytes(bytes) => ValueRef::Blob(bytes),
            Self::Text(text) => ValueRef::Text(text.as_bytes()),
            Self::Integer(number) => ValueRef::Integer(*number),
            Self::OptionalInteger(number) => number.map_or(ValueRef::Null, ValueRef::Integer),
        }))
    }
}

/// Accepts only values of the type that the store writes. For all others, the driver decides.
impl Columns for Row<'_> {
    fn bytes(&self, column: &str) -> Result<&[u8], sqlx::Error> {
        match self.get_ref(column) {
            Ok(ValueRef::Blob(bytes)) => Ok(bytes),
            found => Err(unexpected(column, &found)),
        }
    }

    fn text(&self, column: &str) -> Result<&str, sqlx::Error> {
        let found = self.get_ref(column);
        let text = found.as_ref().ok().and_then(|found| found.as_str().ok());
        text.ok_or_else(|| unexpected(column, &found))
    }

    fn integer(&self, column: &str) -> Result<i64, sqlx::Error> {
        match self.get_ref(column) {
            Ok(ValueRef::Integer(number)) => Ok(number),
            found => Err(unexpected(column, &found)),
        }
    }

    fn optional_integer(&self, column: &str) -> Result<Option<i64>, sqlx::Error> {
        match self.get_ref(column) {
            Ok(ValueRef::Null) => Ok(None),
            _ => self.integer(column).map(Some),
        }
    }
}

/// The content of the column is not part of the error.
fn unexpected(column: &str, found: &rusqlite::Result<ValueRef<'_>>) -> sqlx::Error {
    let source = match found {
        Ok(value) => format!("unexpected type {}", value.data_type()),
        Err(error) => error.to_string(),
    };
    sqlx::Error::ColumnDecode {
        index: column.to_owned(),
        source: source.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BY_NAME: &str = "SELECT name, bytes, number, absent FROM things WHERE name = ?";

    /// A database with one row.
    fn database() -> (tempfile::TempDir, Direct) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("test.db");
        let connection = Connection::open(&path).unwrap();
        connection
            .execute_batch(
                "PRAGMA journal_mode = WAL;
                 CREATE TABLE things (name TEXT, bytes BLOB, number INTEGER, absent INTEGER);
                 INSERT INTO things VALUES ('one', x'0102', 3, NULL)",
            )
            .unwrap();
        (folder, Direct::open(&path))
    }

    type Thing = (String, Vec<u8>, i64, Option<i64>);

    fn thing(row: &Row<'_>) -> Result<Thing, Error> {
        Ok((
            row.text("name")?.to_owned(),
            row.bytes("bytes")?.to_vec(),
            row.integer("number")?,
            row.optional_integer("absent")?,
        ))
    }

    fn read(direct: &Direct, name: &str) -> Result<Option<Thing>, NoDirectRead> {
        direct.first(BY_NAME, &[name.into()], thing)
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_row_is_read_on_the_calling_thread() {
        let (_folder, direct) = database();
        let expected = ("one".to_owned(), vec![1, 2], 3, None);
        assert_eq!(read(&direct, "one"), Ok(Some(expected)));
        assert_eq!(read(&direct, "two"), Ok(None));
        direct.close();
        assert_eq!(read(&direct, "one"), Err(NoDirectRead));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn the_only_thread_of_a_runtime_does_not_read() {
        let (_folder, direct) = database();
        assert_eq!(read(&direct, "one"), Err(NoDirectRead));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn at_most_one_thread_reads() {
        let (_folder, direct) = database();
        let nested = direct.first(BY_NAME, &["one".into()], |_| Ok(read(&direct, "one")));
        assert_eq!(nested, Ok(Some(Err(NoDirectRead))));
        assert!(read(&direct, "one").is_ok());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn after_a_slow_or_failed_read_the_connection_pauses() {
        let (_folder, direct) = database();
        let begun = Instant::now();
        let slow = direct.first(BY_NAME, &["one".into()], |_| {
            std::thread::sleep(PAUSE_MAX / 100);
            Ok(())
        });
        assert_eq!(slow, Ok(Some(())));
        let mut state = direct.0.lock().unwrap();
        assert!(state.paused_until.unwrap() >= begun + PAUSE_MAX / 10);
        state.paused_until = Some(Instant::now() + PAUSE_MAX);
        drop(state);
        assert_eq!(read(&direct, "one"), Err(NoDirectRead));

        let (_folder, direct) = database();
        assert_eq!(direct.first("SELECT", &[], thing), Err(NoDirectRead));
        assert_eq!(read(&direct, "one"), Err(NoDirectRead));
        direct.0.lock().unwrap().paused_until = None;
        assert!(read(&direct, "one").is_ok());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_value_of_another_type_is_left_to_the_driver() {
        let (_folder, direct) = database();
        let text = |row: &Row<'_>| Ok(row.text("bytes")?.to_owned());
        let integer = |row: &Row<'_>| Ok(row.integer("name")?);
        let bytes = |row: &Row<'_>| Ok(row.bytes("name")?.to_vec());
        assert_eq!(
            direct.first(BY_NAME, &["one".into()], text),
            Err(NoDirectRead)
        );
        assert_eq!(
            direct.first(BY_NAME, &["one".into()], integer),
            Err(NoDirectRead)
        );
        assert_eq!(
            direct.first(BY_NAME, &["one".into()], bytes),
            Err(NoDirectRead)
        );
        assert!(read(&direct, "one").is_ok());
    }

    #[test]
    fn a_database_that_cannot_be_opened_is_left_to_the_driver() {
        let folder = tempfile::tempdir().unwrap();
        let direct = Direct::open(&folder.path().join("missing.db"));
        assert!(direct.0.lock().unwrap().connection.is_none());
    }
}
