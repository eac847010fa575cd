//! The segments of an audit log. A form feed in an input begins the next segment.

use std::{fs, path::Path, sync::LazyLock};

use serde_json::{Value, json};
use tempfile::TempDir;

use keybroker_audit as audit;

pub(crate) const WORDS: &[&str] = &[
    "\n",
    "\x0c",
    "{",
    "}",
    ",",
    "\"sequence\":",
    "\"kind\":",
    "\"intent\"",
    "\"outcome\"",
    "\"log_id\":",
    "\"call_id\":",
    "\"count\":",
    "null",
    "\\u0041",
    "9007199254740993",
    "-1",
    "1e3",
    " ",
];

const LOG_ID: &str = "00112233445566778899aabbccddeeff";
const NEXT_SEGMENT: u8 = 0x0c;
const SEGMENTS_MAX: usize = 4;

static DIRECTORY: LazyLock<TempDir> = LazyLock::new(|| {
    // Each input is a file: in memory, where there is room.
    let memory = Path::new("/dev/shm");
    let directory = TempDir::new_in(memory).or_else(|_| TempDir::new()).unwrap();
    fs::write(directory.path().join("log-id"), LOG_ID).unwrap();
    directory
});

/// Checks a log, and looks for open intents.
///
/// # Panics
/// If a log is called good that has a line which is not canonical, not of this log, or not the next one.
pub fn audit_log(input: &[u8]) -> bool {
    let directory = DIRECTORY.path();
    let segments: Vec<&[u8]> = input
        .split(|byte| *byte == NEXT_SEGMENT)
        .take(SEGMENTS_MAX)
        .collect();
    for number in 0..SEGMENTS_MAX {
        let path = directory.join(format!("{:08}.jsonl", number + 1));
        match segments.get(number) {
            Some(bytes) => fs::write(path, bytes).unwrap(),
            None => drop(fs::remove_file(path)),
        }
    }
    let report = audit::verify(directory).unwrap();
    let _damaged = audit::open_intents(directory);
    let lines: Vec<&[u8]> = segments
        .iter()
        .flat_map(|segment| segment.split_inclusive(|byte| *byte == b'\n'))
        .collect();
    let count = u64::try_from(lines.len()).unwrap();
    assert!(report.entries <= count && report.open_intents <= report.entries);
    if !report.problems.is_empty() {
        return false;
    }
    assert_eq!((report.entries, report.last_sequence), (count, count));
    for (line, sequence) in lines.iter().zip(1_u64..) {
        let text = line.strip_suffix(b"\n").expect("a whole line");
        let entry: Value = serde_json::from_slice(text).unwrap();
        assert_eq!(entry.to_string().as_bytes(), text);
        assert_eq!(entry["sequence"], sequence);
        assert_eq!(entry["log_id"], LOG_ID);
    }
    true
}

fn line(sequence: u64, kind: &str, action: &str) -> String {
    let call = "0190163d-8694-739b-aea5-966c26f8ad91";
    let entry = json!({
        "action": action, "call_id": call, "kind": kind, "log_id": LOG_ID, "outcome": "ok", "principal": "URI:spiffe://example.org/a",
        "sequence": sequence, "time_us": 1_700_000_000_000_000_u64, "user": "Zoë",
    });
    format!("{entry}\n")
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let first = line(1, "decision", "user_key.unwrap");
    let intent = line(2, "intent", "user_key.create");
    let outcome = line(3, "outcome", "user_key.create");
    [
        first.clone(),
        [first.as_str(), &intent, &outcome].concat(),
        [first.as_str(), &intent, "\x0c", &outcome].concat(),
    ]
    .map(String::into_bytes)
    .to_vec()
}
