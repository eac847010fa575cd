//! Two tokens with the label that the settings name. Brokers and commands use the one with the serial number of the registry.

use std::fs;

use serde_json::Value;

use crate::{
    client::Caller,
    expected::{CONFIGURATION, TOKEN, UNTRUSTED, says},
    process::Broker,
    site::{Options, Site},
    softhsm::write_private,
};

const MATERIAL: &[u8] = b"material of this user";

/// Serial numbers of the tokens with the site's label.
fn serials(site: &Site) -> Vec<String> {
    let listed: Value =
        serde_json::from_str(&site.expect_ok(&["-o", "json", "token", "list"])).unwrap();
    let tokens = listed.as_array().unwrap().iter();
    tokens
        .filter(|token| token["label"] == site.token.label())
        .map(|token| token["serial"].as_str().unwrap().to_owned())
        .collect()
}

/// A vendor's tool makes a second token with the label of the first.
fn add_token(site: &Site) {
    site.token.initialise(site.token.label());
    assert_eq!(serials(site).len(), 2);
}

fn registered_serial(site: &Site) -> String {
    let serials = site.sql("SELECT DISTINCT token_serial FROM wrapping_keys");
    serials.trim().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_and_brokers_use_the_token_of_the_registry() {
    let site = Site::fresh(Options::default());
    let serial = registered_serial(&site);
    add_token(&site);
    for arguments in [
        &["token", "check"][..],
        &["token", "backup-confirmed"],
        &["token", "report"],
        &["store", "check"],
        &["key", "list"],
        &["config", "check"],
        &["key", "generate", "--bits", "2048"],
        &["token", "check"],
    ] {
        site.expect_ok(arguments);
    }
    let checked = site.run(&["token", "check"]);
    assert!(
        checked.stderr.contains(&format!("(serial {serial})")),
        "{checked:#?}"
    );
    let examined = site.run(&["config", "check"]);
    says(
        "config check",
        &examined,
        0,
        &[
            &format!("serial {serial:?}"),
            "which the registry selects from several",
        ],
    );
    // The new key is on the same token as the first.
    assert_eq!(registered_serial(&site), serial);
    let keys = site.sql("SELECT count(*) FROM wrapping_keys");
    assert_eq!(keys.trim(), "2");

    let broker = Broker::start_on(site.into());
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("ada", MATERIAL).await.unwrap();
    let key = Caller::of(&broker, "releaser").unwrap("ada").await.unwrap();
    assert_eq!(key.key_material, MATERIAL);
    broker.stop();
}

/// A writer of the database does not choose the token that gets the PIN: if the token of the
/// registry has never accepted the PIN, the PIN is not tried.
#[test]
fn a_pin_that_never_logged_in_is_not_tried_on_one_of_two_tokens() {
    let site = Site::fresh(Options::default());
    let serial = registered_serial(&site);
    add_token(&site);
    fs::remove_dir_all(site.audit_directory().join("state")).unwrap();
    for arguments in [
        &["token", "check"][..],
        &["key", "generate"],
        &["store", "check"],
    ] {
        says(
            &arguments.join(" "),
            &site.run(arguments),
            TOKEN,
            &[
                &format!("serial {serial:?}"),
                "no record of an earlier login to this token with this PIN, so no login was tried",
                "`token.serial`",
            ],
        );
    }
    // By its serial number it is used.
    let label = format!("label = {:?}", site.token.label());
    site.replace_once(&label, &format!("serial = {serial:?}"));
    site.expect_ok(&["token", "check"]);
}

/// While no key is registered, the settings must choose: the message names the setting and both tokens.
#[test]
fn without_a_registered_key_the_message_names_setting_and_serial_numbers() {
    let site = Site::without_keys(Options::default());
    site.expect_ok(&["store", "migrate"]);
    add_token(&site);
    let both = serials(&site);
    let words = [both[0].as_str(), &both[1], "serial`"];
    for arguments in [
        &["token", "check"][..],
        &["key", "generate"],
        &["token", "report"],
        &["store", "check"],
    ] {
        says(&arguments.join(" "), &site.run(arguments), TOKEN, &words);
    }
    says(
        "config check",
        &site.run(&["config", "check"]),
        CONFIGURATION,
        &words,
    );
    let label = format!("label = {:?}", site.token.label());
    let choose = |serial: &str| site.replace_once(&label, &format!("serial = {serial:?}"));
    choose(&both[1]);
    site.expect_ok(&["key", "generate", "--bits", "2048"]);
    assert_eq!(registered_serial(&site), both[1]);
    choose(&both[0]);
    says(
        "the token without the key",
        &site.run(&["token", "check"]),
        UNTRUSTED,
        &["is not on the token"],
    );
    // By the label again: the registry names the token now, and a wrong PIN is shown to neither of them.
    site.write_configuration(|_| {});
    write_private(&site.token.pin_file(), "0000000000");
    let wrong = site.run(&["token", "check"]);
    says("a wrong PIN", &wrong, TOKEN, &["no login was tried"]);
    write_private(&site.token.pin_file(), site.token.pin());
    site.expect_ok(&["token", "check"]);
}
