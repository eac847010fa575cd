//! When a key was last released is told, some seconds later, and is worth nothing else.

use std::time::Duration;

use prost_types::Timestamp;

use crate::{
    client::Caller,
    process::{Broker, WAIT_MAX},
    site::Options,
};

const MATERIAL: &[u8] = b"material of this user";

async fn last_use(caller: &Caller, user: &str) -> Option<Timestamp> {
    caller.get(user).await.unwrap().last_use_time
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_is_noted_by_and_by_and_a_drain_loses_none() {
    let broker = Broker::start(Options::default());
    let [enroller, releaser] = ["enroller", "releaser"].map(|name| Caller::of(&broker, name));
    for user in ["ada", "bob", "carl"] {
        let created = enroller.create(user, MATERIAL).await.unwrap();
        assert_eq!(created.last_use_time, None);
    }
    releaser.unwrap("ada").await.unwrap();
    let deadline = tokio::time::Instant::now() + WAIT_MAX;
    let ada = loop {
        if let Some(at) = last_use(&releaser, "ada").await {
            break at;
        }
        assert!(tokio::time::Instant::now() < deadline, "it was not noted");
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    assert_eq!(last_use(&releaser, "bob").await, None);
    releaser.batch(&["bob"]).await.unwrap();
    releaser.unwrap("ada").await.unwrap();
    let rows = ".dump rec% rev%";
    let before = broker.site.sql(rows);
    assert!(before.contains("INSERT INTO revisions"), "{before}");
    let (site, _) = broker.stop();
    assert_eq!(site.sql(rows), before);

    let broker = Broker::start_on(site);
    let releaser = Caller::of(&broker, "releaser");
    let listed = releaser.list(10, "").await.unwrap().user_keys;
    let known: Vec<_> = listed
        .iter()
        .map(|key| (key.user.as_str(), key.last_use_time.is_some()))
        .collect();
    assert_eq!(known, [("ada", true), ("bob", true), ("carl", false)]);
    let later = listed[0].last_use_time.as_ref().unwrap();
    assert!((later.seconds, later.nanos) > (ada.seconds, ada.nanos));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_table_everything_else_works() {
    let broker = Broker::start(Options::default());
    let [enroller, releaser] = ["enroller", "releaser"].map(|name| Caller::of(&broker, name));
    enroller.create("ada", MATERIAL).await.unwrap();
    broker.site.sql("DROP TABLE last_uses");
    for _ in 0..3 {
        let key = releaser.unwrap("ada").await.unwrap();
        assert_eq!(key.key_material, MATERIAL);
        assert_eq!(last_use(&releaser, "ada").await, None);
    }
    assert_eq!(releaser.list(10, "").await.unwrap().user_keys.len(), 1);
    let (_, status) = broker.stop();
    assert!(status.success());
}
