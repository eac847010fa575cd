//! The same suite on the modules of several makers and on the profiles of products: a token is initialised, a key is made, records are
//! stored and released, rows are swapped, a worker is killed, the broker restarts, the token is lost and restored.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::process::Signal;

use crate::{
    client::{Caller, eventually, refused},
    modules::{Maker, Stand, in_namespaces},
    process::{Broker, send, until},
    site::Site,
};

/// A token that the suite runs on: it is initialised and has no keys, and the database is migrated.
pub(crate) trait Conforming {
    fn site(&self) -> &Arc<Site>;

    /// Number of the configured workers.
    fn workers(&self) -> usize;

    /// Makes a key and registers it with the real commands.
    fn make_key(&self);

    /// Copies everything that the token keeps.
    fn back_up(&self) -> PathBuf;

    /// Removes everything that the token keeps.
    fn lose(&self);

    /// Puts a backup back.
    fn restore(&self, copy: &Path);
}

const USERS: [&str; 3] = ["ada", "bob", "eve"];

fn material(user: &str) -> Vec<u8> {
    format!("material of the user {user}").into_bytes()
}

async fn releases_all(broker: &Broker) {
    let releaser = Caller::of(broker, "releaser");
    for user in USERS {
        let released = eventually(|| releaser.unwrap(user)).await;
        assert_eq!(released.key_material, material(user), "{user}");
    }
}

/// Exchanges the ciphertexts of two users.
fn swap(site: &Site) {
    let of = |user: &str| {
        format!(
            "(record_id, revision) = (SELECT record_id, revision FROM records WHERE user = '{user}')"
        )
    };
    let [ada, bob] = ["ada", "bob"].map(of);
    site.sql(&format!(
        "BEGIN; CREATE TEMP TABLE kept AS SELECT envelope FROM revisions WHERE {ada};
         UPDATE revisions SET envelope = (SELECT envelope FROM revisions WHERE {bob}) WHERE {ada};
         UPDATE revisions SET envelope = (SELECT envelope FROM kept) WHERE {bob}; COMMIT;"
    ));
}

fn conforms(maker: Maker) {
    run_on(&Stand::new(maker));
}

/// Runs the suite.
pub(crate) fn run_on(token: &impl Conforming) {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(run(token));
}

async fn run(token: &impl Conforming) {
    token.make_key();
    let site = Arc::clone(token.site());
    site.expect_ok(&["token", "check"]);

    let broker = Broker::start_on(Arc::clone(&site));
    let enroller = Caller::of(&broker, "enroller");
    for user in USERS {
        enroller.create(user, &material(user)).await.unwrap();
    }
    releases_all(&broker).await;

    let workers = until("all workers", || {
        let workers = broker.workers();
        (workers.len() == token.workers()).then_some(workers)
    });
    send(workers[0], Signal::KILL);
    releases_all(&broker).await;
    until("another worker", || {
        let now = broker.workers();
        (now.len() == token.workers() && !now.contains(&workers[0])).then_some(())
    });
    let (_, status) = broker.stop();
    assert!(status.success(), "{status}");

    swap(&site);
    let broker = Broker::start_on(Arc::clone(&site));
    let releaser = Caller::of(&broker, "releaser");
    for user in ["ada", "bob"] {
        refused(releaser.unwrap(user).await, "RECORD_DAMAGED");
    }
    let released = releaser.unwrap("eve").await.unwrap();
    assert_eq!(released.key_material, material("eve"));
    drop(broker.stop());

    swap(&site);
    let copy = token.back_up();
    token.lose();
    let without = site.run(&["token", "check"]);
    assert_ne!(without.code, Some(0), "{without:#?}");
    // A module that shows no token any more answers at once.
    assert!(!without.stderr.contains("did not answer"), "{without:#?}");
    token.restore(&copy);
    site.expect_ok(&["token", "check"]);
    site.expect_ok(&["store", "check"]);
    let broker = Broker::start_on(Arc::clone(&site));
    releases_all(&broker).await;
    drop(broker.stop());
}

#[test]
fn softhsm_conforms() {
    conforms(Maker::SoftHsm);
}

#[test]
fn kryoptic_conforms() {
    conforms(Maker::Kryoptic);
}

/// With the exceptions of docs/tokens.md.
#[test]
fn opencryptoki_conforms() {
    if in_namespaces("conformance::opencryptoki_conforms") {
        conforms(Maker::Opencryptoki);
    }
}

/// SoftHSM behind a server: the module itself is not of another maker, but the way to it is.
#[test]
fn p11_kit_remote_conforms() {
    conforms(Maker::P11Kit);
}

/// The module wraps keys that are not extractable. Only a negative test finds that; which of the two that wrap the RSA key depends
/// on the length of the key's encoding.
#[test]
fn nss_is_refused_with_the_test_that_caught_it() {
    let stand = Stand::new(Maker::Nss);
    let generated = stand.site.run(&["key", "generate", "--bits", "2048"]);
    assert_eq!(generated.code, Some(6), "{generated:#?}");
    for words in [
        "can be wrapped with CKM_AES_KEY_WRAP",
        "(test `wrap-private-aes-kw",
        "No key was made",
    ] {
        assert!(generated.stderr.contains(words), "{generated:#?}");
    }
}
