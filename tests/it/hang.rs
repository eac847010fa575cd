//! The disk of the audit log hangs: it neither does what it is asked nor fails.

use std::{
    fs,
    path::PathBuf,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    client::{Caller, eventually, refused},
    process::{Broker, until},
    site::{Options, Site},
    wire::get,
};

const MATERIAL: &[u8] = b"material of this user";
/// Far above what a refusal without a disk takes, also on a busy machine.
const AT_ONCE: Duration = Duration::from_millis(500);

/// A broker whose audit log hangs while a file is there.
struct Hanging {
    broker: Broker,
    gate: PathBuf,
}

impl Hanging {
    fn start() -> Self {
        let site = Arc::new(Site::fresh(Options::default()));
        let (gate, library) = (site.folder().join("gate"), site.folder().join("hang.so"));
        let made = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .arg(&library)
            .arg(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/../../tests/it/hang.c"
            ))
            .status()
            .unwrap();
        assert!(made.success());
        let broker = Broker::start_as(site, |site| {
            let mut command = site.serve();
            command
                .env("LD_PRELOAD", &library)
                .env("KEYBROKER_TEST_HANG", &gate);
            command
        });
        Self { broker, gate }
    }

    fn hang(&self) {
        fs::write(&self.gate, "").unwrap();
    }

    fn go_on(&self) {
        fs::remove_file(&self.gate).unwrap();
    }

    fn ready(&self) -> bool {
        get(self.broker.status, "/readyz").starts_with("HTTP/1.1 200")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hung_audit_disk_is_said_and_a_stop_has_an_end() {
    let hanging = Hanging::start();
    let (enroller, releaser) = (
        Caller::of(&hanging.broker, "enroller"),
        Caller::of(&hanging.broker, "releaser"),
    );
    enroller.create("ada", MATERIAL).await.unwrap();
    assert!(hanging.ready());

    hanging.hang();
    refused(releaser.unwrap("ada").await, "AUDIT_DOWN");
    until("health to say so", || (!hanging.ready()).then_some(()));
    for _ in 0..3 {
        let asked = Instant::now();
        refused(releaser.unwrap("ada").await, "AUDIT_DOWN");
        assert!(asked.elapsed() < AT_ONCE, "{:?}", asked.elapsed());
    }
    hanging.go_on();
    let key = eventually(|| releaser.unwrap("ada")).await;
    assert_eq!(key.key_material, MATERIAL);
    until("health to say so", || hanging.ready().then_some(()));

    hanging.hang();
    refused(releaser.unwrap("ada").await, "AUDIT_DOWN");
    let stopped = Instant::now();
    let (site, _) = hanging.broker.stop();
    // Lame duck, one wait for the last entries, and the one for the end of the log.
    assert!(
        stopped.elapsed() < Duration::from_secs(10),
        "{:?}",
        stopped.elapsed()
    );
    assert!(site.log().contains("not closed cleanly"), "{}", site.log());
}

/// An intent that becomes durable after its caller was refused is closed, by name, and nothing was changed.
#[tokio::test(flavor = "multi_thread")]
async fn an_intent_that_was_too_slow_is_closed() {
    let hanging = Hanging::start();
    let enroller = Caller::of(&hanging.broker, "enroller");
    let site = Arc::clone(&hanging.broker.site);
    hanging.hang();
    refused(enroller.create("ada", MATERIAL).await, "AUDIT_DOWN");
    hanging.go_on();
    let recovered = until("the intent to be closed", || {
        site.audit()
            .lines()
            .find(|line| line.contains("\"kind\":\"recovered\""))
            .map(|line| serde_json::from_str::<Value>(line).unwrap())
    });
    assert_eq!(recovered["outcome"], "failed");
    assert_eq!(recovered["user"], "ada");
    assert!(
        recovered["principal"]
            .as_str()
            .unwrap()
            .contains("enroller")
    );
    assert!(recovered["record_id"].is_string());
    refused(enroller.get("ada").await, "KEY_NOT_FOUND");
    enroller.create("ada", MATERIAL).await.unwrap();

    let (site, status) = hanging.broker.stop();
    assert!(status.success(), "{status}");
    let verified = site.expect_ok(&["audit", "verify", "-o", "json"]);
    let verified: Value = serde_json::from_str(&verified).unwrap();
    assert_eq!(
        (&verified["problems"], &verified["open_intents"]),
        (&0.into(), &0.into())
    );
}
