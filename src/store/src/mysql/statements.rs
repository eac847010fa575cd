//! The SQL of MySQL and MariaDB.

use crate::statements::Statements;

/// READ COMMITTED, which the session is set to, with the row locked: see `postgres/statements.rs`. The default, REPEATABLE
/// READ, would lock gaps between rows and go on reading what was before it waited.
///
/// Inserts are plain: `INSERT IGNORE` would also hide values that do not fit.
pub(super) const STATEMENTS: Statements = Statements {
    begin: "START TRANSACTION READ WRITE",
    probe: "DELETE FROM changes WHERE call_id = ''",

    probe_read: "SELECT sequence FROM wrapping_keys LIMIT 1",

    record: "SELECT r.record_id, r.state, r.revision, r.created_us, r.updated_us, r.deleted_us, \
             v.wrapping_key_id, v.envelope, \
             (SELECT max(n.revision) FROM revisions n WHERE n.record_id = r.record_id) \
             FROM records r LEFT JOIN revisions v \
             ON v.record_id = r.record_id AND v.revision = r.revision \
             WHERE r.tenant = ? AND r.user = ? AND r.key_name = ?",
    revision: "SELECT wrapping_key_id, envelope FROM revisions WHERE record_id = ? AND revision = ?",
    page: "SELECT r.record_id, r.state, r.revision, r.created_us, r.updated_us, r.deleted_us, \
           v.wrapping_key_id, r.user, r.key_name, \
           (SELECT max(n.revision) FROM revisions n WHERE n.record_id = r.record_id) \
           FROM records r LEFT JOIN revisions v \
           ON v.record_id = r.record_id AND v.revision = r.revision \
           WHERE r.tenant = ? AND r.user >= ? AND (r.user > ? OR r.key_name > ?) \
           AND (? = 1 OR r.state <> 'deleted' OR r.state IS NULL) ORDER BY r.user, r.key_name LIMIT ? \
           OFFSET ?",
    page_of_user: "SELECT r.record_id, r.state, r.revision, r.created_us, r.updated_us, r.deleted_us, \
                   v.wrapping_key_id, r.user, r.key_name, \
                   (SELECT max(n.revision) FROM revisions n WHERE n.record_id = r.record_id) \
                   FROM records r LEFT JOIN revisions v \
                   ON v.record_id = r.record_id AND v.revision = r.revision \
                   WHERE r.tenant = ? AND r.user = ? AND r.key_name > ? \
                   AND (? = 1 OR r.state <> 'deleted' OR r.state IS NULL) ORDER BY r.key_name LIMIT ? OFFSET ?",
    request: "SELECT record_id, state, revision, created_us, updated_us, deleted_us, wrapping_key_id, \
              user, key_name, content_mac, key_id, result_mac FROM requests \
              WHERE tenant = ? AND principal = ? AND request_id = ? AND used_us > ?",
    registry: "SELECT key_id, fingerprint, purpose, state, token_serial, sequence, registered_us, \
               backup_confirmed_us, mac FROM wrapping_keys ORDER BY sequence, key_id",

    lock_record: Some("SELECT 1 FROM records WHERE record_id = ? FOR UPDATE"),
    record_by_id: "SELECT r.record_id, r.state, r.revision, r.created_us, r.updated_us, r.deleted_us, \
                   v.wrapping_key_id, r.user, r.key_name, r.tenant, \
                   (SELECT max(n.revision) FROM revisions n WHERE n.record_id = r.record_id) \
                   FROM records r LEFT JOIN revisions v \
                   ON v.record_id = r.record_id AND v.revision = r.revision WHERE r.record_id = ?",
    insert_change: "INSERT INTO changes (call_id, record_id, changed_us) VALUES (?, ?, ?)",
    evidence: "SELECT store_id, (SELECT count(*) FROM changes WHERE call_id IN \
               (?, ?, ?, ?, ?, ?, ?, ?, \
               ?, ?, ?, ?, ?, ?, ?, ?)) FROM store_identity",
    insert_identity: "INSERT INTO store_identity (singleton, store_id, created_us) VALUES (1, ?, ?)",
    update_identity: "UPDATE store_identity SET store_id = ? WHERE singleton = 1",
    audit_logs: "SELECT count(*), count(CASE WHEN log_id = ? THEN 1 END) FROM audit_logs WHERE instance = ?",
    insert_audit_log: "INSERT INTO audit_logs (instance, log_id, bound_us) VALUES (?, ?, ?)",
    count_keys: "SELECT count(*) FROM (SELECT 1 AS one FROM records \
                 WHERE tenant = ? AND user = ? LIMIT ?) AS found",
    count_revisions: "SELECT count(*) FROM (SELECT 1 AS one FROM revisions \
                      WHERE record_id = ? LIMIT ?) AS found",
    insert_record: "INSERT INTO records (record_id, tenant, user, key_name, state, revision, \
                    created_us, updated_us) VALUES (?, ?, ?, ?, 'active', ?, ?, ?)",
    insert_revision: "INSERT INTO revisions (record_id, revision, envelope, wrapping_key_id, created_us) \
                      VALUES (?, ?, ?, ?, ?)",
    advance_record: "UPDATE records SET revision = ?, updated_us = ? WHERE record_id = ? AND revision = ?",
    set_state: "UPDATE records SET state = ?, updated_us = ?, deleted_us = ? WHERE record_id = ?",
    forget_request: "DELETE FROM requests WHERE tenant = ? AND principal = ? AND request_id = ? \
                     AND used_us <= ?",
    insert_request: "INSERT INTO requests (tenant, principal, request_id, content_mac, key_id, \
                     record_id, user, key_name, state, revision, wrapping_key_id, created_us, \
                     updated_us, deleted_us, used_us, result_mac) \
                     VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    forget_requests: "DELETE FROM requests WHERE used_us < ? LIMIT ?",
    insert_registry: "INSERT INTO wrapping_keys (key_id, fingerprint, purpose, state, token_serial, \
                      sequence, registered_us, backup_confirmed_us, mac) \
                      VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
    update_registry: "UPDATE wrapping_keys SET fingerprint = ?, purpose = ?, state = ?, \
                      token_serial = ?, sequence = ?, registered_us = ?, backup_confirmed_us = ?, \
                      mac = ? WHERE key_id = ? AND mac = ?",

    client: "SELECT client_id, revision, document, mac, key_id, created_us, updated_us FROM \
             clients WHERE client_id = ?",
    update_client: "UPDATE clients SET revision = ?, document = ?, mac = ?, key_id = ?, \
                    updated_us = ? WHERE client_id = ? AND revision = ?",

    has_migrations: "SELECT 1 FROM information_schema.tables \
                     WHERE table_schema = DATABASE() AND table_name = '_sqlx_migrations'",
    newest_migration: "SELECT CAST(COALESCE(MAX(version), 0) AS SIGNED) FROM _sqlx_migrations WHERE success",
    durability: "SHOW GLOBAL VARIABLES WHERE Variable_name IN \
                 ('innodb_flush_log_at_trx_commit', 'innodb_doublewrite', 'log_bin', 'sync_binlog')",
};
