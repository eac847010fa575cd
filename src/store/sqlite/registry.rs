//! The registry of wrapping keys.

use sqlx::{Sqlite, SqlitePool, Transaction, sqlite::SqliteRow};

use crate::{
    call::Timestamp,
    envelope::Mac,
    key::{Fingerprint, Purpose, WrappingKeyId, WrappingKeyState},
    store::{Error, RegistryRow},
};

use super::rows;

pub(super) async fn all(pool: &SqlitePool) -> Result<Vec<RegistryRow>, Error> {
    let found = sqlx::query(
        "SELECT key_id, fingerprint, purpose, state, token_serial, sequence, registered_us, \
         backup_confirmed_us, mac FROM wrapping_keys ORDER BY sequence, key_id",
    )
    .fetch_all(pool)
    .await?;
    found.iter().map(decode).collect()
}

fn decode(row: &SqliteRow) -> Result<RegistryRow, Error> {
    let corrupt = |column: &str| Error::Corrupt(format!("wrapping_keys.{column}"));
    let purpose = rows::text(row, 2, "wrapping_keys.purpose")?;
    let state = rows::text(row, 3, "wrapping_keys.state")?;
    Ok(RegistryRow {
        id: WrappingKeyId::from_bytes(rows::array(row, 0, "wrapping_keys.key_id")?),
        fingerprint: Fingerprint(rows::array(row, 1, "wrapping_keys.fingerprint")?),
        purpose: Purpose::parse(purpose).ok_or_else(|| corrupt("purpose"))?,
        state: WrappingKeyState::parse(state).ok_or_else(|| corrupt("state"))?,
        token_serial: rows::text(row, 4, "wrapping_keys.token_serial")?.to_owned(),
        sequence: rows::positive(row, 5, "wrapping_keys.sequence")?,
        registered: rows::time(row, 6, "wrapping_keys.registered_us")?,
        backup_confirmed: rows::optional_time(row, 7, "wrapping_keys.backup_confirmed_us")?,
        mac: rows::array(row, 8, "wrapping_keys.mac")?,
    })
}

pub(super) async fn insert(
    mut tx: Transaction<'static, Sqlite>,
    row: &RegistryRow,
) -> Result<(), Error> {
    let inserted = sqlx::query(
        "INSERT INTO wrapping_keys (key_id, fingerprint, purpose, state, token_serial, sequence, \
         registered_us, backup_confirmed_us, mac) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9) \
         ON CONFLICT (key_id) DO NOTHING",
    )
    .bind(row.id.as_bytes().as_slice())
    .bind(row.fingerprint.0.as_slice())
    .bind(row.purpose.as_str())
    .bind(row.state.as_str())
    .bind(row.token_serial.as_str())
    .bind(rows::number(row.sequence))
    .bind(row.registered.micros())
    .bind(row.backup_confirmed.map(Timestamp::micros))
    .bind(row.mac.as_slice())
    .execute(&mut *tx)
    .await?;
    if inserted.rows_affected() == 0 {
        return Err(Error::Exists);
    }
    Ok(tx.commit().await?)
}

pub(super) async fn update(
    pool: &SqlitePool,
    row: &RegistryRow,
    expected: &Mac,
) -> Result<(), Error> {
    let updated = sqlx::query(
        "UPDATE wrapping_keys SET fingerprint = ?2, purpose = ?3, state = ?4, token_serial = ?5, \
         sequence = ?6, registered_us = ?7, backup_confirmed_us = ?8, mac = ?9 \
         WHERE key_id = ?1 AND mac = ?10",
    )
    .bind(row.id.as_bytes().as_slice())
    .bind(row.fingerprint.0.as_slice())
    .bind(row.purpose.as_str())
    .bind(row.state.as_str())
    .bind(row.token_serial.as_str())
    .bind(rows::number(row.sequence))
    .bind(row.registered.micros())
    .bind(row.backup_confirmed.map(Timestamp::micros))
    .bind(row.mac.as_slice())
    .bind(expected.as_slice())
    .execute(pool)
    .await?;
    if updated.rows_affected() == 1 {
        Ok(())
    } else {
        Err(Error::Conflict)
    }
}
