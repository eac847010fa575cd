//! Requests for approval: one for each digest, changed by compare-and-swap, and used together with the change that they permit.

use keybroker_core::{
    approval::ApprovalState,
    call::{CallId, Timestamp},
    key::{ApprovalId, WrappingKeyId},
    principal::NAME_BYTES_MAX,
};
use keybroker_store::{
    APPROVAL_DOCUMENT_BYTES_MAX, APPROVALS_LISTED_MAX, ApprovalChange, ApprovalCounts,
    ApprovalFilter, ApprovalRow, ApprovedClient, Decision, Error, PERSON_BYTES_MAX,
    PersonOfPrincipal, RegistryChange, RemovedApproval, Store,
};
use tokio::task::JoinSet;

use super::{Engine, KEY, clients::client};

const FAR: i64 = 1 << 60;

fn at(micros: i64) -> Timestamp {
    Timestamp::from_micros(micros)
}

fn by(person: &str, principal: &str) -> PersonOfPrincipal {
    PersonOfPrincipal {
        person: person.to_owned(),
        principal: principal.to_owned(),
    }
}

/// A pending request with this number as its id, digest and time.
fn request(number: u8) -> ApprovalRow {
    ApprovalRow {
        id: ApprovalId::from_bytes([number; 16]),
        signer: KEY,
        state: ApprovalState::Pending,
        action: "wrapping_key.destroy".to_owned(),
        document: b"{\"after_days\":30}".to_vec(),
        digest: [number; 32],
        requested_by: by("Ada", "URI:ada"),
        requested: at(number.into()),
        expires: at(FAR),
        decision: None,
        used: None,
        mac: [number; 32],
    }
}

/// The request after a decision, with another MAC.
fn decided(row: &ApprovalRow, state: ApprovalState, mac: u8) -> ApprovalChange {
    let decision = Decision {
        by: by("Bob", "URI:bob"),
        at: at(50),
    };
    ApprovalChange {
        row: ApprovalRow {
            state,
            decision: Some(decision),
            used: (state == ApprovalState::Used).then(|| at(60)),
            mac: [mac; 32],
            ..row.clone()
        },
        expected: row.mac,
    }
}

async fn add(store: &dyn Store, row: &ApprovalRow) {
    let added = store.request_approval(row, None, CallId::fresh());
    added.await.unwrap();
}

pub(crate) async fn approvals_are_compare_and_swap(engine: &Engine) {
    let store = engine.open().await;
    let longest = ApprovalRow {
        document: vec![0xff; APPROVAL_DOCUMENT_BYTES_MAX],
        requested_by: by(
            &"ä".repeat(PERSON_BYTES_MAX / 2),
            &"x".repeat(NAME_BYTES_MAX),
        ),
        ..request(1)
    };
    let call = CallId::fresh();
    store.request_approval(&longest, None, call).await.unwrap();
    assert!(store.committed_by(call).await.unwrap());
    assert_eq!(
        store.approval(longest.id).await.unwrap(),
        Some(longest.clone())
    );
    assert_eq!(
        store.approval_of(&[1; 32]).await.unwrap(),
        Some(longest.clone())
    );
    assert_eq!(store.approval_of(&[2; 32]).await.unwrap(), None);

    // A second request for the same change, also with another id.
    let refused = CallId::fresh();
    let twin = ApprovalRow {
        id: ApprovalId::from_bytes([9; 16]),
        mac: [9; 32],
        ..request(1)
    };
    let second = store.request_approval(&twin, None, refused).await;
    assert!(matches!(second, Err(Error::Exists)), "{second:?}");
    assert!(!store.committed_by(refused).await.unwrap());
    // It replaces the first one only if that is as it was read.
    let stale = store.request_approval(&twin, Some(&[7; 32]), refused).await;
    assert!(matches!(stale, Err(Error::Conflict)), "{stale:?}");
    let replaced = store.request_approval(&twin, Some(&longest.mac), CallId::fresh());
    replaced.await.unwrap();
    assert_eq!(store.approval(longest.id).await.unwrap(), None);

    let call = CallId::fresh();
    let approved = decided(&twin, ApprovalState::Approved, 10);
    store
        .decide_approval(&approved, call, at(50))
        .await
        .unwrap();
    assert!(store.committed_by(call).await.unwrap());
    let again = store.decide_approval(&approved, refused, at(50)).await;
    assert!(matches!(again, Err(Error::Conflict)), "{again:?}");
    assert!(!store.committed_by(refused).await.unwrap());
    assert_eq!(store.approval(twin.id).await.unwrap(), Some(approved.row));

    requests_are_listed_counted_and_forgotten(&*store).await;
}

/// The store has one approved request of Ada already.
async fn requests_are_listed_counted_and_forgotten(store: &dyn Store) {
    add(store, &request(2)).await;
    let old = ApprovalRow {
        expires: at(100),
        requested_by: by("Carol", "URI:carol"),
        ..request(3)
    };
    add(store, &old).await;
    let all = ApprovalFilter::All;
    assert_eq!(ids(store, all).await, [3, 2, 9]);
    assert_eq!(
        ids(store, ApprovalFilter::OpenAt(at(100))).await,
        [2, 9],
        "the approved request is open, too"
    );
    let one = ApprovalFilter::One;
    assert_eq!(ids(store, one(old.id)).await, [3]);
    assert!(ids(store, one(request(8).id)).await.is_empty());
    for (person, now, open, unexpired) in
        [("Ada", 0, 2, 2), ("Carol", 99, 1, 1), ("Carol", 100, 0, 0)]
    {
        let counts = store.count_approvals(person, at(now)).await.unwrap();
        assert_eq!(counts, ApprovalCounts { open, unexpired }, "{person}");
    }
    // Open requests need their key until they expire.
    let uses = store.key_uses(KEY).await.unwrap();
    assert_eq!((uses.approvals, uses.total()), (2, 2));
    let of_other = store.key_uses(WrappingKeyId::from_bytes([8; 16]));
    assert_eq!(of_other.await.unwrap().approvals, 0);
    for (before, expected) in [(100, 0), (101, 1)] {
        assert_eq!(store.old_approvals(at(before)).await.unwrap(), expected);
        assert_eq!(store.forget_approvals(at(before)).await.unwrap(), expected);
    }
    assert_eq!(ids(store, all).await, [2, 9]);
}

/// The first bytes of the ids of the listed requests.
async fn ids(store: &dyn Store, wanted: ApprovalFilter) -> Vec<u8> {
    let rows = store.approvals(wanted).await.unwrap();
    let ids = rows.into_iter().map(|row| row.unwrap().id.as_bytes()[0]);
    ids.collect()
}

/// Requests that were rejected or used do not hide the open requests, however many there are.
pub(crate) async fn requests_that_are_over_do_not_hide_open_requests(engine: &Engine) {
    let store = engine.open().await;
    add(&*store, &request(1)).await;
    for number in 0..APPROVALS_LISTED_MAX {
        let mut bytes = [2; 16];
        bytes[..4].copy_from_slice(&number.to_be_bytes());
        let states = [ApprovalState::Rejected, ApprovalState::Used];
        let over = ApprovalRow {
            id: ApprovalId::from_bytes(bytes),
            digest: [bytes, bytes].concat().try_into().unwrap(),
            ..decided(&request(2), states[usize::from(number % 2 == 0)], 3).row
        };
        add(&*store, &over).await;
    }
    assert_eq!(ids(&*store, ApprovalFilter::OpenAt(at(0))).await, [1]);
    let all = store.approvals(ApprovalFilter::All).await.unwrap();
    assert_eq!(all.len(), usize::try_from(APPROVALS_LISTED_MAX).unwrap());
    let counts = store.count_approvals("Ada", at(0)).await.unwrap();
    assert_eq!(
        (counts.open, counts.unexpired),
        (1, u64::from(APPROVALS_LISTED_MAX) + 1)
    );
}

pub(crate) async fn of_concurrent_decisions_one_wins(engine: &Engine) {
    let store = engine.open().await;
    add(&*store, &request(1)).await;
    let mut decisions = JoinSet::new();
    for number in 10..30 {
        let store = store.clone();
        let state = if number % 2 == 0 {
            ApprovalState::Approved
        } else {
            ApprovalState::Rejected
        };
        let change = decided(&request(1), state, number);
        decisions.spawn(async move {
            let made = store.decide_approval(&change, CallId::fresh(), at(50));
            made.await.map(|()| change.row)
        });
    }
    let mut won = Vec::new();
    for result in decisions.join_all().await {
        match result {
            Ok(row) => won.push(row),
            Err(error) => assert!(matches!(error, Error::Conflict), "{error:?}"),
        }
    }
    assert_eq!(won.len(), 1);
    assert_eq!(store.approval(request(1).id).await.unwrap(), won.pop());
}

/// The change and the use of its approval are one transaction: neither is made without the other.
pub(crate) async fn a_change_uses_its_approval_or_is_not_made(engine: &Engine) {
    let store = engine.open().await;
    let approved = ApprovalRow {
        state: ApprovalState::Approved,
        ..request(1)
    };
    add(&*store, &approved).await;
    let used = decided(&approved, ApprovalState::Used, 2);
    let new = ApprovedClient::New;
    let stale = ApprovalChange {
        expected: [7; 32],
        ..used.clone()
    };
    let call = CallId::fresh();
    let refused = store
        .change_approved_client(new, &client(1, 1), &stale, call)
        .await;
    assert!(matches!(refused, Err(Error::Conflict)), "{refused:?}");
    assert_eq!(store.client(client(1, 1).id).await.unwrap(), None);
    assert!(!store.committed_by(call).await.unwrap());
    store
        .change_approved_client(new, &client(1, 1), &used, call)
        .await
        .unwrap();
    assert!(store.committed_by(call).await.unwrap());
    assert_eq!(
        store.approval(approved.id).await.unwrap(),
        Some(used.row.clone())
    );

    // The approval is put back, but the API client exists.
    let back = ApprovalChange {
        row: approved.clone(),
        expected: used.row.mac,
    };
    let put = store.decide_approval(&back, CallId::fresh(), at(70));
    put.await.unwrap();
    let taken = store
        .change_approved_client(new, &client(1, 1), &used, CallId::fresh())
        .await;
    assert!(matches!(taken, Err(Error::Exists)), "{taken:?}");
    let changed = ApprovedClient::Changed;
    let not_next = store
        .change_approved_client(changed, &client(1, 3), &used, CallId::fresh())
        .await;
    assert!(matches!(not_next, Err(Error::Conflict)), "{not_next:?}");
    assert_eq!(
        store.approval(approved.id).await.unwrap(),
        Some(approved.clone())
    );
    let next = client(1, 2);
    let made = store.change_approved_client(changed, &next, &used, CallId::fresh());
    made.await.unwrap();

    let change = RegistryChange {
        approval: Some(stale),
        ..RegistryChange::default()
    };
    let refused = store
        .change_registry(&change, CallId::fresh(), at(80))
        .await;
    assert!(matches!(refused, Err(Error::Conflict)), "{refused:?}");
    let change = RegistryChange {
        approval: Some(ApprovalChange {
            row: approved.clone(),
            expected: used.row.mac,
        }),
        ..RegistryChange::default()
    };
    let made = store.change_registry(&change, CallId::fresh(), at(80));
    made.await.unwrap();
    assert_eq!(store.approval(approved.id).await.unwrap(), Some(approved));
}

/// A row is removed only as it was read.
pub(crate) async fn a_changed_request_is_not_removed(engine: &Engine) {
    let store = engine.open().await;
    let row = request(1);
    add(&*store, &row).await;
    let remove = async |row: &ApprovalRow| {
        let call = CallId::fresh();
        let as_read = RemovedApproval::AsRead(Box::new(row.clone()));
        let removed = store.remove_approval(&as_read, call, at(50)).await;
        assert_eq!(store.committed_by(call).await.unwrap(), removed.is_ok());
        removed
    };
    for before in [
        decided(&row, ApprovalState::Pending, 9).row,
        decided(&row, ApprovalState::Approved, 1).row,
    ] {
        let refused = remove(&before).await;
        assert!(matches!(refused, Err(Error::Conflict)), "{refused:?}");
    }
    assert_eq!(store.approval(row.id).await.unwrap(), Some(row.clone()));
    remove(&row).await.unwrap();
    assert_eq!(store.approval(row.id).await.unwrap(), None);
    let again = remove(&row).await;
    assert!(matches!(again, Err(Error::Conflict)), "{again:?}");
}

/// A damaged row does not end a list, is an error by name when it is asked for, and can be removed.
pub(crate) async fn approvals_that_do_not_decode_are_named_and_removed(engine: &Engine) {
    let store = engine.open().await;
    for number in 1..=6 {
        add(&*store, &request(number)).await;
    }
    let edit = |number: u8, set: &str| {
        let id = hex::encode([number; 16]);
        let id = engine.pick(
            format!("x'{id}'"),
            format!("decode('{id}', 'hex')"),
            format!("x'{id}'"),
        );
        engine.sql(&format!(
            "UPDATE approvals SET {set} WHERE approval_id = {id}"
        ));
    };
    let short = engine.pick("x'00'", "decode('00', 'hex')", "x'00'");
    edit(1, &format!("mac = {short}"));
    edit(2, "state = 'granted'");
    // Names of a decision that was not made.
    edit(3, "decided_by = 'URI:bob'");
    edit(4, "decided_person = 'Bob'");
    let open = ApprovalFilter::OpenAt(at(0));
    let listed = store.approvals(open).await.unwrap();
    let damaged: Vec<_> = listed.iter().filter_map(|row| row.as_ref().err()).collect();
    let named = damaged
        .iter()
        .map(|row| (row.id.unwrap().as_bytes()[0], &*row.detail));
    let named: Vec<_> = named.collect();
    let expected = [
        (4, "approvals.decided_us"),
        (3, "approvals.decided_us"),
        (2, "approvals.state"),
        (1, "approvals.mac"),
    ];
    assert_eq!(named.len(), expected.len(), "{named:?}");
    for ((number, detail), (wanted, column)) in named.iter().zip(expected) {
        assert_eq!(*number, wanted);
        assert!(detail.contains(column), "{detail}");
    }
    for number in 1..=4 {
        let id = request(number).id;
        let asked = store.approval(id).await;
        assert!(matches!(asked, Err(Error::Corrupt(_))), "{asked:?}");
        let one = store.approvals(ApprovalFilter::One(id)).await.unwrap();
        assert!(
            matches!(&one[..], [Err(damaged)] if damaged.id == Some(id)),
            "{one:?}"
        );
        let call = CallId::fresh();
        let unreadable = RemovedApproval::Unreadable(id);
        let removed = store.remove_approval(&unreadable, call, at(50));
        removed.await.unwrap();
        assert!(store.committed_by(call).await.unwrap());
        let none = store.remove_approval(&unreadable, CallId::fresh(), at(50));
        let none = none.await;
        assert!(matches!(none, Err(Error::NotFound)), "{none:?}");
    }
    let left = store.approvals(open).await.unwrap();
    assert!(left.len() == 2 && left.iter().all(Result::is_ok));
}
