//! The statements about devices and requests for access.

use crate::{
    columns::Table,
    dialect::{Dialect, assignments, names, places},
    slow::named,
};

/// Number of users that one statement names.
pub(crate) const USERS_AT_ONCE: usize = 50;

named! {
/// The SQL of devices and requests for access.
#[derive(Debug)]
pub(crate) struct DeviceStatements {
    /// Parameters: tenant, user, device.
    pub(crate) one: &'static str,
    /// Parameters: tenant, user, limit. Returns the devices of a member in the order of their ids.
    pub(crate) of_user: &'static str,
    /// Parameters: tenant, user. Returns the ids and MACs of the trusted devices of a member, in the order of the ids.
    pub(crate) trusted: &'static str,
    /// Parameters: all columns of a device except the key, then the columns of the key and the current MAC.
    pub(crate) change: &'static str,
    /// Parameters: time, tenant, user, device, time. The statement does not replace a later stored time.
    pub(crate) note_use: &'static str,
    /// Parameters: new MAC, new key, tenant, user, device, old key, old MAC.
    pub(crate) move_mac: &'static str,
    /// Parameters: changed before, limit. Removes devices that are not trusted.
    pub(crate) forget: &'static str,
    /// Parameter: changed before. Returns the number of devices that are not trusted.
    pub(crate) old: &'static str,
    /// Parameters: tenant, user, device.
    pub(crate) remove: &'static str,
    /// Parameters: tenant, user.
    pub(crate) remove_requests: &'static str,
    /// Each has the parameters tenant, user, key name. They remove the devices that open a user key that is removed, and the requests
    /// for this user key.
    pub(crate) remove_of_key: &'static str,
    pub(crate) remove_requests_of_key: &'static str,
    /// Parameters: tenant, user. Locks the user keys of a member until the transaction ends. `None` if a transaction locks the entire
    /// database.
    pub(crate) lock_member: Option<&'static str>,

    /// Parameter: request.
    pub(crate) request: &'static str,
    /// Parameters: tenant, [`USERS_AT_ONCE`] users, then those of `requests` after the tenant. The same user may occur several times.
    pub(crate) requests_of_users: &'static str,
    /// Parameters: tenant, 1 if only pending requests are wanted, now, principal whose requests are then not wanted, the time (twice)
    /// and the id to start after, limit. Returns requests, newest first.
    pub(crate) requests: &'static str,
    /// Parameters: tenant, as many users as [`USERS_AT_ONCE`], limit. Returns decided requests, the latest decision first.
    pub(crate) decisions_of_users: &'static str,
    /// Parameters: tenant, limit. Returns decided requests, the latest decision first.
    pub(crate) decisions: &'static str,
    /// Parameters: tenant, user, device, verification key. Removes the pending requests of a device.
    pub(crate) remove_pending: &'static str,
    /// Parameters: tenant, user, now, device, verification key. Returns the number of requests that have not expired, without the
    /// pending requests of the device, and how many of them are pending.
    pub(crate) count_requests: &'static str,
    /// Parameters: request, MAC. Locks a request, and returns it if it has this MAC.
    pub(crate) unchanged_request: &'static str,
    /// Parameters: tenant, user, made after. Returns the number of requests.
    pub(crate) recent_requests: &'static str,
    /// Parameters: tenant, principal, approved after, principal, made after. Returns the number of requests that the principal
    /// approved for members.
    pub(crate) recent_approvals: &'static str,
    /// Parameters: all columns of a request except the key, then the key and the current MAC.
    pub(crate) change_request: &'static str,
    /// Parameters: expired before, limit.
    pub(crate) forget_requests: &'static str,
    /// Parameter: expired before. Returns the number of requests.
    pub(crate) old_requests: &'static str,
}
}

impl DeviceStatements {
    #[expect(clippy::too_many_lines, reason = "one list of statements")]
    pub(crate) fn of_engine(dialect: &Dialect) -> Self {
        let sql = |statement: &str| dialect.text(statement);
        let (devices, requests) = (
            names(Table::Devices.columns()),
            names(Table::AccessRequests.columns()),
        );
        let lock = dialect.lock.unwrap_or_default();
        let page = |of_users: &str| {
            sql(&format!(
                "SELECT {requests} FROM access_requests WHERE tenant = ?{of_users} \
                 AND (? = 0 OR (expires_us > ? AND requested_by <> ? \
                 AND state NOT IN ('approved', 'denied', 'consumed', 'revoked'))) \
                 AND (requested_us < ? OR (requested_us = ? AND request_id > ?)) \
                 ORDER BY requested_us DESC, request_id LIMIT ?"
            ))
        };
        let decisions = |users: &str| {
            sql(&format!(
                "SELECT {requests} FROM access_requests WHERE tenant = ?{users} AND decided_us IS NOT NULL \
                 ORDER BY decided_us DESC, request_id LIMIT ?"
            ))
        };
        let of_users = format!(" AND \"user\" IN ({})", places(USERS_AT_ONCE));
        Self {
            one: sql(&format!(
                "SELECT {devices} FROM devices WHERE tenant = ? AND \"user\" = ? AND device_id = ?"
            )),
            of_user: sql(&format!(
                "SELECT {devices} FROM devices WHERE tenant = ? AND \"user\" = ? ORDER BY device_id LIMIT ?"
            )),
            trusted: sql(&format!(
                "SELECT device_id, mac FROM devices WHERE tenant = ? AND \"user\" = ? AND state = 'trusted' \
                 ORDER BY device_id {lock}"
            )),
            change: sql(&format!(
                "UPDATE devices SET {} WHERE tenant = ? AND \"user\" = ? AND device_id = ? AND mac = ?",
                assignments(Table::Devices.values())
            )),
            note_use: sql("UPDATE devices SET used_us = ? \
                 WHERE tenant = ? AND \"user\" = ? AND device_id = ? AND (used_us IS NULL OR used_us < ?)"),
            move_mac: sql("UPDATE devices SET mac = ?, signer_key_id = ? \
                 WHERE tenant = ? AND \"user\" = ? AND device_id = ? AND signer_key_id = ? AND mac = ?"),
            forget: dialect.delete_some(Table::Devices, "state <> 'trusted' AND changed_us < ?"),
            old: sql(
                "SELECT count(*) AS total FROM devices WHERE state <> 'trusted' AND changed_us < ?",
            ),
            remove: sql("DELETE FROM devices WHERE tenant = ? AND \"user\" = ? AND device_id = ?"),
            remove_requests: sql("DELETE FROM access_requests WHERE tenant = ? AND \"user\" = ?"),
            remove_of_key: sql(
                "DELETE FROM devices WHERE tenant = ? AND \"user\" = ? AND key_name = ?",
            ),
            remove_requests_of_key: sql(
                "DELETE FROM access_requests WHERE tenant = ? AND \"user\" = ? AND key_name = ?",
            ),
            lock_member: dialect.lock.map(|lock| {
                sql(&format!(
                    "SELECT record_id FROM records WHERE tenant = ? AND \"user\" = ? ORDER BY record_id {lock}"
                ))
            }),
            request: sql(&format!(
                "SELECT {requests} FROM access_requests WHERE request_id = ?"
            )),
            requests_of_users: page(&of_users),
            requests: page(""),
            decisions_of_users: decisions(&of_users),
            decisions: decisions(""),
            remove_pending: sql("DELETE FROM access_requests \
                 WHERE tenant = ? AND \"user\" = ? AND device_id = ? AND verification_key = ? \
                 AND state = 'pending'"),
            count_requests: sql("SELECT count(*) AS total, \
                 count(CASE WHEN state = 'pending' THEN 1 END) AS pending_total \
                 FROM access_requests WHERE tenant = ? AND \"user\" = ? AND expires_us > ? \
                 AND (state <> 'pending' OR device_id <> ? OR verification_key <> ?)"),
            unchanged_request: sql(&format!(
                "SELECT request_id FROM access_requests WHERE request_id = ? AND mac = ? {lock}"
            )),
            recent_requests: sql("SELECT count(*) AS total FROM access_requests \
                 WHERE tenant = ? AND \"user\" = ? AND requested_us > ?"),
            recent_approvals: sql("SELECT count(*) AS total FROM access_requests \
                 WHERE tenant = ? AND state <> 'denied' AND length(decided_device) = 0 \
                 AND (decided_by = ? AND decided_us > ? OR first_approved_by = ? AND requested_us > ?)"),
            change_request: sql(&format!(
                "UPDATE access_requests SET {} WHERE request_id = ? AND mac = ?",
                assignments(Table::AccessRequests.values())
            )),
            forget_requests: dialect.delete_some(Table::AccessRequests, "expires_us < ?"),
            old_requests: sql("SELECT count(*) AS total FROM access_requests WHERE expires_us < ?"),
        }
    }
}
