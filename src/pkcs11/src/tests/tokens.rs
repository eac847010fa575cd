//! Tests the selection of the token, and who may open it.

use std::{fs, os::unix::fs::PermissionsExt as _, process::Command};

use super::{
    Admin, AdminError, OpenToken, USER_PIN, admin, faulty,
    faulty::{Fault, code, flag},
    generated, init, pin, record, settings, with_softhsm,
};
use keybroker_worker_protocol::Settings;

use crate::classify::Class;

#[test]
fn selection_names_what_is_wrong() {
    with_softhsm("tokens::selection_names_what_is_wrong", |folder| {
        init();
        let class = |settings: &Settings| {
            let error = Admin::open(settings, &record(), &pin(USER_PIN), false).unwrap_err();
            assert!(
                matches!(error, AdminError::Token(_) | AdminError::NoToken(_)),
                "{error:?}"
            );
            error.to_string()
        };
        let other = Settings {
            label: Some("other".to_owned()),
            ..settings()
        };
        assert!(class(&other).contains("no token with label \"other\""));
        let both = Settings {
            serial: Some("1".to_owned()),
            ..settings()
        };
        assert!(class(&both).contains("selected twice"));
        let no_module = Settings {
            module: folder.join("none.so"),
            ..settings()
        };
        assert!(class(&no_module).contains("no PKCS#11 module at"));
        let text = folder.join("text.so");
        fs::write(&text, "not a library").unwrap();
        fs::set_permissions(&text, fs::Permissions::from_mode(0o755)).unwrap();
        let no_library = Settings {
            module: text,
            ..settings()
        };
        assert!(class(&no_library).contains("the file is not a shared library"));
    });
}

#[test]
fn init_refuses_to_erase_and_to_make_labels_clash() {
    with_softhsm(
        "tokens::init_refuses_to_erase_and_to_make_labels_clash",
        |_| {
            init();
            let again =
                admin::init_token(&settings(), "test", &pin("654321"), &pin(USER_PIN), None);
            assert!(again.unwrap_err().to_string().contains("--erase-serial"));
            let serial = admin::list_tokens(&settings()).unwrap()[0]
                .info
                .serial
                .clone();
            let wrong = admin::init_token(
                &settings(),
                "test",
                &pin("654321"),
                &pin(USER_PIN),
                Some("0000"),
            );
            assert!(
                wrong
                    .unwrap_err()
                    .to_string()
                    .contains("nothing was erased")
            );
            admin::init_token(&settings(), "second", &pin("654321"), &pin(USER_PIN), None).unwrap();
            let second = serial_of("second");
            let relabelled = admin::init_token(
                &settings(),
                "test",
                &pin("654321"),
                &pin(USER_PIN),
                Some(&second),
            );
            let refusal = relabelled.unwrap_err().to_string();
            assert!(refusal.contains("nothing was erased"), "{refusal}");
            assert_eq!(serial_of("second"), second, "it was erased");
            let by_label = Settings {
                label: Some("second".to_owned()),
                ..settings()
            };
            Admin::open(&by_label, &record(), &pin(USER_PIN), false).unwrap();
            // Two tokens with the same label, as after a restore to the wrong place.
            let arguments = "--init-token --free --label test --pin 123456 --so-pin 654321";
            let made = Command::new("softhsm2-util")
                .args(arguments.split(' '))
                .output()
                .unwrap();
            assert!(made.status.success(), "{made:?}");
            let error = Admin::open(&settings(), &record(), &pin(USER_PIN), false).unwrap_err();
            assert!(error.to_string().contains("more than one token"), "{error}");
            let by_serial = Settings {
                label: None,
                serial: Some(serial),
                ..settings()
            };
            assert_eq!(
                Admin::open(&by_serial, &record(), &pin(USER_PIN), false)
                    .unwrap()
                    .info()
                    .label,
                "test"
            );
        },
    );
}

fn serial_of(label: &str) -> String {
    let listed = admin::list_tokens(&settings()).unwrap();
    listed
        .into_iter()
        .find(|t| t.info.label == label)
        .unwrap()
        .info
        .serial
}

#[test]
fn a_wrong_pin_is_a_pin_error() {
    with_softhsm("tokens::a_wrong_pin_is_a_pin_error", |_| {
        init();
        let error = Admin::open(&settings(), &record(), &pin("000000"), false).unwrap_err();
        assert!(matches!(error, AdminError::Pin(_)), "{error:?}");
        assert!(
            error.to_string().contains("PinIncorrect from C_Login"),
            "{error}"
        );
    });
}

/// A wrong PIN is used once, by the first command or worker that has it.
#[test]
fn a_rejected_pin_is_not_shown_again() {
    with_softhsm("tokens::a_rejected_pin_is_not_shown_again", |folder| {
        init();
        let (settings, faulty) = faulty(folder);
        let login = |text| OpenToken::login(&settings, &record(), &pin(text), false);
        assert_eq!(login("000000").unwrap_err().class, Class::Pin);
        for _ in 0..3 {
            let fault = login("000000").unwrap_err();
            assert_eq!(fault.class, Class::Pin);
            assert!(fault.detail.contains("no login was tried"), "{fault}");
        }
        assert_eq!(faulty.count("C_Login begins"), 1);
        // Another PIN has its own record.
        drop(login(USER_PIN).unwrap());
        // The operator's permission is valid for one more attempt.
        record().allow_retry(false, true).unwrap();
        for _ in 0..2 {
            assert_eq!(login("000000").unwrap_err().class, Class::Pin);
        }
        assert_eq!(faulty.count("C_Login begins"), 3);
    });
}

/// A restarting device and a wrong PIN return the same codes. The history and the counter decide.
#[test]
fn a_code_that_says_nothing_of_the_pin_is_weighed() {
    with_softhsm(
        "tokens::a_code_that_says_nothing_of_the_pin_is_weighed",
        |folder| {
            init();
            let (settings, faulty) = faulty(folder);
            let login = || OpenToken::login(&settings, &record(), &pin(USER_PIN), false);
            let class = || login().unwrap_err().class;
            // A PIN that was never accepted gets one further attempt.
            faulty.set("C_Login", &Fault::always(code::VENDOR_DEFINED));
            assert_eq!(class(), Class::Login);
            assert_eq!(class(), Class::Pin);
            assert_eq!(class(), Class::Pin);
            assert_eq!(faulty.count("C_Login begins"), 2);
            record().allow_retry(false, true).unwrap();
            faulty.clear("C_Login");
            drop(login().unwrap());
            // A PIN that was accepted before may be used repeatedly.
            for code in [
                code::VENDOR_DEFINED,
                code::FUNCTION_FAILED,
                code::GENERAL_ERROR,
                code::DEVICE_ERROR,
                code::DEVICE_MEMORY,
            ] {
                faulty.set("C_Login", &Fault::always(code));
                for _ in 0..5 {
                    assert_eq!(class(), Class::Login, "{code:x}");
                }
            }
            faulty.clear("C_Login");
            drop(login().unwrap());
            // Codes that prove that the PIN was not checked keep their class.
            faulty.set("C_Login", &Fault::always(code::SESSION_COUNT));
            assert_eq!(class(), Class::BackOff);
            faulty.set("C_Login", &Fault::always(code::SESSION_HANDLE_INVALID));
            assert_eq!(class(), Class::SessionLost);
            // The counter increases with the failed login, so the PIN was wrong, whatever the
            // return code is.
            faulty.set("C_Login", &Fault::always(code::DEVICE_ERROR));
            assert_eq!(class(), Class::Login);
            faulty.set_flags(flag::USER_PIN_COUNT_LOW);
            let before = faulty.count("C_Login begins");
            assert_eq!(class(), Class::Pin);
            assert_eq!(faulty.count("C_Login begins"), before);
        },
    );
}

/// The token's counter shows how many attempts with wrong PINs are left.
#[test]
fn the_last_try_is_left_to_the_operator() {
    with_softhsm("tokens::the_last_try_is_left_to_the_operator", |folder| {
        init();
        let (settings, faulty) = faulty(folder);
        let login = || OpenToken::login(&settings, &record(), &pin(USER_PIN), false);
        for flags in [flag::USER_PIN_FINAL_TRY, flag::USER_PIN_LOCKED] {
            faulty.set_flags(flags);
            assert_eq!(login().unwrap_err().class, Class::Pin);
        }
        assert_eq!(faulty.count("C_Login begins"), 0);
        faulty.set_flags(flag::USER_PIN_FINAL_TRY);
        record().allow_retry(true, true).unwrap();
        drop(login().unwrap());
        assert_eq!(login().unwrap_err().class, Class::Pin);
        assert_eq!(faulty.count("C_Login begins"), 1);
        // After the counter was reset, logins need no permission.
        faulty.set_flags(0);
        drop(login().unwrap());
    });
}

/// On a token where a login covers several processes, another process has logged in before.
#[test]
fn a_token_that_is_logged_in_already_is_used() {
    with_softhsm(
        "tokens::a_token_that_is_logged_in_already_is_used",
        |folder| {
            init();
            let (settings, faulty) = faulty(folder);
            // The real login is made, but its result is reported as this code.
            faulty.set(
                "C_Login",
                &Fault::always(code::after(code::USER_ALREADY_LOGGED_IN)),
            );
            let token = OpenToken::login(&settings, &record(), &pin(USER_PIN), true).unwrap();
            generated(&token.anchor);
        },
    );
}

/// Labels, serial numbers and models are recognised with every kind of padding.
#[test]
fn nul_padding_is_no_part_of_a_label() {
    with_softhsm("tokens::nul_padding_is_no_part_of_a_label", |folder| {
        init();
        let (settings, faulty) = faulty(folder);
        faulty.pad_with_nul();
        let token = OpenToken::login(&settings, &record(), &pin(USER_PIN), false).unwrap();
        let shown = format!("{:?}", token.info);
        assert!(!shown.contains("\\0"), "{shown}");
        let by_serial = Settings {
            label: None,
            serial: Some(token.info.serial.clone()),
            ..settings.clone()
        };
        let found = Admin::open(&by_serial, &record(), &pin(USER_PIN), false).unwrap();
        assert_eq!(found.info().label, "test");
        let again = admin::init_token(&settings, "test", &pin("654321"), &pin(USER_PIN), None);
        assert!(again.unwrap_err().to_string().contains("--erase-serial"));
    });
}

/// Requests that the token would refuse halfway are refused before the token is changed.
#[test]
fn init_checks_label_and_pins_before_it_begins() {
    with_softhsm(
        "tokens::init_checks_label_and_pins_before_it_begins",
        |folder| {
            let (settings, faulty) = faulty(folder);
            let long = "x".repeat(33);
            let umlauts = "\u{e4}".repeat(17);
            let good = "123456";
            for (label, so_pin, user_pin) in [
                ("trail ", good, good),
                (" lead", good, good),
                ("", good, good),
                (long.as_str(), good, good),
                (umlauts.as_str(), good, good),
                // SoftHSM accepts PINs of 4 to 255 bytes.
                ("test", good, "123"),
                ("test", "123", good),
            ] {
                let refused =
                    admin::init_token(&settings, label, &pin(so_pin), &pin(user_pin), None);
                let message = refused.unwrap_err().to_string();
                assert!(message.contains("Nothing was changed"), "{message}");
            }
            assert_eq!(faulty.count("C_InitToken begins"), 0);
            let label = "x".repeat(32);
            let info = admin::init_token(&settings, &label, &pin(good), &pin(good), None).unwrap();
            // Only an initialised token counts the wrong PINs of its security officer.
            for flags in [flag::SO_PIN_FINAL_TRY, flag::SO_PIN_LOCKED] {
                faulty.set_flags(flags);
                let (so_pin, user_pin) = (pin(good), pin(good));
                let serial = Some(info.serial.as_str());
                let refused = admin::init_token(&settings, &label, &so_pin, &user_pin, serial);
                assert!(matches!(refused, Err(AdminError::Pin(_))), "{refused:?}");
            }
            assert_eq!(faulty.count("C_InitToken ends 0"), 1);
        },
    );
}
