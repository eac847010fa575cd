//! The SQL of MySQL and MariaDB for whole tables.

use crate::statements::{OfTable, TableStatements};

pub(super) const TABLES: TableStatements = TableStatements {
    wrapping_keys: OfTable {
        count: "SELECT count(*) FROM wrapping_keys",
        page: "SELECT key_id, fingerprint, purpose, state, token_serial, sequence, registered_us, \
               backup_confirmed_us, mac FROM wrapping_keys WHERE key_id > ? ORDER BY key_id LIMIT \
               ? OFFSET ?",
        insert: "INSERT INTO wrapping_keys (key_id, fingerprint, purpose, state, token_serial, \
                 sequence, registered_us, backup_confirmed_us, mac) VALUES (?, ?, ?, ?, ?, ?, ?, \
                 ?, ?)",
    },
    records: OfTable {
        count: "SELECT count(*) FROM records",
        page: "SELECT record_id, tenant, user, key_name, state, revision, created_us, updated_us, \
               deleted_us FROM records WHERE record_id > ? ORDER BY record_id LIMIT ? OFFSET ?",
        insert: "INSERT INTO records (record_id, tenant, user, key_name, state, revision, \
                 created_us, updated_us, deleted_us) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
    },
    revisions: OfTable {
        count: "SELECT count(*) FROM revisions",
        page: "SELECT record_id, revision, envelope, wrapping_key_id, created_us FROM revisions \
               WHERE record_id >= ? AND (record_id, revision) > (?, ?) ORDER BY record_id, \
               revision LIMIT ? OFFSET ?",
        insert: "INSERT INTO revisions (record_id, revision, envelope, wrapping_key_id, \
                 created_us) VALUES (?, ?, ?, ?, ?)",
    },
    changes: OfTable {
        count: "SELECT count(*) FROM changes",
        page: "SELECT call_id, record_id, changed_us FROM changes WHERE call_id > ? ORDER BY \
               call_id LIMIT ? OFFSET ?",
        insert: "INSERT INTO changes (call_id, record_id, changed_us) VALUES (?, ?, ?)",
    },
    requests: OfTable {
        count: "SELECT count(*) FROM requests",
        page: "SELECT tenant, principal, request_id, content_mac, key_id, record_id, user, \
               key_name, state, revision, wrapping_key_id, created_us, updated_us, deleted_us, \
               used_us, result_mac FROM requests WHERE tenant >= ? AND (tenant, principal, request_id) > (?, \
               ?, ?) ORDER BY tenant, principal, request_id LIMIT ? OFFSET ?",
        insert: "INSERT INTO requests (tenant, principal, request_id, content_mac, key_id, \
                 record_id, user, key_name, state, revision, wrapping_key_id, created_us, \
                 updated_us, deleted_us, used_us, result_mac) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, \
                 ?, ?, ?)",
    },
    last_uses: OfTable {
        count: "SELECT count(*) FROM last_uses",
        page: "SELECT record_id, used_us FROM last_uses WHERE record_id > ? ORDER BY record_id \
               LIMIT ? OFFSET ?",
        insert: "INSERT INTO last_uses (record_id, used_us) VALUES (?, ?)",
    },
    clients: OfTable {
        count: "SELECT count(*) FROM clients",
        page: "SELECT client_id, revision, document, mac, key_id, created_us, updated_us FROM \
               clients WHERE client_id > ? ORDER BY client_id LIMIT ? OFFSET ?",
        insert: "INSERT INTO clients (client_id, revision, document, mac, key_id, created_us, \
                 updated_us) VALUES (?, ?, ?, ?, ?, ?, ?)",
    },
    client_uses: OfTable {
        count: "SELECT count(*) FROM client_uses",
        page: "SELECT client_id, secret_number, used_us FROM client_uses WHERE client_id >= ? \
               AND (client_id, secret_number) > (?, ?) ORDER BY client_id, secret_number LIMIT ? OFFSET ?",
        insert: "INSERT INTO client_uses (client_id, secret_number, used_us) VALUES (?, ?, ?)",
    },
    keyless: "SELECT (SELECT count(*) FROM wrapping_keys WHERE key_id IS NULL) \
                   + (SELECT count(*) FROM records WHERE record_id IS NULL OR tenant IS NULL OR user IS NULL OR key_name IS NULL) \
                   + (SELECT count(*) FROM revisions WHERE record_id IS NULL OR revision IS NULL) \
                   + (SELECT count(*) FROM changes WHERE call_id IS NULL) \
                   + (SELECT count(*) FROM requests WHERE tenant IS NULL OR principal IS NULL OR request_id IS NULL) \
                   + (SELECT count(*) FROM last_uses WHERE record_id IS NULL) \
                   + (SELECT count(*) FROM clients WHERE client_id IS NULL) \
                   + (SELECT count(*) FROM client_uses WHERE client_id IS NULL OR secret_number IS NULL)",
    clock: Some("SELECT CAST(UNIX_TIMESTAMP(NOW(6)) * 1000000 AS SIGNED)"),
    delete_superseded: "DELETE FROM revisions WHERE record_id = ? AND revision = ? AND revision < \
                        (SELECT r.revision FROM records r WHERE r.record_id = \
                        revisions.record_id)",
    delete_revisions: "DELETE FROM revisions WHERE record_id = ?",
    delete_record: "DELETE FROM records WHERE record_id = ?",
    delete_change: "DELETE FROM changes WHERE call_id = ?",
    delete_use: "DELETE FROM last_uses WHERE record_id = ?",
    note_uses: "INSERT INTO last_uses (record_id, used_us) VALUES (?, ?), (?, ?), (?, ?), (?, \
                ?), (?, ?), (?, ?), (?, ?), (?, ?), (?, ?), (?, ?), (?, ?), (?, ?), (?, ?), (?, \
                ?), (?, ?), (?, ?), (?, ?), (?, ?), (?, ?), (?, ?), (?, ?), (?, ?), (?, ?), (?, \
                ?), (?, ?), (?, ?), (?, ?), (?, ?), (?, ?), (?, ?), (?, ?), (?, ?), (?, ?), (?, \
                ?), (?, ?), (?, ?), (?, ?), (?, ?), (?, ?), (?, ?), (?, ?), (?, ?), (?, ?), (?, \
                ?), (?, ?), (?, ?), (?, ?), (?, ?), (?, ?), (?, ?) ON DUPLICATE KEY UPDATE \
                used_us = GREATEST(used_us, VALUES(used_us))",
    uses: "SELECT record_id, used_us FROM last_uses WHERE record_id IN (?, ?, ?, ?, ?, ?, ?, ?, \
           ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, \
           ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    note_client_uses: "INSERT INTO client_uses (client_id, secret_number, used_us) VALUES (?, ?, \
                       ?), (?, ?, ?), (?, ?, ?), (?, ?, ?), (?, ?, ?), (?, ?, ?), (?, ?, ?), (?, \
                       ?, ?), (?, ?, ?), (?, ?, ?), (?, ?, ?), (?, ?, ?), (?, ?, ?), (?, ?, ?), \
                       (?, ?, ?), (?, ?, ?), (?, ?, ?), (?, ?, ?), (?, ?, ?), (?, ?, ?) ON \
                       DUPLICATE KEY UPDATE used_us = GREATEST(used_us, VALUES(used_us))",
    uses_of_client: "SELECT secret_number, used_us FROM client_uses WHERE client_id = ? ORDER BY \
                     secret_number",
};
