//! The identity of a database, and the marks of changes: what a broker recognises its database by.

use std::sync::Arc;

use keybroker_core::call::{CallId, Timestamp};
use keybroker_store as store;
use keybroker_store::{CHANGES_MAX, KnownLog, copy::Copy};

use super::{Engine, revision, stamp, user};

pub(crate) async fn an_identity_is_written_once(engine: &Engine) {
    let opened = engine.open().await;
    let first = opened.evidence(&[]).await.unwrap();
    let id = first.store.expect("an identity");
    assert_ne!(id.as_bytes(), &[0; 16]);
    opened.close().await;
    store::migrate(&engine.settings, false).await.unwrap();
    let opened = engine.open().await;
    assert_eq!(opened.evidence(&[]).await.unwrap(), first);
    engine.sql("DELETE FROM store_identity");
    assert_eq!(opened.evidence(&[]).await.unwrap().store, None);
    opened.close().await;
    store::migrate(&engine.settings, false).await.unwrap();
    let opened = engine.open().await;
    let fresh = opened.evidence(&[]).await.unwrap().store;
    assert!(
        fresh.is_some_and(|fresh| fresh != id),
        "{fresh:?} after {id:?}"
    );
}

pub(crate) async fn the_marks_of_changes_are_counted(engine: &Engine) {
    let opened = engine.open().await;
    let mut calls = Vec::new();
    for number in 0..CHANGES_MAX {
        let number = u8::try_from(number).unwrap();
        let stamp = stamp();
        calls.push(stamp.call);
        let new = revision(&user(&format!("user-{number}")), number, 1);
        opened.create(new, stamp).await.unwrap();
    }
    for asked in [0, 1, 3, CHANGES_MAX] {
        let evidence = opened.evidence(&calls[..asked]).await.unwrap();
        assert_eq!(evidence.marks, asked);
    }
    calls[1] = CallId::fresh();
    let evidence = opened.evidence(&calls).await.unwrap();
    assert_eq!(evidence.marks, CHANGES_MAX - 1);
    assert!(evidence.store.is_some());
}

/// A migration that was killed between its statement and its mark, on the engine where each statement commits by itself.
pub(crate) async fn an_interrupted_migration_starts_again(engine: &Engine) {
    engine.sql(engine.pick(
        "SELECT 1",
        "SELECT 1",
        "DROP TABLE store_identity; \
         DELETE FROM _sqlx_migrations WHERE version >= 5; \
         UPDATE _sqlx_migrations SET success = false WHERE version = 4",
    ));
    let report = store::migrate(&engine.settings, false).await.unwrap();
    let interrupted = engine.pick(false, false, true);
    assert_eq!(report.before, if interrupted { 3 } else { report.newest });
    let opened = engine.open().await;
    assert!(opened.evidence(&[]).await.unwrap().store.is_some());
    opened
        .create(revision(&user("alice"), 1, 1), stamp())
        .await
        .unwrap();
}

pub(crate) async fn a_copy_gets_the_identity_of_its_source(engine: &Engine) {
    let source = Engine::sqlite().await;
    let copy = Copy {
        from: source.tables().await,
        to: engine.tables().await,
        added: Arc::default(),
    };
    let id = copy.from.evidence(&[]).await.unwrap().store;
    assert_ne!(copy.to.evidence(&[]).await.unwrap().store, id);
    copy.carry_identity().await.unwrap();
    assert_eq!(copy.to.evidence(&[]).await.unwrap().store, id);
}

/// Each instance has its own logs, and a log that was recorded twice is recorded once.
pub(crate) async fn the_audit_logs_of_an_instance_are_known(engine: &Engine) {
    let opened = engine.open().await;
    let [first, second] = ["1", "2"].map(|digit| digit.repeat(32));
    let known = async |instance: &str, log: &str| opened.audit_log(instance, log).await.unwrap();
    assert_eq!(known("one", &first).await, KnownLog::None);
    for _ in 0..2 {
        let at = Timestamp::now();
        opened.add_audit_log("one", &first, at).await.unwrap();
    }
    assert_eq!(known("one", &first).await, KnownLog::This);
    assert_eq!(known("one", &second).await, KnownLog::Another);
    assert_eq!(known("One", &second).await, KnownLog::None);
    assert_eq!(known("two", &first).await, KnownLog::None);
    opened
        .add_audit_log("one", &second, Timestamp::now())
        .await
        .unwrap();
    assert_eq!(known("one", &first).await, KnownLog::This);
    assert_eq!(known("one", &second).await, KnownLog::This);
}
