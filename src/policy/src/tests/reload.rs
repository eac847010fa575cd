//! Tests files that change, become invalid or disappear while the broker runs.

use std::fs;

use super::*;

const FORBID: &str = "@id(\"closed\") forbid (principal, action, resource);";

fn decides(policy: &Policy) -> String {
    unwrap_of_ada(&person("ada"), |case| policy.evaluate(case))
        .policy
        .to_string()
}

#[test]
fn a_change_is_taken_over_when_it_was_seen_twice_or_announced() {
    let (folder, policy) = with_files(&[]).unwrap();
    assert_eq!(decides(&policy), "own-keys");
    fs::write(folder.path().join("a.cedar"), FORBID).unwrap();
    policy.reload(false);
    assert_eq!(decides(&policy), "own-keys", "it may be half written");
    policy.reload(false);
    assert_eq!(decides(&policy), "closed");

    fs::write(folder.path().join("a.cedar"), "").unwrap();
    policy.reload(true);
    assert_eq!(decides(&policy), "own-keys");
}

/// An editor that writes in place leaves an empty file for a moment, which is a valid set without
/// the forbids.
#[test]
fn a_file_that_is_being_written_opens_nothing() {
    let (folder, policy) = with_files(&[("a.cedar", FORBID)]).unwrap();
    for text in [
        "",
        FORBID,
        "",
        "@id(\"new\") forbid (principal, action, resource);",
    ] {
        fs::write(folder.path().join("a.cedar"), text).unwrap();
        policy.reload(false);
        assert_eq!(decides(&policy), "closed");
    }
    policy.reload(false);
    assert_eq!(decides(&policy), "new");
}

#[test]
fn a_bad_or_missing_file_leaves_the_old_policies_in_force() {
    let other = "@id(\"other\") permit (principal, action, resource);";
    let (folder, policy) = with_files(&[("a.cedar", FORBID), ("b.cedar", other)]).unwrap();
    let file = folder.path().join("a.cedar");
    let unknown = "forbid (principal, action == Keybroker::Action::\"user_key.steal\", resource);";
    for bad in ["forbid (principal, action, resource)", unknown, "\u{0}"] {
        fs::write(&file, bad).unwrap();
        for announced in [false, false, true] {
            policy.reload(announced);
            assert_eq!(decides(&policy), "closed", "{bad}");
        }
        let refused = policy.watch.lock().unwrap().refused.clone().unwrap();
        assert!(refused.contains("a.cedar, line 1"), "{refused}");
    }

    fs::remove_file(&file).unwrap();
    for announced in [false, false, true] {
        policy.reload(announced);
        assert_eq!(decides(&policy), "closed");
    }
    let refused = policy.watch.lock().unwrap().refused.clone().unwrap();
    assert!(
        refused.contains("a.cedar: the file is missing"),
        "{refused}"
    );

    // The complete directory disappears, as after unmounting a volume.
    let away = folder.path().with_extension("away");
    fs::rename(folder.path(), &away).unwrap();
    policy.reload(true);
    assert_eq!(decides(&policy), "closed");
    fs::rename(&away, folder.path()).unwrap();

    // The intended way to remove a file.
    fs::write(&file, "// withdrawn\n").unwrap();
    policy.reload(true);
    assert_eq!(decides(&policy), "own-keys");
    assert_eq!(policy.watch.lock().unwrap().refused, None);
    fs::remove_file(&file).unwrap();
    policy.reload(true);
    assert_eq!(policy.watch.lock().unwrap().refused, None);
    assert_eq!(decides(&policy), "own-keys");
}

/// At the start, every problem stops the broker.
#[test]
fn a_start_needs_good_files() {
    let missing = Settings {
        directory: Some("/nonexistent/policies".into()),
        ..Settings::default()
    };
    let problems = Policy::load(&missing, Networks::default())
        .unwrap_err()
        .to_string();
    assert!(problems.contains("[policy] directory"), "{problems}");
    assert!(with_files(&[("a.cedar", "nonsense")]).is_err());
}
