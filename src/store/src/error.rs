//! Where the store's errors come from and what they become.

use std::{sync::Arc, time::Duration};

use sqlx::{
    error::{DatabaseError, ErrorKind},
    mysql::MySqlDatabaseError,
    postgres::PgDatabaseError,
    sqlite::SqliteError,
};

use keybroker_core::{
    error::{self, Reason},
    key::Revision,
};

/// How long a caller should wait for a store that is unavailable.
const STORE_RETRY: Duration = Duration::from_secs(1);

/// SQLite's primary result codes for a file that is damaged (`SQLITE_CORRUPT`), and for one that is something else.
const SQLITE_DAMAGED: i64 = 11;
const SQLITE_NOTADB: i64 = 26;
/// `SQLITE_READONLY`, `SQLITE_IOERR`, `SQLITE_FULL`, `SQLITE_CANTOPEN`: worth a hint.
const SQLITE_READONLY: i64 = 8;
const SQLITE_IOERR: i64 = 10;
const SQLITE_FULL: i64 = 13;
const SQLITE_CANTOPEN: i64 = 14;
/// The low byte of an extended result code is the primary one.
const PRIMARY_CODE: i64 = 0xff;

/// MySQL's `ER_NOT_KEYFILE`, `ER_OLD_KEYFILE`, `ER_CRASHED_ON_USAGE`, `ER_CRASHED_ON_REPAIR`, `ER_INDEX_CORRUPT`.
const MYSQL_DAMAGED: [u16; 5] = [1_034, 1_035, 1_194, 1_195, 1_712];
/// `ER_LOCK_WAIT_TIMEOUT`, `ER_LOCK_DEADLOCK`.
const MYSQL_CONTENDED: [u16; 2] = [1_205, 1_213];
/// `ER_OPTION_PREVENTS_STATEMENT`, `ER_CANT_EXECUTE_IN_READ_ONLY_TRANSACTION`, `ER_READ_ONLY_MODE`.
const MYSQL_READONLY: [u16; 3] = [1_290, 1_792, 1_836];
/// `ER_SERVER_SHUTDOWN`, `ER_CONNECTION_KILLED` of MariaDB, `ER_CLIENT_INTERACTION_TIMEOUT`.
const MYSQL_DISCONNECTED: [u16; 3] = [1_053, 1_927, 4_031];
/// `ER_DISK_FULL`, `ER_RECORD_FILE_FULL`.
const MYSQL_FULL: [u16; 2] = [1_021, 1_114];

const READONLY_SERVER: &str =
    "this server is a standby or was set to read only; name the primary in `store.url`";
/// Also what is said of a pooler that was recognised by its behaviour.
pub(super) const POOLER_REMEDY: &str = "there is a pooler in front of PostgreSQL that gives one session to several clients; set \
                                        `pool_mode = session` for this database in PgBouncer, or name the server itself in \
                                        `store.url`";
const FULL_SERVER: &str = "free the database server's disk";

/// Class of a store failure.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The address or the id is taken.
    #[error("exists already")]
    Exists,
    /// There is no such record.
    #[error("not found")]
    NotFound,
    /// The current revision is another one.
    #[error("the current revision is {current}")]
    Revision {
        /// What it is.
        current: Revision,
    },
    /// The record is deleted, or for undelete is active.
    #[error("the record's state forbids this")]
    State,
    /// The registry row or the API client is not what it was read as.
    #[error("the row changed meanwhile")]
    Conflict,
    /// The request id was used meanwhile, by a concurrent call.
    #[error("the request id is in use")]
    RequestIdTaken,
    /// A row does not decode. Names table and column, never bytes.
    #[error("the database holds damaged data: {0}")]
    Corrupt(String),
    /// The schema is older or newer than this binary.
    #[error("{0}")]
    Schema(String),
    /// The database may lose what it acknowledges.
    #[error("{0}")]
    Durability(String),
    /// Another transaction won; this one was undone and may be tried again.
    #[error("the database is busy: {0}")]
    Contended(Arc<str>),
    /// Another process has the database.
    #[error("{0}")]
    InUse(String),
    /// The connection was lost while a change was committed, and the database could not be asked whether it was made.
    #[error("the outcome of the change is not known: {0}")]
    OutcomeUnknown(Arc<str>),
    /// The connection was lost or refused, so the same may succeed on another one. Becomes [`Self::Down`] before it leaves the
    /// store.
    #[error("connection lost: {0}")]
    Disconnected(Arc<str>),
    /// All connections are in use by calls that get their answers: the database works, and has more to do than it can.
    #[error("the database is busy: {0}")]
    Busy(Arc<str>),
    /// The database is unavailable, full, read-only or slow.
    #[error("store unavailable: {0}")]
    Down(Arc<str>),
}

impl Error {
    /// The same for callers, who do not try again on another connection.
    pub(super) fn settled(self) -> Self {
        match self {
            Self::Disconnected(what) => Self::Down(what),
            error => error,
        }
    }
}

impl From<Error> for error::Error {
    fn from(error: Error) -> Self {
        let detail = error.to_string();
        let reason = match error {
            Error::Exists => Reason::KeyExists,
            Error::NotFound => Reason::KeyNotFound,
            Error::Revision { .. } => Reason::Revision,
            Error::State => Reason::KeyState,
            // A concurrent call holds the same request id: the retry will find its result.
            Error::Conflict | Error::RequestIdTaken => Reason::Revision,
            Error::Corrupt(_) => Reason::RecordDamaged,
            Error::Busy(_) => {
                return Self::new(Reason::QueueFull, detail).retry_after(STORE_RETRY);
            }
            Error::OutcomeUnknown(_) => {
                return Self::new(Reason::StoreDown, detail)
                    .retry_after(STORE_RETRY)
                    .outcome_unknown();
            }
            Error::Schema(_)
            | Error::Durability(_)
            | Error::Contended(_)
            | Error::InUse(_)
            | Error::Disconnected(_)
            | Error::Down(_) => {
                return Self::new(Reason::StoreDown, detail).retry_after(STORE_RETRY);
            }
        };
        Self::new(reason, detail)
    }
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        match &error {
            sqlx::Error::ColumnDecode { index, .. } => Self::Corrupt(format!("column {index}")),
            sqlx::Error::Database(database) => from_database(&**database),
            // Only while a store is opened, when no connection is in use; later the lease tells a full pool from an outage.
            sqlx::Error::PoolTimedOut => {
                Self::Disconnected("no connection in time: the database does not accept any".into())
            }
            sqlx::Error::Io(_) => Self::Disconnected(error.to_string().into()),
            _ => Self::Down(error.to_string().into()),
        }
    }
}

/// Each engine has its own numbers, and the same number means something else on another.
fn from_database(database: &(dyn DatabaseError + 'static)) -> Error {
    // No call breaks a constraint of its own, so the rows that it met are not as they were left: to try again is no help.
    if !matches!(database.kind(), ErrorKind::Other) {
        return Error::Corrupt(format!(
            "rows that contradict each other: {database}; compare with a backup"
        ));
    }
    if let Some(error) = database.try_downcast_ref::<PgDatabaseError>() {
        from_postgres(error)
    } else if let Some(error) = database.try_downcast_ref::<MySqlDatabaseError>() {
        from_mysql(error)
    } else if let Some(error) = database.try_downcast_ref::<SqliteError>() {
        from_sqlite(error)
    } else {
        Error::Down(database.to_string().into())
    }
}

fn from_sqlite(error: &SqliteError) -> Error {
    let code = error.code().and_then(|code| code.parse::<i64>().ok());
    match code.map(|code| code & PRIMARY_CODE) {
        Some(SQLITE_DAMAGED) => {
            Error::Corrupt(format!(
                "the file is damaged (SQLite: {error}); restore a backup, as \"Restore\" in docs/operations.md says"
            ))
        }
        Some(SQLITE_NOTADB) => Error::Schema(
            "the file of the database is no SQLite database; name another file in `store.url`, or restore a backup if it was \
             overwritten"
                .to_owned(),
        ),
        Some(SQLITE_CANTOPEN) => down(
            error,
            "this user must be able to write to the directory of the database, because SQLite makes files of its own there, also \
             to read; is the file system mounted read-only?",
        ),
        Some(SQLITE_READONLY) => down(error, "check owner and mode of the file and its directory"),
        Some(SQLITE_FULL) => down(error, "free space on the file system of the database"),
        Some(SQLITE_IOERR) => down(
            error,
            "free space on the file system of the database if it is full, because SQLite needs some also to read; otherwise look for \
             errors of the disk in the kernel's log",
        ),
        _ => Error::Down(error.to_string().into()),
    }
}

fn from_postgres(error: &PgDatabaseError) -> Error {
    match error.code() {
        // serialization_failure, deadlock_detected, lock_not_available
        "40001" | "40P01" | "55P03" => Error::Contended(error.to_string().into()),
        // data_corrupted, index_corrupted
        "XX001" | "XX002" => {
            Error::Corrupt(format!("the server reports: {error}; restore a backup"))
        }
        // read_only_sql_transaction
        "25006" => down(error, READONLY_SERVER),
        // disk_full
        "53100" => down(error, FULL_SERVER),
        // admin_shutdown, crash_shutdown, cannot_connect_now, and connection exceptions
        "57P01" | "57P02" | "57P03" => Error::Disconnected(error.to_string().into()),
        // Of PgBouncer: "transaction blocks not allowed in statement pooling mode".
        "08P01" if error.message().contains("pooling mode") => down(error, POOLER_REMEDY),
        code if code.starts_with("08") => Error::Disconnected(error.to_string().into()),
        // invalid_sql_statement_name, duplicate_prepared_statement: the session is not the one that prepared the statement
        "26000" | "42P05" => down(error, POOLER_REMEDY),
        _ => Error::Down(error.to_string().into()),
    }
}

fn from_mysql(error: &MySqlDatabaseError) -> Error {
    let number = error.number();
    if MYSQL_CONTENDED.contains(&number) {
        Error::Contended(error.to_string().into())
    } else if MYSQL_DAMAGED.contains(&number) {
        Error::Corrupt(format!("the server reports: {error}; restore a backup"))
    } else if MYSQL_READONLY.contains(&number) {
        down(error, READONLY_SERVER)
    } else if MYSQL_DISCONNECTED.contains(&number) {
        Error::Disconnected(error.to_string().into())
    } else if MYSQL_FULL.contains(&number) {
        down(error, FULL_SERVER)
    } else {
        Error::Down(error.to_string().into())
    }
}

fn down(error: &dyn DatabaseError, remedy: &str) -> Error {
    Error::Down(format!("{error}; {remedy}").into())
}
