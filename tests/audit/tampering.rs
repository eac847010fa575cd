//! Files of the log that another process removes, replaces or changes: noticed without a call, latched until an operator
//! acknowledges it, also across a restart.

use std::{
    fs::{self, OpenOptions},
    io::Write as _,
    path::Path,
};

use keybroker_audit::{AuditLog, EntryKind, Outcome, Settings, Tampering, verify};
use keybroker_core::{call::CallId, state::StateDirectory};
use tempfile::TempDir;

use crate::{decision, entry, segment, segments, until};

const OPERATOR: &str = "local-uid:42";

fn settings(folder: &TempDir) -> Settings {
    Settings {
        directory: folder.path().join("audit"),
        instance: "serve".to_owned(),
        // Each entry closes its segment.
        segment_bytes_max: 1,
    }
}

fn open(settings: &Settings) -> AuditLog {
    settings.open_instance().unwrap().0
}

fn truncate(path: &Path, bytes: u64) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(bytes).unwrap();
}

/// The same content in another file.
fn replace(path: &Path) {
    let copy = path.with_extension("copy");
    fs::copy(path, &copy).unwrap();
    fs::rename(copy, path).unwrap();
}

/// Entries in segments of their own, with nothing being written any more.
async fn filled(settings: &Settings) -> AuditLog {
    let log = open(settings);
    for _ in 0..3 {
        log.append(decision()).await.unwrap();
    }
    let path = settings.directory.join(&settings.instance);
    // One for each entry, and the one that is open now.
    until("the last segment", || {
        let last = segments(&path).into_iter().nth(3)?;
        (fs::metadata(last).ok()?.len() > 0).then_some(())
    });
    log
}

type Tamper = fn(&Path);

/// By name, with whether entries are missing afterwards.
const TAMPERING: [(&str, Tamper, bool); 16] = [
    ("truncated", |log| truncate(&segment(log), 0), true),
    (
        "cut short",
        |log| {
            let path = segment(log);
            truncate(&path, fs::metadata(&path).unwrap().len() - 1);
        },
        true,
    ),
    (
        "copied and truncated",
        |log| {
            let path = segment(log);
            fs::copy(&path, log.join("rotated")).unwrap();
            truncate(&path, 0);
        },
        true,
    ),
    (
        "appended to",
        |log| {
            let mut file = OpenOptions::new().append(true).open(segment(log)).unwrap();
            file.write_all(b"x").unwrap();
        },
        false,
    ),
    (
        "removed",
        |log| fs::remove_file(segment(log)).unwrap(),
        true,
    ),
    ("replaced", |log| replace(&segment(log)), false),
    (
        "older segment removed",
        |log| fs::remove_file(&segments(log)[0]).unwrap(),
        true,
    ),
    (
        "segment in the middle removed",
        |log| fs::remove_file(&segments(log)[1]).unwrap(),
        true,
    ),
    (
        "older segment cut short",
        |log| {
            let path = &segments(log)[1];
            truncate(path, fs::metadata(path).unwrap().len() - 1);
        },
        true,
    ),
    (
        "older segment replaced",
        |log| replace(&segments(log)[0]),
        false,
    ),
    (
        "segment added",
        |log| fs::write(log.join("00000999.jsonl"), "").unwrap(),
        false,
    ),
    ("log-id replaced", |log| replace(&log.join("log-id")), false),
    (
        "lock removed",
        |log| fs::remove_file(log.join("lock")).unwrap(),
        false,
    ),
    ("lock replaced", |log| replace(&log.join("lock")), false),
    (
        "directory moved",
        |log| fs::rename(log, log.with_extension("moved")).unwrap(),
        true,
    ),
    (
        "directory moved and made anew",
        |log| {
            let moved = log.with_extension("moved");
            fs::rename(log, &moved).unwrap();
            let permissions = fs::metadata(&moved).unwrap().permissions();
            fs::create_dir(log).unwrap();
            fs::set_permissions(log, permissions).unwrap();
        },
        true,
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn tampering_is_noticed_without_a_call_and_latched_until_it_is_acknowledged() {
    for (name, tamper, _) in TAMPERING {
        let folder = tempfile::tempdir().unwrap();
        let settings = settings(&folder);
        let path = settings.directory.join(&settings.instance);
        let log = filled(&settings).await;
        let entries = segments(&path);
        tamper(&path);
        let error = until(name, || log.writable().err());
        assert!(
            error.to_string().contains("keybroker audit acknowledge"),
            "{name}: {error}"
        );
        for _ in 0..3 {
            assert!(log.append(decision()).await.is_err(), "{name}");
        }
        // Nothing was written, least of all into a new directory.
        let left = if path.exists() {
            segments(&path).len()
        } else {
            0
        };
        assert!(left <= entries.len() + 1, "{name}");
        let tampering = settings.tampering().unwrap().unwrap();
        assert!(!tampering.finding.is_empty(), "{name}");

        settings
            .acknowledge_tampering(&tampering, OPERATOR)
            .unwrap();
        until(name, || log.writable().ok());
        log.append(decision()).await.unwrap();
        let lines = log.tail(10).unwrap();
        let recorded =
            |line: &String| line.contains("log.tampering_acknowledged") && line.contains(OPERATOR);
        assert!(lines.iter().any(recorded), "{name}: {lines:#?}");
        until(name, || {
            settings.tampering().unwrap().is_none().then_some(())
        });
        assert!(path.join("log-id").exists() && path.join("lock").exists());
        log.close();
        // What was acknowledged needs no second word.
        open(&settings).close();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_lost_entries_while_the_broker_was_stopped_is_refused_until_acknowledged() {
    for (name, tamper, is_missing) in TAMPERING {
        let folder = tempfile::tempdir().unwrap();
        let settings = settings(&folder);
        let path = settings.directory.join(&settings.instance);
        filled(&settings).await.close();
        let before = verify(&path).unwrap();
        assert_eq!(before.problems, Vec::<String>::new());
        tamper(&path);
        if !is_missing {
            continue;
        }
        // Twice: the refusal outlasts the process.
        for _ in 0..2 {
            let error = settings.open_instance().unwrap_err();
            assert!(
                error.to_string().contains("keybroker audit acknowledge"),
                "{name}: {error}"
            );
        }
        if path.join("log-id").exists() {
            let problems = settings.verify_instance().unwrap().problems;
            assert!(!problems.is_empty(), "{name}");
        }
        let tampering = settings.tampering().unwrap().unwrap();
        settings
            .acknowledge_tampering(&tampering, OPERATOR)
            .unwrap();
        let log = open(&settings);
        let sequence = log.append(decision()).await.unwrap();
        log.close();
        if sequence > before.last_sequence {
            let problems = verify(&path).unwrap().problems;
            assert!(!problems.is_empty(), "{name}: the gap must stay visible");
        }
    }
}

/// A log of another run that was put in place of the one that was written.
#[tokio::test]
async fn a_log_of_another_id_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let settings = settings(&folder);
    let path = settings.directory.join(&settings.instance);
    let log = open(&settings);
    log.append(decision()).await.unwrap();
    log.close();
    fs::rename(&path, folder.path().join("kept")).unwrap();
    AuditLog::open(&path, 1).unwrap().0.close();
    let error = settings.open_instance().unwrap_err().to_string();
    assert!(error.contains("the log has the id"), "{error}");
}

#[tokio::test]
async fn lines_cut_off_the_end_are_found_by_verification() {
    let folder = tempfile::tempdir().unwrap();
    let settings = Settings {
        segment_bytes_max: 1 << 20,
        ..settings(&folder)
    };
    let path = settings.directory.join(&settings.instance);
    let log = open(&settings);
    for _ in 0..5 {
        log.append(decision()).await.unwrap();
    }
    log.close();
    assert_eq!(
        settings.verify_instance().unwrap().problems,
        Vec::<String>::new()
    );
    let file = segment(&path);
    let text = fs::read_to_string(&file).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    fs::write(&file, format!("{}\n", lines[..lines.len() - 4].join("\n"))).unwrap();
    // Every line that is left is good.
    assert_eq!(verify(&path).unwrap().problems, Vec::<String>::new());
    let problems = settings.verify_instance().unwrap().problems;
    assert!(problems[0].contains("was already durable"), "{problems:?}");
}

/// The acknowledgement of one finding says nothing of the next.
#[tokio::test(flavor = "multi_thread")]
async fn an_acknowledgement_is_for_one_finding() {
    let folder = tempfile::tempdir().unwrap();
    let settings = settings(&folder);
    let path = settings.directory.join(&settings.instance);
    let log = filled(&settings).await;
    let never_found = Tampering {
        finding: "nothing".to_owned(),
        found_us: 1,
    };
    settings
        .acknowledge_tampering(&never_found, OPERATOR)
        .unwrap();
    truncate(&segment(&path), 0);
    until("the latch", || settings.tampering().unwrap());
    for _ in 0..3 {
        assert!(log.append(decision()).await.is_err());
    }
    log.close();
    settings.open_instance().unwrap_err();
    let tampering = settings.tampering().unwrap().unwrap();
    settings
        .acknowledge_tampering(&tampering, OPERATOR)
        .unwrap();
    open(&settings).close();
}

fn fact(settings: &Settings, name: &str) -> std::path::PathBuf {
    settings
        .directory
        .join("state")
        .join(format!("audit-{}.{name}", settings.instance))
}

/// Old segments that an operator removed by the command are no tampering, for a running broker and for a stopped one.
#[tokio::test(flavor = "multi_thread")]
async fn segments_that_an_operator_removes_by_the_command_are_not_missed() {
    for is_serving in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let settings = settings(&folder);
        let path = settings.directory.join(&settings.instance);
        let log = filled(&settings).await;
        let log = if is_serving {
            settings.request_removal(2, OPERATOR).unwrap();
            until("the removal", || {
                (!settings.is_removal_pending().unwrap()).then_some(())
            });
            log
        } else {
            log.close();
            settings.request_removal(2, OPERATOR).unwrap();
            open(&settings)
        };
        assert_eq!(settings.segments().unwrap()[0], 3);
        assert!(!settings.is_removal_pending().unwrap());
        log.append(decision()).await.unwrap();
        log.close();
        let recorded = segments(&path)
            .iter()
            .map(|segment| fs::read_to_string(segment).unwrap())
            .collect::<String>();
        let entry = recorded
            .lines()
            .find(|line| line.contains("log.segments_removed"))
            .unwrap();
        assert!(
            entry.contains("\"count\":2") && entry.contains(OPERATOR),
            "{entry}"
        );
        for report in [verify(&path).unwrap(), settings.verify_instance().unwrap()] {
            assert_eq!(report.problems, Vec::<String>::new());
        }
        // The same again, and everything that may be removed: the newest segment stays.
        settings.request_removal(u64::MAX, OPERATOR).unwrap();
        open(&settings).close();
        assert_eq!(settings.tampering().unwrap(), None);
        assert_eq!(
            settings.verify_instance().unwrap().problems,
            Vec::<String>::new()
        );
        // One more, by hand.
        fs::remove_file(&segments(&path)[0]).unwrap();
        assert!(!settings.verify_instance().unwrap().problems.is_empty());
        settings.open_instance().unwrap_err();
    }
}

/// A change that is under way may need every segment since its intent, should the broker be killed.
#[tokio::test(flavor = "multi_thread")]
async fn no_segment_is_removed_while_a_change_is_under_way() {
    let folder = tempfile::tempdir().unwrap();
    let settings = settings(&folder);
    let log = open(&settings);
    let call = CallId::fresh();
    log.append(entry(EntryKind::Intent, call)).await.unwrap();
    for _ in 0..3 {
        log.append(decision()).await.unwrap();
    }
    settings.request_removal(1, OPERATOR).unwrap();
    log.close();
    let (log, open_intents) = settings.open_instance().unwrap();
    assert_eq!(open_intents.len(), 1);
    assert_eq!(settings.segments().unwrap()[0], 1);
    log.append(open_intents[0].recovered(Outcome::Failed))
        .await
        .unwrap();
    until("the removal", || {
        (settings.segments().unwrap()[0] == 2).then_some(())
    });
    log.close();
}

/// A state file that a full disk or an edit has damaged: refused with the remedy, which works.
#[tokio::test]
async fn a_damaged_state_file_is_refused_with_a_remedy_that_works() {
    for content in ["", "{", "{\"log_id\":7}"] {
        for name in ["mark", "tampering"] {
            let folder = tempfile::tempdir().unwrap();
            let settings = settings(&folder);
            filled(&settings).await.close();
            let state = StateDirectory::below(&settings.directory);
            let fact = format!("audit-serve.{name}");
            state.write(&fact, content.as_bytes()).unwrap();
            assert!(!settings.verify_instance().unwrap().problems.is_empty());
            for _ in 0..2 {
                let error = settings.open_instance().unwrap_err().to_string();
                assert!(
                    error.contains(&fact) && error.contains("keybroker audit acknowledge"),
                    "{error}"
                );
            }
            let tampering = settings.tampering().unwrap().unwrap();
            // An acknowledgement that is damaged itself does not count, and the next one replaces it.
            state
                .write("audit-serve.acknowledgement", content.as_bytes())
                .unwrap();
            settings.open_instance().unwrap_err();
            settings
                .acknowledge_tampering(&tampering, OPERATOR)
                .unwrap();
            open(&settings).close();
            assert_eq!(settings.tampering().unwrap(), None);
            open(&settings).close();
        }
    }
}

/// The release before wrote marks that say nothing of segments.
#[tokio::test]
async fn a_mark_of_the_release_before_is_accepted() {
    let folder = tempfile::tempdir().unwrap();
    let settings = settings(&folder);
    let path = settings.directory.join(&settings.instance);
    filled(&settings).await.close();
    fs::remove_file(&segments(&path)[0]).unwrap();
    let file = fact(&settings, "mark");
    let mut mark: serde_json::Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    mark.as_object_mut().unwrap().remove("segments").unwrap();
    fs::write(&file, mark.to_string()).unwrap();
    open(&settings).close();
    // What this release finds is what it misses from now on.
    fs::remove_file(&segments(&path)[0]).unwrap();
    settings.open_instance().unwrap_err();
}

/// Another file system in the place of the log, as when its volume is unmounted: the finding says so, and the log goes on when
/// the volume is back and an operator has acknowledged it.
#[tokio::test(flavor = "multi_thread")]
async fn an_unmounted_volume_is_named_as_such() {
    let folder = tempfile::tempdir().unwrap();
    let Ok(other) = tempfile::tempdir_in("/dev/shm") else {
        panic!("this test needs a second file system at /dev/shm");
    };
    let settings = settings(&folder);
    let log = filled(&settings).await;
    let moved = folder.path().join("moved");
    fs::rename(&settings.directory, &moved).unwrap();
    std::os::unix::fs::symlink(other.path(), &settings.directory).unwrap();
    let error = until("the alert", || log.writable().err()).to_string();
    assert!(error.contains("unmounted"), "{error}");
    fs::remove_file(&settings.directory).unwrap();
    fs::rename(&moved, &settings.directory).unwrap();
    let tampering = until("the finding", || settings.tampering().unwrap());
    settings
        .acknowledge_tampering(&tampering, OPERATOR)
        .unwrap();
    until("the log", || log.writable().ok());
    log.append(decision()).await.unwrap();
    log.close();
    assert_eq!(
        settings.verify_instance().unwrap().problems,
        Vec::<String>::new()
    );
}
