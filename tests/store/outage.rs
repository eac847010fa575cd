//! A database that is away, or that hangs: waited for at first, for it may be restarted; then known at once, and back within two
//! seconds of its return, without a restart.
//!
//! `KEYBROKER_TEST_OUTAGE_SECONDS=30` makes the outage as long as the one that is promised to be survived.

use std::{
    env,
    sync::Arc,
    time::{Duration, Instant},
};

use keybroker_store as store;
use keybroker_store::{Error, Store};
use rustix::process::Signal;
use tokio::task::JoinSet;

use super::{
    revision,
    servers::{Kind, Server},
    stamp, user,
};

/// What calls wait for a database that has just become unavailable, one more wait for a connection, and what a busy machine
/// adds.
const WAITED_OUT_WITHIN: Duration = Duration::from_secs(4);
/// Later: a second, and what a busy machine adds.
const KNOWN_WITHIN: Duration = Duration::from_millis(1_200);
const BACK_WITHIN: Duration = Duration::from_secs(2);
const AT_ONCE: Duration = Duration::from_millis(200);

fn outage() -> Duration {
    let seconds = env::var("KEYBROKER_TEST_OUTAGE_SECONDS").ok();
    Duration::from_secs(seconds.map_or(2, |text| text.parse().unwrap()))
}

/// Many callers at once: none waits in line behind another's timeout.
async fn all_fail_within(store: &Arc<dyn Store>, limit: Duration) {
    let mut calls = JoinSet::new();
    let begun = Instant::now();
    for number in 0..60_u8 {
        let store = Arc::clone(store);
        calls.spawn(async move {
            match number % 3 {
                0 => store.record(&user("alice")).await.map(drop),
                1 => store.registry().await.map(drop),
                _ => {
                    let new = revision(&user(&format!("new-{number}")), number, 1);
                    store.create(new, stamp()).await.map(drop)
                }
            }
        });
    }
    for result in calls.join_all().await {
        assert!(matches!(result, Err(Error::Down(_))), "{result:?}");
    }
    assert!(begun.elapsed() < limit, "{:?}", begun.elapsed());
}

/// As the broker does it, once a second.
async fn keep_probing(store: Arc<dyn Store>) {
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    loop {
        ticks.tick().await;
        let _known = store.ping().await;
    }
}

async fn until_back(store: &Arc<dyn Store>) {
    let begun = Instant::now();
    while store.record(&user("alice")).await.is_err() {
        assert!(begun.elapsed() < BACK_WITHIN, "{:?}", begun.elapsed());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    store.ping().await.unwrap();
}

async fn an_outage_is_survived(kind: Kind) {
    let mut server = Server::start(kind);
    let settings = server.settings(&server.database());
    store::migrate(&settings, false).await.unwrap();
    let store = store::open(&settings).await.unwrap();
    store
        .create(revision(&user("alice"), 100, 1), stamp())
        .await
        .unwrap();
    let probing = tokio::spawn(keep_probing(Arc::clone(&store)));

    server.stop();
    let begun = Instant::now();
    all_fail_within(&store, WAITED_OUT_WITHIN).await;
    all_fail_within(&store, KNOWN_WITHIN).await;
    while begun.elapsed() < outage() {
        all_fail_within(&store, KNOWN_WITHIN).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    server.run();
    until_back(&store).await;

    // It takes connections, and answers nothing.
    server.signal_all(Signal::STOP);
    tokio::time::sleep(Duration::from_millis(4_500)).await;
    all_fail_within(&store, AT_ONCE).await;
    server.signal_all(Signal::CONT);
    until_back(&store).await;
    probing.abort();
    // What failed was not done, or what was done is whole.
    for number in 0..60_u8 {
        if let Some(record) = store.record(&user(&format!("new-{number}"))).await.unwrap() {
            assert_eq!(record.envelope, format!("new-{number} 1").into_bytes());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_of_postgresql_is_survived() {
    an_outage_is_survived(Kind::PostgreSql).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_of_mariadb_is_survived() {
    an_outage_is_survived(Kind::MariaDb).await;
}
