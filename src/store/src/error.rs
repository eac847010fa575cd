//! The errors of the store, and their conversion to the errors that callers of the broker receive.

use std::{borrow::Cow, error::Error as StdError, fmt, io, path::Path, sync::Arc, time::Duration};

use keybroker_core::{
    error::{self, Reason},
    key::Revision,
    remedy::remedy,
};

/// The time that a caller should wait before it retries while the store is unavailable.
const STORE_RETRY: Duration = Duration::from_secs(1);

/// An error of the driver or of the operating system, or another error of the store.
type Cause = Arc<dyn StdError + Send + Sync>;

/// The failed action, the cause and the remedy, as in `cannot open /x: permission denied; run the
/// command as …`.
#[derive(Clone, Debug)]
pub struct Detail {
    /// The failed action; empty if the text of the cause is sufficient.
    what: Cow<'static, str>,
    cause: Option<Cause>,
    remedy: Option<Cow<'static, str>>,
}

impl Detail {
    /// Creates a detail that has only a cause.
    pub(super) fn of(cause: impl StdError + Send + Sync + 'static) -> Self {
        Self::caused("", cause)
    }

    /// Creates a detail with the failed action and the error that caused the failure.
    pub(super) fn caused(
        what: impl Into<Cow<'static, str>>,
        cause: impl StdError + Send + Sync + 'static,
    ) -> Self {
        Self {
            what: what.into(),
            cause: Some(Arc::new(cause)),
            remedy: None,
        }
    }

    /// Creates the error for a failed access to a file. If the cause implies a remedy, the error
    /// contains the remedy.
    pub(super) fn of_file(what: &str, path: &Path, error: io::Error) -> Self {
        let remedy = remedy(path, &error).map(Cow::Owned);
        Self {
            remedy,
            ..Self::caused(format!("{what} {}", path.display()), error)
        }
    }

    /// Adds a remedy.
    pub(super) fn remedy(self, remedy: impl Into<Cow<'static, str>>) -> Self {
        Self {
            remedy: Some(remedy.into()),
            ..self
        }
    }

    /// Adds a remedy, unless the detail already has a remedy.
    pub(super) fn or_remedy(self, remedy: &'static str) -> Self {
        Self {
            remedy: self.remedy.or(Some(remedy.into())),
            ..self
        }
    }
}

impl<T: Into<Cow<'static, str>>> From<T> for Detail {
    fn from(what: T) -> Self {
        Self {
            what: what.into(),
            cause: None,
            remedy: None,
        }
    }
}

impl fmt::Display for Detail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        if let Some(cause) = &self.cause {
            let separator = if self.what.is_empty() { "" } else { ": " };
            write!(f, "{separator}{}", error::chain(cause))?;
        }
        match &self.remedy {
            Some(remedy) => write!(f, "; {remedy}"),
            None => Ok(()),
        }
    }
}

impl StdError for Detail {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        let cause = self.cause.as_deref()?;
        Some(cause)
    }
}

/// A pooler between the broker and PostgreSQL shares one session between several clients.
#[derive(Debug, thiserror::Error)]
#[error("a connection pooler shares one PostgreSQL session between several clients")]
pub(super) struct SharedSession {
    /// The error of the driver that revealed the shared session, if any.
    pub(super) source: Option<sqlx::Error>,
}

/// Class of a store failure.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The address or the id already exists.
    #[error("exists already")]
    Exists,
    /// The record does not exist.
    #[error("not found")]
    NotFound,
    /// The current revision is not the expected revision.
    #[error("the current revision is {current}")]
    Revision {
        /// The current revision.
        current: Revision,
    },
    /// The record is deleted or, for an undelete, active.
    #[error("the state of the record forbids the operation")]
    State,
    /// The registry row or the API client was changed after it was read.
    #[error("the row was changed after it was read")]
    Conflict,
    /// A concurrent call used the request id.
    #[error("the request id is in use")]
    RequestIdTaken,
    /// A row cannot be decoded. The text contains the names of the table and the column, but no
    /// stored bytes.
    #[error("the database contains damaged data: {0}")]
    Corrupt(#[source] Detail),
    /// The schema is older or newer than the schema of this binary, or the settings do not describe a usable database.
    #[error("{0}")]
    Schema(#[source] Detail),
    /// The database may lose writes that it acknowledged.
    #[error("{0}")]
    Durability(String),
    /// The database rolled back this transaction in favour of another transaction. It is safe to
    /// repeat the rolled-back transaction.
    #[error("the database is busy: {0}")]
    Contended(#[source] Detail),
    /// Another process holds the lock of the database.
    #[error("{0}")]
    InUse(String),
    /// The connection was lost while a change was committed, and the store could not find out
    /// whether the change was made.
    #[error(
        "the outcome of the change is not known: {0}; repeat the call with the same request id, or find out whether the change \
         was made before you repeat it"
    )]
    OutcomeUnknown(#[source] Detail),
    /// The connection was lost or refused, so another connection may succeed. The store converts this error into [`Self::Down`]
    /// before it returns the error to a caller.
    #[error("connection lost: {0}")]
    Disconnected(#[source] Detail),
    /// All connections are in use by calls that receive answers from the database. The database works, but the calls need more
    /// connections than the pool has.
    #[error("the database is busy: {0}")]
    Busy(#[source] Detail),
    /// The database is unavailable, full, read-only or slow.
    #[error("database unavailable: {0}")]
    Down(#[source] Detail),
}

impl Error {
    /// Converts an error to the error for callers of the store. A lost connection becomes
    /// [`Self::Down`], because the store has already tried other connections.
    pub(super) fn settled(self) -> Self {
        match self {
            Self::Disconnected(what) => Self::Down(what),
            error => error,
        }
    }

    /// Describes the damage of a stored row, without the driver's message. Lists of rows contain
    /// this description.
    pub(super) fn damage(&self) -> String {
        match self {
            Self::Corrupt(detail) => Self::Corrupt(Detail::from(detail.what.clone())).to_string(),
            error => error.to_string(),
        }
    }

    /// Whether the cause is a pooler that shares one session between several clients.
    pub fn is_shared_session(&self) -> bool {
        let mut cause = self.source();
        while let Some(error) = cause {
            if error.is::<SharedSession>() {
                return true;
            }
            cause = error.source();
        }
        false
    }

    /// Whether a change may have been made although the store returned this error.
    pub fn has_unknown_outcome(&self) -> bool {
        matches!(self, Self::Down(_) | Self::OutcomeUnknown(_))
    }
}

impl From<Error> for error::Error {
    fn from(error: Error) -> Self {
        let reason = match error {
            Error::Exists => Reason::KeyExists,
            Error::NotFound => Reason::KeyNotFound,
            Error::State => Reason::KeyState,
            // A concurrent call uses the same request id. A retry returns the result of the
            // concurrent call.
            Error::Revision { .. } | Error::Conflict | Error::RequestIdTaken => Reason::Revision,
            Error::Corrupt(_) => Reason::RecordDamaged,
            Error::Busy(_) => Reason::QueueFull,
            Error::Schema(_)
            | Error::Durability(_)
            | Error::Contended(_)
            | Error::InUse(_)
            | Error::OutcomeUnknown(_)
            | Error::Disconnected(_)
            | Error::Down(_) => Reason::StoreDown,
        };
        let is_outcome_unknown = matches!(error, Error::OutcomeUnknown(_));
        let mut converted = Self::caused(reason, error);
        if matches!(reason, Reason::QueueFull | Reason::StoreDown) {
            converted = converted.retry_after(STORE_RETRY);
        }
        if is_outcome_unknown {
            converted = converted.outcome_unknown();
        }
        converted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused() -> io::Error {
        io::Error::from(io::ErrorKind::ConnectionRefused)
    }

    #[test]
    fn an_error_shows_what_failed_then_why_then_the_remedy_and_keeps_its_cause() {
        let detail = Detail::caused("cannot use the database", sqlx::Error::Io(refused()));
        let error = Error::Down(detail.remedy("check `store.url`"));
        let text = error.to_string();
        assert_eq!(
            text,
            "database unavailable: cannot use the database: error communicating with database: connection refused; check \
             `store.url`"
        );
        // A log line that also contains the causes contains each text only once.
        assert_eq!(error::chain(&error), text);
        let broker = error::Error::from(error);
        assert_eq!(broker.detail(), text);
        let mut cause: &(dyn StdError + 'static) = &broker;
        while let Some(deeper) = cause.source() {
            cause = deeper;
        }
        assert!(cause.is::<io::Error>(), "{cause:?}");
    }

    #[test]
    fn a_shared_session_is_recognised_by_its_type() {
        let source = Some(sqlx::Error::WorkerCrashed);
        let shared = Error::Down(Detail::of(SharedSession { source }));
        assert!(shared.is_shared_session());
        assert!(Error::OutcomeUnknown(Detail::of(shared)).is_shared_session());
        let words = "a connection pooler shares one PostgreSQL session between several clients";
        assert!(!Error::Down(words.into()).is_shared_session());
    }

    #[test]
    fn a_list_does_not_show_what_the_driver_says_of_a_damaged_row() {
        let damaged = Error::Corrupt(Detail::caused("records.state", refused()));
        assert_eq!(
            damaged.damage(),
            "the database contains damaged data: records.state"
        );
    }
}
