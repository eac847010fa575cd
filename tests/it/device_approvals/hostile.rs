//! A hostile server, a hostile network, and a writer of the database.

use aws_lc_rs::rsa::KeySize;
use base64ct::{Base64, Encoding as _};
use rsa::{
    BigUint, RsaPublicKey,
    pkcs8::{DecodePublicKey as _, EncodePublicKey as _},
    traits::PublicKeyParts as _,
};

use super::desk::{Desk, Device, KeyPair};
use crate::bitwarden::Answer;

mod prompt;

#[track_caller]
fn refused(desk: &Desk, request: &str, words: &str) {
    let finished = desk.run(&["approve", request, "--yes"]);
    assert_eq!(finished.code, Some(10), "{finished:#?}");
    let text = format!("{}{}", finished.stdout, finished.stderr);
    assert!(text.contains(words), "{words}: {finished:#?}");
    assert_eq!(desk.server.decisions(), []);
}

/// The server answers the request of a thief, who is a member, with the key of another member.
#[test]
fn the_key_of_another_member_is_released_only_to_a_person_who_names_it() {
    let desk = Desk::new();
    let (victim, user_key) = desk.member("victim@example.org");
    let (thief, own_key) = desk.member("thief@example.org");
    let device = Device::new();
    desk.request(&victim, &Device::new());
    let request = desk.request(&thief, &device);
    // Both keys are pinned.
    desk.ok(&["list"]);
    desk.server.set_key(&thief, victim.key.as_deref());
    refused(&desk, &request, "belongs to another member");
    let listed = desk.ok(&["list"]);
    assert_eq!(listed[1]["key_state"], "of-another-member");
    assert!(
        listed[1]["problem"]
            .as_str()
            .unwrap()
            .contains(&victim.user)
    );
    // The digest of another key does not help.
    let other = desk.run(&[
        "approve",
        &request,
        "--yes",
        "--accept-key",
        &"0".repeat(64),
    ]);
    assert_eq!(other.code, Some(10), "{other:#?}");
    assert_eq!(desk.server.decisions(), []);

    desk.server.set_key(&thief, thief.key.as_deref());
    desk.ok(&["approve", &request, "--yes"]);
    let opened = device.open(&desk.server.decisions()[0]);
    assert!(opened == own_key && opened != user_key);
}

/// The server shows the address of a thief with the id and the key of a victim, so that the phrase matches the thief's device.
#[test]
fn a_key_that_was_pinned_with_another_address_waits_for_a_person() {
    let desk = Desk::new();
    let (victim, _) = desk.member("victim@example.org");
    desk.request(&victim, &Device::new());
    desk.ok(&["list"]);
    let shown = crate::bitwarden::Member {
        email: "thief@example.org".to_owned(),
        ..victim.clone()
    };
    let request = desk.request(&shown, &Device::new());
    refused(&desk, &request, "pinned with another e-mail address");
    let listed = desk.ok(&["list"]);
    assert_eq!(listed[1]["key_state"], "other-address");
}

/// After a rotation of the account's key, a person approves once, and the new key is pinned.
#[test]
fn a_changed_key_waits_for_a_person_and_is_then_known() {
    let desk = Desk::new();
    let (ada, _) = desk.member("ada@example.org");
    let device = Device::new();
    let request = desk.request(&ada, &device);
    desk.ok(&["list"]);
    let rotated = desk.organization.wrap(&[9; 64]);
    desk.server.set_key(&ada, Some(&rotated));
    refused(&desk, &request, "has changed");
    let listed = desk.ok(&["list"]);
    assert_eq!(listed[0]["key_state"], "changed");
    let digest = listed[0]["key_sha256"].as_str().unwrap().to_owned();
    desk.ok(&["approve", &request, "--yes", "--accept-key", &digest]);
    assert_eq!(device.open(&desk.server.decisions()[0]), [9; 64]);
    assert_eq!(
        desk.entries("bitwarden.approve_device")[0]["policy"],
        "accept-key"
    );
    desk.request(&ada, &Device::new());
    assert_eq!(desk.ok(&["list"])[0]["key_state"], "known");
    // The key before the rotation is not current any more.
    desk.server.set_key(&ada, ada.key.as_deref());
    assert_eq!(desk.ok(&["list"])[0]["key_state"], "changed");
}

#[test]
fn a_pin_that_was_altered_in_sql_does_not_verify() {
    let desk = Desk::new();
    let (victim, _) = desk.member("victim@example.org");
    let (thief, _) = desk.member("thief@example.org");
    desk.request(&victim, &Device::new());
    let request = desk.request(&thief, &Device::new());
    desk.ok(&["list"]);
    let of_thief = thief.user.replace('-', "");
    for (edit, undo) in [
        (
            format!("UPDATE bitwarden_member_keys SET member_id = x'{of_thief}'"),
            "UPDATE bitwarden_member_keys SET member_id = kept.member_id FROM kept WHERE kept.digest = \
             bitwarden_member_keys.digest",
        ),
        (
            "UPDATE bitwarden_member_keys SET pinned_us = pinned_us - 1".to_owned(),
            "UPDATE bitwarden_member_keys SET pinned_us = pinned_us + 1",
        ),
    ] {
        desk.site.sql(
            "DROP TABLE IF EXISTS kept; CREATE TABLE kept AS SELECT digest, member_id FROM bitwarden_member_keys",
        );
        desk.site.sql(&edit);
        desk.server.set_key(&thief, victim.key.as_deref());
        refused(&desk, &request, "does not verify");
        let checked = desk.site.run(&["store", "check"]);
        assert_ne!(checked.code, Some(0), "{checked:#?}");
        desk.server.set_key(&thief, thief.key.as_deref());
        desk.site.sql(undo);
    }
    desk.site.sql("DROP TABLE kept");
    assert_eq!(desk.ok(&["list"])[1]["key_state"], "known");
}

/// The server shows one public key in the list and another one when the request is approved.
#[test]
fn a_swapped_public_key_has_another_phrase() {
    let desk = Desk::new();
    let (ada, _) = desk.member("ada@example.org");
    let request = desk.request(&ada, &Device::new());
    let phrase = desk.ok(&["list"])[0]["phrase"].as_str().unwrap().to_owned();
    let thief = Device::new();
    desk.server
        .edit(&request, |one| one.public_key.clone_from(&thief.0.spki));
    let finished = desk.run(&["approve", &request, "--phrase", &phrase]);
    assert_eq!(finished.code, Some(12), "{finished:#?}");
    assert!(
        finished.stderr.contains("the phrase of request"),
        "{finished:#?}"
    );
    assert_eq!(desk.server.decisions(), []);
}

#[test]
fn public_keys_that_are_weak_or_malformed_get_nothing() {
    let desk = Desk::new();
    let (ada, _) = desk.member("ada@example.org");
    let good = KeyPair::new(KeySize::Rsa2048);
    let encoded = |modulus: BigUint, exponent: u32| {
        let key = RsaPublicKey::new_unchecked(modulus, BigUint::from(exponent));
        key.to_public_key_der().unwrap().into_vec()
    };
    let odd = |bits: usize| (BigUint::from(1_u8) << (bits - 1)) + BigUint::from(1_u8);
    for (public_key, words) in [
        (encoded(odd(2_039) * BigUint::from(751_u32), 65_537), "weak"),
        (encoded(odd(2_048), 3), "65537"),
        (KeyPair::new(KeySize::Rsa3072).spki, "2048 bits"),
        (good.pkcs8.clone(), "too long"),
        ([&good.spki[..], &[0]].concat(), "DER"),
        (good.spki[..100].to_vec(), "DER"),
        (Vec::new(), "DER"),
    ] {
        let request = desk.server.add_request(&ada, "f1", &public_key);
        let listed = desk.ok(&["list"]);
        let mut rows = listed.as_array().unwrap().iter();
        let row = rows.find(|row| row["request"] == *request).unwrap();
        let problem = row["problem"].as_str().unwrap();
        assert!(problem.contains(words), "{words}: {problem}");
        assert!(row["phrase"].is_null());
        refused(&desk, &request, "is not pending");
    }
    // The bad requests do not hide a good one.
    let request = desk.request(&ada, &Device::new());
    desk.ok(&["approve", &request, "--yes"]);
}

/// A wrapped key plus the modulus of the organisation: RSA opens it to the same user key, and its digest is another one.
fn second_spelling(organization: &KeyPair) -> String {
    let key = RsaPublicKey::from_public_key_der(&organization.spki).unwrap();
    loop {
        let wrapped = organization.wrap(&[1; 64]);
        let wrapped = Base64::decode_vec(wrapped.strip_prefix("4.").unwrap()).unwrap();
        let sum = (BigUint::from_bytes_be(&wrapped) + key.n()).to_bytes_be();
        // The sum is longer than the modulus for some keys.
        if sum.len() == wrapped.len() {
            return format!("4.{}", Base64::encode_string(&sum));
        }
    }
}

#[test]
fn keys_that_are_not_of_the_organisation_are_not_released() {
    let desk = Desk::new();
    let (ada, _) = desk.member("ada@example.org");
    let foreign = KeyPair::new(KeySize::Rsa2048).wrap(&[1; 64]);
    let mut damaged = ada.key.clone().unwrap();
    let middle = damaged.len() / 2;
    let other = if damaged.as_bytes()[middle] == b'A' {
        "B"
    } else {
        "A"
    };
    damaged.replace_range(middle..=middle, other);
    for (key, words) in [
        (foreign, "cannot be unwrapped"),
        (damaged, "cannot be unwrapped"),
        (second_spelling(&desk.organization), "not below the modulus"),
        ("4.AAAA".to_owned(), "256 bytes"),
        ("3.AAAA".to_owned(), "type 3"),
        ("x".repeat(5_000), "too long"),
    ] {
        desk.site.sql("DELETE FROM bitwarden_member_keys");
        desk.server.set_key(&ada, Some(&key));
        let request = desk.request(&ada, &Device::new());
        refused(&desk, &request, words);
    }
}

/// A server can invent any number of members.
#[test]
fn one_command_pins_a_limited_number_of_new_keys() {
    let desk = Desk::new();
    desk.append("automatic_per_hour = 2\n");
    let device = Device::new();
    for number in 0..101 {
        let (member, _) = desk.member(&format!("{number}@example.org"));
        desk.request(&member, &device);
    }
    let listed = desk.ok(&["list"]);
    let is_refused = |row: &&serde_json::Value| {
        let problem = row["problem"].as_str().unwrap_or_default();
        problem.contains("too many new keys")
    };
    let rows = listed.as_array().unwrap();
    assert_eq!(rows.len(), 101);
    assert_eq!(rows.iter().filter(is_refused).count(), 1);
    let pins = "SELECT count(*) FROM bitwarden_member_keys";
    assert_eq!(desk.site.sql(pins).trim(), "100");
}

#[test]
#[expect(
    clippy::too_many_lines,
    reason = "a list, in which each answer stands once"
)]
fn answers_that_are_not_of_the_api_are_refused() {
    let desk = Desk::new();
    let (ada, _) = desk.member("ada@example.org");
    desk.request(&ada, &Device::new());
    let requests = desk.server.requests_path();
    let token = "/identity/connect/token".to_owned();
    let many = format!("{{\"data\": [{}{{}}]}}", "{},".repeat(1_000));
    for (path, status, body, code, words) in [
        (
            &requests,
            200,
            "x".repeat(5 * 1024 * 1024),
            12,
            "longer than",
        ),
        (
            &requests,
            200,
            "<html>".to_owned(),
            12,
            "the list of requests",
        ),
        (&requests, 200, "[]".to_owned(), 12, "the list of requests"),
        (&requests, 200, many, 12, "more than 1000"),
        (
            &requests,
            200,
            "{\"data\": [], \"continuationToken\": \"x\"}".to_owned(),
            12,
            "several pages",
        ),
        (
            &requests,
            403,
            "{\"message\": \"no \\u001b[2J\"}".to_owned(),
            10,
            "403",
        ),
        (&requests, 404, String::new(), 10, "404"),
        (
            &token,
            200,
            "{\"access_token\": \"\", \"token_type\": \"Bearer\", \"expires_in\": 9}".to_owned(),
            12,
            "no bearer",
        ),
        (
            &token,
            200,
            "{\"access_token\": \"x\\ny\", \"token_type\": \"Bearer\", \"expires_in\": 9}"
                .to_owned(),
            12,
            "no bearer",
        ),
        (
            &token,
            200,
            "{\"access_token\": \"x\", \"token_type\": \"mac\", \"expires_in\": 9}".to_owned(),
            12,
            "no bearer",
        ),
        (&token, 200, "{}".to_owned(), 12, "the identity service"),
        (
            &token,
            400,
            "{\"error\": \"invalid_client\", \"error_description\": \"gone\"}".to_owned(),
            10,
            "gone",
        ),
    ] {
        desk.answer(path, status, &body);
        let finished = desk.run(&["list"]);
        assert_eq!(finished.code, Some(code), "{words}: {finished:#?}");
        assert!(finished.stderr.contains(words), "{words}: {finished:#?}");
        assert!(!finished.stderr.contains('\u{1b}'), "{finished:#?}");
        desk.server.answer(path, None);
    }
    assert_eq!(desk.ok(&["list"]).as_array().unwrap().len(), 1);
}

#[test]
fn redirects_and_other_servers_do_not_get_the_credential() {
    let desk = Desk::new();
    let elsewhere = format!("{}/elsewhere", desk.server.api_url());
    for path in [
        "/identity/connect/token".to_owned(),
        desk.server.requests_path(),
    ] {
        for status in [301, 302, 307, 308] {
            let answer = Answer {
                status,
                location: Some(elsewhere.clone()),
                ..Answer::default()
            };
            desk.server.answer(&path, Some(answer));
            let finished = desk.run(&["list"]);
            assert_eq!(finished.code, Some(10), "{finished:#?}");
            assert!(
                finished.stderr.contains("redirects are refused"),
                "{finished:#?}"
            );
        }
        desk.server.answer(&path, None);
    }
    assert!(
        desk.server
            .calls()
            .iter()
            .all(|call| !call.contains("elsewhere"))
    );
    // A server whose certificate is of another CA.
    let before = desk.server.calls().len();
    let other_ca = desk.site.pki.certificate_file("other-ca");
    let ca = desk.site.pki.ca_file();
    let path = desk.site.configuration_file();
    let text = std::fs::read_to_string(&path).unwrap();
    let of_other = format!("ca_file = \"{}\"\npublic", other_ca.display());
    let text = text.replace(
        &format!("ca_file = \"{}\"\npublic", ca.display()),
        &of_other,
    );
    std::fs::write(&path, text).unwrap();
    let finished = desk.run(&["list"]);
    assert_eq!(finished.code, Some(11), "{finished:#?}");
    assert_eq!(desk.server.calls().len(), before);
}
