//! The systemd unit, held against systemd's own tools and against what the broker needs.

use std::{fs, path::Path, process::Command};

use keybroker::cli::exit::Exit;

use crate::root;

const UNIT: &str = "packaging/systemd/keybroker.service";

fn unit() -> String {
    fs::read_to_string(root().join(UNIT)).unwrap()
}

fn value(name: &str) -> String {
    let unit = unit();
    let mut values = unit
        .lines()
        .filter_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    let value = values.next().unwrap_or_else(|| panic!("no {name}="));
    assert_eq!(values.next(), None, "{name}= is there twice");
    value.to_owned()
}

fn analyze(arguments: &[&str]) -> String {
    let output = Command::new("systemd-analyze")
        .args(arguments)
        .output()
        .expect("there is no systemd-analyze: run scripts/install.sh");
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {said}");
    said.into_owned()
}

/// The unit with the binary of this build, which systemd looks for.
fn with_our_binary(folder: &Path) -> String {
    let path = folder.join("keybroker.service");
    let unit = unit().replace("/usr/bin/keybroker", env!("CARGO_BIN_EXE_keybroker"));
    fs::write(&path, unit).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn systemd_understands_every_line() {
    let folder = tempfile::tempdir().unwrap();
    let said = analyze(&["verify", "--man=no", &with_our_binary(folder.path())]);
    assert_eq!(said, "");
}

#[test]
fn systemd_finds_little_exposed() {
    let folder = tempfile::tempdir().unwrap();
    let unit = with_our_binary(folder.path());
    // 2.0 of 10; what is left is the network, without which a broker is none.
    let said = analyze(&["security", "--offline=true", "--threshold=20", &unit]);
    assert!(said.contains("Overall exposure level"), "{said}");
}

/// The drain of the configuration's default, and what follows it, end before systemd kills the process.
#[test]
fn there_is_time_for_the_drain() {
    let drain_s = keybroker::server::Limits::default().drain_timeout_ms / 1_000;
    let (lame_duck_s, mutations_s, workers_s, store_s) = (1, 5, 11, 5);
    let needed_s = drain_s + lame_duck_s + mutations_s + workers_s + store_s;
    let given_s: u64 = value("TimeoutStopSec").parse().unwrap();
    assert!(given_s >= needed_s, "{given_s} < {needed_s}");
}

/// An exit code that needs a person ends the restarts, and its page says so. Every other one is tried again for as long as it takes.
#[test]
fn what_needs_a_person_is_not_started_again() {
    let codes: Vec<String> = Exit::ALL
        .into_iter()
        .filter(|exit| exit.needs_person())
        .map(|exit| exit.code().to_string())
        .collect();
    assert_eq!(value("RestartPreventExitStatus"), codes.join(" "));
    assert_eq!(value("StartLimitIntervalSec"), "0");
    let (last, others) = codes.split_last().unwrap();
    let sentence = format!(
        "does not start `serve` again after codes {} and {last}",
        others.join(", ")
    );
    let page = fs::read_to_string(root().join("docs/cli.md")).unwrap();
    let page = page.replace('\n', " ");
    assert!(page.contains(&sentence), "{sentence}");
    let pause = format!("after {} seconds", value("RestartSec"));
    assert!(page.contains(&pause), "{pause}");
}

#[test]
fn the_promises_of_the_documentation_stand_in_the_unit() {
    for (name, expected) in [
        ("Type", "notify"),
        ("KillMode", "mixed"),
        ("NoNewPrivileges", "yes"),
        ("LimitCORE", "0"),
        ("LoadCredential", "pin:/etc/keybroker/pin"),
        ("User", "keybroker"),
    ] {
        assert_eq!(value(name), expected, "{name}");
    }
}
