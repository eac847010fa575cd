//! Converts rows of devices and of requests for access.

use keybroker_core::{
    call::Timestamp,
    device::{
        AccessApprover, AccessState, DEVICE_NAME_BYTES_MAX, DEVICE_TYPE_BYTES_MAX, DeviceState,
        PUBLIC_KEY_BYTES_MAX, SEALED_KEY_BYTES_MAX, SEALED_PRIVATE_KEY_BYTES_MAX,
        SEALED_PUBLIC_KEY_BYTES_MAX,
    },
    key::{AccessRequestId, DeviceId, Revision},
    principal::NAME_BYTES_MAX,
};

use crate::{
    Error,
    columns::Table,
    device::{
        ANSWER_FORM_BYTES_MAX, AccessCounts, AccessCursor, AccessDecision, AccessQuery, AccessRow,
        Answer, AskingDevice, DamagedAccess, DamagedDevice, DeviceAddress, DeviceRow,
        PEER_BYTES_MAX, SealedKeys,
    },
    session::{Columns, Value},
};

use super::Reader;

/// Longest verification key, in bytes.
const VERIFICATION_KEY_BYTES_MAX: usize = 65;

impl<R: Columns> Reader<'_, R> {
    fn bounded_bytes(&self, column: &str, bytes_max: usize) -> Result<Vec<u8>, Error> {
        let bytes = self.bytes(column)?;
        if bytes.len() > bytes_max {
            return Err(self.corrupt(column));
        }
        Ok(bytes.to_vec())
    }

    fn bounded_text(&self, column: &str, bytes_max: usize) -> Result<String, Error> {
        let text = self.text(column)?;
        if text.len() > bytes_max {
            return Err(self.corrupt(column));
        }
        Ok(text.to_owned())
    }

    fn device_address(&self) -> Result<DeviceAddress, Error> {
        Ok(DeviceAddress {
            tenant: self.tenant()?,
            user: self.user()?,
            device: DeviceId::from_bytes(self.array("device_id")?),
        })
    }

    fn count(&self, column: &str) -> Result<u32, Error> {
        u32::try_from(self.positive(column)?).map_err(|_| self.corrupt(column))
    }

    fn optional_revision(&self, column: &str) -> Result<Option<Revision>, Error> {
        let number = self.value(column, self.row.optional_integer(column))?;
        let Some(number) = number else {
            return Ok(None);
        };
        let revision = u64::try_from(number).ok().and_then(Revision::new);
        revision.map(Some).ok_or_else(|| self.corrupt(column))
    }

    /// A text that is empty if it is absent.
    fn optional_text(&self, column: &str, bytes_max: usize) -> Result<Option<String>, Error> {
        let text = self.bounded_text(column, bytes_max)?;
        Ok(Some(text).filter(|text| !text.is_empty()))
    }
}

/// The address of a row of [`Table::Devices`]; the rest of the row may be damaged.
pub(crate) fn device_address(row: &impl Columns) -> Result<DeviceAddress, Error> {
    Reader::new(Table::Devices, row).device_address()
}

/// A row of [`Table::Devices`].
pub(crate) fn device(row: &impl Columns) -> Result<DeviceRow, Error> {
    let row = Reader::new(Table::Devices, row);
    let keys = SealedKeys {
        user_key: row.bounded_bytes("sealed_user_key", SEALED_KEY_BYTES_MAX)?,
        public_key: row.bounded_bytes("sealed_public_key", SEALED_PUBLIC_KEY_BYTES_MAX)?,
        private_key: row.bounded_bytes("sealed_private_key", SEALED_PRIVATE_KEY_BYTES_MAX)?,
    };
    Ok(DeviceRow {
        address: row.device_address()?,
        signer: row.wrapping_key("signer_key_id")?,
        state: row.parsed("state", DeviceState::parse)?,
        name: row.bounded_text("name", DEVICE_NAME_BYTES_MAX)?,
        kind: row.bounded_text("kind", DEVICE_TYPE_BYTES_MAX)?,
        verification_key: row.bounded_bytes("verification_key", VERIFICATION_KEY_BYTES_MAX)?,
        key_name: row.key_name()?,
        revision: row.revision("revision")?,
        keys,
        trusted: row.time("trusted_us")?,
        changed: row.time("changed_us")?,
        signed: row.time("signed_us")?,
        lost: row.optional_time("lost_us")?,
        used: row.optional_time("used_us")?,
        mac: row.array("mac")?,
    })
}

/// A row of a list of devices.
pub(crate) fn listed_device(row: &impl Columns) -> Result<DeviceRow, DamagedDevice> {
    device(row).map_err(|error| DamagedDevice {
        address: device_address(row).ok(),
        detail: error.damage(),
    })
}

/// The values of the key of a row of [`Table::Devices`].
pub(crate) fn device_key(address: &DeviceAddress) -> Vec<Value> {
    vec![
        address.tenant.as_str().into(),
        address.user.as_str().into(),
        address.device.into(),
    ]
}

/// The values of a new row of [`Table::Devices`].
pub(crate) fn new_device(row: &DeviceRow) -> Vec<Value> {
    let mut values = device_key(&row.address);
    values.extend(device_values(row));
    values
}

/// The values of a row of [`Table::Devices`] for [`Table::values`].
pub(crate) fn device_values(row: &DeviceRow) -> Vec<Value> {
    vec![
        row.signer.into(),
        row.state.as_str().into(),
        row.name.as_str().into(),
        row.kind.as_str().into(),
        row.verification_key.as_slice().into(),
        row.key_name.as_str().into(),
        row.revision.into(),
        row.keys.user_key.as_slice().into(),
        row.keys.public_key.as_slice().into(),
        row.keys.private_key.as_slice().into(),
        row.trusted.into(),
        row.changed.into(),
        row.signed.into(),
        row.lost.into(),
        row.used.into(),
        (&row.mac).into(),
    ]
}

/// The position of a row of [`Table::AccessRequests`] in a list; the rest of the row may be damaged.
pub(crate) fn access_cursor(row: &impl Columns) -> Result<AccessCursor, Error> {
    let row = Reader::new(Table::AccessRequests, row);
    let id = AccessRequestId::from_bytes(row.array("request_id")?);
    Ok((row.time("requested_us")?, id))
}

/// The position of a decided request among the decisions.
pub(crate) fn decision_cursor(row: &impl Columns) -> Result<AccessCursor, Error> {
    let row = Reader::new(Table::AccessRequests, row);
    let id = AccessRequestId::from_bytes(row.array("request_id")?);
    Ok((row.time("decided_us")?, id))
}

/// The id of a row of [`Table::AccessRequests`], if the id can be read.
fn access_id(row: &impl Columns) -> Option<AccessRequestId> {
    row.bytes("request_id")
        .ok()
        .and_then(AccessRequestId::from_slice)
}

/// A row of [`Table::AccessRequests`].
pub(crate) fn access_request(row: &impl Columns) -> Result<AccessRow, Error> {
    let row = Reader::new(Table::AccessRequests, row);
    Ok(AccessRow {
        id: AccessRequestId::from_bytes(row.array("request_id")?),
        signer: row.wrapping_key("signer_key_id")?,
        state: row.parsed("state", AccessState::parse)?,
        approver: row.parsed("road", AccessApprover::parse)?,
        device: AskingDevice {
            address: row.device_address()?,
            name: row.bounded_text("device_name", DEVICE_NAME_BYTES_MAX)?,
            kind: row.bounded_text("device_kind", DEVICE_TYPE_BYTES_MAX)?,
            verification_key: row.bounded_bytes("verification_key", VERIFICATION_KEY_BYTES_MAX)?,
        },
        key_name: row.key_name()?,
        public_key: row.bounded_bytes("public_key", PUBLIC_KEY_BYTES_MAX)?,
        code: row.array("code_mac")?,
        code_key: row.wrapping_key("code_key_id")?,
        requested_by: row.bounded_text("requested_by", NAME_BYTES_MAX)?,
        peer: row.bounded_text("peer", PEER_BYTES_MAX)?,
        requested: row.time("requested_us")?,
        expires: row.time("expires_us")?,
        tries: row.count("tries")?,
        first_approved_by: row.optional_text("first_approved_by", NAME_BYTES_MAX)?,
        decision: decision(&row)?,
        answer: answer(&row)?,
        fetched: row.optional_time("fetched_us")?,
        closed: row.optional_time("closed_us")?,
        answer_revision: row.optional_revision("answer_revision")?,
        wrong_words: row.count("wrong_words")?,
        mac: row.array("mac")?,
    })
}

fn decision(row: &Reader<'_, impl Columns>) -> Result<Option<AccessDecision>, Error> {
    let by = row.optional_text("decided_by", NAME_BYTES_MAX)?;
    let device = match row.bytes("decided_device")? {
        [] => None,
        _ => Some(DeviceId::from_bytes(row.array("decided_device")?)),
    };
    match (row.optional_time("decided_us")?, by, device) {
        (Some(at), Some(by), device) => Ok(Some(AccessDecision { by, device, at })),
        (None, None, None) => Ok(None),
        _ => Err(row.corrupt("decided_us")),
    }
}

fn answer(row: &Reader<'_, impl Columns>) -> Result<Option<Answer>, Error> {
    let bytes = row.bounded_bytes("answer", SEALED_KEY_BYTES_MAX)?;
    let form = row.optional_text("answer_form", ANSWER_FORM_BYTES_MAX)?;
    match form {
        Some(form) => Ok(Some(Answer { bytes, form })),
        None if bytes.is_empty() => Ok(None),
        None => Err(row.corrupt("answer_form")),
    }
}

/// A row of a list of requests for access.
pub(crate) fn listed_access(row: &impl Columns) -> Result<AccessRow, DamagedAccess> {
    access_request(row).map_err(|error| DamagedAccess {
        id: access_id(row),
        detail: error.damage(),
    })
}

/// The values of a query for requests for access of these users, or of all if there are none.
pub(crate) fn access_query_values(
    wanted: &AccessQuery,
    users: Vec<Value>,
    limit: u32,
) -> Vec<Value> {
    // No time is later than the largest one, and no id comes before the empty one.
    let (requested, id) = match wanted.after {
        Some((requested, id)) => (requested, id.into()),
        None => (Timestamp::from_micros(i64::MAX), Value::Bytes(Vec::new())),
    };
    let pending = wanted.pending.as_ref();
    let mut values = vec![wanted.tenant.as_str().into()];
    values.extend(users);
    values.extend([
        u32::from(pending.is_some()).into(),
        pending
            .map_or(Timestamp::from_micros(0), |only| only.now)
            .into(),
        pending.map_or("", |only| &only.except).into(),
        requested.into(),
        requested.into(),
        id,
        limit.into(),
    ]);
    values
}

/// The values of a query that counts the requests for access of a member.
pub(crate) fn access_count_key(asking: &AskingDevice, now: Timestamp) -> Vec<Value> {
    let address = &asking.address;
    vec![
        address.tenant.as_str().into(),
        address.user.as_str().into(),
        now.into(),
        address.device.into(),
        asking.verification_key.as_slice().into(),
    ]
}

/// The counts of requests for access.
pub(crate) fn access_counts(row: &impl Columns) -> Result<AccessCounts, Error> {
    let count = |name| Ok::<_, Error>(u64::try_from(row.integer(name)?).unwrap_or(0));
    Ok(AccessCounts {
        pending: count("pending_total")?,
        unexpired: count("total")?,
    })
}

/// The values of a new row of [`Table::AccessRequests`].
pub(crate) fn new_access_request(row: &AccessRow) -> Vec<Value> {
    let mut values = vec![row.id.into()];
    values.extend(access_request_values(row));
    values
}

/// The values of a row of [`Table::AccessRequests`] for [`Table::values`].
pub(crate) fn access_request_values(row: &AccessRow) -> Vec<Value> {
    let (device, decision, answer) = (&row.device, row.decision.as_ref(), row.answer.as_ref());
    let decided_device = decision.and_then(|decision| decision.device);
    let revision = row.answer_revision.map(Revision::get);
    let revision = revision.map(|number| i64::try_from(number).unwrap_or(i64::MAX));
    vec![
        row.signer.into(),
        row.state.as_str().into(),
        row.approver.as_str().into(),
        device.address.tenant.as_str().into(),
        device.address.user.as_str().into(),
        row.key_name.as_str().into(),
        device.address.device.into(),
        device.name.as_str().into(),
        device.kind.as_str().into(),
        device.verification_key.as_slice().into(),
        row.public_key.as_slice().into(),
        (&row.code).into(),
        row.code_key.into(),
        row.requested_by.as_str().into(),
        row.peer.as_str().into(),
        row.requested.into(),
        row.expires.into(),
        row.tries.into(),
        row.first_approved_by.as_deref().unwrap_or_default().into(),
        decision.map_or("", |decision| &decision.by).into(),
        decided_device
            .as_ref()
            .map_or(&[][..], |id| id.as_bytes())
            .into(),
        decision.map(|decision| decision.at).into(),
        answer.map_or(&[][..], |answer| &answer.bytes).into(),
        answer.map_or("", |answer| &answer.form).into(),
        row.fetched.into(),
        row.closed.into(),
        Value::OptionalInteger(revision),
        row.wrong_words.into(),
        (&row.mac).into(),
    ]
}
