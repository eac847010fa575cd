//! `keybroker client` as a person or a script meets it: exit codes, output, key material in and out.

use std::{
    fs,
    io::Write as _,
    net::TcpListener,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use base64ct::{Base64, Encoding as _};
use serde_json::Value;

use crate::{
    pki,
    process::Broker,
    site::{Finished, Options},
    wire::get,
};

/// `keybroker client` with the certificate of that name.
pub(crate) fn client(broker: &Broker, name: &str, arguments: &[&str]) -> Command {
    calling(broker, &["client"], name, arguments)
}

/// A command that calls a broker with the certificate of that name. `arguments` follow the options of the connection.
pub(crate) fn calling(
    broker: &Broker,
    command: &[&str],
    name: &str,
    arguments: &[&str],
) -> Command {
    let ca = broker.site.pki.ca_file();
    calling_to(broker, broker.grpc.port(), &ca, command, name, arguments)
}

fn client_to(broker: &Broker, port: u16, ca: &Path, name: &str, arguments: &[&str]) -> Command {
    calling_to(broker, port, ca, &["client"], name, arguments)
}

fn calling_to(
    broker: &Broker,
    port: u16,
    ca: &Path,
    words: &[&str],
    name: &str,
    arguments: &[&str],
) -> Command {
    let pki = &broker.site.pki;
    let mut command = Command::new(env!("CARGO_BIN_EXE_keybroker"));
    command
        .args(words)
        .args(["--endpoint", &format!("https://localhost:{port}")])
        .arg("--ca")
        .arg(ca)
        .arg("--cert")
        .arg(pki.certificate_file(name))
        .arg("--key")
        .arg(pki.key_file(name))
        .args(arguments)
        .stdin(Stdio::null());
    command
}

fn run(broker: &Broker, name: &str, arguments: &[&str]) -> Finished {
    Finished::from(client(broker, name, arguments).output().unwrap())
}

#[track_caller]
fn expect_ok(broker: &Broker, name: &str, arguments: &[&str]) -> String {
    let finished = run(broker, name, arguments);
    assert_eq!(finished.code, Some(0), "{arguments:?}: {finished:#?}");
    finished.stdout
}

#[track_caller]
fn expect_refused(broker: &Broker, name: &str, arguments: &[&str], reason: &str) {
    let finished = run(broker, name, arguments);
    assert_eq!(finished.code, Some(10), "{arguments:?}: {finished:#?}");
    let (error, hint) = finished.stderr.split_once("\nhint: ").unwrap();
    assert!(error.starts_with(&format!("error: {reason}: ")), "{error}");
    assert!(error.contains("(call 0"), "no call id: {error}");
    assert!(hint.len() > 10, "{hint}");
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn scratch(broker: &Broker, name: &str) -> (PathBuf, String) {
    let path = broker.site.folder().join(name);
    let text = path.to_str().unwrap().to_owned();
    (path, text)
}

#[test]
fn a_user_key_goes_through_its_whole_life() {
    let broker = Broker::start(Options::default());
    let ada = ["--user", "ada", "--key-name", "vault"];
    let with = |first: &[&str], rest: &[&str]| {
        let all: Vec<String> = [first, &ada, rest]
            .concat()
            .into_iter()
            .map(str::to_owned)
            .collect();
        all
    };
    let call = |name: &str, first: &[&str], rest: &[&str]| {
        let arguments = with(first, rest);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        expect_ok(&broker, name, &arguments)
    };
    let (first, first_text) = scratch(&broker, "first");
    let made = call(
        "enroller",
        &["create", "-o", "json"],
        &["--generate", "32", "--out", &first_text],
    );
    let made = json(&made);
    assert_eq!(
        (&made["user"], &made["revision"]),
        (&"ada".into(), &1.into())
    );
    let first = fs::read(first).unwrap();
    assert_eq!(first.len(), 32);

    let (second, second_text) = scratch(&broker, "second");
    fs::write(&second, b"second material").unwrap();
    call(
        "enroller",
        &["replace", "--expected-revision", "1"],
        &["--material-file", &second_text],
    );
    let (out, out_text) = scratch(&broker, "out");
    call("releaser", &["unwrap"], &["--out", &out_text]);
    assert_eq!(fs::read(&out).unwrap(), b"second material");
    let mode = fs::metadata(&out).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    call(
        "lifecycle",
        &["restore", "--revision", "1", "--expected-revision", "2"],
        &[],
    );
    let released = json(&call("releaser", &["unwrap", "-o", "json"], &[]));
    let material = Base64::decode_vec(released["key_material"].as_str().unwrap()).unwrap();
    assert_eq!((material, &released["revision"]), (first, &3.into()));

    call("lifecycle", &["delete", "--expected-revision", "3"], &[]);
    let got = json(&call("auditor", &["get", "-o", "json"], &[]));
    assert_eq!(got["state"], "deleted");
    let listed = json(&expect_ok(&broker, "auditor", &["list", "-o", "json"]));
    assert_eq!(listed, Value::Array(vec![]));
    call("lifecycle", &["undelete"], &[]);
    let page = ["list", "--all", "--page-size", "1", "-o", "json"];
    let listed = json(&expect_ok(&broker, "auditor", &page));
    assert_eq!(listed[0]["state"], "active");
    assert!(listed[0]["deleted"].is_null());

    // The hint of a name that is taken would recommend the very command.
    let again = with(&["undelete"], &[]);
    let again: Vec<&str> = again.iter().map(String::as_str).collect();
    let finished = run(&broker, "lifecycle", &again);
    assert!(
        finished.stderr.contains("KEY_EXISTS") && finished.stderr.contains("nothing to undelete"),
        "{finished:#?}"
    );
}

#[test]
fn refusals_have_reason_call_id_hint_and_code() {
    let broker = Broker::start(Options::default());
    let (material, material_text) = scratch(&broker, "material");
    let create = ["create", "--user", "ada", "--material-file", &material_text];
    fs::write(&material, b"material of ada").unwrap();
    expect_ok(&broker, "enroller", &create);
    expect_refused(&broker, "enroller", &create, "KEY_EXISTS");
    expect_refused(&broker, "admin", &["unwrap", "--user", "ada"], "POLICY");
    expect_refused(
        &broker,
        pki::UNKNOWN,
        &["get", "--user", "ada"],
        "CREDENTIAL",
    );
    expect_refused(
        &broker,
        "releaser",
        &["unwrap", "--user", "bob"],
        "KEY_NOT_FOUND",
    );
    let stale = ["delete", "--user", "ada", "--expected-revision", "7"];
    expect_refused(&broker, "lifecycle", &stale, "REVISION");

    let finished = run(&broker, "admin", &["-o", "json", "unwrap", "--user", "ada"]);
    let object = json(&finished.stderr);
    assert_eq!(object["reason"], "POLICY");
    assert_eq!(object["exit_code"], 10);
    assert!(object["hint"].is_string());
    assert_eq!(finished.stdout, "");

    let batch = run(
        &broker,
        "releaser",
        &["-o", "json", "batch-unwrap", "--user", "ada", "bob"],
    );
    assert_eq!(batch.code, Some(10), "{batch:#?}");
    let rows = json(&batch.stdout);
    let ada = Base64::encode_string(b"material of ada");
    assert_eq!(rows[0]["key_material"], ada);
    assert_eq!(rows[1]["reason"], "KEY_NOT_FOUND");
}

/// What breaks the limits of the protocol is not sent, least of all key material.
#[test]
fn arguments_and_material_out_of_range_are_refused_before_a_call() {
    let broker = Broker::start(Options::default());
    let (material, text) = scratch(&broker, "material");
    let create = ["create", "--user", "ada", "--material-file", &text];
    for (length, words) in [(0, "is empty"), (191, "longer than 190 bytes")] {
        fs::write(&material, vec![b'm'; length]).unwrap();
        let finished = run(&broker, "enroller", &create);
        assert_eq!(finished.code, Some(2), "{finished:#?}");
        assert!(finished.stderr.contains(words), "{finished:#?}");
    }
    for (arguments, words) in [
        (&["get", "--user", ""][..], "user must be 1 to 255 bytes"),
        (
            &["get", "--user", "ada", "--key-name", "Vault"],
            "key_name must be",
        ),
        (&["wrapping-key", "07"], "not 32 hexadecimal digits"),
        (
            &["delete", "--user", "ada", "--expected-revision", "0"],
            "a whole number of at least 1",
        ),
        (
            &[
                "undelete",
                "--user",
                "ada",
                "--request-id",
                "00000000-0000-0000-0000-000000000000",
            ],
            "request_id must be a UUID",
        ),
    ] {
        let finished = run(&broker, "enroller", arguments);
        assert_eq!(finished.code, Some(2), "{arguments:?}: {finished:#?}");
        assert!(finished.stderr.contains(words), "{finished:#?}");
    }
    let audit = broker.site.audit();
    assert!(!audit.contains("user_key."), "{audit}");
}

#[test]
fn generated_material_that_was_refused_is_not_left_behind() {
    let broker = Broker::start(Options::default());
    let (file, text) = scratch(&broker, "generated");
    let create = [
        "create",
        "--user",
        "ada",
        "--generate",
        "32",
        "--out",
        &text,
    ];
    expect_refused(&broker, "releaser", &create, "POLICY");
    assert!(!file.exists());
    expect_ok(&broker, "enroller", &create);
    let two = [&create[..], &["--material-file", &text]].concat();
    assert_eq!(run(&broker, "enroller", &two).code, Some(2));
    let again = run(&broker, "enroller", &create);
    assert_eq!(again.code, Some(2), "{again:#?}");
    assert!(again.stderr.contains("never overwrites"), "{again:#?}");
    assert_eq!(fs::read(&file).unwrap().len(), 32);

    let unwrap = ["unwrap", "--user", "ada", "--out", &text];
    let refused = run(&broker, "releaser", &unwrap);
    assert_eq!(refused.code, Some(2), "{refused:#?}");
    let audit = broker.site.audit();
    assert!(
        !audit.contains("user_key.unwrap"),
        "a key was released to nowhere: {audit}"
    );
}

#[test]
fn key_material_comes_from_standard_input_and_from_descriptors() {
    let broker = Broker::start(Options::default());
    let from_stdin = ["create", "--user", "ada", "--material-file", "-"];
    let mut child = client(&broker, "enroller", &from_stdin)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"typed material").unwrap();
    drop(stdin);
    assert!(child.wait().unwrap().success());
    let (file, _) = scratch(&broker, "material");
    fs::write(&file, b"material of bob").unwrap();
    let from_descriptor = ["create", "--user", "bob", "--material-fd", "0"];
    let finished = client(&broker, "enroller", &from_descriptor)
        .stdin(fs::File::open(&file).unwrap())
        .output()
        .unwrap();
    assert!(finished.status.success(), "{finished:?}");
    for (user, expected) in [("ada", "typed material"), ("bob", "material of bob")] {
        let unwrapped = expect_ok(&broker, "releaser", &["unwrap", "--user", user]);
        assert_eq!(unwrapped, expected);
    }
}

/// `script` gives the command a terminal.
#[test]
fn key_material_is_not_shown_on_a_terminal_unless_asked_for() {
    let broker = Broker::start(Options::default());
    let (file, text) = scratch(&broker, "material");
    fs::write(&file, b"material of ada").unwrap();
    let create = ["create", "--user", "ada", "--material-file", &text];
    expect_ok(&broker, "enroller", &create);
    let on_terminal = |arguments: &[&str]| {
        let plain = client(&broker, "releaser", arguments);
        let words = std::iter::once(plain.get_program()).chain(plain.get_args());
        let line: Vec<&str> = words.map(|word| word.to_str().unwrap()).collect();
        let mut terminal = Command::new("script");
        terminal.args(["-qec", &line.join(" "), "/dev/null"]);
        Finished::from(terminal.stdin(Stdio::null()).output().unwrap())
    };
    for arguments in [
        &["unwrap", "--user", "ada"][..],
        &["unwrap", "--user", "ada", "-o", "json"],
        &["batch-unwrap", "--user", "ada"],
    ] {
        let refused = on_terminal(arguments);
        assert_eq!(refused.code, Some(2), "{refused:#?}");
        assert!(refused.stdout.contains("--force"), "{refused:#?}");
    }
    let forced = on_terminal(&["unwrap", "--user", "ada", "--force"]);
    assert_eq!(forced.code, Some(0), "{forced:#?}");
    assert!(forced.stdout.contains("material of ada"), "{forced:#?}");
}

#[test]
fn the_control_plane_answers_in_json() {
    let broker = Broker::start(Options::default());
    let ask = |name: &str, command: &[&str]| {
        let mut arguments = vec!["-o", "json"];
        arguments.extend(command);
        json(&expect_ok(&broker, name, &arguments))
    };
    let keys = ask("admin", &["wrapping-keys"]);
    assert_eq!(
        (&keys[0]["state"], &keys[0]["modulus_bits"]),
        (&"active".into(), &2048.into())
    );
    let id = keys[0]["id"].as_str().unwrap();
    let key = ask("admin", &["wrapping-key", id]);
    let pem = key["public_key"].as_str().unwrap();
    assert!(pem.starts_with("-----BEGIN PUBLIC KEY-----"), "{pem}");
    let state = ask("auditor", &["token-state"]);
    assert_eq!(state["serving"], "up");
    assert_eq!(state["workers"].as_array().unwrap().len(), 1);
    let tail = ask("auditor", &["audit-tail", "--limit", "2"]);
    assert_eq!(tail.as_array().unwrap().len(), 2);
    assert!(tail[1]["action"].is_string());
    let health = ask("admin", &["health"]);
    assert_eq!(
        (&health[0]["status"], &health[1]["status"]),
        (&"SERVING".into(), &"SERVING".into())
    );
}

#[test]
fn a_broker_that_is_not_there_or_not_trusted_is_told_apart() {
    let broker = Broker::start(Options::default());
    let ask = ["get", "--user", "ada"];
    // A certificate of another CA: in TLS 1.3 only the first call tells.
    let other = run(&broker, pki::OTHER_CA, &ask);
    assert_eq!(other.code, Some(11), "{other:#?}");
    assert!(other.stderr.contains("--cert"), "{other:#?}");
    // Such a client must not connect again and again: each attempt costs the broker a handshake, and counts against its network.
    let counted = get(broker.status, "/metrics");
    let failed = counted
        .lines()
        .filter(|line| line.starts_with("keybroker_handshakes_failed_total{"))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum::<f64>();
    assert!((1.0..=20.0).contains(&failed), "{counted}");
    // The broker's certificate is of another CA than ours.
    let (port, elsewhere) = (broker.grpc.port(), pki::Pki::fresh());
    let mut distrusting = client_to(&broker, port, &elsewhere.ca_file(), "releaser", &ask);
    let distrusting = distrusting.output();
    let distrusting = Finished::from(distrusting.unwrap());
    assert_eq!(distrusting.code, Some(11), "{distrusting:#?}");
    assert!(
        distrusting.stderr.contains("not signed by a CA in --ca"),
        "{distrusting:#?}"
    );
    // Nobody listens there any more.
    let mut late = client(&broker, "releaser", &ask);
    let (_site, _status) = broker.stop();
    let late = Finished::from(late.output().unwrap());
    assert_eq!(late.code, Some(11), "{late:#?}");
    assert!(late.stderr.contains("cannot reach"), "{late:#?}");
}

/// A listener that accepts connections and never answers: the deadline ends the wait.
#[test]
fn a_silent_listener_does_not_hold_the_client() {
    let broker = Broker::start(Options::default());
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let (port, ca) = (
        silent.local_addr().unwrap().port(),
        broker.site.pki.ca_file(),
    );
    let hasty = ["--timeout-ms", "300", "get", "--user", "ada"];
    let finished = Finished::from(
        client_to(&broker, port, &ca, "releaser", &hasty)
            .output()
            .unwrap(),
    );
    assert_eq!(finished.code, Some(11), "{finished:#?}");
}
