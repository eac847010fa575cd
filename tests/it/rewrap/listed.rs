//! A re-wrap from a compromised key: only rows that the audit log or a backup proves are moved.

use std::{fs, path::Path};

use serde_json::Value;

use crate::{
    client::{Caller, refused},
    process::Broker,
    site::{Finished, Site},
};

use super::{
    admin_command, all_released, command, done, enrol, json, material, names, on_sqlite,
    second_key, status,
};

const REFUSED: i32 = 10;
const FAILED_ROWS: i32 = 12;

fn copied(from: &Path, to: &Path) -> String {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
    to.to_str().unwrap().to_owned()
}

fn envelopes(site: &Site, arguments: &[&str]) -> Finished {
    envelopes_before(site, "2100-01-01T00:00:00Z", arguments)
}

fn envelopes_before(site: &Site, time: &str, arguments: &[&str]) -> Finished {
    let command = ["-o", "json", "audit", "envelopes", "--before", time];
    site.run(&[&command, arguments].concat())
}

/// The users are in the copy of the audit log, and eve is not: her row could be of a person who knows the compromised key.
#[tokio::test(flavor = "multi_thread")]
async fn only_listed_rows_leave_a_compromised_key() {
    let users = names(6);
    let broker = Broker::start(on_sqlite());
    enrol(&broker, &users).await;
    let (site, _) = broker.stop();
    let log = site.audit_directory().join("serve");
    let copy = copied(&log, &site.folder().join("copy"));
    let broker = Broker::start_on(site);
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("eve", &material("eve")).await.unwrap();
    let (site, _) = broker.stop();
    let backup = site.folder().join("backup.db");
    fs::copy(site.database(), &backup).unwrap();
    second_key(&site);
    let broker = Broker::start_on(site);
    let keys = status(&broker).await;
    let [id, target] = [0, 1].map(|number: usize| hex::encode(&keys.uses[number].wrapping_key_id));
    let start = |id: &str| command(&broker, &["start", "--wait", "--from-compromised", id]);

    let early = start(&id);
    assert_eq!(early.code, Some(REFUSED), "{early:#?}");
    assert!(early.stderr.contains("from_compromised"), "{early:#?}");
    let changed = admin_command(&broker, &["key", "compromise"], &[&id]);
    assert_eq!(changed.code, Some(0), "{changed:#?}");
    let unlisted = start(&id);
    assert_eq!(unlisted.code, Some(REFUSED), "{unlisted:#?}");
    assert!(
        unlisted.stderr.contains("keybroker audit envelopes"),
        "{unlisted:#?}"
    );
    let wrong = start(&target);
    assert_eq!(wrong.code, Some(REFUSED), "{wrong:#?}");

    let site = &broker.site;
    let early = envelopes_before(
        site,
        "2020-01-01T00:00:00Z",
        &["--wrapping-key", &id, &copy],
    );
    assert_eq!(json(&early)["listed"], Value::from(0));
    let listed = json(&envelopes(site, &["--wrapping-key", &id, &copy]));
    let (listed, from_backup) = (&listed["listed"], &listed["from_backup"]);
    assert_eq!((listed.as_u64(), from_backup.as_u64()), (Some(6), Some(0)));
    let moved = start(&id);
    assert_eq!(moved.code, Some(FAILED_ROWS), "{moved:#?}");
    assert!(moved.stderr.contains("count as disclosed"), "{moved:#?}");
    let rewrap = done(&broker).await;
    assert_eq!(
        (rewrap.revisions_moved, rewrap.failed),
        (6, 1),
        "{rewrap:?}"
    );
    assert_eq!(rewrap.failures[0].problem, "not-listed");
    all_released(&broker, &users).await;
    let releaser = Caller::of(&broker, "releaser");
    refused(releaser.unwrap("eve").await, "KEY_STATE");

    // An ordinary re-wrap does not move the row.
    let ordinary = command(&broker, &["start", "--wait"]);
    assert_eq!(ordinary.code, Some(0), "{ordinary:#?}");
    refused(releaser.unwrap("eve").await, "KEY_STATE");

    a_changed_log_lists_nothing(site, &id, &copy);
    let url = format!("sqlite:{}", backup.display());
    let listed = json(&envelopes(
        site,
        &["--wrapping-key", &id, "--backup", &url, &copy],
    ));
    assert_eq!(listed["from_backup"], Value::from(7), "{listed}");
    let rest = start(&id);
    assert_eq!(rest.code, Some(0), "{rest:#?}");
    all_released(&broker, &["eve".to_owned()]).await;
    site.expect_ok(&["store", "check"]);
    site.expect_ok(&["audit", "verify"]);
}

/// A log that does not verify proves nothing.
fn a_changed_log_lists_nothing(site: &Site, id: &str, copy: &str) {
    let changed = copied(Path::new(copy), &site.folder().join("changed"));
    let segment = Path::new(&changed).join("00000001.jsonl");
    let text = fs::read_to_string(&segment).unwrap();
    let mut lines: Vec<&str> = text.lines().collect();
    lines.remove(1);
    fs::write(&segment, lines.join("\n") + "\n").unwrap();
    let refused = envelopes(site, &["--wrapping-key", id, &changed]);
    assert_eq!(refused.code, Some(FAILED_ROWS), "{refused:#?}");
    assert!(refused.stderr.contains("prove nothing"), "{refused:#?}");
}
