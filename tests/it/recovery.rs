//! The token goes away and comes back: no restart by hand, and nothing wrong is released meanwhile.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt as _,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::process::Signal;
use tokio::task::JoinSet;
use tonic::Code;

use crate::{
    client::{Caller, eventually, reason},
    process::{Broker, send, until},
    site::{Options, Site},
};

const MATERIAL: &[u8] = b"material of this user";
/// From one killed worker to the next.
const BETWEEN: Duration = Duration::from_millis(200);

/// The token directory is moved away while the workers die: no token is found until it is moved back.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_leaves_and_returns_serves_again() {
    let broker = Broker::start(Options::default());
    Caller::of(&broker, "enroller")
        .create("ada", MATERIAL)
        .await
        .unwrap();
    let releaser = Caller::of(&broker, "releaser");

    let directory = broker.site.token.directory();
    let away = directory.with_extension("away");
    for _ in 0..2 {
        fs::rename(&directory, &away).unwrap();
        fs::create_dir(&directory).unwrap();
        for pid in broker.workers() {
            send(pid, Signal::KILL);
        }
        until("the workers to be gone or to have failed", || {
            broker.site.log().contains("token-down").then_some(())
        });
        let status = releaser.unwrap("ada").await.unwrap_err();
        assert_eq!(
            (status.code(), reason(&status).as_str()),
            (Code::Unavailable, "TOKEN_DOWN"),
            "{status:?}"
        );

        fs::remove_dir_all(&directory).unwrap();
        fs::rename(&away, &directory).unwrap();
        let key = eventually(|| releaser.unwrap("ada")).await;
        assert_eq!(key.key_material, MATERIAL);
    }
}

/// An upgrade puts another binary in the place of this one: the workers of a running broker stay of its own version.
#[tokio::test(flavor = "multi_thread")]
async fn a_replaced_worker_is_the_binary_that_runs() {
    let site = Arc::new(Site::fresh(Options::default()));
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("keybroker");
    fs::copy(env!("CARGO_BIN_EXE_keybroker"), &program).unwrap();
    let broker = Broker::start_as(site, |site| {
        let plain = site.serve();
        let mut command = Command::new(&program);
        command.args(plain.get_args());
        command
    });
    fs::remove_file(&program).unwrap();
    fs::write(&program, "#!/bin/sh\nexit 1\n").unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let worker = until("a worker", || broker.workers().first().copied());
    send(worker, Signal::KILL);
    let enroller = Caller::of(&broker, "enroller");
    eventually(|| enroller.create("ada", MATERIAL)).await;
    let replacement = until("a replacement", || broker.workers().first().copied());
    assert_ne!(replacement, worker);
    let ours = fs::read_link(format!("/proc/{}/exe", broker.pid())).unwrap();
    let theirs = fs::read_link(format!("/proc/{replacement}/exe")).unwrap();
    assert_eq!(theirs, ours);
}

/// Workers killed one after another under load. What a killed worker had in its hands is lost, because it may be what killed
/// it; nothing else is, whoever calls, and the front never dies.
///
/// `KEYBROKER_TEST_WORKER_KILLS=100` kills so many; the suite makes do with ten.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_costs_the_calls_in_its_hands_and_no_more() {
    const CALLERS: usize = 16;
    const SESSIONS: usize = 4;
    let kills = env::var("KEYBROKER_TEST_WORKER_KILLS").map_or(10, |text| text.parse().unwrap());
    let broker = Broker::start(Options {
        workers: 2,
        sessions_per_worker: SESSIONS,
        ..Options::default()
    });
    let front = broker.pid();
    Caller::of(&broker, "enroller")
        .create("ada", MATERIAL)
        .await
        .unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let mut load = JoinSet::new();
    for _ in 0..CALLERS {
        load.spawn(unwrap_until(
            Caller::of(&broker, "releaser"),
            Arc::clone(&stop),
        ));
    }
    let mut slowest = Duration::ZERO;
    for kill in 0..kills {
        let pid = until("a worker", || broker.workers().first().copied());
        let killed = Instant::now();
        send(pid, Signal::KILL);
        until("a replacement that serves", || {
            let ready = broker.site.log().matches("token worker ready").count();
            (ready == 2 + kill + 1).then_some(())
        });
        slowest = slowest.max(killed.elapsed());
        tokio::time::sleep(BETWEEN).await;
    }
    stop.store(true, Ordering::Relaxed);
    let (mut calls, mut failures) = (0, 0);
    while let Some(seen) = load.join_next().await {
        let (called, failed) = seen.unwrap();
        calls += called;
        failures += failed;
    }
    println!(
        "{kills} workers killed: {failures} of {calls} calls failed; replaced within {slowest:?}"
    );
    assert!(calls > kills * CALLERS, "{calls}");
    assert!(failures <= kills * SESSIONS, "{failures}");
    assert_eq!(broker.pid(), front);
    let (site, status) = broker.stop();
    assert!(status.success(), "{status}");
    assert_eq!(site.log().matches("\"alarm\":\"bug\"").count(), 0);
}

/// One call after another without a second try; returns how many, and how many of them failed.
async fn unwrap_until(releaser: Caller, stop: Arc<AtomicBool>) -> (usize, usize) {
    let (mut calls, mut failures) = (0, 0);
    while !stop.load(Ordering::Relaxed) {
        calls += 1;
        match releaser.unwrap("ada").await {
            Ok(key) => assert_eq!(key.key_material, MATERIAL),
            Err(status) => {
                assert_eq!(reason(&status), "TOKEN_DOWN", "{status:?}");
                failures += 1;
            }
        }
    }
    (calls, failures)
}
