//! Changes of records inside a transaction that holds the write lock from its beginning: what is read here cannot change
//! before the commit.

use sqlx::{Sqlite, SqliteConnection, Transaction};

use crate::{
    call::Timestamp,
    key::{KeyAddress, RecordId, Revision, Tenant},
    store::{Error, NewRevision, RecordInfo, RecordState, RequestStamp, Stamp},
};

use super::{REQUEST_KEPT_US, rows};

const SELECT_BY_ID: &str = "SELECT r.record_id, r.state, r.revision, r.created_us, r.updated_us, \
     r.deleted_us, v.wrapping_key_id, r.user, r.key_name, r.tenant FROM records r LEFT JOIN \
     revisions v ON v.record_id = r.record_id AND v.revision = r.revision WHERE r.record_id = ?1";

pub(super) async fn create(
    tx: &mut SqliteConnection,
    new: &NewRevision,
    stamp: &Stamp,
) -> Result<RecordInfo, Error> {
    let KeyAddress { tenant, user, name } = &new.address;
    let taken =
        sqlx::query("SELECT 1 FROM records WHERE tenant = ?1 AND user = ?2 AND key_name = ?3")
            .bind(tenant.as_str())
            .bind(user.as_str())
            .bind(name.as_str())
            .fetch_optional(&mut *tx)
            .await?;
    if taken.is_some() {
        return Err(Error::Exists);
    }
    let at = stamp.at.micros();
    let inserted = sqlx::query(
        "INSERT INTO records (record_id, tenant, user, key_name, state, revision, created_us, \
         updated_us) VALUES (?1, ?2, ?3, ?4, 'active', ?5, ?6, ?6)",
    )
    .bind(new.record.as_bytes().as_slice())
    .bind(tenant.as_str())
    .bind(user.as_str())
    .bind(name.as_str())
    .bind(rows::number(new.revision.get()))
    .bind(at)
    .execute(&mut *tx)
    .await?;
    expect_one(inserted.rows_affected())?;
    insert_revision(tx, new, stamp).await?;
    by_id(tx, new.record).await
}

pub(super) async fn supersede(
    tx: &mut SqliteConnection,
    new: &NewRevision,
    stamp: &Stamp,
) -> Result<RecordInfo, Error> {
    let current = by_id(tx, new.record).await?;
    if current.state != RecordState::Active {
        return Err(Error::State);
    }
    if current.revision.next() != new.revision || current.address != new.address {
        return Err(Error::Revision {
            current: current.revision,
        });
    }
    let updated = sqlx::query(
        "UPDATE records SET revision = ?2, updated_us = ?3 WHERE record_id = ?1 AND revision = ?4",
    )
    .bind(new.record.as_bytes().as_slice())
    .bind(rows::number(new.revision.get()))
    .bind(stamp.at.micros())
    .bind(rows::number(current.revision.get()))
    .execute(&mut *tx)
    .await?;
    expect_one(updated.rows_affected())?;
    insert_revision(tx, new, stamp).await?;
    by_id(tx, new.record).await
}

async fn insert_revision(
    tx: &mut SqliteConnection,
    new: &NewRevision,
    stamp: &Stamp,
) -> Result<(), Error> {
    let inserted = sqlx::query(
        "INSERT INTO revisions (record_id, revision, envelope, wrapping_key_id, created_us) \
         VALUES (?1, ?2, ?3, ?4, ?5)",
    )
    .bind(new.record.as_bytes().as_slice())
    .bind(rows::number(new.revision.get()))
    .bind(new.envelope.as_slice())
    .bind(new.wrapping_key.as_bytes().as_slice())
    .bind(stamp.at.micros())
    .execute(&mut *tx)
    .await?;
    expect_one(inserted.rows_affected())
}

pub(super) async fn delete(
    tx: &mut SqliteConnection,
    record: RecordId,
    expected: Revision,
    stamp: &Stamp,
) -> Result<RecordInfo, Error> {
    let current = by_id(tx, record).await?;
    if current.state != RecordState::Active {
        return Err(Error::State);
    }
    if current.revision != expected {
        return Err(Error::Revision {
            current: current.revision,
        });
    }
    set_state(tx, record, RecordState::Deleted, stamp).await
}

pub(super) async fn undelete(
    tx: &mut SqliteConnection,
    record: RecordId,
    stamp: &Stamp,
) -> Result<RecordInfo, Error> {
    let current = by_id(tx, record).await?;
    if current.state != RecordState::Deleted {
        return Err(Error::State);
    }
    set_state(tx, record, RecordState::Active, stamp).await
}

async fn set_state(
    tx: &mut SqliteConnection,
    record: RecordId,
    state: RecordState,
    stamp: &Stamp,
) -> Result<RecordInfo, Error> {
    let at = stamp.at.micros();
    let updated = sqlx::query(
        "UPDATE records SET state = ?2, updated_us = ?3, deleted_us = ?4 WHERE record_id = ?1",
    )
    .bind(record.as_bytes().as_slice())
    .bind(rows::state_text(state))
    .bind(at)
    .bind((state == RecordState::Deleted).then_some(at))
    .execute(&mut *tx)
    .await?;
    expect_one(updated.rows_affected())?;
    by_id(tx, record).await
}

async fn by_id(tx: &mut SqliteConnection, record: RecordId) -> Result<RecordInfo, Error> {
    let row = sqlx::query(SELECT_BY_ID)
        .bind(record.as_bytes().as_slice())
        .fetch_optional(&mut *tx)
        .await?
        .ok_or(Error::NotFound)?;
    let tenant = rows::text(&row, 9, "records.tenant")?;
    let tenant = Tenant::parse(tenant).map_err(|_| Error::Corrupt("records.tenant".to_owned()))?;
    rows::info(&row, rows::address(&row, 7, tenant)?)
}

/// The mutation's mark and its request id, then the commit: all of it or nothing.
pub(super) async fn finish(
    mut tx: Transaction<'static, Sqlite>,
    stamp: &Stamp,
    info: RecordInfo,
) -> Result<RecordInfo, Error> {
    let marked =
        sqlx::query("INSERT INTO changes (call_id, record_id, changed_us) VALUES (?1, ?2, ?3)")
            .bind(stamp.call.as_bytes().as_slice())
            .bind(info.id.as_bytes().as_slice())
            .bind(stamp.at.micros())
            .execute(&mut *tx)
            .await?;
    expect_one(marked.rows_affected())?;
    if let Some(request) = &stamp.request {
        insert_request(&mut tx, request, stamp, &info).await?;
    }
    tx.commit().await?;
    Ok(info)
}

async fn insert_request(
    tx: &mut SqliteConnection,
    request: &RequestStamp,
    stamp: &Stamp,
    info: &RecordInfo,
) -> Result<(), Error> {
    let scope = &request.scope;
    let at = stamp.at.micros();
    // One that is older than a day does not count any more, whether or not it was cleaned up.
    sqlx::query(
        "DELETE FROM requests WHERE tenant = ?1 AND principal = ?2 AND request_id = ?3 \
         AND used_us <= ?4",
    )
    .bind(scope.tenant.as_str())
    .bind(scope.principal.as_str())
    .bind(scope.id.as_bytes().as_slice())
    .bind(at - REQUEST_KEPT_US)
    .execute(&mut *tx)
    .await?;
    let inserted = sqlx::query(
        "INSERT INTO requests (tenant, principal, request_id, content_mac, key_id, record_id, \
         user, key_name, state, revision, wrapping_key_id, created_us, updated_us, deleted_us, \
         used_us) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15) \
         ON CONFLICT (tenant, principal, request_id) DO NOTHING",
    )
    .bind(scope.tenant.as_str())
    .bind(scope.principal.as_str())
    .bind(scope.id.as_bytes().as_slice())
    .bind(request.content.as_slice())
    .bind(request.key.as_bytes().as_slice())
    .bind(info.id.as_bytes().as_slice())
    .bind(info.address.user.as_str())
    .bind(info.address.name.as_str())
    .bind(rows::state_text(info.state))
    .bind(rows::number(info.revision.get()))
    .bind(info.wrapping_key.as_bytes().as_slice())
    .bind(info.created.micros())
    .bind(info.updated.micros())
    .bind(info.deleted.map(Timestamp::micros))
    .bind(at)
    .execute(&mut *tx)
    .await?;
    if inserted.rows_affected() == 1 {
        Ok(())
    } else {
        Err(Error::RequestIdTaken)
    }
}

/// A statement that must have changed one row and did not found the database other than it was a moment ago, under the
/// write lock: the file is damaged.
fn expect_one(affected: u64) -> Result<(), Error> {
    if affected == 1 {
        Ok(())
    } else {
        Err(Error::Corrupt(format!(
            "{affected} rows changed where one had to"
        )))
    }
}
