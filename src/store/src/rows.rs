//! Rows into domain types, the same for every engine. A value that does not decode is an error that names its table and
//! column, never a panic and never a record that is missing.

use keybroker_core::{
    call::{CallId, RequestId, Timestamp},
    client_credential::DOCUMENT_BYTES_MAX,
    envelope::Mac,
    key::{
        ClientId, Fingerprint, KeyAddress, KeyName, Purpose, RecordId, Revision, Tenant, UserId,
        WrappingKeyId, WrappingKeyState,
    },
    metrics,
};

use super::{
    ClientRow, Damage, DamagedClient, DamagedRecord, Error, RecordInfo, RecordState, RegistryRow,
    RequestRecord, RequestScope,
    session::Columns,
    tables::{Head, RevisionRow},
};

/// A serial number has 16 bytes in PKCS#11, each at most three in a text. A longer one no token has, and no MAC covers.
const TOKEN_SERIAL_BYTES_MAX: usize = 48;

fn corrupt(column: &str) -> Error {
    Error::Corrupt(column.to_owned())
}

pub(super) fn bytes(row: &impl Columns, index: usize, column: &str) -> Result<Vec<u8>, Error> {
    let bytes = row.bytes(index).map_err(|_| corrupt(column))?;
    Ok(bytes.to_vec())
}

pub(super) fn array<const N: usize>(
    row: &impl Columns,
    index: usize,
    column: &str,
) -> Result<[u8; N], Error> {
    let bytes = row.bytes(index).map_err(|_| corrupt(column))?;
    bytes.try_into().map_err(|_| corrupt(column))
}

/// A MAC, or nothing in a row that was written before there was one.
pub(super) fn optional_mac(
    row: &impl Columns,
    index: usize,
    column: &str,
) -> Result<Option<Mac>, Error> {
    if bytes(row, index, column)?.is_empty() {
        return Ok(None);
    }
    array(row, index, column).map(Some)
}

fn text<'r>(row: &'r impl Columns, index: usize, column: &str) -> Result<&'r str, Error> {
    row.text(index).map_err(|_| corrupt(column))
}

fn time(row: &impl Columns, index: usize, column: &str) -> Result<Timestamp, Error> {
    row.integer(index)
        .map(Timestamp::from_micros)
        .map_err(|_| corrupt(column))
}

fn optional_time(
    row: &impl Columns,
    index: usize,
    column: &str,
) -> Result<Option<Timestamp>, Error> {
    let micros = row.optional_integer(index).map_err(|_| corrupt(column))?;
    Ok(micros.map(Timestamp::from_micros))
}

pub(super) fn wrapping_key(row: &impl Columns, index: usize) -> Result<WrappingKeyId, Error> {
    array(row, index, "wrapping_key_id").map(WrappingKeyId::from_bytes)
}

fn positive(row: &impl Columns, index: usize, column: &str) -> Result<u64, Error> {
    let number = row.integer(index).map_err(|_| corrupt(column))?;
    u64::try_from(number).map_err(|_| corrupt(column))
}

fn revision_number(row: &impl Columns, index: usize, column: &str) -> Result<Revision, Error> {
    Revision::new(positive(row, index, column)?).ok_or_else(|| corrupt(column))
}

/// Columns 0 to 6: record id, state, revision, created, updated, deleted, wrapping key.
pub(super) fn info(row: &impl Columns, address: KeyAddress) -> Result<RecordInfo, Error> {
    let state = text(row, 1, "records.state")?;
    Ok(RecordInfo {
        address,
        id: RecordId::from_bytes(array(row, 0, "records.record_id")?),
        state: parse_state(state).ok_or_else(|| corrupt("records.state"))?,
        revision: revision_number(row, 2, "records.revision")?,
        created: time(row, 3, "records.created_us")?,
        updated: time(row, 4, "records.updated_us")?,
        deleted: optional_time(row, 5, "records.deleted_us")?,
        wrapping_key: wrapping_key(row, 6)?,
    })
}

/// A record whose row names another revision than its newest one was set back: what is stored under the named revision was
/// valid once, and its MAC is still good.
pub(super) fn require_newest(
    row: &impl Columns,
    index: usize,
    info: &RecordInfo,
) -> Result<(), Error> {
    let newest = row
        .optional_integer(index)
        .map_err(|_| corrupt("revisions.revision"))?;
    if newest.is_some_and(|newest| u64::try_from(newest) == Ok(info.revision.get())) {
        return Ok(());
    }
    let newest = newest.unwrap_or(0);
    Err(Error::Corrupt(format!(
        "records.revision is {}, but the newest stored revision is {newest}; to repair the record, compare it with the \
         audit log and a backup, and set `revision` of record {} to {newest} if that is what was acknowledged",
        info.revision, info.id
    )))
}

/// Columns 7 and 8: user and key name.
pub(super) fn address(row: &impl Columns, tenant: Tenant) -> Result<KeyAddress, Error> {
    let user = text(row, 7, "records.user")?;
    let name = text(row, 8, "records.key_name")?;
    Ok(KeyAddress {
        tenant,
        user: UserId::parse(user).map_err(|_| corrupt("records.user"))?,
        name: KeyName::parse(name).map_err(|_| corrupt("records.key_name"))?,
    })
}

/// A row of a page of records: columns 0 to 8, and the newest revision in column 9.
pub(super) fn listed_record(
    row: &impl Columns,
    tenant: &Tenant,
) -> Result<RecordInfo, DamagedRecord> {
    let damaged = |damage: Damage, error: &Error| DamagedRecord {
        id: array(row, 0, "records.record_id")
            .ok()
            .map(RecordId::from_bytes),
        user: text(row, 7, "records.user")
            .ok()
            .and_then(|user| UserId::parse(user).ok()),
        name: text(row, 8, "records.key_name")
            .ok()
            .and_then(|name| KeyName::parse(name).ok()),
        damage,
        detail: error.to_string(),
    };
    let info = address(row, tenant.clone())
        .and_then(|address| info(row, address))
        .map_err(|error| damaged(Damage::Unreadable, &error))?;
    require_newest(row, 9, &info).map_err(|error| damaged(Damage::SetBack, &error))?;
    Ok(info)
}

/// A row of a page of API clients.
pub(super) fn listed_client(row: &impl Columns) -> Result<ClientRow, DamagedClient> {
    client(row).map_err(|error| DamagedClient {
        id: client_id(row),
        damage: Damage::Unreadable,
        detail: error.to_string(),
    })
}

/// The id of an API client, if it can be read whatever is wrong with the rest of the row.
pub(super) fn client_id(row: &impl Columns) -> Option<ClientId> {
    row.bytes(0).ok().and_then(ClientId::from_slice)
}

/// Decodes the rows of a table that holds nothing but notes. A damaged row is left out and raises an alert: it must not hide the
/// others.
pub(super) fn readable<R, T>(
    table: &'static str,
    rows: &[R],
    decode: impl Fn(&R) -> Result<T, Error>,
) -> Vec<T> {
    let decoded = rows.iter().filter_map(|row| {
        decode(row)
            .inspect_err(|error| {
                metrics::RECORDS_DAMAGED.increment();
                keybroker_core::alert!(RecordDamaged, table, %error, "a stored row does not decode; it is left out");
            })
            .ok()
    });
    decoded.collect()
}

/// Columns 0 to 10: those of a record, user, key name, tenant, and the newest revision.
pub(super) fn info_with_tenant(row: &impl Columns) -> Result<RecordInfo, Error> {
    let tenant = text(row, 9, "records.tenant")?;
    let tenant = Tenant::parse(tenant).map_err(|_| corrupt("records.tenant"))?;
    let info = info(row, address(row, tenant)?)?;
    require_newest(row, 10, &info)?;
    Ok(info)
}

/// All columns of a row of the records, in the order of the table.
pub(super) fn head(row: &impl Columns) -> Result<Head, Error> {
    let tenant = text(row, 1, "records.tenant")?;
    let user = text(row, 2, "records.user")?;
    let name = text(row, 3, "records.key_name")?;
    let state = text(row, 4, "records.state")?;
    let state = parse_state(state).ok_or_else(|| corrupt("records.state"))?;
    let created = time(row, 6, "records.created_us")?;
    let updated = time(row, 7, "records.updated_us")?;
    let deleted = optional_time(row, 8, "records.deleted_us")?;
    if deleted.is_some() != (state == RecordState::Deleted) {
        return Err(corrupt("records.deleted_us"));
    }
    Ok(Head {
        id: RecordId::from_bytes(array(row, 0, "records.record_id")?),
        address: KeyAddress {
            tenant: Tenant::parse(tenant).map_err(|_| corrupt("records.tenant"))?,
            user: UserId::parse(user).map_err(|_| corrupt("records.user"))?,
            name: KeyName::parse(name).map_err(|_| corrupt("records.key_name"))?,
        },
        state,
        revision: revision_number(row, 5, "records.revision")?,
        created,
        updated,
        deleted,
    })
}

/// All columns of a row of the revisions, in the order of the table.
pub(super) fn revision(row: &impl Columns) -> Result<RevisionRow, Error> {
    Ok(RevisionRow {
        record: RecordId::from_bytes(array(row, 0, "revisions.record_id")?),
        revision: revision_number(row, 1, "revisions.revision")?,
        envelope: bytes(row, 2, "revisions.envelope")?,
        wrapping_key: wrapping_key(row, 3)?,
        created: time(row, 4, "revisions.created_us")?,
    })
}

/// The call and the time of a row of the changes.
pub(super) fn change(row: &impl Columns) -> Result<(CallId, Timestamp), Error> {
    array::<16>(row, 1, "changes.record_id")?;
    let call = array::<16>(row, 0, "changes.call_id")?;
    let call = CallId::from_slice(&call).ok_or_else(|| corrupt("changes.call_id"))?;
    Ok((call, time(row, 2, "changes.changed_us")?))
}

/// All columns of a row of the requests, in the order of the table.
pub(super) fn request_row(row: &impl Columns) -> Result<(RequestScope, RequestRecord), Error> {
    let tenant = text(row, 0, "requests.tenant")?;
    let tenant = Tenant::parse(tenant).map_err(|_| corrupt("requests.tenant"))?;
    let user = text(row, 6, "requests.user")?;
    let name = text(row, 7, "requests.key_name")?;
    let state = text(row, 8, "requests.state")?;
    time(row, 14, "requests.used_us")?;
    let id = array::<16>(row, 2, "requests.request_id")?;
    let scope = RequestScope {
        tenant: tenant.clone(),
        principal: text(row, 1, "requests.principal")?.to_owned(),
        id: RequestId::from_slice(&id).ok_or_else(|| corrupt("requests.request_id"))?,
    };
    let record = RequestRecord {
        content: array(row, 3, "requests.content_mac")?,
        key: array(row, 4, "requests.key_id").map(WrappingKeyId::from_bytes)?,
        result: RecordInfo {
            id: RecordId::from_bytes(array(row, 5, "requests.record_id")?),
            address: KeyAddress {
                tenant,
                user: UserId::parse(user).map_err(|_| corrupt("requests.user"))?,
                name: KeyName::parse(name).map_err(|_| corrupt("requests.key_name"))?,
            },
            state: parse_state(state).ok_or_else(|| corrupt("requests.state"))?,
            revision: revision_number(row, 9, "requests.revision")?,
            wrapping_key: array(row, 10, "requests.wrapping_key_id")
                .map(WrappingKeyId::from_bytes)?,
            created: time(row, 11, "requests.created_us")?,
            updated: time(row, 12, "requests.updated_us")?,
            deleted: optional_time(row, 13, "requests.deleted_us")?,
        },
        result_mac: optional_mac(row, 15, "requests.result_mac")?,
    };
    Ok((scope, record))
}

/// All columns of a row of the uses of secrets, in the order of the table.
pub(super) fn client_use_row(row: &impl Columns) -> Result<(), Error> {
    array::<16>(row, 0, "client_uses.client_id")?;
    let number = positive(row, 1, "client_uses.secret_number")?;
    u32::try_from(number).map_err(|_| corrupt("client_uses.secret_number"))?;
    time(row, 2, "client_uses.used_us")?;
    Ok(())
}

/// All columns of a row of the last uses.
pub(super) fn last_use(row: &impl Columns) -> Result<(RecordId, Timestamp), Error> {
    let record = array(row, 0, "last_uses.record_id").map(RecordId::from_bytes)?;
    Ok((record, time(row, 1, "last_uses.used_us")?))
}

/// All columns of a row of the registry, in the order of the table.
pub(super) fn registry(row: &impl Columns) -> Result<RegistryRow, Error> {
    let purpose = text(row, 2, "wrapping_keys.purpose")?;
    let state = text(row, 3, "wrapping_keys.state")?;
    let token_serial = text(row, 4, "wrapping_keys.token_serial")?;
    if token_serial.len() > TOKEN_SERIAL_BYTES_MAX {
        return Err(corrupt("wrapping_keys.token_serial"));
    }
    Ok(RegistryRow {
        id: WrappingKeyId::from_bytes(array(row, 0, "wrapping_keys.key_id")?),
        fingerprint: Fingerprint(array(row, 1, "wrapping_keys.fingerprint")?),
        purpose: Purpose::parse(purpose).ok_or_else(|| corrupt("wrapping_keys.purpose"))?,
        state: WrappingKeyState::parse(state).ok_or_else(|| corrupt("wrapping_keys.state"))?,
        token_serial: token_serial.to_owned(),
        sequence: positive(row, 5, "wrapping_keys.sequence")?,
        registered: time(row, 6, "wrapping_keys.registered_us")?,
        backup_confirmed: optional_time(row, 7, "wrapping_keys.backup_confirmed_us")?,
        mac: array(row, 8, "wrapping_keys.mac")?,
    })
}

/// All columns of a row of the clients, in the order of the table. What is in the document is for its own parser to say.
pub(super) fn client(row: &impl Columns) -> Result<ClientRow, Error> {
    let document = bytes(row, 2, "clients.document")?;
    if document.len() > DOCUMENT_BYTES_MAX {
        return Err(corrupt("clients.document"));
    }
    Ok(ClientRow {
        id: ClientId::from_bytes(array(row, 0, "clients.client_id")?),
        revision: revision_number(row, 1, "clients.revision")?.get(),
        document,
        mac: array(row, 3, "clients.mac")?,
        key: WrappingKeyId::from_bytes(array(row, 4, "clients.key_id")?),
        created: time(row, 5, "clients.created_us")?,
        updated: time(row, 6, "clients.updated_us")?,
    })
}

/// Number of a secret, and when it was last accepted.
pub(super) fn client_use(row: &impl Columns) -> Result<(u32, Timestamp), Error> {
    let number = positive(row, 0, "client_uses.secret_number")?;
    let number = u32::try_from(number).map_err(|_| corrupt("client_uses.secret_number"))?;
    Ok((number, time(row, 1, "client_uses.used_us")?))
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
