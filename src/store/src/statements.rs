//! What an engine must be able to say. Each engine writes these by hand in its own SQL; the values of each, and the columns
//! of each answer, are the same for all and in this order.

use super::{slow::named, tables::Table};

named! {
/// The SQL of one engine.
#[derive(Debug)]
pub(super) struct Statements {
    /// Begins a transaction that sees what was committed before each of its statements.
    pub(super) begin: &'static str,
    /// Changes nothing, and fails where nothing can be changed.
    pub(super) probe: &'static str,
    /// Reads a row at most.
    pub(super) probe_read: &'static str,

    /// tenant, user, key name: the record's columns, envelope, newest revision.
    pub(super) record: &'static str,
    /// record, revision: wrapping key, envelope.
    pub(super) revision: &'static str,
    /// tenant, after user, after user, after key name, 1 for deleted ones too, limit, rows to skip: the record's
    /// columns, user, key name, newest revision.
    pub(super) page: &'static str,
    /// tenant, user, after key name, 1 for deleted ones too, limit, rows to skip: as above.
    pub(super) page_of_user: &'static str,
    /// tenant, principal, request id, used after: the record's columns, user, key name, content MAC, its key, MAC
    /// of the result.
    pub(super) request: &'static str,
    /// All columns of the registry, by sequence.
    pub(super) registry: &'static str,

    /// record: holds it until the transaction ends. None where a transaction holds everything.
    pub(super) lock_record: Option<&'static str>,
    /// record: the record's columns, user, key name, tenant, newest revision.
    pub(super) record_by_id: &'static str,
    /// call, record, at. Waits for a transaction that inserts the same call.
    pub(super) insert_change: &'static str,
    /// Calls, as many as [`CHANGES_MAX`](super::identity::CHANGES_MAX): the identity of the database, and how many of the calls
    /// left a mark. No row when the database has no identity.
    pub(super) evidence: &'static str,
    /// identity, at. Inserts nothing when the database has an identity.
    pub(super) insert_identity: &'static str,
    /// identity.
    pub(super) update_identity: &'static str,
    /// log, instance: how many logs the instance has, how many of them are this one.
    pub(super) audit_logs: &'static str,
    /// instance, log, at. Inserts nothing when the instance has the log.
    pub(super) insert_audit_log: &'static str,
    /// tenant, user, at most so many: how many records, deleted ones too.
    pub(super) count_keys: &'static str,
    /// record, at most so many: how many revisions.
    pub(super) count_revisions: &'static str,
    /// record, tenant, user, key name, revision, created, updated. Inserts nothing when the address is taken.
    pub(super) insert_record: &'static str,
    /// record, revision, envelope, wrapping key, at.
    pub(super) insert_revision: &'static str,
    /// revision, at, record, revision before.
    pub(super) advance_record: &'static str,
    /// state, at, deleted, record.
    pub(super) set_state: &'static str,
    /// tenant, principal, request id, used until.
    pub(super) forget_request: &'static str,
    /// tenant, principal, request id, content MAC, its key, record, user, key name, state, revision, wrapping key, created,
    /// updated, deleted, at, MAC of the result. Inserts nothing when the request id is taken.
    pub(super) insert_request: &'static str,
    /// used before, at most so many.
    pub(super) forget_requests: &'static str,
    /// All columns of the registry. Inserts nothing when the key is registered.
    pub(super) insert_registry: &'static str,
    /// fingerprint, purpose, state, token serial, sequence, registered, backup confirmed, MAC, key, MAC before.
    pub(super) update_registry: &'static str,

    /// client: all columns of the clients.
    pub(super) client: &'static str,
    /// revision, document, MAC, key, updated, client, revision before.
    pub(super) update_client: &'static str,

    /// A row if the table of migrations is there.
    pub(super) has_migrations: &'static str,
    /// The newest migration that was completed, or 0.
    pub(super) newest_migration: &'static str,
    /// Names and values of the settings that durability rests on, as text.
    pub(super) durability: &'static str,
}
}

/// How many records one statement asks for, or notes uses of.
pub(super) const RECORDS_AT_ONCE: usize = 50;

/// How many uses of secrets of API clients one statement notes.
pub(super) const CLIENT_USES_AT_ONCE: usize = 20;

named! {
/// What an engine must be able to say of whole tables: see `tables.rs`.
#[derive(Debug)]
pub(super) struct TableStatements {
    pub(super) wrapping_keys: OfTable,
    pub(super) records: OfTable,
    pub(super) revisions: OfTable,
    pub(super) changes: OfTable,
    pub(super) requests: OfTable,
    pub(super) last_uses: OfTable,
    pub(super) clients: OfTable,
    pub(super) client_uses: OfTable,
    /// How many rows of all tables have NULL in a column that they are found by.
    pub(super) keyless: &'static str,
    /// The server's time in microseconds since 1970. A file has none.
    pub(super) clock: Option<&'static str>,
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
    /// record, at, as many pairs as [`RECORDS_AT_ONCE`], of which one may come several times. Changes nothing where a later use is
    /// known.
    pub(super) note_uses: &'static str,
    /// Records, as many as [`RECORDS_AT_ONCE`]: record, at of those of which it is known.
    pub(super) uses: &'static str,
    /// client, number of the secret, at, as many as [`CLIENT_USES_AT_ONCE`], of which one may come several times. Changes
    /// nothing where a later use is known.
    pub(super) note_client_uses: &'static str,
    /// client: number of the secret, at, by number.
    pub(super) uses_of_client: &'static str,
}
}

named! {
/// All columns are those of [`Table::columns`], in that order.
#[derive(Debug)]
pub(super) struct OfTable {
    /// How many rows.
    pub(super) count: &'static str,
    /// After the key, whose first column comes twice if there are several; limit; rows to skip: all columns.
    pub(super) page: &'static str,
    /// All columns. Inserts nothing when the place is taken.
    pub(super) insert: &'static str,
}
}

impl TableStatements {
    pub(super) const fn of(&self, table: Table) -> &OfTable {
        match table {
            Table::WrappingKeys => &self.wrapping_keys,
            Table::Records => &self.records,
            Table::Revisions => &self.revisions,
            Table::Changes => &self.changes,
            Table::Requests => &self.requests,
            Table::LastUses => &self.last_uses,
            Table::Clients => &self.clients,
            Table::ClientUses => &self.client_uses,
        }
    }
}
