//! The audit log: one durable entry per decision, written before the answer leaves.
//!
//! A log is one directory under an exclusive lock: append-only segments, mode 0600, one RFC 8785 (canonical JSON) object
//! per line, integers only, LF-ended, with a `log_id` and a sequence without gaps. Entries are written and synced in
//! groups by one thread. An entry that cannot be made durable within [`APPEND_TIMEOUT`] is an error, and its caller must
//! refuse the request (fail closed).

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    call::{CallId, RequestId, Timestamp},
    error::{self, Reason},
    key::{KeyName, RecordId, Revision, Tenant, UserId, WrappingKeyId},
};

mod line;
mod log;
mod segment;
mod verify;
mod writer;

pub use log::{AuditLog, tail};
pub use verify::{Report, verify};

/// Longest wait for an entry to become durable.
pub const APPEND_TIMEOUT: Duration = Duration::from_secs(1);

/// Where the log lives.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Parent directory, mode 0700. `serve` writes below `instance/`, each mutating command-line run below `cli-…/`.
    pub directory: PathBuf,
    /// Name of this instance's log below the directory; 1 to 64 bytes of `[a-z0-9._-]`.
    #[serde(default = "default_instance")]
    pub instance: String,
    /// A segment is closed when it reaches this size.
    #[serde(default = "default_segment_bytes_max")]
    pub segment_bytes_max: u64,
}

impl Settings {
    /// Opens the log of that name, making its directory, and the one above if that one's parent exists.
    pub fn open(&self, name: &str) -> Result<(AuditLog, Vec<OpenIntent>), Error> {
        segment::prepare_directory(&self.directory)?;
        AuditLog::open(&self.directory.join(name), self.segment_bytes_max)
    }
}

fn default_instance() -> String {
    "serve".to_owned()
}

fn default_segment_bytes_max() -> u64 {
    64 * 1024 * 1024
}

/// What an entry is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EntryKind {
    /// One decision that changed nothing: a release, a read, a denial, a failure.
    Decision,
    /// A mutation is about to be committed.
    Intent,
    /// What became of an intent with the same call id.
    Outcome,
    /// What became of an intent whose outcome a crash prevented, found at the next start.
    Recovered,
    /// About the log or the broker itself: opened, torn tail set aside, refusals counted, closed.
    System,
}

/// How a decision ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Done, or for an intent: about to be done.
    Ok,
    /// Policy or authentication refused it.
    Denied,
    /// It failed; nothing was released or changed.
    Failed,
}

/// One entry, before the log adds `log_id`, sequence and time. Absent fields are left out of the line.
#[derive(Clone, Debug)]
pub struct Entry {
    /// What it is about.
    pub kind: EntryKind,
    /// Action name, see [`crate::principal::Action`], or a name of the log's own.
    pub action: &'static str,
    /// How it ended.
    pub outcome: Outcome,
    /// Why not, when it did not end well.
    pub reason: Option<Reason>,
    /// Who asked.
    pub principal: Option<String>,
    /// Tenant of the principal.
    pub tenant: Option<Tenant>,
    /// The user whose key it is.
    pub user: Option<UserId>,
    /// Which of the user's keys.
    pub key_name: Option<KeyName>,
    /// The record, once known.
    pub record_id: Option<RecordId>,
    /// The revision released or made.
    pub revision: Option<Revision>,
    /// The wrapping key used.
    pub wrapping_key: Option<WrappingKeyId>,
    /// The policy that decided.
    pub policy: Option<&'static str>,
    /// The call.
    pub call_id: Option<CallId>,
    /// The client's request id.
    pub request_id: Option<RequestId>,
    /// Where the connection came from.
    pub peer: Option<String>,
    /// How many events this entry stands for, when more than one.
    pub count: Option<u64>,
}

impl Entry {
    /// An entry with nothing but what every entry has.
    pub fn new(kind: EntryKind, action: &'static str, outcome: Outcome) -> Self {
        Self {
            kind,
            action,
            outcome,
            reason: None,
            principal: None,
            tenant: None,
            user: None,
            key_name: None,
            record_id: None,
            revision: None,
            wrapping_key: None,
            policy: None,
            call_id: None,
            request_id: None,
            peer: None,
            count: None,
        }
    }
}

/// An intent without an outcome, found when the log was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenIntent {
    /// The call whose mutation was cut short.
    pub call: CallId,
    /// Its action name.
    pub action: String,
    /// When the intent was written.
    pub at: Timestamp,
}

/// Why the log is not writable.
#[derive(Clone, Debug, thiserror::Error)]
#[error("audit log: {text}")]
pub struct Error {
    text: String,
    in_use: bool,
}

impl Error {
    fn new(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            in_use: false,
        }
    }

    /// Whether another process writes this log.
    pub fn in_use(&self) -> bool {
        self.in_use
    }
}

/// How long a caller should wait for a log that is away.
const AUDIT_RETRY: Duration = Duration::from_secs(1);

impl From<Error> for error::Error {
    fn from(error: Error) -> Self {
        Self::new(Reason::AuditDown, error.to_string()).retry_after(AUDIT_RETRY)
    }
}
