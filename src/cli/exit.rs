//! How a command ends: fixed exit codes, and messages that say what happened and what to do next.

use std::fmt;

use crate::error::Reason;

/// Exit codes, fixed: scripts depend on them. `docs/cli.md` has the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// A fault of the program.
    Internal = 1,
    /// Arguments that make no sense; also what the argument parser uses.
    Usage = 2,
    /// The configuration file is missing or wrong.
    Configuration = 3,
    /// No module, no token, or not the one that was meant.
    Token = 4,
    /// No PIN, or one that was refused.
    Pin = 5,
    /// A key or the registry is not as it must be.
    Untrusted = 6,
    /// The database cannot be used.
    Store = 7,
    /// The audit log cannot be written or read.
    Audit = 8,
    /// A port, a database or a log is in use: it runs already.
    InUse = 9,
    /// The broker refused the call.
    Refused = 10,
    /// The broker cannot be reached.
    Unreachable = 11,
    /// What was checked does not hold.
    Verification = 12,
    /// Ended by Ctrl-C.
    Interrupted = 130,
}

impl Exit {
    /// All codes with the meaning that the documentation gives them.
    pub const ALL: [(Self, &'static str); 13] = [
        (Self::Internal, "internal error"),
        (Self::Usage, "usage"),
        (Self::Configuration, "configuration"),
        (Self::Token, "module or token"),
        (Self::Pin, "PIN"),
        (
            Self::Untrusted,
            "key, attribute or registry not as it must be",
        ),
        (Self::Store, "database"),
        (Self::Audit, "audit log"),
        (Self::InUse, "in use: port, database or log"),
        (Self::Refused, "refused by the broker"),
        (Self::Unreachable, "broker unreachable"),
        (Self::Verification, "verification failed"),
        (Self::Interrupted, "interrupted"),
    ];

    /// The number.
    pub const fn code(self) -> u8 {
        match self {
            Self::Internal => 1,
            Self::Usage => 2,
            Self::Configuration => 3,
            Self::Token => 4,
            Self::Pin => 5,
            Self::Untrusted => 6,
            Self::Store => 7,
            Self::Audit => 8,
            Self::InUse => 9,
            Self::Refused => 10,
            Self::Unreachable => 11,
            Self::Verification => 12,
            Self::Interrupted => 130,
        }
    }
}

/// Why a command failed.
#[derive(Clone, Debug)]
pub struct Failure {
    /// With which code the process ends.
    pub exit: Exit,
    /// What happened, what it means, what to do next.
    pub message: String,
    /// The broker's reason, when it refused a call.
    pub reason: Option<String>,
}

impl Failure {
    /// A failure with its message.
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self {
            exit,
            message: message.into(),
            reason: None,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl From<crate::store::Error> for Failure {
    fn from(error: crate::store::Error) -> Self {
        let exit = if matches!(error, crate::store::Error::InUse(_)) {
            Exit::InUse
        } else {
            Exit::Store
        };
        Self::new(exit, error.to_string())
    }
}

impl From<crate::audit::Error> for Failure {
    fn from(error: crate::audit::Error) -> Self {
        let exit = if error.in_use() {
            Exit::InUse
        } else {
            Exit::Audit
        };
        Self::new(exit, error.to_string())
    }
}

impl From<crate::error::Error> for Failure {
    fn from(error: crate::error::Error) -> Self {
        let exit = match error.reason() {
            Reason::TokenUntrusted => Exit::Untrusted,
            Reason::TokenDown => Exit::Token,
            Reason::StoreDown | Reason::RecordDamaged => Exit::Store,
            Reason::AuditDown => Exit::Audit,
            Reason::Request => Exit::Usage,
            _ => Exit::Internal,
        };
        Self::new(exit, error.detail().to_owned())
    }
}
