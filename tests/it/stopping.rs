//! Ctrl-C and SIGTERM at every stage: the broker ends in time, leaves no process behind, and can be started again.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use rustix::process::Signal;

use crate::{
    client::Caller,
    process::{Broker, children_of, is_alive, send, until},
    site::{Options, Site},
};

/// From before `main` to after the ready file.
const MOMENTS_MS: [u64; 9] = [0, 5, 15, 40, 80, 150, 300, 600, 1_200];

#[test]
fn sigterm_during_start_leaves_nothing_behind() {
    stop_during_start(Signal::TERM);
}

#[test]
fn ctrl_c_during_start_leaves_nothing_behind() {
    stop_during_start(Signal::INT);
}

fn stop_during_start(signal: Signal) {
    let site = Arc::new(Site::fresh(Options::default()));
    for moment in MOMENTS_MS {
        let mut child = site.spawn(site.serve());
        thread::sleep(Duration::from_millis(moment));
        let workers = children_of(child.id());
        let sent = Instant::now();
        send(child.id(), signal);
        let status = until("the broker to end", || child.try_wait().unwrap());
        assert!(
            sent.elapsed() < Duration::from_secs(5),
            "after {moment} ms: took {:?}",
            sent.elapsed()
        );
        // Before the handlers are there, the signal's default action ends the process.
        let code = status.code();
        assert!(
            matches!(code, None | Some(0 | 130)),
            "after {moment} ms: {status}\n{}",
            site.log()
        );
        until("its workers to end", || {
            workers.iter().all(|pid| !is_alive(*pid)).then_some(())
        });
    }
    // Locks, database and audit log are as a clean stop leaves them.
    let broker = Broker::start_on(site);
    let (site, status) = broker.stop();
    assert!(status.success(), "{status}");
    site.expect_ok(&["audit", "verify"]);
}

/// Calls under way when the signal comes are answered.
#[tokio::test(flavor = "multi_thread")]
async fn sigterm_drains_open_calls() {
    let broker = Broker::start(Options::default());
    Caller::of(&broker, "enroller")
        .create("ada", b"material of ada")
        .await
        .unwrap();
    let releaser = Caller::of(&broker, "releaser");
    releaser.unwrap("ada").await.unwrap();

    let calls: Vec<_> = (0..32)
        .map(|_| {
            let releaser = releaser.clone();
            tokio::spawn(async move { releaser.unwrap("ada").await })
        })
        .collect();
    until("the calls to arrive", || {
        (broker.site.audit().matches("user_key.unwrap").count() > 4).then_some(())
    });
    let workers = broker.workers();
    let (_, status) = tokio::task::spawn_blocking(|| broker.stop()).await.unwrap();
    assert!(status.success(), "{status}");
    for call in calls {
        assert_eq!(
            call.await.unwrap().unwrap().key_material,
            b"material of ada"
        );
    }
    until("the workers to end", || {
        workers.iter().all(|pid| !is_alive(*pid)).then_some(())
    });
}
