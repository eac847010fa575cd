//! `keybroker key import`: only for organisations, only from a private file, and only once.

use std::{fs, os::unix::fs::PermissionsExt as _};

use aws_lc_rs::rsa::KeySize;
use base64ct::{Base64, Encoding as _};
use keybroker_bitwarden::SymmetricKey;
use serde_json::Value;
use zeroize::Zeroizing;

use super::desk::{Desk, KeyPair, ORGANIZATION, sha256};
use crate::{
    site::{Options, Site},
    softhsm::write_private,
};

const OTHER: &str = "00000000-0000-4000-8000-00000000000a";

fn import(site: &Site, organization: &str, file: &str, more: &[&str]) -> crate::site::Finished {
    let path = site.folder().join(file);
    let arguments = ["key", "import", "--purpose", "organization", "-o", "json"];
    let named = [
        "--organization",
        organization,
        "--key-file",
        path.to_str().unwrap(),
    ];
    site.run(&[&arguments[..], &named, more].concat())
}

#[test]
fn an_imported_key_is_no_wrapping_key_and_is_imported_once() {
    let desk = Desk::new();
    let site = &desk.site;
    let again = desk.import(&desk.organization.pkcs8);
    assert_eq!(again.code, Some(6), "{again:#?}");
    assert!(
        again
            .stderr
            .contains("has the key of this organisation already"),
        "{again:#?}"
    );
    let second = import(site, OTHER, "organization.der", &[]);
    assert_eq!(second.code, Some(6), "{second:#?}");
    assert!(
        second.stderr.contains("under another CKA_ID"),
        "{second:#?}"
    );
    let another = desk.import(&KeyPair::new(KeySize::Rsa2048).pkcs8);
    assert_eq!(another.code, Some(6), "{another:#?}");

    // The imported key is not offered for registration, and is refused if its id is given.
    let (_, id) = again.stderr.split_once("key remove ").unwrap();
    let id = &id[..32];
    let registered = site.run(&["key", "register", id]);
    assert_eq!(registered.code, Some(6), "{registered:#?}");
    assert!(
        registered.stderr.contains("was imported"),
        "{registered:#?}"
    );
    assert!(!site.run(&["token", "check"]).stdout.contains(id));
    site.expect_ok(&["key", "generate", "--bits", "2048"]);
    let checked = site.run(&["token", "check"]);
    assert_eq!(checked.code, Some(0), "{checked:#?}");
    assert!(!site.expect_ok(&["key", "list"]).contains(id));

    site.expect_ok(&["key", "remove", id, "--yes"]);
    let missing = desk.run(&["list"]);
    assert_eq!(missing.code, Some(6), "{missing:#?}");
    assert!(
        missing.stderr.contains("keybroker key import"),
        "{missing:#?}"
    );
    assert_eq!(desk.import(&desk.organization.pkcs8).code, Some(0));
    let entries = desk.entries("organization_key.import");
    let outcomes = entries.iter().filter(|one| one["kind"] == "outcome");
    let outcomes: Vec<_> = outcomes.map(|one| one["outcome"].clone()).collect();
    assert_eq!(outcomes, ["ok", "failed", "failed", "failed", "ok"]);
}

#[test]
fn only_a_good_key_in_a_private_file_is_imported() {
    let site = Site::without_keys(Options::default());
    let pair = KeyPair::new(KeySize::Rsa2048);
    let long = KeyPair::new(KeySize::Rsa3072);
    let base64 = Base64::encode_string(&pair.pkcs8);
    let pem = format!("-----BEGIN PRIVATE KEY-----\n{base64}\n-----END PRIVATE KEY-----\n");
    for (name, bytes) in [
        ("key.der", &pair.pkcs8[..]),
        ("long.der", &long.pkcs8),
        ("public.der", &pair.spki),
        ("cut.der", &pair.pkcs8[..1_000]),
        ("key.pem", pem.as_bytes()),
    ] {
        write_private(&site.folder().join(name), "");
        fs::write(site.folder().join(name), bytes).unwrap();
    }
    for (file, words) in [
        ("long.der", "3072 bits"),
        ("public.der", "PKCS#8"),
        ("cut.der", "PKCS#8"),
        ("absent.der", "absent.der"),
    ] {
        let refused = import(&site, ORGANIZATION, file, &[]);
        assert_eq!(refused.code, Some(2), "{file}: {refused:#?}");
        assert!(refused.stderr.contains(words), "{file}: {refused:#?}");
    }
    // A text that is neither of the two forms, and a key that needs no second file.
    let file = site.folder().join("symmetric");
    write_private(&file, &"5".repeat(64));
    let with_key = ["--organization-key-file", file.to_str().unwrap()];
    for (file, words) in [
        ("cut.der", "not an encrypted private key"),
        ("key.der", "is not needed"),
    ] {
        let refused = import(&site, ORGANIZATION, file, &with_key);
        assert_eq!(refused.code, Some(2), "{file}: {refused:#?}");
        assert!(refused.stderr.contains(words), "{file}: {refused:#?}");
    }
    let key = site.folder().join("key.der");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    let open = import(&site, ORGANIZATION, "key.der", &[]);
    assert_eq!(open.code, Some(2), "{open:#?}");
    assert!(
        open.stderr.contains("private key of an organisation"),
        "{open:#?}"
    );
    let odd = import(&site, "4e9ee8ba", "key.pem", &[]);
    assert_eq!(odd.code, Some(2), "{odd:#?}");

    let imported = import(&site, ORGANIZATION, "key.pem", &[]);
    assert_eq!(imported.code, Some(0), "{imported:#?}");
    let shown: Value = serde_json::from_str(&imported.stdout).unwrap();
    assert_eq!(shown["origin"], "imported");
    assert_eq!(shown["public_key_sha256"], sha256(&pair.spki).as_str());
    let attributes = shown["attributes"].to_string();
    for attribute in [
        "CKA_UNWRAP is true",
        "CKA_DECRYPT is false",
        "CKA_LOCAL is false",
    ] {
        assert!(attributes.contains(attribute), "{attributes}");
    }
}

#[test]
fn the_encrypted_key_of_the_server_needs_the_key_of_the_organisation() {
    let site = Site::without_keys(Options::default());
    let pair = KeyPair::new(KeySize::Rsa2048);
    let symmetric = vec![5; 64];
    let encrypted = SymmetricKey::from_bytes(Zeroizing::new(symmetric.clone())).unwrap();
    let encrypted = encrypted.encrypt(&pair.pkcs8).unwrap().to_string();
    let path = |name: &str| site.folder().join(name).to_str().unwrap().to_owned();
    write_private(&site.folder().join("encrypted"), &encrypted);
    write_private(
        &site.folder().join("good"),
        &Base64::encode_string(&symmetric),
    );
    write_private(
        &site.folder().join("wrong"),
        &Base64::encode_string(&[6; 64]),
    );
    let without = import(&site, ORGANIZATION, "encrypted", &[]);
    assert_eq!(without.code, Some(2), "{without:#?}");
    assert!(
        without.stderr.contains("--organization-key-file"),
        "{without:#?}"
    );
    let wrong = import(
        &site,
        ORGANIZATION,
        "encrypted",
        &["--organization-key-file", &path("wrong")],
    );
    assert_eq!(wrong.code, Some(12), "{wrong:#?}");
    let good = import(
        &site,
        ORGANIZATION,
        "encrypted",
        &["--organization-key-file", &path("good")],
    );
    assert_eq!(good.code, Some(0), "{good:#?}");
    assert!(good.stdout.contains(&sha256(&pair.spki)));
}
