//! The store: records, revisions, the wrapping-key registry and request ids in SQL, behind one trait in domain terms.
//!
//! Guarantees, each shown by the conformance suite on every engine: an acknowledged write survives SIGKILL; create never
//! overwrites, and a deleted record keeps its name; replace is compare-and-swap on the revision; a read never rewrites
//! a row; list pages are stable under concurrent writes; a mutation and its request id commit together or not at all.
//!
//! The store never sees key material: only envelopes, as bytes that it does not interpret.
//!
//! Mitigation: M11 of `THREAT_MODEL.md`.

use std::{collections::HashMap, fmt, fs::File, sync::Arc};

use async_trait::async_trait;

use keybroker_core::{
    call::{CallId, RequestId, Timestamp},
    envelope::{
        Mac,
        mac::{MacMessage, RegistryFields},
    },
    key::{
        ClientId, Fingerprint, KeyAddress, KeyName, Purpose, RecordId, Revision, Tenant, UserId,
        WrappingKeyId, WrappingKeyState,
    },
};

mod client;
mod columns;
pub mod copy;
mod dialect;
mod durability;
mod engine;
mod error;
mod identity;
mod listing;
mod mutations;
mod mysql;
mod postgres;
pub mod purge;
mod rows;
pub mod scan;
mod schema;
mod server;
mod session;
mod settings;
mod slow;
mod socket;
mod sqlite;
mod statements;
pub mod tables;
pub mod tally;
mod url;

pub use client::ClientRow;
pub use error::Error;
pub use identity::{CHANGES_MAX, Evidence, KnownLog, StoreId};
pub use listing::{Damage, DamagedClient, DamagedRecord, Position, SKIPPED_MAX};
pub use schema::{MigrationReport, SchemaStatus};
pub use settings::{Settings, Tls, Url};

use mysql::MySqlOrMariaDb;
use postgres::PostgreSql;
use tables::Tables;
use url::Target;

/// Opens a database whose schema is this binary's. A process that changes anything in it must hold the lock of
/// [`lock`].
pub async fn open(settings: &Settings) -> Result<Arc<dyn Store>, Error> {
    Ok(open_whole(settings).await?)
}

/// The same, for a command that goes through whole tables. No call's deadline depends on it, so it waits longer.
pub async fn open_tables(settings: &Settings) -> Result<Arc<dyn Tables>, Error> {
    open_whole(&settings.patient()).await
}

async fn open_whole(settings: &Settings) -> Result<Arc<dyn Tables>, Error> {
    match settings.target()? {
        Target::Sqlite(path) => sqlite::open(&path, settings).await,
        Target::Postgres(place) => server::open::<PostgreSql>(settings, &place).await,
        Target::MySql(place) => server::open::<MySqlOrMariaDb>(settings, &place).await,
    }
}

/// Brings a database to the newest schema, or with `dry_run` says what that would do.
pub async fn migrate(settings: &Settings, dry_run: bool) -> Result<MigrationReport, Error> {
    match settings.target()? {
        Target::Sqlite(path) => {
            // A dry run leaves nothing behind, not even a lock file.
            let _lock = if dry_run { None } else { Some(lock(settings)?) };
            sqlite::file::migrate(&path, dry_run).await
        }
        Target::Postgres(place) => server::migrate::<PostgreSql>(settings, &place, dry_run).await,
        Target::MySql(place) => server::migrate::<MySqlOrMariaDb>(settings, &place, dry_run).await,
    }
}

/// The schema of a database.
pub async fn status(settings: &Settings) -> Result<SchemaStatus, Error> {
    match settings.target()? {
        Target::Sqlite(path) => sqlite::file::status(&path).await,
        Target::Postgres(place) => server::status::<PostgreSql>(settings, &place).await,
        Target::MySql(place) => server::status::<MySqlOrMariaDb>(settings, &place).await,
    }
}

/// Takes an embedded database for this process alone, until the lock is dropped. [`Error::InUse`] names the process that
/// has it. A database on a server is for any number of processes.
pub fn lock(settings: &Settings) -> Result<StoreLock, Error> {
    match settings.target()? {
        Target::Sqlite(path) => sqlite::file::lock(&path),
        Target::Postgres(_) | Target::MySql(_) => Ok(StoreLock { _file: None }),
    }
}

/// Holds an embedded database for one process.
#[derive(Debug)]
pub struct StoreLock {
    _file: Option<File>,
}

/// Records per page at most.
pub const PAGE_SIZE_MAX: u32 = 1_000;

/// SQL in domain terms. Every call with more than one statement runs in a task of its own, so that a caller that goes
/// away cannot leave a transaction half way (cancel safety).
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

    /// The identity of the database, and how many of these changes (at most [`CHANGES_MAX`]) left their mark in it. A plain read: it
    /// waits for no transaction, and says nothing of a change that is still under way.
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

/// Whether a record can be unwrapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordState {
    /// It can.
    Active,
    /// It is deleted, and can be undeleted.
    Deleted,
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
        rows::state_text(result.state).as_bytes(),
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
    /// 1 to [`PAGE_SIZE_MAX`].
    pub limit: u32,
}

/// One wrapping key as SQL knows it. The public key is not here: it always comes from the token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegistryRow {
    /// `CKA_ID`.
    pub id: WrappingKeyId,
    /// Of the public key.
    pub fingerprint: Fingerprint,
    /// What the key is for.
    pub purpose: Purpose,
    /// SP 800-57 state.
    pub state: WrappingKeyState,
    /// Serial number of the token that holds it.
    pub token_serial: String,
    /// Grows with each change of a state in the registry; the active key with the highest wraps.
    pub sequence: u64,
    /// When it was registered.
    pub registered: Timestamp,
    /// When a backup of its token was confirmed.
    pub backup_confirmed: Option<Timestamp>,
    /// By the key's own integrity key over all of the above, so that a writer of the database cannot turn
    /// `compromised` back into `active`.
    pub mac: Mac,
}

impl RegistryRow {
    /// What the row's MAC must be over.
    pub fn mac_message(&self) -> MacMessage {
        MacMessage::registry(&RegistryFields {
            id: self.id,
            fingerprint: self.fingerprint,
            purpose: self.purpose,
            state: self.state,
            token_serial: &self.token_serial,
            sequence: self.sequence,
            registered_us: self.registered.micros(),
            backup_confirmed_us: self.backup_confirmed.map(Timestamp::micros),
        })
    }
}
