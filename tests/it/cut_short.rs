//! A command that is killed between its intent and its outcome: the next one closes what it left.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
};

use serde_json::Value;

use crate::{
    process::until,
    site::{Options, Site},
};

fn logs(site: &Site) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(site.audit_directory()) else {
        return Vec::new();
    };
    // Beside the logs there is the state directory, in no particular order.
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.filter(|path| !path.ends_with("state")).collect()
}

fn verified(site: &Site, log: &Path) -> Value {
    let log = log.to_str().unwrap();
    serde_json::from_str(&site.expect_ok(&["audit", "verify", log, "-o", "json"])).unwrap()
}

#[test]
fn a_killed_command_is_closed_by_the_next() {
    let site = Site::without_keys(Options::default());
    site.expect_ok(&["store", "migrate"]);
    let before = logs(&site);
    // Long enough to be met in the middle.
    let mut killed = site
        .command(&["key", "generate", "--bits", "4096"])
        .env("SOFTHSM2_CONF", site.token.configuration())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    until("the intent", || {
        assert_eq!(killed.try_wait().unwrap(), None, "it was too quick");
        site.audit().contains("wrapping_key.generate").then_some(())
    });
    // While it runs it is not cut short.
    let beside = site.run(&["token", "backup-confirmed"]);
    assert!(!beside.stderr.contains("was interrupted"), "{beside:#?}");
    killed.kill().unwrap();
    killed.wait().unwrap();
    let left = logs(&site)
        .into_iter()
        .find(|log| !before.contains(log) && verified(&site, log)["open_intents"] == 1);
    let left = left.expect("the command was killed before its outcome");

    let next = site.run(&["key", "generate", "--bits", "2048"]);
    assert_eq!(next.code, Some(0), "{next:#?}");
    for words in [
        "wrapping_key.generate",
        "was interrupted",
        left.file_name().unwrap().to_str().unwrap(),
    ] {
        assert!(next.stderr.contains(words), "{words}: {next:#?}");
    }
    let report = verified(&site, &left);
    assert_eq!(
        (&report["open_intents"], &report["problems"]),
        (&0.into(), &0.into())
    );
    let shown = site.expect_ok(&["audit", "show", left.to_str().unwrap(), "-o", "json"]);
    let entries: Vec<Value> = serde_json::from_str(&shown).unwrap();
    let find = |kind: &str| entries.iter().find(|entry| entry["kind"] == kind).unwrap();
    let (intent, recovered) = (find("intent"), find("recovered"));
    assert_eq!(recovered["outcome"], "unknown");
    for field in ["call_id", "principal", "action"] {
        assert_eq!(recovered[field], intent[field], "{field}");
    }
    // Once is enough.
    let after = site.run(&["key", "generate", "--bits", "2048"]);
    assert!(!after.stderr.contains("was interrupted"), "{after:#?}");
}

/// Only `serve` migrates by itself, and audits it: a command that reads leaves the schema to the running release.
#[test]
fn serve_migrates_in_its_audit_log_and_no_reader_does() {
    let site = Site::without_keys(Options::default());
    site.write_configuration(|text| {
        *text = text.replace("[store]\n", "[store]\nmigrate_at_start = true\n");
    });
    let listed = site.run(&["key", "list"]);
    assert_eq!(listed.code, Some(7), "{listed:#?}");
    assert!(listed.stderr.contains("store migrate"), "{listed:#?}");
    // There is no key to check.
    assert_eq!(site.run(&["token", "check"]).code, Some(6));
    assert!(!site.database().exists());

    let migrations = || {
        let entries = site.audit();
        // The folder also holds the lock, with the name of its last holder.
        let entries = entries
            .lines()
            .filter(|line| line.starts_with('{'))
            .map(|line| serde_json::from_str::<Value>(line).unwrap());
        let entries = entries.filter(|entry| entry["action"] == "store.migrate");
        entries.collect::<Vec<_>>()
    };
    for _ in 0..2 {
        // No key is registered, so it gives up after that.
        let served = site.serve_to_its_end();
        assert_eq!(served.code, Some(6), "{served:#?}");
        let [intent, outcome] = &migrations()[..] else {
            panic!("{:?}", migrations())
        };
        assert_eq!(
            (&intent["kind"], &outcome["kind"]),
            (&"intent".into(), &"outcome".into())
        );
        assert_eq!(outcome["outcome"], "ok");
        assert_eq!(intent["call_id"], outcome["call_id"]);
    }
    let status = site.expect_ok(&["store", "status", "-o", "json"]);
    let status: Value = serde_json::from_str(&status).unwrap();
    assert_eq!(status["ready"], true, "{status}");
}
