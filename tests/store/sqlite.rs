//! What only SQLite has: the file, its mode, its damage.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use keybroker_store as store;
use keybroker_store::{Error, Settings};
use tokio::task::JoinSet;

use super::{Engine, Place, revision, stamp, user};

impl Engine {
    fn folder(&self) -> &Path {
        match &self.place {
            Place::Sqlite(folder) => folder.path(),
            Place::Server(..) => panic!("a server has no file"),
        }
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.folder().join("test.db")
    }
}

#[tokio::test]
async fn reads_do_not_touch_the_file() {
    let engine = Engine::sqlite().await;
    let store = engine.open().await;
    store
        .create(revision(&user("alice"), 1, 1), stamp())
        .await
        .unwrap();
    let wal = || fs::read(engine.file().with_extension("db-wal")).unwrap_or_default();
    let log = wal();
    for _ in 0..10 {
        store.record(&user("alice")).await.unwrap();
        store.record(&user("nobody")).await.unwrap();
    }
    assert_eq!(wal(), log);
}

#[tokio::test]
async fn a_file_that_is_not_there_is_named_with_the_remedy() {
    let engine = Engine::bare_sqlite();
    let missing = store::open(&engine.settings).await.unwrap_err();
    assert!(
        matches!(&missing, Error::Schema(what) if what.to_string().contains("store migrate")),
        "{missing}"
    );
    assert!(matches!(
        store::open(&Settings::new("sqlite:test.db")).await,
        Err(Error::Schema(_))
    ));
}

#[tokio::test]
async fn a_dry_run_makes_no_file() {
    let engine = Engine::bare_sqlite();
    store::migrate(&engine.settings, true).await.unwrap();
    assert_eq!(fs::read_dir(engine.folder()).unwrap().count(), 0);
    store::migrate(&engine.settings, false).await.unwrap();
    let mode = fs::metadata(engine.file()).unwrap().permissions().mode();
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
        matches!(&error, Error::Schema(what) if what.to_string().contains("backup")),
        "{error}"
    );
}

/// One client enrols many users on a slow disk: whoever else waits in that line gets a turn, and is not told that the database
/// is away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_of_writers_is_not_an_outage() {
    /// Longer than a probe waits, shorter than a caller does.
    const LINE: Duration = Duration::from_millis(1_400);
    let engine = Engine::sqlite().await;
    engine.sql(
        "CREATE TABLE numbers (i INTEGER); WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000) \
         INSERT INTO numbers SELECT i FROM n; \
         CREATE TRIGGER slow AFTER INSERT ON changes BEGIN SELECT count(*) FROM numbers a, numbers b WHERE a.i + b.i < 0; END",
    );
    let store = engine.open().await;
    let create = |number: u32| {
        let store = Arc::clone(&store);
        async move {
            let content = u8::try_from(number % 251).unwrap();
            let new = revision(&user(&format!("user-{number}")), content, 1);
            store.create(new, stamp()).await
        }
    };
    let begun = Instant::now();
    create(0).await.unwrap();
    let mut count = u32::try_from(LINE.as_micros() / begun.elapsed().as_micros()).unwrap();
    let mut number = 1;
    // The first one may have been slower than those of the line: then the line is too short to say anything, and a longer one
    // is made.
    for _ in 0..4 {
        let mut line = JoinSet::new();
        for number in number..number + count {
            line.spawn(create(number));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        let begun = Instant::now();
        store.ping().await.unwrap();
        let waited = begun.elapsed();
        create(number + count).await.unwrap();
        for created in line.join_all().await {
            // On a busy machine the last ones may have waited for too long.
            if let Err(error) = created {
                assert!(!error.to_string().contains("probe"), "{error}");
            }
        }
        if waited > Duration::from_millis(800) {
            return;
        }
        number += count + 1;
        count *= 2;
    }
    panic!("no line was long enough");
}

/// SQLite goes on writing to a file that was renamed or removed: what it commits there is lost. Whatever of the database is
/// another file is known at once, and the database is used again when it is the file that was opened.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_was_swapped_is_not_used() {
    async fn is_refused(store: &Arc<dyn store::Store>, number: u8) {
        let new = revision(&user(&format!("lost-{number}")), number, 1);
        for result in [
            store.create(new, stamp()).await.map(drop),
            store.record(&user("alice")).await.map(drop),
            store.ping().await,
        ] {
            assert!(
                matches!(&result, Err(Error::Down(_))),
                "{number}: {result:?}"
            );
        }
        let error = store.ping().await.unwrap_err();
        assert!(
            error
                .to_string()
                .contains("put the original database file back"),
            "{error}"
        );
    }

    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    fs::create_dir(&data).unwrap();
    let file = data.join("test.db");
    let settings = Settings::new(format!("sqlite:{}", file.display()));
    store::migrate(&settings, false).await.unwrap();
    let store = store::open(&settings).await.unwrap();
    let new = revision(&user("alice"), 100, 1);
    store.create(new, stamp()).await.unwrap();

    let beside = |suffix: &str| data.join(format!("test.db{suffix}"));
    let aside = folder.path().join("aside");
    let paths = [file.clone(), beside("-wal"), beside("-shm"), data.clone()];
    for (number, path) in (0_u8..).zip(&paths) {
        fs::rename(path, &aside).unwrap();
        is_refused(&store, number).await;
        // A copy, as a restore would put it there.
        if path == &data {
            fs::create_dir(path).unwrap();
            for entry in fs::read_dir(&aside).unwrap() {
                let entry = entry.unwrap();
                fs::copy(entry.path(), path.join(entry.file_name())).unwrap();
            }
        } else {
            fs::copy(&aside, path).unwrap();
        }
        is_refused(&store, number + 10).await;
        if path == &data {
            fs::remove_dir_all(path).unwrap();
        }
        fs::rename(&aside, path).unwrap();
        store.ping().await.unwrap();
        let new = revision(&user(&format!("kept-{number}")), number + 50, 1);
        store.create(new, stamp()).await.unwrap();
    }
    store.close().await;

    let store = store::open(&settings).await.unwrap();
    for number in 0..4 {
        let kept = user(&format!("kept-{number}"));
        assert!(store.record(&kept).await.unwrap().is_some());
        for number in [number, number + 10] {
            let lost = user(&format!("lost-{number}"));
            assert_eq!(store.record(&lost).await.unwrap(), None);
        }
    }
}

/// A creation that is acknowledged while the file is swapped is in the file that was swapped, or in none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_change_is_acknowledged_after_a_swap() {
    let engine = Engine::sqlite().await;
    let store = engine.open().await;
    let writer = {
        let store = Arc::clone(&store);
        tokio::spawn(async move {
            let mut acknowledged = Vec::new();
            for number in 0..u8::MAX {
                let begun = Instant::now();
                let new = revision(&user(&format!("user-{number}")), number, 1);
                if store.create(new, stamp()).await.is_err() {
                    break;
                }
                acknowledged.push((number, begun));
            }
            acknowledged
        })
    };
    while store.record(&user("user-3")).await.unwrap().is_none() {}
    let aside = engine.folder().join("aside.db");
    fs::rename(engine.file(), &aside).unwrap();
    let swapped = Instant::now();
    let acknowledged = writer.await.unwrap();
    assert!(
        acknowledged.len() < usize::from(u8::MAX),
        "the swap came late"
    );
    assert!(acknowledged.iter().all(|(_, begun)| *begun <= swapped));
    fs::rename(&aside, engine.file()).unwrap();
    for (number, _) in acknowledged {
        let at = user(&format!("user-{number}"));
        assert!(store.record(&at).await.unwrap().is_some(), "{number}");
    }
}
