//! Tests how keys are made, found and proved.

use cryptoki::mechanism::Mechanism;

use super::{
    Admin, USER_PIN, faulty,
    faulty::{Fault, code},
    id, init, open, pin, record, settings, with_softhsm,
};
use keybroker_core::key::ObjectIds;
use keybroker_worker_protocol::Settings;

use crate::{
    attribute_check::{Expected, Found},
    classify::Class,
    keys,
    keys::KeySession,
};

#[test]
fn a_generated_key_passes_and_is_proved() {
    with_softhsm("making::a_generated_key_passes_and_is_proved", |_| {
        init();
        let admin = Admin::open(&settings(), &record(), &pin(USER_PIN), true).unwrap();
        let key = admin.generate_key(2_048, None).unwrap();
        assert_eq!(key.problem, None);
        assert_eq!(key.modulus_bits, 2_048);
        assert_eq!(key.private.len() + key.integrity_key.len(), 33);
        assert!(
            key.private
                .iter()
                .chain(&key.integrity_key)
                .all(|f| f.found == Found::AsExpected)
        );
        assert!(matches!(key.private[0].expected, Expected::Flag(true)));
        assert_eq!(admin.key_ids().unwrap(), [key.id.into()]);
        assert_eq!(key.objects, ObjectIds::default());
    });
}

#[test]
fn sha1_is_refused_unless_allowed() {
    with_softhsm("making::sha1_is_refused_unless_allowed", |_| {
        init();
        let key = Admin::open(&settings(), &record(), &pin(USER_PIN), true)
            .unwrap()
            .generate_key(2_048, None)
            .unwrap();
        let strict = Settings {
            allow_oaep_sha1: false,
            ..settings()
        };
        let checked = Admin::open(&strict, &record(), &pin(USER_PIN), false)
            .unwrap()
            .check(key.id)
            .unwrap();
        assert!(checked.problem.unwrap().contains("allow_oaep_sha1 = true"));
    });
}

#[test]
fn two_keys_of_one_id_and_none_are_refused() {
    with_softhsm("making::two_keys_of_one_id_and_none_are_refused", |_| {
        init();
        let token = open();
        let session = &token.anchor;
        let make = || {
            session
                .generate_key_pair(
                    &Mechanism::RsaPkcsKeyPairGen,
                    &keys::public_template(id(1), 2_048),
                    &keys::private_template(id(1)),
                )
                .unwrap();
        };
        let none = keys::find(session, &id(1).into()).unwrap_err();
        assert!(none.detail.contains("is not on the token"), "{none}");
        assert_eq!(none.class, Class::KeyMissing);
        make();
        let no_integrity_key = keys::find(session, &id(1).into()).unwrap_err();
        assert!(
            no_integrity_key.detail.contains("integrity key"),
            "{no_integrity_key}"
        );
        make();
        let two = keys::find(session, &id(1).into()).unwrap_err();
        assert_eq!(two.class, Class::Untrusted);
        assert!(two.detail.contains("more than one"), "{two}");
        // A key that was found before and is missing now means that the token is unavailable, not that a key was
        // forged.
        let gone = KeySession::open(&token.module, token.slot, &[id(9).into()]).unwrap_err();
        assert_eq!(gone.class, Class::KeyMissing);
    });
}

/// A lost session says nothing about the abilities of the token.
#[test]
fn a_lost_session_does_not_choose_sha1() {
    with_softhsm("making::a_lost_session_does_not_choose_sha1", |folder| {
        init();
        let (settings, faulty) = faulty(folder);
        let admin = Admin::open(&settings, &record(), &pin(USER_PIN), true).unwrap();
        let key = admin.generate_key(2_048, None).unwrap().id;
        let lost = Fault::times(code::SESSION_HANDLE_INVALID, 1);
        faulty.set("C_DecryptInit", &lost);
        let problem = admin.check(key).unwrap().problem.unwrap();
        assert!(
            problem.contains("SessionHandleInvalid from C_DecryptInit"),
            "{problem}"
        );
        assert_eq!(admin.check(key).unwrap().problem, None);
    });
}

/// The token lacks HMAC, and the message does not name OAEP as the cause. A temporary failure is not reported as
/// missing HMAC.
#[test]
fn a_token_without_hmac_is_named_for_it() {
    with_softhsm("making::a_token_without_hmac_is_named_for_it", |folder| {
        init();
        let (settings, faulty) = faulty(folder);
        let admin = Admin::open(&settings, &record(), &pin(USER_PIN), true).unwrap();
        let key = admin.generate_key(2_048, None).unwrap().id;
        faulty.set("C_SignInit", &Fault::times(code::FUNCTION_FAILED, 1));
        assert_eq!(admin.check(key).unwrap().problem, None);
        faulty.behave("[[mechanism]]\nabsent = \"CKM_SHA256_HMAC\"\n");
        let problem = admin.check(key).unwrap().problem.unwrap();
        for words in [
            "does not support HMAC-SHA-256",
            "MechanismInvalid from C_SignInit",
            "forged",
        ] {
            assert!(problem.contains(words), "{problem}");
        }
        assert!(!problem.contains("OAEP"), "{problem}");
        let objects = admin.key_ids().unwrap();
        let refused = admin.generate_key(2_048, None).unwrap_err().to_string();
        for words in [
            "does not support HMAC-SHA-256",
            "The key was removed from the token",
        ] {
            assert!(refused.contains(words), "{refused}");
        }
        assert_eq!(admin.key_ids().unwrap(), objects);
    });
}

/// A token that accepts every MAC protects nothing.
#[test]
fn a_token_that_takes_any_mac_is_refused() {
    with_softhsm("making::a_token_that_takes_any_mac_is_refused", |folder| {
        init();
        let (settings, faulty) = faulty(folder);
        let admin = Admin::open(&settings, &record(), &pin(USER_PIN), true).unwrap();
        let key = admin.generate_key(2_048, None).unwrap().id;
        faulty.set("C_Verify", &Fault::always(code::NEVER_FAILS));
        let problem = admin.check(key).unwrap().problem.unwrap();
        assert!(problem.contains("accepts a wrong MAC"), "{problem}");
        faulty.clear("C_Verify");
        assert_eq!(admin.check(key).unwrap().problem, None);
    });
}

/// The public key of a signing key, and whether it verifies a signature with these parameters.
fn verifies(
    parameters: &'static aws_lc_rs::signature::RsaParameters,
    spki: &[u8],
    message: &[u8],
    signature: &[u8],
) -> bool {
    let key = aws_lc_rs::signature::UnparsedPublicKey::new(parameters, spki);
    key.verify(message, signature).is_ok()
}

#[test]
fn a_signing_key_signs_and_is_no_wrapping_key() {
    with_softhsm(
        "making::a_signing_key_signs_and_is_no_wrapping_key",
        |folder| {
            init();
            let admin = Admin::open(&settings(), &record(), &pin(USER_PIN), true).unwrap();
            assert!(!admin.has_signing_key().unwrap());
            let made = admin.make_signing_key().unwrap();
            assert_eq!(made.findings.len(), 14);
            assert!(made.findings.iter().all(|f| f.found == Found::AsExpected));
            assert!(admin.has_signing_key().unwrap());
            assert_eq!(admin.key_ids().unwrap(), []);
            let (signature, is_pss) = admin.sign(&made.object, b"transcript").unwrap();
            assert!(is_pss);
            let pss = &aws_lc_rs::signature::RSA_PSS_2048_8192_SHA256;
            assert!(verifies(pss, &made.spki, b"transcript", &signature));
            assert!(!verifies(pss, &made.spki, b"Transcript", &signature));
            let refused = admin.make_signing_key().unwrap_err().to_string();
            assert!(refused.contains("earlier ceremony"), "{refused}");
            // A wrapping key does not sign, even if its CKA_ID is given.
            let key = admin.generate_key(2_048, Some(id(7))).unwrap();
            assert_eq!(key.id, id(7));
            assert!(admin.sign(&id(7).into(), b"transcript").is_err());
            let taken = admin
                .generate_key(2_048, Some(id(7)))
                .unwrap_err()
                .to_string();
            assert!(taken.contains("already has an object"), "{taken}");
            drop(admin);

            let (settings, faulty) = faulty(folder);
            faulty.behave(
                "[[mechanism]]\nabsent = \"CKM_SHA256_RSA_PKCS_PSS\"\nfunctions = [\"C_SignInit\"]\n",
            );
            let admin = Admin::open(&settings, &record(), &pin(USER_PIN), true).unwrap();
            let (signature, is_pss) = admin.sign(&made.object, b"transcript").unwrap();
            assert!(!is_pss);
            let pkcs1 = &aws_lc_rs::signature::RSA_PKCS1_2048_8192_SHA256;
            assert!(verifies(pkcs1, &made.spki, b"transcript", &signature));
        },
    );
}
