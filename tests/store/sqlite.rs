//! What only SQLite has: the file, its mode, its damage.

use std::{fs, os::unix::fs::PermissionsExt as _, process::Command};

use keybroker::store::{self, Error, Settings};

use super::{Engine, revision, stamp, user};

impl Engine {
    fn file(&self) -> std::path::PathBuf {
        self.folder.path().join("test.db")
    }

    /// Runs SQL with another program than ours, with the CHECKs off: what a damaged or altered file holds.
    fn sql(&self, statements: &str) -> String {
        let text = format!("PRAGMA ignore_check_constraints = ON; {statements}");
        let output = Command::new("sqlite3").arg(self.file()).arg(text).output();
        let output = output.expect("sqlite3 is not installed; run scripts/install.sh");
        assert!(output.status.success(), "{statements}: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

#[tokio::test]
async fn rows_that_do_not_decode_are_corrupt_by_name() {
    let cases = [
        ("UPDATE records SET record_id = x'01'", "record_id"),
        ("UPDATE records SET state = 'gone'", "state"),
        ("UPDATE records SET revision = -1", "revision"),
        ("DELETE FROM revisions", "wrapping_key_id"),
        (
            "UPDATE revisions SET wrapping_key_id = x'00'",
            "wrapping_key_id",
        ),
    ];
    for (damage, column) in cases {
        let engine = Engine::sqlite().await;
        let store = engine.open().await;
        store
            .create(revision(&user("alice"), 1, 1), stamp())
            .await
            .unwrap();
        engine.sql(&format!("PRAGMA foreign_keys = OFF; {damage}"));
        let read = store.record(&user("alice")).await;
        match read {
            Err(Error::Corrupt(what)) => assert!(what.contains(column), "{damage}: {what}"),
            other => panic!("{damage}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn a_truncated_envelope_is_handed_on_as_it_is() {
    let engine = Engine::sqlite().await;
    let store = engine.open().await;
    store
        .create(revision(&user("alice"), 1, 1), stamp())
        .await
        .unwrap();
    engine.sql("UPDATE revisions SET envelope = x'01'");
    assert_eq!(
        store
            .record(&user("alice"))
            .await
            .unwrap()
            .unwrap()
            .envelope,
        [1]
    );
}

#[tokio::test]
async fn reads_change_nothing() {
    let engine = Engine::sqlite().await;
    let store = engine.open().await;
    store
        .create(revision(&user("alice"), 1, 1), stamp())
        .await
        .unwrap();
    let before =
        engine.sql("SELECT * FROM records; SELECT * FROM revisions; SELECT * FROM changes");
    let wal =
        |engine: &Engine| fs::read(engine.file().with_extension("db-wal")).unwrap_or_default();
    let log = wal(&engine);
    for _ in 0..10 {
        store.record(&user("alice")).await.unwrap();
        store.record(&user("nobody")).await.unwrap();
    }
    assert_eq!(wal(&engine), log);
    let after = engine.sql("SELECT * FROM records; SELECT * FROM revisions; SELECT * FROM changes");
    assert_eq!(after, before);
}

#[tokio::test]
async fn schemas_that_do_not_fit_are_refused_with_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let settings = Settings {
        url: format!("sqlite:{}", folder.path().join("none.db").display()),
        migrate_at_start: false,
    };
    let missing = store::open(&settings).await.unwrap_err();
    assert!(
        matches!(&missing, Error::Schema(what) if what.contains("store migrate")),
        "{missing}"
    );
    let engine = Engine::sqlite().await;
    engine.sql(
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) \
         VALUES (9999, 'later', 1, x'00', 0)",
    );
    for result in [
        store::open(&engine.settings).await.map(drop),
        store::migrate(&engine.settings, false).await.map(drop),
    ] {
        let error = result.unwrap_err();
        assert!(
            matches!(&error, Error::Schema(what) if what.contains("newer")),
            "{error}"
        );
    }
    let relative = Settings {
        url: "sqlite:test.db".to_owned(),
        migrate_at_start: false,
    };
    assert!(matches!(
        store::open(&relative).await,
        Err(Error::Schema(_))
    ));
}

#[tokio::test]
async fn a_dry_run_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let settings = Settings {
        url: format!("sqlite:{}", folder.path().join("new.db").display()),
        migrate_at_start: false,
    };
    let report = store::migrate(&settings, true).await.unwrap();
    assert_eq!((report.before, report.pending.len()), (0, 1));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    store::migrate(&settings, false).await.unwrap();
    let status = store::status(&settings).await.unwrap();
    assert_eq!(status.current, status.newest);
    let mode = fs::metadata(folder.path().join("new.db"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn a_file_that_others_can_use_is_refused() {
    let engine = Engine::sqlite().await;
    fs::set_permissions(engine.file(), fs::Permissions::from_mode(0o644)).unwrap();
    let error = store::open(&engine.settings).await.unwrap_err();
    assert!(error.to_string().contains("chmod 600"), "{error}");
}

#[tokio::test]
async fn a_database_has_one_process() {
    let engine = Engine::sqlite().await;
    let held = store::lock(&engine.settings).unwrap();
    let error = store::lock(&engine.settings).unwrap_err();
    let pid = std::process::id().to_string();
    assert!(
        matches!(&error, Error::InUse(what) if what.contains(&pid)),
        "{error}"
    );
    assert!(matches!(
        store::migrate(&engine.settings, false).await,
        Err(Error::InUse(_))
    ));
    drop(held);
    store::lock(&engine.settings).unwrap();
}

#[tokio::test]
async fn a_database_that_cannot_grow_loses_nothing() {
    let engine = Engine::sqlite().await;
    let store = engine.open().await;
    store
        .create(revision(&user("alice"), 1, 1), stamp())
        .await
        .unwrap();
    // A file that is no database where the WAL must grow: writes fail, reads go on.
    store.close().await;
    engine.sql("PRAGMA wal_checkpoint(TRUNCATE)");
    let mut bytes = fs::read(engine.file()).unwrap();
    bytes[..16].copy_from_slice(b"not a database!!");
    fs::write(engine.file(), &bytes).unwrap();
    let error = store::open(&engine.settings).await.unwrap_err();
    assert!(
        matches!(&error, Error::Corrupt(what) if what.contains("backup")),
        "{error}"
    );
}
