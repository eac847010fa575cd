//! What every engine must do, method by method.

use std::{collections::BTreeSet, sync::Arc};

use keybroker_core::{
    call::{CallId, Timestamp},
    key::{
        Fingerprint, ObjectIds, Purpose, Revision, Tenant, UserId, WrappingKeyId, WrappingKeyState,
    },
};
use keybroker_store::{
    DestructionChange, DestructionRow, Error, ListQuery, PlaceChange, PlaceRow, Position,
    RecordInfo, RecordState, RegistryChange, RegistryRow, RegistryUpdate, Store,
};
use tokio::task::JoinSet;

use super::{Engine, KEY, address, record_id, revision, scope, stamp, stamp_with, user};

pub(crate) async fn a_record_is_read_as_it_was_written(engine: &Engine) {
    let store = engine.open().await;
    let alice = user("alice");
    assert!(store.record(&alice).await.unwrap().is_none());
    let stamp = stamp();
    let created = store
        .create(revision(&alice, 1, 1), stamp.clone())
        .await
        .unwrap();
    let record = store.record(&alice).await.unwrap().unwrap();
    assert_eq!(record.info, created);
    assert_eq!(record.envelope, b"alice 1");
    assert_eq!(
        (created.state, created.revision),
        (RecordState::Active, Revision::FIRST)
    );
    assert_eq!((created.created, created.updated), (stamp.at, stamp.at));
    assert_eq!((created.deleted, created.wrapping_key), (None, KEY));
    store.ping().await.unwrap();
}

pub(crate) async fn create_never_overwrites(engine: &Engine) {
    let store = engine.open().await;
    let alice = user("alice");
    store.create(revision(&alice, 1, 1), stamp()).await.unwrap();
    let again = store.create(revision(&alice, 2, 1), stamp()).await;
    assert!(matches!(again, Err(Error::Exists)), "{again:?}");
    assert_eq!(
        store.record(&alice).await.unwrap().unwrap().info.id,
        record_id(1)
    );
}

pub(crate) async fn of_concurrent_creates_one_wins(engine: &Engine) {
    let store = engine.open().await;
    let mut tasks = JoinSet::new();
    for number in 0..100 {
        let store = Arc::clone(&store);
        tasks.spawn(async move {
            store
                .create(revision(&user("alice"), number, 1), stamp())
                .await
        });
    }
    let results = tasks.join_all().await;
    let won: Vec<_> = results.iter().flatten().collect();
    assert_eq!(won.len(), 1);
    assert_eq!(
        results
            .iter()
            .filter(|r| matches!(r, Err(Error::Exists)))
            .count(),
        99
    );
    assert_eq!(
        store.record(&user("alice")).await.unwrap().unwrap().info,
        *won[0]
    );
}

pub(crate) async fn of_concurrent_replaces_one_wins(engine: &Engine) {
    let store = engine.open().await;
    store
        .create(revision(&user("alice"), 1, 1), stamp())
        .await
        .unwrap();
    for number in 2..5 {
        let mut tasks = JoinSet::new();
        for _ in 0..100 {
            let store = Arc::clone(&store);
            tasks.spawn(async move {
                store
                    .supersede(revision(&user("alice"), 1, number), stamp())
                    .await
            });
        }
        let results = tasks.join_all().await;
        assert_eq!(results.iter().filter(|r| r.is_ok()).count(), 1);
        let lost = |r: &&Result<_, _>| matches!(r, Err(Error::Revision { current }) if current.get() == number);
        assert_eq!(results.iter().filter(lost).count(), 99);
    }
}

pub(crate) async fn a_deleted_record_keeps_its_name(engine: &Engine) {
    let store = engine.open().await;
    let alice = user("alice");
    store.create(revision(&alice, 1, 1), stamp()).await.unwrap();
    let wrong = store
        .delete(record_id(1), Revision::new(2).unwrap(), stamp())
        .await;
    assert!(matches!(wrong, Err(Error::Revision { .. })), "{wrong:?}");
    let deleted = store
        .delete(record_id(1), Revision::FIRST, stamp())
        .await
        .unwrap();
    assert_eq!(deleted.state, RecordState::Deleted);
    assert!(deleted.deleted.is_some());
    let again = store.delete(record_id(1), Revision::FIRST, stamp()).await;
    assert!(matches!(again, Err(Error::State)), "{again:?}");
    let replaced = store.supersede(revision(&alice, 1, 2), stamp()).await;
    assert!(matches!(replaced, Err(Error::State)), "{replaced:?}");
    let created = store.create(revision(&alice, 2, 1), stamp()).await;
    assert!(matches!(created, Err(Error::Exists)), "{created:?}");
    let back = store.undelete(record_id(1), stamp()).await.unwrap();
    assert_eq!((back.state, back.deleted), (RecordState::Active, None));
    let twice = store.undelete(record_id(1), stamp()).await;
    assert!(matches!(twice, Err(Error::State)), "{twice:?}");
    assert_eq!(
        store.record(&alice).await.unwrap().unwrap().envelope,
        b"alice 1"
    );
    let unknown = store.undelete(record_id(7), stamp()).await;
    assert!(matches!(unknown, Err(Error::NotFound)), "{unknown:?}");
}

pub(crate) async fn superseded_revisions_stay_readable(engine: &Engine) {
    let store = engine.open().await;
    let alice = user("alice");
    store.create(revision(&alice, 1, 1), stamp()).await.unwrap();
    store
        .supersede(revision(&alice, 1, 2), stamp())
        .await
        .unwrap();
    let skipped = store.supersede(revision(&alice, 1, 4), stamp()).await;
    assert!(
        matches!(skipped, Err(Error::Revision { .. })),
        "{skipped:?}"
    );
    for number in [1, 2] {
        let wanted = Revision::new(number).unwrap();
        let found = store.revision(record_id(1), wanted).await.unwrap().unwrap();
        assert_eq!(found.envelope, format!("alice {number}").into_bytes());
    }
    let none = store
        .revision(record_id(1), Revision::new(3).unwrap())
        .await
        .unwrap();
    assert!(none.is_none());
}

pub(crate) async fn names_are_compared_bytewise(engine: &Engine) {
    let store = engine.open().await;
    // Cases, and one letter composed in two ways: equal to people, not to us.
    let names = ["alice", "Alice", "z\u{e9}", "ze\u{301}", "alice "];
    for (number, name) in (0..).zip(names) {
        store
            .create(revision(&user(name), number, 1), stamp())
            .await
            .unwrap();
    }
    for (number, name) in (0..).zip(names) {
        let found = store.record(&user(name)).await.unwrap().unwrap();
        assert_eq!(found.info.id, record_id(number), "{name:?}");
    }
}

pub(crate) async fn tenants_are_apart(engine: &Engine) {
    let store = engine.open().await;
    let (one, other) = (address("one", "alice", "k"), address("other", "alice", "k"));
    store.create(revision(&one, 1, 1), stamp()).await.unwrap();
    assert!(store.record(&other).await.unwrap().is_none());
    store.create(revision(&other, 2, 1), stamp()).await.unwrap();
    let query = ListQuery {
        tenant: Tenant::parse("one").unwrap(),
        ..everything()
    };
    let listed = good_records(&store, &query).await;
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].address, one);
}

fn everything() -> ListQuery {
    ListQuery {
        tenant: Tenant::default(),
        user: None,
        deleted: true,
        from: Position::default(),
        limit: 1_000,
    }
}

/// A page without damaged rows.
async fn good_records(store: &Arc<dyn Store>, query: &ListQuery) -> Vec<RecordInfo> {
    let page = store.list(query).await.unwrap();
    page.into_iter().collect::<Result<_, _>>().unwrap()
}

/// All pages, as a client would read them.
async fn pages(store: &Arc<dyn Store>, limit: u32, mut query: ListQuery) -> Vec<(String, String)> {
    let mut all = Vec::new();
    query.limit = limit;
    for _ in 0..1_000 {
        let page = good_records(store, &query).await;
        all.extend(page.iter().map(|info| {
            let KeyAddressText(user, name) = (&info.address).into();
            (user, name)
        }));
        let Some(last) = page.last() else { break };
        query.from = Some((last.address.user.clone(), last.address.name.clone())).into();
    }
    all
}

struct KeyAddressText(String, String);

impl From<&keybroker_core::key::KeyAddress> for KeyAddressText {
    fn from(address: &keybroker_core::key::KeyAddress) -> Self {
        Self(address.user.to_string(), address.name.to_string())
    }
}

pub(crate) async fn pages_are_ordered_and_complete(engine: &Engine) {
    let store = engine.open().await;
    let users = ["a", "B", "b", "\u{e4}", "ab"];
    let mut expected = BTreeSet::new();
    let mut number = 0;
    for user in users {
        for name in ["k1", "k-2", "k"] {
            let at = address("default", user, name);
            store
                .create(revision(&at, number, 1), stamp())
                .await
                .unwrap();
            expected.insert((user.to_owned(), name.to_owned()));
            number += 1;
        }
    }
    // A set of strings is ordered bytewise, as the list must be.
    let expected: Vec<_> = expected.into_iter().collect();
    for limit in [1, 2, 7, 1_000] {
        assert_eq!(pages(&store, limit, everything()).await, expected);
    }
    store
        .delete(record_id(0), Revision::FIRST, stamp())
        .await
        .unwrap();
    let active = ListQuery {
        deleted: false,
        ..everything()
    };
    assert_eq!(pages(&store, 4, active).await.len(), expected.len() - 1);
    let one_user = ListQuery {
        user: Some(UserId::parse("b").unwrap()),
        ..everything()
    };
    assert_eq!(pages(&store, 2, one_user).await.len(), 3);
}

pub(crate) async fn pages_are_stable_under_writes(engine: &Engine) {
    let store = engine.open().await;
    let name = |number: u8| format!("user-{number:03}");
    for number in (0..100).step_by(2) {
        store
            .create(revision(&user(&name(number)), number, 1), stamp())
            .await
            .unwrap();
    }
    let writer = Arc::clone(&store);
    let writing = tokio::spawn(async move {
        for number in (1..100).step_by(2) {
            let new = revision(&user(&name(number)), number, 1);
            writer.create(new, stamp()).await.unwrap();
            writer
                .delete(record_id(number), Revision::FIRST, stamp())
                .await
                .unwrap();
        }
    });
    for _ in 0..20 {
        let seen: Vec<_> = pages(&store, 7, everything()).await;
        let unique: BTreeSet<_> = seen.iter().collect();
        assert_eq!(unique.len(), seen.len(), "a record was listed twice");
        for number in (0..100).step_by(2) {
            let wanted = (name(number), "vault".to_owned());
            assert!(unique.contains(&wanted), "{wanted:?} was left out");
        }
    }
    writing.await.unwrap();
}

const ONE: &str = "7d444840-9dc0-11d1-b245-5ffdce74fad2";

pub(crate) async fn a_request_id_is_taken_once(engine: &Engine) {
    let store = engine.open().await;
    let mine = scope("me", ONE);
    let created = store
        .create(revision(&user("a"), 1, 1), stamp_with(mine.clone()))
        .await
        .unwrap();
    let taken = store
        .create(revision(&user("b"), 2, 1), stamp_with(mine.clone()))
        .await;
    assert!(matches!(taken, Err(Error::RequestIdTaken)), "{taken:?}");
    assert!(
        store.record(&user("b")).await.unwrap().is_none(),
        "all or nothing"
    );
    // The first answer stays the answer, whatever happens to the record.
    store
        .supersede(revision(&user("a"), 1, 2), stamp())
        .await
        .unwrap();
    store
        .delete(record_id(1), Revision::new(2).unwrap(), stamp())
        .await
        .unwrap();
    let found = store.request(&mine).await.unwrap().unwrap();
    assert_eq!(
        (found.result, found.content, found.key),
        (created, [5; 32], KEY)
    );
    let theirs = scope("them", ONE);
    assert!(store.request(&theirs).await.unwrap().is_none());
    store
        .create(revision(&user("c"), 3, 1), stamp_with(theirs))
        .await
        .unwrap();
    // Older than a day: neither found nor in the way.
    let mut old = stamp_with(scope("old", ONE));
    old.at = Timestamp::from_micros(Timestamp::now().micros() - 25 * 3_600 * 1_000_000);
    store.create(revision(&user("d"), 4, 1), old).await.unwrap();
    assert!(store.request(&scope("old", ONE)).await.unwrap().is_none());
    store
        .create(revision(&user("e"), 5, 1), stamp_with(scope("old", ONE)))
        .await
        .unwrap();
    let forgotten = store
        .forget_requests(Timestamp::from_micros(Timestamp::now().micros() + 1))
        .await;
    assert_eq!(forgotten.unwrap(), 3);
}

pub(crate) async fn a_failed_change_leaves_no_request_id(engine: &Engine) {
    let store = engine.open().await;
    store
        .create(revision(&user("a"), 1, 1), stamp())
        .await
        .unwrap();
    let mine = scope("me", ONE);
    let failed = store
        .create(revision(&user("a"), 2, 1), stamp_with(mine.clone()))
        .await;
    assert!(matches!(failed, Err(Error::Exists)), "{failed:?}");
    assert!(store.request(&mine).await.unwrap().is_none());
}

pub(crate) async fn committed_changes_are_known_by_their_call(engine: &Engine) {
    let store = engine.open().await;
    let alice = user("alice");
    let stamps: Vec<_> = (0..4).map(|_| stamp()).collect();
    store
        .create(revision(&alice, 1, 1), stamps[0].clone())
        .await
        .unwrap();
    store
        .supersede(revision(&alice, 1, 2), stamps[1].clone())
        .await
        .unwrap();
    let second = Revision::new(2).unwrap();
    store
        .delete(record_id(1), second, stamps[2].clone())
        .await
        .unwrap();
    store
        .undelete(record_id(1), stamps[3].clone())
        .await
        .unwrap();
    for stamp in &stamps {
        assert!(store.committed_by(stamp.call).await.unwrap());
    }
    let failed = stamp();
    assert!(
        store
            .create(revision(&alice, 2, 1), failed.clone())
            .await
            .is_err()
    );
    assert!(!store.committed_by(failed.call).await.unwrap());
    assert!(!store.committed_by(CallId::fresh()).await.unwrap());
}

pub(crate) async fn the_registry_is_compare_and_swap(engine: &Engine) {
    let store = engine.open().await;
    let row = RegistryRow {
        id: KEY,
        fingerprint: Fingerprint([3; 32]),
        objects: ObjectIds::from_slices(&[1, 0, 255], &[7; 255]).unwrap(),
        purpose: Purpose::Plain,
        state: WrappingKeyState::Active,
        token_serial: "0123".to_owned(),
        sequence: 1,
        registered: Timestamp::now(),
        backup_confirmed: None,
        mac: [1; 32],
    };
    store.register(&row).await.unwrap();
    assert!(matches!(store.register(&row).await, Err(Error::Exists)));
    assert_eq!(store.registry().await.unwrap(), std::slice::from_ref(&row));
    let next = RegistryRow {
        state: WrappingKeyState::Compromised,
        backup_confirmed: Some(Timestamp::now()),
        sequence: 2,
        mac: [2; 32],
        ..row.clone()
    };
    store.update_registry(&next, &row.mac).await.unwrap();
    assert_eq!(store.registry().await.unwrap(), std::slice::from_ref(&next));
    let stale = store.update_registry(&row, &row.mac).await;
    assert!(matches!(stale, Err(Error::Conflict)), "{stale:?}");
    assert_eq!(store.registry().await.unwrap(), [next]);
}

/// Rows of the registry change together or not at all, and the call leaves its mark only if they did.
pub(crate) async fn rows_of_the_registry_change_together(engine: &Engine) {
    let store = engine.open().await;
    let row = |number: u8, state, sequence| RegistryRow {
        id: WrappingKeyId::from_bytes([number; 16]),
        fingerprint: Fingerprint([number; 32]),
        objects: ObjectIds::default(),
        purpose: Purpose::Plain,
        state,
        token_serial: "0123".to_owned(),
        sequence,
        registered: Timestamp::from_micros(1),
        backup_confirmed: None,
        mac: [u8::try_from(sequence).unwrap(); 32],
    };
    let old = row(1, WrappingKeyState::Active, 1);
    store.register(&old).await.unwrap();
    let rotation = |from: &RegistryRow, new: u8, sequence| RegistryChange {
        insert: Some(row(new, WrappingKeyState::Active, sequence + 1)),
        updates: vec![RegistryUpdate {
            row: row(1, WrappingKeyState::Deactivated, sequence),
            expected: from.mac,
        }],
        ..RegistryChange::default()
    };
    let at = Timestamp::now();
    let (first, second, third) = (CallId::fresh(), CallId::fresh(), CallId::fresh());
    let change = rotation(&old, 2, 2);
    store.change_registry(&change, first, at).await.unwrap();
    let after = store.registry().await.unwrap();
    assert_eq!(
        after,
        [
            change.updates[0].row.clone(),
            change.insert.clone().unwrap()
        ]
    );
    assert!(store.committed_by(first).await.unwrap());

    // Another broker read the registry before this change.
    let late = store
        .change_registry(&rotation(&old, 3, 4), second, at)
        .await;
    assert!(matches!(late, Err(Error::Conflict)), "{late:?}");
    // The id of the new key is taken.
    let taken = rotation(&after[0], 2, 4);
    let taken = store.change_registry(&taken, third, at).await;
    assert!(matches!(taken, Err(Error::Exists)), "{taken:?}");
    assert_eq!(store.registry().await.unwrap(), after);
    for call in [second, third] {
        assert!(!store.committed_by(call).await.unwrap());
    }
}

/// A scheduled destruction comes and goes with a change of the registry, is held by one instance, and ends once.
pub(crate) async fn destructions_are_scheduled_held_and_ended(engine: &Engine) {
    let store = engine.open().await;
    let scheduled = |due_us, mac| DestructionRow {
        key: KEY,
        signer: WrappingKeyId::from_bytes([9; 16]),
        sequence: 3,
        requested: Timestamp::from_micros(1),
        due: Timestamp::from_micros(due_us),
        requested_by: "URI:admin".to_owned(),
        mac: [mac; 32],
    };
    let at = Timestamp::from_micros;
    let change = async |destruction| {
        let change = RegistryChange {
            destruction: Some(destruction),
            ..RegistryChange::default()
        };
        store
            .change_registry(&change, CallId::fresh(), at(1))
            .await
            .unwrap();
    };
    let (first, second) = (scheduled(10, 1), scheduled(20, 2));
    change(DestructionChange::Schedule(first.clone())).await;
    assert_eq!(
        store.destructions().await.unwrap().rows,
        std::slice::from_ref(&first)
    );
    change(DestructionChange::Schedule(second.clone())).await;
    assert_eq!(
        store.destructions().await.unwrap().rows,
        std::slice::from_ref(&second)
    );

    // The row was replaced.
    let hold = |row: &DestructionRow, holder: &'static str, now, until| {
        let (store, row) = (store.clone(), row.clone());
        async move {
            let held = store.hold_destruction(&row, holder, at(now), at(until));
            held.await.unwrap()
        }
    };
    assert!(!hold(&first, "one", 0, 10).await);
    assert!(hold(&second, "one", 0, 10).await);
    assert!(hold(&second, "one", 5, 15).await);
    assert!(!hold(&second, "two", 14, 24).await);
    assert!(hold(&second, "two", 15, 25).await);
    // A lease of a clock that was wrong.
    assert!(hold(&second, "one", 1, 2).await);
    assert!(!store.end_destruction(&first).await.unwrap());
    assert!(store.end_destruction(&second).await.unwrap());
    assert!(!store.end_destruction(&second).await.unwrap());
    change(DestructionChange::Schedule(first)).await;
    change(DestructionChange::Remove(KEY)).await;
    change(DestructionChange::Remove(KEY)).await;
    assert_eq!(store.destructions().await.unwrap().rows, []);
}

/// A change that is only permitted while no row needs a key is refused as soon as there is such a row.
pub(crate) async fn a_change_of_the_registry_waits_for_the_rows_of_a_key(engine: &Engine) {
    let store = engine.open().await;
    let at = Timestamp::from_micros;
    let unneeded = RegistryChange {
        unneeded: Some(KEY),
        ..RegistryChange::default()
    };
    let call = CallId::fresh();
    store.change_registry(&unneeded, call, at(1)).await.unwrap();
    let new = revision(&address("default", "ada", "vault"), 1, 1);
    let key = new.wrapping_key;
    store.create(new, stamp()).await.unwrap();
    let unneeded = RegistryChange {
        unneeded: Some(key),
        ..RegistryChange::default()
    };
    let call = CallId::fresh();
    let refused = store.change_registry(&unneeded, call, at(1)).await;
    assert!(matches!(refused, Err(Error::Conflict)), "{refused:?}");
    assert!(!store.committed_by(call).await.unwrap());

    // The key is not registered, so the row is counted with those whose key is not known.
    let counted = async || {
        let uses = store.unregistered_uses().await.unwrap();
        (uses.revisions, uses.clients)
    };
    assert_eq!(counted().await, (1, 0));
    let row = RegistryRow {
        id: key,
        fingerprint: Fingerprint([1; 32]),
        objects: ObjectIds::default(),
        purpose: Purpose::Plain,
        state: WrappingKeyState::Active,
        token_serial: "0123".to_owned(),
        sequence: 1,
        registered: at(1),
        backup_confirmed: None,
        mac: [1; 32],
    };
    store.register(&row).await.unwrap();
    assert_eq!(counted().await, (0, 0));
}

fn place(token: &str) -> PlaceRow {
    PlaceRow {
        key: KEY,
        token: token.to_owned(),
        token_serial: "0123".to_owned(),
        objects: ObjectIds::from_slices(&[1, 0, 255], &[7; 255]).unwrap(),
        registered: Timestamp::now(),
        backup_confirmed: None,
        mac: [1; 32],
    }
}

pub(crate) async fn places_are_compare_and_swap(engine: &Engine) {
    let store = engine.open().await;
    assert_eq!(store.places().await.unwrap(), []);
    let (first, second) = (place("a"), place("b"));
    store.add_place(&second).await.unwrap();
    store.add_place(&first).await.unwrap();
    let again = store.add_place(&first).await;
    assert!(matches!(again, Err(Error::Exists)), "{again:?}");
    assert_eq!(
        store.places().await.unwrap(),
        [first.clone(), second.clone()]
    );
    let next = PlaceRow {
        backup_confirmed: Some(Timestamp::now()),
        mac: [2; 32],
        ..first.clone()
    };
    store.update_place(&next, &first.mac).await.unwrap();
    let stale = store.update_place(&first, &first.mac).await;
    assert!(matches!(stale, Err(Error::Conflict)), "{stale:?}");
    assert_eq!(store.places().await.unwrap(), [next, second]);
}

/// The places of a change of the registry are written together with its rows, or not at all.
pub(crate) async fn places_change_with_the_registry(engine: &Engine) {
    let store = engine.open().await;
    let (first, second, third) = (place("a"), place("b"), place("c"));
    store.add_place(&first).await.unwrap();
    store.add_place(&second).await.unwrap();
    let moved = PlaceRow {
        token_serial: "4567".to_owned(),
        mac: [3; 32],
        ..second.clone()
    };
    let replace = |expected| PlaceChange {
        row: moved.clone(),
        expected: Some(expected),
    };
    let add = PlaceChange {
        row: third.clone(),
        expected: None,
    };
    let at = Timestamp::from_micros(1);
    for refused in [
        vec![add.clone(), replace([9; 32])],
        vec![add.clone(), add.clone()],
        vec![
            add.clone(),
            PlaceChange {
                row: first.clone(),
                expected: None,
            },
        ],
    ] {
        let call = CallId::fresh();
        let change = RegistryChange {
            places: refused,
            ..RegistryChange::default()
        };
        let refused = store.change_registry(&change, call, at).await;
        assert!(matches!(refused, Err(Error::Conflict)), "{refused:?}");
        assert!(!store.committed_by(call).await.unwrap());
    }
    let key = RegistryRow {
        id: KEY,
        objects: ObjectIds::default(),
        fingerprint: Fingerprint([1; 32]),
        purpose: Purpose::Plain,
        state: WrappingKeyState::PreActive,
        token_serial: "0123".to_owned(),
        sequence: 1,
        registered: at,
        backup_confirmed: None,
        mac: [9; 32],
    };
    store.register(&key).await.unwrap();
    // A row that is written without a change still counts as a row with the expected MAC.
    let change = RegistryChange {
        updates: vec![RegistryUpdate {
            expected: key.mac,
            row: key.clone(),
        }],
        places: vec![add, replace(second.mac)],
        ..RegistryChange::default()
    };
    let changed = store.change_registry(&change, CallId::fresh(), at).await;
    changed.unwrap();
    assert_eq!(store.places().await.unwrap(), [first, moved, third]);
    assert_eq!(store.registry().await.unwrap(), [key]);
}

/// Counts end at the limit, so that no count reads more rows than that.
pub(crate) async fn keys_and_revisions_are_counted(engine: &Engine) {
    let store = engine.open().await;
    let names = ["a", "b", "c"];
    for (number, name) in (1..).zip(names) {
        let new = revision(&address("default", "ada", name), number, 1);
        store.create(new, stamp()).await.unwrap();
    }
    let deleted = store
        .delete(record_id(2), Revision::FIRST, stamp())
        .await
        .unwrap();
    assert_eq!(deleted.state, RecordState::Deleted);
    for number in 2..=4 {
        let next = revision(&address("default", "ada", "a"), 1, number);
        store.supersede(next, stamp()).await.unwrap();
    }
    let default = Tenant::default();
    let other = Tenant::parse("other").unwrap();
    for (tenant, user, most, expected) in [
        (&default, "ada", 10, 3),
        (&default, "ada", 2, 2),
        (&default, "Ada", 10, 0),
        (&other, "ada", 10, 0),
    ] {
        let user = UserId::parse(user).unwrap();
        assert_eq!(
            store.count_keys(tenant, &user, most).await.unwrap(),
            expected
        );
    }
    for (record, most, expected) in [(1, 10, 4), (1, 3, 3), (2, 10, 1), (9, 10, 0)] {
        let counted = store.count_revisions(record_id(record), most).await;
        assert_eq!(counted.unwrap(), expected);
    }
}
