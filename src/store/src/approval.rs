//! The requests for approval: changes that a second person must approve. The store does not interpret the requested change.

use async_trait::async_trait;

use keybroker_core::{
    approval::ApprovalState,
    call::{CallId, Timestamp},
    envelope::{
        Mac,
        mac::{ApprovalFields, MacMessage},
    },
    key::{ApprovalId, WrappingKeyId},
};

use super::{client::ClientRow, error::Error};

/// Longest requested change, in bytes.
pub const APPROVAL_DOCUMENT_BYTES_MAX: usize = 8_192;
/// Longest name of a person, in bytes.
pub const PERSON_BYTES_MAX: usize = 128;
/// Highest number of requests that one query returns.
pub const APPROVALS_LISTED_MAX: u32 = 200;

/// A principal, and the person to whom it belonged at that time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PersonOfPrincipal {
    /// The name of the person in the configuration, at most [`PERSON_BYTES_MAX`] bytes.
    pub person: String,
    /// The name of the principal.
    pub principal: String,
}

/// The decision about a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Who decided.
    pub by: PersonOfPrincipal,
    /// When.
    pub at: Timestamp,
}

/// A request for approval.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApprovalRow {
    /// The id of the request.
    pub id: ApprovalId,
    /// The wrapping key whose integrity key made the MAC.
    pub signer: WrappingKeyId,
    /// The stored state, which is never [`ApprovalState::Expired`].
    pub state: ApprovalState,
    /// The name of the action.
    pub action: String,
    /// The requested change, as JSON. At most [`APPROVAL_DOCUMENT_BYTES_MAX`] bytes.
    pub document: Vec<u8>,
    /// The digest by which the request is found when the same change is requested again. Only one row has this digest.
    pub digest: [u8; 32],
    /// Who requested the change.
    pub requested_by: PersonOfPrincipal,
    /// When the change was requested.
    pub requested: Timestamp,
    /// When the request expires, unless it was decided or used before.
    pub expires: Timestamp,
    /// The decision; absent for a pending request.
    pub decision: Option<Decision>,
    /// When the change was made; absent before.
    pub used: Option<Timestamp>,
    /// A MAC over all fields above by the integrity key of `signer`, so that a person who can write to the database can neither
    /// approve a request nor change what was approved.
    pub mac: Mac,
}

impl ApprovalRow {
    /// The state at a time: an open request whose time has passed is expired.
    pub fn state_at(&self, now: Timestamp) -> ApprovalState {
        self.state.at(self.expires, now)
    }

    /// The message that the row's MAC must cover.
    pub fn mac_message(&self) -> MacMessage {
        let decided = self.decision.as_ref();
        MacMessage::approval(&ApprovalFields {
            id: self.id,
            signer: self.signer,
            state: self.state,
            action: &self.action,
            document: &self.document,
            digest: &self.digest,
            requested_by: &self.requested_by.principal,
            requested_person: &self.requested_by.person,
            requested_us: self.requested.micros(),
            expires_us: self.expires.micros(),
            decided_by: decided.map_or("", |decision| &decision.by.principal),
            decided_person: decided.map_or("", |decision| &decision.by.person),
            decided_us: decided.map(|decision| decision.at.micros()),
            used_us: self.used.map(Timestamp::micros),
        })
    }
}

/// The next state of a request. The change is refused unless the stored row still has the expected MAC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApprovalChange {
    /// The row after the change.
    pub row: ApprovalRow,
    /// The MAC of the row before the change.
    pub expected: Mac,
}

/// Which requests are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApprovalFilter {
    /// The requests that are pending or approved and expire after this time. Includes rows whose state is none that a broker writes.
    OpenAt(Timestamp),
    /// All requests.
    All,
    /// The request with this id.
    One(ApprovalId),
}

/// The number of requests of one person that have not expired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApprovalCounts {
    /// Requests that are pending or approved.
    pub open: u64,
    /// All requests, also those that were rejected or used.
    pub unexpired: u64,
}

/// A request that is removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RemovedApproval {
    /// The row as it was read. The row is removed only if it still has this state and this MAC.
    AsRead(Box<ApprovalRow>),
    /// A row that cannot be decoded.
    Unreadable(ApprovalId),
}

/// A row that cannot be decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DamagedApproval {
    /// The id of the request, if it can be read.
    pub id: Option<ApprovalId>,
    /// The column that cannot be decoded.
    pub detail: String,
}

/// A change of an API client that uses an approval.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApprovedClient {
    /// The API client is new.
    New,
    /// The API client has another document.
    Changed,
}

/// The operations of a store for requests for approval. [`RegistryChange`](crate::RegistryChange) uses an approval together with a
/// change of the registry.
#[async_trait]
pub trait Approvals: Send + Sync {
    /// Returns the newest of the wanted requests, at most [`APPROVALS_LISTED_MAX`], newest first. A row that cannot be decoded does
    /// not end the list.
    async fn approvals(
        &self,
        wanted: ApprovalFilter,
    ) -> Result<Vec<Result<ApprovalRow, DamagedApproval>>, Error>;

    /// Returns the request with this id.
    async fn approval(&self, id: ApprovalId) -> Result<Option<ApprovalRow>, Error>;

    /// Returns the request with this digest.
    async fn approval_of(&self, digest: &[u8; 32]) -> Result<Option<ApprovalRow>, Error>;

    /// Counts the requests of a person that have not expired at a time.
    async fn count_approvals(&self, person: &str, now: Timestamp) -> Result<ApprovalCounts, Error>;

    /// Adds a request, and stores the mark of the call. `replaces` is the MAC of an earlier request with the same digest, which is
    /// removed. Returns [`Error::Conflict`] if the earlier request was changed meanwhile, and [`Error::Exists`] if another request
    /// has this digest.
    async fn request_approval(
        &self,
        row: &ApprovalRow,
        replaces: Option<&Mac>,
        call: CallId,
    ) -> Result<(), Error>;

    /// Changes the state of a request, and stores the mark of the call. Returns [`Error::Conflict`] if the request was changed
    /// meanwhile.
    async fn decide_approval(
        &self,
        change: &ApprovalChange,
        call: CallId,
        at: Timestamp,
    ) -> Result<(), Error>;

    /// Removes a request, and stores the mark of the call. Returns [`Error::Conflict`] if the request was changed or removed
    /// meanwhile, and [`Error::NotFound`] if there is no unreadable row with this id.
    async fn remove_approval(
        &self,
        removed: &RemovedApproval,
        call: CallId,
        at: Timestamp,
    ) -> Result<(), Error>;

    /// Adds or changes an API client and uses an approval in one transaction, which also stores the mark of the call. Returns
    /// [`Error::Conflict`] if the request was changed meanwhile, and otherwise the same errors as
    /// [`insert_client`](crate::Store::insert_client) and [`update_client`](crate::Store::update_client).
    async fn change_approved_client(
        &self,
        kind: ApprovedClient,
        row: &ClientRow,
        approval: &ApprovalChange,
        call: CallId,
    ) -> Result<(), Error>;

    /// Removes the requests that expired before a time, and returns their number.
    async fn forget_approvals(&self, before: Timestamp) -> Result<u64, Error>;

    /// Returns the number of requests that expired before a time.
    async fn old_approvals(&self, before: Timestamp) -> Result<u64, Error>;
}
