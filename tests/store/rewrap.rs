//! What a re-wrap needs of the store: rows under a wrapping key, swaps that compare, and the run.

use std::sync::Arc;

use keybroker_core::{
    call::{CallId, RequestId, Timestamp},
    key::{
        Fingerprint, KeyUse, ObjectIds, Purpose, Revision, Tenant, WrappingKeyId, WrappingKeyState,
    },
};
use keybroker_store::{
    ClientMove, ClientRow, Error, KeyUses, RegistryRow, RequestScope, RequestStamp, RevisionMove,
    RevisionPlace, RunId, RunRow, RunState, Stamp, Store,
};
use tokio::task::JoinSet;

use super::{Engine, KEY, clients::client, record_id, revision, scope, stamp, stamp_with, user};

const NEW: WrappingKeyId = WrappingKeyId::from_bytes([10; 16]);
const REQUEST: &str = "01890a5d-ac96-774b-bcce-b302099a8057";

fn number(revision: u64) -> Revision {
    Revision::new(revision).unwrap()
}

fn to_new(record: u8, revision: u64, old: &str) -> RevisionMove {
    RevisionMove {
        record: record_id(record),
        revision: number(revision),
        from: KEY,
        old: old.as_bytes().to_vec(),
        to: NEW,
        new: format!("{old} moved").into_bytes(),
    }
}

/// All rows under a key, read in pages of two.
async fn under(store: &Arc<dyn Store>, key: WrappingKeyId) -> Vec<(u8, u64, Vec<u8>)> {
    let mut found = Vec::new();
    let mut place = RevisionPlace::START;
    loop {
        let page = store.revisions_under(key, &place, 2).await.unwrap();
        let Some(last) = page.last() else {
            return found;
        };
        place = last.place.clone();
        for row in page {
            let row = row.row.unwrap();
            assert_eq!(
                row.address,
                user(&format!("user {}", row.record.as_bytes()[0]))
            );
            let id = row.record.as_bytes()[0];
            found.push((id, row.revision.get(), row.envelope));
        }
    }
}

/// Three records, of which the first has three revisions and the second is deleted.
async fn three(store: &Arc<dyn Store>) {
    for id in [3, 1, 2] {
        let address = user(&format!("user {id}"));
        store
            .create(revision(&address, id, 1), stamp())
            .await
            .unwrap();
    }
    for revision_number in [2, 3] {
        let new = revision(&user("user 1"), 1, revision_number);
        store.supersede(new, stamp()).await.unwrap();
    }
    store
        .delete(record_id(2), number(1), stamp())
        .await
        .unwrap();
}

pub(crate) async fn rows_under_a_key_are_paged_and_counted(engine: &Engine) {
    let store = engine.open().await;
    assert_eq!(store.key_uses(KEY).await.unwrap(), KeyUses::default());
    assert!(under(&store, KEY).await.is_empty());
    three(&store).await;
    let of = |id: u8, revision: u64| (id, revision, format!("user {id} {revision}").into_bytes());
    let all = [of(1, 1), of(1, 2), of(1, 3), of(2, 1), of(3, 1)];
    assert_eq!(under(&store, KEY).await, all);
    assert!(under(&store, NEW).await.is_empty());
    store
        .insert_client(&client(1, 1), CallId::fresh())
        .await
        .unwrap();
    let other = ClientRow {
        key: NEW,
        ..client(2, 1)
    };
    store.insert_client(&other, CallId::fresh()).await.unwrap();
    store
        .create(
            revision(&user("user 4"), 4, 1),
            stamp_with(scope("me", REQUEST)),
        )
        .await
        .unwrap();
    // An answer that has expired needs no key any more.
    let mut old = stamp_with(scope("them", REQUEST));
    old.at = Timestamp::from_micros(Timestamp::now().micros() - 25 * 3_600 * 1_000_000);
    store
        .create(revision(&user("user 5"), 5, 1), old)
        .await
        .unwrap();
    let uses = store.key_uses(KEY).await.unwrap();
    assert_eq!(
        uses,
        KeyUses {
            revisions: 7,
            clients: 1,
            requests: 1,
            ..KeyUses::default()
        }
    );
    assert_eq!(uses.total(), 9);
    let uses = store.key_uses(NEW).await.unwrap();
    assert_eq!((uses.revisions, uses.clients, uses.requests), (0, 1, 0));
}

pub(crate) async fn a_swap_changes_the_envelope_and_nothing_else(engine: &Engine) {
    let store = engine.open().await;
    three(&store).await;
    let before = store.record(&user("user 1")).await.unwrap().unwrap();
    let moves = vec![
        to_new(1, 2, "user 1 2"),
        to_new(1, 3, "user 1 3"),
        to_new(2, 1, "user 2 1"),
    ];
    assert_eq!(
        store
            .move_revisions(moves.clone(), KeyUse::RewrapFrom, CallId::fresh())
            .await
            .unwrap(),
        [true; 3]
    );
    // A second time, nothing is as it was read.
    assert_eq!(
        store
            .move_revisions(moves, KeyUse::RewrapFrom, CallId::fresh())
            .await
            .unwrap(),
        [false; 3]
    );
    let record = store.record(&user("user 1")).await.unwrap().unwrap();
    assert_eq!(record.envelope, b"user 1 3 moved");
    assert_eq!(record.info.wrapping_key, NEW);
    let mut expected = before.info.clone();
    expected.wrapping_key = NEW;
    assert_eq!(record.info, expected);
    let superseded = store
        .revision(record_id(1), number(2))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        (superseded.envelope, superseded.wrapping_key),
        (b"user 1 2 moved".to_vec(), NEW)
    );
    let left: Vec<_> = under(&store, KEY)
        .await
        .into_iter()
        .map(|(id, revision, _)| (id, revision))
        .collect();
    assert_eq!(left, [(1, 1), (3, 1)]);
}

pub(crate) async fn a_row_that_is_not_as_it_was_read_is_not_swapped(engine: &Engine) {
    let store = engine.open().await;
    three(&store).await;
    // Another envelope, another key, another revision, another record: nothing is swapped.
    let good = to_new(1, 1, "user 1 1");
    let wrong = vec![
        to_new(1, 1, "user 1 2"),
        RevisionMove {
            from: NEW,
            ..good.clone()
        },
        RevisionMove {
            revision: number(4),
            ..good.clone()
        },
        RevisionMove {
            record: record_id(9),
            ..good.clone()
        },
    ];
    assert_eq!(
        store
            .move_revisions(wrong, KeyUse::RewrapFrom, CallId::fresh())
            .await
            .unwrap(),
        [false; 4]
    );
    assert_eq!(
        store
            .move_revisions(vec![good], KeyUse::RewrapFrom, CallId::fresh())
            .await
            .unwrap(),
        [true]
    );
    assert!(
        store
            .move_revisions(Vec::new(), KeyUse::RewrapFrom, CallId::fresh())
            .await
            .unwrap()
            .is_empty()
    );
}

/// The state of a key that was changed after the rows were read ends the swap, before any row.
pub(crate) async fn no_row_is_swapped_against_the_state_of_a_key(engine: &Engine) {
    let store = engine.open().await;
    three(&store).await;
    let row = |id, state, mac| RegistryRow {
        id,
        fingerprint: Fingerprint([1; 32]),
        objects: ObjectIds::default(),
        purpose: Purpose::Plain,
        state,
        token_serial: "0123".to_owned(),
        sequence: 1,
        registered: Timestamp::from_micros(1),
        backup_confirmed: None,
        mac: [mac; 32],
    };
    let mut rows = [
        row(KEY, WrappingKeyState::Deactivated, 1),
        row(NEW, WrappingKeyState::Active, 2),
    ];
    for row in &rows {
        store.register(row).await.unwrap();
    }
    for (number, state) in [
        (1, WrappingKeyState::Suspended),
        (0, WrappingKeyState::Compromised),
        (1, WrappingKeyState::Compromised),
        (1, WrappingKeyState::Deactivated),
        (0, WrappingKeyState::Suspended),
    ] {
        let before = rows[number].clone();
        rows[number].state = state;
        let changed = store.update_registry(&rows[number], &before.mac).await;
        changed.unwrap();
        let call = CallId::fresh();
        let refused = store
            .move_revisions(vec![to_new(1, 1, "user 1 1")], KeyUse::RewrapFrom, call)
            .await;
        assert!(matches!(refused, Err(Error::State)), "{state}: {refused:?}");
        assert!(!store.committed_by(call).await.unwrap());
        store.update_registry(&before, &before.mac).await.unwrap();
        rows[number] = before;
    }
    // Listed rows are moved from a compromised key, but not to one, and not from a suspended one.
    for (number, state, is_moved) in [
        (0, WrappingKeyState::Suspended, false),
        (1, WrappingKeyState::Compromised, false),
        (0, WrappingKeyState::Compromised, true),
    ] {
        let before = rows[number].clone();
        rows[number].state = state;
        let changed = store.update_registry(&rows[number], &before.mac).await;
        changed.unwrap();
        let one = vec![to_new(3, 1, "user 3 1")];
        let listed = store.move_revisions(one, KeyUse::RewrapListed, CallId::fresh());
        assert_eq!(listed.await.is_ok(), is_moved, "{state}");
        store.update_registry(&before, &before.mac).await.unwrap();
        rows[number] = before;
    }
    assert_eq!(under(&store, NEW).await.len(), 1);
    let moved = store.move_revisions(
        vec![to_new(1, 1, "user 1 1")],
        KeyUse::RewrapFrom,
        CallId::fresh(),
    );
    assert_eq!(moved.await.unwrap(), [true]);
}

pub(crate) async fn of_concurrent_swaps_one_wins(engine: &Engine) {
    let store = engine.open().await;
    three(&store).await;
    let mut tasks = JoinSet::new();
    for attempt in 0..50 {
        let store = Arc::clone(&store);
        tasks.spawn(async move {
            let moves =
                [(1, 1), (1, 2), (1, 3), (2, 1), (3, 1)].map(|(id, revision)| RevisionMove {
                    new: format!("{attempt}").into_bytes(),
                    ..to_new(id, revision, &format!("user {id} {revision}"))
                });
            store
                .move_revisions(moves.into(), KeyUse::RewrapFrom, CallId::fresh())
                .await
                .unwrap()
        });
    }
    let swapped = tasks.join_all().await.concat();
    assert_eq!(swapped.into_iter().filter(|done| *done).count(), 5);
}

/// A replace adds a revision, a delete changes the record: both succeed whether the swap comes before or after them.
pub(crate) async fn a_swap_is_not_in_the_way_of_changes(engine: &Engine) {
    let store = engine.open().await;
    for id in 1..=40 {
        let address = user(&format!("user {id}"));
        store
            .create(revision(&address, id, 1), stamp())
            .await
            .unwrap();
    }
    let mut tasks = JoinSet::new();
    for id in 1..=40 {
        let (moving, changing) = (Arc::clone(&store), Arc::clone(&store));
        let old = format!("user {id} 1");
        tasks.spawn(async move {
            let moved = moving
                .move_revisions(
                    vec![to_new(id, 1, &old)],
                    KeyUse::RewrapFrom,
                    CallId::fresh(),
                )
                .await
                .unwrap();
            assert_eq!(moved, [true]);
        });
        tasks.spawn(async move {
            if id % 2 == 0 {
                let new = revision(&user(&format!("user {id}")), id, 2);
                changing.supersede(new, stamp()).await.unwrap();
            } else {
                changing
                    .delete(record_id(id), number(1), stamp())
                    .await
                    .unwrap();
            }
        });
    }
    tasks.join_all().await;
    for id in 1..=40 {
        let first = store
            .revision(record_id(id), number(1))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(first.wrapping_key, NEW);
    }
    let left = under(&store, KEY).await;
    assert_eq!(left.len(), 20, "the new revisions of the replaced records");
    // A purge between the reading and the swap leaves nothing to swap.
    let gone = store
        .move_revisions(
            vec![to_new(41, 1, "user 41 1")],
            KeyUse::RewrapFrom,
            CallId::fresh(),
        )
        .await
        .unwrap();
    assert_eq!(gone, [false]);
}

/// The result of a change is computed and authenticated before the change. A swap in between does not make the change fail.
pub(crate) async fn a_request_id_is_kept_although_its_record_was_moved(engine: &Engine) {
    let store = engine.open().await;
    let created = store
        .create(revision(&user("user 1"), 1, 1), stamp())
        .await
        .unwrap();
    let at = Timestamp::now();
    let mut expected = created.clone();
    expected.state = keybroker_store::RecordState::Deleted;
    expected.updated = at;
    expected.deleted = Some(at);
    let moved = store
        .move_revisions(
            vec![to_new(1, 1, "user 1 1")],
            KeyUse::RewrapFrom,
            CallId::fresh(),
        )
        .await
        .unwrap();
    assert_eq!(moved, [true]);
    let scope = RequestScope {
        tenant: Tenant::default(),
        principal: "me".to_owned(),
        id: RequestId::parse(REQUEST).unwrap().unwrap(),
    };
    let with = |expected: keybroker_store::RecordInfo| Stamp {
        call: CallId::fresh(),
        at,
        request: Some(RequestStamp {
            scope: scope.clone(),
            content: [5; 32],
            key: KEY,
            result: Some((expected, [6; 32])),
        }),
    };
    let mut another = expected.clone();
    another.updated = created.created;
    another.deleted = None;
    let refused = store.delete(record_id(1), number(1), with(another)).await;
    assert!(matches!(refused, Err(Error::Conflict)), "{refused:?}");
    store
        .delete(record_id(1), number(1), with(expected.clone()))
        .await
        .unwrap();
    let kept = store.request(&scope).await.unwrap().unwrap();
    assert_eq!((kept.result, kept.result_mac), (expected, Some([6; 32])));
}

pub(crate) async fn the_mac_of_a_client_is_compared_and_swapped(engine: &Engine) {
    let store = engine.open().await;
    let row = client(1, 1);
    store.insert_client(&row, CallId::fresh()).await.unwrap();
    let swap = ClientMove {
        id: row.id,
        revision: 1,
        from: KEY,
        old: row.mac,
        to: NEW,
        new: [77; 32],
    };
    let wrong = vec![
        ClientMove {
            revision: 2,
            ..swap.clone()
        },
        ClientMove {
            from: NEW,
            ..swap.clone()
        },
        ClientMove {
            old: [78; 32],
            ..swap.clone()
        },
    ];
    assert_eq!(
        store.move_clients(wrong, CallId::fresh()).await.unwrap(),
        [false; 3]
    );
    let both = vec![swap.clone(), swap];
    assert_eq!(
        store.move_clients(both, CallId::fresh()).await.unwrap(),
        [true, false]
    );
    let moved = store.client(row.id).await.unwrap().unwrap();
    let expected = ClientRow {
        key: NEW,
        mac: [77; 32],
        ..row
    };
    assert_eq!(moved, expected);
    // The next change of the client is not in the way.
    store.update_client(&client(1, 2), None).await.unwrap();
}

/// A row without its record, and a row whose address does not decode, do not end a page.
pub(crate) async fn damaged_rows_under_a_key_do_not_end_a_page(engine: &Engine) {
    let store = engine.open().await;
    three(&store).await;
    engine.sql(
        "UPDATE records SET key_name = 'NOT A NAME' WHERE key_name = 'vault' AND revision = 3",
    );
    let page = store
        .revisions_under(KEY, &RevisionPlace::START, 100)
        .await
        .unwrap();
    assert_eq!(page.len(), 5);
    let damaged: Vec<_> = page
        .iter()
        .filter(|row| row.row.is_err())
        .map(|row| (row.place.record(), row.place.revision()))
        .collect();
    let first = [1, 2, 3].map(|revision| (Some(record_id(1)), Some(number(revision))));
    assert_eq!(damaged, first);
}

fn run(id: u8) -> RunRow {
    RunRow {
        id: RunId::from_bytes([id; 16]),
        state: RunState::Running,
        rate: 250,
        source: Some(KEY),
        document: b"{}".to_vec(),
        holder: String::new(),
        lease: Timestamp::from_micros(0),
        started: Timestamp::now(),
    }
}

pub(crate) async fn a_run_has_one_holder_and_one_successor(engine: &Engine) {
    let store = engine.open().await;
    assert_eq!(store.rewrap_run().await.unwrap(), None);
    let call = CallId::fresh();
    let first = run(1);
    store.start_rewrap(&first, call).await.unwrap();
    assert!(store.committed_by(call).await.unwrap());
    assert_eq!(store.rewrap_run().await.unwrap(), Some(first.clone()));
    let (refused, second) = (
        CallId::fresh(),
        RunRow {
            source: None,
            rate: 0,
            ..run(2)
        },
    );
    let result = store.start_rewrap(&second, refused).await;
    assert!(matches!(result, Err(Error::Conflict)), "{result:?}");
    assert!(!store.committed_by(refused).await.unwrap());

    let at = |seconds: i64| Timestamp::from_micros(seconds * 1_000_000);
    let hold =
        |holder: &'static str, now, until| store.hold_rewrap(first.id, holder, at(now), at(until));
    assert!(hold("a", 100, 110).await.unwrap());
    assert!(!hold("b", 105, 115).await.unwrap());
    assert!(hold("a", 105, 115).await.unwrap());
    assert!(hold("b", 115, 125).await.unwrap());
    // The clock of the holder was wrong and is put back.
    assert!(hold("b", 9_000, 9_010).await.unwrap());
    assert!(hold("a", 130, 140).await.unwrap());
    assert!(
        !store
            .hold_rewrap(second.id, "a", at(131), at(141))
            .await
            .unwrap()
    );

    assert!(
        store
            .note_rewrap(first.id, "a", b"{\"moved\":1}", false)
            .await
            .unwrap()
    );
    assert!(
        !store
            .note_rewrap(first.id, "b", b"{\"moved\":2}", false)
            .await
            .unwrap()
    );
}

pub(crate) async fn a_run_is_paused_and_ended_by_its_holder(engine: &Engine) {
    let store = engine.open().await;
    let (first, second) = (run(1), run(2));
    store.start_rewrap(&first, CallId::fresh()).await.unwrap();
    let at = |seconds: i64| Timestamp::from_micros(seconds * 1_000_000);
    let hold = || store.hold_rewrap(first.id, "a", at(100), at(110));
    assert!(hold().await.unwrap());
    let noted = store.note_rewrap(first.id, "a", b"{\"moved\":1}", false);
    assert!(noted.await.unwrap());
    let change = |from, to, rate| store.change_rewrap(first.id, from, to, rate, CallId::fresh());
    change(RunState::Running, RunState::Paused, None)
        .await
        .unwrap();
    let twice = change(RunState::Running, RunState::Paused, None).await;
    assert!(matches!(twice, Err(Error::Conflict)), "{twice:?}");
    assert!(!hold().await.unwrap(), "a paused run has no holder");
    change(RunState::Paused, RunState::Running, Some(9))
        .await
        .unwrap();
    let row = store.rewrap_run().await.unwrap().unwrap();
    assert_eq!(
        (row.state, row.rate, row.document.as_slice()),
        (RunState::Running, 9, &b"{\"moved\":1}"[..])
    );

    assert!(
        store
            .note_rewrap(first.id, "a", b"{\"moved\":3}", true)
            .await
            .unwrap()
    );
    assert_eq!(
        store.rewrap_run().await.unwrap().unwrap().state,
        RunState::Done
    );
    store.start_rewrap(&second, CallId::fresh()).await.unwrap();
    assert_eq!(store.rewrap_run().await.unwrap(), Some(second));
}

pub(crate) async fn of_concurrent_starts_of_a_run_one_wins(engine: &Engine) {
    let store = engine.open().await;
    let mut tasks = JoinSet::new();
    for id in 0..20 {
        let store = Arc::clone(&store);
        tasks.spawn(async move { store.start_rewrap(&run(id), CallId::fresh()).await });
    }
    let results = tasks.join_all().await;
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
    let lost = |result: &&Result<(), Error>| matches!(result, Err(Error::Conflict));
    assert_eq!(results.iter().filter(lost).count(), 19);
}
