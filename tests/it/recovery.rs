//! The token goes away and comes back: no restart by hand, and nothing wrong is released meanwhile.

use std::{fs, os::unix::fs::PermissionsExt as _, process::Command, sync::Arc};

use rustix::process::Signal;
use tonic::Code;

use crate::{
    client::{Caller, eventually, reason},
    process::{Broker, send, until},
    site::{Options, Site},
};

const MATERIAL: &[u8] = b"material of this user";

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

/// Ten workers killed one after another: the front never dies, and a caller who tries again gets the right key.
#[tokio::test(flavor = "multi_thread")]
async fn many_killed_workers_never_end_the_front() {
    let broker = Broker::start(Options {
        workers: 2,
        ..Options::default()
    });
    let front = broker.pid();
    Caller::of(&broker, "enroller")
        .create("ada", MATERIAL)
        .await
        .unwrap();
    let releaser = Caller::of(&broker, "releaser");
    for _ in 0..10 {
        let pid = until("a worker", || broker.workers().first().copied());
        send(pid, Signal::KILL);
        for _ in 0..5 {
            let key = eventually(|| releaser.unwrap("ada")).await;
            assert_eq!(key.key_material, MATERIAL);
        }
        until("a replacement", || {
            let workers = broker.workers();
            (workers.len() == 2 && !workers.contains(&pid)).then_some(())
        });
    }
    assert_eq!(broker.pid(), front);
    let (site, status) = broker.stop();
    assert!(status.success(), "{status}");
    assert_eq!(site.log().matches("\"alarm\":\"bug\"").count(), 0);
}
