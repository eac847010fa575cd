//! Many records at once.

use keybroker_core::call::Timestamp;
use keybroker_store::{Error, NewRevision, RecordState};

use super::{Engine, record_id, revision, stamp, user};

pub(crate) async fn many_are_created_at_once_or_none(engine: &Engine) {
    let store = engine.open().await;
    let batch = |numbers: std::ops::Range<u8>| -> Vec<NewRevision> {
        numbers
            .map(|number| revision(&user(&format!("user-{number}")), number, 1))
            .collect()
    };
    let at = Timestamp::from_micros(1_000_000);
    store.create_many(batch(0..50), at).await.unwrap();
    store.create_many(Vec::new(), at).await.unwrap();
    for number in 0..50 {
        let name = format!("user-{number}");
        let record = store.record(&user(&name)).await.unwrap().unwrap();
        assert_eq!(record.info.id, record_id(number));
        assert_eq!(record.info.state, RecordState::Active);
        assert_eq!((record.info.created, record.info.updated), (at, at));
        assert_eq!(record.envelope, format!("{name} 1").into_bytes());
    }

    let taken = revision(&user("user-60"), 200, 1);
    store.create(taken, stamp()).await.unwrap();
    let refused = store.create_many(batch(55..65), at).await;
    assert!(matches!(refused, Err(Error::Exists)), "{refused:?}");
    for number in (55..65).filter(|number| *number != 60) {
        let address = user(&format!("user-{number}"));
        assert!(store.record(&address).await.unwrap().is_none(), "{number}");
    }
    let kept = store.record(&user("user-60")).await.unwrap().unwrap();
    assert_eq!(kept.info.id, record_id(200));
}
