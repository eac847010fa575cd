//! Two brokers on one PostgreSQL and one token are restarted in turn, and killed, while clients enrol, release and replace.
//!
//! `KEYBROKER_TEST_RESTARTS=50` restarts and kills each broker so many times; the suite itself makes do with one.

use std::{
    env,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use rustix::process::Signal;
use tokio::task::{JoinSet, block_in_place};
use tonic::Status;

use crate::{
    client::{Caller, retrying},
    databases::{start_instance, unique},
    process::Broker,
    servers::{Kind, Server, section},
    site::{Options, Site},
};

const CLIENTS: usize = 4;
const FIRST: &[u8] = b"the first material";
const SECOND: &[u8] = b"the second material";
/// Between one restart and the next: both brokers serve.
const BETWEEN: Duration = Duration::from_millis(500);

fn rounds() -> u32 {
    let rounds = env::var("KEYBROKER_TEST_RESTARTS").ok();
    rounds.map_or(1, |text| text.parse().unwrap())
}

/// A client that knows two addresses and takes them in turn: another attempt goes to the other broker.
#[derive(Clone, Default)]
struct Client {
    brokers: Arc<Mutex<Vec<(Caller, Caller)>>>,
    attempts: Arc<AtomicUsize>,
    calls: Arc<AtomicUsize>,
}

impl Client {
    fn set(&self, brokers: &[&Broker]) {
        let callers = |broker: &&Broker| {
            (
                Caller::of(broker, "enroller"),
                Caller::of(broker, "releaser"),
            )
        };
        *self.brokers.lock().unwrap() = brokers.iter().map(callers).collect();
    }

    /// The way of one call: each of its attempts asks for enroller and releaser at the next broker.
    fn call(&self) -> impl FnMut() -> (Caller, Caller) {
        let client = self.clone();
        let mut turn = self.calls.fetch_add(1, Ordering::Relaxed);
        move || {
            client.attempts.fetch_add(1, Ordering::Relaxed);
            turn += 1;
            let brokers = client.brokers.lock().unwrap();
            brokers[turn % brokers.len()].clone()
        }
    }

    async fn create(&self, user: &str) -> Result<u64, Status> {
        let (mut next, id) = (self.call(), unique());
        let created = retrying(|| {
            let (enroller, id) = (next().0, id.clone());
            async move { enroller.create_with_id(user, FIRST, &id).await }
        });
        Ok(created.await?.revision)
    }

    async fn replace(&self, user: &str) -> Result<u64, Status> {
        let (mut next, id) = (self.call(), unique());
        let replaced = retrying(|| {
            let (enroller, id) = (next().0, id.clone());
            async move { enroller.replace(user, SECOND, 1, &id).await }
        });
        Ok(replaced.await?.revision)
    }

    async fn unwrap(&self, user: &str) -> Result<Vec<u8>, Status> {
        let mut next = self.call();
        let released = retrying(|| {
            let releaser = next().1;
            async move { releaser.unwrap(user).await }
        });
        Ok(released.await?.key_material)
    }

    /// A user's key, from its enrolment on.
    async fn use_a_key(&self, user: &str) -> Result<(), Status> {
        assert_eq!(self.create(user).await?, 1);
        assert_eq!(self.unwrap(user).await?, FIRST);
        assert_eq!(self.replace(user).await?, 2);
        assert_eq!(self.unwrap(user).await?, SECOND);
        Ok(())
    }

    /// One key after another until told to stop; returns how many.
    async fn run(self, number: usize, stop: Arc<AtomicBool>) -> usize {
        let mut done = 0;
        while !stop.load(Ordering::Relaxed) {
            let user = format!("{number}-{done}");
            let used = self.use_a_key(&user).await;
            used.unwrap_or_else(|status| panic!("{user}: {status:?}"));
            done += 1;
        }
        done
    }
}

fn restart(site: &Arc<Site>, broker: &mut Broker, name: &str, signal: Signal) {
    broker.signal(signal);
    let status = broker.wait();
    assert_eq!(status.success(), signal == Signal::TERM, "{status}");
    *broker = start_instance(site, name);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_is_not_noticed_and_every_change_is_made_once() {
    let server = Server::start(Kind::PostgreSql);
    let database = server.database();
    let site = Arc::new(Site::fresh(Options {
        store: Some(section(&server.settings(&database))),
        ..Options::default()
    }));
    let mut brokers = ["one", "two"].map(|name| start_instance(&site, name));
    let client = Client::default();
    client.set(&brokers.each_ref());
    let stop = Arc::new(AtomicBool::new(false));
    let mut load = JoinSet::new();
    for number in 0..CLIENTS {
        load.spawn(client.clone().run(number, Arc::clone(&stop)));
    }
    for _ in 0..rounds() {
        for signal in [Signal::TERM, Signal::KILL] {
            for (number, name) in ["one", "two"].into_iter().enumerate() {
                tokio::time::sleep(BETWEEN).await;
                block_in_place(|| restart(&site, &mut brokers[number], name, signal));
                client.set(&brokers.each_ref());
            }
        }
    }
    tokio::time::sleep(BETWEEN).await;
    stop.store(true, Ordering::Relaxed);
    let keys: usize = load.join_all().await.into_iter().sum();

    let calls = client.calls.load(Ordering::Relaxed);
    let attempts = client.attempts.load(Ordering::Relaxed);
    println!(
        "{} stops: {keys} keys, {calls} calls, {attempts} attempts, no error",
        4 * rounds()
    );
    assert_eq!(calls, 4 * keys);
    assert!(
        keys > CLIENTS && attempts > calls,
        "nobody noticed anything at all: {keys} keys, {calls} calls, {attempts} attempts"
    );
    // Two changes of each key, and what each of them left behind, once.
    let count = |what: &str| -> usize {
        let counted = server.sql(&database, &format!("SELECT count(*) FROM {what};"));
        counted.trim().parse().unwrap()
    };
    assert_eq!(
        count("records WHERE state = 'active' AND revision = 2"),
        keys
    );
    assert_eq!(count("records"), keys);
    for table in ["revisions", "changes", "requests"] {
        assert_eq!(count(table), 2 * keys, "{table}");
    }
    site.expect_ok(&["audit", "verify"]);
}
