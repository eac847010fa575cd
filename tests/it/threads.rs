//! How many threads the front keeps after a short peak of work that blocks.

use std::{fs, time::Duration};

use futures_util::future::join_all;
use keybroker_proto::TailAuditLogRequest;
use tokio::time::sleep;

use crate::{client::Caller, process::Broker, site::Options};

/// Calls at the same time, each of which reads a file on a thread of its own.
const PEAK: usize = 96;
/// Regular work after the peak: as often as a busy broker checks its files and keeps its counts.
const PAUSE: Duration = Duration::from_millis(250);
/// Threads that the regular work needs.
const MORE: usize = 5;
/// Number of regular calls until the threads of the peak must have ended: ten seconds.
const CALLS_MAX: usize = 40;

fn threads(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/task")).unwrap().count()
}

/// The runtime gives blocking work to its threads in turn. If a thread waited long for more work, little regular work would keep all
/// threads of a peak for ever.
#[tokio::test(flavor = "multi_thread")]
async fn the_threads_of_a_peak_end() {
    let broker = Broker::start(Options::default());
    let auditor = Caller::of(&broker, "auditor");
    let enroller = Caller::of(&broker, "enroller");
    for number in 0..50 {
        let user = format!("u{number}");
        enroller.create(&user, b"material of a user").await.unwrap();
    }
    let read = async || {
        let request = TailAuditLogRequest { limit: 100 };
        auditor.control.clone().tail_audit_log(request).await
    };
    read().await.unwrap();
    let before = threads(broker.pid());
    let watched = tokio::spawn({
        let pid = broker.pid();
        async move {
            let mut most = 0;
            for _ in 0..200 {
                most = most.max(threads(pid));
                sleep(Duration::from_millis(2)).await;
            }
            most
        }
    });
    for answer in join_all((0..PEAK).map(|_| read())).await {
        answer.unwrap();
    }
    let peak = watched.await.unwrap();
    assert!(peak > before + MORE, "{before} threads, {peak} at the peak");
    let mut left = peak;
    for _ in 0..CALLS_MAX {
        if left <= before + MORE {
            return;
        }
        sleep(PAUSE).await;
        read().await.unwrap();
        left = threads(broker.pid());
    }
    panic!("{before} threads before the peak, {peak} at the peak, {left} after it");
}
