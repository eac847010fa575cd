//! Changes of records inside a transaction, with the same steps on every engine.
//!
//! A transaction inserts the mark of its call first, and sends each further statement only after
//! the answer to the previous statement. Therefore a transaction without a mark has changed nothing
//! and has sent no commit. To find out with certainty whether a call was committed,
//! [`is_committed`] inserts the same mark. The insert waits for a transaction that has already
//! inserted the mark.

use keybroker_core::{
    call::{CallId, Timestamp},
    key::{ID_BYTES, RecordId, Revision},
};

use super::{
    Error, NewRevision, REQUEST_KEPT_US, RecordInfo, RecordState, RequestRecord, RequestStamp,
    Stamp, StoreId,
    error::Detail,
    rows,
    session::{Session, Value},
    statements::Statements,
    tables::Table,
};

/// A change that a transaction makes to a record.
#[derive(Clone, Debug)]
pub(super) enum Change {
    Create(NewRevision),
    Supersede(NewRevision),
    Delete(RecordId, Revision),
    Undelete(RecordId),
}

impl Change {
    fn record(&self) -> RecordId {
        match self {
            Self::Create(new) | Self::Supersede(new) => new.record,
            Self::Delete(record, _) | Self::Undelete(record) => *record,
        }
    }
}

/// Writes the mark, the change and the request id of a mutation. If the function returns an error, the caller must roll back the
/// transaction.
pub(super) async fn apply(
    session: &mut impl Session,
    sql: &Statements,
    change: &Change,
    stamp: &Stamp,
) -> Result<RecordInfo, Error> {
    let mark = rows::new_change(stamp.call, change.record(), stamp.at);
    expect_one(session.execute(sql.insert_change, mark).await?)?;
    let info = match change {
        Change::Create(new) => create(session, sql, new, stamp.at).await?,
        Change::Supersede(new) => supersede(session, sql, new, stamp.at).await?,
        Change::Delete(record, expected) => {
            delete(session, sql, *record, *expected, stamp.at).await?
        }
        Change::Undelete(record) => undelete(session, sql, *record, stamp.at).await?,
    };
    if let Some(request) = &stamp.request {
        insert_request(session, sql, request, stamp.at, &info).await?;
    }
    Ok(info)
}

/// Creates all records, without marks of calls.
pub(super) async fn create_many(
    session: &mut impl Session,
    sql: &Statements,
    new: &[NewRevision],
    at: Timestamp,
) -> Result<(), Error> {
    for new in new {
        create(session, sql, new, at).await?;
    }
    Ok(())
}

async fn create(
    session: &mut impl Session,
    sql: &Statements,
    new: &NewRevision,
    at: Timestamp,
) -> Result<RecordInfo, Error> {
    let values = rows::new_record(new, at);
    if !insert_unless_taken(session, sql.of(Table::Records).insert, values).await? {
        return Err(Error::Exists);
    }
    insert_revision(session, sql, new, at).await?;
    Ok(new.record_info(at))
}

async fn supersede(
    session: &mut impl Session,
    sql: &Statements,
    new: &NewRevision,
    at: Timestamp,
) -> Result<RecordInfo, Error> {
    let current = locked(session, sql, new.record).await?;
    if current.state != RecordState::Active {
        return Err(Error::State);
    }
    if current.revision.next() != new.revision || current.address != new.address {
        return Err(Error::Revision {
            current: current.revision,
        });
    }
    let values = vec![
        new.revision.into(),
        at.into(),
        new.record.into(),
        current.revision.into(),
    ];
    expect_one(session.execute(sql.advance_record, values).await?)?;
    insert_revision(session, sql, new, at).await?;
    Ok(RecordInfo {
        revision: new.revision,
        wrapping_key: new.wrapping_key,
        updated: at,
        ..current
    })
}

async fn insert_revision(
    session: &mut impl Session,
    sql: &Statements,
    new: &NewRevision,
    at: Timestamp,
) -> Result<(), Error> {
    let values = rows::new_revision(new, at);
    expect_one(session.execute(sql.insert_revision, values).await?)
}

async fn delete(
    session: &mut impl Session,
    sql: &Statements,
    record: RecordId,
    expected: Revision,
    at: Timestamp,
) -> Result<RecordInfo, Error> {
    let current = locked(session, sql, record).await?;
    if current.state != RecordState::Active {
        return Err(Error::State);
    }
    if current.revision != expected {
        return Err(Error::Revision {
            current: current.revision,
        });
    }
    set_state(session, sql, current, RecordState::Deleted, at).await
}

async fn undelete(
    session: &mut impl Session,
    sql: &Statements,
    record: RecordId,
    at: Timestamp,
) -> Result<RecordInfo, Error> {
    let current = locked(session, sql, record).await?;
    if current.state != RecordState::Deleted {
        return Err(Error::State);
    }
    set_state(session, sql, current, RecordState::Active, at).await
}

async fn set_state(
    session: &mut impl Session,
    sql: &Statements,
    current: RecordInfo,
    state: RecordState,
    at: Timestamp,
) -> Result<RecordInfo, Error> {
    let deleted = (state == RecordState::Deleted).then_some(at);
    let values = vec![
        state.as_str().into(),
        at.into(),
        deleted.into(),
        current.id.into(),
    ];
    expect_one(session.execute(sql.set_state, values).await?)?;
    Ok(RecordInfo {
        state,
        updated: at,
        deleted,
        ..current
    })
}

/// Locks a record, so that it cannot change before the transaction ends. One statement locks the
/// record, and the next statement reads the record. A single statement that waits for the lock
/// would read the other tables in their state before the wait.
async fn locked(
    session: &mut impl Session,
    sql: &Statements,
    record: RecordId,
) -> Result<RecordInfo, Error> {
    if let Some(lock) = sql.lock_record {
        session.rows(lock, vec![record.into()]).await?;
    }
    let found = session.rows(sql.record_by_id, vec![record.into()]).await?;
    rows::info(found.first().ok_or(Error::NotFound)?)
}

/// Inserts the mark of a call that changes devices. `record` is the record of the devices, if it is known.
pub(super) async fn mark(
    session: &mut impl Session,
    sql: &Statements,
    call: CallId,
    record: Option<RecordId>,
    at: Timestamp,
) -> Result<(), Error> {
    let record = record.unwrap_or(RecordId::from_bytes([0; ID_BYTES]));
    let mark = rows::new_change(call, record, at);
    expect_one(session.execute(sql.insert_change, mark).await?)
}

/// Locks a record, and requires that it is active and has a revision.
pub(super) async fn require_revision(
    session: &mut impl Session,
    sql: &Statements,
    record: RecordId,
    expected: Revision,
) -> Result<(), Error> {
    let current = locked(session, sql, record).await?;
    if current.state != RecordState::Active {
        return Err(Error::State);
    }
    if current.revision != expected {
        return Err(Error::Revision {
            current: current.revision,
        });
    }
    Ok(())
}

async fn insert_request(
    session: &mut impl Session,
    sql: &Statements,
    request: &RequestStamp,
    at: Timestamp,
    info: &RecordInfo,
) -> Result<(), Error> {
    let (result, result_mac) = match &request.result {
        // Another change was committed after the expected result was computed.
        Some((expected, _)) if !is_same_change(expected, info) => return Err(Error::Conflict),
        Some((expected, mac)) => (expected, Some(*mac)),
        None => (info, None),
    };
    // A request id that is older than a day is ignored, even if it is still stored.
    let mut key = rows::request_key(&request.scope);
    key.push((at.micros() - REQUEST_KEPT_US).into());
    session.execute(sql.forget_request, key).await?;
    let record = RequestRecord {
        content: request.content,
        key: request.key,
        result_mac,
        result: result.clone(),
    };
    let values = rows::new_request(&request.scope, &record, at);
    if insert_unless_taken(session, sql.of(Table::Requests).insert, values).await? {
        Ok(())
    } else {
        Err(Error::RequestIdTaken)
    }
}

/// Whether a result is the expected result, apart from the wrapping key. A re-wrap may have moved
/// the current revision to another wrapping key after the expected result was computed. The
/// expected result is stored, because the token has already made the MAC of the expected result.
fn is_same_change(expected: &RecordInfo, info: &RecordInfo) -> bool {
    let moved = RecordInfo {
        wrapping_key: info.wrapping_key,
        ..expected.clone()
    };
    moved == *info
}

/// Removes a record with all its revisions, the devices that open its user key, and the requests for it, if the record was deleted before the time `before` and
/// is still deleted. Returns whether the record was removed.
pub(super) async fn purge(
    session: &mut impl Session,
    sql: &Statements,
    record: RecordId,
    deleted_before: Timestamp,
) -> Result<bool, Error> {
    // The record may have been undeleted after the purge found it.
    let current = match locked(session, sql, record).await {
        Ok(current) if current.deleted.is_some_and(|at| at < deleted_before) => current,
        Ok(_) | Err(Error::NotFound | Error::Corrupt(_)) => return Ok(false),
        Err(error) => return Err(error),
    };
    let address = &current.address;
    let of_key = vec![
        address.tenant.as_str().into(),
        address.user.as_str().into(),
        address.name.as_str().into(),
    ];
    for statement in [sql.device.remove_of_key, sql.device.remove_requests_of_key] {
        session.execute(statement, of_key.clone()).await?;
    }
    for statement in [sql.delete_use, sql.delete_revisions] {
        session.execute(statement, vec![record.into()]).await?;
    }
    let deleted = session.execute(sql.delete_record, vec![record.into()]);
    expect_one(deleted.await?)?;
    Ok(true)
}

/// Returns with certainty whether the mutation of a call was committed. The function inserts the
/// mark of the call, and waits for a transaction that has already inserted this mark. A transaction
/// that has not yet inserted the mark has changed nothing and has sent no commit. The caller must
/// roll back the transaction of the insert.
pub(super) async fn is_committed(
    session: &mut impl Session,
    sql: &Statements,
    call: CallId,
) -> Result<bool, Error> {
    let none = RecordId::from_bytes([0; 16]);
    let mark = rows::new_change(call, none, Timestamp::from_micros(0));
    Ok(!insert_unless_taken(session, sql.insert_change, mark).await?)
}

/// Writes an identity if the database has no identity.
pub(super) async fn ensure_identity(
    session: &mut impl Session,
    sql: &Statements,
) -> Result<(), Error> {
    let values: Vec<Value> = vec![StoreId::fresh().into(), Timestamp::now().into()];
    insert_unless_taken(session, sql.insert_identity, values).await?;
    Ok(())
}

/// Inserts a row, or returns `false` if a row with the same key exists. Most engines can skip the
/// insert if a row with the same key exists. On MySQL, an insert that skips an existing key would
/// also hide other errors, so MySQL reports the duplicate key.
pub(super) async fn insert_unless_taken(
    session: &mut impl Session,
    statement: &'static str,
    values: Vec<Value>,
) -> Result<bool, Error> {
    match session.execute(statement, values).await {
        Ok(inserted) => Ok(inserted == 1),
        Err(error) if is_taken(&error) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn is_taken(error: &sqlx::Error) -> bool {
    error
        .as_database_error()
        .is_some_and(sqlx::error::DatabaseError::is_unique_violation)
}

/// Requires that a statement changed exactly one row. The transaction has locked this row, so any other number of changed rows
/// means that the database is damaged.
pub(super) fn expect_one(affected: u64) -> Result<(), Error> {
    if affected == 1 {
        Ok(())
    } else {
        let what = format!("a statement changed {affected} rows instead of one");
        Err(Error::Corrupt(
            Detail::from(what).remedy("run `keybroker store check`"),
        ))
    }
}
