//! A database that is an earlier state of itself: nothing is released or changed until an operator accepts it.

use std::fs;

use crate::{
    client::{Caller, eventually, refused},
    process::{Broker, until},
    site::{Options, Site},
};

const MATERIAL: &[u8] = b"material of this user";

fn is_refused_with_an_alert(site: &Site) {
    until("the alert", || {
        site.log().contains("store-restored").then_some(())
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn an_earlier_state_of_the_database_is_refused_until_it_is_accepted() {
    let broker = Broker::start(Options::default());
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("ada", MATERIAL).await.unwrap();
    let (site, _) = broker.stop();
    let backup = fs::read(site.database()).unwrap();

    let broker = Broker::start_on(site);
    Caller::of(&broker, "enroller")
        .create("bob", MATERIAL)
        .await
        .unwrap();
    let (site, _) = broker.stop();
    let newest = fs::read(site.database()).unwrap();
    fs::write(site.database(), &backup).unwrap();

    let broker = Broker::start_on(site);
    let releaser = Caller::of(&broker, "releaser");
    refused(releaser.unwrap("ada").await, "STORE_DOWN");
    let enroller = Caller::of(&broker, "enroller");
    refused(enroller.create("eve", MATERIAL).await, "STORE_DOWN");
    is_refused_with_an_alert(&broker.site);

    // Put right, it serves without a word of an operator.
    let (site, _) = broker.stop();
    fs::write(site.database(), &newest).unwrap();
    let broker = Broker::start_on(site);
    for user in ["ada", "bob"] {
        Caller::of(&broker, "releaser").unwrap(user).await.unwrap();
    }

    // Accepted, beside the broker.
    let (site, _) = broker.stop();
    fs::write(site.database(), &backup).unwrap();
    let broker = Broker::start_on(site);
    let releaser = Caller::of(&broker, "releaser");
    refused(releaser.unwrap("ada").await, "STORE_DOWN");
    broker.site.expect_ok(&["store", "accept-restored"]);
    eventually(|| releaser.unwrap("ada")).await;
    refused(releaser.unwrap("bob").await, "KEY_NOT_FOUND");
    Caller::of(&broker, "enroller")
        .create("bob", MATERIAL)
        .await
        .unwrap();
}

/// A broker that is killed remembers, and one whose database changes while it serves acknowledges nothing any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_goes_back_under_a_broker_takes_no_change() {
    let broker = Broker::start(Options::default());
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("ada", MATERIAL).await.unwrap();
    broker.site.sql("DELETE FROM changes");
    refused(enroller.create("bob", MATERIAL).await, "STORE_DOWN");
    let releaser = Caller::of(&broker, "releaser");
    refused(releaser.unwrap("ada").await, "STORE_DOWN");
    is_refused_with_an_alert(&broker.site);
    let fact = broker.site.audit_directory().join("state/acknowledged");
    until("the fact", || fact.exists().then_some(()));

    let broker = Broker::start_on(broker.kill());
    let releaser = Caller::of(&broker, "releaser");
    refused(releaser.unwrap("ada").await, "STORE_DOWN");
    broker.site.expect_ok(&["store", "accept-restored"]);
    eventually(|| releaser.unwrap("ada")).await;
}
