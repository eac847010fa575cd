//! What a crash tears is set aside; what somebody changed is found and not written on.

use std::{fs, path::Path, process::Command};

use keybroker_audit::{AuditLog, verify};

use crate::{SEGMENT, assert_whole, decision, folder, open, segment, until};

fn copy_log(from: &Path, to: &Path) {
    let status = Command::new("cp")
        .arg("-a")
        .args([from, to])
        .status()
        .unwrap();
    assert!(status.success());
}

/// Cut at every byte of its last line, a log opens, sets the rest aside, says so, and goes on without a gap.
#[tokio::test]
async fn a_torn_tail_is_set_aside_wherever_it_is_torn() {
    let (_folder, path) = folder();
    let log = open(&path);
    log.append(decision()).await.unwrap();
    log.append(decision()).await.unwrap();
    drop(log);
    let whole = until("the writer to end", || fs::read(segment(&path)).ok());
    let last_line = whole[..whole.len() - 1]
        .iter()
        .rposition(|b| *b == b'\n')
        .unwrap()
        + 1;
    for cut in last_line + 1..whole.len() {
        let (_folder, copy) = folder();
        copy_log(&path, &copy);
        fs::write(segment(&copy), &whole[..cut]).unwrap();
        let log = open(&copy);
        log.append(decision()).await.unwrap();
        let tail = log.tail(10).unwrap().join("\n");
        let said = format!(
            "\"action\":\"log.torn_tail_set_aside\",\"bytes\":{}",
            cut - last_line
        );
        assert!(tail.contains(&said), "{tail}");
        log.close();
        let report = verify(&copy).unwrap();
        assert_eq!(report.problems, Vec::<String>::new(), "cut at {cut}");
        assert_eq!(report.torn_tails, 1);
        let torn = fs::read_dir(&copy)
            .unwrap()
            .flatten()
            .find(|entry| entry.file_name().to_string_lossy().starts_with("torn-"));
        assert_eq!(
            fs::read(torn.unwrap().path()).unwrap(),
            &whole[last_line..cut]
        );
    }
}

#[tokio::test]
async fn what_was_changed_is_found() {
    let (_folder, path) = folder();
    let log = open(&path);
    for _ in 0..5 {
        log.append(decision()).await.unwrap();
    }
    log.close();
    let file = segment(&path);
    let good = fs::read_to_string(&file).unwrap();
    let lines: Vec<&str> = good.lines().collect();
    let rebuilt = |lines: Vec<&str>| lines.join("\n") + "\n";
    let mut dropped = lines.clone();
    dropped.remove(2);
    let mut swapped = lines.clone();
    swapped.swap(2, 3);
    let mut doubled = lines.clone();
    doubled.insert(2, lines[2]);
    let spaced = good.replacen(',', ", ", 1);
    let cases = [
        ("dropped", rebuilt(dropped)),
        ("swapped", rebuilt(swapped)),
        ("doubled", rebuilt(doubled)),
        ("not canonical", spaced),
        ("cut in the middle", good.replacen("\"kind\"", "", 1)),
        (
            "another log",
            good.replace("\"log_id\":\"", "\"log_id\":\"0"),
        ),
    ];
    assert_eq!(verify(&path).unwrap().problems, Vec::<String>::new());
    for (what, text) in cases {
        fs::write(&file, text).unwrap();
        assert_ne!(
            verify(&path).unwrap().problems,
            Vec::<String>::new(),
            "{what}"
        );
    }
}

/// An edit anywhere but in the last line is no torn tail: good lines follow, which a crash cannot leave behind a bad one. The
/// log is refused and left as it is, so that the auditors can see it.
#[tokio::test]
async fn an_edit_is_not_taken_for_a_torn_tail() {
    let (_folder, path) = folder();
    let log = open(&path);
    for _ in 0..20 {
        log.append(decision()).await.unwrap();
    }
    log.close();
    let file = segment(&path);
    let good = fs::read(&file).unwrap();
    let ends: Vec<usize> = (0..good.len()).filter(|at| good[*at] == b'\n').collect();
    for line in [0, 1, 10, ends.len() - 2] {
        let mut edited = good.clone();
        edited[ends[line] - 5] ^= 0x80;
        fs::write(&file, &edited).unwrap();
        let error = AuditLog::open(&path, SEGMENT).unwrap_err().to_string();
        assert!(error.contains("damaged at byte"), "{error}");
        assert!(error.contains("`audit.instance`"), "{error}");
        assert_eq!(fs::read(&file).unwrap(), edited);
        assert_eq!(fs::read_dir(&path).unwrap().count(), 3, "nothing was made");
        assert_eq!(verify(&path).unwrap().problems.len(), 2, "line {line}");
    }
    fs::write(&file, &good).unwrap();
    open(&path).close();
    assert_whole(&path);
}

/// More than one group cannot be torn.
#[tokio::test]
async fn a_long_tail_is_not_torn() {
    let (_folder, path) = folder();
    open(&path).close();
    let file = segment(&path);
    let mut bytes = fs::read(&file).unwrap();
    bytes.resize(bytes.len() + (4 << 20) + 1, 0);
    fs::write(&file, &bytes).unwrap();
    let error = AuditLog::open(&path, SEGMENT).unwrap_err().to_string();
    assert!(error.contains("damaged at byte"), "{error}");
}

/// A number that no log reaches is no reason to panic.
#[tokio::test]
async fn numbers_without_a_successor_are_not_canonical() {
    let (_folder, path) = folder();
    open(&path).close();
    let file = segment(&path);
    let good = fs::read_to_string(&file).unwrap();
    for number in [u64::MAX, 1 << 53] {
        let edited = good.replace("\"sequence\":3,", &format!("\"sequence\":{number},"));
        assert_ne!(edited, good);
        fs::write(&file, &edited).unwrap();
        let report = verify(&path).unwrap();
        assert_eq!(report.problems.len(), 1, "{report:?}");
        assert_eq!(report.last_sequence, 2);
        // As the last line it may be torn.
        open(&path).close();
        assert_whole(&path);
        fs::write(&file, &good).unwrap();
        for later in crate::segments(&path).into_iter().skip(1) {
            fs::remove_file(later).unwrap();
        }
    }
    fs::write(path.join(format!("{}.jsonl", u64::MAX)), "").unwrap();
    open(&path).close();
    assert_whole(&path);
}
