//! `-o json` is an interface: what each command gives is what docs/cli.md says, field by field.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::{
    client_commands::client,
    copy,
    process::Broker,
    site::{Finished, Options, Site},
};

/// The fields that the page promises for a command, and whether it gives a list of objects.
fn promised(command: &str) -> (BTreeSet<String>, bool) {
    let page = include_str!("../../docs/cli.md");
    let (_, section) = page.split_once("## `-o json`").unwrap();
    let (section, _) = section.split_once("\n## ").unwrap();
    let item = section
        .replace("\n  ", " ")
        .lines()
        .find(|line| {
            line.split_once(": ")
                .is_some_and(|(commands, _)| commands.contains(&format!("`{command}`")))
        })
        .unwrap_or_else(|| panic!("{command} is not on the page"))
        .to_owned();
    let (commands, fields) = item.split_once(": ").unwrap();
    let is_list = commands.contains(&format!("`{command}` (list)"));
    if let Some(other) = fields.strip_prefix("the fields of `") {
        return (promised(other.trim_end_matches('`')).0, is_list);
    }
    let (fields, _) = fields.split_once(';').unwrap_or((fields, ""));
    let names = fields.split('`').skip(1).step_by(2).map(str::to_owned);
    (names.collect(), is_list)
}

#[track_caller]
pub(crate) fn assert_as_promised(command: &str, finished: &Finished) -> Value {
    assert_eq!(finished.code, Some(0), "{command}: {finished:#?}");
    let given: Value = serde_json::from_str(&finished.stdout)
        .unwrap_or_else(|error| panic!("{command}: {error}: {finished:#?}"));
    let (fields, is_list) = promised(command);
    assert_eq!(given.is_array(), is_list, "{command}");
    let first = if is_list { &given[0] } else { &given };
    let names: BTreeSet<String> = first.as_object().unwrap().keys().cloned().collect();
    assert_eq!(names, fields, "{command}");
    given
}

#[test]
fn one_shot_commands_give_the_promised_fields() {
    let site = Site::without_keys(Options::default());
    let pin = site.token.pin_file();
    let run = |command: &str, more: &[&str]| {
        let mut arguments = vec!["-o", "json"];
        arguments.extend(command.split(' '));
        arguments.extend(more);
        assert_as_promised(command, &site.run(&arguments))
    };
    let label = ["--label", "another", "--so-pin-file", pin.to_str().unwrap()];
    run("token init", &label);
    run("token list", &[]);
    run("store migrate", &[]);
    run("store status", &[]);
    run("store purge", &[]);
    run("store check", &[]);
    run("store copy", &["--to", &copy::another(&site).1]);
    let made = run("key generate", &["--bits", "2048"]);
    let id = made["id"].as_str().unwrap();
    assert_eq!(run("key show", &[id]), made);
    run("key list", &[]);
    run("token check", &[]);
    run("token backup-confirmed", &[]);
    run("config check", &[]);
    let log = site.log_of_commands();
    run("audit verify", &[log.to_str().unwrap()]);

    let failed = site.run(&["-o", "json", "key", "show", "xyz"]);
    let failure: Value = serde_json::from_str(&failed.stderr).unwrap();
    let names: BTreeSet<String> = failure.as_object().unwrap().keys().cloned().collect();
    assert_eq!(
        names,
        ["error", "hint", "exit_code", "reason"]
            .map(str::to_owned)
            .into()
    );
    assert_eq!(failed.stdout, "");
}

#[test]
fn clients_give_the_promised_fields() {
    let broker = Broker::start(Options::default());
    let run = |name: &str, command: &str, more: &[&str]| {
        let mut arguments = vec!["-o", "json", command];
        arguments.extend(more);
        let finished = Finished::from(client(&broker, name, &arguments).output().unwrap());
        assert_as_promised(&format!("client {command}"), &finished)
    };
    let key = broker.site.folder().join("key");
    let (ada, key) = (["--user", "ada"], key.to_str().unwrap());
    run(
        "enroller",
        "create",
        &["--user", "ada", "--generate", "32", "--out", key],
    );
    let (first, second) = (["--expected-revision", "1"], ["--expected-revision", "2"]);
    let material = ["--material-file", key];
    run(
        "enroller",
        "replace",
        &[&ada[..], &first, &material].concat(),
    );
    run("releaser", "unwrap", &ada);
    run("releaser", "batch-unwrap", &ada);
    run("releaser", "get", &ada);
    run("releaser", "list", &[]);
    run(
        "lifecycle",
        "restore",
        &[&ada[..], &second, &["--revision", "1"]].concat(),
    );
    run(
        "lifecycle",
        "delete",
        &[&ada[..], &["--expected-revision", "3"]].concat(),
    );
    run("lifecycle", "undelete", &ada);
    let keys = run("admin", "wrapping-keys", &[]);
    run("admin", "token-state", &[]);
    run("admin", "health", &[]);
    // "The same and": those of the list, and one more.
    let id = keys[0]["id"].as_str().unwrap();
    let one = client(&broker, "admin", &["-o", "json", "wrapping-key", id]);
    let one: Value = serde_json::from_slice(&{ one }.output().unwrap().stdout).unwrap();
    let mut expected = keys[0].as_object().unwrap().clone();
    expected.insert("public_key".to_owned(), one["public_key"].clone());
    assert_eq!(one, Value::Object(expected));
    let status = broker.status.to_string();
    let probed = broker
        .site
        .run(&["-o", "json", "probe", "--status", &status]);
    assert_as_promised("probe", &probed);
}
