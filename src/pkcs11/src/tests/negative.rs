//! Tests each negative test with keys and modules that allow the forbidden operation.

use cryptoki::{
    mechanism::{Mechanism, MechanismType},
    object::Attribute,
};

use super::{
    USER_PIN, faulty,
    faulty::{Fault as ModuleFault, code},
    id, init, pin, record, settings, with_softhsm,
};
use crate::{
    classify::{Class, Fault},
    keys,
    negative::{NegativeTest, Subject, TESTS},
    open::OpenToken,
};
use keybroker_core::key::Purpose;
use keybroker_worker_protocol::Settings;

fn token(settings: &Settings) -> OpenToken {
    OpenToken::login(settings, &record(), &pin(USER_PIN), true).unwrap()
}

/// Runs the negative tests on session keys with changed templates. Returns the tests that the token cannot run.
fn tried(
    token: &OpenToken,
    settings: &Settings,
    private: &[Attribute],
    integrity: &[Attribute],
    while_tried: impl FnOnce(),
) -> Result<Vec<&'static str>, Fault> {
    tried_with(
        Purpose::Plain,
        token,
        settings,
        private,
        integrity,
        while_tried,
    )
}

/// Does the same as [`tried`] with keys of this purpose.
fn tried_with(
    purpose: Purpose,
    token: &OpenToken,
    settings: &Settings,
    private: &[Attribute],
    integrity: &[Attribute],
    while_tried: impl FnOnce(),
) -> Result<Vec<&'static str>, Fault> {
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
            &with(keys::template_of(purpose, id(1)), private),
        )
        .unwrap();
    let integrity_key = session
        .generate_key(
            &Mechanism::GenericSecretKeyGen,
            &with(keys::generic_secret_template(id(1)), integrity),
        )
        .unwrap();
    let place = keys::Place {
        purpose,
        ..id(1).into()
    };
    let pair = keys::find(session, &place).unwrap();
    let side = keys::public_side(session, &pair).unwrap();
    let self_test = token.probe(&place, &side, true).unwrap();
    while_tried();
    let result = token.try_what_must_fail(settings, &pair, &side, &self_test, Subject::Throwaway);
    for object in [public, private, integrity_key] {
        // A successful operation may have changed the key.
        let _destroyed = session.destroy_object(object);
    }
    result
}

fn nothing() {}

/// Settings with which only one test is run.
fn only(settings: &Settings, name: &str) -> Settings {
    Settings {
        spared_tests: TESTS
            .iter()
            .map(|test| test.name.to_owned())
            .filter(|test| test != name)
            .collect(),
        ..settings.clone()
    }
}

#[test]
fn a_key_that_is_as_it_must_be_passes() {
    with_softhsm("negative::a_key_that_is_as_it_must_be_passes", |_| {
        init();
        let settings = settings();
        for purpose in [Purpose::Plain, Purpose::Sealed] {
            let token = token(&settings);
            let not_made = tried_with(purpose, &token, &settings, &[], &[], nothing).unwrap();
            assert!(not_made.is_empty(), "{purpose:?}: {not_made:?}");
        }
    });
}

/// SoftHSM wraps no key with these mechanisms, so it cannot show that these tests find a problem.
const NOT_OFFERED_BY_SOFTHSM: [&str; 5] = [
    "wrap-private-aes-cbc",
    "wrap-private-aes-gcm",
    "wrap-integrity-aes-cbc",
    "wrap-integrity-aes-ecb",
    "wrap-integrity-aes-gcm",
];

/// The change that makes a test find a problem.
enum Weakness {
    Private(Vec<Attribute>),
    Integrity(Vec<Attribute>),
    /// A function of the module that reports success although it has failed.
    Module(&'static str),
}

fn weakness(test: &str) -> Weakness {
    use Weakness::{Integrity, Module, Private};
    let readable = || vec![Attribute::Sensitive(false), Attribute::Extractable(true)];
    let extractable = || vec![Attribute::Extractable(true)];
    // SoftHSM does not copy keys that cannot be modified.
    let copyable = || vec![Attribute::Copyable(true), Attribute::Modifiable(true)];
    let allowed =
        |mechanism| Attribute::AllowedMechanisms(vec![mechanism, MechanismType::RSA_PKCS_OAEP]);
    let hashes =
        |mechanism| Attribute::AllowedMechanisms(vec![mechanism, MechanismType::SHA256_HMAC]);
    match test {
        "read-private-exponent" | "read-prime" => Private(readable()),
        "read-integrity-key" => Integrity(readable()),
        name if ["-aes-kwp", "-aes-kw-pkcs7", "-rsa-aes"]
            .iter()
            .any(|end| name.ends_with(end)) =>
        {
            Module("C_WrapKey")
        }
        name if name.starts_with("wrap-private") => Private(extractable()),
        name if name.starts_with("wrap-integrity") => Integrity(extractable()),
        "copy-private" => Private(copyable()),
        "copy-integrity" => Integrity(copyable()),
        name if name.starts_with("copy-") => Module("C_CopyObject"),
        name if name.starts_with("derive-") => Module("C_DeriveKey"),
        "decrypt-raw" => Private(vec![allowed(MechanismType::RSA_X_509)]),
        "decrypt-pkcs1" => Private(vec![allowed(MechanismType::RSA_PKCS)]),
        "sign" => Private(vec![
            allowed(MechanismType::RSA_PKCS),
            Attribute::Sign(true),
        ]),
        "unwrap" => Private(vec![Attribute::Unwrap(true)]),
        "decrypt-sealed" => Private(vec![Attribute::Decrypt(true)]),
        "unwrap-pkcs1" => Private(vec![allowed(MechanismType::RSA_PKCS)]),
        name if name.starts_with("unwrap-") => Module("C_UnwrapKey"),
        "hmac-sha224" => Integrity(vec![hashes(MechanismType::SHA224_HMAC)]),
        // A key with the length of the hash.
        "hmac-sha512" => Integrity(vec![
            hashes(MechanismType::SHA512_HMAC),
            Attribute::ValueLen(64.into()),
        ]),
        name if name.starts_with("verify-") => Module("C_Verify"),
        name if name.starts_with("decrypt-") => Module("C_Decrypt"),
        name if name.starts_with("set-") => Module("C_SetAttributeValue"),
        other => panic!("no weakness for {other}"),
    }
}

/// A purpose of the keys with which a test is run.
fn purpose_of(test: &NegativeTest) -> Purpose {
    test.purpose.unwrap_or_default()
}

/// Runs each test alone, and checks that it finds the problem.
#[test]
fn each_test_finds_what_it_is_for() {
    with_softhsm("negative::each_test_finds_what_it_is_for", |folder| {
        init();
        let (settings, faulty) = faulty(folder);
        let token = token(&settings);
        let mut missed = Vec::new();
        for test in TESTS {
            let settings = only(&settings, test.name);
            let purpose = purpose_of(test);
            let result = match weakness(test.name) {
                Weakness::Private(private) => {
                    tried_with(purpose, &token, &settings, &private, &[], nothing)
                }
                Weakness::Integrity(integrity) => {
                    tried_with(purpose, &token, &settings, &[], &integrity, nothing)
                }
                Weakness::Module(function) => {
                    let lie = || faulty.set(function, &ModuleFault::always(code::NEVER_FAILS));
                    let result = tried_with(purpose, &token, &settings, &[], &[], lie);
                    faulty.clear(function);
                    result
                }
            };
            match result {
                Err(fault)
                    if fault.class == Class::Untrusted
                        && fault.detail.contains(&format!("test `{}`", test.name)) => {}
                Ok(not_made)
                    if not_made.is_empty() && NOT_OFFERED_BY_SOFTHSM.contains(&test.name) => {}
                other => missed.push((test.name, other)),
            }
        }
        assert!(missed.is_empty(), "{missed:#?}");
    });
}

#[test]
fn an_exception_accepts_what_it_names_and_nothing_else() {
    with_softhsm(
        "negative::an_exception_accepts_what_it_names_and_nothing_else",
        |_| {
            init();
            let excepted = Settings {
                attribute_exceptions: vec!["CKA_COPYABLE".to_owned()],
                ..settings()
            };
            let token = token(&excepted);
            let copyable = [Attribute::Copyable(true), Attribute::Modifiable(true)];
            tried(&token, &excepted, &copyable, &copyable, nothing).unwrap();
            let extractable = [Attribute::Extractable(true)];
            let wrapped = tried(&token, &excepted, &extractable, &[], nothing).unwrap_err();
            assert!(wrapped.detail.contains("wrapped"), "{wrapped}");
        },
    );
}

/// The tests that keys cannot leave the token are run on every token.
#[test]
fn no_test_of_leaving_keys_can_be_spared() {
    for test in TESTS {
        let leaves = ["read-", "wrap-", "set-", "derive-integrity-"]
            .iter()
            .any(|start| test.name.starts_with(start))
            || test.name == "decrypt-sealed"
            || test.name.starts_with("copy-")
                && ["-extractable", "-readable"]
                    .iter()
                    .any(|end| test.name.ends_with(end));
        assert_eq!(test.can_be_spared, !leaves, "{}", test.name);
        assert!(!(leaves && test.accepted_by.is_some()), "{}", test.name);
    }
}

/// A test that was not run is reported.
#[test]
fn tests_for_which_the_token_makes_no_keys_are_named() {
    with_softhsm(
        "negative::tests_for_which_the_token_makes_no_keys_are_named",
        |folder| {
            init();
            let (settings, faulty) = faulty(folder);
            let token = token(&settings);
            let none = || {
                faulty.set("C_GenerateKey", &ModuleFault::always(code::FUNCTION_FAILED));
            };
            let not_made = tried(&token, &settings, &[], &[], none).unwrap();
            let expected: Vec<&str> = TESTS
                .iter()
                .map(|test| test.name)
                .filter(|name| {
                    ["wrap-", "derive-"]
                        .iter()
                        .any(|start| name.starts_with(start))
                })
                .collect();
            assert_eq!(not_made, expected);
        },
    );
}

/// A token that was busy at the first attempt has not refused the key.
#[test]
fn one_error_of_the_token_is_no_refusal() {
    with_softhsm("negative::one_error_of_the_token_is_no_refusal", |folder| {
        init();
        let (settings, faulty) = faulty(folder);
        let token = token(&settings);
        let busy = || {
            faulty.set("C_WrapKey", &ModuleFault::times(code::DEVICE_ERROR, 1));
        };
        let extractable = [Attribute::Extractable(true)];
        let only_wrap = only(&settings, "wrap-private-aes-kw");
        let fault = tried(&token, &only_wrap, &extractable, &[], busy).unwrap_err();
        assert_eq!(fault.class, Class::Untrusted, "{fault}");
    });
}

/// A lost session says nothing about the token.
#[test]
fn a_lost_session_is_no_refusal() {
    with_softhsm("negative::a_lost_session_is_no_refusal", |folder| {
        init();
        let (settings, faulty) = faulty(folder);
        let token = token(&settings);
        let lost = || {
            faulty.set(
                "C_CopyObject",
                &ModuleFault::always(code::SESSION_HANDLE_INVALID),
            );
        };
        let fault = tried(&token, &only(&settings, "copy-private"), &[], &[], lost).unwrap_err();
        assert_eq!(fault.class, Class::SessionLost, "{fault}");
    });
}
