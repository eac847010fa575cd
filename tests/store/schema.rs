//! Migrations: forwards, backwards, by several at once.

use keybroker_core::call::CallId;
use keybroker_store as store;
use keybroker_store::Error;
use tokio::task::JoinSet;

use super::{Engine, Place, clients::client, revision, stamp, user};

/// The ways back, newest first: version, name, and what each engine runs.
const STEPS_BACK: [(u8, &str, [&str; 3]); 14] = [
    (
        14,
        "access answers usable from 7",
        [
            include_str!("../../migrations/sqlite/0014_access_answers_usable_from_7.down.sql"),
            include_str!("../../migrations/postgres/0014_access_answers_usable_from_7.down.sql"),
            include_str!("../../migrations/mysql/0014_access_answers_usable_from_7.down.sql"),
        ],
    ),
    (
        13,
        "bitwarden member keys usable from 7",
        [
            include_str!(
                "../../migrations/sqlite/0013_bitwarden_member_keys_usable_from_7.down.sql"
            ),
            include_str!(
                "../../migrations/postgres/0013_bitwarden_member_keys_usable_from_7.down.sql"
            ),
            include_str!(
                "../../migrations/mysql/0013_bitwarden_member_keys_usable_from_7.down.sql"
            ),
        ],
    ),
    (
        12,
        "devices usable from 7",
        [
            include_str!("../../migrations/sqlite/0012_devices_usable_from_7.down.sql"),
            include_str!("../../migrations/postgres/0012_devices_usable_from_7.down.sql"),
            include_str!("../../migrations/mysql/0012_devices_usable_from_7.down.sql"),
        ],
    ),
    (
        11,
        "approvals usable from 7",
        [
            include_str!("../../migrations/sqlite/0011_approvals_usable_from_7.down.sql"),
            include_str!("../../migrations/postgres/0011_approvals_usable_from_7.down.sql"),
            include_str!("../../migrations/mysql/0011_approvals_usable_from_7.down.sql"),
        ],
    ),
    (
        10,
        "key destructions usable from 7",
        [
            include_str!("../../migrations/sqlite/0010_key_destructions_usable_from_7.down.sql"),
            include_str!("../../migrations/postgres/0010_key_destructions_usable_from_7.down.sql"),
            include_str!("../../migrations/mysql/0010_key_destructions_usable_from_7.down.sql"),
        ],
    ),
    (
        9,
        "rewraps usable from 7",
        [
            include_str!("../../migrations/sqlite/0009_rewraps_usable_from_7.down.sql"),
            include_str!("../../migrations/postgres/0009_rewraps_usable_from_7.down.sql"),
            include_str!("../../migrations/mysql/0009_rewraps_usable_from_7.down.sql"),
        ],
    ),
    (
        8,
        "wrapping key places usable from 7",
        [
            include_str!("../../migrations/sqlite/0008_wrapping_key_places_usable_from_7.down.sql"),
            include_str!(
                "../../migrations/postgres/0008_wrapping_key_places_usable_from_7.down.sql"
            ),
            include_str!("../../migrations/mysql/0008_wrapping_key_places_usable_from_7.down.sql"),
        ],
    ),
    (
        7,
        "object ids",
        [
            include_str!("../../migrations/sqlite/0007_object_ids.down.sql"),
            include_str!("../../migrations/postgres/0007_object_ids.down.sql"),
            include_str!("../../migrations/mysql/0007_object_ids.down.sql"),
        ],
    ),
    (
        6,
        "audit logs",
        [
            include_str!("../../migrations/sqlite/0006_audit_logs.down.sql"),
            include_str!("../../migrations/postgres/0006_audit_logs.down.sql"),
            include_str!("../../migrations/mysql/0006_audit_logs.down.sql"),
        ],
    ),
    (
        5,
        "store identity",
        [
            include_str!("../../migrations/sqlite/0005_store_identity.down.sql"),
            include_str!("../../migrations/postgres/0005_store_identity.down.sql"),
            include_str!("../../migrations/mysql/0005_store_identity.down.sql"),
        ],
    ),
    (
        4,
        "request results",
        [
            include_str!("../../migrations/sqlite/0004_request_results.down.sql"),
            include_str!("../../migrations/postgres/0004_request_results.down.sql"),
            include_str!("../../migrations/mysql/0004_request_results.down.sql"),
        ],
    ),
    (
        3,
        "clients",
        [
            include_str!("../../migrations/sqlite/0003_clients.down.sql"),
            include_str!("../../migrations/postgres/0003_clients.down.sql"),
            include_str!("../../migrations/mysql/0003_clients.down.sql"),
        ],
    ),
    (
        2,
        "last uses",
        [
            include_str!("../../migrations/sqlite/0002_last_uses.down.sql"),
            include_str!("../../migrations/postgres/0002_last_uses.down.sql"),
            include_str!("../../migrations/mysql/0002_last_uses.down.sql"),
        ],
    ),
    (
        1,
        "initial",
        [
            include_str!("../../migrations/sqlite/0001_initial.down.sql"),
            include_str!("../../migrations/postgres/0001_initial.down.sql"),
            include_str!("../../migrations/mysql/0001_initial.down.sql"),
        ],
    ),
];

fn step_back(engine: &Engine, version: u8, statements: [&str; 3]) {
    let [sqlite, postgres, mysql] = statements;
    engine.sql(engine.pick(sqlite, postgres, mysql));
    engine.sql(&format!(
        "DELETE FROM _sqlx_migrations WHERE version = {version}"
    ));
}

/// The way back leads to an empty database, and from there forwards again.
pub(crate) async fn a_migration_leads_back(engine: &Engine) {
    for (version, _, statements) in STEPS_BACK {
        step_back(engine, version, statements);
    }
    let left = engine.sql(engine.pick(
        "SELECT name FROM sqlite_master WHERE name NOT LIKE '%sqlx%' AND name NOT LIKE 'sqlite_%'",
        "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relname NOT LIKE '%sqlx%'",
        "SELECT table_name FROM information_schema.tables \
         WHERE table_schema = DATABASE() AND table_name NOT LIKE '%sqlx%'",
    ));
    assert_eq!(left.trim(), "");
    let report = store::migrate(&engine.settings, false).await.unwrap();
    assert_eq!((report.before, report.pending.len()), (0, STEPS_BACK.len()));
    let store = engine.open().await;
    store
        .create(revision(&user("alice"), 1, 1), stamp())
        .await
        .unwrap();
    store
        .insert_client(&client(1, 1), CallId::fresh())
        .await
        .unwrap();
}

/// One step back and forth again, with records there, then two and more: what the steps did not make is left alone.
pub(crate) async fn a_step_back_keeps_the_records(engine: &Engine) {
    let alice = user("alice");
    let store = engine.open().await;
    let created = store.create(revision(&alice, 1, 1), stamp()).await.unwrap();
    store.close().await;
    for (steps, (reached, ..)) in STEPS_BACK.iter().enumerate().skip(1) {
        let store = engine.open().await;
        let row = client(1, 1);
        if store.client(row.id).await.unwrap().is_none() {
            store.insert_client(&row, CallId::fresh()).await.unwrap();
        }
        let used = created.created;
        store.note_client_uses(&[(row.id, 1, used)]).await.unwrap();
        store.note_uses(&[(created.id, used)]).await.unwrap();
        store.close().await;
        let mut undone = Vec::new();
        for (version, name, statements) in STEPS_BACK.into_iter().take(steps) {
            step_back(engine, version, statements);
            undone.insert(0, format!("{version:04} {name}"));
        }
        let older = store::open(&engine.settings).await.unwrap_err();
        assert!(
            matches!(&older, Error::Schema(what) if what.to_string().contains("store migrate"))
        );
        let report = store::migrate(&engine.settings, false).await.unwrap();
        let before = i64::from(*reached);
        assert_eq!((report.before, report.pending), (before, undone));
        let store = engine.open().await;
        assert_eq!(store.record(&alice).await.unwrap().unwrap().info, created);
        let uses = store.last_uses(&[created.id]).await.unwrap();
        assert_eq!(uses.is_empty(), before < 2);
        assert_eq!(store.client(row.id).await.unwrap().is_none(), before < 3);
        let uses = store.client_uses(row.id).await.unwrap();
        assert_eq!(uses.is_empty(), before < 3);
        store.close().await;
    }
}

pub(crate) async fn a_dry_run_changes_no_database(engine: &Engine) {
    let engine = match &engine.place {
        Place::Sqlite(_) => Engine::bare_sqlite(),
        Place::Server(server, _) => Engine::bare_on(server),
    };
    let report = store::migrate(&engine.settings, true).await.unwrap();
    assert_eq!((report.before, report.pending.len()), (0, STEPS_BACK.len()));
    let status = store::status(&engine.settings).await.unwrap();
    assert_eq!((status.current, status.newest), (0, report.newest));
    let refused = store::open(&engine.settings).await.unwrap_err();
    assert!(
        matches!(&refused, Error::Schema(what) if what.to_string().contains("store migrate")),
        "{refused}"
    );
    store::migrate(&engine.settings, false).await.unwrap();
    let again = store::migrate(&engine.settings, false).await.unwrap();
    assert_eq!((again.before, again.pending.len()), (status.newest, 0));
}

/// A broker of the release before serves until it is restarted, and its restart names the cause.
pub(crate) async fn an_open_store_goes_on_when_the_schema_becomes_newer(engine: &Engine) {
    let opened = engine.open().await;
    let alice = user("alice");
    let created = opened
        .create(revision(&alice, 1, 1), stamp())
        .await
        .unwrap();
    engine.sql("CREATE TABLE of_a_later_release (number INTEGER NOT NULL PRIMARY KEY)");
    record_later_schema(engine);
    assert_eq!(opened.record(&alice).await.unwrap().unwrap().info, created);
    let bob = revision(&user("bob"), 2, 1);
    opened.create(bob, stamp()).await.unwrap();
    opened.close().await;
    let refused = store::open(&engine.settings).await.map(drop).unwrap_err();
    assert!(refused.to_string().contains("newer than"), "{refused}");
}

/// Two releases then serve one database during an upgrade. Commands of the old one, which may look at whole tables, are refused.
pub(crate) async fn a_newer_schema_serves_if_each_of_its_migrations_says_so(engine: &Engine) {
    let newest = store::status(&engine.settings).await.unwrap().newest;
    let usable = format!("notes usable from {newest}");
    let later = format!("notes usable from {}", newest + 1);
    engine.sql("CREATE TABLE of_a_later_release (number INTEGER NOT NULL PRIMARY KEY)");
    let cases: [(&[&str], bool); 4] = [
        (&[&usable], true),
        (&[&usable, "notes usable from 1"], true),
        (&[&usable, &later], false),
        (&["notes", &usable], false),
    ];
    for (descriptions, is_usable) in cases {
        for (number, description) in (9_000..).zip(descriptions) {
            record_migration(engine, number, description);
        }
        let status = store::status(&engine.settings).await.unwrap();
        assert_eq!(status.is_usable, is_usable, "{descriptions:?}");
        let serving = store::open_to_serve(&engine.settings).await;
        match serving {
            Ok(opened) => {
                assert!(is_usable, "{descriptions:?}");
                let address = user(&format!("user-{}", descriptions.len()));
                let number = u8::try_from(descriptions.len()).unwrap();
                let new = revision(&address, number, 1);
                let created = opened.create(new, stamp()).await.unwrap();
                let read = opened.record(&address).await.unwrap().unwrap();
                assert_eq!(read.info, created);
                opened.close().await;
            }
            Err(error) => {
                assert!(!is_usable, "{descriptions:?}: {error}");
                assert!(error.to_string().contains("newer than"), "{error}");
            }
        }
        for result in [
            store::open(&engine.settings).await.map(drop),
            store::open_tables(&engine.settings).await.map(drop),
            store::migrate(&engine.settings, false).await.map(drop),
        ] {
            let error = result.unwrap_err();
            assert!(error.to_string().contains("newer than"), "{error}");
        }
        engine.sql("DELETE FROM _sqlx_migrations WHERE version >= 9000");
    }
}

pub(crate) async fn a_schema_that_is_too_new_is_refused(engine: &Engine) {
    record_later_schema(engine);
    for result in [
        store::open(&engine.settings).await.map(drop),
        store::migrate(&engine.settings, false).await.map(drop),
    ] {
        let error = result.unwrap_err();
        assert!(
            matches!(&error, Error::Schema(what) if what.to_string().contains("newer")),
            "{error}"
        );
    }
}

/// Where each statement of a migration commits separately, a later release that was interrupted has changed a part of the schema.
pub(crate) async fn an_interrupted_migration_of_a_later_release_is_refused(engine: &Engine) {
    record_later_schema(engine);
    let unfinished = engine.pick("0", "false", "false");
    engine.sql(&format!(
        "UPDATE _sqlx_migrations SET success = {unfinished} WHERE version = 9999"
    ));
    for result in [
        store::open_to_serve(&engine.settings).await.map(drop),
        store::open(&engine.settings).await.map(drop),
        store::migrate(&engine.settings, false).await.map(drop),
    ] {
        let error = result.unwrap_err();
        assert!(error.to_string().contains("newer than"), "{error}");
    }
    let left = engine.sql("SELECT count(*) FROM _sqlx_migrations WHERE version = 9999");
    assert_eq!(left.trim(), "1");
}

/// What `store migrate` of a later release leaves behind.
fn record_later_schema(engine: &Engine) {
    record_migration(engine, 9_999, "later");
}

fn record_migration(engine: &Engine, version: u32, description: &str) {
    let (success, checksum) = engine.pick(("1", "x'00'"), ("true", "''"), ("true", "''"));
    engine.sql(&format!(
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) \
         VALUES ({version}, '{description}', {success}, {checksum}, 0)"
    ));
}

/// Each instance migrates at its start when the configuration says so.
pub(crate) async fn instances_that_race_to_migrate_end_with_one_schema(engine: &Engine) {
    let Place::Server(server, _) = &engine.place else {
        panic!("only a server has several instances")
    };
    let engine = Engine::bare_on(server);
    let mut instances = JoinSet::new();
    for _ in 0..8 {
        let settings = engine.settings.clone();
        instances.spawn(async move {
            store::migrate(&settings, false).await?;
            store::open(&settings).await
        });
    }
    let stores = instances.join_all().await;
    for (number, store) in (0..).zip(stores) {
        let name = format!("user-{number}");
        store
            .unwrap()
            .create(revision(&user(&name), number, 1), stamp())
            .await
            .unwrap();
    }
    let applied = engine.sql("SELECT version FROM _sqlx_migrations WHERE success ORDER BY version");
    let versions = STEPS_BACK.iter().rev();
    let versions: Vec<String> = versions.map(|(version, ..)| version.to_string()).collect();
    assert_eq!(applied.trim(), versions.join("\n"));
}

/// An administrator who looks into the database finds what each column means.
pub(crate) fn every_column_has_prose(engine: &Engine) {
    let mute = engine.sql(engine.pick(
        "",
        "SELECT c.relname, a.attname FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid \
         WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND a.attnum > 0 \
         AND c.relname NOT LIKE '%sqlx%' AND (col_description(c.oid, a.attnum) IS NULL \
         OR obj_description(c.oid) IS NULL)",
        "SELECT c.table_name, c.column_name FROM information_schema.columns c \
         JOIN information_schema.tables t USING (table_schema, table_name) \
         WHERE table_schema = DATABASE() AND table_name NOT LIKE '%sqlx%' \
         AND (c.column_comment = '' OR t.table_comment = '')",
    ));
    assert_eq!(mute.trim(), "");
}
