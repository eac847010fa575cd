//! A database that is an earlier state of itself: nothing is released or changed until an operator accepts it.

use std::{fs, path::PathBuf, sync::Arc};

use crate::{
    client::{Caller, eventually, refused},
    process::{Broker, until},
    site::{Options, Site},
};

const MATERIAL: &[u8] = b"material of this user";

/// A broker that has stored a key of ada.
async fn with_ada() -> Broker {
    let broker = Broker::start(Options::default());
    create(&broker, "ada").await;
    broker
}

async fn create(broker: &Broker, user: &str) {
    let enroller = Caller::of(broker, "enroller");
    enroller.create(user, MATERIAL).await.unwrap();
}

/// What the broker remembers of its database, in the state directory.
fn memory(site: &Site) -> PathBuf {
    site.audit_directory().join("state/acknowledged-serve")
}

/// No key is released until an operator accepts the database; then those that it has are.
async fn is_refused_until_accepted(broker: &Broker) {
    let releaser = Caller::of(broker, "releaser");
    refused(releaser.unwrap("ada").await, "STORE_DOWN");
    broker.site.expect_ok(&["store", "accept-restored"]);
    eventually(|| releaser.unwrap("ada")).await;
}

fn is_refused_with_an_alert(site: &Site) {
    until("the alert", || {
        site.log().contains("store-restored").then_some(())
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn an_earlier_state_of_the_database_is_refused_until_it_is_accepted() {
    let (site, _) = with_ada().await.stop();
    let backup = fs::read(site.database()).unwrap();

    let broker = Broker::start_on(site);
    create(&broker, "bob").await;
    let (site, _) = broker.stop();
    let newest = fs::read(site.database()).unwrap();
    fs::write(site.database(), &backup).unwrap();

    let broker = Broker::start_on(site);
    let releaser = Caller::of(&broker, "releaser");
    refused(releaser.unwrap("ada").await, "STORE_DOWN");
    let enroller = Caller::of(&broker, "enroller");
    refused(enroller.create("eve", MATERIAL).await, "STORE_DOWN");
    is_refused_with_an_alert(&broker.site);
    // From the first line on: a load balancer must not send calls here even for a moment.
    let first = until("the first line about health", || {
        let log = broker.site.log();
        let mut lines = log
            .lines()
            .skip_while(|line| !line.contains("store-restored"));
        let first = lines.find(|line| line.contains("\"health\""));
        first.map(str::to_owned)
    });
    assert!(first.contains("\"user_keys\":false"), "{first}");

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
    is_refused_until_accepted(&broker).await;
    let releaser = Caller::of(&broker, "releaser");
    refused(releaser.unwrap("bob").await, "KEY_NOT_FOUND");
    create(&broker, "bob").await;
}

/// A broker that is killed remembers, and one whose database changes while it serves acknowledges nothing any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_goes_back_under_a_broker_takes_no_change() {
    let broker = with_ada().await;
    let enroller = Caller::of(&broker, "enroller");
    broker.site.sql("DELETE FROM changes");
    refused(enroller.create("bob", MATERIAL).await, "STORE_DOWN");
    let releaser = Caller::of(&broker, "releaser");
    refused(releaser.unwrap("ada").await, "STORE_DOWN");
    is_refused_with_an_alert(&broker.site);
    let fact = memory(&broker.site);
    until("the fact", || fact.exists().then_some(()));

    let broker = Broker::start_on(broker.kill());
    is_refused_until_accepted(&broker).await;
}

/// The database with another identity is another one, whatever it holds.
#[tokio::test(flavor = "multi_thread")]
async fn another_database_is_refused_until_it_is_accepted() {
    let broker = with_ada().await;
    let enroller = Caller::of(&broker, "enroller");
    let releaser = Caller::of(&broker, "releaser");
    releaser.unwrap("ada").await.unwrap();
    let fact = memory(&broker.site);
    until("the fact", || fact.exists().then_some(()));
    broker
        .site
        .sql("UPDATE store_identity SET store_id = randomblob(16)");
    refused(enroller.create("bob", MATERIAL).await, "STORE_DOWN");
    refused(releaser.unwrap("ada").await, "STORE_DOWN");
    is_refused_with_an_alert(&broker.site);

    let (site, _) = broker.stop();
    let broker = Broker::start_on(site);
    is_refused_until_accepted(&broker).await;
    create(&broker, "eve").await;
}

/// The state directory is a second old at most, and the audit log has what was acknowledged since.
#[tokio::test(flavor = "multi_thread")]
async fn the_changes_before_a_kill_are_remembered_by_the_audit_log() {
    let (site, _) = with_ada().await.stop();
    let backup = fs::read(site.database()).unwrap();
    let fact = memory(&site);
    let before = fs::read(&fact).unwrap();

    let broker = Broker::start_on(site);
    create(&broker, "bob").await;
    let site = broker.kill();
    // As if it had been killed before it wrote the fact.
    fs::write(&fact, before).unwrap();
    for suffix in ["-wal", "-shm"] {
        let mut path = site.database().into_os_string();
        path.push(suffix);
        fs::remove_file(path).ok();
    }
    fs::write(site.database(), backup).unwrap();

    let broker = Broker::start_on(site);
    is_refused_until_accepted(&broker).await;
    // What the log has from before does not count any more.
    let (site, _) = broker.stop();
    let broker = Broker::start_on(site);
    Caller::of(&broker, "releaser").unwrap("ada").await.unwrap();
}

#[test]
fn a_damaged_memory_of_the_database_stops_the_start_and_can_be_replaced() {
    let site = Site::fresh(Options::default());
    let state = site.audit_directory().join("state");
    site.expect_ok(&["store", "accept-restored"]);
    for damaged in ["{", "{\"store\": \"xyz\", \"changes\": []}"] {
        fs::write(state.join("acknowledged-serve"), damaged).unwrap();
        let finished = site.serve_to_its_end();
        assert!(finished.code.is_some_and(|code| code != 0), "{finished:#?}");
        for part in ["acknowledged-serve", "damaged", "store accept-restored"] {
            assert!(finished.stderr.contains(part), "{part}: {finished:#?}");
        }
    }
    site.expect_ok(&["store", "accept-restored"]);
    let broker = Broker::start_on(Arc::new(site));
    broker.stop();
}

/// The form in which the release before kept the one change that it remembered.
#[tokio::test(flavor = "multi_thread")]
async fn the_memory_of_the_release_before_is_taken_over() {
    let (site, _) = with_ada().await.stop();
    let state = site.audit_directory().join("state");
    let kept = fs::read_to_string(state.join("acknowledged-serve")).unwrap();
    let (_, change) = kept.split_once("\"changes\":[").unwrap();
    let (change, _) = change.split_once(']').unwrap();
    assert!(change.starts_with("{\"call\""), "{kept}");
    fs::rename(state.join("acknowledged-serve"), state.join("acknowledged")).unwrap();
    fs::write(state.join("acknowledged"), change).unwrap();
    site.sql("DELETE FROM changes");
    let broker = Broker::start_on(site);
    refused(
        Caller::of(&broker, "releaser").unwrap("ada").await,
        "STORE_DOWN",
    );
}

/// `cp backup live` keeps device and inode of the file.
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_copied_over_the_live_file_is_refused() {
    let (site, _) = with_ada().await.stop();
    let backup = fs::read(site.database()).unwrap();
    let broker = Broker::start_on(site);
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("bob", MATERIAL).await.unwrap();
    broker.site.sql("PRAGMA wal_checkpoint(TRUNCATE)");
    fs::write(broker.site.database(), &backup).unwrap();
    refused(enroller.create("eve", MATERIAL).await, "STORE_DOWN");
    is_refused_with_an_alert(&broker.site);
}

/// On the right database the command must not switch off the comparison.
#[tokio::test(flavor = "multi_thread")]
async fn accepting_the_right_database_forgets_nothing() {
    let broker = with_ada().await;
    let fact = memory(&broker.site);
    until("the change in the state file", || {
        let kept = fs::read_to_string(&fact).unwrap_or_default();
        kept.contains("\"call\"").then_some(())
    });
    let before = fs::read(&fact).unwrap();
    let said = broker.site.run(&["store", "accept-restored"]);
    assert_eq!(said.code, Some(0), "{said:#?}");
    assert!(
        said.stderr.contains("already accepts this database"),
        "{said:#?}"
    );
    assert_eq!(fs::read(&fact).unwrap(), before);
}

/// Moving the whole audit directory while the broker is stopped also removes what the state directory remembers.
#[tokio::test(flavor = "multi_thread")]
async fn an_audit_log_in_the_place_of_another_is_refused_until_it_is_acknowledged() {
    let broker = Broker::start(Options::default());
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("ada", MATERIAL).await.unwrap();
    let (site, _) = broker.stop();
    assert_eq!(entries(&site, "log.store_bound"), 1);
    let (directory, moved) = (site.audit_directory(), site.folder().join("moved"));
    fs::rename(&directory, &moved).unwrap();
    // The refusal is permanent: a second start does not take the new log for an old one.
    for _ in 0..2 {
        let finished = site.serve_to_its_end();
        assert_eq!(finished.code, Some(8), "{finished:#?}");
        let place = |part: &str| {
            let found = finished.stderr.find(part);
            found.unwrap_or_else(|| panic!("{part}: {finished:#?}"))
        };
        place("other logs of this instance");
        // A new host is more frequent than an attack, so its remedy comes first.
        let new_host = place("KEYBROKER_AUDIT_INSTANCE");
        assert!(new_host < place("replaced"), "{finished:#?}");
        assert!(
            new_host < place("keybroker audit acknowledge"),
            "{finished:#?}"
        );
    }
    // With the right directory back, the broker serves without an acknowledgement.
    let wrong = site.folder().join("wrong");
    fs::rename(&directory, &wrong).unwrap();
    fs::rename(&moved, &directory).unwrap();
    let broker = Broker::start_on(site);
    Caller::of(&broker, "releaser").unwrap("ada").await.unwrap();
    let (site, _) = broker.stop();
    assert_eq!(entries(&site, "log.store_bound"), 1);

    fs::rename(&directory, &moved).unwrap();
    fs::rename(&wrong, &directory).unwrap();
    site.expect_ok(&["audit", "acknowledge"]);
    let broker = Broker::start_on(site);
    Caller::of(&broker, "releaser").unwrap("ada").await.unwrap();
    let (site, _) = broker.stop();
    for action in ["log.tampering_acknowledged", "log.store_bound"] {
        assert_eq!(entries(&site, action), 1, "{action}");
    }
    // The acknowledged log is now the one that the database knows.
    let broker = Broker::start_on(site);
    Caller::of(&broker, "releaser").unwrap("ada").await.unwrap();
}

/// A migration cannot be undone, so it must not begin on the database of another broker.
#[tokio::test(flavor = "multi_thread")]
async fn a_migration_refuses_a_database_that_was_used_with_another_audit_log() {
    let broker = Broker::start(Options::default());
    let (site, _) = broker.stop();
    let (directory, moved) = (site.audit_directory(), site.folder().join("moved"));
    // With its own log, the database can be migrated again.
    site.expect_ok(&["store", "migrate"]);
    fs::rename(&directory, &moved).unwrap();
    let before = fs::read(site.database()).unwrap();
    for at_start in [false, true] {
        site.write_configuration(|text| {
            if at_start {
                *text = text.replace("[store]", "[store]\nmigrate_at_start = true");
            }
        });
        let finished = if at_start {
            site.serve_to_its_end()
        } else {
            site.run(&["store", "migrate"])
        };
        assert_eq!(finished.code, Some(8), "{finished:#?}");
        for words in [
            "other logs of this instance",
            "KEYBROKER_AUDIT_INSTANCE",
            "keybroker audit acknowledge",
        ] {
            assert!(finished.stderr.contains(words), "{words}: {finished:#?}");
        }
        assert!(fs::read(site.database()).unwrap() == before);
        // Without the latch, so that the database alone decides the second time.
        fs::remove_dir_all(&directory).unwrap();
    }
    // Another name is another instance; a dry run changes nothing and tells what would be done.
    let dry = site.run(&["store", "migrate", "--dry-run"]);
    assert_eq!(dry.code, Some(0), "{dry:#?}");
    let mut command = site.command(&["store", "migrate"]);
    command.env("KEYBROKER_AUDIT_INSTANCE", "another");
    let finished = site.run_to_its_end(command);
    assert_eq!(finished.code, Some(0), "{finished:#?}");
}

/// The word of the operator counts before a migration as it does at a start.
#[test]
fn a_migration_takes_an_acknowledged_audit_log() {
    let (site, _) = Broker::start(Options::default()).stop();
    fs::rename(site.audit_directory(), site.folder().join("moved")).unwrap();
    for _ in 0..2 {
        let finished = site.run(&["store", "migrate"]);
        assert_eq!(finished.code, Some(8), "{finished:#?}");
    }
    site.expect_ok(&["audit", "acknowledge"]);
    site.expect_ok(&["store", "migrate"]);
    let (site, _) = Broker::start_on(site).stop();
    site.expect_ok(&["store", "migrate"]);
}

/// A log of a release that did not record logs, and the first log of another instance, need no acknowledgement.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_of_the_release_before_and_a_new_instance_are_recorded() {
    let broker = Broker::start(Options::default());
    let (site, _) = broker.stop();
    let known = || site.sql("SELECT count(*) FROM audit_logs WHERE instance = 'serve'");
    assert_eq!(known().trim(), "1");
    // Another host with the same instance name was upgraded first.
    site.sql("UPDATE audit_logs SET log_id = '00112233445566778899aabbccddeeff'");
    fs::remove_file(site.audit_directory().join("state/audit-serve.binding")).unwrap();
    let warning = "already lists other audit logs of this instance";
    assert!(!site.log().contains(warning), "{}", site.log());
    let (site, _) = Broker::start_on(Arc::clone(&site)).stop();
    assert!(site.log().contains(warning), "{}", site.log());
    assert_eq!(
        site.sql("SELECT count(*) FROM audit_logs WHERE instance = 'serve'")
            .trim(),
        "2"
    );
    site.write_configuration(|text| {
        *text = text.replace("[audit]", "[audit]\ninstance = \"another\"");
    });
    let (site, _) = Broker::start_on(site).stop();
    let instances = site.sql("SELECT DISTINCT instance FROM audit_logs ORDER BY instance");
    assert_eq!(
        instances.split_whitespace().collect::<Vec<_>>(),
        ["another", "serve"]
    );
}

/// Replicas share one configuration file and one database; each has its own log, under the name from its environment.
#[test]
fn replicas_with_names_from_the_environment_record_their_logs() {
    let site = Arc::new(Site::fresh(Options::default()));
    let (directory, first) = (site.audit_directory(), site.folder().join("first"));
    for name in ["keybroker-0", "keybroker-1"] {
        let broker = Broker::start_as(Arc::clone(&site), |site| {
            let mut serve = site.serve();
            serve.env("KEYBROKER_AUDIT_INSTANCE", name);
            serve
        });
        broker.stop();
        assert!(directory.join(name).is_dir(), "{name}");
        // The next replica has a volume of its own.
        if !first.exists() {
            fs::rename(&directory, &first).unwrap();
        }
    }
    let instances = site.sql("SELECT instance FROM audit_logs ORDER BY instance");
    assert_eq!(
        instances.split_whitespace().collect::<Vec<_>>(),
        ["keybroker-0", "keybroker-1"]
    );
    let mut check = site.command(&["config", "check"]);
    check.env("KEYBROKER_AUDIT_INSTANCE", "Pod 1");
    let finished = site.run_to_its_end(check);
    assert_eq!(finished.code, Some(3), "{finished:#?}");
    for part in ["\"Pod 1\"", "KEYBROKER_AUDIT_INSTANCE"] {
        assert!(finished.stderr.contains(part), "{part}: {finished:#?}");
    }
}

fn entries(site: &Site, action: &str) -> usize {
    site.audit()
        .matches(&format!("\"action\":\"{action}\""))
        .count()
}
