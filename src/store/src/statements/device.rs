//! The statements about devices and requests for access.

use crate::{
    columns::Table,
    dialect::{Dialect, assignments, names},
    slow::named,
};

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
    /// Parameters: tenant, user, key name. Removes the devices that open a user key that is removed.
    pub(crate) remove_of_key: &'static str,

    /// Parameter: request.
    pub(crate) request: &'static str,
    /// Parameters: tenant, user, limit. Returns the requests of a member, newest first.
    pub(crate) requests_of_user: &'static str,
    /// Parameters: tenant, now, limit. Returns pending requests of a tenant, newest first.
    pub(crate) pending_requests: &'static str,
    /// Parameters: tenant, limit. Returns the requests of a tenant, newest first.
    pub(crate) requests: &'static str,
    /// Parameters: tenant, user, device. Returns the newest pending request of a device.
    pub(crate) newest_pending: &'static str,
    /// Parameters: tenant, user, now. Returns the number of requests that have not expired, and how many of them are pending.
    pub(crate) count_requests: &'static str,
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
    pub(crate) fn of_engine(dialect: &Dialect) -> Self {
        let sql = |statement: &str| dialect.text(statement);
        let (devices, requests) = (
            names(Table::Devices.columns()),
            names(Table::AccessRequests.columns()),
        );
        let newest = "ORDER BY requested_us DESC, request_id LIMIT ?";
        Self {
            one: sql(&format!(
                "SELECT {devices} FROM devices WHERE tenant = ? AND \"user\" = ? AND device_id = ?"
            )),
            of_user: sql(&format!(
                "SELECT {devices} FROM devices WHERE tenant = ? AND \"user\" = ? ORDER BY device_id LIMIT ?"
            )),
            trusted: sql(&format!(
                "SELECT device_id, mac FROM devices WHERE tenant = ? AND \"user\" = ? AND state = 'trusted' \
                 ORDER BY device_id {}",
                dialect.lock.unwrap_or_default()
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
            remove_of_key: sql(
                "DELETE FROM devices WHERE tenant = ? AND \"user\" = ? AND key_name = ?",
            ),
            request: sql(&format!(
                "SELECT {requests} FROM access_requests WHERE request_id = ?"
            )),
            requests_of_user: sql(&format!(
                "SELECT {requests} FROM access_requests WHERE tenant = ? AND \"user\" = ? {newest}"
            )),
            pending_requests: sql(&format!(
                "SELECT {requests} FROM access_requests WHERE tenant = ? AND expires_us > ? \
                 AND state NOT IN ('approved', 'denied', 'consumed', 'revoked') {newest}"
            )),
            requests: sql(&format!(
                "SELECT {requests} FROM access_requests WHERE tenant = ? {newest}"
            )),
            newest_pending: sql(&format!(
                "SELECT {requests} FROM access_requests \
                 WHERE tenant = ? AND \"user\" = ? AND device_id = ? AND state = 'pending' \
                 ORDER BY requested_us DESC, request_id LIMIT 1"
            )),
            count_requests: sql("SELECT count(*) AS total, \
                 count(CASE WHEN state = 'pending' THEN 1 END) AS pending_total \
                 FROM access_requests WHERE tenant = ? AND \"user\" = ? AND expires_us > ?"),
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
