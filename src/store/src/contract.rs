//! The interface of the store for the rest of the program, in terms of records and keys instead of
//! SQL.

use std::{collections::HashMap, fmt};

use async_trait::async_trait;

use keybroker_core::{
    call::{CallId, Timestamp},
    envelope::Mac,
    key::{ClientId, KeyAddress, RecordId, Revision, Tenant, UserId},
};

use super::{
    approval::Approvals,
    client::ClientRow,
    destruction::Destructions,
    device::Devices,
    error::Error,
    identity::{Evidence, KnownLog},
    listing::{DamagedClient, DamagedRecord, Position},
    place::PlaceRow,
    record::{
        ListQuery, NewRevision, Record, RecordInfo, RequestRecord, RequestScope, Stamp,
        StoredRevision,
    },
    registry::{RegistryChange, RegistryRow},
    rewrap::Rewraps,
};

/// The time for which a request id is remembered, in microseconds: 24 hours.
pub const REQUEST_KEPT_US: i64 = 24 * 3_600 * 1_000_000;

/// Highest number of records per page.
pub const PAGE_SIZE_MAX: u32 = 1_000;

/// The operations of the store. Each function that sends more than one statement runs in a separate task, so that a caller that
/// stops waiting cannot leave a transaction unfinished (cancel safety).
#[async_trait]
pub trait Store: Rewraps + Destructions + Approvals + Devices + fmt::Debug + 'static {
    /// Succeeds if the store can be read and written.
    async fn ping(&self) -> Result<(), Error>;

    /// Returns the active or deleted record at an address, with its current envelope.
    async fn record(&self, address: &KeyAddress) -> Result<Option<Record>, Error>;

    /// Returns the envelope of a current or superseded revision.
    async fn revision(
        &self,
        record: RecordId,
        revision: Revision,
    ) -> Result<Option<StoredRevision>, Error>;

    /// Inserts a record at [`Revision::FIRST`]. Returns [`Error::Exists`] if an active or deleted record has the address.
    async fn create(&self, new: NewRevision, stamp: Stamp) -> Result<RecordInfo, Error>;

    /// Inserts all records in one transaction. If an address is taken, the function inserts no
    /// record and returns [`Error::Exists`]. The function stores no marks of calls. Use this
    /// function only to fill a database. Do not use this function for a mutation that has an intent
    /// in the audit log.
    async fn create_many(&self, new: Vec<NewRevision>, at: Timestamp) -> Result<(), Error>;

    /// Makes `new` the current revision of an active record, to replace the user key or to restore an earlier revision. Returns
    /// [`Error::Revision`] unless `new.revision` is the successor of the current revision.
    async fn supersede(&self, new: NewRevision, stamp: Stamp) -> Result<RecordInfo, Error>;

    /// Marks an active record at the expected revision as deleted. Returns [`Error::Revision`] if the record has another
    /// revision, and [`Error::State`] if the record is already deleted.
    async fn delete(
        &self,
        record: RecordId,
        expected: Revision,
        stamp: Stamp,
    ) -> Result<RecordInfo, Error>;

    /// Makes a deleted record active. Returns [`Error::State`] if the record is already active.
    async fn undelete(&self, record: RecordId, stamp: Stamp) -> Result<RecordInfo, Error>;

    /// Returns the number of records of a user, including deleted records, counted up to `most`.
    async fn count_keys(&self, tenant: &Tenant, user: &UserId, most: u32) -> Result<u32, Error>;

    /// Returns the number of stored revisions of a record, counted up to `most`.
    async fn count_revisions(&self, record: RecordId, most: u32) -> Result<u32, Error>;

    /// Returns one page of records, ordered bytewise by user and then by key name. A row that
    /// cannot be decoded, or that was set back to an earlier revision, is listed as damaged and
    /// does not end the page.
    async fn list(
        &self,
        query: &ListQuery,
    ) -> Result<Vec<Result<RecordInfo, DamagedRecord>>, Error>;

    /// Returns the result of an earlier mutation with the request id in `scope`, within the last 24
    /// hours.
    async fn request(&self, scope: &RequestScope) -> Result<Option<RequestRecord>, Error>;

    /// Returns whether the mutation of a call was committed. The broker uses the result to resolve
    /// intents that have no outcome after a crash.
    async fn committed_by(&self, call: CallId) -> Result<bool, Error>;

    /// Returns the identity of the database, and the number of calls in `calls` (at most
    /// [`CHANGES_MAX`](crate::CHANGES_MAX)) whose mark is in the database. The function does not
    /// wait for transactions, and does not count a change that is still in progress.
    async fn evidence(&self, calls: &[CallId]) -> Result<Evidence, Error>;

    /// Whether the database was used with the audit log `log_id` of an instance.
    async fn audit_log(&self, instance: &str, log_id: &str) -> Result<KnownLog, Error>;

    /// Records that the database is used with the audit log `log_id` of an instance.
    async fn add_audit_log(&self, instance: &str, log_id: &str, at: Timestamp)
    -> Result<(), Error>;

    /// Removes the request ids that were used before the time `before`, and returns the number of
    /// removed request ids.
    async fn forget_requests(&self, before: Timestamp) -> Result<u64, Error>;

    /// Stores the times at which records were last released. The times are in a separate table,
    /// because a read must not rewrite the row of a record. If the stored time is later, it is not
    /// changed.
    async fn note_uses(&self, uses: &[(RecordId, Timestamp)]) -> Result<(), Error>;

    /// Returns the times at which records were last released. Records without a known time are
    /// omitted. A row that cannot be decoded is left out and raises an alert.
    async fn last_uses(&self, records: &[RecordId]) -> Result<HashMap<RecordId, Timestamp>, Error>;

    /// Returns all registry rows, ordered by sequence.
    async fn registry(&self) -> Result<Vec<RegistryRow>, Error>;

    /// Adds a registry row. Returns [`Error::Exists`] if the id is already registered.
    async fn register(&self, row: &RegistryRow) -> Result<(), Error>;

    /// Adds and replaces registry rows in one transaction, and stores the mark of the call. Returns
    /// [`Error::Conflict`] if the MAC of a replaced row is not the expected MAC or if a row needs the key that no row may
    /// need, and
    /// [`Error::Exists`] if the new row's id is registered. If the function returns
    /// [`Error::Conflict`] or [`Error::Exists`], the registry is unchanged.
    async fn change_registry(
        &self,
        change: &RegistryChange,
        call: CallId,
        at: Timestamp,
    ) -> Result<(), Error>;

    /// Replaces a registry row if its MAC is still `expected`. Returns [`Error::Conflict`] if the MAC is different.
    async fn update_registry(&self, row: &RegistryRow, expected: &Mac) -> Result<(), Error>;

    /// Returns all rows of wrapping keys on further tokens, ordered by key and token.
    async fn places(&self) -> Result<Vec<PlaceRow>, Error>;

    /// Returns the rows that describe wrapping keys on further tokens. For a row that cannot be decoded, returns a
    /// description of the damage. A broker can therefore use the undamaged rows.
    async fn readable_places(&self) -> Result<(Vec<PlaceRow>, Vec<String>), Error>;

    /// Adds a place. Returns [`Error::Exists`] if the key already has a place on this token.
    async fn add_place(&self, row: &PlaceRow) -> Result<(), Error>;

    /// Replaces the row of a wrapping key on a further token if its MAC is still `expected`.
    /// Returns [`Error::Conflict`] if the MAC is different.
    async fn update_place(&self, row: &PlaceRow, expected: &Mac) -> Result<(), Error>;

    /// Returns the API client with the id `id`.
    async fn client(&self, id: ClientId) -> Result<Option<ClientRow>, Error>;

    /// Returns at most `limit` API clients, beginning at a position, ordered bytewise by id. The
    /// limit is 1 to [`PAGE_SIZE_MAX`]. A row that cannot be decoded is listed as damaged and does
    /// not end the page.
    async fn clients(
        &self,
        from: &Position<ClientId>,
        limit: u32,
    ) -> Result<Vec<Result<ClientRow, DamagedClient>>, Error>;

    /// Adds an API client, and stores the mark of the call. Returns [`Error::Exists`] if the id is taken.
    async fn insert_client(&self, row: &ClientRow, call: CallId) -> Result<(), Error>;

    /// Replaces the document of an API client, and stores the mark of the call if `call` is present. The stored time of creation
    /// does not change. Returns [`Error::Conflict`] unless `row.revision` is the successor of the stored revision.
    async fn update_client(&self, row: &ClientRow, call: Option<CallId>) -> Result<(), Error>;

    /// Stores the times at which secrets of API clients were last accepted. The second element of
    /// each tuple is the number of the secret. The times are in a separate table, because a read
    /// must not rewrite a document. If the stored time is later, it is not changed.
    async fn note_client_uses(&self, uses: &[(ClientId, u32, Timestamp)]) -> Result<(), Error>;

    /// Returns the numbers of a client's secrets, each with the time at which the secret was last
    /// accepted. Secrets without a known time are omitted. A row that cannot be decoded is left out
    /// and raises an alert.
    async fn client_uses(&self, id: ClientId) -> Result<Vec<(u32, Timestamp)>, Error>;

    /// Closes every connection. Later calls fail.
    async fn close(&self);
}
