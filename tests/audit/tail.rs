//! The end of a log, read from its end.

use std::{fs, io::Write as _};

use keybroker_audit::{AuditLog, Entry, EntryKind, Outcome, tail};

use crate::{decision, folder, segment, segments};

/// The same lines as reading all of it gives, across blocks and segments, for every number of lines.
#[tokio::test]
async fn the_tail_is_the_end_of_the_whole() {
    let (_folder, path) = folder();
    let (log, _) = AuditLog::open(&path, 200_000).unwrap();
    for number in 0_u32..1_500 {
        let mut entry = decision();
        entry.peer = Some("p".repeat(usize::try_from(number % 400).unwrap()));
        log.append(entry).await.unwrap();
    }
    let texts = segments(&path)
        .into_iter()
        .map(|path| fs::read_to_string(path).unwrap());
    let texts: Vec<String> = texts.collect();
    assert!(texts.len() > 2);
    let all: Vec<String> = texts.concat().lines().map(str::to_owned).collect();
    for limit in [
        0,
        1,
        2,
        50,
        199,
        500,
        1_000,
        all.len(),
        all.len() + 1,
        usize::MAX,
    ] {
        let expected = &all[all.len().saturating_sub(limit)..];
        assert_eq!(log.tail(limit).unwrap(), expected, "{limit}");
        assert_eq!(tail(&path, limit).unwrap(), expected, "{limit}");
    }
    log.close();
}

/// A line that is being written, or that may still be taken back, is nobody's business yet.
#[tokio::test]
async fn the_tail_shows_what_is_durable() {
    let (_folder, path) = folder();
    let log = crate::open(&path);
    log.append(decision()).await.unwrap();
    let durable = log.tail(10).unwrap();
    let mut file = fs::OpenOptions::new()
        .append(true)
        .open(segment(&path))
        .unwrap();
    file.write_all(b"{\"half\":").unwrap();
    assert_eq!(tail(&path, 10).unwrap(), durable);
    file.write_all(b"1}\n").unwrap();
    assert_eq!(log.tail(10).unwrap(), durable);
    log.close();
}

/// A file without any line is not read as a whole.
#[test]
fn a_file_without_lines_has_no_tail() {
    let (_folder, path) = folder();
    crate::open(&path).close();
    let file = fs::OpenOptions::new()
        .write(true)
        .truncate(true)
        .open(segment(&path))
        .unwrap();
    // A hole: no disk is used, and reading all of it would take far longer than this test may.
    file.set_len(1 << 40).unwrap();
    assert_eq!(tail(&path, 5).unwrap(), Vec::<String>::new());
}

/// The newest entry is found in an older segment, too, but only within the limit, and no text in another entry passes for it.
#[tokio::test]
async fn the_newest_entry_of_an_action_is_found_within_a_limit() {
    const ACTION: &str = "wrapping_key.registry";
    let (_folder, path) = folder();
    let (log, _) = AuditLog::open(&path, 20_000).unwrap();
    assert_eq!(log.newest(ACTION, u64::MAX).unwrap(), None);
    for text in ["first", "second"] {
        let mut entry = Entry::new(EntryKind::System, ACTION, Outcome::Ok);
        entry.registry = Some(text.to_owned());
        log.append(entry).await.unwrap();
    }
    for _ in 0..200 {
        let mut entry = decision();
        entry.peer = Some(format!(
            "{{\"action\":\"{ACTION}\",\"registry\":\"third\"}}"
        ));
        log.append(entry).await.unwrap();
    }
    assert!(segments(&path).len() > 1);
    let newest = log.newest(ACTION, u64::MAX).unwrap().unwrap();
    assert_eq!(newest.registry.as_deref(), Some("second"));
    assert_eq!(log.newest(ACTION, 1_000).unwrap(), None);
    assert_eq!(log.newest(ACTION, 0).unwrap(), None);
    log.close();
}
