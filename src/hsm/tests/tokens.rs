//! Which token, and who may open it.

use std::{fs, os::unix::fs::PermissionsExt as _, process::Command};

use super::{
    Admin, AdminError, OpenToken, USER_PIN, admin, faulty,
    faulty::{Fault, code},
    init, pin, settings, with_softhsm,
};
use crate::hsm::{Settings, classify::Class};

#[test]
fn selection_names_what_is_wrong() {
    with_softhsm("tokens::selection_names_what_is_wrong", |folder| {
        init();
        let class = |settings: &Settings| {
            let error = Admin::open(settings, &pin(USER_PIN), false).unwrap_err();
            assert!(matches!(error, AdminError::Token(_)), "{error:?}");
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
        assert!(class(&both).contains("chosen twice"));
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
        assert!(class(&no_library).contains("is not a PKCS#11 module"));
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
            Admin::open(&by_label, &pin(USER_PIN), false).unwrap();
            // Two tokens of one label, as a restore to the wrong place makes them.
            let arguments = "--init-token --free --label test --pin 123456 --so-pin 654321";
            let made = Command::new("softhsm2-util")
                .args(arguments.split(' '))
                .output()
                .unwrap();
            assert!(made.status.success(), "{made:?}");
            let error = Admin::open(&settings(), &pin(USER_PIN), false).unwrap_err();
            assert!(error.to_string().contains("more than one token"), "{error}");
            let by_serial = Settings {
                label: None,
                serial: Some(serial),
                ..settings()
            };
            assert_eq!(
                Admin::open(&by_serial, &pin(USER_PIN), false)
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
        let error = Admin::open(&settings(), &pin("000000"), false).unwrap_err();
        assert!(matches!(error, AdminError::Pin(_)), "{error:?}");
        assert!(
            error.to_string().contains("PinIncorrect from C_Login"),
            "{error}"
        );
    });
}

/// Tokens have many answers to a wrong PIN, and lock after a few: whatever does not say that the PIN was not looked at, is
/// taken for one.
#[test]
fn a_login_refused_with_an_unknown_code_is_a_wrong_pin() {
    with_softhsm(
        "tokens::a_login_refused_with_an_unknown_code_is_a_wrong_pin",
        |folder| {
            init();
            let (settings, faulty) = faulty(folder);
            let refusal = |code| {
                faulty.set("C_Login", &Fault::always(code));
                OpenToken::login(&settings, &pin(USER_PIN), false)
                    .unwrap_err()
                    .class
            };
            for counted in [
                code::VENDOR_DEFINED,
                code::FUNCTION_FAILED,
                code::GENERAL_ERROR,
            ] {
                assert_eq!(refusal(counted), Class::Pin, "{counted:x}");
            }
            assert_eq!(refusal(code::SESSION_COUNT), Class::BackOff);
            let asked = || faulty.count("C_GetTokenInfo begins");
            let before = asked();
            assert_eq!(refusal(code::SESSION_HANDLE_INVALID), Class::SessionLost);
            // It answers until the login, and not after: it is gone.
            faulty.set(
                "C_GetTokenInfo",
                &Fault {
                    skip: u32::try_from(asked() - before).unwrap(),
                    ..Fault::always(code::GENERAL_ERROR)
                },
            );
            assert_eq!(refusal(code::GENERAL_ERROR), Class::TokenLost);
        },
    );
}
