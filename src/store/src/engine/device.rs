//! The calls of [`Devices`], for any engine.

use std::cmp::Reverse;

use async_trait::async_trait;

use crate::{
    Error,
    device::{
        ACCESS_REQUESTS_LISTED_MAX, AccessCounts, AccessCursor, AccessQuery, AccessRow,
        AskingDevice, Changed, DEVICES_MAX, DamagedAccess, DamagedDevice, DeviceAddress,
        DeviceChange, DeviceMove, DeviceRow, Devices,
    },
    mutations::{self, Change, insert_unless_taken},
    record::RecordInfo,
    rows,
    session::{Columns as _, Session, Value},
    statements::{Statements, USERS_AT_ONCE},
    tables::Table,
};
use keybroker_core::{
    call::{CallId, Timestamp},
    envelope::Mac,
    key::{AccessRequestId, DeviceId, KeyUse, Tenant, UserId},
    principal::Reach,
};

use super::{End, Engine, EngineStore, rewrap::keys_of, uses::filled};

/// Highest number of rows that one statement removes, so that no call waits long for the locks of the statement.
const FORGOTTEN_AT_ONCE: u64 = 100;

/// Writes the rows of a change. The mark of the call is already inserted.
async fn write(
    session: &mut impl Session,
    sql: &'static Statements,
    change: &DeviceChange,
    at: Timestamp,
) -> Result<(), Error> {
    for removed in &change.removes {
        let values = rows::device_key(removed);
        session.execute(sql.device.remove, values).await?;
    }
    if let Some(one) = change.removes.first() {
        let values = vec![one.tenant.as_str().into(), one.user.as_str().into()];
        session.execute(sql.device.remove_requests, values).await?;
    }
    if let Some((tenant, user, known)) = &change.trusted {
        let values = vec![tenant.as_str().into(), user.as_str().into()];
        let found = session.rows(sql.device.trusted, values).await?;
        let mut trusted: Vec<(DeviceId, Mac)> = Vec::with_capacity(found.len());
        for row in &found {
            let id = DeviceId::from_slice(row.bytes("device_id")?);
            let mac = row.bytes("mac")?.try_into();
            trusted.push(id.zip(mac.ok()).ok_or(Error::Conflict)?);
        }
        if trusted != *known {
            return Err(Error::Conflict);
        }
    }
    for Changed { row, expected } in &change.devices {
        let (statement, values) = match expected {
            None => (sql.of(Table::Devices).insert, rows::new_device(row)),
            Some(mac) => {
                let mut values = rows::device_values(row);
                values.extend(rows::device_key(&row.address));
                values.push(mac.into());
                (sql.device.change, values)
            }
        };
        write_row(session, statement, values, expected.is_none()).await?;
    }
    if let Some((request, mac)) = &change.unchanged {
        let values = vec![(*request).into(), mac.into()];
        let found = session.rows(sql.device.unchanged_request, values).await?;
        found.first().ok_or(Error::Conflict)?;
    }
    if let (Some(Changed { row, .. }), Some(most)) = (&change.request, &change.fewer_than) {
        make_room(session, sql, &row.device, most, at).await?;
    }
    if let Some(Changed { row, expected }) = &change.request {
        let (statement, values) = match expected {
            None => (
                sql.of(Table::AccessRequests).insert,
                rows::new_access_request(row),
            ),
            Some(mac) => {
                let mut values = rows::access_request_values(row);
                values.extend([row.id.into(), mac.into()]);
                (sql.device.change_request, values)
            }
        };
        write_row(session, statement, values, expected.is_none()).await?;
    }
    Ok(())
}

/// Removes the earlier pending requests of a device, and requires that the member has few enough other requests. A request with the id
/// of the device and another verification key is the request of another device.
async fn make_room(
    session: &mut impl Session,
    sql: &'static Statements,
    asking: &AskingDevice,
    most: &AccessCounts,
    now: Timestamp,
) -> Result<(), Error> {
    let mut pending = rows::device_key(&asking.address);
    pending.push(asking.verification_key.as_slice().into());
    session.execute(sql.device.remove_pending, pending).await?;
    let values = rows::access_count_key(asking, now);
    let found = session.rows(sql.device.count_requests, values).await?;
    let counts = rows::access_counts(found.first().ok_or(Error::NotFound)?)?;
    if counts.pending < most.pending && counts.unexpired < most.unexpired {
        Ok(())
    } else {
        Err(Error::Conflict)
    }
}

/// The statements that read the rows of these users, each with the values for its users.
fn portions(
    users: &Reach<UserId>,
    of_all: &'static str,
    of_some: &'static str,
) -> Vec<(&'static str, Vec<Value>)> {
    match users {
        Reach::All => vec![(of_all, Vec::new())],
        Reach::Only(users) => {
            let users: Vec<&UserId> = users.iter().collect();
            let portions = users.chunks(USERS_AT_ONCE).map(|portion| {
                let users = filled(portion, USERS_AT_ONCE).map(|user| user.as_str().into());
                (of_some, users.collect())
            });
            portions.collect()
        }
    }
}

/// The newest rows of several portions.
fn newest_first<T>(mut rows: Vec<(AccessCursor, T)>, limit: u32) -> Vec<(AccessCursor, T)> {
    rows.sort_by_key(|((at, id), _)| (Reverse(*at), *id));
    rows.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
    rows
}

async fn write_row(
    session: &mut impl Session,
    statement: &'static str,
    values: Vec<Value>,
    is_new: bool,
) -> Result<(), Error> {
    if is_new {
        return if insert_unless_taken(session, statement, values).await? {
            Ok(())
        } else {
            Err(Error::Exists)
        };
    }
    match session.execute(statement, values).await? {
        1 => Ok(()),
        _ => Err(Error::Conflict),
    }
}

impl<E: Engine> EngineStore<E> {
    /// Repeats a statement that removes a limited number of rows.
    async fn forget(&self, statement: &'static str, before: Timestamp) -> Result<u64, Error> {
        let mut forgotten = 0;
        loop {
            let values = vec![before.into(), FORGOTTEN_AT_ONCE.into()];
            let portion = self.execute(statement, values).await?;
            forgotten += portion;
            if portion < FORGOTTEN_AT_ONCE {
                return Ok(forgotten);
            }
        }
    }

    async fn count_old(&self, statement: &'static str, before: Timestamp) -> Result<u64, Error> {
        self.count(statement, vec![before.into()]).await
    }

    async fn count(&self, statement: &'static str, values: Vec<Value>) -> Result<u64, Error> {
        let found = self.query(statement, values).await?;
        let total = found.first().ok_or(Error::NotFound)?.integer("total")?;
        Ok(u64::try_from(total).unwrap_or(0))
    }
}

#[async_trait]
impl<E: Engine> Devices for EngineStore<E> {
    async fn device(&self, address: &DeviceAddress) -> Result<Option<DeviceRow>, Error> {
        let found = self
            .query(E::sql().device.one, rows::device_key(address))
            .await?;
        found.first().map(rows::device).transpose()
    }

    async fn devices(
        &self,
        tenant: &Tenant,
        user: &UserId,
    ) -> Result<Vec<Result<DeviceRow, DamagedDevice>>, Error> {
        let values = vec![
            tenant.as_str().into(),
            user.as_str().into(),
            DEVICES_MAX.into(),
        ];
        let found = self.query(E::sql().device.of_user, values).await?;
        Ok(found.iter().map(rows::listed_device).collect())
    }

    async fn devices_after(
        &self,
        after: Option<&DeviceAddress>,
        limit: u32,
    ) -> Result<Vec<(DeviceAddress, Result<DeviceRow, DamagedDevice>)>, Error> {
        // Empty values come before all rows, because no part of an address is empty.
        let mut values = match after {
            Some(address) => rows::device_key(address),
            None => vec!["".into(), "".into(), Value::Bytes(Vec::new())],
        };
        values.insert(0, values[0].clone());
        values.extend([limit.into(), 0_u32.into()]);
        let found = self.query(E::sql().of(Table::Devices).page, values).await?;
        let decode = |row| Ok((rows::device_address(row)?, rows::listed_device(row)));
        found.iter().map(decode).collect()
    }

    async fn change_devices(
        &self,
        change: &DeviceChange,
        call: CallId,
        at: Timestamp,
    ) -> Result<Option<RecordInfo>, Error> {
        let change = change.clone();
        self.transaction(End::CommitMarked(call), move |session, sql| {
            let change = change.clone();
            Box::pin(async move {
                if let (Some(lock), Some((tenant, user))) =
                    (sql.device.lock_member, change.member())
                {
                    let values = vec![tenant.as_str().into(), user.as_str().into()];
                    session.rows(lock, values).await?;
                }
                let replaced = if let Some(one) = &change.replaces {
                    let supersede = Change::Supersede(one.new.clone());
                    Some(mutations::apply(session, sql, &supersede, &one.stamp).await?)
                } else {
                    let record = change.requires.map(|(record, _)| record);
                    mutations::mark(session, sql, call, record, at).await?;
                    None
                };
                if let Some((record, revision)) = change.requires {
                    mutations::require_revision(session, sql, record, revision).await?;
                }
                write(session, sql, &change, at).await?;
                Ok(replaced)
            })
        })
        .await
    }

    async fn note_device_use(&self, address: &DeviceAddress, at: Timestamp) -> Result<(), Error> {
        let mut values: Vec<Value> = vec![at.into()];
        values.extend(rows::device_key(address));
        values.push(at.into());
        self.execute(E::sql().device.note_use, values)
            .await
            .map(drop)
    }

    async fn move_devices(&self, moves: Vec<DeviceMove>, call: CallId) -> Result<Vec<bool>, Error> {
        let first = moves.first().map(|one| one.address.device.into());
        let values = |one: DeviceMove| {
            let mut values: Vec<Value> = vec![(&one.new).into(), one.to.into()];
            values.extend(rows::device_key(&one.address));
            values.extend([one.from.into(), (&one.old).into()]);
            values
        };
        let keys = keys_of(
            moves.iter().map(|one| (one.from, one.to)),
            KeyUse::RewrapFrom,
        );
        let swaps = moves.into_iter().map(values).collect();
        self.swap(E::sql().device.move_mac, first, keys, swaps, call)
            .await
    }

    async fn forget_devices(&self, before: Timestamp) -> Result<u64, Error> {
        self.forget(E::sql().device.forget, before).await
    }

    async fn old_devices(&self, before: Timestamp) -> Result<u64, Error> {
        self.count_old(E::sql().device.old, before).await
    }

    async fn access_request(&self, id: AccessRequestId) -> Result<Option<AccessRow>, Error> {
        let found = self.query(E::sql().device.request, vec![id.into()]).await?;
        found.first().map(rows::access_request).transpose()
    }

    async fn access_requests(
        &self,
        wanted: &AccessQuery,
    ) -> Result<Vec<(AccessCursor, Result<AccessRow, DamagedAccess>)>, Error> {
        let sql = &E::sql().device;
        let limit = wanted.limit.min(ACCESS_REQUESTS_LISTED_MAX);
        let mut page = Vec::new();
        for (statement, users) in portions(&wanted.users, sql.requests, sql.requests_of_users) {
            let values = rows::access_query_values(wanted, users, limit);
            for row in &self.query(statement, values).await? {
                page.push((rows::access_cursor(row)?, rows::listed_access(row)));
            }
        }
        Ok(newest_first(page, limit))
    }

    async fn access_decisions(
        &self,
        tenant: &Tenant,
        users: &Reach<UserId>,
        limit: u32,
    ) -> Result<Vec<Result<AccessRow, DamagedAccess>>, Error> {
        let sql = &E::sql().device;
        let limit = limit.min(ACCESS_REQUESTS_LISTED_MAX);
        let mut page = Vec::new();
        for (statement, users) in portions(users, sql.decisions, sql.decisions_of_users) {
            let mut values = vec![tenant.as_str().into()];
            values.extend(users);
            values.push(limit.into());
            for row in &self.query(statement, values).await? {
                page.push((rows::decision_cursor(row)?, rows::listed_access(row)));
            }
        }
        let page = newest_first(page, limit).into_iter();
        Ok(page.map(|(_, row)| row).collect())
    }

    async fn count_access_requests(
        &self,
        asking: &AskingDevice,
        now: Timestamp,
    ) -> Result<AccessCounts, Error> {
        let values = rows::access_count_key(asking, now);
        let found = self.query(E::sql().device.count_requests, values).await?;
        rows::access_counts(found.first().ok_or(Error::NotFound)?)
    }

    async fn recent_access_requests(
        &self,
        tenant: &Tenant,
        user: &UserId,
        after: Timestamp,
    ) -> Result<u64, Error> {
        let values = vec![tenant.as_str().into(), user.as_str().into(), after.into()];
        self.count(E::sql().device.recent_requests, values).await
    }

    async fn recent_approvals(
        &self,
        tenant: &Tenant,
        principal: &str,
        after: Timestamp,
    ) -> Result<u64, Error> {
        let values = vec![
            tenant.as_str().into(),
            principal.into(),
            after.into(),
            principal.into(),
            after.into(),
        ];
        self.count(E::sql().device.recent_approvals, values).await
    }

    async fn forget_access_requests(&self, before: Timestamp) -> Result<u64, Error> {
        self.forget(E::sql().device.forget_requests, before).await
    }

    async fn old_access_requests(&self, before: Timestamp) -> Result<u64, Error> {
        self.count_old(E::sql().device.old_requests, before).await
    }
}
