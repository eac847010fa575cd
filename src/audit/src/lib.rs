//! The audit log. Each decision leaves one durable entry, which is written before the answer is sent.
//!
//! A log is a directory under an exclusive lock, with append-only segments of mode 0600. Each line is one RFC 8785
//! (canonical JSON) object in which every number is an integer, and ends with LF. All entries of a log have the same
//! `log_id`, and their sequence numbers have no gaps. One thread writes and syncs entries in groups. If an entry cannot
//! be made durable within [`APPEND_TIMEOUT`], the caller gets an error and must refuse the request (fail closed).

use std::{borrow::Cow, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use keybroker_core::{
    call::{CallId, RequestId, Timestamp},
    error::{self, Reason},
    key::{
        AccessRequestId, ApprovalId, ClientId, DeviceId, Fingerprint, KeyName, RecordId, Revision,
        Tenant, UserId, WrappingKeyId,
    },
    organization::Guid,
    state::StateDirectory,
};

mod commands;
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

/// Longest wait until an entry is durable.
pub const APPEND_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest wait until the last entries are written and the writer has ended.
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);

/// The `[audit]` section of the configuration.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The parent directory, of mode 0700. `serve` writes to the subdirectory that the setting `audit.instance` names,
    /// and each run of a command that changes something writes to a subdirectory `cli-…/`.
    pub directory: PathBuf,
    /// Name of this instance's log below the directory: 1 to 64 bytes of `[a-z0-9._-]`.
    #[serde(default = "default_instance")]
    pub instance: String,
    /// Size at which a segment is closed.
    #[serde(default = "default_segment_bytes_max")]
    pub segment_bytes_max: u64,
}

impl Settings {
    /// Opens the log with the name `name`. Creates the log's directory, and also the audit directory above the log's
    /// directory if the parent of the audit directory exists.
    pub fn open(&self, name: &str) -> Result<(AuditLog, Vec<OpenIntent>), Error> {
        segment::prepare_directory(&self.directory)?;
        segment::note_open_directory(&self.directory);
        AuditLog::open(&self.directory.join(name), self.segment_bytes_max)
    }

    /// Opens the log of this instance. Unlike [`Settings::open`], this function keeps the state of the log in the state
    /// directory. The function refuses a log that is missing, a log that ends before the last durable entry, and a log
    /// with unacknowledged tampering.
    pub fn open_instance(&self) -> Result<(AuditLog, Vec<OpenIntent>), Error> {
        segment::prepare_directory(&self.directory)?;
        segment::note_open_directory(&self.directory);
        AuditLog::open_remembered(
            &self.directory.join(&self.instance),
            self.segment_bytes_max,
            &self.memory(),
        )
    }

    /// Examines the files of this instance's log without opening it, because a broker may be using it. Like
    /// [`Settings::open_instance`], this function refuses a log that is missing or that has unacknowledged tampering.
    pub fn examine_instance(&self) -> Result<ClosedLog, Error> {
        ClosedLog::examine(self.directory.join(&self.instance), self.memory())
    }

    /// Returns the unacknowledged tampering with the log of this instance.
    pub fn tampering(&self) -> Result<Option<Tampering>, Error> {
        self.memory().tampering()
    }

    /// Acknowledges detected tampering on behalf of an operator. A running broker processes the acknowledgement within
    /// a second. A stopped broker processes the acknowledgement at its next start.
    pub fn acknowledge_tampering(
        &self,
        tampering: &Tampering,
        principal: &str,
    ) -> Result<(), Error> {
        self.memory().acknowledge(tampering, principal)
    }

    /// Returns the numbers of the segments of this instance's log, in ascending order.
    pub fn segments(&self) -> Result<Vec<u64>, Error> {
        segment::segments(&self.directory.join(&self.instance))
    }

    /// Requests the removal of the oldest segments up to number `through`, on behalf of an operator. The newest segment
    /// is never removed. A running broker removes the segments within a second. A stopped broker removes the segments
    /// at its next start. An audit entry records the removal.
    pub fn request_removal(&self, through: u64, principal: &str) -> Result<(), Error> {
        let principal = principal.to_owned();
        let removal = memory::Removal { principal, through };
        self.memory().request_removal(&removal)
    }

    /// Whether a requested removal is still pending.
    pub fn is_removal_pending(&self) -> Result<bool, Error> {
        Ok(self.memory().removal()?.is_some())
    }

    /// Verifies this instance's log, and compares its end with the last entry that is known to be durable.
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
            let what = format!(
                "the broker found the tampering while it was running: {}",
                tampering.finding
            );
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

/// The kinds of entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EntryKind {
    /// A decision that changed nothing: a release, a read, a denial or a failure.
    Decision,
    /// A mutation that is about to be committed.
    Intent,
    /// The result of the intent with the same call id.
    Outcome,
    /// The result of an intent whose outcome could not be written in time, because of a crash or because the log or the
    /// store was unavailable.
    Recovered,
    /// An event of the log itself: for example, the log was opened or closed, or a torn tail was moved to a separate
    /// file.
    System,
}

/// The result of a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// The action was done. In an intent, `Ok` means that the action is about to be done.
    Ok,
    /// Policy or authentication refused the action.
    Denied,
    /// The action failed, and nothing was released or changed.
    Failed,
    /// The action may have been done, completely or in part. In the outcome of a recovered intent, `Unknown` means that
    /// the outcome can no longer be determined. If a command failed after its first changes, the count in its entry is
    /// the minimum number of completed changes.
    Unknown,
}

/// An entry without the values that the log adds: `log_id`, sequence number and time. A field that is `None` is left
/// out of the entry's line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The kind of the entry.
    pub kind: EntryKind,
    /// The name of the action (see [`keybroker_core::principal::Action`]), or of an event of the log itself.
    pub action: Cow<'static, str>,
    /// The result.
    pub outcome: Outcome,
    /// The reason, if the action was not done.
    pub reason: Option<Reason>,
    /// The principal that requested the action.
    pub principal: Option<String>,
    /// The `[[issuer.mapping]]` that gave the principal its roles.
    pub mapping: Option<String>,
    /// The tenant of the principal.
    pub tenant: Option<Tenant>,
    /// The user whose key the action concerns.
    pub user: Option<UserId>,
    /// The name of the key.
    pub key_name: Option<KeyName>,
    /// The record, if it is known.
    pub record_id: Option<RecordId>,
    /// The revision that was released or created.
    pub revision: Option<Revision>,
    /// The wrapping key that was used.
    pub wrapping_key: Option<WrappingKeyId>,
    /// The fingerprint of the recipient's public key, for a sealed release.
    pub recipient: Option<Fingerprint>,
    /// The policy that made the decision.
    pub policy: Option<Cow<'static, str>>,
    /// The id of the call.
    pub call_id: Option<CallId>,
    /// The client's request id.
    pub request_id: Option<RequestId>,
    /// The exact cause, if the reason can have several causes.
    pub cause: Option<Cow<'static, str>>,
    /// The address from which the connection came.
    pub peer: Option<String>,
    /// Number of events that the entry represents, if it represents more than one event.
    pub count: Option<u64>,
    /// Number of bytes in the part of the audit log that the entry is about.
    pub bytes: Option<u64>,
    /// The API client that was created or changed.
    pub client: Option<ClientId>,
    /// The grant of the API client that was created or changed.
    pub grant: Option<String>,
    /// The identity of the database that is used with the log.
    pub store: Option<String>,
    /// The number and the state of each row of the registry.
    pub registry: Option<String>,
    /// The configured name of the token that a change of a wrapping key concerns. Several names are separated by commas.
    pub token: Option<String>,
    /// The risks that the token's settings accept.
    pub risks: Option<Box<str>>,
    /// SHA-256 as hexadecimal digits: of the new envelope, of the ids of the rows that a re-wrap moves, of the registry, or of the
    /// change that needs an approval.
    pub digest: Option<String>,
    /// The persons of a change that needs an approval. Most entries have none, so they are not part of the size of each entry.
    pub persons: Option<Box<Persons>>,
    /// The request of a device of a Bitwarden organisation.
    pub bitwarden: Option<Box<BitwardenRequest>>,
    /// The device or the request for access that the entry is about. Most entries have none.
    pub device: Option<Box<DeviceFacts>>,
}

/// The request of a member of a Bitwarden organisation, whose new device an administrator must approve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitwardenRequest {
    /// The organisation.
    pub organization: Guid,
    /// The user who is a member.
    pub member: Guid,
    /// The identifier of the device, as the server sends it.
    pub device: String,
    /// The request.
    pub request: Guid,
    /// The SHA-256 of the device's public key.
    pub public_key: Fingerprint,
}

/// A device of a member, or a request for access of a new device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceFacts {
    /// The device.
    pub device: Option<DeviceId>,
    /// The request for access.
    pub request: Option<AccessRequestId>,
    /// The principal that made the request for access.
    pub asked_by: Option<String>,
    /// The name of the network from which the request came.
    pub place: Option<String>,
    /// SHA-256 of the public key to which the answer of the request is encrypted, as hexadecimal digits.
    pub public_key: Option<String>,
}

/// The persons of a change that needs the approval of a second person.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Persons {
    /// The request for approval that the entry is about, or that permitted the change.
    pub approval: Option<ApprovalId>,
    /// The person to whom the principal of the entry belongs.
    pub person: Option<String>,
    /// The principal that requested the change, and its person, in the entry of a decision about the request.
    pub requested_by: Option<(String, String)>,
    /// The principal that approved the change, and its person, in the entry of the change.
    pub approved_by: Option<(String, String)>,
}

impl Entry {
    /// Creates an entry with only the required fields.
    pub fn new(kind: EntryKind, action: impl Into<Cow<'static, str>>, outcome: Outcome) -> Self {
        Self {
            kind,
            action: action.into(),
            outcome,
            reason: None,
            principal: None,
            mapping: None,
            tenant: None,
            user: None,
            key_name: None,
            record_id: None,
            revision: None,
            wrapping_key: None,
            recipient: None,
            policy: None,
            call_id: None,
            request_id: None,
            peer: None,
            count: None,
            bytes: None,
            client: None,
            grant: None,
            store: None,
            registry: None,
            token: None,
            risks: None,
            digest: None,
            persons: None,
            bitwarden: None,
            device: None,
            cause: None,
        }
    }
}

/// A change that was made, according to its outcome in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The call that made the change.
    pub call: CallId,
    /// Time at which the intent of the change was written.
    pub at: Timestamp,
    /// The action, as in the field `action`.
    pub action: String,
}

/// An entry that records the registry of wrapping keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// Time at which the entry was written.
    pub at: Timestamp,
    /// The field `registry`.
    pub registry: Option<String>,
}

/// An intent without an outcome.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenIntent {
    /// The call whose mutation was interrupted.
    pub call: CallId,
    /// Time at which the intent was written.
    pub at: Timestamp,
    /// The intent, with the principal, the action and the record.
    pub intent: Entry,
}

impl OpenIntent {
    /// Returns the entry that closes the intent, with its principal, action and record.
    pub fn recovered(&self, outcome: Outcome) -> Entry {
        Entry {
            kind: EntryKind::Recovered,
            outcome,
            ..self.intent.clone()
        }
    }
}

/// The reason why the log cannot be written.
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
    /// Tampering was found, and the log stays unavailable until an operator acknowledges the
    /// tampering. The text of the error contains the remedy.
    Latched,
}

impl Error {
    fn new(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            class: Class::Down,
        }
    }

    /// Returns an error about a file of the log that another process has changed, replaced or removed.
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

    /// Adds the remedy to the error: an operator must acknowledge the tampering.
    fn latched(self) -> Self {
        if self.class == Class::Latched {
            return self;
        }
        Self {
            text: format!(
                "{}; no key is released or changed until an operator runs `keybroker audit acknowledge`. Keep the \
                 directory of the audit log unchanged for the auditors",
                self.text
            ),
            class: Class::Latched,
        }
    }

    /// Whether another process has the log open.
    pub fn in_use(&self) -> bool {
        self.class == Class::InUse
    }

    /// Whether the entry may still become durable although its caller got an error.
    pub fn may_appear(&self) -> bool {
        self.class == Class::Slow
    }
}

/// The delay after which a caller may retry while the log is unavailable.
const AUDIT_RETRY: Duration = Duration::from_secs(1);

impl From<Error> for error::Error {
    fn from(error: Error) -> Self {
        Self::new(Reason::AuditDown, error.to_string()).retry_after(AUDIT_RETRY)
    }
}
