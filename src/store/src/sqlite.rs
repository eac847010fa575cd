//! SQLite, the embedded default database. Only one broker instance can use a SQLite database.
//!
//! One connection writes, and several connections read. The database uses WAL with `synchronous =
//! FULL`, so that an acknowledged commit survives a power loss. With `synchronous = NORMAL`, the
//! last commits may be lost.

use std::{
    io,
    path::Path,
    sync::{Arc, LazyLock},
    time::Duration,
};

use sqlx::{
    ConnectOptions as _, Sqlite, SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};

use super::{
    Error, Settings,
    dialect::{Dialect, LimitedDelete, Placeholder, Upsert},
    durability::{self, Found},
    engine::{Engine, EngineStore, Purpose},
    schema::Accepted,
    session::Session as _,
    statements::Statements,
    tables::Tables,
};

pub(super) mod file;
mod place;

/// A transaction takes the write lock when it begins. A transaction that takes the lock only after
/// a read fails if another transaction wrote in between. Because of the write lock, no transaction
/// has to lock single rows.
const DIALECT: Dialect = Dialect {
    placeholder: Placeholder::Question,
    // If a name in double quotes is not the name of a column, SQLite treats the name as a string.
    quote: '`',
    begin: "BEGIN IMMEDIATE",
    lock: None,
    unless_taken: " ON CONFLICT DO NOTHING",
    upsert: Upsert::Conflict,
    limited_delete: LimitedDelete::Subquery,
    clock: None,
    has_migrations: "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = '_sqlx_migrations'",
    durability: "SELECT 'synchronous' AS name, CAST(synchronous AS TEXT) AS value FROM pragma_synchronous",
    durability_columns: ["name", "value"],
};

static SQL: LazyLock<Statements> = LazyLock::new(|| Statements::of_engine(&DIALECT));

const READERS: u32 = 4;
/// Longest time for which a call waits for a connection. The limit is shorter than most deadlines,
/// so that callers receive the reason for the wait.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(4);
const BUSY_TIMEOUT: Duration = Duration::from_secs(2);
/// This limit is far longer than the duration of any disk operation. A shorter limit is
/// unnecessary, because a file has no server that could be unavailable.
const TIME_LIMIT: Duration = Duration::from_mins(1);

/// A SQLite database file.
#[derive(Debug)]
struct SqliteFile {
    writer: SqlitePool,
    reader: SqlitePool,
    /// A connection that no caller uses. While this connection is open, SQLite does not remove or
    /// create the WAL.
    keeper: SqlitePool,
    place: Arc<place::Place>,
}

fn options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(BUSY_TIMEOUT)
        .foreign_keys(true)
        .pragma("trusted_schema", "OFF")
        .create_if_missing(false)
        // By default, the driver logs the complete statement on every call.
        .disable_statement_logging()
}

/// The pool for the only connection that writes. The connection stays open, because every new
/// connection checks the WAL.
fn writer(path: &Path) -> SqlitePool {
    SqlitePoolOptions::new()
        .max_connections(1)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .idle_timeout(None)
        .max_lifetime(None)
        .test_before_acquire(false)
        .connect_lazy_with(options(path))
}

/// The connections that read. A new connection is refused if it has not opened the same file as the
/// first connection.
fn reader(path: &Path, place: Arc<place::Place>) -> SqlitePool {
    SqlitePoolOptions::new()
        .max_connections(READERS)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .idle_timeout(None)
        .max_lifetime(None)
        .test_before_acquire(false)
        .after_connect(move |_, _| {
            let found = place.check();
            Box::pin(async move { found.map_err(|error| sqlx::Error::Io(io::Error::other(error))) })
        })
        .connect_lazy_with(options(path).read_only(true))
}

/// Opens a database, and refuses a schema that the caller does not accept.
pub(super) async fn open(
    path: &Path,
    settings: &Settings,
    accepted: Accepted,
) -> Result<Arc<dyn Tables>, Error> {
    file::check(path)?;
    let keeper = writer(path);
    file::require(accepted, &keeper).await?;
    let place = Arc::new(place::Place::of(path)?);
    let writer = writer(path);
    let mut connection = writer.acquire().await?;
    let rows = connection.rows(SQL.durability, Vec::new()).await?;
    drop(connection);
    let weaknesses = Found::read(&rows, DIALECT.durability_columns)?.sqlite();
    durability::require_accepted(&weaknesses, &settings.accept_weaker_durability)?;
    durability::announce(&weaknesses);
    let reader = reader(path, Arc::clone(&place));
    // Check that this connection opened the same file as the first connection.
    place.check()?;
    Ok(EngineStore::new(SqliteFile {
        writer,
        reader,
        keeper,
        place,
    }))
}

impl Engine for SqliteFile {
    type Database = Sqlite;

    fn sql() -> &'static Statements {
        &SQL
    }

    fn pool(&self, purpose: Purpose) -> &SqlitePool {
        match purpose {
            Purpose::Read => &self.reader,
            Purpose::Write => &self.writer,
        }
    }

    fn time_limit(&self) -> Duration {
        TIME_LIMIT
    }

    fn check_place(&self, purpose: Purpose) -> Result<(), Error> {
        match purpose {
            Purpose::Read => self.place.check_recent(),
            Purpose::Write => self.place.check(),
        }
    }

    async fn close(&self) {
        self.reader.close().await;
        self.writer.close().await;
        // SQLite writes the WAL into the database file when the last connection closes.
        self.keeper.close().await;
    }
}
