//! The SQL of PostgreSQL.

use crate::statements::Statements;

/// READ COMMITTED with the row locked is enough: every transaction changes one record, which it holds, and what must be
/// unique is held by a constraint.
pub(super) const STATEMENTS: Statements = Statements {
    begin: "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE",
    probe: "DELETE FROM changes WHERE call_id = ''::bytea",

    probe_read: "SELECT sequence FROM wrapping_keys LIMIT 1",

    record: r#"SELECT r.record_id, r.state, r.revision, r.created_us, r.updated_us, r.deleted_us,
               v.wrapping_key_id, v.envelope,
               (SELECT max(n.revision) FROM revisions n WHERE n.record_id = r.record_id)
               FROM records r LEFT JOIN revisions v
               ON v.record_id = r.record_id AND v.revision = r.revision
               WHERE r.tenant = $1 AND r."user" = $2 AND r.key_name = $3"#,
    revision: "SELECT wrapping_key_id, envelope FROM revisions WHERE record_id = $1 AND revision = $2",
    page: r#"SELECT r.record_id, r.state, r.revision, r.created_us, r.updated_us, r.deleted_us,
             v.wrapping_key_id, r."user", r.key_name,
             (SELECT max(n.revision) FROM revisions n WHERE n.record_id = r.record_id)
             FROM records r LEFT JOIN revisions v
             ON v.record_id = r.record_id AND v.revision = r.revision
             WHERE r.tenant = $1 AND r."user" >= $2 AND (r."user" > $3 OR r.key_name > $4)
             AND ($5 = 1 OR r.state <> 'deleted' OR r.state IS NULL) ORDER BY r."user", r.key_name LIMIT $6 OFFSET $7"#,
    page_of_user: r#"SELECT r.record_id, r.state, r.revision, r.created_us, r.updated_us, r.deleted_us,
                     v.wrapping_key_id, r."user", r.key_name,
                     (SELECT max(n.revision) FROM revisions n WHERE n.record_id = r.record_id)
                     FROM records r LEFT JOIN revisions v
                     ON v.record_id = r.record_id AND v.revision = r.revision
                     WHERE r.tenant = $1 AND r."user" = $2 AND r.key_name > $3
                     AND ($4 = 1 OR r.state <> 'deleted' OR r.state IS NULL) ORDER BY r.key_name LIMIT $5 OFFSET $6"#,
    request: r#"SELECT record_id, state, revision, created_us, updated_us, deleted_us, wrapping_key_id,
                "user", key_name, content_mac, key_id, result_mac FROM requests
                WHERE tenant = $1 AND principal = $2 AND request_id = $3 AND used_us > $4"#,
    registry: "SELECT key_id, fingerprint, purpose, state, token_serial, sequence, registered_us, \
               backup_confirmed_us, mac FROM wrapping_keys ORDER BY sequence, key_id",

    lock_record: Some("SELECT 1 FROM records WHERE record_id = $1 FOR UPDATE"),
    record_by_id: r#"SELECT r.record_id, r.state, r.revision, r.created_us, r.updated_us, r.deleted_us,
                     v.wrapping_key_id, r."user", r.key_name, r.tenant,
                     (SELECT max(n.revision) FROM revisions n WHERE n.record_id = r.record_id)
                     FROM records r LEFT JOIN revisions v
                     ON v.record_id = r.record_id AND v.revision = r.revision WHERE r.record_id = $1"#,
    insert_change: "INSERT INTO changes (call_id, record_id, changed_us) VALUES ($1, $2, $3)",
    evidence: "SELECT store_id, (SELECT count(*) FROM changes WHERE call_id IN \
               ($1, $2, $3, $4, $5, $6, $7, $8, \
               $9, $10, $11, $12, $13, $14, $15, $16)) FROM store_identity",
    insert_identity: "INSERT INTO store_identity (singleton, store_id, created_us) VALUES (1, $1, $2) \
                      ON CONFLICT (singleton) DO NOTHING",
    update_identity: "UPDATE store_identity SET store_id = $1 WHERE singleton = 1",
    audit_logs: "SELECT count(*), count(CASE WHEN log_id = $1 THEN 1 END) FROM audit_logs WHERE instance = $2",
    insert_audit_log: "INSERT INTO audit_logs (instance, log_id, bound_us) VALUES ($1, $2, $3) \
                       ON CONFLICT (instance, log_id) DO NOTHING",
    count_keys: r#"SELECT count(*) FROM (SELECT 1 AS one FROM records
                 WHERE tenant = $1 AND "user" = $2 LIMIT $3) AS found"#,
    count_revisions: "SELECT count(*) FROM (SELECT 1 AS one FROM revisions \
                      WHERE record_id = $1 LIMIT $2) AS found",
    insert_record: r#"INSERT INTO records (record_id, tenant, "user", key_name, state, revision,
                      created_us, updated_us) VALUES ($1, $2, $3, $4, 'active', $5, $6, $7)
                      ON CONFLICT ON CONSTRAINT records_address_unique DO NOTHING"#,
    insert_revision: "INSERT INTO revisions (record_id, revision, envelope, wrapping_key_id, created_us) \
                      VALUES ($1, $2, $3, $4, $5)",
    advance_record: "UPDATE records SET revision = $1, updated_us = $2 \
                     WHERE record_id = $3 AND revision = $4",
    set_state: "UPDATE records SET state = $1, updated_us = $2, deleted_us = $3 WHERE record_id = $4",
    forget_request: "DELETE FROM requests WHERE tenant = $1 AND principal = $2 AND request_id = $3 \
                     AND used_us <= $4",
    insert_request: r#"INSERT INTO requests (tenant, principal, request_id, content_mac, key_id,
                       record_id, "user", key_name, state, revision, wrapping_key_id, created_us,
                       updated_us, deleted_us, used_us, result_mac)
                       VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)
                       ON CONFLICT ON CONSTRAINT requests_pk DO NOTHING"#,
    forget_requests: "DELETE FROM requests WHERE (tenant, principal, request_id) IN (SELECT tenant, \
                      principal, request_id FROM requests WHERE used_us < $1 LIMIT $2)",
    insert_registry: "INSERT INTO wrapping_keys (key_id, fingerprint, purpose, state, token_serial, \
                      sequence, registered_us, backup_confirmed_us, mac) \
                      VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) \
                      ON CONFLICT ON CONSTRAINT wrapping_keys_pk DO NOTHING",
    update_registry: "UPDATE wrapping_keys SET fingerprint = $1, purpose = $2, state = $3, \
                      token_serial = $4, sequence = $5, registered_us = $6, backup_confirmed_us = $7, \
                      mac = $8 WHERE key_id = $9 AND mac = $10",

    client: "SELECT client_id, revision, document, mac, key_id, created_us, updated_us FROM \
             clients WHERE client_id = $1",
    update_client: "UPDATE clients SET revision = $1, document = $2, mac = $3, key_id = $4, \
                    updated_us = $5 WHERE client_id = $6 AND revision = $7",

    has_migrations: "SELECT 1 WHERE to_regclass('_sqlx_migrations') IS NOT NULL",
    newest_migration: "SELECT coalesce(max(version), 0) FROM _sqlx_migrations WHERE success",
    durability: "SELECT name, setting FROM pg_settings WHERE name IN \
                 ('fsync', 'full_page_writes', 'synchronous_commit', 'synchronous_standby_names')",
};
