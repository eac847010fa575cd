//! Devices and requests for access: changed by compare-and-swap, all of one change or none of it.

use std::{cmp::Reverse, sync::Arc};

use keybroker_core::{
    call::{CallId, Timestamp},
    device::{AccessApprover, AccessState, DeviceState},
    key::{AccessRequestId, DeviceId, KeyName, Revision, Tenant, UserId, WrappingKeyId},
    principal::{NAME_BYTES_MAX, Reach},
};
use keybroker_store::{
    AccessCounts, AccessDecision, AccessQuery, AccessRow, Answer, AskingDevice, Changed,
    DeviceAddress, DeviceChange, DeviceMove, DeviceRow, Error, PendingOnly, Replacement,
    SealedKeys, Store,
};
use tokio::task::JoinSet;

use super::{Engine, KEY, record_id, revision, stamp, user};

const FAR: i64 = 1 << 60;

fn at(micros: i64) -> Timestamp {
    Timestamp::from_micros(micros)
}

fn place(member: &str, device: u8) -> DeviceAddress {
    DeviceAddress {
        tenant: Tenant::default(),
        user: UserId::parse(member).unwrap(),
        device: DeviceId::from_bytes([device; 16]),
    }
}

/// A trusted device, in which all fields of a type have different values.
pub(crate) fn device(member: &str, number: u8) -> DeviceRow {
    DeviceRow {
        address: place(member, number),
        signer: KEY,
        state: DeviceState::Trusted,
        name: format!("device {number}"),
        kind: "laptop".to_owned(),
        verification_key: vec![number; 32],
        key_name: KeyName::parse("vault").unwrap(),
        revision: Revision::FIRST,
        keys: SealedKeys {
            user_key: vec![1; 256],
            public_key: vec![2; 400],
            private_key: vec![3; 1_700],
        },
        trusted: at(10),
        changed: at(11),
        signed: at(12),
        lost: None,
        used: None,
        mac: [number; 32],
    }
}

/// A pending request with this number as its id and its time.
pub(crate) fn access(member: &str, number: u8) -> AccessRow {
    AccessRow {
        id: AccessRequestId::from_bytes([number; 16]),
        signer: KEY,
        state: AccessState::Pending,
        approver: AccessApprover::Device,
        device: AskingDevice {
            address: place(member, 77),
            name: "new".to_owned(),
            kind: "phone".to_owned(),
            verification_key: vec![4; 65],
        },
        key_name: KeyName::parse("vault").unwrap(),
        public_key: vec![5; 294],
        code: [6; 32],
        code_key: KEY,
        requested_by: format!("token:home:{member}"),
        peer: "192.0.2.1:5000".to_owned(),
        requested: at(number.into()),
        expires: at(FAR),
        tries: 0,
        first_approved_by: None,
        decision: None,
        answer: None,
        fetched: None,
        closed: None,
        answer_revision: None,
        wrong_words: 0,
        mac: [number; 32],
    }
}

pub(crate) fn added<R>(row: R) -> Changed<R> {
    Changed {
        row,
        expected: None,
    }
}

fn devices(rows: Vec<Changed<DeviceRow>>) -> DeviceChange {
    DeviceChange {
        devices: rows,
        ..DeviceChange::default()
    }
}

fn request(row: Changed<AccessRow>) -> DeviceChange {
    DeviceChange {
        request: Some(row),
        ..DeviceChange::default()
    }
}

pub(crate) async fn make(store: &dyn Store, change: &DeviceChange) -> Result<(), Error> {
    let call = CallId::fresh();
    let made = store.change_devices(change, call, at(50)).await.map(drop);
    assert_eq!(store.committed_by(call).await.unwrap(), made.is_ok());
    made
}

#[expect(clippy::too_many_lines, reason = "one story of a row")]
pub(crate) async fn devices_are_compare_and_swap(engine: &Engine) {
    let store = engine.open().await;
    let longest = DeviceRow {
        address: DeviceAddress {
            tenant: Tenant::parse(&"t".repeat(64)).unwrap(),
            user: UserId::parse(&"\u{fc}".repeat(127)).unwrap(),
            device: DeviceId::from_bytes([0xff; 16]),
        },
        name: "\u{e4}".repeat(64),
        kind: "x".repeat(64),
        verification_key: vec![4; 65],
        key_name: KeyName::parse(&"k".repeat(64)).unwrap(),
        keys: SealedKeys {
            user_key: vec![0xff; 1_024],
            public_key: vec![0xff; 2_048],
            private_key: vec![0xff; 8_192],
        },
        lost: Some(at(13)),
        used: Some(at(14)),
        ..device("ada", 1)
    };
    for row in [
        &longest,
        &device("ada", 2),
        &device("ada", 1),
        &device("bob", 1),
    ] {
        make(&*store, &devices(vec![added(row.clone())]))
            .await
            .unwrap();
        assert_eq!(
            store.device(&row.address).await.unwrap().as_ref(),
            Some(row)
        );
    }
    let taken = make(&*store, &devices(vec![added(device("ada", 1))])).await;
    assert!(matches!(taken, Err(Error::Exists)), "{taken:?}");
    let ada = UserId::parse("ada").unwrap();
    let listed = store.devices(&Tenant::default(), &ada).await.unwrap();
    let listed: Vec<_> = listed.into_iter().map(Result::unwrap).collect();
    assert_eq!(listed, [device("ada", 1), device("ada", 2)]);

    // All rows of a change, or none.
    let renamed = Changed {
        row: DeviceRow {
            name: "renamed".to_owned(),
            mac: [9; 32],
            ..device("ada", 1)
        },
        expected: Some([1; 32]),
    };
    let stale = Changed {
        row: device("ada", 2),
        expected: Some([7; 32]),
    };
    let refused = make(&*store, &devices(vec![renamed.clone(), stale])).await;
    assert!(matches!(refused, Err(Error::Conflict)), "{refused:?}");
    assert_eq!(
        store.device(&place("ada", 1)).await.unwrap(),
        Some(device("ada", 1))
    );
    make(&*store, &devices(vec![renamed.clone()]))
        .await
        .unwrap();
    assert_eq!(
        store.device(&place("ada", 1)).await.unwrap(),
        Some(renamed.row)
    );

    // A time of use is kept if it is later, and needs no MAC.
    for (time, expected) in [(100, 100), (90, 100), (110, 110)] {
        store
            .note_device_use(&place("bob", 1), at(time))
            .await
            .unwrap();
        let row = store.device(&place("bob", 1)).await.unwrap().unwrap();
        assert_eq!((row.used, row.mac), (Some(at(expected)), [1; 32]));
    }
    devices_are_paged_counted_and_forgotten(&*store).await;
}

/// The store has four devices.
async fn devices_are_paged_counted_and_forgotten(store: &dyn Store) {
    let mut after = None;
    let mut places = Vec::new();
    loop {
        let page = store.devices_after(after.as_ref(), 3).await.unwrap();
        let Some((last, _)) = page.last() else {
            break;
        };
        after = Some(last.clone());
        places.extend(page.into_iter().map(|(address, row)| {
            assert_eq!(row.unwrap().address, address);
            address
        }));
    }
    assert_eq!(places.len(), 4);
    assert!(places.is_sorted());
    let uses = store.key_uses(KEY).await.unwrap();
    assert_eq!((uses.devices, uses.total()), (4, 4));
    assert_eq!(store.unregistered_uses().await.unwrap().devices, 4);
    let ended = Changed {
        row: DeviceRow {
            state: DeviceState::Lost,
            keys: SealedKeys::default(),
            changed: at(200),
            mac: [8; 32],
            ..device("bob", 1)
        },
        expected: Some([1; 32]),
    };
    make(store, &devices(vec![ended])).await.unwrap();
    for (before, expected) in [(200, 0), (201, 1)] {
        assert_eq!(store.old_devices(at(before)).await.unwrap(), expected);
        assert_eq!(store.forget_devices(at(before)).await.unwrap(), expected);
    }
    assert_eq!(store.device(&place("bob", 1)).await.unwrap(), None);
}

pub(crate) async fn a_change_of_devices_needs_the_revision_and_the_trusted_devices(
    engine: &Engine,
) {
    let store = engine.open().await;
    let ada = user("ada");
    let record = store.create(revision(&ada, 1, 1), stamp()).await.unwrap();
    let with = |number: u8, known: Vec<(DeviceId, [u8; 32])>| DeviceChange {
        requires: Some((record.id, record.revision)),
        trusted: Some((Tenant::default(), ada.user.clone(), known)),
        ..devices(vec![added(device("ada", number))])
    };
    make(&*store, &with(1, Vec::new())).await.unwrap();
    // Another trusted device was established meanwhile, or a row was changed.
    let one = DeviceId::from_bytes([1; 16]);
    for known in [Vec::new(), vec![(one, [2; 32])]] {
        let refused = make(&*store, &with(2, known)).await;
        assert!(matches!(refused, Err(Error::Conflict)), "{refused:?}");
    }
    make(&*store, &with(2, vec![(one, [1; 32])])).await.unwrap();

    // A rotation replaces the user key and all devices, or nothing.
    let next = |number: u8| Changed {
        row: DeviceRow {
            revision: Revision::FIRST.next(),
            mac: [number + 100; 32],
            ..device("ada", number)
        },
        expected: Some([number; 32]),
    };
    let rotate = |rows: Vec<Changed<DeviceRow>>| {
        let stamp = stamp();
        let call = stamp.call;
        let change = DeviceChange {
            replaces: Some(Replacement {
                new: revision(&user("ada"), 1, 2),
                stamp,
            }),
            ..devices(rows)
        };
        (change, call)
    };
    let wrong = Changed {
        expected: Some([7; 32]),
        ..next(2)
    };
    let (change, call) = rotate(vec![next(1), wrong]);
    let refused = store.change_devices(&change, call, at(60)).await;
    assert!(matches!(refused, Err(Error::Conflict)), "{refused:?}");
    assert!(!store.committed_by(call).await.unwrap());
    let current = store.record(&ada).await.unwrap().unwrap();
    assert_eq!(current.info.revision, Revision::FIRST);
    let (change, call) = rotate(vec![next(1), next(2)]);
    let rotated = store.change_devices(&change, call, at(60)).await.unwrap();
    assert_eq!(rotated.unwrap().revision, Revision::FIRST.next());
    assert!(store.committed_by(call).await.unwrap());
    // The revision that a new trust requires is no longer current.
    let known = vec![(one, [101; 32]), (DeviceId::from_bytes([2; 16]), [102; 32])];
    let late = make(&*store, &with(3, known)).await;
    assert!(matches!(late, Err(Error::Revision { .. })), "{late:?}");

    // The devices of a purged record are removed with it.
    let second = Revision::FIRST.next();
    store.delete(record_id(1), second, stamp()).await.unwrap();
    let tables = engine.tables().await;
    let purged = tables
        .purge_records(&[record_id(1)], at(FAR))
        .await
        .unwrap();
    assert_eq!(purged, [record_id(1)]);
    assert!(store.devices_after(None, 10).await.unwrap().is_empty());
}

pub(crate) async fn of_concurrent_decisions_about_access_one_wins(engine: &Engine) {
    let store = engine.open().await;
    let longest = AccessRow {
        requested_by: "x".repeat(NAME_BYTES_MAX),
        first_approved_by: Some("y".repeat(NAME_BYTES_MAX)),
        peer: "p".repeat(64),
        public_key: vec![0xff; 1_024],
        decision: Some(AccessDecision {
            by: "z".repeat(NAME_BYTES_MAX),
            device: Some(DeviceId::from_bytes([3; 16])),
            at: at(20),
        }),
        answer: Some(Answer {
            bytes: vec![0xff; 1_024],
            form: "f".repeat(32),
        }),
        tries: 4,
        fetched: Some(at(21)),
        closed: Some(at(22)),
        answer_revision: Some(Revision::FIRST),
        wrong_words: 3,
        state: AccessState::Consumed,
        ..access("ada", 1)
    };
    for row in [&longest, &access("ada", 2), &access("ada", 3)] {
        make(&*store, &request(added(row.clone()))).await.unwrap();
        assert_eq!(
            store.access_request(row.id).await.unwrap().as_ref(),
            Some(row)
        );
    }
    let twice = make(&*store, &request(added(access("ada", 2)))).await;
    assert!(matches!(twice, Err(Error::Exists)), "{twice:?}");

    let mut decisions = JoinSet::new();
    for number in 0..8_u8 {
        let store = engine.open().await;
        let states = [AccessState::Approved, AccessState::Denied];
        let decided = request(Changed {
            row: AccessRow {
                state: states[usize::from(number % 2)],
                mac: [100 + number; 32],
                ..access("ada", 2)
            },
            expected: Some([2; 32]),
        });
        decisions.spawn(async move {
            let made = store
                .change_devices(&decided, CallId::fresh(), at(30))
                .await;
            store.close().await;
            made.is_ok()
        });
    }
    let won = decisions.join_all().await;
    assert_eq!(won.iter().filter(|won| **won).count(), 1, "{won:?}");
    requests_are_listed_counted_and_forgotten(&*store).await;
    recent_requests_and_approvals_are_counted(&*store).await;
}

/// The store has requests of Ada from the times 1, 2 and 3.
async fn recent_requests_and_approvals_are_counted(store: &dyn Store) {
    let tenant = Tenant::default();
    for (user, after, expected) in [("ada", 0, 3), ("ada", 2, 1), ("ada", 3, 0), ("bob", 0, 0)] {
        let user = UserId::parse(user).unwrap();
        let count = store
            .recent_access_requests(&tenant, &user, at(after))
            .await;
        assert_eq!(count.unwrap(), expected, "{user} {after}");
    }
    let decided = |number: u8, state, by: &str, device| AccessRow {
        state,
        decision: Some(AccessDecision {
            by: by.to_owned(),
            device,
            at: at(40),
        }),
        ..access("dora", number)
    };
    let own = Some(DeviceId::from_bytes([9; 16]));
    let rows = [
        decided(50, AccessState::Approved, "carol", None),
        decided(51, AccessState::Consumed, "carol", None),
        decided(52, AccessState::Revoked, "dave", None),
        // None of these is an approval of Carol.
        decided(53, AccessState::Denied, "carol", None),
        decided(54, AccessState::Approved, "carol", own),
        AccessRow {
            first_approved_by: Some("carol".to_owned()),
            ..access("dora", 55)
        },
    ];
    for row in rows {
        make(store, &request(added(row))).await.unwrap();
    }
    let elsewhere = Tenant::parse("elsewhere").unwrap();
    // The request of which Carol is the first approver was made at the time 55.
    for (tenant, by, after, expected) in [
        (&tenant, "carol", 39, 3),
        (&tenant, "carol", 40, 1),
        (&tenant, "carol", 55, 0),
        (&tenant, "dave", 39, 1),
        (&tenant, "Dave", 39, 0),
        (&elsewhere, "carol", 0, 0),
    ] {
        let count = store.recent_approvals(tenant, by, at(after)).await;
        assert_eq!(count.unwrap(), expected, "{tenant} {by} {after}");
    }
}

fn query(users: Reach<UserId>, pending: Option<PendingOnly>) -> AccessQuery {
    AccessQuery {
        tenant: Tenant::default(),
        users,
        pending,
        after: None,
        limit: 200,
    }
}

async fn listed_ids(store: &dyn Store, wanted: &AccessQuery) -> Vec<u8> {
    let rows = store.access_requests(wanted).await.unwrap();
    let ids = rows.into_iter().map(|((requested, id), row)| {
        let row = row.unwrap();
        assert_eq!((row.requested, row.id), (requested, id));
        id.as_bytes()[0]
    });
    ids.collect()
}

/// Requests of one member never hide those of another: the filter comes before the limit, and the pages are complete.
pub(crate) async fn pages_of_requests_are_filtered_and_complete(engine: &Engine) {
    let store = engine.open().await;
    for number in 1..=120 {
        let of_a_moment = AccessRow {
            // Several requests of one moment.
            requested: at((number / 3).into()),
            ..access(["ada", "bob", "eve"][usize::from(number % 3)], number)
        };
        make(&*store, &request(added(of_a_moment))).await.unwrap();
    }
    let all: Vec<UserId> = (0..60)
        .map(|number| UserId::parse(&format!("user-{number}")).unwrap())
        .collect();
    // More users than one statement names.
    let many = |user: &str| {
        let others = all.iter().cloned();
        Reach::Only(others.chain([UserId::parse(user).unwrap()]).collect())
    };
    for (users, expected) in [(Reach::All, 120), (many("bob"), 40), (many("nobody"), 0)] {
        let mut wanted = AccessQuery {
            limit: 7,
            ..query(users, None)
        };
        let mut found = Vec::new();
        loop {
            let page = store.access_requests(&wanted).await.unwrap();
            let Some((last, _)) = page.last() else {
                break;
            };
            wanted.after = Some(*last);
            found.extend(page.into_iter().map(|(place, _)| place));
        }
        assert_eq!(found.len(), expected);
        assert!(found.is_sorted_by_key(|&(requested, id)| (Reverse(requested), id)));
    }
    assert!(
        listed_ids(&*store, &query(Reach::Only([].into()), None))
            .await
            .is_empty()
    );

    // Decisions have the order of their times, and not that of the requests.
    for (user, number, decided) in [
        ("ada", 130, 500),
        ("bob", 131, 700),
        ("ada", 132, 600),
        ("bob", 133, 650),
    ] {
        let row = AccessRow {
            state: AccessState::Denied,
            decision: Some(AccessDecision {
                by: "carol".to_owned(),
                device: None,
                at: at(decided),
            }),
            ..access(user, number)
        };
        make(&*store, &request(added(row))).await.unwrap();
    }
    for (users, limit, expected) in [
        (Reach::All, 10, &[131, 133, 132, 130][..]),
        (Reach::All, 2, &[131, 133]),
        (many("ada"), 10, &[132, 130]),
        (many("nobody"), 10, &[]),
    ] {
        let tenant = Tenant::default();
        let found = store.access_decisions(&tenant, &users, limit).await;
        let found = found.unwrap().into_iter();
        let ids: Vec<u8> = found.map(|row| row.unwrap().id.as_bytes()[0]).collect();
        assert_eq!(ids, expected, "{users:?}");
    }
}

/// The limit on the requests of a member holds for requests at the same moment, and a device has one pending request.
pub(crate) async fn a_limit_on_requests_holds_at_one_moment(engine: &Engine) {
    let store = engine.open().await;
    store
        .create(revision(&user("ada"), 1, 1), stamp())
        .await
        .unwrap();
    let asks = |number: u8, device: u8| DeviceChange {
        fewer_than: Some(AccessCounts {
            pending: 3,
            unexpired: 50,
        }),
        ..request(added(AccessRow {
            device: AskingDevice {
                address: place("ada", device),
                ..access("ada", number).device
            },
            ..access("ada", number)
        }))
    };
    let mut tasks = JoinSet::new();
    for number in 1..=8 {
        let (store, change) = (engine.open().await, asks(number, number));
        tasks.spawn(async move {
            let made = store.change_devices(&change, CallId::fresh(), at(50)).await;
            store.close().await;
            made.is_ok()
        });
    }
    let made = tasks.join_all().await;
    assert_eq!(made.iter().filter(|made| **made).count(), 3, "{made:?}");
    let pending = listed_ids(&*store, &query(Reach::All, None)).await;
    // A device that asks again replaces its own request, also if the limit is reached.
    let again = pending[0];
    make(&*store, &asks(100, again)).await.unwrap();
    let mut now = listed_ids(&*store, &query(Reach::All, None)).await;
    now.sort_unstable();
    let mut expected = vec![pending[1], pending[2], 100];
    expected.sort_unstable();
    assert_eq!(now, expected);
    let refused = make(&*store, &asks(101, 101)).await;
    assert!(matches!(refused, Err(Error::Conflict)), "{refused:?}");
}

/// The end of all trust includes a device that is established at the same moment, or the end is refused.
pub(crate) async fn the_end_of_all_trust_misses_no_device(engine: &Engine) {
    let stores = [engine.open().await, engine.open().await];
    let mut both = Vec::new();
    for round in 1..=20_u8 {
        let name = format!("ada{round}");
        let ada = user(&name);
        let created = stores[0].create(revision(&ada, round, 1), stamp()).await;
        let record = created.unwrap();
        make(&*stores[0], &devices(vec![added(device(&name, 1))]))
            .await
            .unwrap();
        let known = (
            Tenant::default(),
            ada.user.clone(),
            vec![(DeviceId::from_bytes([1; 16]), [1; 32])],
        );
        let establish = DeviceChange {
            requires: Some((record.id, record.revision)),
            trusted: Some(known.clone()),
            ..devices(vec![added(device(&name, 2))])
        };
        let ended = Changed {
            row: DeviceRow {
                state: DeviceState::Untrusted,
                ..device(&name, 1)
            },
            expected: Some([1; 32]),
        };
        let end = DeviceChange {
            trusted: Some(known),
            ..devices(vec![ended])
        };
        let mut tasks = JoinSet::new();
        for (store, change) in stores.iter().zip([establish, end]) {
            let store = Arc::clone(store);
            tasks.spawn(async move {
                let made = store.change_devices(&change, CallId::fresh(), at(50)).await;
                made.is_ok()
            });
        }
        let made = tasks.join_all().await;
        if made.iter().filter(|made| **made).count() != 1 {
            both.push((round, made));
        }
    }
    assert!(both.is_empty(), "{both:?}");
}

/// The store has a consumed, a decided and a pending request of Ada.
async fn requests_are_listed_counted_and_forgotten(store: &dyn Store) {
    let soon = AccessRow {
        expires: at(100),
        ..access("bob", 4)
    };
    make(store, &request(added(soon))).await.unwrap();
    let ids = async |wanted: &AccessQuery| listed_ids(store, wanted).await;
    let ada = Reach::Only([UserId::parse("ada").unwrap()].into());
    assert_eq!(ids(&query(ada, None)).await, [3, 2, 1]);
    assert_eq!(ids(&query(Reach::All, None)).await, [4, 3, 2, 1]);
    for (now, except, expected) in [
        (99, "", &[4, 3][..]),
        (100, "", &[3]),
        (99, "token:home:bob", &[3]),
    ] {
        let pending = PendingOnly {
            now: at(now),
            except: except.to_owned(),
        };
        assert_eq!(ids(&query(Reach::All, Some(pending))).await, expected);
    }
    let elsewhere = AccessQuery {
        tenant: Tenant::parse("elsewhere").unwrap(),
        ..query(Reach::All, None)
    };
    assert!(ids(&elsewhere).await.is_empty());
    // The same id with another verification key is another device.
    for (device, key, pending, unexpired) in [(77, 4, 0, 2), (78, 4, 1, 3), (77, 9, 1, 3)] {
        let asking = AskingDevice {
            address: place("ada", device),
            verification_key: vec![key; 65],
            ..access("ada", 4).device
        };
        let counts = store.count_access_requests(&asking, at(0)).await.unwrap();
        assert_eq!(counts, AccessCounts { pending, unexpired });
    }
    // Open requests need their key until they expire.
    let uses = store.key_uses(KEY).await.unwrap();
    assert!((1..=2).contains(&uses.access_requests), "{uses:?}");
    for (before, expected) in [(100, 0), (101, 1)] {
        assert_eq!(
            store.old_access_requests(at(before)).await.unwrap(),
            expected
        );
        assert_eq!(
            store.forget_access_requests(at(before)).await.unwrap(),
            expected
        );
    }
    assert_eq!(ids(&query(Reach::All, None)).await, [3, 2, 1]);
}

pub(crate) async fn the_mac_of_a_device_is_compared_and_swapped(engine: &Engine) {
    let store = engine.open().await;
    make(&*store, &devices(vec![added(device("ada", 1))]))
        .await
        .unwrap();
    let swap = |old: [u8; 32], from| DeviceMove {
        address: place("ada", 1),
        from,
        old,
        to: WrappingKeyId::from_bytes([10; 16]),
        new: [20; 32],
    };
    let other = WrappingKeyId::from_bytes([11; 16]);
    for stale in [swap([2; 32], KEY), swap([1; 32], other)] {
        let moved = store.move_devices(vec![stale], CallId::fresh()).await;
        assert_eq!(moved.unwrap(), [false]);
    }
    let call = CallId::fresh();
    let moved = store.move_devices(vec![swap([1; 32], KEY)], call).await;
    assert_eq!(moved.unwrap(), [true]);
    assert!(store.committed_by(call).await.unwrap());
    let row = store.device(&place("ada", 1)).await.unwrap().unwrap();
    let expected = DeviceRow {
        signer: WrappingKeyId::from_bytes([10; 16]),
        mac: [20; 32],
        ..device("ada", 1)
    };
    assert_eq!(row, expected);
    assert_eq!(
        row.mac_message().as_bytes(),
        device("ada", 1).mac_message().as_bytes()
    );
}

pub(crate) async fn devices_that_do_not_decode_are_named(engine: &Engine) {
    let store = engine.open().await;
    for number in 1..=3 {
        make(&*store, &devices(vec![added(device("ada", number))]))
            .await
            .unwrap();
        make(&*store, &request(added(access("ada", number))))
            .await
            .unwrap();
    }
    let of = |table: &str, column: &str, number: u8, set: &str| {
        let id = hex::encode([number; 16]);
        let id = engine.pick(
            format!("x'{id}'"),
            format!("decode('{id}', 'hex')"),
            format!("x'{id}'"),
        );
        engine.sql(&format!("UPDATE {table} SET {set} WHERE {column} = {id}"));
    };
    of("devices", "device_id", 1, "state = 'good'");
    of("devices", "device_id", 2, "revision = 0");
    of("access_requests", "request_id", 1, "decided_by = 'URI:bob'");
    of("access_requests", "request_id", 2, "state = 'granted'");
    let ada = UserId::parse("ada").unwrap();
    let listed = store.devices(&Tenant::default(), &ada).await.unwrap();
    let damaged: Vec<_> = listed.iter().filter_map(|row| row.as_ref().err()).collect();
    assert_eq!(damaged.len(), 2, "{damaged:?}");
    for (row, column) in damaged.iter().zip(["devices.state", "devices.revision"]) {
        assert!(row.detail.contains(column), "{}", row.detail);
        assert!(row.address.is_some());
    }
    let listed = store
        .access_requests(&query(Reach::All, None))
        .await
        .unwrap();
    let damaged: Vec<_> = listed
        .iter()
        .filter_map(|(_, row)| row.as_ref().err())
        .collect();
    let columns = ["access_requests.state", "access_requests.decided_us"];
    assert_eq!(damaged.len(), 2, "{damaged:?}");
    for (row, column) in damaged.iter().zip(columns) {
        assert!(row.detail.contains(column), "{}", row.detail);
        assert!(row.id.is_some());
    }
    // A row with an unknown state counts as pending, so that it is noticed.
    let pending = PendingOnly {
        now: at(0),
        except: String::new(),
    };
    let pending = query(Reach::All, Some(pending));
    assert_eq!(store.access_requests(&pending).await.unwrap().len(), 3);
    let one = store.device(&place("ada", 1)).await;
    assert!(matches!(one, Err(Error::Corrupt(_))), "{one:?}");
}
