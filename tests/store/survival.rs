//! An acknowledged write survives SIGKILL of the writer and of the database server, and none is half done.
//!
//! `KEYBROKER_TEST_KILLS=1000` gives the count of kills that is promised; the suite itself makes do with a few.

use std::{
    collections::BTreeMap,
    env,
    io::{BufRead as _, BufReader, Write as _},
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use keybroker_core::key::RecordId;
use keybroker_store as store;
use keybroker_store::Settings;

use super::{
    Engine, Place, revision,
    servers::{Kind, Server},
    stamp, user,
};

const CHILD: &str = "KEYBROKER_TEST_STORE_SETTINGS";
const KILLS: &str = "KEYBROKER_TEST_KILLS";

fn kills(few: u64) -> u64 {
    env::var(KILLS).map_or(few, |text| text.parse().unwrap())
}

/// A moment that is another one in each round: between one write and a few hundred.
fn moment(round: u64) -> Duration {
    Duration::from_micros(round * 7_919_117 % 211_003)
}

/// As a child: creates and replaces records, and says each change once it is acknowledged. Ends when the database does.
async fn write_until_killed(settings: &Settings) {
    let Ok(store) = store::open(settings).await else {
        return;
    };
    let unique = uuid::Uuid::new_v4();
    for number in 0..100_000_u64 {
        let name = format!("{unique}-{number}");
        let mut new = revision(&user(&name), 0, 1);
        let mut id = *unique.as_bytes();
        id[8..].copy_from_slice(&number.to_be_bytes());
        new.record = RecordId::from_bytes(id);
        let mut next = revision(&user(&name), 0, 2);
        next.record = new.record;
        for (revision, change) in [(1, new), (2, next)] {
            let done = match revision {
                1 => store.create(change, stamp()).await,
                _ => store.supersede(change, stamp()).await,
            };
            if done.is_err() {
                return;
            }
            let mut stdout = std::io::stdout().lock();
            writeln!(stdout, "acknowledged {name} {revision}").unwrap();
            stdout.flush().unwrap();
        }
    }
}

/// Runs a child, calls `kill` once the child has written something, and takes down what was acknowledged.
fn one_round(
    test: &str,
    settings: &Settings,
    acknowledged: &Mutex<BTreeMap<String, u64>>,
    kill: impl FnOnce(&mut std::process::Child),
) {
    let mut child = Command::new(env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env(CHILD, serde_json::to_string(settings).unwrap())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let (writes, has_written) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let reading = scope.spawn(move || {
            for line in lines.map_while(Result::ok) {
                if let Some((_, change)) = line.split_once("acknowledged ") {
                    let (name, revision) = change.split_once(' ').unwrap();
                    let mut acknowledged = acknowledged.lock().unwrap();
                    acknowledged.insert(name.to_owned(), revision.parse().unwrap());
                    // Nobody listens after the first.
                    writes.send(()).ok();
                }
            }
        });
        let timeout = Duration::from_secs(20);
        has_written
            .recv_timeout(timeout)
            .expect("the child has written nothing");
        kill(&mut child);
        child.wait().unwrap();
        reading.join().unwrap();
    });
}

/// Everything that was acknowledged is there, and every change is whole.
async fn nothing_is_lost(engine: &Engine, acknowledged: &BTreeMap<String, u64>) {
    let store = engine.open().await;
    for (name, revision) in acknowledged {
        let record = store.record(&user(name)).await.unwrap();
        let record = record.unwrap_or_else(|| panic!("{name} was acknowledged and is lost"));
        let current = record.info.revision.get();
        assert!(
            current >= *revision,
            "{name}: revision {revision} was acknowledged and is lost"
        );
        assert_eq!(record.envelope, format!("{name} {current}").into_bytes());
    }
    store.close().await;
    let halves = engine.sql(
        "SELECT (SELECT count(*) FROM changes) - (SELECT count(*) FROM revisions), \
         (SELECT coalesce(sum(revision), 0) FROM records) - (SELECT count(*) FROM revisions)",
    );
    assert_eq!(halves.trim().replace(['|', '\t'], " "), "0 0");
}

/// Whether this process is the child.
async fn is_child() -> bool {
    let Ok(settings) = env::var(CHILD) else {
        return false;
    };
    write_until_killed(&serde_json::from_str(&settings).unwrap()).await;
    true
}

async fn survives_sigkill_of_the_writer(test: &str, engine: Engine, few: u64) {
    let acknowledged = Mutex::default();
    for round in 0..kills(few) {
        one_round(test, &engine.settings, &acknowledged, |child| {
            std::thread::sleep(moment(round));
            child.kill().unwrap();
        });
    }
    let acknowledged = acknowledged.into_inner().unwrap();
    nothing_is_lost(&engine, &acknowledged).await;
    println!(
        "{test}: {} records over {} kills",
        acknowledged.len(),
        kills(few)
    );
}

async fn survives_sigkill_of_the_server(test: &str, kind: Kind, few: u64) {
    let server = Server::start(kind);
    let database = server.database();
    let settings = server.settings(&database);
    store::migrate(&settings, false).await.unwrap();
    let mut server = Some(server);
    let acknowledged = Mutex::default();
    for round in 0..kills(few) {
        let mut running = server.take().unwrap();
        one_round(test, &settings, &acknowledged, |_| {
            std::thread::sleep(moment(round));
            running.kill();
        });
        running.run();
        server = Some(running);
    }
    let acknowledged = acknowledged.into_inner().unwrap();
    let engine = Engine {
        place: Place::Server(Arc::new(server.unwrap()), database),
        settings,
    };
    nothing_is_lost(&engine, &acknowledged).await;
    println!(
        "{test}: {} records over {} kills",
        acknowledged.len(),
        kills(few)
    );
}

#[tokio::test]
async fn sqlite_survives_sigkill_of_the_writer() {
    if !is_child().await {
        let test = "survival::sqlite_survives_sigkill_of_the_writer";
        survives_sigkill_of_the_writer(test, Engine::sqlite().await, 20).await;
    }
}

#[tokio::test]
async fn postgresql_survives_sigkill_of_the_writer() {
    if !is_child().await {
        let test = "survival::postgresql_survives_sigkill_of_the_writer";
        let server = Arc::new(Server::start(Kind::PostgreSql));
        survives_sigkill_of_the_writer(test, Engine::on(&server).await, 10).await;
    }
}

#[tokio::test]
async fn mariadb_survives_sigkill_of_the_writer() {
    if !is_child().await {
        let test = "survival::mariadb_survives_sigkill_of_the_writer";
        let server = Arc::new(Server::start(Kind::MariaDb));
        survives_sigkill_of_the_writer(test, Engine::on(&server).await, 10).await;
    }
}

#[tokio::test]
async fn postgresql_survives_its_own_sigkill() {
    if !is_child().await {
        let test = "survival::postgresql_survives_its_own_sigkill";
        survives_sigkill_of_the_server(test, Kind::PostgreSql, 4).await;
    }
}

#[tokio::test]
async fn mariadb_survives_its_own_sigkill() {
    if !is_child().await {
        let test = "survival::mariadb_survives_its_own_sigkill";
        survives_sigkill_of_the_server(test, Kind::MariaDb, 4).await;
    }
}
