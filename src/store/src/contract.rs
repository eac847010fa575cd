//! What the rest of the program asks of a store: SQL in domain terms.

use std::{collections::HashMap, fmt};

use async_trait::async_trait;

use keybroker_core::{
    call::{CallId, Timestamp},
    envelope::Mac,
    key::{ClientId, KeyAddress, RecordId, Revision, Tenant, UserId},
};

use super::{
    client::ClientRow,
    error::Error,
    identity::{Evidence, KnownLog},
    listing::{DamagedClient, DamagedRecord, Position},
    record::{
        ListQuery, NewRevision, Record, RecordInfo, RequestRecord, RequestScope, Stamp,
        StoredRevision,
    },
    registry::RegistryRow,
};

/// How long a request id is remembered, in microseconds: 24 hours.
pub const REQUEST_KEPT_US: i64 = 24 * 3_600 * 1_000_000;

/// Records per page at most.
pub const PAGE_SIZE_MAX: u32 = 1_000;

/// SQL in domain terms. Every call with more than one statement runs in a separate task, so that a caller that ends its call
/// cannot leave a transaction unfinished (cancel safety).
#[async_trait]
pub trait Store: Send + Sync + fmt::Debug + 'static {
    /// Answers when the store can be read and written.
    async fn ping(&self) -> Result<(), Error>;

    /// The record at an address, active or deleted, with its current envelope.
    async fn record(&self, address: &KeyAddress) -> Result<Option<Record>, Error>;

    /// One revision's envelope, current or superseded.
    async fn revision(
        &self,
        record: RecordId,
        revision: Revision,
    ) -> Result<Option<StoredRevision>, Error>;

    /// Inserts a record at [`Revision::FIRST`]. [`Error::Exists`] when the address is taken, also by a deleted record.
    async fn create(&self, new: NewRevision, stamp: Stamp) -> Result<RecordInfo, Error>;

    /// Inserts many records in one transaction: all of them or, when an address is taken ([`Error::Exists`]), none.
    /// They have no mark of a call: use it to fill a database, not for a mutation with an intent.
    async fn create_many(&self, new: Vec<NewRevision>, at: Timestamp) -> Result<(), Error>;

    /// Makes `new` the current revision of an active record: a replace, or the restore of an earlier revision.
    /// [`Error::Revision`] unless `new.revision` is the successor of the current one.
    async fn supersede(&self, new: NewRevision, stamp: Stamp) -> Result<RecordInfo, Error>;

    /// Marks an active record at that revision deleted. [`Error::Revision`] when it has moved on, [`Error::State`] when
    /// it is deleted already.
    async fn delete(
        &self,
        record: RecordId,
        expected: Revision,
        stamp: Stamp,
    ) -> Result<RecordInfo, Error>;

    /// Makes a deleted record active. [`Error::State`] when it is active already.
    async fn undelete(&self, record: RecordId, stamp: Stamp) -> Result<RecordInfo, Error>;

    /// How many records a user has, deleted ones too; counted up to `most`.
    async fn count_keys(&self, tenant: &Tenant, user: &UserId, most: u32) -> Result<u32, Error>;

    /// How many revisions of a record are stored; counted up to `most`.
    async fn count_revisions(&self, record: RecordId, most: u32) -> Result<u32, Error>;

    /// One page of records ordered by user, then key name, bytewise. A row that does not decode, or that was set back to an
    /// earlier revision, is listed as damaged and does not end the page.
    async fn list(
        &self,
        query: &ListQuery,
    ) -> Result<Vec<Result<RecordInfo, DamagedRecord>>, Error>;

    /// What an earlier mutation with that request id did, within the last 24 hours.
    async fn request(&self, scope: &RequestScope) -> Result<Option<RequestRecord>, Error>;

    /// What a mutation's call left in the store: for intents that have no outcome after a crash.
    async fn committed_by(&self, call: CallId) -> Result<bool, Error>;

    /// The identity of the database, and how many of these changes (at most [`CHANGES_MAX`](crate::CHANGES_MAX)) left
    /// their mark in it. A plain read: it waits for no transaction, and does not cover a change that is still in
    /// progress.
    async fn evidence(&self, calls: &[CallId]) -> Result<Evidence, Error>;

    /// Whether the database was used with this audit log of an instance.
    async fn audit_log(&self, instance: &str, log_id: &str) -> Result<KnownLog, Error>;

    /// Records that the database is used with this audit log of an instance.
    async fn add_audit_log(&self, instance: &str, log_id: &str, at: Timestamp)
    -> Result<(), Error>;

    /// Forgets request ids older than 24 hours; returns how many.
    async fn forget_requests(&self, before: Timestamp) -> Result<u64, Error>;

    /// Notes when records were last released: apart from their rows, which no read rewrites. A later time that is known stays.
    async fn note_uses(&self, uses: &[(RecordId, Timestamp)]) -> Result<(), Error>;

    /// When records were last released, of those of which it is known. A row that does not decode is left out and raises an alert.
    async fn last_uses(&self, records: &[RecordId]) -> Result<HashMap<RecordId, Timestamp>, Error>;

    /// All registry rows, by sequence.
    async fn registry(&self) -> Result<Vec<RegistryRow>, Error>;

    /// Adds a registry row. [`Error::Exists`] when the id is registered.
    async fn register(&self, row: &RegistryRow) -> Result<(), Error>;

    /// Replaces a registry row if its MAC is still `expected`. [`Error::Conflict`] otherwise.
    async fn update_registry(&self, row: &RegistryRow, expected: &Mac) -> Result<(), Error>;

    /// An API client.
    async fn client(&self, id: ClientId) -> Result<Option<ClientRow>, Error>;

    /// API clients from a position on, by id, bytewise; at most `limit`, which is 1 to [`PAGE_SIZE_MAX`]. A row that does not
    /// decode is listed as damaged and does not end the page.
    async fn clients(
        &self,
        from: &Position<ClientId>,
        limit: u32,
    ) -> Result<Vec<Result<ClientRow, DamagedClient>>, Error>;

    /// Adds an API client, with the mark of the call. [`Error::Exists`] when the id is taken.
    async fn insert_client(&self, row: &ClientRow, call: CallId) -> Result<(), Error>;

    /// Replaces the document of an API client, with the mark of the call if there is one; what is stored of its creation
    /// stays. [`Error::Conflict`] unless the stored revision is the one before `row.revision`.
    async fn update_client(&self, row: &ClientRow, call: Option<CallId>) -> Result<(), Error>;

    /// Notes when secrets of clients were last accepted, by their numbers: apart from the documents, which no read rewrites.
    /// A later time that is known stays.
    async fn note_client_uses(&self, uses: &[(ClientId, u32, Timestamp)]) -> Result<(), Error>;

    /// When each secret of a client was last accepted, by number, of those of which it is known. A row that does not decode is
    /// left out and raises an alert.
    async fn client_uses(&self, id: ClientId) -> Result<Vec<(u32, Timestamp)>, Error>;

    /// Closes every connection; later calls fail.
    async fn close(&self);
}
