//! The store of records, revisions, the registry of wrapping keys and request ids. The store uses
//! SQL databases, and its interface is a trait.
//!
//! The store gives these guarantees, which the conformance suite tests on every engine:
//!
//! - An acknowledged write survives SIGKILL.
//!
//! - A create never overwrites a record, and a deleted record keeps its name.
//!
//! - A replace is a compare-and-swap on the revision.
//!
//! - A read never rewrites a row.
//!
//! - List pages are stable under concurrent writes.
//!
//! - A mutation and its request id are committed together or not at all.
//!
//! The store never has access to key material. The store contains envelopes, and does not interpret their bytes.
//!
//! Mitigation: M11 of `THREAT_MODEL.md`.

use std::sync::Arc;

mod approval;
mod client;
mod columns;
mod contract;
pub mod copy;
mod destruction;
mod device;
mod dialect;
mod driver_errors;
mod durability;
mod engine;
mod error;
mod identity;
mod listing;
mod member_key;
mod mutations;
mod mysql;
mod place;
mod postgres;
pub mod purge;
mod record;
mod registry;
mod rewrap;
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

pub use approval::{
    APPROVAL_DOCUMENT_BYTES_MAX, APPROVALS_LISTED_MAX, ApprovalChange, ApprovalCounts,
    ApprovalFilter, ApprovalRow, Approvals, ApprovedClient, DamagedApproval, Decision,
    PERSON_BYTES_MAX, PersonOfPrincipal, RemovedApproval,
};
pub use client::ClientRow;
pub use contract::{PAGE_SIZE_MAX, REQUEST_KEPT_US, Store};
pub use destruction::{
    DestructionChange, DestructionRow, Destructions, FoundDestructions, REQUESTED_BY_BYTES_MAX,
    UnreadableDestruction,
};
pub use device::{
    ACCESS_REQUESTS_LISTED_MAX, ANSWER_FORM_BYTES_MAX, AccessCounts, AccessCursor, AccessDecision,
    AccessQuery, AccessRow, Answer, AskingDevice, Changed, DEVICES_MAX, DamagedAccess,
    DamagedDevice, DeviceAddress, DeviceChange, DeviceMove, DeviceRow, Devices, PEER_BYTES_MAX,
    PendingOnly, Replacement, SealedKeys, TrustedSet,
};
pub use error::{Detail, Error};
pub use identity::{CHANGES_MAX, Evidence, KnownLog, StoreId};
pub use listing::{Damage, DamagedClient, DamagedRecord, Position, SKIPPED_MAX};
pub use member_key::{MEMBER_KEYS_LISTED_MAX, MemberKeyRow, MemberKeys};
pub use place::PlaceRow;
pub use record::{
    ListQuery, NewRevision, Record, RecordInfo, RecordState, RequestRecord, RequestScope,
    RequestStamp, Stamp, StoredRevision, request_message,
};
pub use registry::{PlaceChange, RegistryChange, RegistryRow, RegistryUpdate, SEQUENCE_LIMIT};
pub use rewrap::{
    ClientMove, DOCUMENT_BYTES_MAX as RUN_DOCUMENT_BYTES_MAX, KeyUses, RevisionMove, RevisionPlace,
    RevisionUnder, Rewraps, RowUnder, RunId, RunRow, RunState,
};
use schema::Accepted;
pub use schema::{MigrationReport, SchemaStatus};
pub use settings::{Settings, Tls, Url};
pub use sqlite::file::StoreLock;

use mysql::MySqlOrMariaDb;
use postgres::PostgreSql;
use tables::Tables;
use url::Target;

/// Opens a database that has exactly the schema of this binary. A process that changes the database must hold the lock that
/// [`lock`] returns.
pub async fn open(settings: &Settings) -> Result<Arc<dyn Store>, Error> {
    Ok(open_whole(settings, Accepted::Own).await?)
}

/// Opens a database for a broker that serves. The database may also have the schema of a later
/// release if the migrations of the later release declare that this binary can use the schema.
pub async fn open_to_serve(settings: &Settings) -> Result<Arc<dyn Store>, Error> {
    Ok(open_whole(settings, Accepted::Usable).await?)
}

/// Opens a database for a command that reads complete tables. The time limits are longer than the
/// time limits of a broker, because no call with a deadline waits for the command.
pub async fn open_tables(settings: &Settings) -> Result<Arc<dyn Tables>, Error> {
    open_whole(&settings.for_command(), Accepted::Own).await
}

async fn open_whole(settings: &Settings, accepted: Accepted) -> Result<Arc<dyn Tables>, Error> {
    match settings.target()? {
        Target::Sqlite(path) => sqlite::open(&path, settings, accepted).await,
        Target::Postgres(place) => server::open::<PostgreSql>(settings, &place, accepted).await,
        Target::MySql(place) => server::open::<MySqlOrMariaDb>(settings, &place, accepted).await,
    }
}

/// Migrates a database to the newest schema, or only reports the pending migrations if `dry_run` is true.
pub async fn migrate(settings: &Settings, dry_run: bool) -> Result<MigrationReport, Error> {
    match settings.target()? {
        Target::Sqlite(path) => {
            // A dry run must not create any file, including a lock file.
            let _lock = if dry_run { None } else { Some(lock(settings)?) };
            sqlite::file::migrate(&path, dry_run).await
        }
        Target::Postgres(place) => server::migrate::<PostgreSql>(settings, &place, dry_run).await,
        Target::MySql(place) => server::migrate::<MySqlOrMariaDb>(settings, &place, dry_run).await,
    }
}

/// Whether a database was used with an audit log of an instance. Returns [`KnownLog::None`] if the
/// database or its table of audit logs does not exist.
pub async fn known_audit_log(
    settings: &Settings,
    instance: &str,
    log_id: &str,
) -> Result<KnownLog, Error> {
    match settings.target()? {
        Target::Sqlite(path) => sqlite::file::known_audit_log(&path, instance, log_id).await,
        Target::Postgres(place) => {
            server::known_audit_log::<PostgreSql>(settings, &place, instance, log_id).await
        }
        Target::MySql(place) => {
            server::known_audit_log::<MySqlOrMariaDb>(settings, &place, instance, log_id).await
        }
    }
}

/// Reads the schema version of a database.
pub async fn status(settings: &Settings) -> Result<SchemaStatus, Error> {
    match settings.target()? {
        Target::Sqlite(path) => sqlite::file::status(&path).await,
        Target::Postgres(place) => server::status::<PostgreSql>(settings, &place).await,
        Target::MySql(place) => server::status::<MySqlOrMariaDb>(settings, &place).await,
    }
}

/// Locks an embedded database for this process until the lock is dropped. [`Error::InUse`] names the process that holds the lock.
/// A database on a server needs no lock, because any number of processes may use it.
pub fn lock(settings: &Settings) -> Result<StoreLock, Error> {
    match settings.target()? {
        Target::Sqlite(path) => sqlite::file::lock(&path),
        Target::Postgres(_) | Target::MySql(_) => Ok(StoreLock::not_needed()),
    }
}
