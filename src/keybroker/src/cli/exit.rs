//! Exit codes and failures of commands. A failure has a message, and may have a hint about what to do next.

use std::fmt;

use keybroker_core::error::Reason;

/// Exit codes. The exit codes never change, because scripts depend on them. `docs/cli.md` contains
/// the table of exit codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// An internal error of the program.
    Internal,
    /// Invalid arguments. The argument parser also exits with this code.
    Usage,
    /// The configuration file is missing or invalid.
    Configuration,
    /// The module or the token is missing, or the token is not the configured token.
    Token,
    /// The PIN is missing, or the token rejected it.
    Pin,
    /// A key or the registry does not meet the requirements.
    Untrusted,
    /// The database cannot be used.
    Store,
    /// The audit log cannot be written or read.
    Audit,
    /// A port, the database or the audit log is in use, for example by a running broker.
    InUse,
    /// The broker refused the call.
    Refused,
    /// The broker cannot be reached.
    Unreachable,
    /// A check failed.
    Verification,
    /// The command was interrupted by a signal.
    Interrupted,
}

impl Exit {
    /// All exit codes, in the order of the documentation.
    pub const ALL: [Self; 13] = [
        Self::Internal,
        Self::Usage,
        Self::Configuration,
        Self::Token,
        Self::Pin,
        Self::Untrusted,
        Self::Store,
        Self::Audit,
        Self::InUse,
        Self::Refused,
        Self::Unreachable,
        Self::Verification,
        Self::Interrupted,
    ];

    /// The numeric exit code.
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

    /// Whether `serve` would fail again after a restart, until a person repairs the cause.
    pub const fn needs_person(self) -> bool {
        matches!(
            self,
            Self::Usage | Self::Configuration | Self::Untrusted | Self::Audit
        )
    }

    /// The meaning of the code, in the same words as in the documentation.
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Internal => "internal error",
            Self::Usage => "usage: an argument, or a file that an argument names",
            Self::Configuration => "configuration",
            Self::Token => {
                "module or token: missing, not a PKCS#11 module, or not the configured token"
            }
            Self::Pin => "PIN: missing, in a file that other users can read, or rejected",
            Self::Untrusted => "a key, an attribute or the registry does not meet the requirements",
            Self::Store => "database",
            Self::Audit => "audit log",
            Self::InUse => "in use: a port, the database or the audit log",
            Self::Refused => "refused by the broker",
            Self::Unreachable => "broker unreachable, or no answer in time",
            Self::Verification => "a check failed",
            Self::Interrupted => "interrupted by a signal",
        }
    }
}

/// The failure of a command.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The exit code of the process.
    pub exit: Exit,
    /// The description of the problem and its consequences.
    pub message: String,
    /// The suggested next step, if it is not part of the message.
    pub hint: Option<String>,
    /// The broker's reason, if the broker refused a call.
    pub reason: Option<String>,
}

impl Failure {
    /// Creates a failure with a message and no hint.
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self {
            exit,
            message: message.into(),
            hint: None,
            reason: None,
        }
    }

    /// Sets the hint.
    #[must_use]
    pub fn hint(self, hint: impl Into<String>) -> Self {
        Self {
            hint: Some(hint.into()),
            ..self
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl From<keybroker_store::Error> for Failure {
    fn from(error: keybroker_store::Error) -> Self {
        let exit = if matches!(error, keybroker_store::Error::InUse(_)) {
            Exit::InUse
        } else {
            Exit::Store
        };
        Self::new(exit, error.to_string())
    }
}

impl From<keybroker_audit::Error> for Failure {
    fn from(error: keybroker_audit::Error) -> Self {
        let exit = if error.in_use() {
            Exit::InUse
        } else {
            Exit::Audit
        };
        Self::new(exit, error.to_string())
    }
}

impl From<keybroker_core::error::Error> for Failure {
    fn from(error: keybroker_core::error::Error) -> Self {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Scripts depend on the exit codes, so the documentation must have the same codes as the
    /// program.
    #[test]
    fn the_documentation_has_every_code() {
        let page = include_str!("../../../../docs/cli.md");
        let documented: Vec<&str> = page
            .lines()
            .filter(|line| line.starts_with("| ") && line.as_bytes()[2].is_ascii_digit())
            .collect();
        let mut expected = vec!["| 0 | success |".to_owned()];
        expected.extend(Exit::ALL.map(|exit| format!("| {} | {} |", exit.code(), exit.meaning())));
        assert_eq!(documented, expected);
    }
}
