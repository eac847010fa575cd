//! The destruction of wrapping keys: scheduled, cancelled, refused, postponed, and done.

use std::{
    fs,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use keybroker_proto::WrappingKeyState;
use serde_json::Value;

use crate::{
    client::{Caller, refused},
    client_commands::calling,
    keys::{
        MATERIAL, REFUSED, changed, key, not_changed, states, text, with_two_keys, wraps_under,
    },
    process::{Broker, until},
    servers::{Kind, Server, section},
    site::{Finished, Options, Site, policy_section},
    wire::get,
};

const USAGE: i32 = 2;
/// A destruction without a waiting time still waits some seconds, and the removal from the token follows some seconds later.
const DONE_WITHIN: Duration = Duration::from_mins(2);
const MAY_DESTROY_NOW: &str = r#"
@id("destroy-now")
permit (
    principal is Keybroker::Service in Keybroker::Role::"admin",
    action == Keybroker::Action::"wrapping_key.destroy_now",
    resource is Keybroker::Broker
);
"#;

/// Lets the broker that starts next destroy keys without the waiting time.
fn permit_now(site: &Site) {
    let directory = site.policy_directory();
    fs::write(directory.join("now.cedar"), MAY_DESTROY_NOW).unwrap();
}

/// Makes a directory of policies that permits a destruction without the waiting time.
pub(crate) fn permit_now_in(directory: &Path) {
    fs::create_dir(directory).unwrap();
    fs::write(directory.join("now.cedar"), MAY_DESTROY_NOW).unwrap();
}

pub(crate) fn rewrap(broker: &Broker) {
    let arguments = ["-o", "json", "rewrap", "start", "--wait"];
    let finished = Finished::from(calling(broker, &arguments, "admin", &[]).output().unwrap());
    assert_eq!(finished.code, Some(0), "{finished:#?}");
}

/// Waits for a condition that takes longer than other conditions of tests.
pub(crate) fn slowly<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(begun.elapsed() < DONE_WITHIN, "waited for {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// The ids of the objects on the token.
fn objects(site: &Site) -> String {
    let listed = site.token.pkcs11_tool(&["--list-objects"]);
    assert!(listed.status.success(), "{listed:?}");
    String::from_utf8(listed.stdout).unwrap()
}

/// Waits until a key is destroyed and its objects are gone from the token.
pub(crate) fn destroyed(broker: &Broker, id: &str) {
    let removed = "\"action\":\"wrapping_key.objects_removed\"";
    slowly("the removal of the objects", || {
        let audit = broker.site.audit();
        let mut entries = audit.lines().filter(|line| line.contains(removed));
        entries.any(|line| line.contains(id)).then_some(())
    });
    assert!(!objects(&broker.site).contains(id));
    slowly("the end of the schedule", || {
        let left = broker.site.sql("SELECT count(*) FROM key_destructions");
        (left.trim() == "0").then_some(())
    });
}

pub(crate) fn alerts(broker: &Broker) -> Vec<String> {
    let log = broker.site.log();
    let alert = r#""alert":"key-destruction""#;
    let lines = log.lines().filter(|line| line.contains(alert));
    lines.map(str::to_owned).collect()
}

/// A key is destroyed only after the waiting time, from the states of the table, while another key is in use, and while no row needs it.
#[tokio::test(flavor = "multi_thread")]
async fn a_destruction_is_refused_scheduled_and_cancelled() {
    let (site, [older, newer]) = with_two_keys().await;
    let broker = Broker::start_on(site);
    // With two active keys, the older one still has to be deactivated.
    not_changed(
        &broker,
        &["destroy", &older, "--yes"],
        "KEY_STATE",
        &["deactivated"],
    );
    changed(&broker, &["deactivate", &older]);
    let asked = key(&broker, "admin", &["destroy", &older]);
    assert_eq!(asked.code, Some(USAGE), "{asked:#?}");
    not_changed(
        &broker,
        &["destroy", &older, "--yes"],
        "KEY_STATE",
        &["1 revisions", "0 API clients", "keybroker rewrap start"],
    );
    not_changed(
        &broker,
        &["destroy", &newer, "--yes"],
        "KEY_STATE",
        &["cannot become destroyed"],
    );
    rewrap(&broker);
    not_changed(
        &broker,
        &["destroy", &older, "--yes", "--after-days", "29"],
        "REQUEST",
        &["at least 30"],
    );
    not_changed(
        &broker,
        &["destroy", &older, "--yes", "--now", "yes"],
        "REQUEST",
        &["irreversibly"],
    );
    not_changed(
        &broker,
        &["destroy", &older, "--yes", "--now", "irreversibly"],
        "POLICY",
        &[],
    );
    not_changed(
        &broker,
        &["destroy", &older, "--cancel"],
        "KEY_STATE",
        &["no destruction"],
    );

    a_scheduled_key_keeps_its_state(&broker, &older);
    a_schedule_is_believed_only_under_its_mac(&broker, &older).await;
    let audit = broker.site.audit();
    for action in ["destroy", "keep"] {
        let named = format!("\"action\":\"wrapping_key.{action}\"");
        let mut entries = audit.lines().filter(|line| line.contains(&named));
        assert!(
            entries.any(|line| line.contains("\"kind\":\"outcome\"")),
            "{action}"
        );
    }
    // A cancelled key is like any other deactivated key.
    changed(&broker, &["activate", &older]);
    assert_eq!(wraps_under(&broker).await, older);
}

/// The schedule is shown, and the key changes its state only after the schedule is cancelled.
fn a_scheduled_key_keeps_its_state(broker: &Broker, older: &str) {
    let scheduled = changed(broker, &["destroy", older, "--yes"]);
    let at = text(&scheduled, "destroy_at");
    assert_eq!(text(&scheduled, "state"), "deactivated");
    let listed = broker.site.expect_ok(&["-o", "json", "key", "show", older]);
    let listed: Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(text(&listed, "destroy_at"), at);
    not_changed(
        broker,
        &["destroy", older, "--yes"],
        "KEY_STATE",
        &["already"],
    );
    not_changed(broker, &["activate", older], "KEY_STATE", &["--cancel"]);
    not_changed(
        broker,
        &["rotate", "--back"],
        "KEY_STATE",
        &["no previous key"],
    );
    let denied = key(broker, "auditor", &["destroy", older, "--cancel"]);
    assert!(denied.stderr.contains("POLICY"), "{denied:#?}");
    until("the metric", || {
        let line = "keybroker_key_destructions_scheduled 1";
        get(broker.status, "/metrics").contains(line).then_some(())
    });
}

/// A writer of SQL can neither bring the time forward nor put a cancelled schedule back.
async fn a_schedule_is_believed_only_under_its_mac(broker: &Broker, older: &str) {
    let site = &broker.site;
    site.sql("CREATE TABLE saved AS SELECT * FROM key_destructions");
    a_damaged_row_concerns_its_own_key(broker, older).await;
    site.sql("UPDATE key_destructions SET due_us = 1");
    slowly("the alert about the edited time", || {
        let alerts = alerts(broker);
        alerts
            .iter()
            .any(|line| line.contains("MAC does not verify"))
            .then_some(())
    });
    assert_eq!(states(broker).await[older], WrappingKeyState::Deactivated);
    assert!(objects(site).contains(older));
    let kept = changed(broker, &["destroy", older, "--cancel"]);
    assert_eq!(kept["destroy_at"], Value::Null);

    site.sql("INSERT INTO key_destructions SELECT * FROM saved; DROP TABLE saved");
    slowly("the alert about the old schedule", || {
        let alerts = alerts(broker);
        alerts
            .iter()
            .any(|line| line.contains("is not valid and was removed"))
            .then_some(())
    });
    let left = site.sql("SELECT count(*) FROM key_destructions");
    assert_eq!(left.trim(), "0");
    assert_eq!(states(broker).await[older], WrappingKeyState::Deactivated);
}

/// A row that cannot be read is named, and blocks no change of another key.
async fn a_damaged_row_concerns_its_own_key(broker: &Broker, older: &str) {
    let site = &broker.site;
    // Longer than any name that a broker writes.
    site.sql("UPDATE key_destructions SET requested_by = hex(zeroblob(200))");
    let named = format!("the row of key {older} in the table key_destructions cannot be read");
    slowly("the alert about the damaged row", || {
        let alerts = alerts(broker);
        alerts
            .iter()
            .any(|line| line.contains(&named) && line.contains("requested_by"))
            .then_some(())
    });
    not_changed(
        broker,
        &["activate", older],
        "KEY_STATE",
        &[&named, "--cancel"],
    );
    let newer = wraps_under(broker).await;
    changed(broker, &["suspend", &newer]);
    changed(broker, &["resume", &newer]);
    assert_eq!(wraps_under(broker).await, newer);
    site.sql("UPDATE key_destructions SET requested_by = (SELECT requested_by FROM saved)");
}

/// The objects go, the tombstone stays and is believed after the key that authenticated it was destroyed, too.
#[tokio::test(flavor = "multi_thread")]
async fn a_destroyed_key_leaves_a_tombstone_that_outlives_its_witness() {
    let (site, [older, newer]) = with_two_keys().await;
    permit_now(&site);
    let broker = Broker::start_on(site);
    changed(&broker, &["deactivate", &older]);
    rewrap(&broker);
    let of_older = format!("WHERE lower(hex(key_id)) = '{older}'");
    broker.site.sql(&format!(
        "CREATE TABLE saved AS SELECT * FROM wrapping_keys {of_older}"
    ));
    changed(
        &broker,
        &["destroy", &older, "--yes", "--now", "irreversibly"],
    );
    destroyed(&broker, &older);
    assert_eq!(states(&broker).await[&older], WrappingKeyState::Destroyed);
    let releaser = Caller::of(&broker, "releaser");
    for user in ["ada", "bob"] {
        assert_eq!(releaser.unwrap(user).await.unwrap().key_material, MATERIAL);
    }
    let audit = broker.site.audit();
    let mut marked = audit
        .lines()
        .filter(|line| line.contains("\"action\":\"wrapping_key.destroyed\""));
    assert!(marked.any(|line| line.contains("\"kind\":\"outcome\"") && line.contains(&older)));
    let mut removed = audit
        .lines()
        .filter(|line| line.contains("wrapping_key.objects_removed"));
    assert!(removed.any(|line| line.contains("\"count\":3")), "{audit}");
    the_removal_from_the_token_is_audited(&audit, &older);
    not_changed(
        &broker,
        &["destroy", &older, "--cancel"],
        "KEY_STATE",
        &["destroyed already"],
    );

    // The next key authenticates the tombstone of the first one before its own integrity key goes.
    changed(&broker, &["rotate", "--bits", "2048", "--single"]);
    let third = wraps_under(&broker).await;
    rewrap(&broker);
    changed(
        &broker,
        &["destroy", &newer, "--yes", "--now", "irreversibly"],
    );
    destroyed(&broker, &newer);
    let (site, _) = broker.stop();
    site.expect_ok(&["token", "check"]);
    site.expect_ok(&["store", "check"]);
    site.expect_ok(&["audit", "verify"]);
    assert!(
        !site.log().contains(r#""alert":"registry""#),
        "{}",
        site.log()
    );

    let broker = Broker::start_on(site);
    let found = states(&broker).await;
    for id in [&older, &newer] {
        assert_eq!(found[id], WrappingKeyState::Destroyed);
    }
    assert_eq!(wraps_under(&broker).await, third);
    assert!(!broker.site.log().contains(r#""alert":"registry""#));
    a_tombstone_cannot_be_turned_back(&broker, &older, &of_older).await;
}

/// The intent is written before the first object is removed, and the outcome has the number of objects.
fn the_removal_from_the_token_is_audited(audit: &str, id: &str) {
    let of_token = |line: &&str| {
        line.contains("\"action\":\"wrapping_key.remove_objects\"")
            && line.contains("\"token\":\"default\"")
            && line.contains(id)
    };
    let entries: Vec<Value> = audit
        .lines()
        .filter(of_token)
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let kinds: Vec<&str> = entries.iter().map(|one| text_of(one, "kind")).collect();
    assert_eq!(kinds, ["intent", "outcome"], "{audit}");
    assert_eq!(entries[0]["call_id"], entries[1]["call_id"]);
    assert_eq!(entries[0]["count"], Value::Null);
    assert_eq!(entries[1]["count"], 3);
    assert_eq!(text_of(&entries[1], "outcome"), "ok");
}

fn text_of<'v>(entry: &'v Value, field: &str) -> &'v str {
    entry[field].as_str().unwrap_or_default()
}

/// The row from before the destruction has a valid MAC, and does not replace the tombstone.
async fn a_tombstone_cannot_be_turned_back(broker: &Broker, older: &str, of_older: &str) {
    broker
        .site
        .sql(&format!("DELETE FROM wrapping_keys {of_older}"));
    broker
        .site
        .sql("INSERT INTO wrapping_keys SELECT * FROM saved; DROP TABLE saved");
    until("the alert", || {
        broker
            .site
            .log()
            .contains(r#""alert":"registry""#)
            .then_some(())
    });
    assert_eq!(states(broker).await[older], WrappingKeyState::Destroyed);
}

/// A row that needs the key after all postpones the destruction, until the row is moved.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_needs_the_key_postpones_its_destruction() {
    let (site, [older, _]) = with_two_keys().await;
    permit_now(&site);
    let broker = Broker::start_on(site);
    changed(&broker, &["deactivate", &older]);
    let site = Arc::clone(&broker.site);
    site.sql("CREATE TABLE saved AS SELECT * FROM revisions");
    rewrap(&broker);
    changed(
        &broker,
        &["destroy", &older, "--yes", "--now", "irreversibly"],
    );
    // A restored backup.
    site.sql(&format!(
        "UPDATE revisions SET (envelope, wrapping_key_id) = \
         (SELECT s.envelope, s.wrapping_key_id FROM saved s WHERE s.record_id = revisions.record_id) \
         WHERE record_id IN (SELECT record_id FROM saved WHERE lower(hex(wrapping_key_id)) = '{older}')"
    ));
    slowly("the alert", || {
        let alerts = alerts(&broker);
        let is_it = |line: &String| line.contains("1 revisions") && line.contains("rewrap start");
        alerts.iter().any(is_it).then_some(())
    });
    assert_eq!(states(&broker).await[&older], WrappingKeyState::Deactivated);
    assert!(objects(&site).contains(&older));
    let metrics = get(broker.status, "/metrics");
    assert!(
        metrics.contains("keybroker_key_destructions_due 1"),
        "{metrics}"
    );
    Caller::of(&broker, "releaser").unwrap("ada").await.unwrap();
    rewrap(&broker);
    destroyed(&broker, &older);
    Caller::of(&broker, "releaser").unwrap("ada").await.unwrap();
}

/// A person changes what a row names, so that a count by the column does not find the row.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_names_another_key_than_it_needs_postpones_the_destruction() {
    let (site, [older, newer]) = with_two_keys().await;
    permit_now(&site);
    let broker = Broker::start_on(site);
    changed(&broker, &["deactivate", &older]);
    let site = Arc::clone(&broker.site);
    let of_older = format!("WHERE lower(hex(wrapping_key_id)) = '{older}'");
    let envelope = site.sql(&format!(
        "SELECT lower(hex(envelope)) FROM revisions {of_older}"
    ));
    site.sql(&format!(
        "CREATE TABLE saved AS SELECT record_id FROM revisions {of_older}"
    ));
    rewrap(&broker);
    let hidden = envelope.trim().replacen(&older, &newer, 1);
    assert_ne!(hidden, envelope.trim());
    site.sql(&format!(
        "UPDATE revisions SET envelope = X'{hidden}' WHERE record_id IN (SELECT record_id FROM saved)"
    ));
    changed(
        &broker,
        &["destroy", &older, "--yes", "--now", "irreversibly"],
    );
    let record = site.sql("SELECT lower(hex(record_id)) FROM saved");
    slowly("the alert", || {
        let alerts = alerts(&broker);
        let is_it = |line: &String| {
            line.contains(&format!("1 rows need key {older}")) && line.contains(record.trim())
        };
        alerts.iter().any(is_it).then_some(())
    });
    assert_eq!(states(&broker).await[&older], WrappingKeyState::Deactivated);
    assert!(objects(&site).contains(&older));
}

/// A compromised key can be destroyed. A key that is compromised while its destruction waits has to be scheduled again.
#[tokio::test(flavor = "multi_thread")]
async fn a_compromised_key_is_destroyed_and_a_compromise_ends_the_wait() {
    let (site, [older, _]) = with_two_keys().await;
    permit_now(&site);
    let broker = Broker::start_on(site);
    changed(&broker, &["deactivate", &older]);
    rewrap(&broker);
    changed(&broker, &["destroy", &older, "--yes"]);
    let compromised = changed(&broker, &["compromise", &older]);
    assert_eq!(compromised["destroy_at"], Value::Null);
    changed(
        &broker,
        &["destroy", &older, "--yes", "--now", "irreversibly"],
    );
    slowly("the mark", || {
        let row = broker.site.sql(&format!(
            "SELECT state FROM wrapping_keys WHERE lower(hex(key_id)) = '{older}'"
        ));
        (row.trim() == "destroyed").then_some(())
    });
    // A broker that is killed between the mark and the removal goes on after its start, even if a person removed the schedule.
    let site = broker.kill();
    assert!(
        objects(&site).contains(&older),
        "the objects are removed after a notice"
    );
    site.sql("DELETE FROM key_destructions");
    let broker = Broker::start_on(site);
    destroyed(&broker, &older);
    let alerts = alerts(&broker);
    let is_it = |line: &String| line.contains("was removed from the database");
    assert!(alerts.iter().any(is_it), "{alerts:?}");
    Caller::of(&broker, "releaser").unwrap("ada").await.unwrap();
}

/// One of two brokers destroys the key. The other follows without an alert.
#[tokio::test(flavor = "multi_thread")]
async fn one_of_two_brokers_destroys_the_key() {
    let server = Server::start(Kind::PostgreSql);
    let database = server.database();
    let site = Arc::new(Site::fresh(Options {
        store: Some(section(&server.settings(&database))),
        workers: 2,
        ..Options::default()
    }));
    permit_now(&site);
    let [one, two] = ["one", "two"].map(|name| {
        site.write_configuration(|text| {
            *text = text.replacen("[audit]\n", &format!("[audit]\ninstance = \"{name}\"\n"), 1);
            text.push_str(&policy_section(&site.folder().join("policies")));
        });
        Broker::start_on(Arc::clone(&site))
    });
    let older = wraps_under(&one).await;
    let rotated = changed(&one, &["rotate", "--bits", "2048", "--single"]);
    let newer = text(&rotated, "id");
    assert_ne!(newer, older);
    // Either broker may do the re-wrap, so both have to know the new key.
    let begun = Instant::now();
    while wraps_under(&two).await != newer {
        assert!(begun.elapsed() < DONE_WITHIN, "the key is not used");
    }
    rewrap(&one);
    changed(&one, &["destroy", &older, "--yes", "--now", "irreversibly"]);
    slowly("the removal", || {
        (!objects(&site).contains(&older)).then_some(())
    });
    slowly("the other broker", || {
        let keys = key(&two, "admin", &["suspend", &older]);
        assert_eq!(keys.code, Some(REFUSED), "{keys:#?}");
        keys.stderr.contains("can never change").then_some(())
    });
    for broker in [&one, &two] {
        let user = wraps_under(broker).await;
        assert_ne!(user, older);
    }
    let audit = site.audit();
    let is_mark = |line: &&str| {
        line.contains("\"action\":\"wrapping_key.destroyed\"")
            && line.contains("\"kind\":\"outcome\"")
            && line.contains("\"outcome\":\"ok\"")
    };
    assert_eq!(audit.lines().filter(is_mark).count(), 1);
    assert!(
        !site.log().contains(r#""alert":"registry""#),
        "{}",
        site.log()
    );
    assert!(
        !site.log().contains(r#""alert":"wrapping-key""#),
        "{}",
        site.log()
    );
    refused(
        Caller::of(&two, "releaser").unwrap("unknown").await,
        "KEY_NOT_FOUND",
    );
}

/// A broker whose state directory does not know the schedule, like one on a restored copy of the database, asks before it destroys.
#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_did_not_accept_the_request_destroys_nothing_before_it_is_confirmed() {
    let (site, [older, _]) = with_two_keys().await;
    permit_now(&site);
    let broker = Broker::start_on(site);
    changed(&broker, &["deactivate", &older]);
    rewrap(&broker);
    changed(
        &broker,
        &["destroy", &older, "--yes", "--now", "irreversibly"],
    );
    let site = broker.kill();
    let state = site.folder().join("audit/state/destructions-serve");
    fs::remove_file(state).unwrap();
    let broker = Broker::start_on(site);
    slowly("the alert", || {
        let alerts = alerts(&broker);
        let is_it = |line: &String| line.contains("--confirm-schedule");
        alerts.iter().any(is_it).then_some(())
    });
    assert_eq!(states(&broker).await[&older], WrappingKeyState::Deactivated);
    assert!(objects(&broker.site).contains(&older));
    let denied = key(
        &broker,
        "auditor",
        &["destroy", &older, "--confirm-schedule", "--yes"],
    );
    assert!(denied.stderr.contains("POLICY"), "{denied:#?}");
    changed(&broker, &["destroy", &older, "--confirm-schedule", "--yes"]);
    destroyed(&broker, &older);
}
