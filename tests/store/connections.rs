//! Connections that are lost, and connections that wait: what was not certain to fail is tried again on another one, and
//! changes that wait for a lock leave connections to reads.

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use keybroker_store as store;
use keybroker_store::{Error, Store};

use super::{
    Engine, eventually, revision,
    servers::{Kind, Server},
    stamp, user,
};

/// What a client waits for its answer.
const DEADLINE: Duration = Duration::from_secs(5);
/// How long connections are ended, and a table is locked.
const TROUBLE: Duration = Duration::from_secs(3);

/// Reads until it is told to end, and says how often.
async fn keep_reading(store: Arc<dyn Store>, ended: Arc<AtomicBool>) -> u32 {
    let mut reads = 0;
    while !ended.load(Ordering::Relaxed) {
        let read = tokio::time::timeout(DEADLINE, store.record(&user("alice"))).await;
        let record = read.expect("a read within the deadline").unwrap();
        assert!(record.is_some());
        reads += 1;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    reads
}

async fn open_with_alice(engine: &Engine) -> Arc<dyn Store> {
    let store = engine.open().await;
    store
        .create(revision(&user("alice"), 200, 1), stamp())
        .await
        .unwrap();
    store
}

/// As a broker has it: with the limits that a configuration has by default.
async fn engine_of_a_broker(server: &Arc<Server>) -> Engine {
    let mut engine = Engine::on(server).await;
    let defaults = store::Settings::new("");
    engine.settings.acquire_timeout_ms = defaults.acquire_timeout_ms;
    engine.settings.statement_timeout_ms = defaults.statement_timeout_ms;
    engine.settings.lock_timeout_ms = defaults.lock_timeout_ms;
    engine
}

fn end_every_connection(engine: &Engine, kind: Kind) {
    match kind {
        Kind::PostgreSql => {
            engine.sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                 WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'",
            );
        }
        Kind::MariaDb => {
            let ids = engine.sql(
                "SELECT id FROM information_schema.processlist \
                 WHERE id <> connection_id() AND user = 'root'",
            );
            // In one call, and one that has ended meanwhile is no error.
            let kills: Vec<_> = ids.lines().map(|id| format!("KILL {id};")).collect();
            if !kills.is_empty() {
                let body = kills.concat();
                engine.sql(&format!(
                    "DELIMITER //\nBEGIN NOT ATOMIC DECLARE CONTINUE HANDLER FOR 1094 BEGIN END; {body} END//\n"
                ));
            }
        }
    }
}

async fn lost_connections_cost_no_read(kind: Kind) {
    let server = Arc::new(Server::start(kind));
    let engine = Arc::new(engine_of_a_broker(&server).await);
    let store = open_with_alice(&engine).await;
    let ended = Arc::new(AtomicBool::new(false));
    let killer = {
        let (engine, ended) = (Arc::clone(&engine), Arc::clone(&ended));
        tokio::task::spawn_blocking(move || {
            let begun = Instant::now();
            let mut rounds = 0;
            while begun.elapsed() < TROUBLE {
                end_every_connection(&engine, kind);
                rounds += 1;
                std::thread::sleep(Duration::from_millis(100));
            }
            ended.store(true, Ordering::Relaxed);
            rounds
        })
    };
    let readers: Vec<_> = (0..4)
        .map(|_| tokio::spawn(keep_reading(Arc::clone(&store), Arc::clone(&ended))))
        .collect();
    let mut acknowledged = Vec::new();
    let mut number = 0_u8;
    while !ended.load(Ordering::Relaxed) && number < 199 {
        number += 1;
        let name = user(&format!("new-{number}"));
        match store.create(revision(&name, number, 1), stamp()).await {
            Ok(_) => acknowledged.push(name),
            // The one reason why a change fails.
            Err(Error::OutcomeUnknown(_)) => {}
            Err(other) => panic!("{other}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut reads = 0;
    for reader in readers {
        reads += reader.await.unwrap();
    }
    let rounds = killer.await.unwrap();
    assert!(rounds > 3 && reads > 20 && !acknowledged.is_empty());
    println!(
        "{rounds} rounds, {reads} reads, {} changes",
        acknowledged.len()
    );
    for name in acknowledged {
        assert!(store.record(&name).await.unwrap().is_some(), "{name:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_to_postgresql_that_are_ended_cost_no_read() {
    lost_connections_cost_no_read(Kind::PostgreSql).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_to_mariadb_that_are_ended_cost_no_read() {
    lost_connections_cost_no_read(Kind::MariaDb).await;
}

/// The driver's pool tests each connection that returns to it, which is one more round trip for each call.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_cost_a_server_no_tests_of_connections() {
    const CALLS: u8 = 100;
    let server = Arc::new(Server::start(Kind::MariaDb));
    let engine = engine_of_a_broker(&server).await;
    let store = open_with_alice(&engine).await;
    let tests = || -> u64 {
        let status = engine.sql("SHOW GLOBAL STATUS LIKE 'Com_admin_commands'");
        status.split_whitespace().last().unwrap().parse().unwrap()
    };
    let before = tests();
    for number in 0..CALLS {
        let created = store.create(
            revision(&user(&format!("new-{number}")), number, 1),
            stamp(),
        );
        created.await.unwrap();
        store.record(&user("alice")).await.unwrap();
    }
    let made = tests() - before;
    assert!(
        made < u64::from(CALLS) / 2,
        "{made} tests in {CALLS} rounds"
    );
}

/// Reads and changes during a restart. Nothing is promised of one that takes longer, so such a one is repeated.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_short_restart_of_the_server_is_waited_out() {
    const SHORT: Duration = Duration::from_millis(1_500);
    let mut server = Server::start(Kind::PostgreSql);
    let settings = server.settings(&server.database());
    store::migrate(&settings, false).await.unwrap();
    let store = store::open(&settings).await.unwrap();
    store
        .create(revision(&user("alice"), 200, 1), stamp())
        .await
        .unwrap();
    for round in 1..=5_u8 {
        let ended = Arc::new(AtomicBool::new(false));
        let readers: Vec<_> = (0..4)
            .map(|_| tokio::spawn(keep_reading(Arc::clone(&store), Arc::clone(&ended))))
            .collect();
        let restarted = tokio::task::spawn_blocking(move || {
            let begun = Instant::now();
            server.stop();
            server.run();
            (server, begun.elapsed())
        });
        tokio::time::sleep(Duration::from_millis(50)).await;
        let changed = store
            .create(revision(&user(&format!("new-{round}")), round, 1), stamp())
            .await;
        let took;
        (server, took) = restarted.await.unwrap();
        ended.store(true, Ordering::Relaxed);
        let mut all_read = true;
        for reader in readers {
            all_read &= reader.await.is_ok();
        }
        println!("the server was restarted in {took:?}");
        if took < SHORT {
            assert!(all_read);
            if let Err(error) = changed {
                assert!(matches!(error, Error::OutcomeUnknown(_)), "{error}");
            }
            return;
        }
        store.record(&user("alice")).await.unwrap();
    }
    panic!("this machine never restarted the server within {SHORT:?}");
}

/// What is logged, in memory.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn start() -> Self {
        let log = Self::default();
        let writer = log.clone();
        tracing_subscriber::fmt()
            .with_max_level(tracing::Level::DEBUG)
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .init();
        log
    }

    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

async fn waiting_changes_cost_no_read(kind: Kind) {
    let log = Log::start();
    let server = Arc::new(Server::start(kind));
    let engine = Arc::new(engine_of_a_broker(&server).await);
    let store = open_with_alice(&engine).await;
    let seconds = TROUBLE.as_secs();
    let (lock, is_locked) = match kind {
        Kind::PostgreSql => (
            format!(
                "BEGIN; LOCK TABLE records, revisions, changes IN SHARE ROW EXCLUSIVE MODE; SELECT pg_sleep({seconds}); ROLLBACK"
            ),
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'",
        ),
        Kind::MariaDb => (
            format!(
                "LOCK TABLES records READ, revisions READ, changes READ; SELECT SLEEP({seconds}); UNLOCK TABLES"
            ),
            "SELECT count(*) FROM information_schema.processlist WHERE state = 'User sleep'",
        ),
    };
    let locker = {
        let engine = Arc::clone(&engine);
        tokio::task::spawn_blocking(move || engine.sql(&lock))
    };
    tokio::task::block_in_place(|| eventually(|| engine.sql(is_locked).trim() == "1"));
    let ended = Arc::new(AtomicBool::new(false));
    let mut waiting = tokio::task::JoinSet::new();
    for number in 0..60_u8 {
        let store = Arc::clone(&store);
        waiting.spawn(async move {
            let name = user(&format!("new-{number}"));
            store.create(revision(&name, number, 1), stamp()).await
        });
    }
    let readers: Vec<_> = (0..4)
        .map(|_| tokio::spawn(keep_reading(Arc::clone(&store), Arc::clone(&ended))))
        .collect();
    locker.await.unwrap();
    ended.store(true, Ordering::Relaxed);
    let mut reads = 0;
    for reader in readers {
        reads += reader.await.unwrap();
    }
    // Nearly as many as without the lock: no read stood in line behind a change.
    println!("{reads} reads beside changes that waited");
    assert!(reads > 20, "{reads}");
    waiting.join_all().await;
    // Many statements waited: each is in the log once, by its name.
    let text = log.text();
    let slow: Vec<_> = text
        .lines()
        .filter(|line| line.contains("slow database statement"))
        .collect();
    assert!(!slow.is_empty() && slow.len() <= 4, "{slow:#?}");
    assert!(slow[0].contains("statement=\"insert_"), "{slow:#?}");
    for words in ["SELECT ", "INSERT ", "select ", "insert "] {
        assert!(!text.contains(words), "{words} in {text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_that_wait_for_a_lock_of_postgresql_cost_no_read() {
    waiting_changes_cost_no_read(Kind::PostgreSql).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_that_wait_for_a_lock_of_mariadb_cost_no_read() {
    waiting_changes_cost_no_read(Kind::MariaDb).await;
}

/// A database that answers and has more to do than its connections can carry is not an outage: calls that get no connection in
/// time are told at once, with a separate reason, the others get their answers, and the probe finds nothing wrong.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_pool_is_answered_at_once_and_is_no_outage() {
    const CALLS: usize = 150;
    let server = Arc::new(Server::start(Kind::PostgreSql));
    let mut engine = engine_of_a_broker(&server).await;
    engine.settings.connections_max = 2;
    // Every look at the registry takes 200 ms, so two connections make ten in a second.
    engine.sql(
        "ALTER TABLE wrapping_keys RENAME TO keys_themselves; \
         CREATE VIEW wrapping_keys AS SELECT * FROM keys_themselves \
         WHERE (SELECT pg_sleep(0.2)) IS NOT NULL",
    );
    let store = engine.open().await;
    // Both connections are open before they are needed.
    store.ping().await.unwrap();
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..CALLS {
        let store = Arc::clone(&store);
        calls.spawn(async move { store.registry().await });
    }
    let (mut answered, mut busy) = (0, 0);
    for result in calls.join_all().await {
        match result {
            Ok(_) => answered += 1,
            Err(error @ Error::Busy(_)) => {
                busy += 1;
                assert!(error.to_string().contains("connections_max"), "{error}");
                let error = keybroker_core::error::Error::from(error);
                assert_eq!(error.reason(), keybroker_core::error::Reason::QueueFull);
                assert!(error.retry_delay().is_some() && !error.is_outcome_unknown());
            }
            Err(other) => panic!("{other}"),
        }
    }
    println!("{answered} answered, {busy} told that the database is busy");
    // They did not stand in line for as long as an outage is waited out: in that time all would have been answered.
    assert!(answered > 0 && busy > answered, "{answered} and {busy}");
    store.ping().await.unwrap();
    store.registry().await.unwrap();
}
