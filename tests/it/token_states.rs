//! Tokens in a state in which they cannot be used: what `token check`, `key generate` and `serve` say of it, and what they leave alone.

use std::{process::Child, thread, time::Duration};

use rustix::process::Signal;

use crate::{
    expected::{PIN, TOKEN, UNTRUSTED, says},
    faulty::{Fault, Faulty, code, flag},
    faulty_token,
    process::{send, until},
    site::{Options, Site},
    softhsm::write_private,
};

const COMMANDS: [&[&str]; 2] = [&["token", "check"], &["key", "generate", "--bits", "2048"]];

/// Each command ends with the code and says the words; nothing is made on the token.
fn commands_say(site: &Site, code: i32, words: &[&str]) {
    let before = objects(site);
    for arguments in COMMANDS {
        says(&arguments.join(" "), &site.run(arguments), code, words);
    }
    assert_eq!(objects(site), before);
}

/// `serve` says the words, and ends when it is told to.
fn serve_says(site: &Site, words: &[&str]) {
    let mut child = site.spawn(site.serve());
    let log = until("the cause in the log", || {
        let log = site.log();
        words
            .iter()
            .all(|word| log.contains(&word.replace('"', "\\\"")))
            .then_some(log)
            .or_else(|| ended(&mut child).then(|| site.log()))
    });
    if !ended(&mut child) {
        send(child.id(), Signal::TERM);
        child.wait().unwrap();
    }
    for word in words {
        let word = word.replace('"', "\\\"");
        assert!(log.contains(&word), "{word:?} is not in {log}");
    }
}

fn ended(child: &mut Child) -> bool {
    child.try_wait().unwrap().is_some()
}

/// The objects that the real module shows without a login or with it, as `pkcs11-tool` lists them.
fn objects(site: &Site) -> usize {
    let listed = site.token.pkcs11_tool(&["--list-objects"]);
    String::from_utf8_lossy(&listed.stdout)
        .matches("Object;")
        .count()
}

fn so_pin(site: &Site) -> String {
    let path = site.folder().join("so-pin");
    write_private(&path, site.token.pin());
    path.display().to_string()
}

fn serial(site: &Site) -> String {
    let serial = site.sql("SELECT token_serial FROM wrapping_keys");
    serial.trim().to_owned()
}

/// Erases the token and initialises it again, with the label and the PIN that it had.
fn initialise_again(site: &Site, serial: &str) -> crate::site::Finished {
    let so_pin = so_pin(site);
    site.run(&[
        "token",
        "init",
        "--label",
        site.token.label(),
        "--erase-serial",
        serial,
        "--so-pin-file",
        &so_pin,
    ])
}

fn logins(faulty: &Faulty) -> usize {
    faulty.count("C_Login begins")
}

#[test]
fn a_locked_token_gets_no_login() {
    let (site, faulty) = faulty_token::site(Options::default());
    faulty.set_flags(flag::USER_PIN_LOCKED);
    let before = logins(&faulty);
    let words = [
        "the user PIN is locked (CKF_USER_PIN_LOCKED)",
        "no login was tried",
        "Unlock the user PIN with the security officer's PIN",
    ];
    commands_say(&site, PIN, &words);
    serve_says(&site, &words);
    assert_eq!(logins(&faulty), before);
    faulty.set_flags(0);
    site.expect_ok(&["token", "check"]);
}

/// `token init` was cut short between the two PINs.
#[test]
fn a_token_without_a_user_pin_is_named_with_the_remedy() {
    let (site, faulty) = faulty_token::site(Options::default());
    faulty.set("C_InitPIN", &Fault::always(code::DEVICE_ERROR));
    let made = initialise_again(&site, &serial(&site));
    says("token init", &made, TOKEN, &["has no user PIN"]);
    faulty.clear("C_InitPIN");
    let words = [
        "UserPinNotInitialized from C_Login",
        "has no user PIN",
        "token init --erase-serial",
    ];
    for arguments in COMMANDS {
        says(&arguments.join(" "), &site.run(arguments), TOKEN, &words);
    }
    serve_says(&site, &words);
    // The PIN is not latched: once the token has one, it is used.
    let (_, rest) = made.stderr.split_once("--erase-serial ").unwrap();
    let serial: String = rest.chars().take_while(char::is_ascii_hexdigit).collect();
    let again = initialise_again(&site, &serial);
    assert_eq!(again.code, Some(0), "{again:#?}");
    site.expect_ok(&["key", "generate", "--bits", "2048"]);
}

/// A token with label, PIN and serial number of the one that the keys were on: SoftHSM keeps the serial number.
#[test]
fn a_token_that_was_initialised_again_is_not_taken_for_the_old_one() {
    let site = Site::fresh(Options::default());
    let old = serial(&site);
    let again = initialise_again(&site, &old);
    assert_eq!(again.code, Some(0), "{again:#?}");
    let words = ["is not on the token", "right token", "restored"];
    let checked = site.run(&["token", "check"]);
    says("token check", &checked, UNTRUSTED, &words);
    serve_says(&site, &words);
    let stored = site.run(&["store", "check"]);
    says("store check", &stored, UNTRUSTED, &words);
}

/// The device has no room for further objects.
#[test]
fn a_full_token_is_named_and_keeps_nothing_of_the_attempt() {
    let (site, faulty) = faulty_token::site(Options::default());
    let before = objects(&site);
    for part in ["secret", "private"] {
        faulty.behave(&format!(
            "[[attribute]]\nname = \"CKA_TOKEN\"\nparts = [\"{part}\"]\n\
             in_template = {{ refuse = \"CKR_DEVICE_MEMORY\", when = true }}\n"
        ));
        let made = site.run(&["key", "generate", "--bits", "2048"]);
        let words = [
            "DeviceMemory from C_GenerateKey",
            "may be full",
            "remove unused objects",
        ];
        says(part, &made, TOKEN, &words);
        assert_eq!(objects(&site), before, "{part}");
        // What it holds is used.
        site.expect_ok(&["token", "check"]);
    }
    faulty.behave("");
    site.expect_ok(&["key", "generate", "--bits", "2048"]);
}

/// A module that does not initialise: the code by its name, the path, and where to look.
#[test]
fn a_module_that_does_not_initialise_is_named_with_its_code() {
    let (site, faulty) = faulty_token::site(Options::default());
    let path = faulty.module().display().to_string();
    for (code, name) in [
        (code::HOST_MEMORY, "HostMemory"),
        (code::GENERAL_ERROR, "GeneralError"),
        (code::DEVICE_ERROR, "DeviceError"),
        (code::CANT_LOCK, "CantLock"),
        (code::ARGUMENTS_BAD, "ArgumentsBad"),
    ] {
        faulty.set("C_Initialize", &Fault::always(code));
        let name = format!("{name} from C_Initialize");
        let words = [path.as_str(), &name, "[token.environment]"];
        let words = match code {
            code::ARGUMENTS_BAD => [path.as_str(), &name, "`token.initialize_string`"],
            _ => words,
        };
        commands_say(&site, TOKEN, &words);
        serve_says(&site, &words);
        faulty.clear("C_Initialize");
    }
    site.expect_ok(&["token", "check"]);
}

/// No attribute of any key can be read: that is no token without keys.
#[test]
fn keys_that_cannot_be_read_are_not_called_missing() {
    let (site, faulty) = faulty_token::site(Options::default());
    faulty.behave(
        "[[attribute]]\nname = \"CKA_SENSITIVE\"\non_read = { fail = \"CKR_FUNCTION_FAILED\" }\n",
    );
    let checked = site.run(&["token", "check"]);
    let words = ["CKA_SENSITIVE", "FunctionFailed from C_GetAttributeValue"];
    says("token check", &checked, UNTRUSTED, &words);
    assert!(
        !checked.stdout.contains("has no wrapping key"),
        "{checked:#?}"
    );
}

/// A token without a serial number is used, and the warning says what is lost by that.
#[test]
fn a_token_without_a_serial_number_is_warned_of() {
    let site = Site::without_keys(Options::default());
    let faulty = faulty_token::put_before(&site);
    faulty.behave("[token]\nserial = \"\"\n");
    site.expect_ok(&["store", "migrate"]);
    site.expect_ok(&["key", "generate", "--bits", "2048"]);
    let checked = site.run(&["token", "check"]);
    says("token check", &checked, 0, &["reports no serial number"]);
}

/// The processes share one login, as with pkcs11-proxy: both workers serve, and commands work beside them.
#[test]
fn a_shared_login_serves_with_two_workers_and_commands() {
    let (site, faulty) = faulty_token::site(Options {
        workers: 2,
        ..Options::default()
    });
    faulty.set_profile("pkcs11-proxy");
    let broker = crate::process::Broker::start_on(site);
    until("both workers", || {
        let log = broker.site.log();
        (log.matches("token worker ready").count() >= 2).then_some(())
    });
    let log = broker.site.log();
    assert!(
        log.contains("another process is already logged in to the token"),
        "{log}"
    );
    broker.site.expect_ok(&["token", "check"]);
    broker.stop();
}

/// The call of a hung module is given up after 30 s, as long as a worker may take to start.
#[test]
#[ignore = "waits 30 s: cargo nextest run --profile long --run-ignored only --test it token_states::"]
fn a_module_that_hangs_is_named_by_serve() {
    let (site, faulty) = faulty_token::site(Options::default());
    let path = faulty.module().display().to_string();
    let hang = Fault {
        milliseconds: 3_600_000,
        ..Fault::always(code::LATE)
    };
    faulty.set("C_Initialize", &hang);
    let mut child = site.spawn(site.serve());
    thread::sleep(Duration::from_secs(25));
    let log = until("the cause in the log", || {
        let log = site.log();
        log.contains("a token worker did not start").then_some(log)
    });
    send(child.id(), Signal::TERM);
    child.wait().unwrap();
    for word in ["C_Initialize", path.as_str(), "30 s"] {
        assert!(log.contains(word), "{word}: {log}");
    }
}
