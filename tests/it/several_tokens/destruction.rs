//! The destruction of a key that is on two tokens.

use std::{fs, path::Path, sync::Arc};

use crate::{
    client::Caller,
    destruction::{alerts, destroyed, permit_now_in, rewrap, slowly},
    keys::changed,
    process::Broker,
    site::{Options, policy_section},
};

use super::{MATERIAL, Two, kill_workers, until_unusable, until_whole};

/// The objects in the directory of a SoftHSM token, which has one file for each.
fn objects_in(folder: &Path) -> usize {
    let mut count = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            count += objects_in(&path);
        } else {
            let is_object = path
                .extension()
                .is_some_and(|extension| extension == "object");
            count += usize::from(is_object && !path.ends_with("token.object"));
        }
    }
    count
}

/// A token that is absent when the time has come postpones the destruction. When it returns, the key is removed from both.
#[tokio::test(flavor = "multi_thread")]
async fn a_destruction_waits_for_an_absent_token_and_removes_the_key_from_both() {
    let two = Two::fresh(Options::default());
    let older = two.key();
    let policies = two.site.folder().join("policies");
    permit_now_in(&policies);
    let file = two.site.configuration_file();
    let text = fs::read_to_string(&file).unwrap() + &policy_section(&policies);
    fs::write(&file, text).unwrap();
    let broker = Broker::start_on(Arc::clone(&two.site));
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("ada", MATERIAL).await.unwrap();
    broker.stop();
    two.site
        .expect_ok(&["--token", "a", "key", "generate", "--bits", "2048"]);
    let broker = Broker::start_on(Arc::clone(&two.site));
    for name in ["a", "b"] {
        until_whole(&broker, name, 1).await;
    }
    changed(&broker, &["deactivate", &older]);
    rewrap(&broker);
    let copy = two.copy.join("tokens");
    assert_eq!(objects_in(&copy), 3);

    two.b.behave("[token]\nabsent = true\n");
    kill_workers(&broker, "b").await;
    until_unusable(&broker, "b").await;
    changed(
        &broker,
        &["destroy", &older, "--yes", "--now", "irreversibly"],
    );
    slowly("the alert", || {
        let alerts = alerts(&broker);
        let is_it = |line: &String| line.contains("may be on token b");
        alerts.iter().any(is_it).then_some(())
    });
    two.b.behave("");
    destroyed(&broker, &older);
    assert_eq!(objects_in(&copy), 0);
    let released = Caller::of(&broker, "releaser").unwrap("ada").await.unwrap();
    assert_eq!(released.key_material, MATERIAL);
    broker.stop();
    two.site.expect_ok(&["store", "check"]);
}
