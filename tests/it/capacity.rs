//! Limits on what is stored: revisions of a record and keys of a user.

use std::sync::Arc;

use keybroker_proto::{CreateUserKeyRequest, UserKey};
use tonic::{Request, Status};

use crate::{
    client::{Caller, NAME, refused},
    process::Broker,
    site::{Options, Site},
};

const REVISIONS_MAX: u64 = 3;

fn site() -> Arc<Site> {
    let site = Site::fresh(Options::default());
    site.write_configuration(|text| {
        *text = text.replace(
            "[store]\n",
            &format!("[store]\nrevisions_max = {REVISIONS_MAX}\nkeys_per_user_max = 2\n"),
        );
    });
    Arc::new(site)
}

async fn create(caller: &Caller, user: &str, name: &str) -> Result<UserKey, Status> {
    let request = Request::new(CreateUserKeyRequest {
        user: user.to_owned(),
        key_name: name.to_owned(),
        key_material: b"material of this user".to_vec(),
        request_id: String::new(),
    });
    let answer = caller.keys.clone().create_user_key(request).await?;
    Ok(answer.into_inner().user_key.unwrap())
}

/// A caller can neither fill the database with revisions nor end the retention period of the earlier ones.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_takes_no_more_revisions_than_may_be_stored() {
    let broker = Broker::start_on(site());
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("ada", b"first material").await.unwrap();
    for revision in 1..REVISIONS_MAX {
        let replaced = enroller.replace("ada", b"next material", revision, "");
        replaced.await.unwrap();
    }
    let replaced = enroller.replace("ada", b"last material", REVISIONS_MAX, "");
    refused(replaced.await, "LIMIT");
    let log = broker.site.log();
    for part in [
        "store.revisions_max",
        "keybroker store purge",
        "store.retention_days",
    ] {
        assert!(log.contains(part), "{part}");
    }
    // The key itself is as it was.
    let releaser = Caller::of(&broker, "releaser");
    let released = releaser.unwrap("ada").await.unwrap();
    assert_eq!(released.key_material, b"next material");

    // A purge makes room once the retention period is over.
    let (site, _) = broker.stop();
    let age = 40_i64 * 24 * 3_600 * 1_000_000;
    site.sql(&format!(
        "UPDATE revisions SET created_us = created_us - {age}"
    ));
    site.expect_ok(&["store", "purge"]);
    let broker = Broker::start_on(site);
    let enroller = Caller::of(&broker, "enroller");
    let replaced = enroller.replace("ada", b"last material", REVISIONS_MAX, "");
    assert_eq!(replaced.await.unwrap().revision, REVISIONS_MAX + 1);
}

/// A thief of a user's credential can use up the limit. The earlier key comes back without another configuration.
#[tokio::test(flavor = "multi_thread")]
async fn a_revision_is_restored_although_the_limit_is_reached() {
    let broker = Broker::start_on(site());
    let enroller = Caller::of(&broker, "enroller");
    enroller
        .create("ada", b"material of the user")
        .await
        .unwrap();
    for revision in 1..REVISIONS_MAX {
        let replaced = enroller.replace("ada", b"material of the thief", revision, "");
        replaced.await.unwrap();
    }
    let lifecycle = Caller::of(&broker, "lifecycle");
    let restored = lifecycle.restore("ada", 1, REVISIONS_MAX).await.unwrap();
    assert_eq!(restored.revision, REVISIONS_MAX + 1);
    let releaser = Caller::of(&broker, "releaser");
    let released = releaser.unwrap("ada").await.unwrap();
    assert_eq!(released.key_material, b"material of the user");
    // The limit holds for the caller who reached it.
    let replaced = enroller.replace("ada", b"material of the thief", REVISIONS_MAX + 1, "");
    refused(replaced.await, "LIMIT");
}

/// A deleted key keeps its name, so it counts until it is purged.
#[tokio::test(flavor = "multi_thread")]
async fn a_user_gets_no_more_keys_than_may_be_stored() {
    let broker = Broker::start_on(site());
    let enroller = Caller::of(&broker, "enroller");
    for name in [NAME, "second"] {
        create(&enroller, "ada", name).await.unwrap();
    }
    refused(create(&enroller, "ada", "third").await, "LIMIT");
    let lifecycle = Caller::of(&broker, "lifecycle");
    lifecycle.delete("ada", 1).await.unwrap();
    refused(create(&enroller, "ada", "third").await, "LIMIT");
    // An existing name is still reported as such, and other users are not affected.
    refused(create(&enroller, "ada", "second").await, "KEY_EXISTS");
    create(&enroller, "bob", "third").await.unwrap();
}
