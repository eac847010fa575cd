//! Rows into domain types. A value that does not decode is an error that names its table and column, never a panic and
//! never a record that is missing.

use sqlx::{Row as _, sqlite::SqliteRow};

use crate::{
    call::Timestamp,
    key::{KeyAddress, KeyName, RecordId, Revision, Tenant, UserId, WrappingKeyId},
    store::{Error, RecordInfo, RecordState},
};

fn corrupt(column: &str) -> Error {
    Error::Corrupt(column.to_owned())
}

pub(super) fn bytes(row: &SqliteRow, index: usize, column: &str) -> Result<Vec<u8>, Error> {
    row.try_get(index).map_err(|_| corrupt(column))
}

pub(super) fn array<const N: usize>(
    row: &SqliteRow,
    index: usize,
    column: &str,
) -> Result<[u8; N], Error> {
    let bytes: &[u8] = row.try_get(index).map_err(|_| corrupt(column))?;
    bytes.try_into().map_err(|_| corrupt(column))
}

pub(super) fn text<'r>(row: &'r SqliteRow, index: usize, column: &str) -> Result<&'r str, Error> {
    row.try_get(index).map_err(|_| corrupt(column))
}

pub(super) fn time(row: &SqliteRow, index: usize, column: &str) -> Result<Timestamp, Error> {
    row.try_get(index)
        .map(Timestamp::from_micros)
        .map_err(|_| corrupt(column))
}

pub(super) fn optional_time(
    row: &SqliteRow,
    index: usize,
    column: &str,
) -> Result<Option<Timestamp>, Error> {
    let micros: Option<i64> = row.try_get(index).map_err(|_| corrupt(column))?;
    Ok(micros.map(Timestamp::from_micros))
}

pub(super) fn wrapping_key(row: &SqliteRow, index: usize) -> Result<WrappingKeyId, Error> {
    array(row, index, "wrapping_key_id").map(WrappingKeyId::from_bytes)
}

pub(super) fn positive(row: &SqliteRow, index: usize, column: &str) -> Result<u64, Error> {
    let number: i64 = row.try_get(index).map_err(|_| corrupt(column))?;
    u64::try_from(number).map_err(|_| corrupt(column))
}

pub(super) fn revision(row: &SqliteRow, index: usize) -> Result<Revision, Error> {
    let number = positive(row, index, "records.revision")?;
    Revision::new(number).ok_or_else(|| corrupt("records.revision"))
}

/// Columns 0 to 6: record id, state, revision, created, updated, deleted, wrapping key.
pub(super) fn info(row: &SqliteRow, address: KeyAddress) -> Result<RecordInfo, Error> {
    let state = text(row, 1, "records.state")?;
    Ok(RecordInfo {
        address,
        id: RecordId::from_bytes(array(row, 0, "records.record_id")?),
        state: parse_state(state).ok_or_else(|| corrupt("records.state"))?,
        revision: revision(row, 2)?,
        created: time(row, 3, "records.created_us")?,
        updated: time(row, 4, "records.updated_us")?,
        deleted: optional_time(row, 5, "records.deleted_us")?,
        wrapping_key: wrapping_key(row, 6)?,
    })
}

/// User and key name from two columns.
pub(super) fn address(row: &SqliteRow, index: usize, tenant: Tenant) -> Result<KeyAddress, Error> {
    let user = text(row, index, "records.user")?;
    let name = text(row, index + 1, "records.key_name")?;
    Ok(KeyAddress {
        tenant,
        user: UserId::parse(user).map_err(|_| corrupt("records.user"))?,
        name: KeyName::parse(name).map_err(|_| corrupt("records.key_name"))?,
    })
}

pub(super) const fn state_text(state: RecordState) -> &'static str {
    match state {
        RecordState::Active => "active",
        RecordState::Deleted => "deleted",
    }
}

fn parse_state(text: &str) -> Option<RecordState> {
    [RecordState::Active, RecordState::Deleted]
        .into_iter()
        .find(|state| state_text(*state) == text)
}

/// For a parameter. Revisions and sequences are far below 2^63 by construction.
pub(super) fn number(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
