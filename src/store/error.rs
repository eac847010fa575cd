//! Where the store's errors come from and what they become.

use std::time::Duration;

use crate::error::{self, Reason};

use super::Error;

/// How long a caller should wait for a store that is away.
const STORE_RETRY: Duration = Duration::from_secs(1);

/// SQLite's primary result codes for a file that is not a good database (`SQLITE_CORRUPT`, `SQLITE_NOTADB`).
const SQLITE_DAMAGED: [i64; 2] = [11, 26];
/// `SQLITE_READONLY`, `SQLITE_FULL`: worth a hint.
const SQLITE_READONLY: i64 = 8;
const SQLITE_FULL: i64 = 13;
/// The low byte of an extended result code is the primary one.
const PRIMARY_CODE: i64 = 0xff;

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
            Error::Schema(_) | Error::InUse(_) | Error::Down(_) => {
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
            sqlx::Error::Database(database) => {
                let code: Option<i64> = database.code().and_then(|code| code.parse().ok());
                match code.map(|code| code & PRIMARY_CODE) {
                    Some(code) if SQLITE_DAMAGED.contains(&code) => {
                        Self::Corrupt(format!("the database file: {database}; restore a backup"))
                    }
                    Some(SQLITE_READONLY) => Self::Down(
                        format!("{database}; check owner and mode of the file and its directory")
                            .into(),
                    ),
                    Some(SQLITE_FULL) => Self::Down(format!("{database}; free the disk").into()),
                    _ => Self::Down(database.to_string().into()),
                }
            }
            _ => Self::Down(error.to_string().into()),
        }
    }
}
