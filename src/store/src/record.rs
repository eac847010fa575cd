//! Records, their revisions, and what is written with a change.

use keybroker_core::{
    call::{CallId, RequestId, Timestamp},
    envelope::{Mac, mac::MacMessage},
    key::{KeyAddress, KeyName, RecordId, Revision, Tenant, UserId, WrappingKeyId},
};

use super::listing::Position;

/// Whether a record can be unwrapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordState {
    /// It can.
    Active,
    /// It is deleted, and can be undeleted.
    Deleted,
}

impl RecordState {
    /// The name in the database.
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

/// What is known of a record without its envelope.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordInfo {
    /// Where it lives.
    pub address: KeyAddress,
    /// Its identity.
    pub id: RecordId,
    /// Whether it can be unwrapped.
    pub state: RecordState,
    /// Current revision.
    pub revision: Revision,
    /// Wrapping key of the current revision.
    pub wrapping_key: WrappingKeyId,
    /// When it was created.
    pub created: Timestamp,
    /// When it last changed.
    pub updated: Timestamp,
    /// When it was deleted; absent while active.
    pub deleted: Option<Timestamp>,
}

/// A record with its current envelope, as bytes not yet parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// All but the envelope.
    pub info: RecordInfo,
    /// Of the current revision.
    pub envelope: Vec<u8>,
}

/// One revision as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredRevision {
    /// Which.
    pub revision: Revision,
    /// As bytes not yet parsed.
    pub envelope: Vec<u8>,
    /// Wrapping key named in the row.
    pub wrapping_key: WrappingKeyId,
    /// When it was written.
    pub created: Timestamp,
}

/// A revision to be written.
#[derive(Clone, Debug)]
pub struct NewRevision {
    /// Where the record lives.
    pub address: KeyAddress,
    /// Its identity; new at create.
    pub record: RecordId,
    /// [`Revision::FIRST`] at create, else the successor of the revision that the caller believes current.
    pub revision: Revision,
    /// Envelope bytes.
    pub envelope: Vec<u8>,
    /// Wrapping key of the envelope.
    pub wrapping_key: WrappingKeyId,
}

impl NewRevision {
    /// What the store has of a record that was created with this revision at that moment.
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

/// Who changes what when, and under which request id: written in the mutation's own transaction.
#[derive(Clone, Debug)]
pub struct Stamp {
    /// The call, for recovery after a crash.
    pub call: CallId,
    /// The moment of the change.
    pub at: Timestamp,
    /// The client's request id, if it sent one.
    pub request: Option<RequestStamp>,
}

/// A request id with the proof of its content.
#[derive(Clone, Debug)]
pub struct RequestStamp {
    /// Whose request id.
    pub scope: RequestScope,
    /// On-token HMAC over action and content.
    pub content: Mac,
    /// The integrity key that made it.
    pub key: WrappingKeyId,
    /// What the mutation will have done, and the on-token HMAC over it. Nothing is changed when it would do anything else.
    pub result: Option<(RecordInfo, Mac)>,
}

/// A request id is unique per tenant and principal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestScope {
    /// Tenant of the principal.
    pub tenant: Tenant,
    /// Name of the principal.
    pub principal: String,
    /// Chosen by the client.
    pub id: RequestId,
}

/// A request id that was used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestRecord {
    /// On-token HMAC over action and content.
    pub content: Mac,
    /// The integrity key that made it.
    pub key: WrappingKeyId,
    /// On-token HMAC over scope, content and result; absent in a row of a release before schema 4.
    pub result_mac: Option<Mac>,
    /// The record as the mutation left it: what the first answer said, whatever happened since.
    pub result: RecordInfo,
}

/// What the MAC of a stored answer must be over: whose request id, the MAC over its content, and the answer.
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
    /// Whose.
    pub tenant: Tenant,
    /// Only this user's.
    pub user: Option<UserId>,
    /// Deleted ones too.
    pub deleted: bool,
    /// Where the page begins, in the order of the list.
    pub from: Position<(UserId, KeyName)>,
    /// 1 to [`PAGE_SIZE_MAX`](crate::PAGE_SIZE_MAX).
    pub limit: u32,
}
