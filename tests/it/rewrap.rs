//! A re-wrap with the real binary: under calls, cut off by SIGKILL, with damaged rows, beside changes, and on database servers.
//!
//! `KEYBROKER_TEST_REWRAP_ROWS=100000 KEYBROKER_TEST_REWRAP_KILLS=100` sets the size of the test with SIGKILL; docs/reliability.md has
//! the command. More than 2,000 rows are written by `bench --seed`.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, stream};
use keybroker_proto::{
    CreateClientCredentialRequest, GetRewrapRequest, GetRewrapResponse, Rewrap, RewrapState,
    StartRewrapRequest,
};
use serde_json::Value;
use tonic::Status;

use crate::{
    client::Caller,
    client_commands::calling,
    client_credentials::GRANT_ENROL,
    databases::unique,
    process::Broker,
    site::{Finished, Options, Site},
    wire::get,
};

mod cut_off;
mod listed;
mod measure;
mod requests;
mod states;
mod tokens;

/// A re-wrap of the test suite takes seconds; one of the long test takes minutes.
const DONE_WITHIN: Duration = Duration::from_mins(2);
/// Pause of a caller between two rounds of calls.
const ROUND_PAUSE: Duration = Duration::from_millis(250);

fn material(user: &str) -> Vec<u8> {
    format!("material of the user {user}").into_bytes()
}

fn names(count: usize) -> Vec<String> {
    (0..count)
        .map(|number| format!("user-{number:05}"))
        .collect()
}

async fn enrol(broker: &Broker, users: &[String]) {
    let enroller = Caller::of(broker, "enroller");
    stream::iter(users)
        .for_each_concurrent(16, |user| {
            let enroller = enroller.clone();
            async move {
                enroller.create(user, &material(user)).await.unwrap();
            }
        })
        .await;
}

/// A site whose users are enrolled under its first wrapping key. A second wrapping key wraps from now on.
async fn two_keys(options: Options, users: &[String]) -> Arc<Site> {
    let site = Arc::new(Site::fresh(options));
    let broker = Broker::start_on(site);
    enrol(&broker, users).await;
    let (site, status) = broker.stop();
    assert!(status.success(), "{status}");
    second_key(&site);
    site
}

fn second_key(site: &Site) {
    site.expect_ok(&["key", "generate", "--bits", "2048"]);
}

fn on_sqlite() -> Options {
    Options {
        limits: GRANT_ENROL.to_owned(),
        ..Options::default()
    }
}

/// Like [`two_keys`]. If `is_seeded`, `bench` writes the rows, and the rows have other users than `users`.
async fn two_keys_and_rows(
    options: Options,
    rows: usize,
    users: &[String],
    is_seeded: bool,
) -> Arc<Site> {
    if !is_seeded {
        return two_keys(options, users).await;
    }
    let site = Arc::new(Site::fresh(options));
    let pki = &site.pki;
    let certificate = pki.certificate_file("releaser");
    let key = pki.key_file("releaser");
    let ca = pki.ca_file();
    site.expect_ok(&[
        "bench",
        "--seed",
        &rows.to_string(),
        "--ca",
        ca.to_str().unwrap(),
        "--cert",
        certificate.to_str().unwrap(),
        "--key",
        key.to_str().unwrap(),
        "--seconds",
        "1",
        "--warm-up",
        "0",
        "--connections",
        "1",
    ]);
    second_key(&site);
    site
}

/// Counts how often each row is moved, by a trigger in the database.
fn count_moves(site: &Site) {
    site.sql(
        "CREATE TABLE moved (record_id BLOB, revision INTEGER, from_key BLOB);
         CREATE TRIGGER note_move AFTER UPDATE OF envelope ON revisions
         BEGIN INSERT INTO moved VALUES (old.record_id, old.revision, old.wrapping_key_id); END;",
    );
}

fn moves(site: &Site) -> (u64, u64) {
    let text = site.sql("SELECT count(*), count(DISTINCT hex(record_id) || revision) FROM moved;");
    let (all, distinct) = text.trim().split_once('|').unwrap();
    (all.parse().unwrap(), distinct.parse().unwrap())
}

async fn start(broker: &Broker, rate: u32) -> Result<bool, Status> {
    let request = StartRewrapRequest {
        source_wrapping_key_id: Vec::new(),
        rows_per_second_max: rate,
        from_compromised: false,
    };
    let mut admin = Caller::of(broker, "admin").control;
    Ok(admin.start_rewrap(request).await?.into_inner().started)
}

async fn status(broker: &Broker) -> GetRewrapResponse {
    let mut admin = Caller::of(broker, "admin").control;
    let answer = admin.get_rewrap(GetRewrapRequest {}).await;
    answer.unwrap().into_inner()
}

/// Waits until the run has ended.
async fn done(broker: &Broker) -> Rewrap {
    let begun = Instant::now();
    loop {
        let rewrap = status(broker).await.rewrap.unwrap();
        if rewrap.state() == RewrapState::Done {
            return rewrap;
        }
        assert!(begun.elapsed() < DONE_WITHIN, "{rewrap:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Every wrapping key other than the target, with the rows that need it.
async fn left(broker: &Broker) -> (u64, u64) {
    let status = status(broker).await;
    let target = status.rewrap.unwrap().target_wrapping_key_id;
    let others = status
        .uses
        .iter()
        .filter(|uses| uses.wrapping_key_id != target);
    others.fold((0, 0), |(revisions, clients), uses| {
        (revisions + uses.revisions, clients + uses.clients)
    })
}

async fn all_released(broker: &Broker, users: &[String]) {
    let releaser = Caller::of(broker, "releaser");
    stream::iter(users)
        .for_each_concurrent(8, |user| {
            let releaser = releaser.clone();
            async move {
                let released = releaser.unwrap(user).await.unwrap();
                assert_eq!(released.key_material, material(user), "{user}");
            }
        })
        .await;
}

/// `keybroker rewrap` with the certificate of an administrator.
fn command(broker: &Broker, arguments: &[&str]) -> Finished {
    admin_command(broker, &["rewrap"], arguments)
}

/// A command that calls the admin API, with the certificate of an administrator.
fn admin_command(broker: &Broker, name: &[&str], arguments: &[&str]) -> Finished {
    let mut command = calling(broker, name, "admin", arguments);
    Finished::from(command.output().unwrap())
}

fn json(finished: &Finished) -> Value {
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    serde_json::from_str(&finished.stdout).unwrap()
}

/// Callers that change and read their own users until they are stopped. A call that fails is a panic.
struct Callers {
    stop: Arc<AtomicBool>,
    calls: Arc<AtomicU32>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Callers {
    fn start(broker: &Broker, users: &[String]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let calls = Arc::new(AtomicU32::new(0));
        let tasks = users
            .chunks(users.len().div_ceil(3))
            .map(|own| {
                let callers =
                    ["releaser", "enroller", "lifecycle"].map(|name| Caller::of(broker, name));
                let (stop, calls) = (Arc::clone(&stop), Arc::clone(&calls));
                tokio::spawn(change_in_turn(callers, own.to_vec(), stop, calls))
            })
            .collect();
        Self { stop, calls, tasks }
    }

    /// Returns the number of calls.
    async fn stop(self) -> u32 {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.unwrap();
        }
        self.calls.load(Ordering::Relaxed)
    }
}

async fn change_in_turn(
    [releaser, enroller, lifecycle]: [Caller; 3],
    users: Vec<String>,
    stop: Arc<AtomicBool>,
    calls: Arc<AtomicU32>,
) {
    let mut revisions = vec![1; users.len()];
    for turn in (0..users.len()).cycle() {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let (user, revision) = (&users[turn], &mut revisions[turn]);
        releaser.unwrap(user).await.unwrap();
        let (material, id) = (material(user), unique());
        let replaced = enroller.replace(user, &material, *revision, &id);
        replaced.await.unwrap();
        *revision += 1;
        lifecycle.delete(user, *revision).await.unwrap();
        lifecycle.undelete(user).await.unwrap();
        lifecycle.restore(user, 1, *revision).await.unwrap();
        *revision += 1;
        calls.fetch_add(5, Ordering::Relaxed);
        // The run gives way to calls. Without a pause, the callers would write revisions faster than the run moves them.
        tokio::time::sleep(ROUND_PAUSE).await;
    }
}

/// A record with two revisions, a deleted record, and an API client.
async fn one_of_each_kind(broker: &Broker) {
    let [enroller, lifecycle, admin] =
        ["enroller", "lifecycle", "admin"].map(|name| Caller::of(broker, name));
    enroller
        .create("twice", b"the first material")
        .await
        .unwrap();
    let second = enroller.replace("twice", b"the second material", 1, "");
    second.await.unwrap();
    enroller
        .create("deleted", b"material that was deleted")
        .await
        .unwrap();
    lifecycle.delete("deleted", 1).await.unwrap();
    let made = CreateClientCredentialRequest {
        label: "backup".to_owned(),
        roles: vec!["enrol".to_owned()],
        ..Default::default()
    };
    let mut control = admin.control;
    control.create_client_credential(made).await.unwrap();
}

async fn one_of_each_kind_is_there(broker: &Broker) {
    let [releaser, lifecycle] = ["releaser", "lifecycle"].map(|name| Caller::of(broker, name));
    let twice = releaser.unwrap("twice").await.unwrap();
    assert_eq!(twice.key_material, b"the second material");
    lifecycle.restore("twice", 1, 2).await.unwrap();
    let first = releaser.unwrap("twice").await.unwrap();
    assert_eq!(first.key_material, b"the first material");
    lifecycle.undelete("deleted").await.unwrap();
    let back = releaser.unwrap("deleted").await.unwrap();
    assert_eq!(back.key_material, b"material that was deleted");
}

/// All kinds of rows move while callers unwrap, replace, delete and undelete. No call fails, every key is readable afterwards, and
/// nothing needs the first wrapping key any more.
#[tokio::test(flavor = "multi_thread")]
async fn everything_moves_under_calls_and_none_fails() {
    let users = names(40);
    let site = Arc::new(Site::fresh(on_sqlite()));
    let broker = Broker::start_on(site);
    enrol(&broker, &users).await;
    one_of_each_kind(&broker).await;
    let (site, _) = broker.stop();
    second_key(&site);
    count_moves(&site);
    let broker = Broker::start_on(site);

    let callers = Callers::start(&broker, &users);
    assert!(start(&broker, 0).await.unwrap());
    let ended = done(&broker).await;
    assert!(callers.stop().await > 20, "there were no calls");
    assert_eq!((ended.failed, ended.clients_moved), (0, 1), "{ended:?}");
    assert!(ended.revisions_moved >= 43, "{ended:?}");
    assert!(ended.verified >= ended.revisions_moved, "{ended:?}");
    assert!(ended.requested_by.contains("admin"), "{ended:?}");

    // A restore at the very end of the run may have written a revision under the old wrapping key.
    assert!(start(&broker, 0).await.unwrap());
    done(&broker).await;
    assert_eq!(left(&broker).await, (0, 0));
    let (all, distinct) = moves(&broker.site);
    assert_eq!(all, distinct, "a row was moved twice");
    all_released(&broker, &users).await;
    one_of_each_kind_is_there(&broker).await;
    broker.site.expect_ok(&["store", "check"]);
    audited(&broker.site, all + 1);
    let metrics = get(broker.status, "/metrics");
    let moved = format!(
        "keybroker_rewrap_rows_total{{result=\"moved\"}} {}",
        all + 1
    );
    for line in [
        moved.as_str(),
        "keybroker_rewrap_running 0",
        "keybroker_rewrap_rows_left 0",
    ] {
        assert!(metrics.contains(line), "{line}\n{metrics}");
    }
}

/// The outcomes of the batches add up to the moved rows, and each has a digest and follows its intent.
fn audited(site: &Site, moved: u64) {
    let audit = site.audit();
    let entries: Vec<Value> = audit
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let of = |action: &str, kind: &str| -> Vec<&Value> {
        let is_it = |entry: &&Value| entry["action"] == action && entry["kind"] == kind;
        entries.iter().filter(is_it).collect()
    };
    let batches = of("wrapping_key.rewrap_batch", "outcome");
    let count: u64 = batches
        .iter()
        .map(|entry| entry["count"].as_u64().unwrap())
        .sum();
    assert_eq!(count, moved);
    for batch in &batches {
        assert_eq!(batch["digest"].as_str().unwrap().len(), 64);
        assert_eq!(batch["wrapping_key"].as_str().unwrap().len(), 32);
    }
    let intents = of("wrapping_key.rewrap_batch", "intent");
    assert_eq!(intents.len(), batches.len());
    assert!(!of("wrapping_key.rewrap", "intent").is_empty());
    assert!(!of("wrapping_key.rewrap_end", "decision").is_empty());
}

fn number(variable: &str, default: usize) -> usize {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap())
}
