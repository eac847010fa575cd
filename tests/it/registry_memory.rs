//! An earlier row of the registry that was put back while no broker ran.

use std::{fs, time::Duration};

use serde_json::Value;

use crate::{
    client::{Caller, refused},
    keys::{MATERIAL, changed, with_two_keys},
    process::Broker,
    wire::get,
};

/// The entries of the audit log about the registry: the highest number, and the digest.
fn recorded(broker: &Broker) -> Vec<(u64, String)> {
    let audit = broker.site.audit();
    let lines = audit
        .lines()
        .filter(|line| line.contains("\"action\":\"wrapping_key.registry\""));
    lines
        .map(|line| {
            let entry: Value = serde_json::from_str(line).unwrap();
            let digest = entry["digest"].as_str().unwrap().to_owned();
            (entry["count"].as_u64().unwrap(), digest)
        })
        .collect()
}

/// The row from before a compromise has a valid MAC. The broker remembers the number of the later row, refuses the key alone, and an
/// operator can accept the row.
#[tokio::test(flavor = "multi_thread")]
async fn an_earlier_row_put_back_while_no_broker_ran_is_refused_until_it_is_accepted() {
    let (site, [older, _]) = with_two_keys().await;
    let of_older = format!("WHERE lower(hex(key_id)) = '{older}'");
    site.sql(&format!(
        "CREATE TABLE saved AS SELECT * FROM wrapping_keys {of_older}"
    ));
    let broker = Broker::start_on(site);
    let before = recorded(&broker);
    changed(&broker, &["compromise", &older]);
    let after = recorded(&broker);
    assert_eq!(after.len(), before.len() + 1, "{after:?}");
    let (last, previous) = (after.last().unwrap(), before.last().unwrap());
    assert!(last.0 > previous.0 && last.1 != previous.1, "{after:?}");
    refused(
        Caller::of(&broker, "releaser").unwrap("ada").await,
        "KEY_STATE",
    );
    let (site, _) = broker.stop();

    site.sql(&format!("DELETE FROM wrapping_keys {of_older}"));
    site.sql("INSERT INTO wrapping_keys SELECT * FROM saved");
    let mut site = site;
    for is_lost in [false, false, true] {
        if is_lost {
            // The audit log has the numbers of the rows, too.
            let state = site.folder().join("audit/state/registry-serve");
            fs::remove_file(state).unwrap();
        }
        let broker = Broker::start_on(site);
        let releaser = Caller::of(&broker, "releaser");
        refused(releaser.unwrap("ada").await, "TOKEN_UNTRUSTED");
        // Also after the broker has read the registry several times.
        tokio::time::sleep(Duration::from_secs(3)).await;
        refused(releaser.unwrap("ada").await, "TOKEN_UNTRUSTED");
        assert_eq!(releaser.unwrap("bob").await.unwrap().key_material, MATERIAL);
        let log = broker.site.log();
        assert!(log.contains("an earlier row was put back"), "{log}");
        assert!(get(broker.status, "/metrics").contains("keybroker_registry_altered 1"));
        (site, _) = broker.stop();
    }

    let accepted = site.expect_ok(&["-o", "json", "store", "accept-restored"]);
    assert!(accepted.contains("\"accepted\": true"), "{accepted}");
    let again = site.expect_ok(&["-o", "json", "store", "accept-restored"]);
    assert!(again.contains("\"accepted\": false"), "{again}");
    let broker = Broker::start_on(site);
    let released = Caller::of(&broker, "releaser").unwrap("ada").await.unwrap();
    assert_eq!(released.key_material, MATERIAL);
    assert!(get(broker.status, "/metrics").contains("keybroker_registry_altered 0"));
    broker.site.expect_ok(&["audit", "verify"]);
}

/// A row that was removed while no broker ran is reported.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_removed_while_no_broker_ran_is_reported() {
    let (site, [older, _]) = with_two_keys().await;
    let broker = Broker::start_on(site);
    let (site, _) = broker.stop();
    site.sql(&format!(
        "DELETE FROM wrapping_keys WHERE lower(hex(key_id)) = '{older}'"
    ));
    let broker = Broker::start_on(site);
    let log = broker.site.log();
    let expected = format!("the row of wrapping key {older} was deleted from the registry");
    assert!(log.contains(&expected), "{log}");
    let bob = Caller::of(&broker, "releaser").unwrap("bob").await.unwrap();
    assert_eq!(bob.key_material, MATERIAL);
}
