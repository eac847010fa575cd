//! Every statement, in one form for all engines: a [`Dialect`] makes the text of one engine from it. `?` marks the place of a
//! value; the values and their order are the same on each engine. Rows are read by the names of their columns.

use super::{
    columns::{PerTable, Table},
    dialect::{Dialect, assignments, names, places},
    identity::CHANGES_MAX,
    slow::named,
};

/// How many records one statement asks for, or notes uses of.
pub(super) const RECORDS_AT_ONCE: usize = 50;

/// How many uses of secrets of API clients one statement notes.
pub(super) const CLIENT_USES_AT_ONCE: usize = 20;

/// What is read of a record `r` without its envelope, with its current revision `v`.
const RECORD: &str = "r.record_id AS record_id, r.state AS state, r.revision AS revision, \
                      r.created_us AS created_us, r.updated_us AS updated_us, \
                      r.deleted_us AS deleted_us, v.wrapping_key_id AS wrapping_key_id, \
                      (SELECT max(n.revision) FROM revisions n WHERE n.record_id = r.record_id) \
                      AS newest_revision";
const ADDRESS: &str = r#"r.tenant AS tenant, r."user" AS "user", r.key_name AS key_name"#;
const RECORDS: &str = "records r LEFT JOIN revisions v \
                       ON v.record_id = r.record_id AND v.revision = r.revision";
/// A row whose state cannot be read is listed too: as damaged.
const STATE_WANTED: &str = "(? = 1 OR r.state <> 'deleted' OR r.state IS NULL)";

named! {
/// The SQL of one engine.
#[derive(Debug)]
pub(super) struct Statements {
    pub(super) begin: &'static str,
    /// An empty call id. Changes nothing, and fails where nothing can be changed.
    pub(super) probe: &'static str,
    /// Reads a row at most.
    pub(super) probe_read: &'static str,

    /// tenant, user, key name: the record and its envelope.
    pub(super) record: &'static str,
    /// record, revision: its envelope, wrapping key and time.
    pub(super) revision: &'static str,
    /// tenant, after user, after user, after key name, 1 for deleted ones too, limit, rows to skip: records with their addresses.
    pub(super) page: &'static str,
    /// tenant, user, after key name, 1 for deleted ones too, limit, rows to skip: as above.
    pub(super) page_of_user: &'static str,
    /// tenant, principal, request id, used after: the request.
    pub(super) request: &'static str,
    /// The registry, by sequence.
    pub(super) registry: &'static str,

    /// record: holds it until the transaction ends. None where a transaction holds everything.
    pub(super) lock_record: Option<&'static str>,
    /// record: the record with its address.
    pub(super) record_by_id: &'static str,
    /// A row of the changes. Waits for a transaction that inserts the same call.
    pub(super) insert_change: &'static str,
    /// Calls, as many as [`CHANGES_MAX`]: the identity of the database, and how many of the calls left a mark. No row when the
    /// database has no identity.
    pub(super) evidence: &'static str,
    /// identity, at. Inserts nothing when the database has an identity.
    pub(super) insert_identity: &'static str,
    /// identity.
    pub(super) update_identity: &'static str,
    /// log, instance: how many logs the instance has, and how many of them are this one.
    pub(super) audit_logs: &'static str,
    /// instance, log, at. Inserts nothing when the instance has the log, or reports the duplicate.
    pub(super) insert_audit_log: &'static str,
    /// tenant, user, at most so many: how many records, deleted ones too.
    pub(super) count_keys: &'static str,
    /// record, at most so many: how many revisions.
    pub(super) count_revisions: &'static str,
    /// A row of the revisions.
    pub(super) insert_revision: &'static str,
    /// revision, at, record, revision before.
    pub(super) advance_record: &'static str,
    /// state, at, deleted, record.
    pub(super) set_state: &'static str,
    /// tenant, principal, request id, used until.
    pub(super) forget_request: &'static str,
    /// used before, at most so many.
    pub(super) forget_requests: &'static str,
    /// All columns of the registry but the key; key, MAC before.
    pub(super) update_registry: &'static str,

    /// client: all of it.
    pub(super) client: &'static str,
    /// revision, document, MAC, key, updated, client, revision before.
    pub(super) update_client: &'static str,

    /// record, revision. Deletes nothing that is current.
    pub(super) delete_superseded: &'static str,
    /// record.
    pub(super) delete_revisions: &'static str,
    /// record.
    pub(super) delete_record: &'static str,
    /// call.
    pub(super) delete_change: &'static str,
    /// record.
    pub(super) delete_use: &'static str,
    /// Rows of the last uses, as many as [`RECORDS_AT_ONCE`], of which one may come several times. Changes nothing where a later
    /// use is known.
    pub(super) note_uses: &'static str,
    /// Records, as many as [`RECORDS_AT_ONCE`]: the last uses that are known.
    pub(super) uses: &'static str,
    /// Rows of the uses of secrets, as many as [`CLIENT_USES_AT_ONCE`], of which one may come several times. Changes nothing where
    /// a later use is known.
    pub(super) note_client_uses: &'static str,
    /// client: the uses of its secrets, by number.
    pub(super) uses_of_client: &'static str,

    pub(super) clock: Option<&'static str>,
    pub(super) has_migrations: &'static str,
    /// The newest migration that was completed, if there is one.
    pub(super) newest_migration: &'static str,
    /// version: the completed migrations after it, with their descriptions.
    pub(super) later_migrations: &'static str,
    pub(super) durability: &'static str,

    tables: PerTable<OfTable>,
}
}

named! {
/// What is done with every table in the same way.
#[derive(Debug)]
pub(super) struct OfTable {
    /// How many rows.
    pub(super) count: &'static str,
    /// How many rows have NULL in a column of the key.
    pub(super) keyless: &'static str,
    /// After the key, whose first column comes twice if there are several; limit; rows to skip: all columns.
    pub(super) page: &'static str,
    /// All columns. Inserts nothing when the row is there, or reports the duplicate: see
    /// [`insert_unless_taken`](super::mutations::insert_unless_taken).
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
        let (requests, registry, clients) = (
            names(Table::Requests.columns()),
            names(Table::WrappingKeys.columns()),
            names(Table::Clients.columns()),
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
            // A comparison of several columns uses no index on every engine; one of the first column alone does.
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
                    .map(|column| format!("{} IS NULL", column.name))
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
