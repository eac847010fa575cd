//! Tokens that cannot express an attribute, have no read-only sessions, take their PIN at a pad, or lie.

use super::{Admin, USER_PIN, faulty, init, open, pin, record, with_softhsm};
use keybroker_worker_protocol::Settings;

/// Objects on the token, of any kind.
fn objects() -> usize {
    let token = open();
    let found = token.anchor.find_objects(&[]).unwrap();
    found.len()
}

/// An attribute that the token neither takes in a template nor lets be read.
fn unknown(name: &str) -> String {
    format!(
        "[[attribute]]\nname = \"{name}\"\nparts = [\"private\", \"secret\"]\n\
         in_template.refuse = \"CKR_TEMPLATE_INCONSISTENT\"\non_read.fail = \"CKR_FUNCTION_FAILED\"\n"
    )
}

/// An attribute that is set to something else, and reads as it was asked for.
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
fn a_run_that_fails_in_the_middle_leaves_nothing() {
    with_softhsm(
        "behaviours::a_run_that_fails_in_the_middle_leaves_nothing",
        |folder| {
            init();
            let (settings, faulty) = faulty(folder);
            let admin = Admin::open(&settings, &record(), &pin(USER_PIN), true).unwrap();
            // The pair that ends with the session is made, the one that would stay is not.
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
fn a_token_whose_clock_is_odd_is_used() {
    with_softhsm("behaviours::a_token_whose_clock_is_odd_is_used", |folder| {
        init();
        let (settings, faulty) = faulty(folder);
        let admin = Admin::open(&settings, &record(), &pin(USER_PIN), true).unwrap();
        let key = admin.generate_key(2_048).unwrap();
        drop(admin);
        for time in ["21:38:18", "                ", "", "\\u0000\\u0000"] {
            faulty.set_clock(time);
            assert_eq!(crate::admin::list_tokens(&settings).unwrap().len(), 2);
            let admin = Admin::open(&settings, &record(), &pin(USER_PIN), false).unwrap();
            assert_eq!(admin.check(key.id).unwrap().problem, None, "{time:?}");
        }
    });
}

/// Every attribute that is checked can be read although the token fails when it is asked for its length.
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
            assert_eq!(admin.key_ids().unwrap(), [key.id]);
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
                    ..crate::tests::settings()
                };
                let error = crate::admin::list_tokens(&settings)
                    .unwrap_err()
                    .to_string();
                assert!(error.contains("token.initialize_string"), "{error}");
                assert!(error.contains(named), "{error}");
            }
        },
    );
}
