//! The life of wrapping keys beside a running broker: keys that are missing, keys that are added, rotation and states.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use keybroker_proto::{ListWrappingKeysRequest, WrappingKey, WrappingKeyState};
use serde_json::Value;
use tokio::task::JoinSet;

use crate::{
    client::{Caller, eventually, refused},
    client_commands::calling,
    databases::{start_instance, unique},
    process::{Broker, until},
    servers::{Kind, Server, section},
    site::{Finished, Options, Site},
    wire::get,
};

pub(crate) const MATERIAL: &[u8] = b"material of this user";
pub(crate) const REFUSED: i32 = 10;
const UNTRUSTED: i32 = 6;
const USAGE: i32 = 2;

/// `keybroker key …` of an administrator, on the admin API of a broker.
pub(crate) fn key(broker: &Broker, name: &str, arguments: &[&str]) -> Finished {
    let command = [&["-o", "json", "key"], arguments].concat();
    Finished::from(calling(broker, &command, name, &[]).output().unwrap())
}

/// A command that must succeed; returns what it shows.
#[track_caller]
pub(crate) fn changed(broker: &Broker, arguments: &[&str]) -> Value {
    let finished = key(broker, "admin", arguments);
    assert_eq!(finished.code, Some(0), "{arguments:?}: {finished:#?}");
    serde_json::from_str(&finished.stdout).unwrap()
}

/// A command that the broker must refuse with this reason and these words.
#[track_caller]
pub(crate) fn not_changed(broker: &Broker, arguments: &[&str], reason: &str, words: &[&str]) {
    let finished = key(broker, "admin", arguments);
    assert_eq!(finished.code, Some(REFUSED), "{arguments:?}: {finished:#?}");
    for word in [&[reason], words].concat() {
        assert!(finished.stderr.contains(word), "{word}: {finished:#?}");
    }
}

pub(crate) fn text(value: &Value, field: &str) -> String {
    value[field].as_str().unwrap_or_default().to_owned()
}

/// The states of the keys, as the admin API shows them.
pub(crate) async fn states(broker: &Broker) -> BTreeMap<String, WrappingKeyState> {
    let keys = wrapping_keys(broker).await;
    let state = |key: &WrappingKey| (hex::encode(&key.id), key.state());
    keys.iter().map(state).collect()
}

async fn wrapping_keys(broker: &Broker) -> Vec<WrappingKey> {
    let mut control = Caller::of(broker, "admin").control;
    let listed = control.list_wrapping_keys(ListWrappingKeysRequest {}).await;
    listed.unwrap().into_inner().wrapping_keys
}

/// The id of the key that wraps new user keys, found out by a create.
pub(crate) async fn wraps_under(broker: &Broker) -> String {
    let user = unique();
    let created = Caller::of(broker, "enroller").create(&user, MATERIAL).await;
    hex::encode(created.unwrap().wrapping_key_id)
}

/// Callers that create and release user keys without retries, until they are stopped.
struct Load {
    stop: Arc<AtomicBool>,
    calls: Arc<AtomicUsize>,
    tasks: JoinSet<()>,
}

impl Load {
    fn start(brokers: &[&Broker]) -> Self {
        let mut load = Self {
            stop: Arc::default(),
            calls: Arc::default(),
            tasks: JoinSet::new(),
        };
        for (number, broker) in brokers.iter().cycle().take(4).enumerate() {
            let caller = (
                Caller::of(broker, "enroller"),
                Caller::of(broker, "releaser"),
            );
            let (stop, calls) = (Arc::clone(&load.stop), Arc::clone(&load.calls));
            load.tasks.spawn(async move {
                let (enroller, releaser) = caller;
                for round in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let user = format!("load-{number}-{round}");
                    let created = enroller.create(&user, MATERIAL).await;
                    created.unwrap_or_else(|status| panic!("create: {status:?}"));
                    for _ in 0..3 {
                        let released = releaser.unwrap(&user).await;
                        let released =
                            released.unwrap_or_else(|status| panic!("unwrap: {status:?}"));
                        assert_eq!(released.key_material, MATERIAL);
                    }
                    calls.fetch_add(4, Ordering::Relaxed);
                }
            });
        }
        load
    }

    /// Stops the callers; each of their calls must have succeeded. Returns the number of calls.
    async fn end(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        self.tasks.join_all().await;
        self.calls.load(Ordering::Relaxed)
    }
}

/// The files of a token, to put some of them back later.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                found.insert(path.clone(), fs::read(&path).unwrap());
            }
        }
    }
    found
}

/// Removes the objects of a key with another tool, and returns the files that bring them back.
pub(crate) fn remove_objects(site: &Site, id: &str) -> BTreeMap<PathBuf, Vec<u8>> {
    let before = files(&site.token.directory());
    for kind in ["privkey", "pubkey", "secrkey"] {
        let removed = site
            .token
            .pkcs11_tool(&["--delete-object", "--type", kind, "--id", id]);
        assert!(removed.status.success(), "{removed:?}");
    }
    let after = files(&site.token.directory());
    let gone: BTreeMap<_, _> = before
        .into_iter()
        .filter(|(path, _)| !after.contains_key(path))
        .collect();
    assert!(gone.len() >= 3, "{gone:?}");
    gone
}

pub(crate) fn put_back(files: &BTreeMap<PathBuf, Vec<u8>>) {
    for (path, bytes) in files {
        fs::write(path, bytes).unwrap();
    }
}

/// A site with two keys and a user under each. Returns the ids of the keys, older first.
pub(crate) async fn with_two_keys() -> (Arc<Site>, [String; 2]) {
    let site = Arc::new(Site::fresh(Options::default()));
    let broker = Broker::start_on(site);
    let enroller = Caller::of(&broker, "enroller");
    let ada = enroller.create("ada", MATERIAL).await.unwrap();
    let (site, _) = broker.stop();
    site.expect_ok(&["key", "generate", "--bits", "2048"]);
    let broker = Broker::start_on(site);
    let enroller = Caller::of(&broker, "enroller");
    let bob = enroller.create("bob", MATERIAL).await.unwrap();
    let (site, _) = broker.stop();
    let ids = [ada, bob].map(|key| hex::encode(key.wrapping_key_id));
    assert_ne!(ids[0], ids[1]);
    (site, ids)
}

fn is_ready(broker: &Broker) -> bool {
    get(broker.status, "/readyz").contains(" 200 ")
}

/// The restore of a token that is not complete is an alert about one key; the others serve, and the key is used as soon as it is
/// there again.
#[tokio::test(flavor = "multi_thread")]
async fn a_missing_key_is_refused_alone_and_taken_up_when_it_returns() {
    let (site, [older, newer]) = with_two_keys().await;
    let gone = remove_objects(&site, &older);

    for arguments in [&["token", "check"][..], &["store", "check"]] {
        let checked = site.run(arguments);
        assert_ne!(checked.code, Some(0), "{checked:#?}");
        assert!(
            checked.stderr.contains(&older) || checked.stdout.contains(&older),
            "{checked:#?}"
        );
        assert!(
            checked.stdout.len() > 10,
            "nothing else was checked: {checked:#?}"
        );
    }
    assert!(site.expect_ok(&["key", "list"]).contains(&older));
    assert!(site.expect_ok(&["key", "show", &older]).contains(&older));

    let broker = Broker::start_on(site);
    let (enroller, releaser) = (
        Caller::of(&broker, "enroller"),
        Caller::of(&broker, "releaser"),
    );
    refused(releaser.unwrap("ada").await, "TOKEN_DOWN");
    assert_eq!(releaser.unwrap("bob").await.unwrap().key_material, MATERIAL);
    let eve = enroller.create("eve", MATERIAL).await.unwrap();
    assert_eq!(hex::encode(eve.wrapping_key_id), newer);
    assert!(is_ready(&broker));
    assert!(broker.site.log().contains(r#""alert":"wrapping-key""#));
    let usable = |id: &str, value: u8| {
        let line = format!("keybroker_wrapping_key_usable{{wrapping_key=\"{id}\"}} {value}");
        get(broker.status, "/metrics").contains(&line)
    };
    assert!(usable(&older, 0) && usable(&newer, 1));
    let keys = wrapping_keys(&broker).await;
    let problem = keys.iter().find(|key| hex::encode(&key.id) == older);
    assert!(problem.unwrap().problem.contains("is not on the token"));
    not_changed(
        &broker,
        &["compromise", &older],
        "TOKEN_DOWN",
        &["cannot be authenticated"],
    );

    let load = Load::start(&[&broker]);
    put_back(&gone);
    let released = eventually(|| releaser.unwrap("ada")).await;
    assert_eq!(released.key_material, MATERIAL);
    assert!(usable(&older, 1));
    assert!(load.end().await > 8);
    broker.site.expect_ok(&["token", "check"]);
}

/// Calls for a key that is recorded as lost get `KEY_STATE`, so that clients stop trying. The registry row of a missing key is
/// believed only under a MAC.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_key_is_buried_and_a_forged_burial_is_not_believed() {
    let (site, [older, newer]) = with_two_keys().await;
    let gone = remove_objects(&site, &older);
    let of_older = format!("WHERE lower(hex(key_id)) = '{older}'");
    site.sql(&format!(
        "CREATE TABLE saved AS SELECT * FROM wrapping_keys {of_older}"
    ));
    site.sql(&format!(
        "UPDATE wrapping_keys SET state = 'destroyed', sequence = 9 {of_older}"
    ));
    let broker = Broker::start_on(site);
    let releaser = Caller::of(&broker, "releaser");
    refused(releaser.unwrap("ada").await, "TOKEN_UNTRUSTED");
    assert!(broker.site.log().contains(r#""alert":"registry""#));
    let (site, _) = broker.stop();
    site.sql(&format!("DELETE FROM wrapping_keys {of_older}"));
    site.sql("INSERT INTO wrapping_keys SELECT * FROM saved; DROP TABLE saved");

    let broker = Broker::start_on(site);
    let releaser = Caller::of(&broker, "releaser");
    refused(releaser.unwrap("ada").await, "TOKEN_DOWN");
    not_changed(
        &broker,
        &["lost", &newer, "--yes"],
        "KEY_STATE",
        &["is not missing"],
    );
    let asked = key(&broker, "admin", &["lost", &older]);
    assert_eq!(asked.code, Some(USAGE), "{asked:#?}");
    let lost = changed(&broker, &["lost", &older, "--yes"]);
    assert_eq!(text(&lost, "state"), "destroyed");
    refused(releaser.unwrap("ada").await, "KEY_STATE");
    releaser.unwrap("bob").await.unwrap();
    not_changed(
        &broker,
        &["lost", &older, "--yes"],
        "KEY_STATE",
        &["already destroyed"],
    );
    until("the end of the problem", || {
        let line = format!("keybroker_wrapping_key_usable{{wrapping_key=\"{older}\"}} 1");
        get(broker.status, "/metrics").contains(&line).then_some(())
    });

    // Not even the return of the token brings it back.
    let (site, _) = broker.stop();
    put_back(&gone);
    let broker = Broker::start_on(site);
    refused(
        Caller::of(&broker, "releaser").unwrap("ada").await,
        "KEY_STATE",
    );
    assert_eq!(wraps_under(&broker).await, newer);
}

/// A key that is on the token but not registered is removed, unless a row needs it.
#[tokio::test(flavor = "multi_thread")]
async fn an_unregistered_key_is_removed_unless_a_row_needs_it() {
    let (site, [older, newer]) = with_two_keys().await;
    let refused = site.run(&["key", "remove", &older, "--yes"]);
    assert_eq!(refused.code, Some(UNTRUSTED), "{refused:#?}");
    assert!(refused.stderr.contains("is registered"), "{refused:#?}");
    for id in [&older, &newer] {
        site.sql(&format!(
            "DELETE FROM wrapping_keys WHERE lower(hex(key_id)) = '{id}'"
        ));
        let refused = site.run(&["key", "remove", id, "--yes"]);
        assert!(refused.stderr.contains("1 revisions"), "{refused:#?}");
        site.expect_ok(&["key", "register", id]);
    }
    site.expect_ok(&["key", "generate", "--bits", "2048"]);
    let orphan =
        site.sql("SELECT lower(hex(key_id)) FROM wrapping_keys ORDER BY sequence DESC LIMIT 1");
    let orphan = orphan.trim();
    site.sql(&format!(
        "DELETE FROM wrapping_keys WHERE lower(hex(key_id)) = '{orphan}'"
    ));
    assert!(site.run(&["token", "check"]).stderr.contains(orphan));
    let asked = site.run(&["key", "remove", orphan]);
    assert_eq!(asked.code, Some(USAGE), "{asked:#?}");
    let removed = site.expect_ok(&["-o", "json", "key", "remove", orphan, "--yes"]);
    assert!(removed.contains("\"removed_objects\": 3"), "{removed}");
    assert!(!site.run(&["token", "check"]).stderr.contains(orphan));
    let again = site.run(&["key", "remove", orphan, "--yes"]);
    assert_eq!(again.code, Some(UNTRUSTED), "{again:#?}");
    assert!(site.audit().contains("wrapping_key.remove"));
}

/// A key that goes while the broker serves takes its own user keys with it and no others.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_vanishes_from_a_running_broker_takes_no_other_with_it() {
    let (site, [older, _]) = with_two_keys().await;
    let broker = Broker::start_on(site);
    let releaser = Caller::of(&broker, "releaser");
    releaser.unwrap("ada").await.unwrap();
    let gone = remove_objects(&broker.site, &older);
    until("the alert", || {
        broker
            .site
            .log()
            .contains(r#""alert":"wrapping-key""#)
            .then_some(())
    });
    refused(releaser.unwrap("ada").await, "TOKEN_DOWN");
    assert_eq!(releaser.unwrap("bob").await.unwrap().key_material, MATERIAL);
    put_back(&gone);
    eventually(|| releaser.unwrap("ada")).await;
}

/// A row that was altered in SQL disables its own key. A key whose row was never verified is used in no state.
#[tokio::test(flavor = "multi_thread")]
async fn an_altered_row_disables_its_own_key_alone() {
    let (site, [older, newer]) = with_two_keys().await;
    site.sql(&format!(
        "UPDATE wrapping_keys SET sequence = 9 WHERE lower(hex(key_id)) = '{older}'"
    ));
    let broker = Broker::start_on(site);
    let releaser = Caller::of(&broker, "releaser");
    refused(releaser.unwrap("ada").await, "TOKEN_UNTRUSTED");
    assert_eq!(releaser.unwrap("bob").await.unwrap().key_material, MATERIAL);
    assert_eq!(wraps_under(&broker).await, newer);
    assert!(is_ready(&broker));
    assert!(broker.site.log().contains(r#""alert":"registry""#));
    let (site, _) = broker.stop();
    let checked = site.run(&["store", "check"]);
    assert_eq!(checked.code, Some(12), "{checked:#?}");
    assert!(
        checked.stdout.contains("wrapping-key-unusable"),
        "{checked:#?}"
    );
    assert!(checked.stdout.contains("bad"), "{checked:#?}");
}

/// Without any key that can be used, the broker does not start.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_without_any_of_its_keys_is_refused() {
    let (site, ids) = with_two_keys().await;
    for id in &ids {
        remove_objects(&site, id);
    }
    let ended = site.serve_to_its_end();
    assert_eq!(ended.code, Some(UNTRUSTED), "{ended:#?}");
}

/// The states of a key, each with what it does to its user keys, and the changes that are refused.
#[tokio::test(flavor = "multi_thread")]
async fn each_state_does_what_the_table_says() {
    let (site, [older, newer]) = with_two_keys().await;
    let broker = Broker::start_on(site);
    let releaser = Caller::of(&broker, "releaser");

    assert_eq!(
        text(&changed(&broker, &["deactivate", &older]), "state"),
        "deactivated"
    );
    releaser.unwrap("ada").await.unwrap();
    assert_eq!(
        text(&changed(&broker, &["suspend", &older]), "state"),
        "suspended"
    );
    refused(releaser.unwrap("ada").await, "KEY_STATE");
    releaser.unwrap("bob").await.unwrap();
    // Another key is active, so the resumed one only unwraps.
    assert_eq!(
        text(&changed(&broker, &["resume", &older]), "state"),
        "deactivated"
    );
    releaser.unwrap("ada").await.unwrap();
    not_changed(
        &broker,
        &["resume", &older],
        "KEY_STATE",
        &["is deactivated"],
    );

    changed(&broker, &["suspend", &newer]);
    let enroller = Caller::of(&broker, "enroller");
    refused(enroller.create("eve", MATERIAL).await, "KEY_STATE");
    releaser.unwrap("ada").await.unwrap();
    assert!(is_ready(&broker), "reads still work");
    assert_eq!(
        text(&changed(&broker, &["resume", &newer]), "state"),
        "active"
    );
    enroller.create("eve", MATERIAL).await.unwrap();

    // To activate one deactivates the other.
    assert_eq!(
        text(&changed(&broker, &["activate", &older]), "state"),
        "active"
    );
    assert_eq!(states(&broker).await[&newer], WrappingKeyState::Deactivated);
    assert_eq!(wraps_under(&broker).await, older);

    assert_eq!(
        text(&changed(&broker, &["compromise", &newer]), "state"),
        "compromised"
    );
    refused(releaser.unwrap("bob").await, "KEY_STATE");
    for change in ["activate", "suspend", "deactivate", "compromise"] {
        let arguments = [change, newer.as_str()];
        not_changed(
            &broker,
            &arguments,
            "KEY_STATE",
            &["the next state can only be destroyed"],
        );
    }
    others_and_unknown_keys_are_refused(&broker, &older);
    a_restart_finds_the_states(broker, &newer).await;
}

fn others_and_unknown_keys_are_refused(broker: &Broker, older: &str) {
    not_changed(broker, &["suspend", &"00".repeat(16)], "KEY_NOT_FOUND", &[]);
    let bad = key(broker, "admin", &["suspend", "xyz"]);
    assert_eq!(bad.code, Some(USAGE), "{bad:#?}");
    for other in ["auditor", "releaser", "enroller"] {
        let denied = key(broker, other, &["suspend", older]);
        assert!(denied.stderr.contains("POLICY"), "{other}: {denied:#?}");
    }
}

/// The states are under the MACs of the rows, so a restart finds them; and each change is in the audit log.
async fn a_restart_finds_the_states(broker: Broker, newer: &str) {
    let (site, _) = broker.stop();
    let audit = site.audit();
    for action in ["suspend", "resume", "deactivate", "activate", "compromise"] {
        let named = format!("\"action\":\"wrapping_key.{action}\"");
        let of_action = audit.lines().filter(|line| line.contains(&named));
        let kinds: Vec<_> = of_action
            .filter(|line| !line.contains("decision"))
            .collect();
        assert!(
            kinds
                .iter()
                .any(|line| line.contains("\"kind\":\"intent\"")),
            "{action}"
        );
        assert!(
            kinds
                .iter()
                .any(|line| line.contains("\"kind\":\"outcome\"")),
            "{action}"
        );
    }
    site.expect_ok(&["audit", "verify"]);
    let broker = Broker::start_on(site);
    refused(
        Caller::of(&broker, "releaser").unwrap("bob").await,
        "KEY_STATE",
    );
    assert_eq!(states(&broker).await[newer], WrappingKeyState::Compromised);
}

/// A rotation beside callers: none of their calls fails, and what was stored before is released afterwards.
#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_under_load_fails_no_call() {
    let broker = Broker::start(Options {
        workers: 2,
        ..Options::default()
    });
    let before = wraps_under(&broker).await;
    let releaser = Caller::of(&broker, "releaser");
    Caller::of(&broker, "enroller")
        .create("ada", MATERIAL)
        .await
        .unwrap();
    let load = Load::start(&[&broker]);
    let young = changed(&broker, &["rotate", "--if-older-than", "1", "--single"]);
    assert_eq!(
        (text(&young, "id"), &young["changed"]),
        (before.clone(), &Value::Bool(false))
    );

    let rotated = changed(&broker, &["rotate", "--bits", "2048", "--single"]);
    let after = text(&rotated, "id");
    assert_eq!(text(&rotated, "state"), "active");
    assert_eq!(text(&rotated, "previous"), before);
    assert_ne!(after, before);
    assert_eq!(wraps_under(&broker).await, after);
    releaser.unwrap("ada").await.unwrap();
    assert_eq!(
        states(&broker).await[&before],
        WrappingKeyState::Deactivated
    );

    // And back, and forth again.
    let back = changed(&broker, &["rotate", "--back"]);
    assert_eq!(text(&back, "id"), before);
    assert_eq!(wraps_under(&broker).await, before);
    changed(&broker, &["rotate", "--back"]);
    assert_eq!(wraps_under(&broker).await, after);
    let calls = load.end().await;
    assert!(calls > 20, "{calls} calls");
    until("the replaced workers to end", || {
        (broker.workers().len() == 2).then_some(())
    });

    // Everything is as a restart needs it.
    let (site, _) = broker.stop();
    site.expect_ok(&["token", "check"]);
    site.expect_ok(&["store", "check"]);
    site.expect_ok(&["audit", "verify"]);
    let broker = Broker::start_on(site);
    Caller::of(&broker, "releaser").unwrap("ada").await.unwrap();
    assert_eq!(wraps_under(&broker).await, after);
}

/// A new key is not used before somebody has confirmed a backup, or accepted that there is none.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_key_waits_for_the_backup() {
    let broker = Broker::start(Options::default());
    let before = wraps_under(&broker).await;
    let rotated = changed(&broker, &["rotate", "--bits", "2048"]);
    let new = text(&rotated, "id");
    assert_eq!(text(&rotated, "state"), "pre-active");
    assert_eq!(wraps_under(&broker).await, before);
    not_changed(
        &broker,
        &["rotate"],
        "KEY_STATE",
        &["already pre-active", &new],
    );
    not_changed(
        &broker,
        &["activate", &new],
        "KEY_STATE",
        &["--backup-confirmed", "--single"],
    );
    not_changed(
        &broker,
        &["suspend", &new],
        "KEY_STATE",
        &["active, compromised or destroyed"],
    );
    let activated = changed(&broker, &["activate", &new, "--backup-confirmed"]);
    assert_eq!(activated["backup_confirmed"], Value::Bool(true));
    assert_eq!(wraps_under(&broker).await, new);

    // The command that confirms the backup of all keys does the same, while the broker is stopped.
    let rotated = changed(&broker, &["rotate", "--bits", "2048"]);
    let third = text(&rotated, "id");
    let (site, _) = broker.stop();
    site.expect_ok(&["token", "backup-confirmed"]);
    let broker = Broker::start_on(site);
    changed(&broker, &["activate", &third]);
    assert_eq!(wraps_under(&broker).await, third);
}

/// A broker that is killed in the middle of a rotation leaves at most a key that `token check` shows.
#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_is_killed_during_a_rotation_starts_again() {
    let mut site = Arc::new(Site::fresh(Options::default()));
    for pause in [100, 300, 600] {
        let broker = Broker::start_on(site);
        let user = unique();
        Caller::of(&broker, "enroller")
            .create(&user, MATERIAL)
            .await
            .unwrap();
        let mut control = Caller::of(&broker, "admin").control;
        let rotation = tokio::spawn(async move {
            let request = keybroker_proto::RotateWrappingKeyRequest {
                modulus_bits: 2_048,
                without_backup: true,
                ..Default::default()
            };
            drop(control.rotate_wrapping_key(request).await);
        });
        tokio::time::sleep(Duration::from_millis(pause)).await;
        site = broker.kill();
        rotation.await.unwrap();
        let broker = Broker::start_on(site);
        Caller::of(&broker, "releaser").unwrap(&user).await.unwrap();
        wraps_under(&broker).await;
        let (stopped, _) = broker.stop();
        site = stopped;
        site.expect_ok(&["token", "check"]);
        site.expect_ok(&["store", "check"]);
    }
}

fn two_brokers(server: &Server, database: &str) -> (Arc<Site>, Broker, Broker) {
    let site = Arc::new(Site::fresh(Options {
        store: Some(section(&server.settings(database))),
        workers: 2,
        ..Options::default()
    }));
    let (one, two) = (start_instance(&site, "one"), start_instance(&site, "two"));
    (site, one, two)
}

/// Two brokers on one database: what one of them rotates, the other uses within two seconds, and no call of either fails.
#[tokio::test(flavor = "multi_thread")]
async fn another_broker_uses_a_rotated_key_and_fails_no_call() {
    let server = Server::start(Kind::PostgreSql);
    let database = server.database();
    let (site, one, two) = two_brokers(&server, &database);
    let load = Load::start(&[&one, &two]);
    let rotated = changed(&one, &["rotate", "--bits", "2048", "--single"]);
    let new = text(&rotated, "id");
    let began = Instant::now();
    while wraps_under(&two).await != new {
        assert!(
            began.elapsed() < Duration::from_secs(10),
            "the other broker does not use it"
        );
    }
    println!("used by the other broker after {:?}", began.elapsed());
    // Each reads what the other wrapped.
    for (from, to) in [(&one, &two), (&two, &one)] {
        let user = unique();
        Caller::of(from, "enroller")
            .create(&user, MATERIAL)
            .await
            .unwrap();
        Caller::of(to, "releaser").unwrap(&user).await.unwrap();
    }
    let calls = load.end().await;
    assert!(calls > 20, "{calls} calls");

    // A change of a state is followed as well, within the second that the page promises and a margin for a busy machine.
    changed(&one, &["suspend", &new]);
    let began = Instant::now();
    while Caller::of(&two, "enroller")
        .create(&unique(), MATERIAL)
        .await
        .is_ok()
    {
        assert!(
            began.elapsed() < Duration::from_secs(5),
            "the other broker does not follow"
        );
    }
    changed(&one, &["resume", &new]);
    let enroller = Caller::of(&two, "enroller");
    eventually(|| enroller.create("later", MATERIAL)).await;
    site.expect_ok(&["token", "check"]);
}

/// Two rotations at the same moment: one key is registered, the other caller learns why not, and no key is left over.
#[tokio::test(flavor = "multi_thread")]
async fn of_two_rotations_at_once_one_is_made() {
    let server = Server::start(Kind::PostgreSql);
    let database = server.database();
    let (site, one, two) = two_brokers(&server, &database);
    let rotate = |broker: &Broker| {
        let mut control = Caller::of(broker, "admin").control;
        async move {
            let request = keybroker_proto::RotateWrappingKeyRequest {
                modulus_bits: 2_048,
                without_backup: true,
                ..Default::default()
            };
            control.rotate_wrapping_key(request).await
        }
    };
    let (left, right) = tokio::join!(rotate(&one), rotate(&two));
    let made = [&left, &right].into_iter().filter(|result| result.is_ok());
    assert_eq!(made.count(), 1, "{left:?} {right:?}");
    let lost = left.err().or(right.err()).unwrap();
    refused::<()>(Err(lost), "REVISION");
    let registered = states(&one).await;
    assert_eq!(registered.len(), 2);
    let checked = site.run(&["token", "check"]);
    assert_eq!(checked.code, Some(0), "{checked:#?}");
    assert!(
        !checked.stderr.contains("not in the registry"),
        "{checked:#?}"
    );
}
