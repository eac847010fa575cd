//! The audit log: one durable entry per decision, written before the answer leaves.
//!
//! A log is one directory under an exclusive lock: append-only segments, mode 0600, one RFC 8785 (canonical JSON) object
//! per line, integers only, LF-ended, with a `log_id` and a sequence without gaps. Entries are written and synced in
//! groups by one thread. An entry that cannot be made durable within [`APPEND_TIMEOUT`] is an error, and its caller must
//! refuse the request (fail closed).

use std::{borrow::Cow, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use keybroker_core::{
    call::{CallId, RequestId, Timestamp},
    error::{self, Reason},
    key::{ClientId, KeyName, RecordId, Revision, Tenant, UserId, WrappingKeyId},
    state::StateDirectory,
};

mod extent;
mod integrity;
mod line;
mod log;
mod memory;
mod recovery;
mod segment;
mod state;
mod tail;
mod verify;
mod writer;

pub use log::{AuditLog, ClosedLog};
pub use memory::Tampering;
pub use recovery::open_intents;
pub use tail::{tail, tail_matching};
pub use verify::{Report, verify};

/// Longest wait for an entry to become durable.
pub const APPEND_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest wait for the last entries and the end of the writer.
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);

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
        segment::note_open_directory(&self.directory);
        AuditLog::open(&self.directory.join(name), self.segment_bytes_max)
    }

    /// Opens the log of this instance. Unlike [`Settings::open`] it remembers the log in the state directory, and refuses one
    /// that ends before the last entry that was durable, that is gone, or whose tampering no operator has acknowledged.
    pub fn open_instance(&self) -> Result<(AuditLog, Vec<OpenIntent>), Error> {
        segment::prepare_directory(&self.directory)?;
        segment::note_open_directory(&self.directory);
        AuditLog::open_remembered(
            &self.directory.join(&self.instance),
            self.segment_bytes_max,
            &self.memory(),
        )
    }

    /// The log of this instance as its files are, without opening it: a broker may be using it. Refuses a log that is gone, or whose
    /// tampering no operator has acknowledged, like [`Settings::open_instance`].
    pub fn examine_instance(&self) -> Result<ClosedLog, Error> {
        ClosedLog::examine(self.directory.join(&self.instance), self.memory())
    }

    /// The tampering with the log of this instance that no operator has acknowledged.
    pub fn tampering(&self) -> Result<Option<Tampering>, Error> {
        self.memory().tampering()
    }

    /// Acknowledges the tampering that was found, in the name of an operator. A broker that serves takes this in within a
    /// second, another one at its start.
    pub fn acknowledge_tampering(
        &self,
        tampering: &Tampering,
        principal: &str,
    ) -> Result<(), Error> {
        self.memory().acknowledge(tampering, principal)
    }

    /// Numbers of the segments of this instance's log, ascending.
    pub fn segments(&self) -> Result<Vec<u64>, Error> {
        segment::segments(&self.directory.join(&self.instance))
    }

    /// Asks for the removal of the oldest segments, up to this one and without the newest, in the name of an operator. A broker
    /// that serves removes them within a second, another one at its start. An entry records it.
    pub fn request_removal(&self, through: u64, principal: &str) -> Result<(), Error> {
        let principal = principal.to_owned();
        let removal = memory::Removal { principal, through };
        self.memory().request_removal(&removal)
    }

    /// Whether a removal was asked for and not carried out yet.
    pub fn is_removal_pending(&self) -> Result<bool, Error> {
        Ok(self.memory().removal()?.is_some())
    }

    /// Compares the end of this instance's log with the last entry that is known to have been durable.
    pub fn verify_instance(&self) -> Result<Report, Error> {
        let memory = self.memory();
        let mark = memory.mark();
        let directory = self.directory.join(&self.instance);
        let mut report = match mark {
            Err(error) if error.is_tampering() => {
                let mut report = verify(&directory)?;
                report.problems.push(error.finding().to_owned());
                report
            }
            mark => verify::verify_to(&directory, mark?)?,
        };
        if let Some(tampering) = memory.tampering()? {
            let what = format!("found while the broker served: {}", tampering.finding);
            report.problems.push(what);
        }
        Ok(report)
    }

    fn memory(&self) -> memory::Memory {
        memory::Memory::new(StateDirectory::below(&self.directory), &self.instance)
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
    /// The result of an intent whose outcome could not be written in time: after a crash, or because the log or the
    /// store was unavailable.
    Recovered,
    /// About the log itself: opened, torn tail set aside, closed.
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
    /// It may have been done, in part or as a whole. Of a recovered intent: nothing that the log's owner can ask still tells. Of a
    /// command that failed in the middle: the count says how much was done at least.
    Unknown,
}

/// One entry, before the log adds `log_id`, sequence and time. Absent fields are left out of the line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it is about.
    pub kind: EntryKind,
    /// Action name, see [`keybroker_core::principal::Action`], or a name of the log's own.
    pub action: Cow<'static, str>,
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
    pub policy: Option<Cow<'static, str>>,
    /// The call.
    pub call_id: Option<CallId>,
    /// The client's request id.
    pub request_id: Option<RequestId>,
    /// What exactly was wrong, where one reason has several causes.
    pub cause: Option<Cow<'static, str>>,
    /// Where the connection came from.
    pub peer: Option<String>,
    /// How many events this entry stands for, when more than one.
    pub count: Option<u64>,
    /// How many bytes of the log's own files it is about.
    pub bytes: Option<u64>,
    /// The API client that was made or changed.
    pub client: Option<ClientId>,
    /// What that client may do.
    pub grant: Option<String>,
    /// The identity of the database that the log is used with.
    pub store: Option<String>,
    /// Risks of the token that its settings accept.
    pub risks: Option<String>,
}

impl Entry {
    /// An entry with nothing but what every entry has.
    pub fn new(kind: EntryKind, action: impl Into<Cow<'static, str>>, outcome: Outcome) -> Self {
        Self {
            kind,
            action: action.into(),
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
            bytes: None,
            client: None,
            grant: None,
            store: None,
            risks: None,
            cause: None,
        }
    }
}

/// A change whose outcome the log has: it was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The call that made it.
    pub call: CallId,
    /// When its intent was written.
    pub at: Timestamp,
    /// What it did, as in the field `action`.
    pub action: String,
}

/// An intent without an outcome.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenIntent {
    /// The call whose mutation was cut short.
    pub call: CallId,
    /// When the intent was written.
    pub at: Timestamp,
    /// The intent: who wanted what of which record.
    pub intent: Entry,
}

impl OpenIntent {
    /// The entry that closes it: of the same principal, action and record.
    pub fn recovered(&self, outcome: Outcome) -> Entry {
        Entry {
            kind: EntryKind::Recovered,
            outcome,
            ..self.intent.clone()
        }
    }
}

/// Why the log is not writable.
#[derive(Clone, Debug, thiserror::Error)]
#[error("audit log: {text}")]
pub struct Error {
    text: String,
    class: Class,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Down,
    InUse,
    Slow,
    Tampered,
    /// Tampered with, and latched: the text says what to do.
    Latched,
}

impl Error {
    fn new(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            class: Class::Down,
        }
    }

    /// A file of the log is not the one that was written.
    fn tampered(finding: impl Into<String>) -> Self {
        Self {
            text: finding.into(),
            class: Class::Tampered,
        }
    }

    fn is_tampering(&self) -> bool {
        self.class == Class::Tampered
    }

    fn finding(&self) -> &str {
        &self.text
    }

    /// The same with the remedy: nothing goes on by itself.
    fn latched(self) -> Self {
        if self.class == Class::Latched {
            return self;
        }
        Self {
            text: format!(
                "{}; nothing is released or changed until an operator runs `keybroker audit acknowledge`. Keep the directory as it \
                 is for the auditors",
                self.text
            ),
            class: Class::Latched,
        }
    }

    /// Whether another process writes this log.
    pub fn in_use(&self) -> bool {
        self.class == Class::InUse
    }

    /// Whether the entry may still become durable, though its caller has been refused.
    pub fn may_appear(&self) -> bool {
        self.class == Class::Slow
    }
}

/// How long a caller should wait for a log that is unavailable.
const AUDIT_RETRY: Duration = Duration::from_secs(1);

impl From<Error> for error::Error {
    fn from(error: Error) -> Self {
        Self::new(Reason::AuditDown, error.to_string()).retry_after(AUDIT_RETRY)
    }
}
