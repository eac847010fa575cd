//! Tests tokens that do not support an attribute, have no read-only sessions, have a PIN pad, or report false values.

use super::{
    Admin, OpenToken, USER_PIN, admin, faulty, id, init, open, pin, record, settings, with_softhsm,
};
use keybroker_core::key::{IntegrityPlace, ObjectIds};
use keybroker_worker_protocol::{
    IntegrityKey, Settings, integrity_file::IntegrityFiles, oaep::WrapKey,
};

use crate::{
    admin::Verifier,
    classify::{Class, Fault},
    keys,
    select::Registered,
};

/// Counts the objects of all kinds on the token.
fn objects() -> usize {
    let token = open();
    let found = token.anchor.find_objects(&[]).unwrap();
    found.len()
}

/// An attribute that the token refuses in templates and that cannot be read.
fn unknown(name: &str) -> String {
    format!(
        "[[attribute]]\nname = \"{name}\"\nparts = [\"private\", \"secret\"]\n\
         in_template.refuse = \"CKR_TEMPLATE_INCONSISTENT\"\non_read.fail = \"CKR_FUNCTION_FAILED\"\n"
    )
}

/// An attribute that the token sets to another value but reports as requested.
fn lied_about(name: &str, part: &str, truth: bool) -> String {
    format!(
        "[[attribute]]\nname = \"{name}\"\nparts = [\"{part}\"]\n\
         in_template.replace = {truth}\non_read.value = {}\n",
        !truth
    )
}

#[test]
fn a_refused_attribute_is_named_and_its_exception_helps() {
    with_softhsm(
        "behaviours::a_refused_attribute_is_named_and_its_exception_helps",
        |folder| {
            init();
            let (settings, faulty) = faulty(folder);
            faulty.behave(&(unknown("CKA_COPYABLE") + &unknown("CKA_ALLOWED_MECHANISMS")));
            let admin = Admin::open(&settings, &record(), &pin(USER_PIN), true).unwrap();
            let message = admin.generate_key(2_048).unwrap_err().to_string();
            let setting = "attribute_exceptions = [\"CKA_COPYABLE\", \"CKA_ALLOWED_MECHANISMS\"]";
            assert!(message.contains(setting), "{message}");
            assert!(message.contains("the integrity key"), "{message}");
            assert!(message.contains("padding oracles"), "{message}");
            drop(admin);
            assert_eq!(objects(), 0);

            let excepted = Settings {
                attribute_exceptions: vec![
                    "CKA_COPYABLE".to_owned(),
                    "CKA_ALLOWED_MECHANISMS".to_owned(),
                ],
                ..settings
            };
            let admin = Admin::open(&excepted, &record(), &pin(USER_PIN), true).unwrap();
            let key = admin.generate_key(2_048).unwrap();
            assert_eq!(key.problem, None);
            assert_eq!(objects(), 3);
        },
    );
}

#[test]
fn the_message_names_the_attributes_of_both_keys_at_once() {
    with_softhsm(
        "behaviours::the_message_names_the_attributes_of_both_keys_at_once",
        |folder| {
            init();
            let (settings, faulty) = faulty(folder);
            faulty.behave(&(unknown("CKA_COPYABLE") + &unknown("CKA_SIGN_RECOVER")));
            let admin = Admin::open(&settings, &record(), &pin(USER_PIN), true).unwrap();
            let message = admin.generate_key(2_048).unwrap_err().to_string();
            let setting = "attribute_exceptions = [\"CKA_COPYABLE\", \"CKA_SIGN_RECOVER\"]";
            assert!(message.contains(setting), "{message}");
            drop(admin);
            let excepted = Settings {
                attribute_exceptions: vec![
                    "CKA_COPYABLE".to_owned(),
                    "CKA_SIGN_RECOVER".to_owned(),
                ],
                ..settings
            };
            let admin = Admin::open(&excepted, &record(), &pin(USER_PIN), true).unwrap();
            assert_eq!(admin.generate_key(2_048).unwrap().problem, None);
        },
    );
}

/// Tests tokens whose HMAC keys are not generic secrets, and are restricted to one hash by their type.
fn hmac_keys(also: &str) -> String {
    let others = ["CKM_SHA224_HMAC", "CKM_SHA512_HMAC"].map(|mechanism| {
        format!(
            "[[mechanism]]\nabsent = \"{mechanism}\"\nfunctions = [\"C_SignInit\"]\n\
             refuse = \"CKR_KEY_TYPE_INCONSISTENT\"\n"
        )
    });
    format!(
        "[hmac]\nkey_type = \"CKK_SHA256_HMAC\"\nrefuse = \"CKR_TEMPLATE_INCONSISTENT\"\n{also}{}",
        others.concat()
    )
}

#[test]
fn the_kind_of_integrity_key_that_a_token_makes_is_found_and_works() {
    with_softhsm(
        "behaviours::the_kind_of_integrity_key_that_a_token_makes_is_found_and_works",
        |folder| {
            init();
            let (settings, faulty) = faulty(folder);
            // The template lacks the length and the mechanisms that the type implies.
            let by_type = hmac_keys("length = 32\n")
                + "[[template]]\nfunction = \"C_GenerateKey\"\nrefuse = \"CKR_ATTRIBUTE_TYPE_INVALID\"\nonly = [\
                   \"CKA_CLASS\", \"CKA_KEY_TYPE\", \"CKA_TOKEN\", \"CKA_PRIVATE\", \"CKA_SENSITIVE\", \"CKA_EXTRACTABLE\", \
                   \"CKA_MODIFIABLE\", \"CKA_COPYABLE\", \"CKA_SIGN\", \"CKA_VERIFY\", \"CKA_ENCRYPT\", \"CKA_DECRYPT\", \
                   \"CKA_WRAP\", \"CKA_UNWRAP\", \"CKA_DERIVE\", \"CKA_ID\", \"CKA_LABEL\"]\n";
            for (behaviour, kind) in [
                (by_type, IntegrityKey::Sha256Hmac),
                (hmac_keys("mechanism = 0xde436997\n"), IntegrityKey::Nshield),
            ] {
                faulty.behave(&behaviour);
                let admin = Admin::open(&settings, &record(), &pin(USER_PIN), true).unwrap();
                let message = admin.generate_key(2_048).unwrap_err().to_string();
                let setting = format!("set `integrity_key = \"{}\"`", kind.as_str());
                assert!(message.contains(&setting), "{message}");
                assert!(!message.contains("attribute_exceptions"), "{message}");
                drop(admin);
                assert_eq!(objects(), 0);
                let other = Settings {
                    integrity_key: kind,
                    ..settings.clone()
                };
                let admin = Admin::open(&other, &record(), &pin(USER_PIN), true).unwrap();
                let key = admin.generate_key(2_048).unwrap();
                assert_eq!(key.problem, None);
                drop(admin);
                faulty.behave("");
                let token = open();
                for object in token.anchor.find_objects(&[]).unwrap() {
                    token.anchor.destroy_object(object).unwrap();
                }
            }
        },
    );
}

/// nShield generates a generic secret but refuses its first use. If the token makes no session keys, this refusal is
/// found only with token keys.
#[test]
fn an_integrity_key_that_is_refused_when_it_is_used_is_removed_again() {
    with_softhsm(
        "behaviours::an_integrity_key_that_is_refused_when_it_is_used_is_removed_again",
        |folder| {
            init();
            let (settings, faulty) = faulty(folder);
            let late = hmac_keys("mechanism = 0xde436997\nrefuse_at_use = true\n");
            let no_session_keys = "[[attribute]]\nname = \"CKA_TOKEN\"\nparts = [\"private\", \"secret\"]\n\
                                   in_template = { refuse = \"CKR_ATTRIBUTE_VALUE_INVALID\", when = false }\n";
            for (behaviour, words) in [
                (
                    late.clone(),
                    [
                        "set `integrity_key = \"nshield\"`",
                        "TemplateInconsistent from C_SignInit",
                        "No key was made",
                    ],
                ),
                (
                    late + no_session_keys,
                    [
                        "TemplateInconsistent from C_SignInit",
                        "set `integrity_key` in [token]",
                        "The key was removed from the token",
                    ],
                ),
            ] {
                faulty.behave(&behaviour);
                let admin = Admin::open(&settings, &record(), &pin(USER_PIN), true).unwrap();
                let message = admin.generate_key(2_048).unwrap_err().to_string();
                for word in words {
                    assert!(message.contains(word), "{word}: {message}");
                }
                assert!(!message.contains("OAEP neither"), "{message}");
                drop(admin);
                assert_eq!(objects(), 0);
            }
        },
    );
}

/// Behaves like a TPM, which makes no secret keys.
const NO_SECRET_KEYS: &str = "[[rule]]\nname = \"no secret keys\"\nfunction = [\"C_GenerateKey\", \"C_UnwrapKey\"]\n\
                              do = { return = \"CKR_FUNCTION_NOT_SUPPORTED\" }\n";

#[test]
fn a_token_without_keys_for_hmac_gets_no_integrity_key_in_the_worker_by_itself() {
    with_softhsm(
        "behaviours::a_token_without_keys_for_hmac_gets_no_integrity_key_in_the_worker_by_itself",
        |folder| {
            init();
            let (settings, faulty) = faulty(folder);
            faulty.behave(NO_SECRET_KEYS);
            let admin = Admin::open(&settings, &record(), &pin(USER_PIN), true).unwrap();
            let message = admin.generate_key(2_048).unwrap_err().to_string();
            assert!(
                message.contains("`integrity_key = \"worker\"`"),
                "{message}"
            );
            drop(admin);
            assert_eq!(objects(), 0, "no fall-back");
        },
    );
}

#[test]
fn an_integrity_key_in_the_worker_is_used_only_with_its_file_and_the_digest_of_that() {
    with_softhsm(
        "behaviours::an_integrity_key_in_the_worker_is_used_only_with_its_file_and_the_digest_of_that",
        |folder| {
            init();
            let (settings, faulty) = faulty(folder);
            faulty.behave(NO_SECRET_KEYS);
            let directory = folder.join("integrity-keys");
            std::fs::create_dir(&directory).unwrap();
            let mut in_worker = Settings {
                integrity_key: IntegrityKey::Worker,
                integrity_key_directory: Some(directory),
                ..settings.clone()
            };
            let admin = Admin::open(&in_worker, &record(), &pin(USER_PIN), true).unwrap();
            let key = admin.generate_key(2_048).unwrap();
            assert_eq!(key.problem, None);
            assert_eq!(key.objects.integrity, IntegrityPlace::Worker);
            assert!(key.integrity_key.is_empty(), "no attributes to check");
            assert!(
                !key.not_tried.iter().any(|test| test.contains("integrity")),
                "{:?}",
                key.not_tried
            );
            let mac = admin.mac(key.id, b"a row").unwrap();
            drop(admin);
            assert_eq!(objects(), 2, "the RSA pair alone");
            let text = key.integrity_key_file.unwrap();
            assert!(!text.contains(&hex::encode(mac)));
            let open_and_check = |settings: &Settings| {
                let mut admin = Admin::open(settings, &record(), &pin(USER_PIN), false).unwrap();
                let objects = ObjectIds {
                    private: None,
                    integrity: IntegrityPlace::Worker,
                };
                admin.know(key.id, objects);
                let problem = admin.check(key.id).unwrap().problem;
                (admin, problem)
            };
            let problem = |settings: &Settings| open_and_check(settings).1.unwrap();

            assert!(problem(&in_worker).contains("restore the file from a backup"));
            let files = IntegrityFiles::of(&in_worker, key.id).unwrap();
            let (path, digest) = files.create(key.id, &text).unwrap();
            assert!(problem(&in_worker).contains("does not have the digest"));
            in_worker
                .integrity_key_digests
                .insert(key.id.to_string(), digest);
            let (admin, none) = open_and_check(&in_worker);
            assert_eq!(none, None);
            assert_eq!(admin.mac(key.id, b"a row").unwrap(), mac, "the same key");
            let mut verifier = Verifier::new(&admin, key.id).unwrap();
            let mut forged = mac;
            forged[31] ^= 1;
            for (shown, is_right) in [(&mac[..], true), (&forged, false), (&mac[..31], false)] {
                let verified = verifier.verify(&admin, key.id, b"a row", shown).unwrap();
                assert_eq!(verified, is_right, "{} bytes", shown.len());
            }
            drop((verifier, admin));

            // According to the registry, the integrity key is in the worker, but the settings do not permit such keys.
            let refused = problem(&settings);
            assert!(refused.contains("does not permit"), "{refused}");
            std::fs::write(&path, text.replace("RSA-OAEP", "rsa-oaep")).unwrap();
            assert!(problem(&in_worker).contains("was changed"));
        },
    );
}

/// The plaintext contains its purpose and the id of the wrapping key. A wrapped user key and the integrity key of
/// another wrapping key are therefore refused, although the configuration has the digest of the file.
#[test]
fn only_what_was_wrapped_as_an_integrity_key_of_this_key_is_unwrapped_as_one() {
    with_softhsm(
        "behaviours::only_what_was_wrapped_as_an_integrity_key_of_this_key_is_unwrapped_as_one",
        |folder| {
            init();
            let (settings, _faulty) = faulty(folder);
            let in_worker = Settings {
                integrity_key: IntegrityKey::Worker,
                integrity_key_directory: Some(folder.to_owned()),
                ..settings
            };
            let admin = Admin::open(&in_worker, &record(), &pin(USER_PIN), true).unwrap();
            let [key, other] = [(); 2].map(|()| admin.generate_key(2_048).unwrap());
            drop(admin);
            let user_key = WrapKey::new(&key.spki, key.algorithm.unwrap())
                .and_then(|public| public.wrap(&[7; 32]))
                .unwrap();
            let own = key.integrity_key_file.unwrap();
            let of_other = other.integrity_key_file.unwrap();
            let ciphertext = |text: &str| {
                let content: serde_json::Value = serde_json::from_str(text).unwrap();
                content["ciphertext"].as_str().unwrap().to_owned()
            };
            for (wrapped, words) in [
                (hex::encode(user_key), "does not contain the integrity key"),
                (ciphertext(&of_other), "does not unwrap"),
            ] {
                let text = own.replace(&ciphertext(&own), &wrapped);
                let files = IntegrityFiles::of(&in_worker, key.id).unwrap();
                let (path, digest) = files.create(key.id, &text).unwrap();
                let pinned = Settings {
                    integrity_key_digests: [(key.id.to_string(), digest)].into(),
                    ..in_worker.clone()
                };
                let admin = Admin::open(&pinned, &record(), &pin(USER_PIN), false).unwrap();
                let problem = admin.check(key.id).unwrap().problem.unwrap();
                assert!(problem.contains(words), "{problem}");
                std::fs::remove_file(path).unwrap();
            }
        },
    );
}

#[test]
fn a_token_that_allows_no_second_object_with_an_id_gets_another_for_the_integrity_key() {
    with_softhsm(
        "behaviours::a_token_that_allows_no_second_object_with_an_id_gets_another_for_the_integrity_key",
        |folder| {
            init();
            let (settings, faulty) = faulty(folder);
            faulty.behave("[objects]\nrefuse_duplicate_id = \"CKR_ATTRIBUTE_VALUE_INVALID\"\n");
            let admin = Admin::open(&settings, &record(), &pin(USER_PIN), true).unwrap();
            let key = admin.generate_key(2_048).unwrap();
            assert_eq!(key.problem, None);
            assert_eq!(key.objects.private, None);
            assert!(matches!(key.objects.integrity, IntegrityPlace::Object(_)));
            drop(admin);
            assert_eq!(objects(), 3);
            // The key is found before it is registered, and also with the registered `CKA_ID`.
            for known in [ObjectIds::default(), key.objects] {
                let mut admin = Admin::open(&settings, &record(), &pin(USER_PIN), false).unwrap();
                admin.know(key.id, known);
                assert_eq!(admin.check(key.id).unwrap().problem, None);
            }
        },
    );
}

#[test]
fn a_token_whose_public_keys_must_be_private_gets_such_ones() {
    with_softhsm(
        "behaviours::a_token_whose_public_keys_must_be_private_gets_such_ones",
        |folder| {
            init();
            let (settings, faulty) = faulty(folder);
            faulty.behave(
                "[[attribute]]\nname = \"CKA_PRIVATE\"\n\
                 in_template = { refuse = \"CKR_TEMPLATE_INCONSISTENT\", unless = true }\n",
            );
            let admin = Admin::open(&settings, &record(), &pin(USER_PIN), true).unwrap();
            assert_eq!(admin.generate_key(2_048).unwrap().problem, None);
        },
    );
}

#[test]
fn without_c_verify_the_mac_is_made_again_and_compared() {
    with_softhsm(
        "behaviours::without_c_verify_the_mac_is_made_again_and_compared",
        |folder| {
            init();
            let (settings, faulty) = faulty(folder);
            faulty.behave(
                "[[rule]]\nfunction = [\"C_VerifyInit\", \"C_Verify\"]\n\
                 do = { return = \"CKR_FUNCTION_NOT_SUPPORTED\" }\n",
            );
            let admin = Admin::open(&settings, &record(), &pin(USER_PIN), true).unwrap();
            let key = admin.generate_key(2_048).unwrap();
            assert_eq!(key.problem, None);
            let mac = admin.mac(key.id, b"message").unwrap();
            let mut verifier = Verifier::new(&admin, key.id).unwrap();
            let mut verify =
                |message: &[u8], mac: &[u8]| verifier.verify(&admin, key.id, message, mac).unwrap();
            assert!(verify(b"message", &mac));
            assert!(!verify(b"massage", &mac));
            assert!(!verify(b"message", &mac[1..]));
            let mut forged = mac;
            forged[31] ^= 1;
            assert!(!verify(b"message", &forged));
        },
    );
}

#[test]
fn a_run_that_fails_in_the_middle_leaves_nothing() {
    with_softhsm(
        "behaviours::a_run_that_fails_in_the_middle_leaves_nothing",
        |folder| {
            init();
            let (settings, faulty) = faulty(folder);
            let admin = Admin::open(&settings, &record(), &pin(USER_PIN), true).unwrap();
            // The token makes a session key pair, but no key pair on the token.
            faulty.behave(
                "[[rule]]\nfunction = \"C_GenerateKeyPair\"\non = { skip = 1 }\ndo = { return = \"CKR_DEVICE_MEMORY\" }\n",
            );
            let message = admin.generate_key(2_048).unwrap_err().to_string();
            assert!(
                message.contains("DeviceMemory from C_GenerateKeyPair"),
                "{message}"
            );
            assert!(message.contains("No key was made"), "{message}");
            drop(admin);
            assert_eq!(objects(), 0);
        },
    );
}

#[test]
fn a_token_that_lies_about_a_key_is_found_out_by_trying() {
    with_softhsm(
        "behaviours::a_token_that_lies_about_a_key_is_found_out_by_trying",
        |folder| {
            init();
            let (settings, faulty) = faulty(folder);
            let admin = Admin::open(&settings, &record(), &pin(USER_PIN), true).unwrap();
            for (part, test) in [
                ("private", "`wrap-private-"),
                ("secret", "`wrap-integrity-"),
            ] {
                faulty.behave(&lied_about("CKA_EXTRACTABLE", part, true));
                let message = admin.generate_key(2_048).unwrap_err().to_string();
                assert!(message.contains(test), "{message}");
                assert!(!message.contains("attribute_exceptions"), "{message}");
            }
            drop(admin);
            assert_eq!(objects(), 0);
        },
    );
}

#[test]
fn a_token_without_read_only_sessions_is_used_read_write() {
    with_softhsm(
        "behaviours::a_token_without_read_only_sessions_is_used_read_write",
        |folder| {
            init();
            let (settings, faulty) = faulty(folder);
            faulty.behave("[sessions]\nrefuse_read_only = \"CKR_TOKEN_WRITE_PROTECTED\"\n");
            let admin = Admin::open(&settings, &record(), &pin(USER_PIN), true).unwrap();
            let key = admin.generate_key(2_048).unwrap();
            drop(admin);
            let admin = Admin::open(&settings, &record(), &pin(USER_PIN), false).unwrap();
            assert_eq!(admin.check(key.id).unwrap().problem, None);
        },
    );
}

#[test]
fn a_token_that_takes_its_pin_at_a_pad_is_refused_before_a_login() {
    with_softhsm(
        "behaviours::a_token_that_takes_its_pin_at_a_pad_is_refused_before_a_login",
        |folder| {
            init();
            let (settings, faulty) = faulty(folder);
            faulty.behave("[login]\nprotected_authentication_path = true\n");
            let error = Admin::open(&settings, &record(), &pin(USER_PIN), false).unwrap_err();
            assert!(error.to_string().contains("PIN pad"), "{error}");
            assert_eq!(faulty.count("C_Login begins"), 0);
        },
    );
}

#[test]
fn a_token_without_a_free_session_says_which_settings_help() {
    with_softhsm(
        "behaviours::a_token_without_a_free_session_says_which_settings_help",
        |folder| {
            init();
            let (settings, faulty) = faulty(folder);
            faulty.behave("[sessions]\nmax = 1\n");
            let token = OpenToken::login(&settings, &record(), &pin(USER_PIN), false).unwrap();
            let fault = token.session(&[]).unwrap_err();
            assert!(fault.detail.contains("SessionCount"), "{fault}");
            assert!(fault.detail.contains("sessions_per_worker"), "{fault}");
        },
    );
}

#[test]
fn a_login_of_another_process_is_named_when_the_keys_are_not_found() {
    with_softhsm(
        "behaviours::a_login_of_another_process_is_named_when_the_keys_are_not_found",
        |folder| {
            init();
            let (settings, faulty) = faulty(folder);
            // The token reports that another process is logged in, and does not let this process use that login.
            faulty.behave(
                "[[rule]]\nfunction = \"C_Login\"\ndo = { return = \"CKR_USER_ALREADY_LOGGED_IN\" }\n",
            );
            let token = OpenToken::login(&settings, &record(), &pin(USER_PIN), false).unwrap();
            let fault = keys::find(&token.anchor, &id(1).into()).unwrap_err();
            let fault = token.explained(fault);
            assert!(fault.detail.contains("`workers = 1`"), "{fault}");
        },
    );
}

/// Logs in as `serve` does, with a registry that has these serial numbers.
fn open_registered(settings: &Settings, serials: &[&str]) -> Result<OpenToken, Fault> {
    OpenToken::login_to(
        settings,
        &record(),
        Some(&pin(USER_PIN)),
        false,
        Registered::Required(serials),
    )
}

#[test]
fn of_two_tokens_with_one_label_the_registry_says_which() {
    with_softhsm(
        "behaviours::of_two_tokens_with_one_label_the_registry_says_which",
        |folder| {
            init();
            let twin = admin::init_token(&settings(), "twin", &pin("654321"), &pin(USER_PIN), None);
            let twin = twin.unwrap();
            let (settings, faulty) = faulty(folder);
            faulty.behave("[token]\nlabel = \"test\"\n");
            let open = |serials: &[&str]| open_registered(&settings, serials);
            for serials in [&[][..], &["0"], &[""]] {
                let fault = open(serials).unwrap_err();
                assert!(fault.detail.contains("`token.serial`"), "{fault}");
                assert!(fault.detail.contains(&twin.serial), "{fault}");
            }
            // The registry alone must not determine which token gets the PIN.
            let fault = open(&["0", &twin.serial]).unwrap_err();
            assert!(
                fault
                    .detail
                    .contains("no record of an earlier login to this token with this PIN"),
                "{fault}"
            );
            assert_eq!(faulty.count("C_Login begins"), 0);
            let by_serial = Settings {
                label: None,
                serial: Some(twin.serial.clone()),
                ..settings.clone()
            };
            drop(OpenToken::login(&by_serial, &record(), &pin(USER_PIN), false).unwrap());
            assert_eq!(open(&["0", &twin.serial]).unwrap().info.serial, twin.serial);
        },
    );
}

/// The registered token may be absent, and a token with the same label may belong to another user.
#[test]
fn a_token_that_the_registry_does_not_name_is_not_given_the_pin() {
    with_softhsm(
        "behaviours::a_token_that_the_registry_does_not_name_is_not_given_the_pin",
        |folder| {
            init();
            let (settings, faulty) = faulty(folder);
            let open = |serials: &[&str]| open_registered(&settings, serials);
            // If the registry has no serial number, it does not restrict the choice.
            let serial = open(&[""]).unwrap().info.serial;
            assert_eq!(open(&[serial.as_str()]).unwrap().info.serial, serial);
            // The token is refused even if it accepted the PIN before. A clone must be registered
            // first.
            let logins = faulty.count("C_Login begins");
            let fault = open(&["0123456789abcdef"]).unwrap_err();
            assert_eq!(fault.class, Class::NoToken, "{fault}");
            for words in [
                "0123456789abcdef",
                &serial,
                "no login was tried",
                "key register",
            ] {
                assert!(fault.detail.contains(words), "{fault}");
            }
            assert_eq!(faulty.count("C_Login begins"), logins);
            // A command may be for the clone.
            let clone = OpenToken::login_to(
                &settings,
                &record(),
                Some(&pin(USER_PIN)),
                false,
                Registered::Preferred(&["0123456789abcdef"]),
            );
            assert_eq!(clone.unwrap().info.serial, serial);
        },
    );
}

#[test]
fn a_token_whose_clock_is_odd_is_used() {
    with_softhsm("behaviours::a_token_whose_clock_is_odd_is_used", |folder| {
        init();
        let (settings, faulty) = faulty(folder);
        let admin = Admin::open(&settings, &record(), &pin(USER_PIN), true).unwrap();
        let key = admin.generate_key(2_048).unwrap();
        drop(admin);
        for time in ["21:38:18", "                ", "", "\\u0000\\u0000"] {
            faulty.set_clock(time);
            assert_eq!(admin::list_tokens(&settings).unwrap().len(), 2);
            let admin = Admin::open(&settings, &record(), &pin(USER_PIN), false).unwrap();
            assert_eq!(admin.check(key.id).unwrap().problem, None, "{time:?}");
        }
    });
}

/// Every checked attribute can be read even if the token fails when it is asked for the length.
#[test]
fn an_attribute_is_read_without_asking_for_its_length() {
    with_softhsm(
        "behaviours::an_attribute_is_read_without_asking_for_its_length",
        |folder| {
            init();
            let (settings, faulty) = faulty(folder);
            let query = ["CKA_ALLOWED_MECHANISMS", "CKA_MODULUS", "CKA_ID"]
                .map(|name| {
                    format!("[[attribute]]\nname = \"{name}\"\non_read.size_query = \"CKR_DEVICE_ERROR\"\n")
                })
                .concat();
            faulty.behave(&query);
            let admin = Admin::open(&settings, &record(), &pin(USER_PIN), true).unwrap();
            let key = admin.generate_key(2_048).unwrap();
            assert_eq!(key.problem, None);
            assert_eq!(admin.key_ids().unwrap(), [key.id.into()]);
        },
    );
}

#[test]
fn a_string_for_a_module_that_expects_none_is_named() {
    with_softhsm(
        "behaviours::a_string_for_a_module_that_expects_none_is_named",
        |_| {
            for (text, named) in [("configdir='x'", "expects another string"), ("a\0b", "NUL")] {
                let settings = Settings {
                    initialize_string: Some(text.to_owned()),
                    ..settings()
                };
                let error = admin::list_tokens(&settings).unwrap_err().to_string();
                assert!(error.contains("token.initialize_string"), "{error}");
                assert!(error.contains(named), "{error}");
            }
        },
    );
}
