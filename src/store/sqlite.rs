//! SQLite: the embedded default, for one instance.
//!
//! One connection writes, several read. WAL with `synchronous = FULL`: a commit that was acknowledged survives power loss
//! (NORMAL may lose the last ones). Writes begin with `BEGIN IMMEDIATE`: a transaction that reads first and writes then
//! would fail at once when another wrote between. Each runs in a task of its own, so that a caller that goes away cannot
//! leave a transaction open on a pooled connection.

use std::{path::Path, sync::Arc, time::Duration};

use async_trait::async_trait;
use sqlx::{
    Connection as _, Sqlite, SqlitePool, Transaction,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};
use tokio_util::task::TaskTracker;

use crate::{
    call::{CallId, Timestamp},
    envelope::Mac,
    key::{KeyAddress, RecordId, Revision, UserId},
};

use super::{
    Error, ListQuery, NewRevision, Record, RecordInfo, RegistryRow, RequestRecord, RequestScope,
    Stamp, Store, StoredRevision,
};

mod mutations;
mod registry;
mod rows;
pub(super) mod schema;

const READERS: u32 = 4;
/// Shorter than any call's deadline, so that a store that hangs is an error and not a pile of waiting calls.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(2);
const BUSY_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a request id is remembered, in microseconds: 24 hours.
const REQUEST_KEPT_US: i64 = 24 * 3_600 * 1_000_000;

const SELECT_RECORD: &str = "SELECT r.record_id, r.state, r.revision, r.created_us, r.updated_us, \
     r.deleted_us, v.wrapping_key_id, v.envelope FROM records r LEFT JOIN revisions v \
     ON v.record_id = r.record_id AND v.revision = r.revision \
     WHERE r.tenant = ?1 AND r.user = ?2 AND r.key_name = ?3";

const SELECT_REVISION: &str =
    "SELECT wrapping_key_id, envelope FROM revisions WHERE record_id = ?1 AND revision = ?2";

const SELECT_PAGE: &str = "SELECT r.record_id, r.state, r.revision, r.created_us, r.updated_us, \
     r.deleted_us, v.wrapping_key_id, r.user, r.key_name FROM records r LEFT JOIN revisions v \
     ON v.record_id = r.record_id AND v.revision = r.revision \
     WHERE r.tenant = ?1 AND (r.user, r.key_name) > (?2, ?3) AND (?4 IS NULL OR r.user = ?4) \
     AND (?5 OR r.state = 'active') ORDER BY r.user, r.key_name LIMIT ?6";

const SELECT_REQUEST: &str = "SELECT record_id, state, revision, created_us, updated_us, deleted_us, \
     wrapping_key_id, user, key_name, content_mac, key_id FROM requests \
     WHERE tenant = ?1 AND principal = ?2 AND request_id = ?3 AND used_us > ?4";

/// A SQLite database file.
#[derive(Debug)]
pub(super) struct SqliteStore {
    writer: SqlitePool,
    reader: SqlitePool,
    /// Transactions under way, which outlive their callers.
    transactions: TaskTracker,
}

fn options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(BUSY_TIMEOUT)
        .foreign_keys(true)
        .pragma("trusted_schema", "OFF")
        .create_if_missing(false)
}

/// The one connection that writes. It stays open: reopening would check out the WAL again and again.
pub(super) fn writer(path: &Path) -> SqlitePool {
    SqlitePoolOptions::new()
        .max_connections(1)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .idle_timeout(None)
        .max_lifetime(None)
        // When the disk is full SQLite itself rolls back, the driver's ROLLBACK fails, and the connection would count as
        // inside a transaction for ever. Such a connection is replaced.
        .before_acquire(|connection, _| Box::pin(async { Ok(!connection.is_in_transaction()) }))
        .connect_lazy_with(options(path))
}

impl SqliteStore {
    /// Opens a database whose schema is this binary's.
    pub(super) async fn open(path: &Path) -> Result<Arc<Self>, Error> {
        schema::check_file(path)?;
        let writer = writer(path);
        schema::require_current(&writer).await?;
        let reader = SqlitePoolOptions::new()
            .max_connections(READERS)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .idle_timeout(None)
            .max_lifetime(None)
            .test_before_acquire(false)
            .connect_lazy_with(options(path).read_only(true));
        Ok(Arc::new(Self {
            writer,
            reader,
            transactions: TaskTracker::new(),
        }))
    }

    /// Runs a transaction in a task of its own, to its commit or its rollback.
    async fn transact<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        match self.transactions.spawn(work).await {
            Ok(result) => result,
            Err(panic) => Err(Error::Down(format!("a transaction failed: {panic}").into())),
        }
    }
}

async fn begin(pool: &SqlitePool) -> Result<Transaction<'static, Sqlite>, Error> {
    Ok(pool.begin_with("BEGIN IMMEDIATE").await?)
}

#[async_trait]
impl Store for SqliteStore {
    async fn ping(&self) -> Result<(), Error> {
        let pool = self.writer.clone();
        self.transact(async move {
            // Takes the write lock and gives it back: a file that became read-only shows here, not at the next create.
            let mut tx = begin(&pool).await?;
            sqlx::query("DELETE FROM changes WHERE call_id IS NULL")
                .execute(&mut *tx)
                .await?;
            Ok(tx.rollback().await?)
        })
        .await
    }

    async fn record(&self, address: &KeyAddress) -> Result<Option<Record>, Error> {
        let row = sqlx::query(SELECT_RECORD)
            .bind(address.tenant.as_str())
            .bind(address.user.as_str())
            .bind(address.name.as_str())
            .fetch_optional(&self.reader)
            .await?;
        row.map(|row| {
            Ok(Record {
                info: rows::info(&row, address.clone())?,
                envelope: rows::bytes(&row, 7, "revisions.envelope")?,
            })
        })
        .transpose()
    }

    async fn revision(
        &self,
        record: RecordId,
        revision: Revision,
    ) -> Result<Option<StoredRevision>, Error> {
        let row = sqlx::query(SELECT_REVISION)
            .bind(record.as_bytes().as_slice())
            .bind(rows::number(revision.get()))
            .fetch_optional(&self.reader)
            .await?;
        row.map(|row| {
            Ok(StoredRevision {
                revision,
                wrapping_key: rows::wrapping_key(&row, 0)?,
                envelope: rows::bytes(&row, 1, "revisions.envelope")?,
            })
        })
        .transpose()
    }

    async fn create(&self, new: NewRevision, stamp: Stamp) -> Result<RecordInfo, Error> {
        let pool = self.writer.clone();
        self.transact(async move {
            let mut tx = begin(&pool).await?;
            let info = mutations::create(&mut tx, &new, &stamp).await?;
            mutations::finish(tx, &stamp, info).await
        })
        .await
    }

    async fn supersede(&self, new: NewRevision, stamp: Stamp) -> Result<RecordInfo, Error> {
        let pool = self.writer.clone();
        self.transact(async move {
            let mut tx = begin(&pool).await?;
            let info = mutations::supersede(&mut tx, &new, &stamp).await?;
            mutations::finish(tx, &stamp, info).await
        })
        .await
    }

    async fn delete(
        &self,
        record: RecordId,
        expected: Revision,
        stamp: Stamp,
    ) -> Result<RecordInfo, Error> {
        let pool = self.writer.clone();
        self.transact(async move {
            let mut tx = begin(&pool).await?;
            let info = mutations::delete(&mut tx, record, expected, &stamp).await?;
            mutations::finish(tx, &stamp, info).await
        })
        .await
    }

    async fn undelete(&self, record: RecordId, stamp: Stamp) -> Result<RecordInfo, Error> {
        let pool = self.writer.clone();
        self.transact(async move {
            let mut tx = begin(&pool).await?;
            let info = mutations::undelete(&mut tx, record, &stamp).await?;
            mutations::finish(tx, &stamp, info).await
        })
        .await
    }

    async fn list(&self, query: &ListQuery) -> Result<Vec<RecordInfo>, Error> {
        let after = query.after.as_ref();
        let found = sqlx::query(SELECT_PAGE)
            .bind(query.tenant.as_str())
            // No user is empty, so the empty one comes before all.
            .bind(after.map_or("", |(user, _)| user.as_str()))
            .bind(after.map_or("", |(_, name)| name.as_str()))
            .bind(query.user.as_ref().map(UserId::as_str))
            .bind(query.deleted)
            .bind(query.limit)
            .fetch_all(&self.reader)
            .await?;
        found
            .iter()
            .map(|row| rows::info(row, rows::address(row, 7, query.tenant.clone())?))
            .collect()
    }

    async fn request(&self, scope: &RequestScope) -> Result<Option<RequestRecord>, Error> {
        let row = sqlx::query(SELECT_REQUEST)
            .bind(scope.tenant.as_str())
            .bind(scope.principal.as_str())
            .bind(scope.id.as_bytes().as_slice())
            .bind(Timestamp::now().micros() - REQUEST_KEPT_US)
            .fetch_optional(&self.reader)
            .await?;
        row.map(|row| {
            Ok(RequestRecord {
                result: rows::info(&row, rows::address(&row, 7, scope.tenant.clone())?)?,
                content: rows::array(&row, 9, "requests.content_mac")?,
                key: rows::wrapping_key(&row, 10)?,
            })
        })
        .transpose()
    }

    async fn committed_by(&self, call: CallId) -> Result<bool, Error> {
        let row = sqlx::query("SELECT 1 FROM changes WHERE call_id = ?1")
            .bind(call.as_bytes().as_slice())
            .fetch_optional(&self.reader)
            .await?;
        Ok(row.is_some())
    }

    async fn forget_requests(&self, before: Timestamp) -> Result<u64, Error> {
        let pool = self.writer.clone();
        self.transact(async move {
            let done = sqlx::query("DELETE FROM requests WHERE used_us < ?1")
                .bind(before.micros())
                .execute(&pool)
                .await?;
            Ok(done.rows_affected())
        })
        .await
    }

    async fn registry(&self) -> Result<Vec<RegistryRow>, Error> {
        registry::all(&self.reader).await
    }

    async fn register(&self, row: &RegistryRow) -> Result<(), Error> {
        let (pool, row) = (self.writer.clone(), row.clone());
        self.transact(async move { registry::insert(begin(&pool).await?, &row).await })
            .await
    }

    async fn update_registry(&self, row: &RegistryRow, expected: &Mac) -> Result<(), Error> {
        let (pool, row, expected) = (self.writer.clone(), row.clone(), *expected);
        self.transact(async move { registry::update(&pool, &row, &expected).await })
            .await
    }

    async fn close(&self) {
        self.transactions.close();
        self.transactions.wait().await;
        self.reader.close().await;
        self.writer.close().await;
    }
}
