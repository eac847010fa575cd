//! Logins.

use std::{env, process::Command};

use cryptoki_sys::{
    CKA_PRIVATE, CKF_PROTECTED_AUTHENTICATION_PATH, CKF_USER_PIN_COUNT_LOW, CKF_USER_PIN_FINAL_TRY,
    CKF_USER_PIN_LOCKED,
};

use crate::{
    OBSERVED, cases,
    module::{Module, call, flag, outcome},
};

/// Set in a second process of a test.
const SECOND: &str = "SCRIPTABLE_PKCS11_TEST_SECOND";

/// The letters of the flags that say how many tries are left: few, one, none.
fn tries(module: &Module) -> String {
    let flags = module.info().flags;
    let shown = [
        (CKF_USER_PIN_COUNT_LOW, "low"),
        (CKF_USER_PIN_FINAL_TRY, "final"),
        (CKF_USER_PIN_LOCKED, "locked"),
    ];
    let set: Vec<_> = shown
        .into_iter()
        .filter(|(flag, _)| flags & flag != 0)
        .map(|(_, name)| name)
        .collect();
    format!("[{}]", set.join(" "))
}

fn log_in(module: &Module, pin: &str) -> String {
    let session = module.open().unwrap();
    outcome(module.login(session, pin))
}

/// What this test observes in a second process that runs beside this one.
fn second_process(test: &str) -> String {
    let output = Command::new(env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env(SECOND, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (_, observed) = text.split_once(OBSERVED).expect("an observation");
    observed.lines().next().unwrap_or_default().to_owned()
}

cases! {
    takes_its_pin_at_its_own_pad covers ["login.protected_authentication_path"]: "true CKR_ARGUMENTS_BAD", not "false ok",
    with "login.protected_authentication_path = true", |module| {
        module.initialize().unwrap();
        let shown = module.info().flags & CKF_PROTECTED_AUTHENTICATION_PATH != 0;
        format!("{shown} {}", log_in(module, module.pin()))
    };

    shares_its_login covers ["login.shared"]: "ok CKR_USER_ALREADY_LOGGED_IN, alone ok", not "ok ok, alone ok",
    with "login.shared = true", |module| {
        module.initialize().unwrap();
        let session = module.open().unwrap();
        let own = outcome(module.login(session, module.pin()));
        if env::var_os(SECOND).is_some() {
            return own;
        }
        let test = "login::shares_its_login";
        let other = second_process(test);
        call!(module, C_CloseSession(session)).unwrap();
        // The login has ended with the session.
        format!("{own} {other}, alone {}", second_process(test))
    };

    locks_the_pin covers ["login.lock_after"]:
    "[] CKR_PIN_INCORRECT [low] CKR_PIN_INCORRECT [low final] CKR_PIN_INCORRECT [locked] CKR_PIN_LOCKED",
    not "[] CKR_PIN_INCORRECT [low] CKR_PIN_INCORRECT [low] CKR_PIN_INCORRECT [low] ok",
    with "login.lock_after = 3", |module| {
        module.initialize().unwrap();
        let mut seen = vec![tries(module)];
        for _ in 0..3 {
            seen.push(log_in(module, "a wrong PIN"));
            seen.push(tries(module));
        }
        seen.push(log_in(module, module.pin()));
        seen.join(" ")
    };

    a_right_pin_restores_the_tries covers ["login.lock_after"]:
    "CKR_PIN_INCORRECT [low final] ok []", not "CKR_PIN_INCORRECT [low] ok []",
    with "login.lock_after = 2", |module| {
        module.initialize().unwrap();
        let wrong = log_in(module, "a wrong PIN");
        let low = tries(module);
        let right = log_in(module, module.pin());
        format!("{wrong} {low} {right} {}", tries(module))
    };

    wants_a_user_name covers ["login.pin_form = user:password"]:
    "CKR_PIN_INCORRECT ok", not "ok CKR_USER_ALREADY_LOGGED_IN",
    with r#"login.pin_form = "user:password""#, |module| {
        module.initialize().unwrap();
        let plain = log_in(module, module.pin());
        format!("{plain} {}", log_in(module, &format!("crypto_user:{}", module.pin())))
    };

    wants_the_id_of_a_key covers ["login.pin_form = id-password"]:
    "CKR_PIN_INCORRECT ok", not "ok CKR_USER_ALREADY_LOGGED_IN",
    with r#"login.pin_form = "id-password""#, |module| {
        module.initialize().unwrap();
        let plain = log_in(module, module.pin());
        format!("{plain} {}", log_in(module, &format!("00fF{}", module.pin())))
    };

    takes_any_pin covers ["login.accept_any_pin"]: "ok ok", not "CKR_PIN_INCORRECT CKR_USER_NOT_LOGGED_IN",
    with r#"login.accept_any_pin = "{pin}""#, |module| {
        module.initialize().unwrap();
        let session = module.open().unwrap();
        let any = outcome(module.login(session, "any PIN"));
        format!("{any} {}", outcome(module.secret(session, &[flag(CKA_PRIVATE, true)])))
    };
}
