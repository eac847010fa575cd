//! The audit log by its public face: what is acknowledged is there, what is wrong is found, what is damaged is set aside.

#![allow(
    clippy::unwrap_used,
    reason = "a test that meets a surprise stops there"
)]

#[path = "audit/damage.rs"]
mod damage;
#[path = "audit/disk.rs"]
mod disk;
#[path = "audit/recovery.rs"]
mod recovery;
#[path = "audit/tail.rs"]
mod tail;
#[path = "audit/tampering.rs"]
mod tampering;

use std::{
    env, fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use keybroker_audit::{AuditLog, Entry, EntryKind, Outcome, verify};
use keybroker_core::call::CallId;
use tempfile::TempDir;
use tokio::task::JoinSet;

const SEGMENT: u64 = 1 << 20;

/// A folder in which a log may be made.
fn folder() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    (folder, log)
}

fn open(path: &Path) -> AuditLog {
    AuditLog::open(path, SEGMENT).unwrap().0
}

fn entry(kind: EntryKind, call: CallId) -> Entry {
    let mut entry = Entry::new(kind, "user_key.create", Outcome::Ok);
    entry.call_id = Some(call);
    entry
}

fn decision() -> Entry {
    entry(EntryKind::Decision, CallId::fresh())
}

fn segments(log: &Path) -> Vec<PathBuf> {
    let mut segments: Vec<_> = fs::read_dir(log)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "jsonl"))
        .collect();
    segments.sort();
    segments
}

/// The newest segment.
fn segment(log: &Path) -> PathBuf {
    segments(log).pop().unwrap()
}

fn assert_whole(log: &Path) {
    assert_eq!(verify(log).unwrap().problems, Vec::<String>::new());
}

/// The test of that name in a separate process, with `path` in its environment: for what changes the whole process.
fn child(test: &str, path: &Path) -> Command {
    let mut command = Command::new("sh");
    // A write beyond the limit of file sizes is then an error and no signal.
    command
        .args(["-c", "trap '' XFSZ; exec \"$0\" \"$@\""])
        .arg(env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env(CHILD, path);
    command
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_entries_at_once_leave_no_gap() {
    let (_folder, path) = folder();
    let log = open(&path);
    let mut tasks = JoinSet::new();
    for _ in 0..50 {
        let log = log.clone();
        tasks.spawn(async move {
            let mut last = 0;
            for _ in 0..20 {
                let sequence = log.append(decision()).await.unwrap();
                assert!(sequence > last);
                last = sequence;
            }
        });
    }
    tasks.join_all().await;
    log.close();
    let report = verify(&path).unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
    assert!(report.entries >= 1_000);
    assert_eq!(report.last_sequence, report.entries);
}

/// An entry in no hurry waits for others, but not less long than its sync.
#[tokio::test(flavor = "multi_thread")]
async fn an_unhurried_entry_is_in_the_file_before_its_answer() {
    let (_folder, path) = folder();
    let log = open(&path);
    let mut tasks = JoinSet::new();
    for caller in 0..20 {
        let (log, path) = (log.clone(), path.clone());
        tasks.spawn(async move {
            for _ in 0..10 {
                let call = CallId::fresh();
                let entry = entry(EntryKind::Decision, call);
                if caller % 4 == 0 {
                    log.append(entry).await.unwrap();
                } else {
                    log.append_unhurried(entry).await.unwrap();
                }
                let lines = fs::read_to_string(segment(&path)).unwrap();
                assert!(lines.contains(&call.to_string()));
            }
        });
    }
    tasks.join_all().await;
    log.close();
    assert_whole(&path);
    assert!(verify(&path).unwrap().entries >= 200);
}

#[tokio::test]
async fn the_sequence_goes_on_after_a_restart() {
    let (_folder, path) = folder();
    let log = open(&path);
    let first = log.append(decision()).await.unwrap();
    log.close();
    let log = open(&path);
    let second = log.append(decision()).await.unwrap();
    assert!(second > first);
    let tail = log.tail(3).unwrap();
    assert!(
        tail.last()
            .unwrap()
            .contains(&format!("\"sequence\":{second},"))
    );
    log.close();
    assert_whole(&path);
}

fn until<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        if let Some(found) = probe() {
            return found;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("waited for {what}");
}

#[tokio::test]
async fn a_log_has_one_writer() {
    let (_folder, path) = folder();
    let log = open(&path);
    let error = AuditLog::open(&path, SEGMENT).unwrap_err();
    assert!(error.in_use(), "{error}");
    assert!(
        error.to_string().contains(&std::process::id().to_string()),
        "{error}"
    );
    log.close();
}

#[test]
fn a_directory_that_others_can_use_is_refused() {
    let (_folder, path) = folder();
    fs::create_dir(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    let error = AuditLog::open(&path, SEGMENT).unwrap_err().to_string();
    assert!(
        error.contains("mode 0755") && error.contains("chmod 700"),
        "{error}"
    );
    let orphan = path.join("none").join("log");
    let error = AuditLog::open(&orphan, SEGMENT).unwrap_err().to_string();
    assert!(error.contains("parent directory"), "{error}");
}

/// A file that was unlinked or replaced takes writes that nobody can read. What another process put there is not touched.
#[tokio::test]
async fn a_log_that_vanishes_refuses_every_entry() {
    for replace in [false, true] {
        let (_folder, path) = folder();
        let log = open(&path);
        log.append(decision()).await.unwrap();
        let file = segment(&path);
        fs::remove_file(&file).unwrap();
        let foreign = "what another process has put there\n".repeat(1_000);
        if replace {
            fs::write(&file, &foreign).unwrap();
        }
        for _ in 0..3 {
            assert!(log.append(decision()).await.is_err());
        }
        log.writable().unwrap_err();
        log.close();
        if replace {
            assert_eq!(fs::read_to_string(&file).unwrap(), foreign);
        }
        assert_eq!(segments(&path).len(), usize::from(replace));
    }
}

const CHILD: &str = "KEYBROKER_TEST_AUDIT_LOG";
const ROUNDS: u64 = 20;

async fn write_until_killed(path: &Path) {
    let log = open(path);
    for _ in 0..1_000_000_u32 {
        let sequence = log.append(decision()).await.unwrap();
        let mut stdout = std::io::stdout().lock();
        writeln!(stdout, "acknowledged {sequence}").unwrap();
        stdout.flush().unwrap();
    }
}

#[tokio::test]
async fn acknowledged_entries_survive_sigkill() {
    if let Some(path) = env::var_os(CHILD) {
        return write_until_killed(Path::new(&path)).await;
    }
    let (_folder, path) = folder();
    let mut acknowledged = Vec::new();
    for round in 0..ROUNDS {
        let mut child = child("acknowledged_entries_survive_sigkill", &path)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(40 + round * 5));
            child.kill().unwrap();
            child.wait().unwrap();
        });
        for line in lines.map_while(Result::ok) {
            if let Some((_, number)) = line.split_once("acknowledged ") {
                acknowledged.push(number.parse::<u64>().unwrap());
            }
        }
        killer.join().unwrap();
    }
    assert!(
        acknowledged.len() > 50,
        "only {} entries",
        acknowledged.len()
    );
    open(&path).close();
    let report = verify(&path).unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
    assert!(acknowledged.windows(2).all(|pair| pair[0] < pair[1]));
    assert!(
        acknowledged
            .iter()
            .all(|sequence| *sequence <= report.last_sequence)
    );
}
