//! Changes of records, inside a transaction: the same steps on every engine.
//!
//! The mark of the call comes first. Each statement is answered before the next is sent, so once the mark is in,
//! either the transaction holds it until it ends, or nothing that follows was sent: a later insert of the same mark
//! learns for certain what became of the call ([`is_committed`]).

use keybroker_core::{
    call::{CallId, Timestamp},
    key::{RecordId, Revision},
};

use super::{
    Error, NewRevision, REQUEST_KEPT_US, RecordInfo, RecordState, RequestRecord, RequestStamp,
    Stamp, StoreId, rows,
    session::{Session, Value},
    statements::Statements,
    tables::Table,
};

/// What a transaction does to a record.
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

/// The mutation's mark, the change and its request id: all of it or, when this is an error, nothing.
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

/// Creates all of them, without marks.
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

/// A record that cannot change before the transaction ends. Locked by one statement and read by the next: a statement that
/// waits for a lock goes on with the other tables as they were before it waited.
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

async fn insert_request(
    session: &mut impl Session,
    sql: &Statements,
    request: &RequestStamp,
    at: Timestamp,
    info: &RecordInfo,
) -> Result<(), Error> {
    let result_mac = match &request.result {
        // Another change came between.
        Some((expected, _)) if expected != info => return Err(Error::Conflict),
        result => result.as_ref().map(|(_, mac)| *mac),
    };
    // A request that is older than a day no longer counts, whether or not it was cleaned up.
    let mut key = rows::request_key(&request.scope);
    key.push((at.micros() - REQUEST_KEPT_US).into());
    session.execute(sql.forget_request, key).await?;
    let record = RequestRecord {
        content: request.content,
        key: request.key,
        result_mac,
        result: info.clone(),
    };
    let values = rows::new_request(&request.scope, &record, at);
    if insert_unless_taken(session, sql.of(Table::Requests).insert, values).await? {
        Ok(())
    } else {
        Err(Error::RequestIdTaken)
    }
}

/// Removes a record that is still deleted and was so before then, with all of its revisions. Returns whether it was removed.
pub(super) async fn purge(
    session: &mut impl Session,
    sql: &Statements,
    record: RecordId,
    deleted_before: Timestamp,
) -> Result<bool, Error> {
    // It may have become active since it was looked for.
    match locked(session, sql, record).await {
        Ok(current) if current.deleted.is_some_and(|at| at < deleted_before) => {}
        Ok(_) | Err(Error::NotFound | Error::Corrupt(_)) => return Ok(false),
        Err(error) => return Err(error),
    }
    for statement in [sql.delete_use, sql.delete_revisions] {
        session.execute(statement, vec![record.into()]).await?;
    }
    let deleted = session.execute(sql.delete_record, vec![record.into()]);
    expect_one(deleted.await?)?;
    Ok(true)
}

/// Whether a call's mutation was committed, for certain: a transaction that has inserted the mark is waited for, and one
/// that has not can do nothing after it. The caller rolls back.
pub(super) async fn is_committed(
    session: &mut impl Session,
    sql: &Statements,
    call: CallId,
) -> Result<bool, Error> {
    let none = RecordId::from_bytes([0; 16]);
    let mark = rows::new_change(call, none, Timestamp::from_micros(0));
    Ok(!insert_unless_taken(session, sql.insert_change, mark).await?)
}

/// Writes an identity of the database if it has none.
pub(super) async fn ensure_identity(
    session: &mut impl Session,
    sql: &Statements,
) -> Result<(), Error> {
    let values: Vec<Value> = vec![StoreId::fresh().into(), Timestamp::now().into()];
    insert_unless_taken(session, sql.insert_identity, values).await?;
    Ok(())
}

/// Inserts a row, or returns `false` when its key is taken. Most engines can be told to insert nothing then; MySQL cannot without
/// hiding other errors, and reports the duplicate.
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

/// A statement that must have changed one row and did not found the database other than it was a moment ago, under a lock:
/// it is damaged.
pub(super) fn expect_one(affected: u64) -> Result<(), Error> {
    if affected == 1 {
        Ok(())
    } else {
        let what = format!("{affected} rows changed where one had to");
        Err(Error::Corrupt(what.into()))
    }
}
