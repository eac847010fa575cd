//! The audit log of a broker that serves: tampered with while it runs, and cut off by a kill.

use std::fs::{self, OpenOptions};

use reqwest::{Method, StatusCode};

use crate::{
    client::{Caller, eventually, refused},
    process::{Broker, until},
    rest::site::RestSite,
    site::{Finished, Options},
    wire::get,
};

const MATERIAL: &[u8] = b"material of this user";

fn field<'a>(finished: &'a Finished, name: &str) -> &'a str {
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    let line = finished.stdout.lines().find(|line| line.contains(name));
    line.unwrap_or_else(|| panic!("no {name}: {finished:#?}"))
}

/// A truncated log, as `copytruncate` of a log rotation leaves it: refused without a call, also by the next process, until
/// the operator acknowledges it.
#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_audit_log_stops_every_release_until_an_operator_acknowledges_it() {
    let broker = Broker::start(Options::default());
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("ada", MATERIAL).await.unwrap();
    let nothing = broker.site.run(&["audit", "acknowledge"]);
    assert_eq!(nothing.code, Some(2), "{nothing:#?}");

    let segment = broker.site.audit_directory().join("serve/00000001.jsonl");
    let file = OpenOptions::new().write(true).open(&segment).unwrap();
    file.set_len(0).unwrap();
    until("the alert", || {
        broker.site.log().contains("audit-tampered").then_some(())
    });
    let releaser = Caller::of(&broker, "releaser");
    refused(releaser.unwrap("ada").await, "AUDIT_DOWN");
    refused(enroller.create("bob", MATERIAL).await, "AUDIT_DOWN");
    let ready = get(broker.status, "/readyz");
    assert!(ready.contains("keybroker audit acknowledge"), "{ready}");

    // A restart is no way round it.
    let (site, _) = broker.stop();
    let finished = site.serve_to_its_end();
    assert_eq!(finished.code, Some(8), "{finished:#?}");
    assert!(
        finished.stderr.contains("keybroker audit acknowledge"),
        "{finished:#?}"
    );
    let verified = site.run(&["audit", "verify"]);
    assert_eq!(verified.code, Some(12), "{verified:#?}");

    let acknowledged = site.run(&["audit", "acknowledge"]);
    assert!(field(&acknowledged, "effect").contains("next start"));
    let broker = Broker::start_on(site);
    let releaser = Caller::of(&broker, "releaser");
    releaser.unwrap("ada").await.unwrap();

    // And while it serves.
    let segment = fs::read_dir(broker.site.audit_directory().join("serve"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "jsonl")
        })
        .max()
        .unwrap();
    fs::remove_file(segment).unwrap();
    until("health to say so", || {
        let ready = get(broker.status, "/readyz");
        ready.contains("keybroker audit acknowledge").then_some(())
    });
    let acknowledged = broker.site.run(&["audit", "acknowledge"]);
    assert!(field(&acknowledged, "effect").contains("now"));
    eventually(|| releaser.unwrap("ada")).await;
    let (site, _) = broker.stop();
    let recorded = site.audit();
    assert!(
        recorded.contains("log.tampering_acknowledged"),
        "{recorded}"
    );
}

/// An acknowledgement that cannot take effect is tried again with every comparison of the files, and logged once.
#[tokio::test(flavor = "multi_thread")]
async fn an_acknowledgement_without_effect_is_logged_once() {
    let broker = Broker::start(Options::default());
    let log = broker.site.audit_directory().join("serve");
    // Segments without an id are not accepted, whoever acknowledges it.
    let id = fs::read(log.join("log-id")).unwrap();
    fs::remove_file(log.join("log-id")).unwrap();
    until("the alert", || {
        broker.site.log().contains("audit-tampered").then_some(())
    });
    let acknowledged = broker.site.run(&["audit", "acknowledge"]);
    assert!(field(&acknowledged, "effect").contains("next start"));
    let reports = broker.site.log().matches("cannot continue yet").count();
    assert_eq!(reports, 1);
    // It takes effect when the cause is gone.
    fs::write(log.join("log-id"), id).unwrap();
    until("the log", || {
        broker
            .site
            .log()
            .contains("the audit log continues")
            .then_some(())
    });
    broker.stop();
}

/// Old segments are removed by command while the broker serves. The audit directory is not touched by hand.
#[tokio::test(flavor = "multi_thread")]
async fn old_segments_are_removed_by_command_while_the_broker_serves() {
    let (site, _) = Broker::start(Options::default()).stop();
    let broker = Broker::start_on(site);
    for wrong in ["2", "0", "99"] {
        let refused = broker
            .site
            .run(&["audit", "remove-segments", "--through", wrong]);
        assert_eq!(refused.code, Some(2), "{refused:#?}");
        assert!(refused.stderr.contains("segments 1 to 2"), "{refused:#?}");
    }
    let removed = broker
        .site
        .run(&["audit", "remove-segments", "--through", "1"]);
    assert!(field(&removed, "effect").contains("now"));
    let log = broker.site.audit_directory().join("serve");
    assert!(!log.join("00000001.jsonl").exists() && log.join("00000002.jsonl").exists());
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("ada", MATERIAL).await.unwrap();
    let (site, _) = broker.stop();
    let verified = site.run(&["audit", "verify"]);
    assert_eq!(verified.code, Some(0), "{verified:#?}");
    let (site, _) = Broker::start_on(site).stop();
    assert!(site.audit().contains("log.segments_removed"));
}

/// Refusals before authentication are counted, and written once a minute. A kill loses the last second of them, not more.
#[tokio::test(flavor = "multi_thread")]
async fn refusals_that_a_killed_broker_had_counted_are_in_the_audit_log_of_the_next() {
    let rest = RestSite::open();
    for _ in 0..5 {
        let request = rest.request(Method::GET, "/user-keys");
        let answer = request.bearer_auth("nonsense").send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::UNAUTHORIZED);
    }
    let kept = rest
        .broker
        .site
        .audit_directory()
        .join("state/refusals-serve");
    until("the counts in the state directory", || {
        let text = fs::read_to_string(&kept).ok()?;
        text.contains("\"count\":5").then_some(())
    });
    let site = rest.broker.kill();
    assert!(!site.audit().contains("connection.refused"));
    let (site, _) = Broker::start_on(site).stop();
    let audit = site.audit();
    let entry = audit
        .lines()
        .find(|line| line.contains("connection.refused"))
        .unwrap();
    assert!(
        entry.contains("\"count\":5") && entry.contains("\"peer\":\"127.0.0.0/24\""),
        "{entry}"
    );
}

/// The entries of a new envelope have its digest, so that a row that the broker made can be told from any other row.
#[tokio::test(flavor = "multi_thread")]
async fn the_entries_of_a_new_envelope_have_its_digest() {
    let broker = Broker::start(Options::default());
    let [enroller, lifecycle] = ["enroller", "lifecycle"].map(|name| Caller::of(&broker, name));
    enroller.create("ada", MATERIAL).await.unwrap();
    enroller
        .replace("ada", b"another material", 1, "")
        .await
        .unwrap();
    lifecycle.restore("ada", 1, 2).await.unwrap();
    lifecycle.delete("ada", 3).await.unwrap();
    let stored = broker
        .site
        .sql("SELECT hex(envelope) FROM revisions ORDER BY revision");
    let stored = stored.lines().map(|line| {
        let envelope = hex::decode(line.trim()).unwrap();
        hex::encode(aws_lc_rs::digest::digest(
            &aws_lc_rs::digest::SHA256,
            &envelope,
        ))
    });
    let stored: Vec<String> = stored.collect();
    assert_eq!(stored.len(), 3);
    let audit = broker.site.audit();
    let outcomes = audit
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .filter(|entry| entry["kind"] == "outcome" && entry["user"] == "ada");
    let digests: Vec<Option<String>> = outcomes
        .map(|entry| entry["digest"].as_str().map(str::to_owned))
        .collect();
    let mut expected: Vec<Option<String>> = stored.into_iter().map(Some).collect();
    expected.push(None);
    assert_eq!(digests, expected);
}
