//! The SQL of PostgreSQL for whole tables.

use crate::statements::{OfTable, TableStatements};

pub(super) const TABLES: TableStatements = TableStatements {
    wrapping_keys: OfTable {
        count: "SELECT count(*) FROM wrapping_keys",
        page: "SELECT key_id, fingerprint, purpose, state, token_serial, sequence, registered_us, \
               backup_confirmed_us, mac FROM wrapping_keys WHERE key_id > $1 ORDER BY key_id \
               LIMIT $2 OFFSET $3",
        insert: "INSERT INTO wrapping_keys (key_id, fingerprint, purpose, state, token_serial, \
                 sequence, registered_us, backup_confirmed_us, mac) VALUES ($1, $2, $3, $4, $5, \
                 $6, $7, $8, $9) ON CONFLICT DO NOTHING",
    },
    records: OfTable {
        count: "SELECT count(*) FROM records",
        page: r#"SELECT record_id, tenant, "user", key_name, state, revision, created_us,
                 updated_us, deleted_us FROM records WHERE record_id > $1 ORDER BY record_id LIMIT
                 $2 OFFSET $3"#,
        insert: r#"INSERT INTO records (record_id, tenant, "user", key_name, state, revision,
                   created_us, updated_us, deleted_us) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
                   ON CONFLICT DO NOTHING"#,
    },
    revisions: OfTable {
        count: "SELECT count(*) FROM revisions",
        page: "SELECT record_id, revision, envelope, wrapping_key_id, created_us FROM revisions \
               WHERE record_id >= $1 AND (record_id, revision) > ($2, $3) ORDER BY record_id, \
               revision LIMIT $4 OFFSET $5",
        insert: "INSERT INTO revisions (record_id, revision, envelope, wrapping_key_id, \
                 created_us) VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING",
    },
    changes: OfTable {
        count: "SELECT count(*) FROM changes",
        page: "SELECT call_id, record_id, changed_us FROM changes WHERE call_id > $1 ORDER BY \
               call_id LIMIT $2 OFFSET $3",
        insert: "INSERT INTO changes (call_id, record_id, changed_us) VALUES ($1, $2, $3) ON \
                 CONFLICT DO NOTHING",
    },
    requests: OfTable {
        count: "SELECT count(*) FROM requests",
        page: r#"SELECT tenant, principal, request_id, content_mac, key_id, record_id, "user",
                 key_name, state, revision, wrapping_key_id, created_us, updated_us, deleted_us,
                 used_us, result_mac FROM requests WHERE tenant >= $1 AND (tenant, principal, request_id) >
                 ($2, $3, $4) ORDER BY tenant, principal, request_id LIMIT $5 OFFSET $6"#,
        insert: r#"INSERT INTO requests (tenant, principal, request_id, content_mac, key_id,
                   record_id, "user", key_name, state, revision, wrapping_key_id, created_us,
                   updated_us, deleted_us, used_us, result_mac) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9,
                   $10, $11, $12, $13, $14, $15, $16) ON CONFLICT DO NOTHING"#,
    },
    last_uses: OfTable {
        count: "SELECT count(*) FROM last_uses",
        page: "SELECT record_id, used_us FROM last_uses WHERE record_id > $1 ORDER BY record_id \
               LIMIT $2 OFFSET $3",
        insert: "INSERT INTO last_uses (record_id, used_us) VALUES ($1, $2) ON CONFLICT DO NOTHING",
    },
    clients: OfTable {
        count: "SELECT count(*) FROM clients",
        page: "SELECT client_id, revision, document, mac, key_id, created_us, updated_us FROM \
               clients WHERE client_id > $1 ORDER BY client_id LIMIT $2 OFFSET $3",
        insert: "INSERT INTO clients (client_id, revision, document, mac, key_id, created_us, \
                 updated_us) VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT DO NOTHING",
    },
    client_uses: OfTable {
        count: "SELECT count(*) FROM client_uses",
        page: "SELECT client_id, secret_number, used_us FROM client_uses WHERE client_id >= $1 \
               AND (client_id, secret_number) > ($2, $3) ORDER BY client_id, secret_number LIMIT \
               $4 OFFSET $5",
        insert: "INSERT INTO client_uses (client_id, secret_number, used_us) VALUES ($1, $2, $3) \
                 ON CONFLICT DO NOTHING",
    },
    keyless: r#"SELECT (SELECT count(*) FROM wrapping_keys WHERE key_id IS NULL)
                    + (SELECT count(*) FROM records WHERE record_id IS NULL OR tenant IS NULL OR "user" IS NULL OR key_name IS NULL)
                    + (SELECT count(*) FROM revisions WHERE record_id IS NULL OR revision IS NULL)
                    + (SELECT count(*) FROM changes WHERE call_id IS NULL)
                    + (SELECT count(*) FROM requests WHERE tenant IS NULL OR principal IS NULL OR request_id IS NULL)
                    + (SELECT count(*) FROM last_uses WHERE record_id IS NULL)
                    + (SELECT count(*) FROM clients WHERE client_id IS NULL)
                    + (SELECT count(*) FROM client_uses WHERE client_id IS NULL OR secret_number IS NULL)"#,
    clock: Some("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint"),
    delete_superseded: "DELETE FROM revisions WHERE record_id = $1 AND revision = $2 AND revision \
                        < (SELECT r.revision FROM records r WHERE r.record_id = \
                        revisions.record_id)",
    delete_revisions: "DELETE FROM revisions WHERE record_id = $1",
    delete_record: "DELETE FROM records WHERE record_id = $1",
    delete_change: "DELETE FROM changes WHERE call_id = $1",
    delete_use: "DELETE FROM last_uses WHERE record_id = $1",
    note_uses: "INSERT INTO last_uses (record_id, used_us) SELECT DISTINCT record_id, used_us \
                FROM (VALUES ($1::bytea, $2::bigint), ($3, $4), ($5, $6), ($7, $8), ($9, $10), \
                ($11, $12), ($13, $14), ($15, $16), ($17, $18), ($19, $20), ($21, $22), ($23, \
                $24), ($25, $26), ($27, $28), ($29, $30), ($31, $32), ($33, $34), ($35, $36), \
                ($37, $38), ($39, $40), ($41, $42), ($43, $44), ($45, $46), ($47, $48), ($49, \
                $50), ($51, $52), ($53, $54), ($55, $56), ($57, $58), ($59, $60), ($61, $62), \
                ($63, $64), ($65, $66), ($67, $68), ($69, $70), ($71, $72), ($73, $74), ($75, \
                $76), ($77, $78), ($79, $80), ($81, $82), ($83, $84), ($85, $86), ($87, $88), \
                ($89, $90), ($91, $92), ($93, $94), ($95, $96), ($97, $98), ($99, $100)) AS \
                noted (record_id, used_us) ORDER BY record_id ON CONFLICT (record_id) DO UPDATE \
                SET used_us = excluded.used_us WHERE excluded.used_us > last_uses.used_us",
    uses: "SELECT record_id, used_us FROM last_uses WHERE record_id IN ($1, $2, $3, $4, $5, $6, \
           $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22, $23, \
           $24, $25, $26, $27, $28, $29, $30, $31, $32, $33, $34, $35, $36, $37, $38, $39, $40, \
           $41, $42, $43, $44, $45, $46, $47, $48, $49, $50)",
    note_client_uses: "INSERT INTO client_uses (client_id, secret_number, used_us) SELECT \
                       DISTINCT client_id, secret_number, used_us FROM (VALUES ($1::bytea, \
                       $2::bigint, $3::bigint), ($4, $5, $6), ($7, $8, $9), ($10, $11, $12), \
                       ($13, $14, $15), ($16, $17, $18), ($19, $20, $21), ($22, $23, $24), ($25, \
                       $26, $27), ($28, $29, $30), ($31, $32, $33), ($34, $35, $36), ($37, $38, \
                       $39), ($40, $41, $42), ($43, $44, $45), ($46, $47, $48), ($49, $50, $51), \
                       ($52, $53, $54), ($55, $56, $57), ($58, $59, $60)) AS noted (client_id, \
                       secret_number, used_us) ORDER BY client_id, secret_number ON CONFLICT \
                       (client_id, secret_number) DO UPDATE SET used_us = excluded.used_us WHERE \
                       excluded.used_us > client_uses.used_us",
    uses_of_client: "SELECT secret_number, used_us FROM client_uses WHERE client_id = $1 ORDER \
                     BY secret_number",
};
