//! The wrapped keys of members of Bitwarden organisations: one row for each key, changed by compare-and-swap.

use keybroker_core::{call::Timestamp, organization::Guid};
use keybroker_store as store;
use keybroker_store::{Error, MEMBER_KEYS_LISTED_MAX, MemberKeyRow, tables::Table};
use tokio::task::JoinSet;

use super::Engine;

const ORGANIZATION: Guid = Guid::from_bytes([1; 16]);
const ADA: Guid = Guid::from_bytes([2; 16]);
const BOB: Guid = Guid::from_bytes([3; 16]);

fn row(member: Guid, digest: u8, at: i64) -> MemberKeyRow {
    MemberKeyRow {
        organization: ORGANIZATION,
        digest: [digest; 32],
        member,
        email: [9; 32],
        pinned: Timestamp::from_micros(at),
        mac: [digest; 32],
    }
}

pub(crate) async fn a_wrapped_key_belongs_to_one_member(engine: &Engine) {
    let store = engine.tables().await;
    assert_eq!(
        store.member_key(ORGANIZATION, &[1; 32]).await.unwrap(),
        None
    );
    for pin in [
        row(ADA, 1, 10),
        row(ADA, 2, 30),
        row(ADA, 3, 20),
        row(BOB, 4, 40),
    ] {
        store.add_member_key(&pin).await.unwrap();
        let read = store.member_key(ORGANIZATION, &pin.digest).await.unwrap();
        assert_eq!(read, Some(pin));
    }
    let taken = store.add_member_key(&row(BOB, 1, 50)).await;
    assert!(matches!(taken, Err(Error::Exists)), "{taken:?}");
    // Another organisation may have the same digest.
    let elsewhere = MemberKeyRow {
        organization: BOB,
        ..row(BOB, 1, 50)
    };
    store.add_member_key(&elsewhere).await.unwrap();
    // The newest comes first.
    let of_ada = store.member_keys(ORGANIZATION, ADA).await.unwrap();
    assert_eq!(of_ada, [row(ADA, 2, 30), row(ADA, 3, 20), row(ADA, 1, 10)]);
    assert_eq!(store.member_keys(BOB, ADA).await.unwrap(), []);
    for digest in 100..=u8::MAX {
        store
            .add_member_key(&row(BOB, digest, digest.into()))
            .await
            .unwrap();
    }
    let most = usize::try_from(MEMBER_KEYS_LISTED_MAX).unwrap();
    let of_bob = store.member_keys(ORGANIZATION, BOB).await.unwrap();
    assert_eq!(of_bob.len(), most);
    assert_eq!(of_bob[0], row(BOB, u8::MAX, 255));
}

pub(crate) async fn pins_are_compare_and_swap(engine: &Engine) {
    let store = engine.tables().await;
    let mut tasks = JoinSet::new();
    for member in [ADA, BOB, ADA, BOB, ADA, BOB] {
        let store = store.clone();
        tasks.spawn(async move { store.add_member_key(&row(member, 1, 10)).await });
    }
    let added = tasks.join_all().await;
    assert_eq!(
        added.iter().filter(|one| one.is_ok()).count(),
        1,
        "{added:?}"
    );

    let newer = MemberKeyRow {
        mac: [7; 32],
        ..row(BOB, 1, 99)
    };
    let lost = store.update_member_key(&newer, &[6; 32]).await;
    assert!(matches!(lost, Err(Error::Conflict)), "{lost:?}");
    store.update_member_key(&newer, &[1; 32]).await.unwrap();
    let read = store.member_key(ORGANIZATION, &[1; 32]).await.unwrap();
    assert_eq!(read, Some(newer));
    let absent = store.update_member_key(&row(ADA, 2, 1), &[2; 32]).await;
    assert!(matches!(absent, Err(Error::Conflict)), "{absent:?}");
}

pub(crate) async fn pins_that_do_not_decode_are_corrupt(engine: &Engine) {
    let store = engine.tables().await;
    store.add_member_key(&row(ADA, 1, 10)).await.unwrap();
    let empty = engine.pick("x''", "''", "''");
    engine.sql(&format!("UPDATE bitwarden_member_keys SET mac = {empty}"));
    let read = store.member_key(ORGANIZATION, &[1; 32]).await;
    assert!(matches!(read, Err(Error::Corrupt(_))), "{read:?}");
    let listed = store.member_keys(ORGANIZATION, ADA).await;
    assert!(matches!(listed, Err(Error::Corrupt(_))), "{listed:?}");
}

pub(crate) async fn pins_are_copied(engine: &Engine) {
    let store = engine.tables().await;
    store.add_member_key(&row(ADA, 1, 10)).await.unwrap();
    let target = Engine::sqlite().await;
    let copied = store::open_tables(&target.settings).await.unwrap();
    let page = store.page(Table::MemberKeys, None, 0).await.unwrap();
    copied.insert(Table::MemberKeys, &page).await.unwrap();
    let read = copied.member_key(ORGANIZATION, &[1; 32]).await.unwrap();
    assert_eq!(read, Some(row(ADA, 1, 10)));
    copied.close().await;
}
