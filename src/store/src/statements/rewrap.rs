//! The statements of a re-wrap.

use crate::{dialect::Dialect, slow::named};

named! {
/// The SQL of a re-wrap.
#[derive(Debug)]
pub(crate) struct RewrapStatements {
    /// Parameters: key, key, key, time after which a request id was used, key, now, key, key, key, now. Returns the numbers of revisions,
    /// API clients, request ids, open requests for approval, devices and open requests for access under the key.
    pub(crate) uses: &'static str,
    /// Returns the same numbers of rows under keys that are not registered.
    pub(crate) unregistered_uses: &'static str,
    /// Parameters: key, record, record, revision to start after, limit. Returns revisions with the
    /// addresses of their records.
    pub(crate) page: &'static str,
    /// Value: key. Returns the state of the key, and locks its row until the transaction ends.
    pub(crate) key_state: &'static str,
    /// Parameters: new envelope, new key, record, revision, old key, old envelope.
    pub(crate) move_revision: &'static str,
    /// Parameters: new MAC, new key, client, revision, old key, old MAC.
    pub(crate) move_client: &'static str,
    /// Returns the run.
    pub(crate) run: &'static str,
    /// Parameters: the columns of a run in their order, without the primary key.
    pub(crate) insert: &'static str,
    /// Parameters: the same as for `insert`. The statement replaces only a run that has ended.
    pub(crate) replace: &'static str,
    /// Parameters: new state, run, old state.
    pub(crate) set_state: &'static str,
    /// Parameters: new state, rate, run, old state.
    pub(crate) set_state_and_rate: &'static str,
    /// Parameters: holder, until, run, holder, now, time after which no lease can end.
    pub(crate) hold: &'static str,
    /// Parameters: document, run, holder.
    pub(crate) note: &'static str,
    /// Parameters: document, run, holder. The statement ends the run.
    pub(crate) end: &'static str,
}
}

const COLUMNS: &str = "run_id, state, rate, source_key, document, holder, lease_us, started_us";

impl RewrapStatements {
    pub(crate) fn of_engine(dialect: &Dialect) -> Self {
        let sql = |statement: &str| dialect.text(statement);
        Self {
            uses: sql(
                "SELECT (SELECT count(*) FROM revisions WHERE wrapping_key_id = ?) AS revisions, \
                 (SELECT count(*) FROM clients WHERE key_id = ?) AS clients, \
                 (SELECT count(*) FROM requests WHERE key_id = ? AND used_us > ?) AS requests, \
                 (SELECT count(*) FROM approvals WHERE signer_key_id = ? AND expires_us > ? \
                 AND state IN ('pending', 'approved')) AS approvals, \
                 (SELECT count(*) FROM devices WHERE signer_key_id = ?) AS devices, \
                 (SELECT count(*) FROM access_requests \
                 WHERE (signer_key_id = ? OR code_key_id = ?) AND expires_us > ? \
                 AND state IN ('pending', 'approved')) AS access_requests",
            ),
            unregistered_uses: sql("SELECT (SELECT count(*) FROM revisions \
                 WHERE wrapping_key_id NOT IN (SELECT key_id FROM wrapping_keys)) AS revisions, \
                 (SELECT count(*) FROM clients \
                 WHERE key_id NOT IN (SELECT key_id FROM wrapping_keys)) AS clients, \
                 (SELECT count(*) FROM requests \
                 WHERE key_id NOT IN (SELECT key_id FROM wrapping_keys)) AS requests, \
                 (SELECT count(*) FROM approvals \
                 WHERE signer_key_id NOT IN (SELECT key_id FROM wrapping_keys) \
                 AND state IN ('pending', 'approved')) AS approvals, \
                 (SELECT count(*) FROM devices \
                 WHERE signer_key_id NOT IN (SELECT key_id FROM wrapping_keys)) AS devices, \
                 (SELECT count(*) FROM access_requests \
                 WHERE signer_key_id NOT IN (SELECT key_id FROM wrapping_keys) \
                 AND state IN ('pending', 'approved')) AS access_requests"),
            page: sql(
                "SELECT v.record_id AS record_id, v.revision AS revision, v.envelope AS envelope, \
                 v.created_us AS created_us, r.tenant AS tenant, r.\"user\" AS \"user\", r.key_name AS key_name \
                 FROM revisions v LEFT JOIN records r ON r.record_id = v.record_id \
                 WHERE v.wrapping_key_id = ? AND v.record_id >= ? AND (v.record_id > ? OR v.revision > ?) \
                 ORDER BY v.record_id, v.revision LIMIT ?",
            ),
            key_state: sql(&format!(
                "SELECT state FROM wrapping_keys WHERE key_id = ? {}",
                dialect.lock.unwrap_or_default()
            )),
            move_revision: sql("UPDATE revisions SET envelope = ?, wrapping_key_id = ? \
                 WHERE record_id = ? AND revision = ? AND wrapping_key_id = ? AND envelope = ?"),
            move_client: sql("UPDATE clients SET mac = ?, key_id = ? \
                 WHERE client_id = ? AND revision = ? AND key_id = ? AND mac = ?"),
            run: sql(&format!("SELECT {COLUMNS} FROM rewraps")),
            insert: sql(&format!(
                "INSERT INTO rewraps (singleton, {COLUMNS}) VALUES (1, ?, ?, ?, ?, ?, ?, ?, ?){}",
                dialect.unless_taken
            )),
            replace: sql(
                "UPDATE rewraps SET run_id = ?, state = ?, rate = ?, source_key = ?, document = ?, \
                 holder = ?, lease_us = ?, started_us = ? WHERE singleton = 1 AND state = 'done'",
            ),
            set_state: sql(
                "UPDATE rewraps SET state = ? WHERE singleton = 1 AND run_id = ? AND state = ?",
            ),
            set_state_and_rate: sql(
                "UPDATE rewraps SET state = ?, rate = ? WHERE singleton = 1 AND run_id = ? AND state = ?",
            ),
            hold: sql("UPDATE rewraps SET holder = ?, lease_us = ? \
                 WHERE singleton = 1 AND run_id = ? AND state = 'running' \
                 AND (holder = ? OR lease_us <= ? OR lease_us > ?)"),
            note: sql(
                "UPDATE rewraps SET document = ? WHERE singleton = 1 AND run_id = ? AND holder = ?",
            ),
            end: sql("UPDATE rewraps SET document = ?, state = 'done' \
                 WHERE singleton = 1 AND run_id = ? AND holder = ?"),
        }
    }
}
