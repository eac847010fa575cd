//! Policies of an operator, with the real binary: in force, in the audit log, replaced and refused while it serves; and the commands
//! that check and explain them.

use std::{fs, path::PathBuf};

use rustix::process::Signal;
use serde_json::Value;

use crate::{
    client::{Caller, refused},
    process::{Broker, until},
    site::{Options, Site},
};

const MATERIAL: &[u8] = b"material of this user";
const NOT_FROM_HERE: &str = r#"
@id("not-from-here")
forbid (principal, action == Keybroker::Action::"user_key.unwrap", resource)
unless { context.peer.isInRange(ip("192.0.2.0/24")) };
"#;
const FROM_HERE: &str = r#"
@id("from-here")
forbid (principal, action == Keybroker::Action::"user_key.unwrap", resource)
unless { context.peer.isLoopback() };
"#;

/// A site with a directory of policies, in which these are.
fn site(files: &[(&str, &str)]) -> (Site, PathBuf) {
    let site = Site::fresh(Options::default());
    let directory = site.policy_directory();
    for (name, text) in files {
        fs::write(directory.join(name), text).unwrap();
    }
    (site, directory)
}

fn decided_by(broker: &Broker, policy: &str) -> usize {
    let field = format!(r#""policy":"{policy}""#);
    broker.site.audit().matches(&field).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_is_in_force_in_the_audit_log_and_replaced_while_it_serves() {
    let (site, directory) = site(&[("net.cedar", NOT_FROM_HERE)]);
    let broker = tokio::task::spawn_blocking(|| Broker::start_on(site.into()))
        .await
        .unwrap();
    let [enroller, releaser] = ["enroller", "releaser"].map(|name| Caller::of(&broker, name));
    enroller.create("ada", MATERIAL).await.unwrap();
    assert!(decided_by(&broker, "enrol-role") > 0);
    refused(releaser.unwrap("ada").await, "POLICY");
    assert_eq!(decided_by(&broker, "not-from-here"), 1);
    // A batch of which nothing is permitted is one refusal.
    refused(releaser.batch(&["ada", "bob"]).await, "POLICY");
    assert_eq!(decided_by(&broker, "not-from-here"), 2);

    let reloaded = |times: usize| {
        let site = &broker.site;
        until("the reload", move || {
            (site.log().matches("policies reloaded").count() == times).then_some(())
        });
    };
    fs::write(directory.join("net.cedar"), FROM_HERE).unwrap();
    broker.signal(Signal::HUP);
    reloaded(1);
    assert_eq!(releaser.unwrap("ada").await.unwrap().key_material, MATERIAL);
    assert_eq!(decided_by(&broker, "release-role"), 1);

    // Without a signal, too.
    fs::write(directory.join("net.cedar"), NOT_FROM_HERE).unwrap();
    reloaded(2);
    refused(releaser.unwrap("ada").await, "POLICY");
}

/// A file that is bad, and one that is gone: the old ones stay in force, and it is said once.
#[tokio::test(flavor = "multi_thread")]
async fn a_bad_or_missing_policy_leaves_the_old_ones_in_force() {
    let (site, directory) = site(&[("net.cedar", NOT_FROM_HERE)]);
    let broker = tokio::task::spawn_blocking(|| Broker::start_on(site.into()))
        .await
        .unwrap();
    let [enroller, releaser] = ["enroller", "releaser"].map(|name| Caller::of(&broker, name));
    enroller.create("ada", MATERIAL).await.unwrap();
    let alerts = |times: usize| {
        let site = &broker.site;
        until("the alert", move || {
            (site.log().matches("\"alert\":\"policy-reload\"").count() == times).then_some(())
        });
    };
    fs::write(
        directory.join("net.cedar"),
        "permit (principal, action, resource)",
    )
    .unwrap();
    alerts(1);
    assert!(broker.site.log().contains("net.cedar, line 1, column"));
    refused(releaser.unwrap("ada").await, "POLICY");

    fs::remove_file(directory.join("net.cedar")).unwrap();
    alerts(2);
    assert!(broker.site.log().contains("net.cedar: the file is missing"));
    refused(releaser.unwrap("ada").await, "POLICY");
    assert_eq!(decided_by(&broker, "not-from-here"), 2);

    fs::write(directory.join("net.cedar"), "").unwrap();
    until("the reload", || {
        broker
            .site
            .log()
            .contains("policies reloaded")
            .then_some(())
    });
    assert_eq!(releaser.unwrap("ada").await.unwrap().key_material, MATERIAL);
}

#[test]
fn a_start_with_a_bad_policy_is_refused() {
    let (site, directory) = site(&[(
        "a.cedar",
        "forbid (principal, action, resource) when { context.nonsense };",
    )]);
    let finished = site.serve_to_its_end();
    assert_eq!(finished.code, Some(3), "{finished:#?}");
    assert!(
        finished.stderr.contains("a.cedar, line 1, column 45"),
        "{finished:#?}"
    );
    for command in [["config", "check"], ["policy", "check"]] {
        let finished = site.run(&command);
        assert_eq!(finished.code, Some(3), "{finished:#?}");
        assert!(
            finished.stderr.contains("a.cedar, line 1, column 45"),
            "{finished:#?}"
        );
    }
    let finished = site.run(&["policy", "check", "-o", "json"]);
    let problems: Value = serde_json::from_str(&finished.stdout).unwrap();
    assert_eq!(
        (
            &problems[0]["file"],
            &problems[0]["line"],
            &problems[0]["column"]
        ),
        (&"a.cedar".into(), &1.into(), &45.into())
    );

    fs::remove_file(directory.join("a.cedar")).unwrap();
    let good: Value =
        serde_json::from_str(&site.expect_ok(&["policy", "check", "-o", "json"])).unwrap();
    assert_eq!((&good["files"], &good["forbids"]), (&0.into(), &14.into()));
}

/// The command that explains whether somebody may have ada's key.
fn explain<'a>(who: &[&'a str]) -> Vec<&'a str> {
    let question = [
        "--action",
        "user_key.unwrap",
        "--user",
        "ada",
        "--key-name",
        "vault",
    ];
    [&["policy", "explain", "-o", "json"], who, &question].concat()
}

#[test]
fn a_decision_is_explained() {
    let (site, _directory) = site(&[("net.cedar", NOT_FROM_HERE)]);
    let asked =
        |who: &[&str]| -> Value { serde_json::from_str(&site.expect_ok(&explain(who))).unwrap() };
    let releaser = format!("URI:{}", crate::pki::uri("releaser"));
    let inside = asked(&["--principal", &releaser, "--peer", "192.0.2.7"]);
    assert_eq!(
        (&inside["decision"], &inside["policy"]),
        (&"allow".into(), &"release-role".into())
    );
    let outside = asked(&["--principal", &releaser, "--peer", "198.51.100.7"]);
    assert_eq!(
        (&outside["decision"], &outside["policy"]),
        (&"deny".into(), &"not-from-here".into())
    );

    let view = |answer: &Value, id: &str| {
        let policies = answer["policies"].as_array().unwrap();
        policies
            .iter()
            .find(|view| view["id"] == id)
            .unwrap()
            .clone()
    };
    assert_eq!(view(&outside, "release-role")["applies"], "yes");
    assert_eq!(view(&outside, "own-keys")["why_not"], "another principal");
    assert_eq!(
        view(&outside, "enrol-role")["why_not"],
        "another principal, another action"
    );
    assert_eq!(
        view(&inside, "not-from-here")["why_not"],
        "unless: context.peer.isInRange(ip(\"192.0.2.0/24\"))"
    );

    // A user from a file, with an option that says otherwise.
    let file = site.folder().join("ada.json");
    fs::write(&file, r#"{"subject": "ada", "amr": ["otp"], "peer": "192.0.2.7", "attributes": {"groups": ["staff"]}}"#).unwrap();
    let file = file.to_str().unwrap();
    assert_eq!(asked(&["--principal-file", file])["policy"], "own-keys");
    let bob = asked(&["--principal-file", file, "--subject", "bob"]);
    assert_eq!(bob["policy"], "users-own-keys-only");
    assert_eq!(
        view(&bob, "own-keys")["why_not"],
        "condition not met: resource.user == principal.subject"
    );
    let both = asked(&["--role", "release", "--role", "admin"]);
    assert_eq!(
        (&both["policy"], &both["policies"]),
        (&"separation-of-duties".into(), &Value::Array(Vec::new()))
    );
}

#[test]
fn an_explanation_is_held_to_what_is_expected_and_asked_for_in_full() {
    let (site, _directory) = site(&[]);
    // What is expected is exit code 0, and another decision 12.
    let expect = |decision: &str| {
        site.run(&explain(&["--role", "release", "--expect", decision]))
            .code
    };
    assert_eq!((expect("allow"), expect("deny")), (Some(0), Some(12)));

    for (bad, words) in [
        (&["--principal", "URI:nobody"][..], "no [[principal]]"),
        (&["--principal-file", "/nowhere"], "cannot read"),
        (&["--role", "realease"], "realease"),
        (&["--subject", "ada", "--role", "admin"], "has no roles"),
        (&["--attribute", "staff"], "NAME=VALUE"),
        (&["--time", "noon"], "RFC 3339"),
        (&["--peer", "here"], "here"),
    ] {
        let finished = site.run(&explain(bad));
        assert_eq!(finished.code, Some(2), "{bad:?}: {finished:#?}");
        assert!(finished.stderr.contains(words), "{bad:?}: {finished:#?}");
    }
    let list = [
        "policy",
        "explain",
        "--role",
        "auditor",
        "--action",
        "audit.read",
    ];
    assert!(site.expect_ok(&list).contains("auditor-role"));
    let mismatch = site.run(&[&list[..], &["--user", "ada"]].concat());
    assert_eq!(mismatch.code, Some(2), "{mismatch:#?}");
}
