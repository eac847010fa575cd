//! `keybroker token report` on the modules of several makers, compared with the published reports in `docs/tokens`.
//! `scripts/token-reports.sh` sets a variable, with which the same tests write those reports.

use std::{env, fs, path::Path};

use keybroker_test_support::skip::skip;
use keybroker_worker_protocol::report::{Outcome, Report, Sealing, WORKS};

use crate::{
    expected::says,
    faulty::{Fault, code},
    faulty_token,
    modules::{Maker, Stand, in_namespaces, pkcs11_proxy},
    site::{Options, Site},
};

/// Names the folder that reports are written to instead of being compared.
const WRITE_TO: &str = "KEYBROKER_TOKEN_REPORTS";
const VERIFICATION: i32 = 12;

fn published(maker: Maker) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let file = root.join(format!("docs/tokens/{}.json", maker.name()));
    file.to_str().unwrap().to_owned()
}

fn read(text: &str) -> Report {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// The report is no worse than the published one, which has this result and this protection of sealed releases.
fn is_as_published(maker: Maker, result: Outcome, sealing: Sealing) {
    let stand = Stand::new(maker);
    let page = stand.site.folder().join("page.md");
    let page_file = page.to_str().unwrap();
    let file = published(maker);
    let mut arguments = vec![
        "-o", "json", "token", "report", "--write", "--page", page_file,
    ];
    let Some(folder) = env::var_os(WRITE_TO) else {
        arguments.extend(["--expect", &file]);
        let found = read(&stand.site.expect_ok(&arguments));
        assert!(fs::read_to_string(page).unwrap().contains("## Identity"));
        assert_eq!(found.verdict.result, result, "{found:#?}");
        let expected = read(&fs::read_to_string(&file).unwrap());
        assert_eq!(expected.verdict.result, result, "{file}");
        for report in [found, expected] {
            let sealed = report.sealed.unwrap();
            assert_eq!(sealed.result, sealing, "{sealed:#?}");
        }
        return;
    };
    let json = stand.site.expect_ok(&arguments);
    let page = fs::read_to_string(page).unwrap();
    // Paths of this run.
    let ours = stand.site.folder().to_str().unwrap();
    for (end, text) in [("json", json), ("md", page)] {
        let name = format!("{}.{end}", maker.name());
        let file = Path::new(&folder).join(name);
        fs::write(file, text.replace(ours, "/opt/keybroker")).unwrap();
    }
}

#[test]
fn softhsm_is_as_published() {
    is_as_published(Maker::SoftHsm, Outcome::Works, Sealing::Enforced);
}

#[test]
fn kryoptic_is_as_published() {
    is_as_published(Maker::Kryoptic, Outcome::Works, Sealing::Enforced);
}

#[test]
fn opencryptoki_is_as_published() {
    if in_namespaces("reports::opencryptoki_is_as_published") {
        is_as_published(
            Maker::Opencryptoki,
            Outcome::WorksWithExceptions,
            Sealing::Unavailable,
        );
    }
}

#[test]
fn p11_kit_remote_is_as_published() {
    is_as_published(Maker::P11Kit, Outcome::WorksWithExceptions, Sealing::Worker);
}

/// Neither Debian nor a registry has it, so that only this report needs it, and not the test run.
#[test]
fn pkcs11_proxy_is_as_published() {
    if pkcs11_proxy().is_none() {
        skip("the report of pkcs11-proxy: scripts/pkcs11-proxy.sh builds it");
        return;
    }
    is_as_published(Maker::Pkcs11Proxy, Outcome::Works, Sealing::Worker);
}

#[test]
fn nss_is_as_published() {
    is_as_published(Maker::Nss, Outcome::Refused, Sealing::Worker);
}

/// CPU time, because the machine does other things as well.
#[test]
fn the_negative_tests_of_a_start_are_cheap() {
    let site = Site::without_keys(Options::default());
    let report = read(&site.expect_ok(&["-o", "json", "token", "report"]));
    let name = "the negative tests of a worker's start, milliseconds of CPU time";
    let rate = report.rates.iter().find(|rate| rate.name == name).unwrap();
    eprintln!("{name}: {}", rate.value);
    assert!(rate.value > 0.0 && rate.value < 300.0, "{rate:?}");
}

/// A token that lies about its keys is worse than the one behind it, and the report names the test.
#[test]
fn a_token_that_is_worse_ends_with_its_own_code() {
    let site = Site::without_keys(Options::default());
    let faulty = faulty_token::put_before(&site);
    faulty.set_profile("liar");
    let file = published(Maker::SoftHsm);
    let worse = site.run(&["token", "report", "--expect", &file]);
    assert_eq!(worse.code, Some(VERIFICATION), "{worse:#?}");
    for words in [
        "negative test wrap-private-aes-kw",
        "the verdict is refused",
    ] {
        assert!(worse.stderr.contains(words), "{worse:#?}");
    }
    assert!(worse.stdout.contains("Verdict: **refused**"), "{worse:#?}");
}

/// Nothing stays on the token, and nothing of it that is secret or identifies it is in the report.
#[test]
fn a_report_leaves_nothing_and_tells_no_secret() {
    let site = Site::without_keys(Options::default());
    let listed = site.expect_ok(&["-o", "json", "token", "list"]);
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    let serial = listed[0]["serial"].as_str().unwrap();
    for arguments in [
        &["-o", "json", "token", "report"][..],
        &["-o", "json", "token", "report", "--write"],
    ] {
        let text = site.expect_ok(arguments);
        for secret in [serial, site.token.pin(), site.token.label()] {
            assert!(!text.contains(secret), "{secret} in {text}");
        }
        let report = read(&text);
        assert_eq!(
            report.token_objects.is_empty(),
            !arguments.contains(&"--write"),
            "{report:#?}"
        );
        let objects = site.token.pkcs11_tool(&["--list-objects"]);
        let objects = String::from_utf8_lossy(&objects.stdout).into_owned();
        assert!(!objects.contains(" Object;"), "{objects}");
    }
    let text = site.expect_ok(&["-o", "json", "token", "report", "--serial"]);
    let report = read(&text);
    assert_eq!(report.identity.serial.as_deref(), Some(serial));
    // What a person asks of a device before it is bought.
    for name in [
        "C_Initialize, milliseconds",
        "C_Login, milliseconds",
        "one unwrap (RSA-2048 OAEP), milliseconds, shortest",
        "one unwrap (RSA-2048 OAEP), milliseconds, median",
        "one unwrap (RSA-2048 OAEP), milliseconds, 99th percentile",
        "a damaged ciphertext, milliseconds, median",
    ] {
        assert!(
            report.rates.iter().any(|rate| rate.name == name),
            "{name}: {text}"
        );
    }
    // SoftHSM ends the keys of a session with the login, and gives its handle to no other.
    assert_eq!(
        session_row(&report, "a handle of a session key from before C_Logout"),
        "ObjectHandleInvalid"
    );
    assert_eq!(
        session_row(&report, "the login of the second process"),
        "a separate login"
    );
    // Only the run that made keys on the token is a change.
    let entries = site.audit();
    let intents = entries
        .lines()
        .filter(|line| line.contains("token.report") && line.contains("\"intent\""));
    assert_eq!(intents.count(), 1, "{entries}");
}

/// What the report says under this name of sessions and logins.
fn session_row<'a>(report: &'a Report, name: &str) -> &'a str {
    let row = report.sessions.iter().find(|row| row.name == name);
    &row.unwrap_or_else(|| panic!("{name}: {report:#?}")).result
}

/// Where the processes share one login, the report says so, although the second login works.
#[test]
fn a_shared_login_is_a_line_of_its_own() {
    let site = Site::without_keys(Options::default());
    let faulty = faulty_token::put_before(&site);
    faulty.set_profile("pkcs11-proxy");
    let report = read(&site.expect_ok(&["-o", "json", "token", "report"]));
    assert_eq!(session_row(&report, "a login by a second process"), WORKS);
    let whose = session_row(&report, "the login of the second process");
    assert!(whose.contains("CKR_USER_ALREADY_LOGGED_IN"), "{whose}");
}

/// A token that does not remove keys: the report and a warning name them, and so does `token check` later.
#[test]
fn keys_that_a_report_could_not_remove_are_named() {
    let site = Site::without_keys(Options::default());
    let faulty = faulty_token::put_before(&site);
    faulty.set("C_DestroyObject", &Fault::always(code::DEVICE_ERROR));
    let made = site.run(&["token", "report", "--write"]);
    let words = ["warning: ", "the token did not remove", "vendor's tool"];
    says("token report", &made, 0, &words);
    assert!(
        made.stdout.contains("the token did not remove"),
        "{made:#?}"
    );
    faulty.clear("C_DestroyObject");
    site.expect_ok(&["store", "migrate"]);
    let checked = site.run(&["token", "check"]);
    assert!(
        checked.stderr.contains("not in the registry"),
        "{checked:#?}"
    );
}

#[test]
fn what_is_no_report_is_refused_before_the_token_is_used() {
    let site = Site::without_keys(Options::default());
    let file = site.folder().join("expected.json");
    fs::write(&file, "{}").unwrap();
    let refused = site.run(&["token", "report", "--expect", file.to_str().unwrap()]);
    assert_eq!(refused.code, Some(2), "{refused:#?}");
    assert!(refused.stderr.contains("not a report"), "{refused:#?}");
}
