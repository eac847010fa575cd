//! The move from one token to another: a re-wrap whose new wrapping key is on a token of another vendor.

use crate::modules::{Maker, Stand};

use super::*;

/// From SoftHSM, which decrypts with SHA-1 only, to Kryoptic with SHA-256. Afterwards the SoftHSM token is deleted, and every key is
/// there.
///
/// `KEYBROKER_TEST_REWRAP_ROWS=1000` sets the number of users.
#[tokio::test(flavor = "multi_thread")]
async fn every_key_comes_back_after_the_move_to_another_token() {
    let users = names(number("KEYBROKER_TEST_REWRAP_ROWS", 40));
    let stand = Stand::new(Maker::Kryoptic);
    let site = Arc::clone(&stand.site);
    let written = std::fs::read_to_string(site.configuration_file()).unwrap();
    let (kryoptic, _) = written.split_once("[store]").unwrap();
    let kryoptic = kryoptic.replace("[token]", "[[token]]\nname = \"kryoptic\"");
    site.write_configuration(|text| {
        let named = text.replacen("[token]", "[[token]]\nname = \"soft\"", 1);
        *text = named.replacen("[store]", &format!("{kryoptic}[store]"), 1);
    });
    site.expect_ok(&["--token", "soft", "key", "generate", "--bits", "2048"]);
    let broker = Broker::start_on(site);
    enrol(&broker, &users).await;
    let (site, _) = broker.stop();
    site.expect_ok(&["--token", "kryoptic", "key", "generate", "--bits", "3072"]);

    let broker = Broker::start_on(site);
    assert!(start(&broker, 0).await.unwrap());
    let ended = done(&broker).await;
    assert_eq!(ended.failed, 0, "{ended:?}");
    assert_eq!(ended.revisions_moved, u64::try_from(users.len()).unwrap());
    assert_eq!(ended.verified, ended.revisions_moved);
    assert_eq!(left(&broker).await, (0, 0));
    all_released(&broker, &users).await;
    let (site, _) = broker.stop();
    site.expect_ok(&["store", "check"]);

    std::fs::remove_dir_all(site.token.directory()).unwrap();
    let broker = Broker::start_on(site);
    all_released(&broker, &users).await;
}
