//! Certificates that change while the broker serves.

use std::{fs, time::Duration};

use rustix::process::Signal;

use crate::{
    client::Caller,
    process::{Broker, until},
    site::Options,
};

const MATERIAL: &[u8] = b"material of this user";

/// New connections get the new certificate; the old connection goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_certificate_is_taken_over_without_dropping_connections() {
    let broker = Broker::start(Options::default());
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("ada", MATERIAL).await.unwrap();
    broker.site.pki.issue_server();
    broker.signal(Signal::HUP);
    until("the reload", || {
        broker
            .site
            .log()
            .contains("TLS files reloaded")
            .then_some(())
    });
    enroller.create("bob", MATERIAL).await.unwrap();
    let key = Caller::of(&broker, "releaser").unwrap("ada").await.unwrap();
    assert_eq!(key.key_material, MATERIAL);
}

/// A file that is no certificate leaves the old one in use, and says so once.
#[tokio::test(flavor = "multi_thread")]
async fn a_bad_certificate_leaves_the_old_one_in_use() {
    let broker = Broker::start(Options::default());
    fs::write(broker.site.pki.certificate_file("server"), "no certificate").unwrap();
    until("the refusal", || {
        broker.site.log().contains("tls-reload").then_some(())
    });
    Caller::of(&broker, "enroller")
        .create("ada", MATERIAL)
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    assert_eq!(
        broker
            .site
            .log()
            .matches("\"alert\":\"tls-reload\"")
            .count(),
        1
    );
}

/// When the client CA changes, nobody whom only the old one vouched for stays or comes back.
#[tokio::test(flavor = "multi_thread")]
async fn a_changed_client_ca_ends_old_connections() {
    let broker = Broker::start(Options::default());
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("ada", MATERIAL).await.unwrap();
    // The server's own certificate as the only CA: it vouches for nobody.
    let other = broker.site.pki.certificate_file("other-ca");
    assert!(other.is_file(), "the other CA's certificate");
    fs::copy(&other, broker.site.pki.ca_file()).unwrap();
    until("the reload", || {
        broker
            .site
            .log()
            .contains("TLS files reloaded")
            .then_some(())
    });
    let mut refused = false;
    for _ in 0..50 {
        refused = enroller.create("bob", MATERIAL).await.is_err();
        if refused {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(refused, "a client of the old CA is still served");
}
