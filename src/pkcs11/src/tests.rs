//! Tests that need a real token in this process.
//!
//! SoftHSM reads its configuration from the environment, which a running test cannot change safely. So each test starts
//! itself again as a child process with its own environment and token directory.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use keybroker_core::{
    key::{Purpose, WrappingKeyId},
    state::StateDirectory,
};
use keybroker_pkcs11_ffi::Session;
use keybroker_test_support::faulty::{self, Faulty};
use keybroker_worker_protocol::{AccessControl, IntegrityKey, Pin, Settings};

use super::{
    PinRecord,
    admin::{self, Admin, AdminError},
    keys::{self, KeyPair, Terms},
    open::OpenToken,
};

mod attribute_check;
mod behaviours;
mod making;
mod negative;
mod release;
mod removal;
mod rewrap;
mod sealed;
mod session;
mod tokens;

const MODULE: &str = "/usr/lib/softhsm/libsofthsm2.so";
const CHILD: &str = "KEYBROKER_TEST_TOKEN_FOLDER";
const USER_PIN: &str = "123456";

/// Runs `body` in a child process of this test with its own token directory.
fn with_softhsm(test: &str, body: impl FnOnce(&Path)) {
    if let Some(folder) = env::var_os(CHILD) {
        return body(Path::new(&folder));
    }
    assert!(
        Path::new(MODULE).is_file(),
        "SoftHSM is not installed; run scripts/install.sh"
    );
    let folder = tempfile::tempdir().unwrap();
    let tokens = folder.path().join("tokens");
    fs::create_dir(&tokens).unwrap();
    let faults = folder.path().join("faults");
    fs::create_dir(&faults).unwrap();
    let conf = folder.path().join("softhsm2.conf");
    let text = format!(
        "directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\n",
        tokens.display()
    );
    fs::write(&conf, text).unwrap();
    let output = Command::new(env::current_exe().unwrap())
        .args([&format!("tests::{test}"), "--exact", "--nocapture"])
        .env("SOFTHSM2_CONF", conf)
        .env(CHILD, folder.path())
        .env(faulty::VARIABLE, faults)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    // Prints the results of a long run.
    println!("{text}");
}

pub(crate) fn settings() -> Settings {
    Settings {
        name: "default".to_owned(),
        priority: 100,
        copy_of: None,
        module: PathBuf::from(MODULE),
        label: Some("test".to_owned()),
        serial: None,
        uri: None,
        pin_file: None,
        workers: 1,
        sessions_per_worker: 1,
        queue_length_max: 1,
        weights: std::collections::BTreeMap::new(),
        call_timeout_ms: 30_000,
        allow_oaep_sha1: true,
        access_control: AccessControl::default(),
        integrity_key: IntegrityKey::default(),
        integrity_key_directory: None,
        integrity_key_digests: std::collections::BTreeMap::new(),
        attribute_exceptions: Vec::new(),
        spared_tests: Vec::new(),
        assurance: None,
        initialize_string: None,
        environment: std::collections::BTreeMap::new(),
    }
}

fn pin(text: &str) -> Pin {
    Pin::from_text(text.to_owned()).unwrap()
}

fn init() {
    admin::init_token(&settings(), "test", &pin("654321"), &pin(USER_PIN), None).unwrap();
}

fn open() -> OpenToken {
    OpenToken::login(&settings(), &record(), &pin(USER_PIN), true).unwrap()
}

/// The record of PINs of this test.
fn record() -> PinRecord {
    let folder = env::var_os(CHILD).unwrap();
    PinRecord::new(StateDirectory::below(&Path::new(&folder).join("audit")))
}

/// Settings for the same token, with a module that simulates failures.
fn faulty(folder: &Path) -> (Settings, Faulty) {
    let faulty = Faulty::in_folder(folder.join("faults"), Path::new(MODULE));
    let settings = Settings {
        module: faulty.module(),
        ..settings()
    };
    (settings, faulty)
}

/// A key like those that `key generate` makes.
fn generated(session: &Session) -> KeyPair {
    generated_for(session, Purpose::Plain)
}

/// A key of this purpose.
fn generated_for(session: &Session, purpose: Purpose) -> KeyPair {
    let settings = settings();
    let made = keys::generate(session, 2_048, Terms::for_purpose(&settings, purpose));
    made.unwrap().pair
}

fn id(number: u8) -> WrappingKeyId {
    WrappingKeyId::from_bytes([number; 16])
}
