//! The store: records, revisions, the wrapping-key registry and request ids in SQL, behind one trait in domain terms.
//!
//! Guarantees, each shown by the conformance suite on every engine: an acknowledged write survives SIGKILL; create never
//! overwrites, and a deleted record keeps its name; replace is compare-and-swap on the revision; a read never rewrites
//! a row; list pages are stable under concurrent writes; a mutation and its request id commit together or not at all.
//!
//! The store never sees key material: only envelopes, as bytes that it does not interpret.
//!
//! Mitigation: M11 of `THREAT_MODEL.md`.

use std::sync::Arc;

mod client;
mod columns;
mod contract;
pub mod copy;
mod dialect;
mod driver_errors;
mod durability;
mod engine;
mod error;
mod identity;
mod listing;
mod mutations;
mod mysql;
mod postgres;
pub mod purge;
mod record;
mod registry;
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
pub use contract::{PAGE_SIZE_MAX, REQUEST_KEPT_US, Store};
pub use error::{Detail, Error};
pub use identity::{CHANGES_MAX, Evidence, KnownLog, StoreId};
pub use listing::{Damage, DamagedClient, DamagedRecord, Position, SKIPPED_MAX};
pub use record::{
    ListQuery, NewRevision, Record, RecordInfo, RecordState, RequestRecord, RequestScope,
    RequestStamp, Stamp, StoredRevision, request_message,
};
pub use registry::RegistryRow;
use schema::Accepted;
pub use schema::{MigrationReport, SchemaStatus};
pub use settings::{Settings, Tls, Url};
pub use sqlite::file::StoreLock;

use mysql::MySqlOrMariaDb;
use postgres::PostgreSql;
use tables::Tables;
use url::Target;

/// Opens a database whose schema is this binary's. A process that changes anything in it must hold the lock of
/// [`lock`].
pub async fn open(settings: &Settings) -> Result<Arc<dyn Store>, Error> {
    Ok(open_whole(settings, Accepted::Own).await?)
}

/// The same, for a broker that serves: the schema may also be that of a later release, if its migrations say that this one can serve.
pub async fn open_to_serve(settings: &Settings) -> Result<Arc<dyn Store>, Error> {
    Ok(open_whole(settings, Accepted::Usable).await?)
}

/// The same, for a command that goes through whole tables. No call's deadline depends on it, so it waits longer.
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

/// Whether a database knows an audit log of an instance, whatever its schema is. A database that does not exist, or whose schema is
/// older than the table, knows none.
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
        Target::Postgres(_) | Target::MySql(_) => Ok(StoreLock::not_needed()),
    }
}
