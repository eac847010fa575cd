//! A disk or a process without room: the log refuses, leaves nothing behind, and goes on by itself.

use std::{env, fs::File, path::Path, time::Duration};

use keybroker_audit::AuditLog;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::{CHILD, assert_whole, child, decision, folder, segments, until};

/// Runs the rest of a test in a separate process.
fn in_a_child(test: &str) -> bool {
    if env::var_os(CHILD).is_some() {
        return false;
    }
    let (_folder, path) = folder();
    let output = child(&format!("disk::{test}"), &path).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{out}\n{err}");
    assert!(path.exists(), "the test ran");
    assert_whole(&path);
    true
}

fn limit(resource: Resource, to: Option<u64>) {
    let maximum = getrlimit(resource).maximum;
    setrlimit(
        resource,
        Rlimit {
            current: to.or(maximum),
            maximum,
        },
    )
    .unwrap();
}

fn log_of_child(segment_bytes_max: u64) -> AuditLog {
    let path = env::var_os(CHILD).unwrap();
    AuditLog::open(Path::new(&path), segment_bytes_max)
        .unwrap()
        .0
}

fn segments_of_child() -> usize {
    segments(Path::new(&env::var_os(CHILD).unwrap())).len()
}

/// No descriptor is left to sync the directory with, after the new segment has taken the last one: when there are some
/// again, the log goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_cannot_be_synced_once_is_no_end() {
    if in_a_child("a_directory_that_cannot_be_synced_once_is_no_end") {
        return;
    }
    // Each entry fills its segment.
    let log = log_of_child(1);
    log.append(decision()).await.unwrap();
    // Its first line is written when nothing else is open any more.
    until("the next segment", || {
        let second = segments(Path::new(&env::var_os(CHILD).unwrap()))
            .into_iter()
            .nth(1)?;
        (second.metadata().unwrap().len() > 0).then_some(())
    });
    let before = segments_of_child();
    limit(Resource::Nofile, Some(128));
    let taken: Vec<File> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
    log.append(decision()).await.unwrap();
    for _ in 0..5 {
        let error = until("the log to be down", || log.writable().err());
        assert!(error.to_string().contains("cannot sync"), "{error}");
        assert!(log.append(decision()).await.is_err());
    }
    drop(taken);
    assert_eq!(segments_of_child(), before + 1);
    until("the log to be writable", || log.writable().ok());
    log.append(decision()).await.unwrap();
    log.close();
}

/// A full disk takes files, but nothing into them: however often the log tries, it leaves one.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_gets_no_new_segment_per_attempt() {
    if in_a_child("a_full_disk_gets_no_new_segment_per_attempt") {
        return;
    }
    let log = log_of_child(1 << 20);
    log.append(decision()).await.unwrap();
    let before = segments_of_child();
    limit(Resource::Fsize, Some(100));
    for _ in 0..20 {
        assert!(log.append(decision()).await.is_err());
    }
    // Two attempts without being asked.
    tokio::time::sleep(Duration::from_millis(1_200)).await;
    assert!(segments_of_child() <= before + 1, "{}", segments_of_child());
    limit(Resource::Fsize, None);
    until("the log to be writable", || log.writable().ok());
    log.append(decision()).await.unwrap();
    log.close();
    assert!(segments_of_child() <= before + 1, "{}", segments_of_child());
}
