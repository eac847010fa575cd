//! Callers that go away, and transactions that meet.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use keybroker_core::key::{RecordId, Revision};
use keybroker_store::{Error, Settings, Stamp, Store};
use sqlx::{Connection as _, MySqlConnection, PgConnection};

use super::{Engine, address, record_id, revision, scope, servers::Kind, stamp, stamp_with, user};

/// Handlers are cancelled when deadlines pass and clients leave. A connection left inside a transaction would break every
/// later writer, and keep what it wrote from everybody.
pub(crate) async fn cancelled_calls_poison_nothing(engine: &Engine) {
    let store = engine.open().await;
    for number in 0..1_000_u16 {
        let store = Arc::clone(&store);
        let task = tokio::spawn(async move {
            let at = user(&format!("user-{number}"));
            let mut new = revision(&at, 0, 1);
            new.record = numbered(number);
            store.create(new, stamp()).await.ok();
            store.record(&at).await.ok();
        });
        tokio::time::sleep(Duration::from_micros(u64::from(number % 37) * 20)).await;
        task.abort();
    }
    let last = address("default", "last", "k");
    store
        .create(revision(&last, 200, 1), stamp())
        .await
        .unwrap();
    store.ping().await.unwrap();
    assert!(store.record(&last).await.unwrap().is_some());
    // What was begun ends; then nothing is left open.
    store.close().await;
    let open = engine.sql(engine.pick(
        "SELECT 0",
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in%'",
        "SELECT count(*) FROM information_schema.innodb_trx",
    ));
    assert_eq!(open.trim(), "0");
    // None is half done.
    let halves = engine.sql(
        "SELECT (SELECT count(*) FROM records) - (SELECT count(*) FROM revisions), \
         (SELECT count(*) FROM records) - (SELECT count(*) FROM changes)",
    );
    assert_eq!(halves.trim().replace(['|', '\t'], " "), "0 0");
    let written: u32 = engine
        .sql("SELECT count(*) FROM records")
        .trim()
        .parse()
        .unwrap();
    assert!(
        written > 1,
        "all calls were cancelled before they did anything"
    );
}

fn numbered(number: u16) -> RecordId {
    let mut id = [7; 16];
    id[..2].copy_from_slice(&number.to_be_bytes());
    RecordId::from_bytes(id)
}

/// Another client of the same database, which does what it likes.
enum Intruder {
    PostgreSql(PgConnection),
    MariaDb(MySqlConnection),
}

impl Intruder {
    async fn connect(engine: &Engine) -> Self {
        let url = engine.settings.url.as_str();
        let (place, socket) = url.split_once("?socket=").unwrap();
        match engine.kind().unwrap() {
            Kind::PostgreSql => {
                let (folder, port) = socket.rsplit_once("/.s.PGSQL.").unwrap();
                let options = sqlx::postgres::PgConnectOptions::new_without_pgpass()
                    .username("admin")
                    .database(place.rsplit_once('/').unwrap().1)
                    .port(port.parse().unwrap())
                    .socket(folder);
                Self::PostgreSql(PgConnection::connect_with(&options).await.unwrap())
            }
            Kind::MariaDb => {
                let options = sqlx::mysql::MySqlConnectOptions::new()
                    .username("root")
                    .database(place.rsplit_once('/').unwrap().1)
                    .socket(socket);
                Self::MariaDb(MySqlConnection::connect_with(&options).await.unwrap())
            }
        }
    }

    /// Runs statements; says whether the database let it.
    async fn try_run(&mut self, statements: String) -> Result<(), sqlx::Error> {
        let sql = sqlx::raw_sql(sqlx::AssertSqlSafe(statements));
        match self {
            Self::PostgreSql(connection) => sql.execute(connection).await.map(drop),
            Self::MariaDb(connection) => sql.execute(connection).await.map(drop),
        }
    }

    async fn run(&mut self, statements: impl Into<String>) {
        self.try_run(statements.into()).await.unwrap();
    }
}

fn hex(engine: &Engine, bytes: &[u8; 16]) -> String {
    let digits = hex::encode(bytes);
    engine.pick(
        String::new(),
        format!("'\\x{digits}'::bytea"),
        format!("x'{digits}'"),
    )
}

async fn store_with(engine: &Engine, change: impl FnOnce(&mut Settings)) -> Arc<dyn Store> {
    let mut settings = engine.settings.clone();
    change(&mut settings);
    keybroker_store::open(&settings).await.unwrap()
}

const HOLD: &str = "SELECT 1 FROM records WHERE record_id = ";

pub(crate) async fn a_lock_that_is_held_is_waited_for_and_tried_again(engine: &Engine) {
    let store = store_with(engine, |settings| {
        settings.lock_timeout_ms = 1_000;
        settings.statement_timeout_ms = 5_000;
    })
    .await;
    let alice = user("alice");
    store.create(revision(&alice, 1, 1), stamp()).await.unwrap();
    let mut intruder = Intruder::connect(engine).await;
    let id = hex(engine, record_id(1).as_bytes());
    intruder.run(format!("BEGIN; {HOLD}{id} FOR UPDATE")).await;
    let replacing = tokio::spawn({
        let store = Arc::clone(&store);
        async move {
            store
                .supersede(revision(&user("alice"), 1, 2), stamp())
                .await
        }
    });
    // Beyond the lock timeout: the first attempt is undone.
    tokio::time::sleep(Duration::from_millis(1_400)).await;
    assert!(!replacing.is_finished());
    // Reads wait for nobody.
    let seen = store.record(&alice).await.unwrap().unwrap();
    assert_eq!(seen.info.revision, Revision::FIRST);
    intruder.run("COMMIT").await;
    let replaced = replacing.await.unwrap().unwrap();
    assert_eq!(replaced.revision.get(), 2);
}

/// What the server gave up after its limit is not asked for again: it would only take as long once more.
pub(crate) async fn a_query_that_was_cut_off_is_not_repeated(engine: &Engine) {
    const LIMIT: Duration = Duration::from_secs(1);
    let store = store_with(engine, |settings| {
        settings.statement_timeout_ms = 1_000;
    })
    .await;
    let mut intruder = Intruder::connect(engine).await;
    let lock = engine.pick(
        "",
        "BEGIN; LOCK TABLE records IN ACCESS EXCLUSIVE MODE",
        "LOCK TABLES records WRITE",
    );
    intruder.run(lock).await;
    let begun = Instant::now();
    let refused = store.record(&user("alice")).await.unwrap_err();
    assert!(matches!(refused, Error::Down(_)), "{refused:?}");
    assert!(begun.elapsed() >= LIMIT, "{:?}", begun.elapsed());
    assert!(begun.elapsed() < LIMIT * 19 / 10, "{:?}", begun.elapsed());
    let unlock = engine.pick("", "COMMIT", "UNLOCK TABLES");
    intruder.run(unlock).await;
}

pub(crate) async fn a_lock_that_is_never_given_back_ends_in_an_error(engine: &Engine) {
    let store = store_with(engine, |settings| {
        settings.lock_timeout_ms = 100;
        settings.statement_timeout_ms = 500;
    })
    .await;
    store
        .create(revision(&user("alice"), 1, 1), stamp())
        .await
        .unwrap();
    let mut intruder = Intruder::connect(engine).await;
    let id = hex(engine, record_id(1).as_bytes());
    intruder.run(format!("BEGIN; {HOLD}{id} FOR UPDATE")).await;
    let begun = Instant::now();
    let refused = store
        .supersede(revision(&user("alice"), 1, 2), stamp())
        .await
        .unwrap_err();
    assert!(
        matches!(refused, Error::Contended(_) | Error::Down(_)),
        "{refused}"
    );
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "{:?}",
        begun.elapsed()
    );
    intruder.run("ROLLBACK").await;
    let replaced = store
        .supersede(revision(&user("alice"), 1, 2), stamp())
        .await
        .unwrap();
    assert_eq!(replaced.revision.get(), 2);
}

/// The intruder and the store each hold what the other waits for; the database undoes the store's transaction.
pub(crate) async fn a_deadlock_is_tried_again(engine: &Engine) {
    let store = store_with(engine, |settings| {
        settings.lock_timeout_ms = 10_000;
        settings.statement_timeout_ms = 20_000;
    })
    .await;
    let deadlocks = || -> u64 {
        let text = engine.sql(engine.pick(
            "",
            "SELECT pg_stat_force_next_flush(); SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()",
            "SELECT variable_value FROM information_schema.global_status WHERE variable_name = 'Innodb_deadlocks'",
        ));
        text.trim().parse().unwrap()
    };
    store
        .create(revision(&user("alice"), 1, 1), stamp())
        .await
        .unwrap();
    let before = deadlocks();
    let mut intruder = Intruder::connect(engine).await;
    let id = hex(engine, record_id(1).as_bytes());
    // Of more weight than the store's transaction, so that MariaDB undoes the latter.
    let heavy = (1..50_u8).map(|number| {
        let call = hex(engine, &[number; 16]);
        format!("INSERT INTO changes VALUES ({call}, {call}, 0); ")
    });
    let heavy: String = heavy.collect();
    intruder
        .run(format!("BEGIN; {heavy}{HOLD}{id} FOR UPDATE"))
        .await;
    let mark = stamp();
    let replacing = tokio::spawn({
        let (store, mark) = (Arc::clone(&store), mark.clone());
        async move { store.supersede(revision(&user("alice"), 1, 2), mark).await }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    let call = hex(engine, mark.call.as_bytes());
    intruder
        .run(format!("INSERT INTO changes VALUES ({call}, {call}, 0)"))
        .await;
    intruder.run("ROLLBACK").await;
    let replaced = replacing.await.unwrap().unwrap();
    assert_eq!(replaced.revision.get(), 2);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(deadlocks() > before, "there was no deadlock");
}

/// After a broker lost its connection, its transaction may still be under way on the server. Whoever asks what became of it
/// must not hear "nothing" from a database that commits it a moment later.
pub(crate) async fn a_call_in_flight_is_not_said_to_have_failed(engine: &Engine) {
    let store = store_with(engine, |settings| {
        settings.lock_timeout_ms = 1_000;
        settings.statement_timeout_ms = 1_000;
    })
    .await;
    let Stamp { call, .. } = stamp();
    let mark = hex(engine, call.as_bytes());
    let mut intruder = Intruder::connect(engine).await;
    intruder
        .run(format!(
            "BEGIN; INSERT INTO changes VALUES ({mark}, {mark}, 0)"
        ))
        .await;
    let unknown = store.committed_by(call).await;
    assert!(unknown.is_err(), "{unknown:?}");
    let asking = tokio::spawn({
        let store = Arc::clone(&store);
        async move { store.committed_by(call).await }
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    intruder.run("COMMIT").await;
    assert!(asking.await.unwrap().unwrap());
    intruder
        .run(format!("DELETE FROM changes WHERE call_id = {mark}"))
        .await;
    assert!(!store.committed_by(call).await.unwrap());
}

/// Two brokers: what one writes the other sees at once, and of two that change the same thing one wins.
pub(crate) async fn two_stores_on_one_database_agree(engine: &Engine) {
    let (one, two) = (engine.open().await, engine.open().await);
    let mine = scope("me", "7d444840-9dc0-11d1-b245-5ffdce74fad2");
    let written = stamp_with(mine.clone());
    let created = one
        .create(revision(&user("a"), 1, 1), written.clone())
        .await
        .unwrap();
    assert_eq!(two.record(&user("a")).await.unwrap().unwrap().info, created);
    assert_eq!(two.request(&mine).await.unwrap().unwrap().result, created);
    assert!(two.committed_by(written.call).await.unwrap());
    let taken = two
        .create(revision(&user("b"), 2, 1), stamp_with(mine))
        .await;
    assert!(matches!(taken, Err(Error::RequestIdTaken)), "{taken:?}");
    for number in 2..30 {
        let (left, right) = tokio::join!(
            one.supersede(revision(&user("a"), 1, number), stamp()),
            two.supersede(revision(&user("a"), 1, number), stamp())
        );
        let (won, lost) = if left.is_ok() {
            (left, right)
        } else {
            (right, left)
        };
        let won = won.unwrap();
        assert_eq!(won.revision.get(), number);
        assert!(
            matches!(lost, Err(Error::Revision { current }) if current.get() == number),
            "{lost:?}"
        );
        assert_eq!(one.record(&user("a")).await.unwrap().unwrap().info, won);
    }
}
