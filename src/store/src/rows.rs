//! Converts rows into domain types and back, for every engine. Only this module maps columns to
//! fields. If a value cannot be decoded, the function returns an error with table and column. The
//! program does not panic on a damaged row, and does not silently leave out a record.

use keybroker_core::{
    approval::ApprovalState,
    call::{CallId, RequestId, Timestamp},
    client_credential::DOCUMENT_BYTES_MAX,
    envelope::Mac,
    key::{
        ApprovalId, ClientId, Fingerprint, KeyAddress, KeyName, ObjectIds, Purpose, RecordId,
        Revision, Tenant, UserId, WrappingKeyId, WrappingKeyState,
    },
    metrics,
    organization::Guid,
    principal::NAME_BYTES_MAX,
};

use super::{
    APPROVAL_DOCUMENT_BYTES_MAX, ApprovalRow, ClientRow, Damage, DamagedApproval, DamagedClient,
    DamagedRecord, Decision, DestructionRow, Error, KnownLog, MemberKeyRow, NewRevision,
    PERSON_BYTES_MAX, PersonOfPrincipal, PlaceRow, REQUESTED_BY_BYTES_MAX, Record, RecordInfo,
    RecordState, RegistryRow, RequestRecord, RequestScope, StoredRevision,
    columns::Table,
    error::Detail,
    session::{Columns, Value},
};

mod device;
mod rewrap;

pub(super) use device::{
    access_count_key, access_counts, access_cursor, access_query_values, access_request,
    access_request_values, decision_cursor, device, device_address, device_key, device_values,
    listed_access, listed_device, new_access_request, new_device,
};
pub(super) use rewrap::{key_uses, row_under, run, run_values, values_of_uses};

/// Longest serial number as text, in bytes. In PKCS#11, a serial number has 16 bytes, and each byte
/// becomes at most three bytes of text.
const TOKEN_SERIAL_BYTES_MAX: usize = 48;

/// The data of a row of [`Table::Records`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// Its identity.
    pub id: RecordId,
    /// The address of the record.
    pub address: KeyAddress,
    /// Whether the record can be unwrapped.
    pub state: RecordState,
    /// Current revision.
    pub revision: Revision,
    /// Time at which the record was created.
    pub created: Timestamp,
    /// Time of the last change of the record.
    pub updated: Timestamp,
    /// The time at which the record was deleted; absent for an active record.
    pub deleted: Option<Timestamp>,
}

impl Head {
    /// Whether the record was deleted before the time `before` and is still deleted.
    pub fn is_deleted_since(&self, before: Timestamp) -> bool {
        self.state == RecordState::Deleted && self.deleted.is_some_and(|at| at < before)
    }
}

/// The data of a row of [`Table::Revisions`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RevisionRow {
    /// The record to which the revision belongs.
    pub record: RecordId,
    /// The number of the revision.
    pub revision: Revision,
    /// The envelope as bytes that are not parsed yet.
    pub envelope: Vec<u8>,
    /// The id of the wrapping key that the row contains.
    pub wrapping_key: WrappingKeyId,
    /// Time at which the revision became current.
    pub created: Timestamp,
}

/// Reads the columns of one table from a row.
struct Reader<'r, R> {
    table: Table,
    row: &'r R,
}

impl<'r, R: Columns> Reader<'r, R> {
    fn new(table: Table, row: &'r R) -> Self {
        Self { table, row }
    }

    fn corrupt(&self, column: &str) -> Error {
        Error::Corrupt(self.place(column).into())
    }

    fn place(&self, column: &str) -> String {
        format!("{}.{column}", self.table.name())
    }

    /// Returns the value, or [`Error::Corrupt`] with the error of the driver.
    fn value<T>(&self, column: &str, value: Result<T, sqlx::Error>) -> Result<T, Error> {
        value.map_err(|error| Error::Corrupt(Detail::caused(self.place(column), error)))
    }

    fn bytes(&self, column: &str) -> Result<&'r [u8], Error> {
        self.value(column, self.row.bytes(column))
    }

    fn array<const N: usize>(&self, column: &str) -> Result<[u8; N], Error> {
        let bytes = self.bytes(column)?;
        bytes.try_into().map_err(|_| self.corrupt(column))
    }

    fn text(&self, column: &str) -> Result<&'r str, Error> {
        self.value(column, self.row.text(column))
    }

    /// Parses a text value that must have a certain form.
    fn parsed<T>(&self, column: &str, parse: impl FnOnce(&str) -> Option<T>) -> Result<T, Error> {
        parse(self.text(column)?).ok_or_else(|| self.corrupt(column))
    }

    fn time(&self, column: &str) -> Result<Timestamp, Error> {
        let micros = self.value(column, self.row.integer(column))?;
        Ok(Timestamp::from_micros(micros))
    }

    fn optional_time(&self, column: &str) -> Result<Option<Timestamp>, Error> {
        let micros = self.value(column, self.row.optional_integer(column))?;
        Ok(micros.map(Timestamp::from_micros))
    }

    /// A principal and its person. Either may be empty.
    fn person(&self, person: &str, principal: &str) -> Result<PersonOfPrincipal, Error> {
        let bounded = |column: &str, bytes_max| {
            let text = self.text(column)?;
            if text.len() > bytes_max {
                return Err(self.corrupt(column));
            }
            Ok(text.to_owned())
        };
        Ok(PersonOfPrincipal {
            person: bounded(person, PERSON_BYTES_MAX)?,
            principal: bounded(principal, NAME_BYTES_MAX)?,
        })
    }

    fn positive(&self, column: &str) -> Result<u64, Error> {
        let number = self.value(column, self.row.integer(column))?;
        u64::try_from(number).map_err(|_| self.corrupt(column))
    }

    fn revision(&self, column: &str) -> Result<Revision, Error> {
        Revision::new(self.positive(column)?).ok_or_else(|| self.corrupt(column))
    }

    fn record_id(&self) -> Result<RecordId, Error> {
        self.array("record_id").map(RecordId::from_bytes)
    }

    fn wrapping_key(&self, column: &str) -> Result<WrappingKeyId, Error> {
        self.array(column).map(WrappingKeyId::from_bytes)
    }

    fn tenant(&self) -> Result<Tenant, Error> {
        self.parsed("tenant", |text| Tenant::parse(text).ok())
    }

    fn user(&self) -> Result<UserId, Error> {
        self.parsed("user", |text| UserId::parse(text).ok())
    }

    fn key_name(&self) -> Result<KeyName, Error> {
        self.parsed("key_name", |text| KeyName::parse(text).ok())
    }

    fn address(&self) -> Result<KeyAddress, Error> {
        Ok(KeyAddress {
            tenant: self.tenant()?,
            user: self.user()?,
            name: self.key_name()?,
        })
    }

    /// The columns that records and the stored answers of requests have in common.
    fn head(&self, address: KeyAddress) -> Result<Head, Error> {
        Ok(Head {
            id: self.record_id()?,
            address,
            state: self.parsed("state", RecordState::parse)?,
            revision: self.revision("revision")?,
            created: self.time("created_us")?,
            updated: self.time("updated_us")?,
            deleted: self.optional_time("deleted_us")?,
        })
    }
}

impl Head {
    fn with_wrapping_key(self, wrapping_key: WrappingKeyId) -> RecordInfo {
        RecordInfo {
            address: self.address,
            id: self.id,
            state: self.state,
            revision: self.revision,
            wrapping_key,
            created: self.created,
            updated: self.updated,
            deleted: self.deleted,
        }
    }
}

/// Decodes a record at a known address with its current revision. The function does not check that
/// the revision is the newest revision.
fn unchecked_info(row: &impl Columns, address: KeyAddress) -> Result<RecordInfo, Error> {
    let head = Reader::new(Table::Records, row).head(address)?;
    let wrapping_key = Reader::new(Table::Revisions, row).wrapping_key("wrapping_key_id")?;
    Ok(head.with_wrapping_key(wrapping_key))
}

/// Refuses a record that was set back to an earlier revision: the revision in its row is not the
/// newest stored revision. This check is necessary because the MAC of the earlier revision is still
/// valid.
fn require_newest(row: &impl Columns, info: &RecordInfo) -> Result<(), Error> {
    let newest = row
        .optional_integer("newest_revision")
        .map_err(|error| Error::Corrupt(Detail::caused("revisions.revision", error)))?;
    if newest.is_some_and(|newest| u64::try_from(newest) == Ok(info.revision.get())) {
        return Ok(());
    }
    let newest = newest.unwrap_or(0);
    let what = format!(
        "records.revision is {}, but the newest stored revision is {newest}; to repair the record, compare it with the \
         audit log and a backup, and set `revision` of record {} to {newest} if {newest} is the last acknowledged \
         revision",
        info.revision, info.id
    );
    Err(Error::Corrupt(what.into()))
}

/// Decodes a record at a known address, with its current envelope.
pub(super) fn record(row: &impl Columns, address: KeyAddress) -> Result<Record, Error> {
    let info = unchecked_info(row, address)?;
    require_newest(row, &info)?;
    let envelope = Reader::new(Table::Revisions, row).bytes("envelope")?;
    Ok(Record {
        info,
        envelope: envelope.to_vec(),
    })
}

/// Decodes a record with its address.
pub(super) fn info(row: &impl Columns) -> Result<RecordInfo, Error> {
    let address = Reader::new(Table::Records, row).address()?;
    let info = unchecked_info(row, address)?;
    require_newest(row, &info)?;
    Ok(info)
}

/// Decodes a row of a page of records.
pub(super) fn listed_record(row: &impl Columns) -> Result<RecordInfo, DamagedRecord> {
    let records = Reader::new(Table::Records, row);
    let damaged = |damage: Damage, error: &Error| DamagedRecord {
        id: records.record_id().ok(),
        user: records.user().ok(),
        name: records.key_name().ok(),
        damage,
        detail: error.damage(),
    };
    let info = records
        .address()
        .and_then(|address| unchecked_info(row, address))
        .map_err(|error| damaged(Damage::Unreadable, &error))?;
    require_newest(row, &info).map_err(|error| damaged(Damage::SetBack, &error))?;
    Ok(info)
}

/// Decodes a row of a page of API clients.
pub(super) fn listed_client(row: &impl Columns) -> Result<ClientRow, DamagedClient> {
    client(row).map_err(|error| DamagedClient {
        id: client_id(row),
        damage: Damage::Unreadable,
        detail: error.damage(),
    })
}

/// Decodes the id of an API client, if the id can be read. The rest of the row may be damaged.
pub(super) fn client_id(row: &impl Columns) -> Option<ClientId> {
    row.bytes("client_id").ok().and_then(ClientId::from_slice)
}

/// Decodes the rows of a table that contains only times of use. A damaged row is skipped and raises
/// an alert, so that the other rows can be used.
pub(super) fn readable<R, T>(
    table: Table,
    rows: &[R],
    decode: impl Fn(&R) -> Result<T, Error>,
) -> Vec<T> {
    let decoded = rows.iter().filter_map(|row| {
        decode(row)
            .inspect_err(|error| {
                metrics::RECORDS_DAMAGED.increment();
                keybroker_core::alert!(
                    RecordDamaged, table = table.name(), %error,
                    "a stored row cannot be decoded and is omitted"
                );
            })
            .ok()
    });
    decoded.collect()
}

/// Decodes a row of [`Table::Records`].
pub(super) fn head(row: &impl Columns) -> Result<Head, Error> {
    let row = Reader::new(Table::Records, row);
    let head = row.head(row.address()?)?;
    if head.deleted.is_some() != (head.state == RecordState::Deleted) {
        return Err(row.corrupt("deleted_us"));
    }
    Ok(head)
}

/// Returns the values of a new row of [`Table::Records`] for an active record.
pub(super) fn new_record(new: &NewRevision, at: Timestamp) -> Vec<Value> {
    vec![
        new.record.into(),
        new.address.tenant.as_str().into(),
        new.address.user.as_str().into(),
        new.address.name.as_str().into(),
        RecordState::Active.as_str().into(),
        new.revision.into(),
        at.into(),
        at.into(),
        None::<Timestamp>.into(),
    ]
}

/// Decodes a row of [`Table::Revisions`].
pub(super) fn revision(row: &impl Columns) -> Result<RevisionRow, Error> {
    let row = Reader::new(Table::Revisions, row);
    Ok(RevisionRow {
        record: row.record_id()?,
        revision: row.revision("revision")?,
        envelope: row.bytes("envelope")?.to_vec(),
        wrapping_key: row.wrapping_key("wrapping_key_id")?,
        created: row.time("created_us")?,
    })
}

/// Decodes the stored data of a known revision.
pub(super) fn stored_revision(
    row: &impl Columns,
    revision: Revision,
) -> Result<StoredRevision, Error> {
    let row = Reader::new(Table::Revisions, row);
    Ok(StoredRevision {
        revision,
        wrapping_key: row.wrapping_key("wrapping_key_id")?,
        envelope: row.bytes("envelope")?.to_vec(),
        created: row.time("created_us")?,
    })
}

/// Decodes the result of the query for the audit logs of an instance.
pub(super) fn known_log(row: &impl Columns) -> Result<KnownLog, Error> {
    Ok(match (row.integer("known")?, row.integer("this")?) {
        (0, _) => KnownLog::None,
        (_, 0) => KnownLog::Another,
        _ => KnownLog::This,
    })
}

/// Returns the values of a new row of [`Table::Revisions`].
pub(super) fn new_revision(new: &NewRevision, at: Timestamp) -> Vec<Value> {
    vec![
        new.record.into(),
        new.revision.into(),
        new.envelope.as_slice().into(),
        new.wrapping_key.into(),
        at.into(),
    ]
}

/// Decodes the call and the time of a row of [`Table::Changes`].
pub(super) fn change(row: &impl Columns) -> Result<(CallId, Timestamp), Error> {
    let row = Reader::new(Table::Changes, row);
    // The column contains the id of a record or of an API client.
    row.array::<16>("record_id")?;
    let call = CallId::from_slice(row.bytes("call_id")?);
    Ok((
        call.ok_or_else(|| row.corrupt("call_id"))?,
        row.time("changed_us")?,
    ))
}

/// Returns the values of a new row of [`Table::Changes`]. `changed` is the id of the record or of
/// the API client.
pub(super) fn new_change(call: CallId, changed: impl Into<Value>, at: Timestamp) -> Vec<Value> {
    vec![call.into(), changed.into(), at.into()]
}

/// Decodes a row of [`Table::Requests`].
pub(super) fn request(row: &impl Columns) -> Result<(RequestScope, RequestRecord), Error> {
    let row = Reader::new(Table::Requests, row);
    row.time("used_us")?;
    let id = RequestId::from_slice(row.bytes("request_id")?);
    let scope = RequestScope {
        tenant: row.tenant()?,
        principal: row.text("principal")?.to_owned(),
        id: id.ok_or_else(|| row.corrupt("request_id"))?,
    };
    let head = row.head(row.address()?)?;
    // Older releases did not write this MAC, so the column may be empty.
    let result_mac = match row.bytes("result_mac")? {
        [] => None,
        _ => Some(row.array("result_mac")?),
    };
    let record = RequestRecord {
        content: row.array("content_mac")?,
        key: row.wrapping_key("key_id")?,
        result: head.with_wrapping_key(row.wrapping_key("wrapping_key_id")?),
        result_mac,
    };
    Ok((scope, record))
}

/// Returns the values of the key of a row of [`Table::Requests`].
pub(super) fn request_key(scope: &RequestScope) -> Vec<Value> {
    vec![
        scope.tenant.as_str().into(),
        scope.principal.as_str().into(),
        scope.id.into(),
    ]
}

/// Returns the values of a new row of [`Table::Requests`].
pub(super) fn new_request(
    scope: &RequestScope,
    request: &RequestRecord,
    at: Timestamp,
) -> Vec<Value> {
    let (info, mac) = (&request.result, request.result_mac.as_ref());
    let mut values = request_key(scope);
    values.extend([
        (&request.content).into(),
        request.key.into(),
        info.id.into(),
        info.address.user.as_str().into(),
        info.address.name.as_str().into(),
        info.state.as_str().into(),
        info.revision.into(),
        info.wrapping_key.into(),
        info.created.into(),
        info.updated.into(),
        info.deleted.into(),
        at.into(),
        mac.map_or(&[][..], Mac::as_slice).into(),
    ]);
    values
}

/// Decodes a row of [`Table::LastUses`].
pub(super) fn last_use(row: &impl Columns) -> Result<(RecordId, Timestamp), Error> {
    let row = Reader::new(Table::LastUses, row);
    Ok((row.record_id()?, row.time("used_us")?))
}

/// Returns the values of a new row of [`Table::LastUses`].
pub(super) fn new_last_use((record, at): &(RecordId, Timestamp)) -> Vec<Value> {
    vec![(*record).into(), (*at).into()]
}

/// Decodes the number of a secret, and the time at which the secret was last accepted.
pub(super) fn client_use(row: &impl Columns) -> Result<(u32, Timestamp), Error> {
    let row = Reader::new(Table::ClientUses, row);
    let number = u32::try_from(row.positive("secret_number")?);
    Ok((
        number.map_err(|_| row.corrupt("secret_number"))?,
        row.time("used_us")?,
    ))
}

/// Checks a row of [`Table::ClientUses`].
pub(super) fn client_use_row(row: &impl Columns) -> Result<(), Error> {
    Reader::new(Table::ClientUses, row).array::<16>("client_id")?;
    client_use(row).map(drop)
}

/// Returns the values of a new row of [`Table::ClientUses`].
pub(super) fn new_client_use(client: ClientId, secret: u32, at: Timestamp) -> Vec<Value> {
    vec![client.into(), secret.into(), at.into()]
}

/// Decodes a row of [`Table::WrappingKeys`].
pub(super) fn registry(row: &impl Columns) -> Result<RegistryRow, Error> {
    let row = Reader::new(Table::WrappingKeys, row);
    let token_serial = row.text("token_serial")?;
    if token_serial.len() > TOKEN_SERIAL_BYTES_MAX {
        return Err(row.corrupt("token_serial"));
    }
    let private = row.bytes("private_cka_id")?;
    let integrity = row.bytes("integrity_cka_id")?;
    Ok(RegistryRow {
        id: row.wrapping_key("key_id")?,
        objects: ObjectIds::from_slices(private, integrity)
            .ok_or_else(|| row.corrupt("private_cka_id or integrity_cka_id"))?,
        fingerprint: Fingerprint(row.array("fingerprint")?),
        purpose: row.parsed("purpose", Purpose::parse)?,
        state: row.parsed("state", WrappingKeyState::parse)?,
        token_serial: token_serial.to_owned(),
        sequence: row.positive("sequence")?,
        registered: row.time("registered_us")?,
        backup_confirmed: row.optional_time("backup_confirmed_us")?,
        mac: row.array("mac")?,
    })
}

/// Returns the values of a new row of [`Table::WrappingKeys`].
pub(super) fn new_registry(row: &RegistryRow) -> Vec<Value> {
    let mut values = vec![row.id.into()];
    values.extend(registry_values(row));
    values
}

/// Returns the values of a row of [`Table::WrappingKeys`] for [`Table::values`].
pub(super) fn registry_values(row: &RegistryRow) -> Vec<Value> {
    vec![
        row.fingerprint.0.as_slice().into(),
        row.purpose.as_str().into(),
        row.state.as_str().into(),
        row.token_serial.as_str().into(),
        row.sequence.into(),
        row.registered.into(),
        row.backup_confirmed.into(),
        (&row.mac).into(),
        row.objects.private_bytes().into(),
        row.objects.integrity_bytes().into(),
    ]
}

/// Decodes a row of [`Table::Places`].
pub(super) fn place(row: &impl Columns) -> Result<PlaceRow, Error> {
    let row = Reader::new(Table::Places, row);
    let token_serial = row.text("token_serial")?;
    if token_serial.len() > TOKEN_SERIAL_BYTES_MAX {
        return Err(row.corrupt("token_serial"));
    }
    let private = row.bytes("private_cka_id")?;
    let integrity = row.bytes("integrity_cka_id")?;
    Ok(PlaceRow {
        key: row.wrapping_key("key_id")?,
        // The name of a token has the same form as the name of a user key.
        token: row
            .parsed("token", |text| KeyName::parse(text).ok())?
            .to_string(),
        token_serial: token_serial.to_owned(),
        objects: ObjectIds::from_slices(private, integrity)
            .ok_or_else(|| row.corrupt("private_cka_id or integrity_cka_id"))?,
        registered: row.time("registered_us")?,
        backup_confirmed: row.optional_time("backup_confirmed_us")?,
        mac: row.array("mac")?,
    })
}

/// Returns the values of a new row of [`Table::Places`].
pub(super) fn new_place(row: &PlaceRow) -> Vec<Value> {
    let mut values = vec![row.key.into(), row.token.as_str().into()];
    values.extend(place_values(row));
    values
}

/// Returns the values of a row of [`Table::Places`] for [`Table::values`].
pub(super) fn place_values(row: &PlaceRow) -> Vec<Value> {
    vec![
        row.token_serial.as_str().into(),
        row.objects.private_bytes().into(),
        row.objects.integrity_bytes().into(),
        row.registered.into(),
        row.backup_confirmed.into(),
        (&row.mac).into(),
    ]
}

/// A row of [`Table::Destructions`].
pub(super) fn destruction(row: &impl Columns) -> Result<DestructionRow, Error> {
    let row = Reader::new(Table::Destructions, row);
    let requested_by = row.text("requested_by")?;
    if requested_by.len() > REQUESTED_BY_BYTES_MAX {
        return Err(row.corrupt("requested_by"));
    }
    Ok(DestructionRow {
        key: row.wrapping_key("key_id")?,
        signer: row.wrapping_key("signer_key_id")?,
        sequence: row.positive("sequence")?,
        requested: row.time("requested_us")?,
        due: row.time("due_us")?,
        requested_by: requested_by.to_owned(),
        mac: row.array("mac")?,
    })
}

/// The wrapping key of a row of [`Table::Destructions`] that cannot be decoded.
pub(super) fn key_of_destruction(row: &impl Columns) -> Option<WrappingKeyId> {
    Reader::new(Table::Destructions, row)
        .wrapping_key("key_id")
        .ok()
}

/// A row of [`Table::Destructions`] that no instance holds yet.
pub(super) fn new_destruction(row: &DestructionRow) -> Vec<Value> {
    vec![
        row.key.into(),
        row.signer.into(),
        row.sequence.into(),
        row.requested.into(),
        row.due.into(),
        row.requested_by.as_str().into(),
        (&row.mac).into(),
        "".into(),
        Timestamp::from_micros(0).into(),
    ]
}

/// A row of [`Table::Approvals`].
pub(super) fn approval(row: &impl Columns) -> Result<ApprovalRow, Error> {
    let row = Reader::new(Table::Approvals, row);
    let document = row.bytes("document")?;
    if document.len() > APPROVAL_DOCUMENT_BYTES_MAX {
        return Err(row.corrupt("document"));
    }
    let decided_by = row.person("decided_person", "decided_by")?;
    let decision = match row.optional_time("decided_us")? {
        Some(at) => Some(Decision { by: decided_by, at }),
        // The MAC does not cover names of a decision that was not made.
        None if decided_by.person.is_empty() && decided_by.principal.is_empty() => None,
        None => return Err(row.corrupt("decided_us")),
    };
    Ok(ApprovalRow {
        id: ApprovalId::from_bytes(row.array("approval_id")?),
        signer: row.wrapping_key("signer_key_id")?,
        state: row.parsed("state", ApprovalState::parse)?,
        action: row.text("action")?.to_owned(),
        document: document.to_vec(),
        digest: row.array("digest")?,
        requested_by: row.person("requested_person", "requested_by")?,
        requested: row.time("requested_us")?,
        expires: row.time("expires_us")?,
        decision,
        used: row.optional_time("used_us")?,
        mac: row.array("mac")?,
    })
}

/// A row of a list of requests for approval.
pub(super) fn listed_approval(row: &impl Columns) -> Result<ApprovalRow, DamagedApproval> {
    approval(row).map_err(|error| DamagedApproval {
        id: approval_id(row),
        detail: error.damage(),
    })
}

/// The id of a request for approval, if the id can be read. The rest of the row may be damaged.
pub(super) fn approval_id(row: &impl Columns) -> Option<ApprovalId> {
    let id = row.bytes("approval_id").ok()?;
    ApprovalId::from_slice(id)
}

/// The values of a new row of [`Table::Approvals`].
pub(super) fn new_approval(row: &ApprovalRow) -> Vec<Value> {
    let mut values = vec![row.id.into()];
    values.extend(approval_values(row));
    values
}

/// The values of a row of [`Table::Approvals`] for [`Table::values`].
pub(super) fn approval_values(row: &ApprovalRow) -> Vec<Value> {
    let decided = row.decision.as_ref();
    vec![
        row.signer.into(),
        row.state.as_str().into(),
        row.action.as_str().into(),
        row.document.as_slice().into(),
        row.digest.as_slice().into(),
        row.requested_by.principal.as_str().into(),
        row.requested_by.person.as_str().into(),
        row.requested.into(),
        row.expires.into(),
        decided.map_or("", |decision| &decision.by.principal).into(),
        decided.map_or("", |decision| &decision.by.person).into(),
        decided.map(|decision| decision.at).into(),
        row.used.into(),
        (&row.mac).into(),
    ]
}

/// A row of [`Table::MemberKeys`].
pub(super) fn member_key(row: &impl Columns) -> Result<MemberKeyRow, Error> {
    let row = Reader::new(Table::MemberKeys, row);
    Ok(MemberKeyRow {
        organization: Guid::from_bytes(row.array("organization_id")?),
        digest: row.array("digest")?,
        member: Guid::from_bytes(row.array("member_id")?),
        email: row.array("email_digest")?,
        pinned: row.time("pinned_us")?,
        mac: row.array("mac")?,
    })
}

/// The values of a new row of [`Table::MemberKeys`].
pub(super) fn new_member_key(row: &MemberKeyRow) -> Vec<Value> {
    let mut values = vec![row.organization.into(), row.digest.as_slice().into()];
    values.extend(member_key_values(row));
    values
}

/// The values of a row of [`Table::MemberKeys`] for [`Table::values`].
pub(super) fn member_key_values(row: &MemberKeyRow) -> Vec<Value> {
    vec![
        row.member.into(),
        row.email.as_slice().into(),
        row.pinned.into(),
        (&row.mac).into(),
    ]
}

/// Decodes a row of [`Table::Clients`]. The function does not parse the document.
pub(super) fn client(row: &impl Columns) -> Result<ClientRow, Error> {
    let row = Reader::new(Table::Clients, row);
    let document = row.bytes("document")?;
    if document.len() > DOCUMENT_BYTES_MAX {
        return Err(row.corrupt("document"));
    }
    Ok(ClientRow {
        id: ClientId::from_bytes(row.array("client_id")?),
        revision: row.revision("revision")?.get(),
        document: document.to_vec(),
        mac: row.array("mac")?,
        key: row.wrapping_key("key_id")?,
        created: row.time("created_us")?,
        updated: row.time("updated_us")?,
    })
}

/// Returns the values of a new row of [`Table::Clients`].
pub(super) fn new_client(row: &ClientRow) -> Vec<Value> {
    vec![
        row.id.into(),
        row.revision.into(),
        row.document.as_slice().into(),
        (&row.mac).into(),
        row.key.into(),
        row.created.into(),
        row.updated.into(),
    ]
}

#[cfg(test)]
mod tests;
