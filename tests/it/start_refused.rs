//! A broker that must not start: module, token, PIN, keys, configuration and certificates that are not as they must be. It
//! ends with a fixed code and says what to do; it never repairs or deletes anything.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, sync::Arc};

use tonic::Code;

use crate::{
    client::{Caller, eventually, refused},
    expected::{CONFIGURATION, PIN, TOKEN, UNTRUSTED},
    process::Broker,
    site::{Finished, Options, Site},
    softhsm::write_private,
};

/// `serve` gives up with one of these codes and names the thing.
#[track_caller]
fn refuses(site: &Site, codes: &[i32], names: &[&str]) -> Finished {
    let finished = site.serve_to_its_end();
    assert!(
        finished.code.is_some_and(|code| codes.contains(&code)),
        "{codes:?} expected: {finished:#?}"
    );
    let said = finished.stderr.to_lowercase();
    for name in names {
        assert!(
            said.contains(&name.to_lowercase()),
            "{name:?} is not named: {finished:#?}"
        );
    }
    assert!(!site.ready_file().exists());
    finished
}

fn wrapping_key(site: &Site) -> String {
    site.sql("SELECT lower(hex(key_id)) FROM wrapping_keys")
        .trim()
        .to_owned()
}

#[test]
fn no_module_and_not_a_module_are_told_apart() {
    let site = Site::fresh(Options::default());
    let module = format!("module = \"{}\"", crate::softhsm::module().display());

    site.replace_once(&module, "module = \"/nowhere/libpkcs11.so\"");
    refuses(&site, &[CONFIGURATION, TOKEN], &["/nowhere/libpkcs11.so"]);

    let text = site.folder().join("text.so");
    fs::write(&text, "not a shared library").unwrap();
    site.replace_once(&module, &format!("module = \"{}\"", text.display()));
    refuses(&site, &[CONFIGURATION, TOKEN], &[text.to_str().unwrap()]);

    // A shared library, but not a PKCS#11 module.
    let libc = shared_library("libm.so.6");
    site.replace_once(&module, &format!("module = \"{libc}\""));
    refuses(&site, &[CONFIGURATION, TOKEN], &[&libc]);
}

fn shared_library(name: &str) -> String {
    let maps = std::process::Command::new("ldconfig").arg("-p").output();
    let listed = maps.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    listed
        .unwrap_or_default()
        .lines()
        .find(|line| line.trim().starts_with(name))
        .and_then(|line| line.rsplit(' ').next().map(str::to_owned))
        .or_else(|| {
            let folder = Path::new("/lib/x86_64-linux-gnu").join(name);
            folder.exists().then(|| folder.display().to_string())
        })
        .expect("every Linux has it")
}

#[test]
fn a_label_that_no_token_has_is_refused() {
    let site = Site::fresh(Options::default());
    let label = format!("label = \"{}\"", site.token.label());
    site.replace_once(&label, "label = \"another\"");
    refuses(&site, &[TOKEN], &["another"]);
}

#[test]
fn a_token_is_named_in_exactly_one_way() {
    let site = Site::fresh(Options::default());
    let label = format!("label = \"{}\"", site.token.label());
    site.replace_once(&label, &format!("{label}\nserial = \"0123456789abcdef\""));
    refuses(&site, &[CONFIGURATION], &["label", "serial"]);
    site.replace_once(&label, "");
    refuses(&site, &[CONFIGURATION], &["label", "serial"]);
}

/// Commands refuse it; the broker stays up, says so, and goes on once the mode is right.
#[tokio::test(flavor = "multi_thread")]
async fn a_pin_file_that_others_can_read_is_refused() {
    let site = Site::fresh(Options::default());
    let pin_file = site.token.pin_file();
    let set_mode = |mode| fs::set_permissions(&pin_file, fs::Permissions::from_mode(mode)).unwrap();
    for mode in [0o620, 0o604, 0o644] {
        set_mode(mode);
        let finished = site.run(&["token", "check"]);
        assert_eq!(finished.code, Some(PIN), "{mode:o}: {finished:?}");
        assert!(
            finished.stderr.contains(pin_file.to_str().unwrap()),
            "{finished:?}"
        );
    }

    let broker = Broker::start_on(Arc::new(site));
    let enroller = Caller::of(&broker, "enroller");
    refused(
        enroller.create("ada", b"material of ada").await,
        "TOKEN_UNTRUSTED",
    );
    assert!(broker.site.log().contains("other users can read it"));
    set_mode(0o600);
    eventually(|| enroller.create("ada", b"material of ada")).await;
}

/// A refused PIN is tried once. The broker stays up, says so, and tries again when the file changes.
#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_pin_is_tried_once_and_latched() {
    let site = Site::fresh(Options::default());
    let pin = fs::read_to_string(site.token.pin_file()).unwrap();
    write_private(&site.token.pin_file(), "not-the-pin\n");

    let broker = Broker::start_on(Arc::new(site));
    let enroller = Caller::of(&broker, "enroller");
    let status = refused(
        enroller.create("ada", b"material of ada").await,
        "TOKEN_UNTRUSTED",
    );
    assert_eq!(status.code(), Code::Unavailable);
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    assert_eq!(
        broker.site.log().matches("pin-latched").count(),
        1,
        "tried again"
    );

    write_private(&broker.site.token.pin_file(), &pin);
    eventually(|| enroller.create("ada", b"material of ada")).await;
}

#[test]
fn a_missing_key_is_refused() {
    let site = Site::fresh(Options::default());
    let id = wrapping_key(&site);
    let deleted = site
        .token
        .pkcs11_tool(&["--delete-object", "--type", "privkey", "--id", &id]);
    assert!(deleted.status.success(), "{deleted:?}");
    refuses(&site, &[UNTRUSTED], &[&id]);
}

#[test]
fn two_keys_with_one_id_are_refused() {
    let site = Site::fresh(Options::default());
    let id = wrapping_key(&site);
    make_key(&site, &id, &["--sensitive"]);
    refuses(&site, &[UNTRUSTED], &[&id]);
}

#[test]
fn an_extractable_key_is_refused() {
    let site = Site::fresh(Options::default());
    let id = wrapping_key(&site);
    let deleted = site
        .token
        .pkcs11_tool(&["--delete-object", "--type", "privkey", "--id", &id]);
    assert!(deleted.status.success(), "{deleted:?}");
    make_key(&site, &id, &["--extractable"]);
    refuses(&site, &[UNTRUSTED], &[&id, "CKA_EXTRACTABLE"]);
}

fn make_key(site: &Site, id: &str, flags: &[&str]) {
    let mut arguments = vec!["--keypairgen", "--key-type", "rsa:2048", "--id", id];
    arguments.extend(flags);
    let made = site.token.pkcs11_tool(&arguments);
    assert!(made.status.success(), "{made:?}");
}

/// The same keys on a token of another serial number: a copy nobody registered.
#[test]
fn a_token_of_another_serial_is_refused() {
    let site = Site::fresh(Options::default());
    let serial = site
        .sql("SELECT token_serial FROM wrapping_keys")
        .trim()
        .to_owned();
    let other = "0123456789abcdef";
    assert_eq!(serial.len(), other.len());
    let mut changed = 0;
    for folder in fs::read_dir(site.token.directory()).unwrap().flatten() {
        let path = folder.path().join("token.object");
        let mut bytes = fs::read(&path).unwrap();
        let found = bytes
            .windows(serial.len())
            .position(|window| window == serial.as_bytes());
        if let Some(at) = found {
            bytes[at..at + serial.len()].copy_from_slice(other.as_bytes());
            fs::write(path, bytes).unwrap();
            changed += 1;
        }
    }
    assert_eq!(changed, 1);
    // The registered token may still come, so a service manager may try again.
    refuses(&site, &[TOKEN], &[&serial, other, "key register"]);
}

#[test]
fn mistakes_in_the_configuration_are_named() {
    let site = Site::fresh(Options::default());
    for (from, to, names) in [
        ("[store]", "[stoer]\nx = 1\n[store]", ["stoer", "unknown"]),
        ("workers = 1", "wrokers = 1", ["wrokers", "unknown"]),
        ("workers = 1", "workers = 0", ["workers", "token"]),
        (
            "apis = [\"grpc\", \"admin\"]",
            "apis = []",
            ["apis", "listener"],
        ),
        (
            "roles = [\"release\"]",
            "roles = [\"release\", \"admin\"]",
            ["release", "admin"],
        ),
        (
            "address = \"127.0.0.1:0\"",
            "address = \"0.0.0.0:0\"",
            ["status", "loopback"],
        ),
    ] {
        site.replace_once(from, to);
        refuses(&site, &[CONFIGURATION], &names);
    }
    fs::write(site.configuration_file(), "this is not TOML").unwrap();
    refuses(&site, &[CONFIGURATION], &["keybroker.toml"]);
    fs::remove_file(site.configuration_file()).unwrap();
    refuses(&site, &[CONFIGURATION], &["keybroker.toml"]);
}

#[test]
fn certificates_that_cannot_be_used_are_named() {
    let site = Site::fresh(Options::default());
    let certificate = site.pki.certificate_file("server");
    let good = fs::read(&certificate).unwrap();
    let name = certificate.to_str().unwrap();

    fs::write(
        &certificate,
        "-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n",
    )
    .unwrap();
    refuses(&site, &[CONFIGURATION], &[name]);
    fs::remove_file(&certificate).unwrap();
    refuses(&site, &[CONFIGURATION], &[name]);

    // A key that is not the certificate's.
    fs::write(&certificate, &good).unwrap();
    let key = site.pki.key_file("server");
    let good_key = fs::read_to_string(&key).unwrap();
    write_private(
        &key,
        &fs::read_to_string(site.pki.key_file("admin")).unwrap(),
    );
    refuses(&site, &[CONFIGURATION], &[key.to_str().unwrap()]);
    write_private(&key, &good_key);

    site.pki.issue_expired_server();
    refuses(&site, &[CONFIGURATION], &[name, "expired"]);
}
