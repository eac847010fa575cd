//! What is forgotten for good, and what is not.

use std::sync::Arc;

use keybroker_core::{call::Timestamp, key::Revision};
use keybroker_store::{
    Stamp,
    purge::{Portion, Purge, forget_changes},
    scan::Superseded,
    tables::{Table, Tables},
};

use super::{Engine, record_id, revision, stamp, user};

const DAY_US: i64 = 24 * 3_600 * 1_000_000;

fn days_ago(days: i64) -> Timestamp {
    Timestamp::from_micros(Timestamp::now().micros() - days * DAY_US)
}

fn stamp_of(days: i64) -> Stamp {
    Stamp {
        at: days_ago(days),
        ..stamp()
    }
}

fn number(revision: u64) -> Revision {
    Revision::new(revision).unwrap()
}

/// Records that are gone, and superseded revisions.
async fn purge(store: &Arc<dyn Tables>, days: i64) -> (usize, usize) {
    let mut work = Purge::new(Arc::clone(store), days_ago(days));
    let mut gone = (0, 0);
    while let Some(portion) = work.next().await.unwrap() {
        gone.0 += work.records(&portion).await.unwrap().len();
        gone.1 += work.revisions(&portion).await.unwrap().len();
    }
    gone
}

pub(crate) async fn what_is_old_is_purged_and_nothing_else(engine: &Engine) {
    let store = engine.tables().await;
    let [alice, bob, carl, dora] = ["alice", "bob", "carl", "dora"].map(user);
    for (name, id) in [(&alice, 1), (&bob, 2), (&carl, 3), (&dora, 4)] {
        store
            .create(revision(name, id, 1), stamp_of(60))
            .await
            .unwrap();
    }
    // Superseded 40 and 5 days ago.
    for (revision_number, days) in [(2, 40), (3, 5)] {
        let new = revision(&alice, 1, revision_number);
        store.supersede(new, stamp_of(days)).await.unwrap();
    }
    let new = revision(&bob, 2, 2);
    store.supersede(new, stamp_of(50)).await.unwrap();
    // Deleted 31 days ago, 29 days ago, and 40 days ago but wanted back.
    for (id, current, days) in [(2, 2, 31), (3, 1, 29), (4, 1, 40)] {
        store
            .delete(record_id(id), number(current), stamp_of(days))
            .await
            .unwrap();
    }
    store.undelete(record_id(4), stamp_of(35)).await.unwrap();

    let used: Vec<_> = (1..=4).map(|id| (record_id(id), days_ago(45))).collect();
    store.note_uses(&used).await.unwrap();
    assert_eq!(purge(&store, 30).await, (1, 1));
    assert_eq!(store.count(Table::LastUses).await.unwrap(), 3);
    let left = |id, revision| store.revision(record_id(id), number(revision));
    assert!(left(1, 1).await.unwrap().is_none());
    assert!(left(1, 2).await.unwrap().is_some());
    assert_eq!(
        store.record(&alice).await.unwrap().unwrap().envelope,
        b"alice 3"
    );
    assert!(store.record(&bob).await.unwrap().is_none());
    for revision in [1, 2] {
        assert!(left(2, revision).await.unwrap().is_none());
    }
    for name in [&carl, &dora] {
        assert!(store.record(name).await.unwrap().is_some(), "{name:?}");
    }
    store.undelete(record_id(3), stamp()).await.unwrap();
    assert_eq!(
        purge(&store, 30).await,
        (0, 0),
        "there is nothing left to do"
    );

    // The name is free again, for another record.
    store.create(revision(&bob, 9, 1), stamp()).await.unwrap();
    assert_eq!(
        store.record(&bob).await.unwrap().unwrap().info.id,
        record_id(9)
    );
}

pub(crate) async fn a_purge_can_be_stopped_and_begun_again(engine: &Engine) {
    let store = engine.tables().await;
    for id in 0..=255 {
        let name = user(&format!("user-{id}"));
        store
            .create(revision(&name, id, 1), stamp_of(60))
            .await
            .unwrap();
        store
            .delete(record_id(id), Revision::FIRST, stamp_of(50))
            .await
            .unwrap();
    }
    let mut work = Purge::new(Arc::clone(&store), days_ago(30));
    let portion = work.next().await.unwrap().unwrap();
    let first = work.records(&portion).await.unwrap().len();
    // A second portion is found and not carried out: its process was killed.
    assert!(!work.next().await.unwrap().unwrap().records.is_empty());
    drop(work);
    assert!((1..=200).contains(&first), "{first}: portions are small");
    assert_eq!(purge(&store, 30).await, (256 - first, 0));
    for table in [Table::Records, Table::Revisions] {
        assert_eq!(store.count(table).await.unwrap(), 0);
    }
}

pub(crate) async fn a_record_that_is_wanted_back_meanwhile_is_not_purged(engine: &Engine) {
    let store = engine.tables().await;
    let alice = user("alice");
    store
        .create(revision(&alice, 1, 1), stamp_of(60))
        .await
        .unwrap();
    store
        .delete(record_id(1), Revision::FIRST, stamp_of(50))
        .await
        .unwrap();
    let mut work = Purge::new(Arc::clone(&store), days_ago(30));
    let portion = work.next().await.unwrap().unwrap();
    assert_eq!(portion.records.len(), 1);
    store.undelete(record_id(1), stamp()).await.unwrap();
    assert!(work.records(&portion).await.unwrap().is_empty());
    assert_eq!(
        store.record(&alice).await.unwrap().unwrap().envelope,
        b"alice 1"
    );
    // Nor does a wrong portion remove what is current.
    let wrong = Portion {
        revisions: vec![Superseded {
            record: record_id(1),
            address: alice.clone(),
            revision: Revision::FIRST,
        }],
        ..Portion::default()
    };
    assert!(work.revisions(&wrong).await.unwrap().is_empty());
    assert!(store.record(&alice).await.unwrap().is_some());
}

pub(crate) async fn a_purge_leaves_alone_what_it_cannot_read(engine: &Engine) {
    let store = engine.tables().await;
    for (name, id) in [("alice", 1), ("bob", 2), ("carl", 3)] {
        store
            .create(revision(&user(name), id, 1), stamp_of(60))
            .await
            .unwrap();
        store
            .delete(record_id(id), Revision::FIRST, stamp_of(50))
            .await
            .unwrap();
    }
    let [one, two] = [1, 2].map(|id: u8| {
        let id = format!("{id:02x}").repeat(16);
        engine.pick(format!("x'{id}'"), format!("'\\x{id}'"), format!("x'{id}'"))
    });
    let quoted = engine.pick("user", "\"user\"", "user");
    engine.sql(&format!(
        "UPDATE records SET {quoted} = '' WHERE record_id = {one}; DELETE FROM revisions WHERE record_id = {two}"
    ));
    assert_eq!(purge(&store, 30).await, (1, 0));
    assert_eq!(store.count(Table::Records).await.unwrap(), 2);
}

pub(crate) async fn marks_of_old_changes_are_forgotten(engine: &Engine) {
    let store = engine.tables().await;
    let stamps = [stamp_of(60), stamp_of(31), stamp_of(29), stamp()];
    for (id, stamp) in (0..).zip(&stamps) {
        let name = user(&format!("user-{id}"));
        store
            .create(revision(&name, id, 1), stamp.clone())
            .await
            .unwrap();
    }
    let before = days_ago(30);
    for (dry_run, left) in [(true, 4), (false, 2)] {
        assert_eq!(forget_changes(&*store, before, dry_run).await.unwrap(), 2);
        assert_eq!(store.count(Table::Changes).await.unwrap(), left);
    }
    let mut known = Vec::new();
    for stamp in &stamps {
        known.push(store.committed_by(stamp.call).await.unwrap());
    }
    assert_eq!(known, [false, false, true, true]);
}
