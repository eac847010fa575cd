//! Faults of the token under live workers: it vanishes, it hangs, it is lost and restored from a backup.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use keybroker_proto::UnwrapUserKeyRequest;
use tonic::{Code, Request};

use crate::{
    client::{Caller, NAME, eventually, reason},
    process::{Broker, freeze, until},
    site::{Options, Site},
};

const MATERIAL: &[u8] = b"material of this user";
/// Far above what a refusal without a token call takes, also on a busy machine.
const AT_ONCE: Duration = Duration::from_millis(500);

async fn enrolled(options: Options) -> (Broker, Caller) {
    let broker = Broker::start(options);
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("ada", MATERIAL).await.unwrap();
    let releaser = Caller::of(&broker, "releaser");
    (broker, releaser)
}

/// SoftHSM goes on for a moment with what it has in memory and then shows an empty token. The canary finds out; nothing
/// is restarted by hand.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_directory_that_vanishes_under_live_workers_is_noticed() {
    let (broker, releaser) = enrolled(Options {
        workers: 2,
        ..Options::default()
    })
    .await;
    let directory = broker.site.token.directory();
    let away = directory.with_extension("away");
    let moved = Instant::now();
    fs::rename(&directory, &away).unwrap();
    // Whatever it is asked meanwhile, it is never said to be forged or foreign: it is away.
    while !broker.site.log().contains("token-down") {
        let answered = releaser.unwrap("ada").await;
        let said = answered.err().map(|status| reason(&status));
        assert!(
            matches!(said.as_deref(), None | Some("TOKEN_DOWN")),
            "{said:?}"
        );
        assert!(moved.elapsed() < Duration::from_secs(10));
    }
    assert!(
        moved.elapsed() < Duration::from_secs(10),
        "{:?}",
        moved.elapsed()
    );
    let asked = Instant::now();
    let status = releaser.unwrap("ada").await.unwrap_err();
    assert!(asked.elapsed() < AT_ONCE, "{:?}", asked.elapsed());
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::Unavailable, "TOKEN_DOWN")
    );
    // It comes back file by file: for a while it is there, and its keys are not.
    let whole = directory.with_extension("whole");
    fs::rename(&away, &whole).unwrap();
    copy(&whole, &directory);
    let keys = without_objects(&directory);
    until("a worker that misses its keys", || {
        broker
            .site
            .log()
            .contains("is not on the token")
            .then_some(())
    });
    for key in &keys {
        let file = key.strip_prefix(&directory).unwrap();
        copy(&whole.join(file), key);
    }
    let returned = Instant::now();
    let key = eventually(|| releaser.unwrap("ada")).await;
    assert_eq!(key.key_material, MATERIAL);
    assert!(
        returned.elapsed() < Duration::from_secs(5),
        "{:?}",
        returned.elapsed()
    );
    assert!(!broker.site.log().contains("token-untrusted"));
}

/// Removes the objects of a token and leaves the token; says which files they were.
fn without_objects(directory: &Path) -> Vec<PathBuf> {
    let mut removed = Vec::new();
    for token in fs::read_dir(directory).unwrap() {
        for entry in fs::read_dir(token.unwrap().path()).unwrap() {
            let path = entry.unwrap().path();
            let is_object = path.extension().is_some_and(|end| end == "object")
                && path.file_stem().is_some_and(|name| name != "token");
            if is_object {
                fs::remove_file(&path).unwrap();
                removed.push(path);
            }
        }
    }
    assert!(!removed.is_empty());
    removed
}

/// A worker that hangs inside the module: its callers are answered at their deadlines, and it is replaced.
#[tokio::test(flavor = "multi_thread")]
async fn a_hung_worker_is_replaced_and_deadlines_hold() {
    // The broker's own limit: a deadline that the client sends is also watched by the client, which may be the first to
    // say so, in other words.
    let (broker, releaser) = enrolled(Options {
        workers: 1,
        limits: "call_timeout_max_ms = 300".to_owned(),
        ..Options::default()
    })
    .await;
    let hung = until("a worker", || broker.workers().first().copied());
    freeze(hung);
    let request = Request::new(UnwrapUserKeyRequest {
        user: "ada".to_owned(),
        key_name: NAME.to_owned(),
        recipient: None,
    });
    let asked = Instant::now();
    let status = releaser
        .keys
        .clone()
        .unwrap_user_key(request)
        .await
        .unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::DeadlineExceeded, "DEADLINE")
    );
    assert!(asked.elapsed() >= Duration::from_millis(300));
    assert!(
        asked.elapsed() < Duration::from_millis(300) + AT_ONCE,
        "{:?}",
        asked.elapsed()
    );
    let key = eventually(|| releaser.unwrap("ada")).await;
    assert_eq!(key.key_material, MATERIAL);
    until("the hung worker to be gone", || {
        (!broker.workers().contains(&hung)).then_some(())
    });
}

fn copy(from: &Path, to: &Path) {
    let status = Command::new("cp")
        .arg("-a")
        .args([from, to])
        .status()
        .unwrap();
    assert!(status.success());
}

/// The documented backup and restore of a SoftHSM token, with the real commands.
#[tokio::test(flavor = "multi_thread")]
async fn a_restored_token_unwraps_what_the_lost_one_wrapped() {
    let (broker, _) = enrolled(Options::default()).await;
    let (site, _) = broker.stop();
    let directory = site.token.directory();
    let backup = directory.with_extension("backup");
    copy(&directory, &backup);
    fs::remove_dir_all(&directory).unwrap();
    fs::create_dir(&directory).unwrap();
    let lost = site.run(&["token", "check"]);
    assert_eq!(lost.code, Some(4), "{lost:?}");
    fs::remove_dir(&directory).unwrap();
    copy(&backup, &directory);
    site.expect_ok(&["token", "check"]);
    let confirmed = site.expect_ok(&["token", "backup-confirmed"]);
    assert!(confirmed.contains("backup_confirmed"), "{confirmed}");
    let checked = site.run(&["token", "check"]);
    assert!(!checked.stderr.contains("no backup"), "{checked:?}");
    let broker = Broker::start_on(Arc::clone(&site));
    let key = Caller::of(&broker, "releaser").unwrap("ada").await.unwrap();
    assert_eq!(key.key_material, MATERIAL);
}

/// `key register` completes a `key generate` that was cut short between the token and the database.
#[test]
fn an_interrupted_generate_is_completed() {
    let site = Site::without_keys(Options::default());
    site.expect_ok(&["store", "migrate"]);
    site.expect_ok(&["key", "generate", "--bits", "2048"]);
    let id = site
        .sql("SELECT lower(hex(key_id)) FROM wrapping_keys")
        .trim()
        .to_owned();
    site.sql("DELETE FROM wrapping_keys");
    let checked = site.run(&["token", "check"]);
    assert!(
        checked.stderr.contains(&format!("key register {id}")),
        "{checked:?}"
    );
    site.expect_ok(&["key", "register", &id]);
    let again = site.run(&["key", "register", &id]);
    assert_eq!(again.code, Some(6), "{again:?}");
    site.expect_ok(&["token", "check"]);
}
