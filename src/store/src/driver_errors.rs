//! The meaning of the drivers' errors. Each engine has a separate table, because the same error
//! code has different meanings on different engines.

use sqlx::{
    error::{DatabaseError, ErrorKind},
    mysql::MySqlDatabaseError,
    postgres::PgDatabaseError,
    sqlite::SqliteError,
};

use super::{
    Error,
    error::{Detail, SharedSession},
};

const READONLY_SERVER: &str =
    "this server is a standby or was set to read only; set `store.url` to the primary";
const FULL_SERVER: &str = "free the database server's disk";
/// The remedy for a pooler that shares one session between several clients.
pub(super) const POOLER_REMEDY: &str = "set `pool_mode = session` for this database in PgBouncer, or give the server itself in \
                                        `store.url`";

/// SQLite's primary result codes for a damaged file (`SQLITE_CORRUPT`), and for a file that is not a database.
const SQLITE_DAMAGED: i64 = 11;
const SQLITE_NOTADB: i64 = 26;
/// `SQLITE_READONLY`, `SQLITE_IOERR`, `SQLITE_FULL`, `SQLITE_CANTOPEN`.
const SQLITE_READONLY: i64 = 8;
const SQLITE_IOERR: i64 = 10;
const SQLITE_FULL: i64 = 13;
const SQLITE_CANTOPEN: i64 = 14;
/// In SQLite, the low byte of an extended result code is the primary result code.
const PRIMARY_CODE: i64 = 0xff;

/// The meaning of an error of a driver.
enum Meaning {
    /// Rows contradict each other.
    Contradiction,
    /// The file is damaged.
    FileDamaged,
    /// The server reports that its files are damaged.
    ServerDamaged,
    /// The file is not a database.
    NotDatabase,
    /// The statement conflicts with another transaction.
    Contended,
    /// Another connection may succeed.
    Disconnected,
    /// The statement was prepared in another session.
    SharedSession,
    /// The database cannot be read or written. The value is the remedy, or `None` if no remedy is
    /// known.
    Down(Option<&'static str>),
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        let meaning = match &error {
            sqlx::Error::ColumnDecode { index, .. } => {
                return Self::Corrupt(Detail::caused(format!("column {index}"), error));
            }
            // The pool times out only while a store is opened, when no connection is in use. After
            // the store was opened, the code that lends connections distinguishes a full pool from
            // an outage.
            sqlx::Error::PoolTimedOut => {
                return Self::Disconnected(
                    "no connection in time: the database does not accept connections".into(),
                );
            }
            other => meaning(other),
        };
        match meaning {
            Meaning::Contradiction => Self::Corrupt(
                Detail::caused("the database contains rows that contradict each other", error)
                    .remedy("compare with a backup"),
            ),
            Meaning::FileDamaged => Self::Corrupt(
                Detail::caused("the SQLite file is damaged", error)
                    .remedy("restore a backup: see \"Restore\" in docs/operations.md"),
            ),
            Meaning::ServerDamaged => Self::Corrupt(
                Detail::caused("the server reports", error).remedy("restore a backup"),
            ),
            Meaning::NotDatabase => Self::Schema(
                Detail::caused("the file of the database is not a SQLite database", error).remedy(
                    "set `store.url` to another file, or restore a backup if the database file was overwritten",
                ),
            ),
            Meaning::Contended => Self::Contended(Detail::of(error)),
            Meaning::Disconnected => Self::Disconnected(Detail::of(error)),
            Meaning::SharedSession => {
                let source = Some(error);
                Self::Down(Detail::of(SharedSession { source }).remedy(POOLER_REMEDY))
            }
            Meaning::Down(None) => Self::Down(Detail::of(error)),
            Meaning::Down(Some(remedy)) => Self::Down(Detail::of(error).remedy(remedy)),
        }
    }
}

/// Whether the error means that rows or files of the database are damaged.
pub(super) fn is_damage(error: &sqlx::Error) -> bool {
    matches!(
        meaning(error),
        Meaning::Contradiction | Meaning::FileDamaged | Meaning::ServerDamaged
    )
}

fn meaning(error: &sqlx::Error) -> Meaning {
    match error {
        sqlx::Error::Database(database) => of_database(&**database),
        sqlx::Error::Io(_) => Meaning::Disconnected,
        _ => Meaning::Down(None),
    }
}

fn of_database(error: &(dyn DatabaseError + 'static)) -> Meaning {
    // The statements of the store never violate a constraint, so another program changed the rows, and a retry does not help.
    if !matches!(error.kind(), ErrorKind::Other) {
        return Meaning::Contradiction;
    }
    if let Some(error) = error.try_downcast_ref::<PgDatabaseError>() {
        of_postgres(error)
    } else if let Some(error) = error.try_downcast_ref::<MySqlDatabaseError>() {
        of_mysql(error.number())
    } else if let Some(error) = error.try_downcast_ref::<SqliteError>() {
        of_sqlite(error)
    } else {
        Meaning::Down(None)
    }
}

fn of_sqlite(error: &SqliteError) -> Meaning {
    let code = error.code().and_then(|code| code.parse::<i64>().ok());
    match code.map(|code| code & PRIMARY_CODE) {
        Some(SQLITE_DAMAGED) => Meaning::FileDamaged,
        Some(SQLITE_NOTADB) => Meaning::NotDatabase,
        Some(SQLITE_CANTOPEN) => Meaning::Down(Some(
            "this user must have write access to the directory of the database, because SQLite creates files there even \
             for reads; check whether the file system is mounted read-only",
        )),
        Some(SQLITE_READONLY) => Meaning::Down(Some(
            "check the owner and mode of the file and of its directory",
        )),
        Some(SQLITE_FULL) => Meaning::Down(Some("free space on the file system of the database")),
        Some(SQLITE_IOERR) => Meaning::Down(Some(
            "if the file system of the database is full, free space, because SQLite needs free space even for reads; \
             otherwise, look for disk errors in the kernel's log",
        )),
        _ => Meaning::Down(None),
    }
}

fn of_postgres(error: &PgDatabaseError) -> Meaning {
    match error.code() {
        // serialization_failure, deadlock_detected, lock_not_available
        "40001" | "40P01" | "55P03" => Meaning::Contended,
        // data_corrupted, index_corrupted
        "XX001" | "XX002" => Meaning::ServerDamaged,
        // read_only_sql_transaction
        "25006" => Meaning::Down(Some(READONLY_SERVER)),
        // disk_full
        "53100" => Meaning::Down(Some(FULL_SERVER)),
        // admin_shutdown, crash_shutdown, cannot_connect_now
        "57P01" | "57P02" | "57P03" => Meaning::Disconnected,
        // protocol_violation: PgBouncer uses this code for all of its errors. Only the text of the
        // error distinguishes "transaction blocks not allowed in statement pooling mode" from the
        // loss of a server.
        "08P01" if error.message().contains("pooling mode") => Meaning::SharedSession,
        // connection exceptions
        code if code.starts_with("08") => Meaning::Disconnected,
        // invalid_sql_statement_name, duplicate_prepared_statement
        "26000" | "42P05" => Meaning::SharedSession,
        _ => Meaning::Down(None),
    }
}

fn of_mysql(number: u16) -> Meaning {
    match number {
        // ER_LOCK_WAIT_TIMEOUT, ER_LOCK_DEADLOCK
        1_205 | 1_213 => Meaning::Contended,
        // ER_NOT_KEYFILE, ER_OLD_KEYFILE, ER_CRASHED_ON_USAGE, ER_CRASHED_ON_REPAIR, ER_INDEX_CORRUPT
        1_034 | 1_035 | 1_194 | 1_195 | 1_712 => Meaning::ServerDamaged,
        // ER_OPTION_PREVENTS_STATEMENT, ER_CANT_EXECUTE_IN_READ_ONLY_TRANSACTION, ER_READ_ONLY_MODE
        1_290 | 1_792 | 1_836 => Meaning::Down(Some(READONLY_SERVER)),
        // ER_SERVER_SHUTDOWN, ER_CONNECTION_KILLED of MariaDB, ER_CLIENT_INTERACTION_TIMEOUT
        1_053 | 1_927 | 4_031 => Meaning::Disconnected,
        // ER_DISK_FULL, ER_RECORD_FILE_FULL
        1_021 | 1_114 => Meaning::Down(Some(FULL_SERVER)),
        _ => Meaning::Down(None),
    }
}
