//! Logins: what a wrong PIN costs, and what a passing error does not.
//!
//! `KEYBROKER_TEST_LOGIN_CODES=all` runs every return code, and `KEYBROKER_TEST_LOGIN_OUTAGE_SECONDS=60` makes each outage
//! that long; the suite makes do with two codes and a second.

use std::{
    env, fs,
    time::{Duration, Instant},
};

use rustix::process::Signal;

use crate::{
    client::{Caller, eventually, reason},
    faulty::{Fault, Faulty, code, flag},
    faulty_token::site,
    process::{Broker, send, until},
    site::{Options, Site},
    softhsm::write_private,
    wire::get,
};

const MATERIAL: &[u8] = b"material of this user";
const OPERATIONS: [&str; 5] = [
    "C_OpenSession",
    "C_DecryptInit",
    "C_Decrypt",
    "C_Sign",
    "C_Verify",
];
/// What modules answer while a device restarts.
const CODES: [i64; 12] = [
    code::DEVICE_ERROR,
    code::VENDOR_DEFINED,
    code::GENERAL_ERROR,
    code::FUNCTION_FAILED,
    code::FUNCTION_CANCELED,
    code::DEVICE_MEMORY,
    code::DEVICE_REMOVED,
    code::HOST_MEMORY,
    code::SESSION_CLOSED,
    code::SESSION_COUNT,
    code::SESSION_HANDLE_INVALID,
    code::TOKEN_NOT_PRESENT,
];

/// How long the service may take after the device has returned.
const BACK_WITHIN: Duration = Duration::from_secs(5);

async fn enrolled(options: Options) -> (Broker, Faulty, Caller) {
    let (site, faulty) = site(options);
    let broker = Broker::start_on(site);
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("ada", MATERIAL).await.unwrap();
    let releaser = Caller::of(&broker, "releaser");
    (broker, faulty, releaser)
}

fn two_workers() -> Options {
    Options {
        workers: 2,
        ..Options::default()
    }
}

fn kill_all(broker: &Broker) {
    for pid in broker.workers() {
        send(pid, Signal::KILL);
    }
}

fn metric(broker: &Broker, name: &str) -> Option<f64> {
    let text = get(broker.status, "/metrics");
    let line = text.lines().find(|line| line.starts_with(name))?;
    line.rsplit(' ').next()?.parse().ok()
}

fn set_pin(site: &Site, pin: &str) {
    write_private(&site.token.pin_file(), &format!("{pin}\n"));
}

/// A device that restarts answers with these codes for a while. The PIN was right before and is right afterwards, so nobody
/// needs to act.
#[tokio::test(flavor = "multi_thread")]
async fn service_returns_by_itself_after_every_passing_error() {
    let all = env::var("KEYBROKER_TEST_LOGIN_CODES").is_ok_and(|codes| codes == "all");
    let seconds = env::var("KEYBROKER_TEST_LOGIN_OUTAGE_SECONDS").ok();
    let outage = Duration::from_secs(seconds.map_or(1, |text| text.parse().unwrap()));
    let codes = if all { &CODES[..] } else { &CODES[..2] };
    let (broker, faulty, releaser) = enrolled(two_workers()).await;
    let mut slowest = Duration::ZERO;
    for code in codes {
        for operations in [true, false] {
            let functions: Vec<&str> = if operations {
                OPERATIONS.into_iter().chain(["C_Login"]).collect()
            } else {
                vec!["C_Login"]
            };
            for function in &functions {
                faulty.set(function, &Fault::always(*code));
            }
            if !operations {
                kill_all(&broker);
            }
            let logins = faulty.count("C_Login begins");
            until("the outage", || {
                let health = get(broker.status, "/readyz");
                health.starts_with("HTTP/1.1 503").then_some(())
            });
            // The outage itself; nothing waits for its end.
            tokio::time::sleep(outage).await;
            let tried = faulty.count("C_Login begins") - logins;
            assert!(
                tried <= 30 + usize::try_from(outage.as_secs()).unwrap() * 2,
                "{code:x}: {tried} logins"
            );
            for function in &functions {
                faulty.clear(function);
            }
            let returned = Instant::now();
            let key = eventually(|| releaser.unwrap("ada")).await;
            assert_eq!(key.key_material, MATERIAL);
            let took = returned.elapsed();
            slowest = slowest.max(took);
            println!("{code:#x} operations={operations}: {tried} logins, back after {took:?}");
            until("both workers", || {
                let ready = metric(&broker, "keybroker_token_workers{token=\"default\"} ");
                (ready == Some(2.0)).then_some(())
            });
        }
    }
    println!("slowest return: {slowest:?}");
    if all {
        assert!(slowest < BACK_WITHIN, "{slowest:?}");
    }
    let log = broker.site.log();
    assert!(!log.contains("pin-latched"), "{log}");
}

/// A PIN file with a wrong PIN: one try in all, one state with one reason, and service as soon as the PIN is right.
#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_pin_costs_one_try_and_is_one_state() {
    let (broker, faulty, releaser) = enrolled(two_workers()).await;
    let site = broker.site.clone();
    let right = site.token.pin().to_owned();
    let wrong = "0000000000";
    until("two workers", || {
        (metric(&broker, "keybroker_token_workers{token=\"default\"} ") == Some(2.0)).then_some(())
    });
    assert_eq!(
        metric(&broker, "keybroker_token_pin_latched{token=\"default\"} "),
        Some(0.0)
    );
    set_pin(&site, wrong);
    let before = faulty.count("C_Login begins");
    send(broker.workers()[0], Signal::KILL);
    // It is known while the other worker serves.
    until("the alert", || {
        site.log().contains("pin-latched").then_some(())
    });
    until("the metric", || {
        (metric(&broker, "keybroker_token_pin_latched{token=\"default\"} ") == Some(1.0))
            .then_some(())
    });
    let ready = get(broker.status, "/readyz");
    assert!(
        ready.starts_with("HTTP/1.1 200") && ready.contains("rejected the PIN"),
        "{ready}"
    );
    assert_eq!(releaser.unwrap("ada").await.unwrap().key_material, MATERIAL);

    // A refreshed file with the same content, and commands, are no new PIN.
    let starts = site.log().matches("a token worker did not start").count();
    set_pin(&site, wrong);
    for _ in 0..3 {
        let checked = site.run(&["token", "check"]);
        assert_eq!(checked.code, Some(5), "{checked:?}");
        assert!(checked.stderr.contains("no login was tried"), "{checked:?}");
    }
    until("two more starts", || {
        let now = site.log().matches("a token worker did not start").count();
        (now >= starts + 2).then_some(())
    });
    assert_eq!(faulty.count("C_Login begins"), before + 1);

    // The last worker is lost: the reason is the PIN, at once and to everybody.
    kill_all(&broker);
    until("health to say so", || {
        let ready = get(broker.status, "/readyz");
        ready.starts_with("HTTP/1.1 503").then_some(())
    });
    for _ in 0..20 {
        let status = releaser.unwrap("ada").await.unwrap_err();
        assert_eq!(reason(&status), "TOKEN_UNTRUSTED", "{status:?}");
    }
    // The operator's word is one more try.
    site.expect_ok(&["token", "retry-pin"]);
    until("the further try", || {
        (faulty.count("C_Login begins") == before + 2).then_some(())
    });
    set_pin(&site, &right);
    let key = eventually(|| releaser.unwrap("ada")).await;
    assert_eq!(key.key_material, MATERIAL);
    until("the end of the state", || {
        (metric(&broker, "keybroker_token_pin_latched{token=\"default\"} ") == Some(0.0))
            .then_some(())
    });
    let alerts = site.log().matches("\"alert\":\"pin-latched\"").count();
    assert_eq!(alerts, 1, "the alert repeats within its interval");
    assert_eq!(faulty.count("C_Login ends 160"), 2, "0xa0: PIN_INCORRECT");
}

/// The PIN is changed on the token, and the PIN file then gets one wrong PIN after another: each of them costs one login, whatever is
/// started meanwhile.
///
/// `KEYBROKER_TEST_WRONG_PINS=100` tries so many; the suite tries three.
#[tokio::test(flavor = "multi_thread")]
async fn each_wrong_pin_costs_one_login() {
    const NEW_PIN: &str = "rotated-on-the-token";
    let pins = env::var("KEYBROKER_TEST_WRONG_PINS").map_or(3, |text| text.parse().unwrap());
    let (broker, faulty, releaser) = enrolled(Options::default()).await;
    let site = broker.site.clone();
    let changed = site
        .token
        .pkcs11_tool(&["--change-pin", "--new-pin", NEW_PIN]);
    assert!(changed.status.success(), "{changed:?}");
    // The sessions stay logged in.
    assert_eq!(releaser.unwrap("ada").await.unwrap().key_material, MATERIAL);
    let logins = || faulty.count("C_Login begins");
    let refused_starts = || {
        let log = site.log();
        log.matches("a token worker did not start").count()
    };
    let before = logins();
    kill_all(&broker);
    // The PIN of the file was right until now, and counts as one of the wrong ones.
    for number in 0..=pins {
        if number > 0 {
            set_pin(&site, &format!("wrong PIN {number}"));
        }
        until("the login with this PIN", || {
            (logins() == before + number + 1).then_some(())
        });
        let starts = refused_starts();
        let checked = site.run(&["token", "check"]);
        assert_eq!(checked.code, Some(5), "{checked:?}");
        assert!(checked.stderr.contains("no login was tried"), "{checked:?}");
        until("another start with this PIN", || {
            (refused_starts() > starts + 1).then_some(())
        });
        assert_eq!(logins(), before + number + 1);
    }
    set_pin(&site, NEW_PIN);
    let key = eventually(|| releaser.unwrap("ada")).await;
    assert_eq!(key.key_material, MATERIAL);
    let rejected = faulty.count("C_Login ends 160");
    println!("{} wrong PINs: {rejected} failed logins", pins + 1);
    // 0xa0: PIN_INCORRECT.
    assert_eq!(rejected, pins + 1);
    assert_eq!(logins(), before + pins + 2);
}

/// Another token of the same label takes the place of the right one for a while, and is not given the PIN.
#[tokio::test(flavor = "multi_thread")]
async fn the_right_token_is_not_latched_by_another_of_its_label() {
    let (broker, faulty, releaser) = enrolled(Options::default()).await;
    let site = broker.site.clone();
    let directory = site.token.directory();
    let right = directory.with_extension("right");
    let other = directory.with_extension("other");
    fs::rename(&directory, &right).unwrap();
    fs::create_dir(&directory).unwrap();
    let made = site.token.run(
        "softhsm2-util",
        [
            "--init-token",
            "--free",
            "--label",
            site.token.label(),
            "--pin",
            "another PIN",
            "--so-pin",
            "another PIN",
        ],
    );
    assert!(made.status.success(), "{made:?}");
    let before = faulty.count("C_Login begins");
    kill_all(&broker);
    until("the alert", || {
        site.log().contains("token-down").then_some(())
    });
    let status = releaser.unwrap("ada").await.unwrap_err();
    assert_eq!(reason(&status), "TOKEN_DOWN");
    assert!(site.log().contains("no login was tried"), "{}", site.log());
    // The other token did not see the PIN.
    assert_eq!(faulty.count("C_Login begins"), before);
    fs::rename(&directory, &other).unwrap();
    fs::rename(&right, &directory).unwrap();
    let returned = Instant::now();
    let key = eventually(|| releaser.unwrap("ada")).await;
    println!("back after {:?}", returned.elapsed());
    assert_eq!(key.key_material, MATERIAL);
    assert_eq!(faulty.count("C_Login begins"), before + 1);
    assert!(!site.log().contains("pin-latched"));
}

/// A token with a few tries would be locked by a script.
#[test]
fn commands_share_one_try_of_a_wrong_pin() {
    let (site, faulty) = site(Options::default());
    set_pin(&site, "0000000000");
    let first = site.run(&["token", "check"]);
    assert_eq!(first.code, Some(5), "{first:?}");
    assert!(
        first.stderr.contains("PinIncorrect from C_Login"),
        "{first:?}"
    );
    for arguments in [
        &["token", "check"][..],
        &["key", "generate"],
        &["store", "check"],
    ] {
        let again = site.run(arguments);
        assert_eq!(again.code, Some(5), "{again:?}");
        assert!(again.stderr.contains("no login was tried"), "{again:?}");
    }
    assert_eq!(faulty.count("C_Login begins"), 1);
    site.expect_ok(&["token", "retry-pin"]);
    assert_eq!(site.run(&["token", "check"]).code, Some(5));
    assert_eq!(faulty.count("C_Login begins"), 2);
    set_pin(&site, site.token.pin());
    site.expect_ok(&["token", "check"]);
    // Who allowed it is in the audit log.
    assert!(site.audit().contains("token.retry_pin"));
}

/// A restart is no new try: the rejected PIN is remembered in the state directory, by brokers and commands alike.
#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_pin_is_remembered_over_runs() {
    let (mut site, faulty) = site(two_workers());
    let before = faulty.count("C_Login begins");
    for run in 1..=3 {
        set_pin(&site, "0000000000");
        let broker = Broker::start_on(site);
        until("the alert of this run", || {
            let alerts = broker
                .site
                .log()
                .matches("\"alert\":\"pin-latched\"")
                .count();
            (alerts >= run).then_some(())
        });
        let (stopped, status) = broker.stop();
        assert!(status.success(), "{status}");
        site = stopped;
        let checked = site.run(&["token", "check"]);
        assert_eq!(checked.code, Some(5), "{checked:?}");
    }
    assert_eq!(faulty.count("C_Login begins"), before + 1);
    // The right PIN needs no permission.
    set_pin(&site, site.token.pin());
    let broker = Broker::start_on(site);
    let enroller = Caller::of(&broker, "enroller");
    eventually(|| enroller.create("ada", MATERIAL)).await;
}

/// While the token says that one more wrong PIN locks it, only `retry-pin --force` allows a login, and only one.
#[tokio::test(flavor = "multi_thread")]
async fn the_last_try_needs_force_and_is_used_once() {
    let (site, faulty) = site(Options::default());
    faulty.set_flags(flag::USER_PIN_FINAL_TRY);
    let logins = || faulty.count("C_Login begins");
    let before = logins();
    let refused = || {
        let checked = site.run(&["token", "check"]);
        assert_eq!(checked.code, Some(5), "{checked:?}");
        assert!(
            checked.stderr.contains("CKF_USER_PIN_FINAL_TRY"),
            "{checked:?}"
        );
        assert!(checked.stderr.contains("retry-pin --force"), "{checked:?}");
    };
    refused();
    site.expect_ok(&["token", "retry-pin"]);
    refused();
    assert_eq!(logins(), before);
    // The right PIN: one login, and the permission is used up.
    site.expect_ok(&["token", "retry-pin", "--force"]);
    site.expect_ok(&["token", "check"]);
    refused();
    assert_eq!(logins(), before + 1);
    // A wrong PIN: one login, whatever is started afterwards.
    site.expect_ok(&["token", "retry-pin", "--force"]);
    set_pin(&site, "0000000000");
    for _ in 0..3 {
        assert_eq!(site.run(&["token", "check"]).code, Some(5));
    }
    assert_eq!(logins(), before + 2);
    // While the PIN is locked, not even that.
    faulty.set_flags(flag::USER_PIN_LOCKED);
    set_pin(&site, site.token.pin());
    site.expect_ok(&["token", "retry-pin", "--force"]);
    let checked = site.run(&["token", "check"]);
    assert_eq!(checked.code, Some(5), "{checked:?}");
    assert!(
        checked.stderr.contains("CKF_USER_PIN_LOCKED"),
        "{checked:?}"
    );
    assert_eq!(logins(), before + 2);
    // Once the counter was reset, no further permission is needed.
    faulty.set_flags(0);
    site.expect_ok(&["token", "check"]);
}

/// What `serve` does not hand on to the module, a command does not hand on either.
#[test]
fn a_command_sees_the_token_that_serve_sees() {
    let site = Site::fresh(Options::default());
    site.expect_ok(&["token", "check"]);
    site.write_configuration(|text| {
        let line = format!(
            "SOFTHSM2_CONF = \"{}\"\n",
            site.token.configuration().display()
        );
        assert!(text.contains(&line));
        *text = text.replace(&line, "");
    });
    let mut command = site.command(&["token", "check"]);
    command.env("SOFTHSM2_CONF", site.token.configuration());
    let checked = site.run_to_its_end(command);
    assert_eq!(checked.code, Some(4), "{checked:?}");
    assert!(
        checked.stderr.contains("SOFTHSM2_CONF") && checked.stderr.contains("[token.environment]"),
        "{checked:?}"
    );
    let mut serve = site.serve();
    serve.env("SOFTHSM2_CONF", site.token.configuration());
    assert_eq!(site.run_to_its_end(serve).code, Some(4));
}

/// A module whose login belongs to more than one process says so; the broker goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_logged_in_already_serves() {
    let (site, faulty) = site(two_workers());
    faulty.set(
        "C_Login",
        &Fault::always(code::after(code::USER_ALREADY_LOGGED_IN)),
    );
    let broker = Broker::start_on(site);
    Caller::of(&broker, "enroller")
        .create("ada", MATERIAL)
        .await
        .unwrap();
    until("two workers", || {
        (metric(&broker, "keybroker_token_workers{token=\"default\"} ") == Some(2.0)).then_some(())
    });
}

/// An unproven PIN and a code that says nothing of it: one further try.
#[tokio::test(flavor = "multi_thread")]
async fn an_unproven_pin_gets_one_further_try() {
    let (site, faulty) = site(two_workers());
    // As after an upgrade: nothing is known of the PIN.
    fs::remove_dir_all(site.audit_directory().join("state")).unwrap();
    faulty.set("C_Login", &Fault::always(code::VENDOR_DEFINED));
    let broker = Broker::start_on(site);
    until("the alert", || {
        broker.site.log().contains("pin-latched").then_some(())
    });
    let enroller = Caller::of(&broker, "enroller");
    let status = enroller.create("ada", MATERIAL).await.unwrap_err();
    assert_eq!(reason(&status), "TOKEN_UNTRUSTED");
    let starts = || {
        let log = broker.site.log();
        log.matches("a token worker did not start").count()
    };
    let before = starts();
    until("two more starts", || (starts() >= before + 2).then_some(()));
    assert_eq!(faulty.count("C_Login begins"), 2);
    faulty.clear("C_Login");
    broker.site.expect_ok(&["token", "retry-pin"]);
    eventually(|| enroller.create("ada", MATERIAL)).await;
}
