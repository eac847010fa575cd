//! `store purge`: what is older than the retention goes for good, is named in the audit log, and never comes back.

use std::{
    process::{Command, Stdio},
    sync::Arc,
    thread,
    time::Duration,
};

use serde_json::Value;

use crate::{
    client::{Caller, refused},
    process::Broker,
    servers::{Kind, Server, section},
    site::{Options, Site},
};

const DAY_US: u64 = 24 * 3_600 * 1_000_000;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Makes everything in the database look that many days older.
fn age(site: &Site, days: u64) {
    let by = days * DAY_US;
    site.sql(&format!(
        "UPDATE records SET created_us = created_us - {by}, updated_us = updated_us - {by}, \
             deleted_us = deleted_us - {by}; \
         UPDATE revisions SET created_us = created_us - {by}; UPDATE changes SET changed_us = changed_us - {by}"
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn only_an_old_deletion_is_final_and_the_audit_log_names_it() {
    let broker = Broker::start(Options::default());
    let [enroller, lifecycle] = ["enroller", "lifecycle"].map(|name| Caller::of(&broker, name));
    for user in ["ada", "bob"] {
        enroller.create(user, b"first material").await.unwrap();
        enroller.replace(user, b"other", 1, "").await.unwrap();
    }
    lifecycle.delete("ada", 2).await.unwrap();

    // A SQLite file belongs to the broker while it serves; to look is allowed.
    let busy = broker.site.run(&["store", "purge"]);
    assert_eq!(busy.code, Some(9), "{busy:#?}");
    assert!(busy.stderr.contains("stop the broker"), "{busy:#?}");
    let dry = json(
        &broker
            .site
            .expect_ok(&["-o", "json", "store", "purge", "--dry-run"]),
    );
    assert_eq!(
        (&dry["records"], &dry["dry_run"]),
        (&0.into(), &true.into())
    );

    let (site, _) = broker.stop();
    let old = site.sql(
        "SELECT hex(envelope) FROM revisions JOIN records USING (record_id, revision) WHERE user = 'ada'",
    );
    age(&site, 31);
    let slip = site.run(&["store", "purge", "--older-than", "29"]);
    assert_eq!(slip.code, Some(2), "{slip:#?}");
    let none = json(&site.expect_ok(&["-o", "json", "store", "purge", "--older-than", "32"]));
    assert_eq!(
        (&none["records"], &none["revisions"]),
        (&0.into(), &0.into())
    );
    for arguments in [&["store", "purge", "--dry-run"][..], &["store", "purge"]] {
        let arguments = [&["-o", "json"], arguments].concat();
        let purged = json(&site.expect_ok(&arguments));
        assert_eq!(purged["records"], 1, "{arguments:?}");
        assert_eq!(purged["revisions"], 1, "{arguments:?}");
        assert_eq!(purged["changes"], 5, "{arguments:?}");
    }
    let left = site.sql("SELECT count(*) FROM revisions; SELECT user FROM records");
    assert_eq!(left, "1\nbob\n");
    let audit = site.audit();
    for kind in ["intent", "outcome"] {
        let of = |action: &str| {
            let lines = audit.lines().filter(|line| {
                line.contains(&format!("\"action\":\"{action}\""))
                    && line.contains(&format!("\"kind\":\"{kind}\""))
                    && line.contains("\"outcome\":\"ok\"")
            });
            lines.map(str::to_owned).collect::<Vec<_>>()
        };
        let records = of("user_key.purge");
        assert_eq!(records.len(), 1, "{audit}");
        assert!(records[0].contains("\"user\":\"ada\""), "{records:?}");
        assert_eq!(of("store.purge").len(), 2, "{audit}");
    }

    // For the broker its newest change is of today, and a database without its mark is an earlier state.
    site.expect_ok(&["store", "accept-restored"]);
    // The name is free. The old row is of another record, and the token knows.
    let broker = Broker::start_on(site);
    let [enroller, releaser] = ["enroller", "releaser"].map(|name| Caller::of(&broker, name));
    enroller.create("ada", b"new material").await.unwrap();
    assert_eq!(releaser.unwrap("bob").await.unwrap().key_material, b"other");
    let (site, _) = broker.stop();
    site.sql(&format!(
        "UPDATE revisions SET envelope = x'{}' WHERE record_id = (SELECT record_id FROM records WHERE user = 'ada')",
        old.trim()
    ));
    let broker = Broker::start_on(site);
    refused(
        Caller::of(&broker, "releaser").unwrap("ada").await,
        "RECORD_DAMAGED",
    );
}

/// A database that fails in the middle: the log says what is gone, and not that nothing is.
#[test]
fn a_purge_that_fails_says_how_much_is_gone() {
    const RECORDS: u64 = 400;
    let site = Site::without_keys(Options::default());
    site.expect_ok(&["store", "migrate"]);
    site.sql(&format!(
        "BEGIN; WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {RECORDS})
         INSERT INTO records SELECT CAST(printf('%016d', i) AS BLOB), 'default', 'user-' || i, 'vault',
             'active', 2, 1, 1, NULL FROM n;
         INSERT INTO revisions SELECT record_id, 1, x'01', zeroblob(16), 1 FROM records;
         INSERT INTO revisions SELECT record_id, 2, x'01', zeroblob(16), 1 FROM records;
         CREATE TRIGGER broken BEFORE DELETE ON revisions
             WHEN OLD.record_id = (SELECT record_id FROM records WHERE user = 'user-350')
             BEGIN SELECT RAISE(ABORT, 'the disk is broken'); END;
         COMMIT"
    ));
    let failed = site.run(&["store", "purge"]);
    assert_ne!(failed.code, Some(0), "{failed:#?}");
    let left = site.sql("SELECT count(*) FROM revisions");
    let gone = 2 * RECORDS - left.trim().parse::<u64>().unwrap();
    assert!(gone >= 100, "{gone}");
    let audit = site.audit();
    let lines = audit.lines();
    let entries: Vec<Value> = lines
        .filter_map(|line| Some(json(&line[line.find('{')?..])))
        .collect();
    let of = |action: &'static str| {
        let outcomes = entries.iter().filter(|entry| entry["kind"] == "outcome");
        outcomes.filter(move |entry| entry["action"] == action)
    };
    let revisions: Vec<&Value> = of("user_key.purge_revision").collect();
    assert_eq!(u64::try_from(revisions.len()).unwrap(), gone);
    for entry in revisions {
        assert_eq!(entry["outcome"], "ok", "{entry}");
        assert_eq!(entry["revision"], 1, "{entry}");
        assert!(entry["user"].is_string(), "{entry}");
    }
    let whole = of("store.purge").next().unwrap();
    assert_eq!(
        (&whole["outcome"], &whole["count"]),
        (&"unknown".into(), &gone.into())
    );
}

/// Killed at any moment and run again, it ends where an uninterrupted one does.
#[test]
fn a_purge_that_was_killed_is_run_again() {
    const RECORDS: u64 = 4_000;
    let site = Site::without_keys(Options::default());
    site.expect_ok(&["store", "migrate"]);
    site.sql(&format!(
        "BEGIN; WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {RECORDS})
         INSERT INTO records SELECT CAST(printf('%016d', i) AS BLOB), 'default', 'user-' || i, 'vault',
             CASE WHEN i % 2 THEN 'deleted' ELSE 'active' END, 1, 1, 1, CASE WHEN i % 2 THEN 1 END FROM n;
         INSERT INTO revisions SELECT record_id, 1, x'01', zeroblob(16), 1 FROM records; COMMIT"
    ));
    let deleted = || -> u64 {
        let count = site.sql("SELECT count(*) FROM records WHERE state = 'deleted'");
        count.trim().parse().unwrap()
    };
    let mut child = site
        .command(&["store", "purge"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    for _ in 0..1_000 {
        if deleted() < RECORDS / 2 {
            break;
        }
        thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let after_kill = deleted();
    assert!(after_kill < RECORDS / 2, "it was killed too early");
    let again = json(&site.expect_ok(&["-o", "json", "store", "purge"]));
    assert_eq!(again["records"], after_kill);
    assert_eq!(deleted(), 0);
    let left = site.sql("SELECT count(*) FROM records; SELECT count(*) FROM revisions");
    assert_eq!(left, format!("{0}\n{0}\n", RECORDS / 2));
}

/// A machine that was resumed with a wrong date: everything would be old.
#[test]
fn a_clock_that_is_ahead_purges_nothing() {
    for kind in [Kind::PostgreSql, Kind::MariaDb] {
        let server = Server::start(kind);
        let site = Site::without_keys(Options {
            store: Some(section(&server.settings(&server.database()))),
            ..Options::default()
        });
        site.expect_ok(&["store", "migrate"]);
        let library = site.folder().join("clock.so");
        let made = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .arg(&library)
            .arg(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/../../tests/it/clock.c"
            ))
            .status()
            .unwrap();
        assert!(made.success());
        for (ahead, code) in [("0", 0), ("4000000", 7), ("-4000000", 7)] {
            let mut command = site.command(&["store", "purge"]);
            command
                .env("LD_PRELOAD", &library)
                .env("KEYBROKER_TEST_CLOCK", ahead);
            let output = command.output().unwrap();
            assert_eq!(output.status.code(), Some(code), "{ahead}: {output:?}");
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(
                said.contains("correct the wrong clock"),
                code != 0,
                "{said}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_server_it_runs_beside_a_broker() {
    for kind in [Kind::PostgreSql, Kind::MariaDb] {
        let server = Server::start(kind);
        let database = server.database();
        let options = Options {
            store: Some(section(&server.settings(&database))),
            ..Options::default()
        };
        let site = Arc::new(Site::fresh(options));
        let broker = Broker::start_on(Arc::clone(&site));
        let [enroller, lifecycle] = ["enroller", "lifecycle"].map(|name| Caller::of(&broker, name));
        for user in ["ada", "bob"] {
            enroller.create(user, b"material").await.unwrap();
            enroller.replace(user, b"other", 1, "").await.unwrap();
        }
        lifecycle.delete("ada", 2).await.unwrap();
        let by = 31 * DAY_US;
        server.sql(
            &database,
            &format!(
                "UPDATE records SET deleted_us = deleted_us - {by}; \
                 UPDATE revisions SET created_us = created_us - {by};"
            ),
        );
        let purged = json(&site.expect_ok(&["-o", "json", "store", "purge"]));
        assert_eq!(
            (&purged["records"], &purged["revisions"]),
            (&1.into(), &1.into())
        );
        let releaser = Caller::of(&broker, "releaser");
        refused(releaser.unwrap("ada").await, "KEY_NOT_FOUND");
        assert_eq!(releaser.unwrap("bob").await.unwrap().key_material, b"other");
        enroller.create("ada", b"again").await.unwrap();
    }
}
