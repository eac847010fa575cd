//! One-shot commands as a person or a script meets them: exit codes, tables and JSON.

use std::{fs, os::unix::fs::PermissionsExt as _, process::Stdio};

use serde_json::Value;

use crate::site::{Finished, Options, Site};

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn mistakes_of_the_caller_are_usage() {
    let site = Site::without_keys(Options::default());
    let no_endpoint = [
        "client", "--ca", "/nowhere", "--cert", "/nowhere", "--key", "/nowhere", "health",
    ];
    let plain = [
        &no_endpoint[..1],
        &["--endpoint", "http://localhost:1"],
        &no_endpoint[1..],
    ]
    .concat();
    let unreadable = [
        &no_endpoint[..1],
        &["--endpoint", "https://localhost:1"],
        &no_endpoint[1..],
    ]
    .concat();
    for (arguments, words) in [
        (&["no-such-command"][..], "unrecognized subcommand"),
        (&["key", "generate", "--bits", "1024"], "2048, 3072, 4096"),
        (&["key", "show", "xyz"], "32 hexadecimal digits"),
        (&no_endpoint, "--endpoint"),
        (&plain, "https://"),
        (&unreadable, "--ca: cannot read /nowhere"),
    ] {
        let finished = site.run(arguments);
        assert_eq!(finished.code, Some(2), "{arguments:?}: {finished:#?}");
        assert!(
            finished.stderr.contains(words),
            "{arguments:?}: {finished:#?}"
        );
        assert_eq!(finished.stdout, "");
    }
}

#[test]
fn the_configuration_is_checked_whole_and_shown_without_secrets() {
    let site = Site::without_keys(Options::default());
    assert_eq!(
        site.expect_ok(&["config", "check"]),
        "the configuration is valid\n"
    );
    let shown = site.expect_ok(&["config", "show"]);
    assert!(shown.contains("call_timeout_max_ms = 30000"), "{shown}");
    assert!(!shown.contains(site.token.pin()), "{shown}");
    let object = json(&site.expect_ok(&["config", "show", "-o", "json"]));
    assert_eq!(object["token"]["queue_length_max"], 4_096);

    let key = site.pki.key_file("server");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    site.write_configuration(|text| {
        *text = text
            .replace("workers = 1", "workers = 0")
            .replace(site.token.pin_file().to_str().unwrap(), "/no/such/pin");
    });
    let finished = site.run(&["config", "check"]);
    assert_eq!(finished.code, Some(3), "{finished:#?}");
    for words in [
        "`workers` is 0",
        "/no/such/pin",
        "chmod 600",
        "keybroker.toml",
    ] {
        assert!(finished.stderr.contains(words), "{words}: {finished:#?}");
    }
    let absent = site
        .command(&["config", "check", "--config", "/no/such/file"])
        .output()
        .unwrap();
    let absent = Finished::from(absent);
    assert_eq!(absent.code, Some(3), "{absent:#?}");
    assert!(absent.stderr.contains("--config"), "{absent:#?}");
}

#[test]
fn one_shot_commands_answer_in_json_and_in_tables() {
    let site = Site::fresh(Options::default());
    let keys = json(&site.expect_ok(&["key", "list", "-o", "json"]));
    let id = keys[0]["id"].as_str().unwrap();
    assert!(site.expect_ok(&["key", "list"]).contains(id));
    let key = json(&site.expect_ok(&["-o", "json", "key", "show", id]));
    assert_eq!(key, keys[0]);
    let tokens = json(&site.expect_ok(&["token", "list", "-o", "json"]));
    assert!(
        tokens
            .as_array()
            .unwrap()
            .iter()
            .any(|token| token["label"] == site.token.label())
    );
    assert!(json(&site.expect_ok(&["token", "check", "-o", "json"])).is_array());
    let status = json(&site.expect_ok(&["store", "status", "-o", "json"]));
    assert_eq!(status["ready"], true);
    let unknown = site.run(&["key", "show", "00112233445566778899aabbccddeeff"]);
    assert_eq!(unknown.code, Some(6), "{unknown:#?}");
}

/// A reader that goes away is no failure.
#[test]
fn a_closed_pipe_is_no_failure() {
    let site = Site::without_keys(Options::default());
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = site
        .command(&["config", "show"])
        .stdout(writer)
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// What is wrong for every command is said by every command, before it touches anything.
#[test]
fn no_command_works_with_a_bad_configuration() {
    let site = Site::without_keys(Options::default());
    for (good, bad, words) in [
        ("workers = 1", "workers = 0", "`workers` is 0"),
        ("SOFTHSM2_CONF =", "\"A=B\" =", "cannot be set"),
        ("sqlite:/", "sqlite:", "absolute path"),
    ] {
        site.write_configuration(|text| *text = text.replace(good, bad));
        for command in [
            &["token", "list"][..],
            &["key", "generate"],
            &["store", "migrate"],
            &["serve"],
        ] {
            let finished = site.run(command);
            assert_eq!(finished.code, Some(3), "{command:?}: {finished:#?}");
            assert!(
                finished.stderr.contains(words),
                "{command:?}: {finished:#?}"
            );
        }
    }
    assert!(!site.audit_directory().exists());
}

#[test]
fn an_edited_log_does_not_verify() {
    let site = Site::fresh(Options::default());
    let log = site.log_of_commands();
    let directory = log.to_str().unwrap();
    let verified = json(&site.expect_ok(&["audit", "verify", directory, "-o", "json"]));
    assert_eq!(verified["problems"], 0);
    let shown = json(&site.expect_ok(&["audit", "show", directory, "-o", "json"]));
    assert_eq!(verified["entries"], shown.as_array().unwrap().len());

    let segment = fs::read_dir(&log)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| fs::read_to_string(path).is_ok_and(|text| text.contains("\"outcome\"")))
        .unwrap();
    let text = fs::read_to_string(&segment).unwrap();
    let (first, rest) = text.split_once('\n').unwrap();
    assert!(first.starts_with('{') && !rest.is_empty());
    fs::write(&segment, rest).unwrap();
    let finished = site.run(&["audit", "verify", directory]);
    assert_eq!(finished.code, Some(12), "{finished:#?}");
}

#[test]
fn a_pin_can_come_from_a_descriptor() {
    let site = Site::without_keys(Options::default());
    site.expect_ok(&["store", "migrate"]);
    let with_pin = |pin: &str| {
        let file = site.folder().join("typed-pin");
        fs::write(&file, pin).unwrap();
        let output = site
            .command(&["token", "check", "--pin-fd", "0"])
            .stdin(fs::File::open(&file).unwrap())
            .output()
            .unwrap();
        Finished::from(output)
    };
    let good = with_pin(&format!("{}\n", site.token.pin()));
    // The login is good; there is no key to check yet.
    assert_eq!(good.code, Some(6), "{good:#?}");
    assert!(
        good.stderr.contains("there is no wrapping key to check"),
        "{good:#?}"
    );
    let wrong = with_pin("no such pin\n");
    assert_eq!(wrong.code, Some(5), "{wrong:#?}");
    assert!(!wrong.stderr.contains("no such pin"), "{wrong:#?}");
    let none = Finished::from(
        site.command(&["token", "check", "--pin-prompt"])
            .output()
            .unwrap(),
    );
    assert_eq!(none.code, Some(5), "{none:#?}");
}
