//! What bad input gets, where several layers take part: requests over the wire, and a host that does not give what the
//! broker needs. A clear answer, and nothing lost or half done.

use std::{fs, net::TcpListener, os::unix::fs::PermissionsExt as _, process::Command, sync::Arc};

use tonic::Code;
use tonic_types::StatusExt as _;

use crate::{
    client::{Caller, eventually, refused},
    process::Broker,
    site::{Options, Site},
};

const MATERIAL: &[u8] = b"material of this user";

#[tokio::test(flavor = "multi_thread")]
async fn malformed_requests_name_the_field() {
    let broker = Broker::start(Options::default());
    let enroller = Caller::of(&broker, "enroller");
    let long = "x".repeat(256);
    let cases: [(&str, &[u8], &str); 7] = [
        ("", MATERIAL, "user"),
        (&long, MATERIAL, "user"),
        ("line\nfeed", MATERIAL, "user"),
        ("delete\u{7f}", MATERIAL, "user"),
        ("c1\u{85}control", MATERIAL, "user"),
        ("ada", b"", "key_material"),
        ("ada", &[0x42; 191], "key_material"),
    ];
    for (user, material, field) in cases {
        let status = refused(enroller.create(user, material).await, "REQUEST");
        assert_eq!(status.code(), Code::InvalidArgument);
        let violations = status.get_details_bad_request().unwrap().field_violations;
        let fields: Vec<_> = violations
            .iter()
            .map(|violation| violation.field.as_str())
            .collect();
        assert_eq!(fields, [field], "{user:?}");
    }
    // The limits themselves are good.
    enroller.create(&long[..255], &[0x42; 190]).await.unwrap();
    enroller.create("a", &[0x43; 1]).await.unwrap();
    let releaser = Caller::of(&broker, "releaser");
    assert_eq!(
        releaser.unwrap(&long[..255]).await.unwrap().key_material,
        [0x42; 190]
    );
    assert_eq!(releaser.unwrap("a").await.unwrap().key_material, [0x43; 1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_keys_and_stale_revisions_change_nothing() {
    let broker = Broker::start(Options::default());
    let [enroller, releaser, lifecycle] =
        ["enroller", "releaser", "lifecycle"].map(|name| Caller::of(&broker, name));

    let status = refused(releaser.unwrap("nobody").await, "KEY_NOT_FOUND");
    assert_eq!(status.code(), Code::NotFound);
    refused(
        enroller.replace("nobody", MATERIAL, 1, "").await,
        "KEY_NOT_FOUND",
    );
    refused(lifecycle.delete("nobody", 1).await, "KEY_NOT_FOUND");
    refused(lifecycle.undelete("nobody").await, "KEY_NOT_FOUND");

    enroller.create("ada", MATERIAL).await.unwrap();
    enroller
        .replace("ada", b"the second material", 1, "")
        .await
        .unwrap();
    for stale in [1, 3, u64::MAX >> 1] {
        let status = refused(
            enroller.replace("ada", MATERIAL, stale, "").await,
            "REVISION",
        );
        assert_eq!(status.code(), Code::Aborted);
        refused(lifecycle.delete("ada", stale).await, "REVISION");
        refused(lifecycle.restore("ada", 1, stale).await, "REVISION");
    }
    refused(enroller.replace("ada", MATERIAL, 0, "").await, "REQUEST");
    refused(lifecycle.restore("ada", 2, 2).await, "REQUEST");
    let status = refused(enroller.create("ada", MATERIAL).await, "KEY_EXISTS");
    assert_eq!(status.code(), Code::AlreadyExists);

    let key = releaser.unwrap("ada").await.unwrap();
    assert_eq!(
        (key.key_material.as_slice(), key.revision),
        (b"the second material".as_slice(), 2)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_id_makes_a_retry_safe() {
    let broker = Broker::start(Options::default());
    let enroller = Caller::of(&broker, "enroller");
    let id = uuid::Uuid::new_v4().to_string();

    let first = enroller.create_with_id("ada", MATERIAL, &id).await.unwrap();
    let again = enroller.create_with_id("ada", MATERIAL, &id).await.unwrap();
    assert_eq!(first, again, "the same answer");

    // Also when the record has moved on, and after a restart.
    enroller
        .replace("ada", b"the second material", 1, "")
        .await
        .unwrap();
    let (site, _) = broker.stop();
    let broker = Broker::start_on(site);
    let enroller = Caller::of(&broker, "enroller");
    assert_eq!(
        enroller.create_with_id("ada", MATERIAL, &id).await.unwrap(),
        first
    );

    for (user, material) in [("ada", b"other material".as_slice()), ("bob", MATERIAL)] {
        let status = refused(
            enroller.create_with_id(user, material, &id).await,
            "REQUEST_ID_REUSED",
        );
        assert_eq!(status.code(), Code::InvalidArgument);
    }
    refused(
        enroller.replace("ada", MATERIAL, 2, &id).await,
        "REQUEST_ID_REUSED",
    );
    refused(
        enroller.create_with_id("bob", MATERIAL, "not a uuid").await,
        "REQUEST",
    );

    let releaser = Caller::of(&broker, "releaser");
    assert_eq!(
        releaser.unwrap("ada").await.unwrap().key_material,
        b"the second material"
    );
    refused(releaser.unwrap("bob").await, "KEY_NOT_FOUND");
}

#[test]
fn a_second_broker_on_the_same_site_is_refused() {
    let broker = Broker::start(Options::default());
    let second = broker.site.serve_to_its_end();
    assert_eq!(second.code, Some(9), "{}", second.stderr);
    assert!(second.stderr.contains("in use"), "{}", second.stderr);
    let (_, status) = broker.stop();
    assert!(
        status.success(),
        "the first one was not disturbed: {status}"
    );
}

#[test]
fn a_taken_port_is_named() {
    let site = Site::fresh(Options::default());
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for line in ["apis = [\"grpc\", \"admin\"]", "[status]"] {
        site.write_configuration(|text| {
            let (before, after) = match line {
                "[status]" => text
                    .split_once("[status]\naddress = \"127.0.0.1:0\"")
                    .unwrap(),
                _ => text
                    .split_once("[[listener]]\naddress = \"127.0.0.1:0\"")
                    .unwrap(),
            };
            let section = if line == "[status]" {
                line
            } else {
                "[[listener]]"
            };
            *text = format!("{before}{section}\naddress = \"{address}\"{after}");
        });
        let finished = site.serve_to_its_end();
        assert_eq!(finished.code, Some(9), "{}", finished.stderr);
        assert!(finished.stderr.contains(&address), "{}", finished.stderr);
    }
}

#[test]
fn a_database_of_a_newer_schema_is_refused_and_left_alone() {
    let site = Site::fresh(Options::default());
    site.sql(
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
         VALUES (9999, 'from the future', 1, x'00', 0)",
    );
    let before = fs::read(site.database()).unwrap();
    for arguments in [
        &["store", "migrate"][..],
        &["key", "generate", "--bits", "2048"],
    ] {
        let finished = site.run(arguments);
        assert_eq!(finished.code, Some(7), "{arguments:?}: {finished:?}");
    }
    let finished = site.serve_to_its_end();
    assert_eq!(finished.code, Some(7), "{}", finished.stderr);
    assert!(finished.stderr.contains("newer"), "{}", finished.stderr);
    assert_eq!(fs::read(site.database()).unwrap(), before);
}

/// The brokers of two releases serve one database during an upgrade, also when one of the old release is started again.
#[test]
fn a_broker_serves_from_a_newer_schema_that_only_adds_to_its_own_and_says_so() {
    let site = Arc::new(Site::fresh(Options::default()));
    let newest = site.sql("SELECT max(version) FROM _sqlx_migrations");
    site.sql(&format!(
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
         VALUES (9999, 'from the future usable from {}', 1, x'00', 0)",
        newest.trim()
    ));
    let status = site.expect_ok(&["-o", "json", "store", "status"]);
    assert!(status.contains("\"ready\": true"), "{status}");
    for migrates in [false, true] {
        site.write_configuration(|text| {
            let section = format!("[store]\nmigrate_at_start = {migrates}");
            *text = text.replace("[store]", &section);
        });
        let broker = Broker::start_on(Arc::clone(&site));
        assert!(broker.site.log().contains("upgrade this broker, too"));
        drop(broker);
    }
    let finished = site.run(&["store", "migrate"]);
    assert_eq!(finished.code, Some(7), "{finished:#?}");
}

#[test]
fn a_database_that_was_never_migrated_is_refused_with_the_remedy() {
    let site = Site::without_keys(Options::default());
    let finished = site.serve_to_its_end();
    assert_eq!(finished.code, Some(7), "{}", finished.stderr);
    assert!(
        finished.stderr.contains("store migrate"),
        "{}",
        finished.stderr
    );
}

#[test]
fn an_audit_directory_that_cannot_be_written_is_refused_at_start() {
    let site = Site::fresh(Options::default());
    fs::remove_dir_all(site.audit_directory()).unwrap();
    fs::write(
        site.audit_directory(),
        "a file where the directory should be",
    )
    .unwrap();
    let finished = site.serve_to_its_end();
    assert_eq!(finished.code, Some(8), "{}", finished.stderr);
    assert!(
        finished
            .stderr
            .contains(site.audit_directory().to_str().unwrap()),
        "{}",
        finished.stderr
    );
}

/// The disk of the audit log is full: no key is released and nothing is changed; when there is room again, all goes on.
#[tokio::test(flavor = "multi_thread")]
async fn without_audit_no_key_is_released() {
    let broker = Broker::start_limited(Arc::new(Site::fresh(Options::default())));
    let enroller = Caller::of(&broker, "enroller");
    let releaser = Caller::of(&broker, "releaser");
    enroller.create("ada", MATERIAL).await.unwrap();

    limit_files(&broker, 0);
    for _ in 0..3 {
        let status = refused(releaser.unwrap("ada").await, "AUDIT_DOWN");
        assert_eq!(status.code(), Code::Unavailable);
        assert!(status.get_details_retry_info().is_some());
        refused(enroller.create("bob", MATERIAL).await, "AUDIT_DOWN");
    }
    unlimit_files(&broker);
    let key = eventually(|| releaser.unwrap("ada")).await;
    assert_eq!(key.key_material, MATERIAL);
    refused(releaser.unwrap("bob").await, "KEY_NOT_FOUND");

    let (site, status) = broker.stop();
    assert!(status.success(), "{status}");
    site.expect_ok(&["audit", "verify"]);
}

/// The disk of the database is full while the audit log still has room: the mutation is refused and its intent closed,
/// releases go on, and with room again everything works.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_loses_nothing() {
    let broker = Broker::start_limited(Arc::new(Site::fresh(Options::default())));
    let enroller = Caller::of(&broker, "enroller");
    let releaser = Caller::of(&broker, "releaser");
    for number in 0..24 {
        enroller
            .create(&format!("user {number}"), MATERIAL)
            .await
            .unwrap();
    }
    let log_bytes = u64::try_from(broker.site.audit().len()).unwrap();
    let wal = broker.site.database().with_extension("db-wal");
    let limit = log_bytes + 64 * 1024;
    assert!(
        fs::metadata(wal).unwrap().len() > limit,
        "the limit stops the database first"
    );

    limit_files(&broker, limit);
    for _ in 0..3 {
        let status = refused(enroller.create("late", MATERIAL).await, "STORE_DOWN");
        assert_eq!(status.code(), Code::Unavailable);
    }
    assert_eq!(
        releaser.unwrap("user 7").await.unwrap().key_material,
        MATERIAL
    );
    refused(releaser.unwrap("late").await, "KEY_NOT_FOUND");
    unlimit_files(&broker);
    let enroller = &enroller;
    eventually(|| enroller.create("late", MATERIAL)).await;

    let (site, status) = broker.stop();
    assert!(status.success(), "{status}");
    assert_eq!(site.sql("PRAGMA integrity_check").trim(), "ok");
    assert_eq!(site.sql("SELECT count(*) FROM records").trim(), "25");
    site.expect_ok(&["audit", "verify"]);
}

/// Root may write to files that nobody may write, so a read-only mount of its own stands in for the mode.
#[test]
fn a_read_only_database_is_refused_at_start() {
    let site = Site::fresh(Options::default());
    let folder = site.data_directory();
    let command = if rustix::process::geteuid().is_root() {
        let folder = folder.display();
        let line = format!(
            "mount --bind '{folder}' '{folder}' && mount -o remount,bind,ro '{folder}' && exec \"$0\" \"$@\""
        );
        let shell = site.serve_through(&line);
        let mut unshared = Command::new("unshare");
        unshared
            .arg("--mount")
            .arg(shell.get_program())
            .args(shell.get_args());
        unshared
    } else {
        fs::set_permissions(site.database(), fs::Permissions::from_mode(0o400)).unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o500)).unwrap();
        site.serve()
    };
    let finished = site.run_to_its_end(command);
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).unwrap();
    assert_eq!(finished.code, Some(7), "{}", finished.stderr);
    assert!(
        finished.stderr.contains("keybroker.db"),
        "{}",
        finished.stderr
    );
}

/// Sets the soft limit of the front's file sizes: a full disk that needs no root and no mount.
pub(crate) fn limit_files(broker: &Broker, bytes: u64) {
    prlimit(broker, &format!("--fsize={bytes}:"));
}

pub(crate) fn unlimit_files(broker: &Broker) {
    prlimit(broker, "--fsize=unlimited:");
}

fn prlimit(broker: &Broker, limit: &str) {
    let status = Command::new("prlimit")
        .args(["--pid", &broker.pid().to_string(), limit])
        .status()
        .unwrap();
    assert!(status.success(), "prlimit {limit}");
}
