//! All SQL statements, in a form that does not depend on the engine. A [`Dialect`] converts each
//! statement into the text for one engine. `?` marks the position of a value. The parameters and
//! their order are the same on each engine. The code that reads rows uses the names of the columns.

use super::{
    columns::{PerTable, Table},
    dialect::{Dialect, assignments, names, places, quoted},
    identity::CHANGES_MAX,
    slow::named,
};

mod device;
mod rewrap;

use device::DeviceStatements;
pub(super) use device::USERS_AT_ONCE;
use rewrap::RewrapStatements;

/// Number of records whose last uses one statement reads or stores.
pub(super) const RECORDS_AT_ONCE: usize = 50;

/// Highest number of uses of API clients' secrets that one statement stores.
pub(super) const CLIENT_USES_AT_ONCE: usize = 20;

/// The columns of a record `r` with its current revision `v`, without the envelope.
const RECORD: &str = "r.record_id AS record_id, r.state AS state, r.revision AS revision, \
                      r.created_us AS created_us, r.updated_us AS updated_us, \
                      r.deleted_us AS deleted_us, v.wrapping_key_id AS wrapping_key_id, \
                      (SELECT max(n.revision) FROM revisions n WHERE n.record_id = r.record_id) \
                      AS newest_revision";
const ADDRESS: &str = r#"r.tenant AS tenant, r."user" AS "user", r.key_name AS key_name"#;
const RECORDS: &str = "records r LEFT JOIN revisions v \
                       ON v.record_id = r.record_id AND v.revision = r.revision";
/// A row with an unreadable state is also selected, and is listed as damaged.
const STATE_WANTED: &str = "(? = 1 OR r.state <> 'deleted' OR r.state IS NULL)";

named! {
/// The SQL of one engine.
#[derive(Debug)]
pub(super) struct Statements {
    pub(super) begin: &'static str,
    /// Parameter: an empty call id. The statement changes no row, and fails if the database cannot
    /// be changed.
    pub(super) probe: &'static str,
    /// Reads at most one row.
    pub(super) probe_read: &'static str,

    /// Parameters: tenant, user, key name. Returns the record and its envelope.
    pub(super) record: &'static str,
    /// Parameters: record, revision. Returns the envelope, wrapping key and time.
    pub(super) revision: &'static str,
    /// Parameters: tenant, user to start after (twice), key name to start after, 1 to include
    /// deleted records, limit, rows to skip. Returns records with their addresses.
    pub(super) page: &'static str,
    /// Parameters: tenant, user, key name to start after, 1 to include deleted records, limit, rows
    /// to skip. Returns records with their addresses.
    pub(super) page_of_user: &'static str,
    /// Parameters: tenant, principal, request id, time after which the id was used. Returns the
    /// request.
    pub(super) request: &'static str,
    /// Returns the registry, ordered by sequence.
    pub(super) registry: &'static str,
    /// Returns the places of wrapping keys, ordered by key and token.
    pub(super) places: &'static str,

    /// Parameter: record. Locks the record until the transaction ends. `None` if a transaction
    /// locks the entire database.
    pub(super) lock_record: Option<&'static str>,
    /// Parameter: record. Returns the record with its address.
    pub(super) record_by_id: &'static str,
    /// Parameters: all columns of the table `changes`. The statement waits for a transaction that
    /// inserts a row of the same call.
    pub(super) insert_change: &'static str,
    /// Parameters: the ids of [`CHANGES_MAX`] calls. Returns the identity of the database, and the
    /// number of given calls that have a mark. Returns no row if the database has no identity.
    pub(super) evidence: &'static str,
    /// Parameters: identity, at. If the database already has an identity, the statement inserts
    /// nothing.
    pub(super) insert_identity: &'static str,
    /// Parameter: identity.
    pub(super) update_identity: &'static str,
    /// Parameters: log, instance. Returns the number of audit logs of the instance, and 1 if the
    /// given log is among these audit logs, otherwise 0.
    pub(super) audit_logs: &'static str,
    /// Parameters: instance, log, at. If the instance already has the log, the statement inserts
    /// nothing or fails with a duplicate key.
    pub(super) insert_audit_log: &'static str,
    /// Parameters: tenant, user, limit. Returns the number of records, including deleted records.
    pub(super) count_keys: &'static str,
    /// Parameters: record, limit. Returns the number of revisions.
    pub(super) count_revisions: &'static str,
    /// Parameters: all columns of the table `revisions`.
    pub(super) insert_revision: &'static str,
    /// Parameters: new revision, time of the change, record, current revision.
    pub(super) advance_record: &'static str,
    /// Parameters: state, time of the change, time of the deletion, record.
    pub(super) set_state: &'static str,
    /// Parameters: tenant, principal, request id, time until which the id was used.
    pub(super) forget_request: &'static str,
    /// Parameters: used before, limit.
    pub(super) forget_requests: &'static str,
    /// Parameters: all columns of the registry except the key, then the key and the current MAC.
    pub(super) update_registry: &'static str,
    /// Parameters: all columns of a place except the key, then the columns of the key and the
    /// current MAC.
    pub(super) update_place: &'static str,

    /// The scheduled destructions, by key.
    pub(super) destructions: &'static str,
    /// Value: key.
    pub(super) delete_destruction: &'static str,
    /// Values: holder, until, key, MAC, holder, now, time after which no lease can end.
    pub(super) hold_destruction: &'static str,
    /// Values: key, MAC.
    pub(super) end_destruction: &'static str,

    /// Parameter: limit. Returns the requests for approval, newest first.
    pub(super) approvals: &'static str,
    /// Parameters: now, limit. Returns the requests for approval that are open, newest first. A row whose state is none that a broker
    /// writes counts as open, so that it is noticed.
    pub(super) open_approvals: &'static str,
    /// Parameter: request.
    pub(super) approval: &'static str,
    /// Parameter: digest. Returns at most one request, because digests are unique.
    pub(super) approval_of: &'static str,
    /// Parameters: person, now. Returns the number of requests that have not expired, and how many of them are open.
    pub(super) count_approvals: &'static str,
    /// Parameters: digest, MAC. Removes the request, if it has this MAC.
    pub(super) replace_approval: &'static str,
    /// Parameters: request, state, MAC. Removes the request, if it has this state and this MAC.
    pub(super) remove_approval: &'static str,
    /// Parameter: request.
    pub(super) remove_unreadable_approval: &'static str,
    /// Parameters: all columns of a request except the key, then the key and the current MAC.
    pub(super) change_approval: &'static str,
    /// Parameters: expired before, limit.
    pub(super) forget_approvals: &'static str,
    /// Parameter: expired before. Returns the number of requests.
    pub(super) old_approvals: &'static str,

    /// Parameters: organisation, member, limit. Returns the pins of a member, newest first.
    pub(super) member_keys: &'static str,
    /// Parameters: organisation, digest.
    pub(super) member_key: &'static str,
    /// Parameters: all columns of a pin except the key, then the columns of the key and the current MAC.
    pub(super) update_member_key: &'static str,

    /// Parameter: client. Returns the complete row.
    pub(super) client: &'static str,
    /// Parameters: new revision, document, MAC, wrapping key, time of the change, client, current
    /// revision.
    pub(super) update_client: &'static str,

    /// Parameters: record, revision. The statement does not delete a current revision.
    pub(super) delete_superseded: &'static str,
    /// Parameter: record.
    pub(super) delete_revisions: &'static str,
    /// Parameter: record.
    pub(super) delete_record: &'static str,
    /// Parameter: call.
    pub(super) delete_change: &'static str,
    /// Parameter: record.
    pub(super) delete_use: &'static str,
    /// Parameters: [`RECORDS_AT_ONCE`] rows of the table `last_uses`. The same row may occur
    /// several times. The statement does not replace a later stored time.
    pub(super) note_uses: &'static str,
    /// Parameters: the ids of [`RECORDS_AT_ONCE`] records. Returns the times at which the given
    /// records were last released.
    pub(super) uses: &'static str,
    /// Parameters: [`CLIENT_USES_AT_ONCE`] rows of the table `client_uses`. The same row may occur
    /// several times. The statement does not replace a later stored time.
    pub(super) note_client_uses: &'static str,
    /// Parameter: client. Returns the uses of the client's secrets, ordered by the number of the
    /// secret.
    pub(super) uses_of_client: &'static str,

    pub(super) clock: Option<&'static str>,
    pub(super) has_migrations: &'static str,
    /// Returns the newest completed migration, if any.
    pub(super) newest_migration: &'static str,
    /// Parameter: version. Returns the completed migrations after the given version, with their
    /// descriptions.
    pub(super) later_migrations: &'static str,
    pub(super) durability: &'static str,

    pub(super) rewrap: RewrapStatements,
    pub(super) device: DeviceStatements,

    tables: PerTable<OfTable>,
}
}

named! {
/// The statements that exist for every table.
#[derive(Debug)]
pub(super) struct OfTable {
    /// Returns the number of rows.
    pub(super) count: &'static str,
    /// Returns the number of rows with NULL in a column of the key.
    pub(super) keyless: &'static str,
    /// Parameters: the key to start after, limit, rows to skip. If the key has several columns, the
    /// parameters contain the value of the first column twice. Returns all columns.
    pub(super) page: &'static str,
    /// Parameters: all columns. If the row exists, the statement inserts nothing or fails with a
    /// duplicate key: see [`insert_unless_taken`](super::mutations::insert_unless_taken).
    pub(super) insert: &'static str,
}
}

impl Statements {
    /// The statements of an engine.
    #[expect(
        clippy::too_many_lines,
        reason = "a list, in which each statement stands once"
    )]
    pub(super) fn of_engine(dialect: &Dialect) -> Self {
        let sql = |statement: &str| dialect.text(statement);
        let (requests, registry, clients, approvals, member_keys) = (
            names(Table::Requests.columns()),
            names(Table::WrappingKeys.columns()),
            names(Table::Clients.columns()),
            names(Table::Approvals.columns()),
            names(Table::MemberKeys.columns()),
        );
        Self {
            begin: dialect.begin,
            probe: sql("DELETE FROM changes WHERE call_id = ?"),
            probe_read: sql("SELECT sequence FROM wrapping_keys LIMIT 1"),

            record: sql(&format!(
                "SELECT {RECORD}, v.envelope AS envelope FROM {RECORDS} \
                 WHERE r.tenant = ? AND r.\"user\" = ? AND r.key_name = ?"
            )),
            revision: sql(
                "SELECT wrapping_key_id, envelope, created_us FROM revisions WHERE record_id = ? AND revision = ?",
            ),
            page: sql(&format!(
                "SELECT {RECORD}, {ADDRESS} FROM {RECORDS} \
                 WHERE r.tenant = ? AND r.\"user\" >= ? AND (r.\"user\" > ? OR r.key_name > ?) \
                 AND {STATE_WANTED} ORDER BY r.\"user\", r.key_name LIMIT ? OFFSET ?"
            )),
            page_of_user: sql(&format!(
                "SELECT {RECORD}, {ADDRESS} FROM {RECORDS} \
                 WHERE r.tenant = ? AND r.\"user\" = ? AND r.key_name > ? \
                 AND {STATE_WANTED} ORDER BY r.key_name LIMIT ? OFFSET ?"
            )),
            request: sql(&format!(
                "SELECT {requests} FROM requests \
                 WHERE tenant = ? AND principal = ? AND request_id = ? AND used_us > ?"
            )),
            registry: sql(&format!(
                "SELECT {registry} FROM wrapping_keys ORDER BY sequence, key_id"
            )),
            places: sql(&format!(
                "SELECT {} FROM wrapping_key_places ORDER BY key_id, token",
                names(Table::Places.columns())
            )),

            lock_record: dialect.lock.map(|lock| {
                sql(&format!(
                    "SELECT record_id FROM records WHERE record_id = ? {lock}"
                ))
            }),
            record_by_id: sql(&format!(
                "SELECT {RECORD}, {ADDRESS} FROM {RECORDS} WHERE r.record_id = ?"
            )),
            insert_change: dialect.insert(Table::Changes),
            evidence: sql(&format!(
                "SELECT store_id, (SELECT count(*) FROM changes WHERE call_id IN ({})) AS marks \
                 FROM store_identity",
                places(CHANGES_MAX)
            )),
            insert_identity: sql(&format!(
                "INSERT INTO store_identity (singleton, store_id, created_us) VALUES (1, ?, ?){}",
                dialect.unless_taken
            )),
            update_identity: sql("UPDATE store_identity SET store_id = ? WHERE singleton = 1"),
            audit_logs: sql(
                "SELECT count(*) AS known, count(CASE WHEN log_id = ? THEN 1 END) AS this \
                 FROM audit_logs WHERE instance = ?",
            ),
            insert_audit_log: sql(&format!(
                "INSERT INTO audit_logs (instance, log_id, bound_us) VALUES (?, ?, ?){}",
                dialect.unless_taken
            )),
            count_keys: sql(
                "SELECT count(*) AS total FROM (SELECT 1 AS one FROM records \
                 WHERE tenant = ? AND \"user\" = ? LIMIT ?) AS found",
            ),
            count_revisions: sql(
                "SELECT count(*) AS total FROM (SELECT 1 AS one FROM revisions \
                 WHERE record_id = ? LIMIT ?) AS found",
            ),
            insert_revision: dialect.insert(Table::Revisions),
            advance_record: sql(
                "UPDATE records SET revision = ?, updated_us = ? WHERE record_id = ? AND revision = ?",
            ),
            set_state: sql(
                "UPDATE records SET state = ?, updated_us = ?, deleted_us = ? WHERE record_id = ?",
            ),
            forget_request: sql("DELETE FROM requests \
                 WHERE tenant = ? AND principal = ? AND request_id = ? AND used_us <= ?"),
            forget_requests: dialect.delete_some(Table::Requests, "used_us < ?"),
            update_registry: sql(&format!(
                "UPDATE wrapping_keys SET {} WHERE key_id = ? AND mac = ?",
                assignments(Table::WrappingKeys.values())
            )),
            update_place: sql(&format!(
                "UPDATE wrapping_key_places SET {} WHERE key_id = ? AND token = ? AND mac = ?",
                assignments(Table::Places.values())
            )),

            destructions: sql(&format!(
                "SELECT {} FROM key_destructions ORDER BY key_id",
                names(Table::Destructions.columns())
            )),
            delete_destruction: sql("DELETE FROM key_destructions WHERE key_id = ?"),
            hold_destruction: sql("UPDATE key_destructions SET holder = ?, lease_us = ? \
                 WHERE key_id = ? AND mac = ? AND (holder = ? OR lease_us <= ? OR lease_us > ?)"),
            end_destruction: sql("DELETE FROM key_destructions WHERE key_id = ? AND mac = ?"),

            approvals: sql(&format!(
                "SELECT {approvals} FROM approvals ORDER BY requested_us DESC, approval_id LIMIT ?"
            )),
            open_approvals: sql(&format!(
                "SELECT {approvals} FROM approvals WHERE expires_us > ? \
                 AND state NOT IN ('rejected', 'used') \
                 ORDER BY requested_us DESC, approval_id LIMIT ?"
            )),
            approval: sql(&format!(
                "SELECT {approvals} FROM approvals WHERE approval_id = ?"
            )),
            approval_of: sql(&format!(
                "SELECT {approvals} FROM approvals WHERE digest = ?"
            )),
            count_approvals: sql("SELECT count(*) AS total, \
                 count(CASE WHEN state IN ('pending', 'approved') THEN 1 END) AS open_total \
                 FROM approvals WHERE requested_person = ? AND expires_us > ?"),
            replace_approval: sql("DELETE FROM approvals WHERE digest = ? AND mac = ?"),
            remove_approval: sql(
                "DELETE FROM approvals WHERE approval_id = ? AND state = ? AND mac = ?",
            ),
            remove_unreadable_approval: sql("DELETE FROM approvals WHERE approval_id = ?"),
            change_approval: sql(&format!(
                "UPDATE approvals SET {} WHERE approval_id = ? AND mac = ?",
                assignments(Table::Approvals.values())
            )),
            forget_approvals: dialect.delete_some(Table::Approvals, "expires_us < ?"),
            old_approvals: sql("SELECT count(*) AS total FROM approvals WHERE expires_us < ?"),

            member_keys: sql(&format!(
                "SELECT {member_keys} FROM bitwarden_member_keys \
                 WHERE organization_id = ? AND member_id = ? ORDER BY pinned_us DESC, digest LIMIT ?"
            )),
            member_key: sql(&format!(
                "SELECT {member_keys} FROM bitwarden_member_keys WHERE organization_id = ? AND digest = ?"
            )),
            update_member_key: sql(&format!(
                "UPDATE bitwarden_member_keys SET {} WHERE organization_id = ? AND digest = ? AND mac = ?",
                assignments(Table::MemberKeys.values())
            )),

            client: sql(&format!(
                "SELECT {clients} FROM clients WHERE client_id = ?"
            )),
            update_client: sql(
                "UPDATE clients SET revision = ?, document = ?, mac = ?, key_id = ?, updated_us = ? \
                 WHERE client_id = ? AND revision = ?",
            ),

            delete_superseded: sql(
                "DELETE FROM revisions WHERE record_id = ? AND revision = ? AND revision < \
                 (SELECT r.revision FROM records r WHERE r.record_id = revisions.record_id)",
            ),
            delete_revisions: sql("DELETE FROM revisions WHERE record_id = ?"),
            delete_record: sql("DELETE FROM records WHERE record_id = ?"),
            delete_change: sql("DELETE FROM changes WHERE call_id = ?"),
            delete_use: sql("DELETE FROM last_uses WHERE record_id = ?"),
            note_uses: dialect.note_latest(Table::LastUses, RECORDS_AT_ONCE),
            uses: sql(&format!(
                "SELECT record_id, used_us FROM last_uses WHERE record_id IN ({})",
                places(RECORDS_AT_ONCE)
            )),
            note_client_uses: dialect.note_latest(Table::ClientUses, CLIENT_USES_AT_ONCE),
            uses_of_client: sql(
                "SELECT secret_number, used_us FROM client_uses WHERE client_id = ? \
                 ORDER BY secret_number",
            ),

            clock: dialect.clock,
            has_migrations: dialect.has_migrations,
            newest_migration: sql(
                "SELECT version FROM _sqlx_migrations WHERE success OR version > ? \
                 ORDER BY version DESC LIMIT 1",
            ),
            later_migrations: sql(
                "SELECT version, description FROM _sqlx_migrations WHERE version > ?",
            ),
            durability: dialect.durability,

            rewrap: RewrapStatements::of_engine(dialect),
            device: DeviceStatements::of_engine(dialect),

            tables: PerTable::from_fn(|table| OfTable::of_engine(dialect, table)),
        }
    }

    pub(super) const fn of(&self, table: Table) -> &OfTable {
        self.tables.of(table)
    }
}

impl OfTable {
    fn of_engine(dialect: &Dialect, table: Table) -> Self {
        let (name, columns, key) = (table.name(), names(table.columns()), names(table.key()));
        let after = match table.key() {
            // For a comparison of several columns, some engines do not use an index. For a
            // comparison of only the first column, all engines use an index.
            [first, _, ..] => {
                let places = places(table.key().len());
                format!("{} >= ? AND ({key}) > ({places})", first.name)
            }
            _ => format!("{key} > ?"),
        };
        Self {
            count: dialect.text(&format!("SELECT count(*) AS total FROM {name}")),
            keyless: dialect.text(&format!(
                "SELECT count(*) AS total FROM {name} WHERE {}",
                table
                    .key()
                    .iter()
                    .map(|column| format!("{} IS NULL", quoted(column)))
                    .collect::<Vec<_>>()
                    .join(" OR ")
            )),
            page: dialect.text(&format!(
                "SELECT {columns} FROM {name} WHERE {after} ORDER BY {key} LIMIT ? OFFSET ?"
            )),
            insert: dialect.insert_unless_taken(table),
        }
    }
}
