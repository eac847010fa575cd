//! What must fail with a key, tried with keys that allow it: each test notices its own.

use cryptoki::{
    mechanism::{Mechanism, MechanismType},
    object::Attribute,
};

use super::{id, init, open, settings, with_softhsm};
use crate::{
    classify::{Class, Fault},
    keys,
    negative::{Subject, TESTS},
    open::OpenToken,
};
use keybroker_worker_protocol::Settings;

/// Keys of a session whose templates are changed, and what the negative tests say of them.
fn tried(
    token: &OpenToken,
    settings: &Settings,
    private: &[Attribute],
    integrity: &[Attribute],
) -> Result<(), Fault> {
    let with = |mut template: Vec<Attribute>, changes: &[Attribute]| {
        for change in changes.iter().chain([&Attribute::Token(false)]) {
            template.retain(|old| old.attribute_type() != change.attribute_type());
            template.push(change.clone());
        }
        template
    };
    let session = &token.anchor;
    let (public, private) = session
        .generate_key_pair(
            &Mechanism::RsaPkcsKeyPairGen,
            &with(keys::public_template(id(1), 2_048), &[]),
            &with(keys::private_template(id(1)), private),
        )
        .unwrap();
    let binding = session
        .generate_key(
            &Mechanism::GenericSecretKeyGen,
            &with(keys::binding_template(id(1)), integrity),
        )
        .unwrap();
    let pair = keys::find(session, id(1)).unwrap();
    let side = keys::public_side(session, &pair).unwrap();
    let result = token.probe(id(1), &side, true).and_then(|self_test| {
        token.try_what_must_fail(settings, id(1), &self_test, Subject::Throwaway)
    });
    for object in [public, private, binding] {
        // A test that succeeded may have changed the key.
        let _destroyed = session.destroy_object(object);
    }
    result
}

#[test]
fn a_key_that_is_as_it_must_be_passes() {
    with_softhsm("negative::a_key_that_is_as_it_must_be_passes", |_| {
        init();
        assert_eq!(tried(&open(), &settings(), &[], &[]), Ok(()));
    });
}

/// The attribute that is wrong, and the tests of which the first must find it.
#[test]
fn what_a_key_allows_is_found_by_name() {
    with_softhsm("negative::what_a_key_allows_is_found_by_name", |_| {
        init();
        let token = open();
        let any_rsa = Attribute::AllowedMechanisms(vec![
            MechanismType::RSA_PKCS_OAEP,
            MechanismType::RSA_PKCS,
            MechanismType::RSA_X_509,
        ]);
        // SoftHSM copies no key that cannot be modified.
        let copyable = [Attribute::Copyable(true), Attribute::Modifiable(true)];
        let rows: &[(&[Attribute], &[Attribute], &str)] = &[
            (
                &[Attribute::Sensitive(false), Attribute::Extractable(true)],
                &[],
                "read-private-exponent",
            ),
            (
                &[],
                &[Attribute::Sensitive(false), Attribute::Extractable(true)],
                "read-integrity-key",
            ),
            (&[Attribute::Extractable(true)], &[], "wrap-private-"),
            (&[], &[Attribute::Extractable(true)], "wrap-integrity-"),
            (&copyable, &[], "copy-private"),
            (&[], &copyable, "copy-integrity"),
            (&[any_rsa.clone()], &[], "decrypt-raw"),
            (&[any_rsa, Attribute::Sign(true)], &[], "decrypt-raw"),
            (&[Attribute::Unwrap(true)], &[], "unwrap"),
            (
                &[],
                &[Attribute::AllowedMechanisms(vec![
                    MechanismType::SHA256_HMAC,
                    MechanismType::SHA224_HMAC,
                ])],
                "hmac-sha224",
            ),
        ];
        for (private, integrity, name) in rows {
            let fault = tried(&token, &settings(), private, integrity).expect_err(name);
            assert_eq!(fault.class, Class::Untrusted, "{fault}");
            assert!(
                fault.detail.contains(&format!("test `{name}")),
                "{name}: {fault}"
            );
        }
    });
}

#[test]
fn an_exception_and_a_spared_test_excuse_what_they_name() {
    with_softhsm(
        "negative::an_exception_and_a_spared_test_excuse_what_they_name",
        |_| {
            init();
            let token = open();
            let copyable = [Attribute::Copyable(true)];
            let excepted = Settings {
                attribute_exceptions: vec!["CKA_COPYABLE".to_owned()],
                ..settings()
            };
            assert_eq!(tried(&token, &excepted, &copyable, &copyable), Ok(()));
            let extractable = [Attribute::Extractable(true)];
            let wrapped = tried(&token, &excepted, &extractable, &[]).unwrap_err();
            assert!(wrapped.detail.contains("wrapped"), "{wrapped}");
            let spared = Settings {
                spared_tests: TESTS
                    .iter()
                    .map(|test| test.name.to_owned())
                    .filter(|name| name.starts_with("wrap-private"))
                    .collect(),
                ..settings()
            };
            assert_eq!(tried(&token, &spared, &extractable, &[]), Ok(()));
        },
    );
}
