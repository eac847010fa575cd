//! The clients in `examples/`, run against the real broker.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use keybroker_test_support::skip::{skip, skip_outside_ci};

use crate::{
    client::Caller,
    identity::{Identity, Options as IdentityOptions},
    process::Broker,
    sealed,
    site::Options,
    tokens::{ADA, start},
};

/// Exit code of `examples/go/run.sh` when Go or one of its packages is not installed.
const NOT_INSTALLED: i32 = 3;

fn root() -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "..", ".."].iter().collect()
}

/// Runs an example with the certificate of that client.
fn run(broker: &Broker, program: &Path, client: &str, arguments: &[&str]) -> Output {
    let pki = &broker.site.pki;
    let port = broker.grpc.port();
    Command::new(program)
        .args(arguments)
        .env("KEYBROKER_ENDPOINT", format!("https://localhost:{port}"))
        .env("KEYBROKER_CA", pki.ca_file())
        .env("KEYBROKER_CERT", pki.certificate_file(client))
        .env("KEYBROKER_KEY", pki.key_file(client))
        // gRPC libraries use the proxy of the environment, for loopback too.
        .env("no_proxy", "localhost")
        .env("no_grpc_proxy", "localhost")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// Enrols, releases, and is refused: with the same words in every language.
async fn enrols_and_unwraps(broker: &Broker, program: &Path) {
    let enrolled = run(broker, program, "enroller", &["enrol", "ada"]);
    assert!(enrolled.status.success(), "{enrolled:?}");
    assert_eq!(
        String::from_utf8(enrolled.stdout).unwrap(),
        "ada: stored as revision 1\n"
    );
    let released = run(broker, program, "releaser", &["unwrap", "ada"]);
    assert!(released.status.success(), "{released:?}");
    assert_eq!(
        String::from_utf8(released.stdout).unwrap(),
        "ada: revision 1, 32 bytes\n"
    );
    // A repeated request with the same request id stores nothing.
    let listed = Caller::of(broker, "lifecycle").list(0, "").await.unwrap();
    assert_eq!(listed.user_keys.len(), 1);
    assert_eq!(listed.user_keys[0].revision, 1);

    let refused = run(broker, program, "releaser", &["unwrap", "bob"]);
    assert_eq!(refused.status.code(), Some(1));
    let error = String::from_utf8(refused.stderr).unwrap();
    assert!(
        error.starts_with("error: ") && error.contains("KEY_NOT_FOUND: "),
        "{error}"
    );
}

/// The same on a broker whose key in use is a sealed wrapping key.
fn unwraps_sealed(program: &Path) {
    let broker = sealed::broker(Options::default());
    let enrolled = run(&broker, program, "enroller", &["enrol", "ada"]);
    assert!(enrolled.status.success(), "{enrolled:?}");
    let released = run(&broker, program, "releaser", &["unwrap-sealed", "ada"]);
    assert!(released.status.success(), "{released:?}");
    assert_eq!(
        String::from_utf8(released.stdout).unwrap(),
        "ada: revision 1, 32 bytes, RSA-OAEP-SHA-1\n"
    );
    let refused = run(&broker, program, "releaser", &["unwrap", "ada"]);
    let error = String::from_utf8(refused.stderr).unwrap();
    assert!(error.contains("RELEASE_FORM"), "{error}");
}

/// Cargo builds it with the tests of the whole workspace, beside the binary.
#[tokio::test(flavor = "multi_thread")]
async fn the_rust_example_enrols_and_unwraps() {
    let target = Path::new(env!("CARGO_BIN_EXE_keybroker")).parent().unwrap();
    let program = target.join("examples/enrol-and-unwrap");
    if !program.exists() {
        skip_outside_ci("the Rust example was not built: run the tests with --workspace");
        return;
    }
    let broker = Broker::start(Options::default());
    enrols_and_unwraps(&broker, &program).await;
    unwraps_sealed(&program);
}

/// Without the package index its requirements cannot be installed: a failure in CI, a loud skip elsewhere.
#[tokio::test(flavor = "multi_thread")]
async fn the_python_example_enrols_and_unwraps() {
    let script = root().join("examples/python/run.sh");
    let broker = Broker::start(Options::default());
    let help = run(&broker, &script, "enroller", &["--help"]);
    if !help.status.success() {
        let error = String::from_utf8_lossy(&help.stderr);
        skip_outside_ci(&format!("the Python example cannot be installed: {error}"));
        return;
    }
    enrols_and_unwraps(&broker, &script).await;
    unwraps_sealed(&script);
}

/// The client's side of the device protocol, with real keys and an access token.
#[tokio::test(flavor = "multi_thread")]
async fn the_python_example_opens_a_key_on_two_devices() {
    let script = root().join("examples/python/run.sh");
    let service = Identity::start(IdentityOptions::default());
    let broker = start(&service, "");
    let run = |arguments: &[&str]| {
        let port = broker.grpc.port();
        Command::new(&script)
            .args(arguments)
            .env("KEYBROKER_ENDPOINT", format!("https://localhost:{port}"))
            .env("KEYBROKER_CA", broker.site.pki.ca_file())
            .env("KEYBROKER_TOKEN", service.user_token(ADA))
            .env("no_proxy", "localhost")
            .env("no_grpc_proxy", "localhost")
            .stdin(Stdio::null())
            .output()
            .unwrap()
    };
    let help = run(&["devices", "--help"]);
    if !help.status.success() {
        let error = String::from_utf8_lossy(&help.stderr);
        skip_outside_ci(&format!("the Python example cannot be installed: {error}"));
        return;
    }
    let output = run(&["devices", ADA]);
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let [phone, laptop, both, rotated, lost] = lines[..] else {
        panic!("{text}");
    };
    let phrase = phone.strip_prefix("phone: ").unwrap();
    assert_eq!(phrase.split(' ').count(), 5, "{phrase}");
    assert_eq!(laptop, format!("laptop: {phrase}"));
    assert_eq!(both, "both devices open the user key");
    assert_eq!(rotated, "both devices open revision 2");
    assert_eq!(lost, "the lost phone: FAILED_PRECONDITION");
}

/// Building and testing the broker does not need Go, so this is skipped, loudly, where Go is not installed.
#[tokio::test(flavor = "multi_thread")]
async fn the_go_example_enrols_and_unwraps() {
    let script = root().join("examples/go/run.sh");
    let broker = Broker::start(Options::default());
    let usage = run(&broker, &script, "enroller", &[]);
    let error = String::from_utf8_lossy(&usage.stderr);
    if usage.status.code() == Some(NOT_INSTALLED) {
        skip(&format!("the Go example cannot be built here: {error}"));
        return;
    }
    assert!(error.contains("usage: enrol|unwrap USER"), "{usage:?}");
    enrols_and_unwraps(&broker, &script).await;
}

/// Every example has a page, and the page names its programs.
#[test]
fn every_example_has_a_readme() {
    let mut seen = 0;
    for entry in fs::read_dir(root().join("examples")).unwrap() {
        let path = entry.unwrap().path();
        if !path.is_dir() {
            continue;
        }
        seen += 1;
        let page = fs::read_to_string(path.join("README.md")).unwrap();
        for file in fs::read_dir(&path).unwrap() {
            let name = file.unwrap().file_name().into_string().unwrap();
            let is_program = [".rs", ".py", ".go", ".sh"]
                .iter()
                .any(|end| name.ends_with(end));
            assert!(!is_program || page.contains(&name), "{name} in {path:?}");
        }
    }
    assert!(seen >= 3, "{seen} examples");
}
