//! Records, their revisions, and the data that is written with a change.

use keybroker_core::{
    call::{CallId, RequestId, Timestamp},
    envelope::{Mac, mac::MacMessage},
    key::{KeyAddress, KeyName, RecordId, Revision, Tenant, UserId, WrappingKeyId},
};

use super::listing::Position;

/// Whether a record can be unwrapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordState {
    /// The record can be unwrapped.
    Active,
    /// The record is deleted, and can be undeleted.
    Deleted,
}

impl RecordState {
    /// The name of the state in the database.
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Deleted => "deleted",
        }
    }

    pub(super) fn parse(name: &str) -> Option<Self> {
        [Self::Active, Self::Deleted]
            .into_iter()
            .find(|state| state.as_str() == name)
    }
}

/// The stored data of a record without its envelope.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordInfo {
    /// The address of the record.
    pub address: KeyAddress,
    /// The id of the record.
    pub id: RecordId,
    /// Whether the record can be unwrapped.
    pub state: RecordState,
    /// Current revision.
    pub revision: Revision,
    /// Wrapping key of the current revision.
    pub wrapping_key: WrappingKeyId,
    /// The time at which the record was created.
    pub created: Timestamp,
    /// The time of the last change of the record.
    pub updated: Timestamp,
    /// The time at which the record was deleted; absent for an active record.
    pub deleted: Option<Timestamp>,
}

/// A record with its current envelope, as bytes that are not parsed yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The record without its envelope.
    pub info: RecordInfo,
    /// The envelope of the current revision.
    pub envelope: Vec<u8>,
}

/// One revision as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredRevision {
    /// The number of the revision.
    pub revision: Revision,
    /// The envelope as bytes that are not parsed yet.
    pub envelope: Vec<u8>,
    /// The id of the wrapping key that the row contains.
    pub wrapping_key: WrappingKeyId,
    /// The time at which the revision was written.
    pub created: Timestamp,
}

/// A revision to be written.
#[derive(Clone, Debug)]
pub struct NewRevision {
    /// The address of the record.
    pub address: KeyAddress,
    /// The id of the record; each create uses a new id.
    pub record: RecordId,
    /// For a create, the revision is [`Revision::FIRST`]. For a change, the revision is the successor of the revision that the
    /// caller expects to be current.
    pub revision: Revision,
    /// Envelope bytes.
    pub envelope: Vec<u8>,
    /// Wrapping key of the envelope.
    pub wrapping_key: WrappingKeyId,
}

impl NewRevision {
    /// Returns the data of the record that is stored if `self` creates the record at the time `at`.
    pub fn record_info(&self, at: Timestamp) -> RecordInfo {
        RecordInfo {
            address: self.address.clone(),
            id: self.record,
            state: RecordState::Active,
            revision: self.revision,
            wrapping_key: self.wrapping_key,
            created: at,
            updated: at,
            deleted: None,
        }
    }
}

/// The call, time and request id of a change, which are written in the transaction of the change.
#[derive(Clone, Debug)]
pub struct Stamp {
    /// The id of the call, for recovery after a crash.
    pub call: CallId,
    /// The time of the change.
    pub at: Timestamp,
    /// The request id, if the client sent one.
    pub request: Option<RequestStamp>,
}

/// A request id with the MAC over the content of the request.
#[derive(Clone, Debug)]
pub struct RequestStamp {
    /// The scope in which the request id is unique.
    pub scope: RequestScope,
    /// The MAC with the integrity key over the action and the content of the request.
    pub content: Mac,
    /// The wrapping key whose integrity key made the MAC.
    pub key: WrappingKeyId,
    /// The expected result of the mutation, and the MAC over this result. If the actual result is
    /// different, nothing is changed.
    pub result: Option<(RecordInfo, Mac)>,
}

/// A request id is unique per tenant and principal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestScope {
    /// Tenant of the principal.
    pub tenant: Tenant,
    /// Name of the principal.
    pub principal: String,
    /// The request id that the client chose.
    pub id: RequestId,
}

/// A used request id, with the result of its mutation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestRecord {
    /// The MAC with the integrity key over the action and the content of the request.
    pub content: Mac,
    /// The wrapping key whose integrity key made the MAC.
    pub key: WrappingKeyId,
    /// The MAC with the integrity key over scope, content and result; absent in a row that was
    /// written before schema 4.
    pub result_mac: Option<Mac>,
    /// The state of the record immediately after the mutation, which is also the content of the
    /// first answer. Later changes of the record do not affect this value.
    pub result: RecordInfo,
}

/// Returns the message that the MAC of a stored answer must cover. The message consists of the
/// scope of the request id, the MAC over the content of the request, and the answer.
pub fn request_message(scope: &RequestScope, content: &Mac, result: &RecordInfo) -> MacMessage {
    let deleted = result.deleted.map(|at| at.micros().to_be_bytes());
    MacMessage::request_result(&[
        scope.tenant.as_str().as_bytes(),
        scope.principal.as_bytes(),
        scope.id.as_bytes(),
        content,
        result.address.tenant.as_str().as_bytes(),
        result.address.user.as_str().as_bytes(),
        result.address.name.as_str().as_bytes(),
        result.id.as_bytes(),
        result.state.as_str().as_bytes(),
        &result.revision.get().to_be_bytes(),
        result.wrapping_key.as_bytes(),
        &result.created.micros().to_be_bytes(),
        &result.updated.micros().to_be_bytes(),
        deleted.as_ref().map_or(&[], |at| at.as_slice()),
    ])
}

/// Which records to list.
#[derive(Clone, Debug)]
pub struct ListQuery {
    /// The tenant of the records.
    pub tenant: Tenant,
    /// The user whose records are listed; `None` for all users.
    pub user: Option<UserId>,
    /// Whether deleted records are included.
    pub deleted: bool,
    /// The start of the page, in the order of the list.
    pub from: Position<(UserId, KeyName)>,
    /// Highest number of records: 1 to [`PAGE_SIZE_MAX`](crate::PAGE_SIZE_MAX).
    pub limit: u32,
}
