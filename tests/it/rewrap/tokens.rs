//! A re-wrap from one token to another: SoftHSM decrypts with SHA-1 only, Kryoptic wraps with SHA-256.

use std::{fs, sync::Arc};

use super::{admin_command, all_released, done, enrol, left, names, number, start};
use crate::{
    modules::{Maker, Stand},
    process::{Broker, until},
    wire::get,
};

/// Afterwards, the rows have the algorithm of the new token, and the old token is needed for none of them.
/// `KEYBROKER_TEST_MOVED_USERS=1000` sets the number of users.
#[tokio::test(flavor = "multi_thread")]
async fn rows_move_from_softhsm_to_another_token() {
    let stand = Stand::new(Maker::Kryoptic);
    let site = Arc::clone(&stand.site);
    let before = fs::read_to_string(site.configuration_file()).unwrap();
    stand.configure_beside_softhsm();
    site.expect_ok(&["--token", "soft", "key", "generate", "--bits", "2048"]);
    let users = names(number("KEYBROKER_TEST_MOVED_USERS", 30));
    let count = u64::try_from(users.len()).unwrap();
    let broker = Broker::start_on(site);
    enrol(&broker, &users).await;
    let (site, _) = broker.stop();
    site.expect_ok(&["--token", "kryoptic", "key", "generate", "--bits", "2048"]);
    let broker = Broker::start_on(site);
    assert!(start(&broker, 0).await.unwrap());
    let ended = done(&broker).await;
    assert_eq!(
        (ended.failed, ended.revisions_moved),
        (0, count),
        "{ended:?}"
    );
    assert_eq!((ended.verified, ended.left), (count, 0), "{ended:?}");
    assert_eq!(left(&broker).await, (0, 0));
    all_released(&broker, &users).await;
    // Byte 2 of an envelope is its algorithm: 1 is SHA-256.
    let algorithms = broker
        .site
        .sql("SELECT DISTINCT hex(substr(envelope, 3, 1)) FROM revisions;");
    assert_eq!(algorithms.trim(), "01");
    broker.site.expect_ok(&["store", "check"]);

    // Without the SoftHSM token, every user key is there.
    let (site, _) = broker.stop();
    let directory = site.token.directory();
    fs::rename(&directory, directory.with_extension("moved")).unwrap();
    fs::create_dir(&directory).unwrap();
    let broker = Broker::start_on(site);
    all_released(&broker, &users).await;

    // The old token leaves the configuration, and its wrapping key is recorded as lost.
    let (site, _) = broker.stop();
    let listed = site.expect_ok(&["-o", "json", "key", "list"]);
    let keys: serde_json::Value = serde_json::from_str(&listed).unwrap();
    let old = keys[0]["id"].as_str().unwrap().to_owned();
    site.write_configuration(|text| {
        let (_, rest) = text.split_once("[store]").unwrap();
        let (kryoptic, _) = before.split_once("[store]").unwrap();
        *text = format!("{kryoptic}[store]{rest}");
    });
    let broker = Broker::start_on(site);
    all_released(&broker, &users).await;
    let lost = admin_command(&broker, &["key", "lost"], &[&old, "--yes"]);
    assert_eq!(lost.code, Some(0), "{lost:#?}");
    assert!(lost.stdout.contains("destroyed"), "{lost:#?}");
    until(
        "the broker is ready without a note about the old key",
        || {
            let ready = get(broker.status, "/readyz");
            (ready.contains("ready") && !ready.contains(&old)).then_some(())
        },
    );
    all_released(&broker, &users).await;
}
