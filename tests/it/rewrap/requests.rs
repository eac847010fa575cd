//! The requests of administrators, the command, and the rows that a run leaves as they are.

use std::{
    thread,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use keybroker_proto::{
    GetRewrapRequest, ListWrappingKeysRequest, PauseRewrapRequest, StartRewrapRequest,
};
use serde_json::Value;

use super::{
    all_released, command, done, json, left, names, on_sqlite, second_key, start, two_keys,
};
use crate::{
    client::{Caller, reason, refused},
    process::{Broker, until},
};

/// A damaged row is reported and left as it is. The other rows move. After the repair, another run moves the rest.
#[tokio::test(flavor = "multi_thread")]
async fn damaged_rows_are_reported_and_left() {
    let users = names(20);
    let site = two_keys(on_sqlite(), &users).await;
    let of =
        |user: &str| format!("record_id = (SELECT record_id FROM records WHERE user = '{user}')");
    let [forged, truncated, swapped] = [0, 1, 2].map(|at: usize| of(&users[at]));
    // Envelopes of other users, and an envelope that does not parse.
    site.sql(&format!(
        "CREATE TABLE kept AS SELECT * FROM revisions;
         UPDATE revisions SET envelope = (SELECT envelope FROM kept WHERE {}) WHERE {forged};
         UPDATE revisions SET envelope = substr(envelope, 1, 100) WHERE {truncated};
         UPDATE revisions SET envelope = (SELECT envelope FROM kept WHERE {}) WHERE {swapped};",
        of(&users[4]),
        of(&users[3])
    ));
    let broker = Broker::start_on(site);
    let finished = command(&broker, &["start", "--wait", "-o", "json"]);
    assert_eq!(finished.code, Some(12), "{finished:#?}");
    assert!(
        finished.stderr.contains("3 rows could not be re-wrapped"),
        "{finished:#?}"
    );
    let shown: Value = serde_json::from_str(&finished.stdout).unwrap();
    assert_eq!(shown["state"], "done");
    assert_eq!(
        (&shown["revisions_moved"], &shown["left"]),
        (&17.into(), &3.into())
    );
    let mut problems: Vec<&str> = shown["failures"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["problem"].as_str().unwrap())
        .collect();
    problems.sort_unstable();
    assert_eq!(
        problems,
        ["envelope-unreadable", "mac-refused", "mac-refused"]
    );
    let table = command(&broker, &["status"]);
    assert_eq!(table.code, Some(0), "{table:#?}");
    assert!(table.stdout.contains("envelope-unreadable"), "{table:#?}");
    all_released(&broker, &users[3..]).await;
    let releaser = Caller::of(&broker, "releaser");
    for user in &users[..3] {
        refused(releaser.unwrap(user).await, "RECORD_DAMAGED");
    }
    assert!(broker.site.log().contains("\"alert\":\"record-damaged\""));

    broker.site.sql(
        "UPDATE revisions SET envelope = (SELECT envelope FROM kept WHERE kept.record_id = revisions.record_id)
         WHERE wrapping_key_id IN (SELECT wrapping_key_id FROM kept);",
    );
    let again = json(&command(&broker, &["start", "--wait", "-o", "json"]));
    assert_eq!(
        (&again["revisions_moved"], &again["left"]),
        (&3.into(), &0.into())
    );
    all_released(&broker, &users).await;
}

/// The command beside a broker that serves from SQLite: rate, pause, a restart in between, resume.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_paused_and_resumed_by_the_command() {
    let users = names(150);
    let site = two_keys(on_sqlite(), &users).await;
    let broker = Broker::start_on(site);
    let none = json(&command(&broker, &["status", "-o", "json"]));
    assert_eq!(
        (&none["state"], &none["failures"]),
        (&Value::Null, &Value::Array(Vec::new()))
    );
    let uses = none["wrapping_keys"].as_array().unwrap();
    let counts: Vec<_> = uses
        .iter()
        .map(|uses| uses["revisions"].as_u64().unwrap())
        .collect();
    assert_eq!(counts, [150, 0]);

    let started = json(&command(&broker, &["start", "--rate", "20", "-o", "json"]));
    assert_eq!(
        (&started["state"], &started["rate"]),
        (&"running".into(), &20.into())
    );
    let twice = command(&broker, &["start"]);
    assert!(twice.stderr.contains("already running"), "{twice:#?}");
    let begun = Instant::now();
    until("some rows to move", || {
        let shown = json(&command(&broker, &["status", "-o", "json"]));
        (shown["revisions_moved"].as_u64().unwrap() >= 20).then_some(())
    });
    assert!(
        begun.elapsed() > Duration::from_millis(700),
        "{:?}",
        begun.elapsed()
    );
    let paused = json(&command(&broker, &["pause", "-o", "json"]));
    assert_eq!(paused["state"], "paused");
    // A batch that was being swapped when the run was paused may still end.
    thread::sleep(Duration::from_millis(1_500));
    let moved = |broker: &Broker| {
        let shown = json(&command(broker, &["status", "-o", "json"]));
        shown["left"].as_u64().unwrap()
    };
    let left_then = moved(&broker);
    assert!((1..130).contains(&left_then), "{left_then}");
    let waiting = command(&broker, &["status", "--wait"]);
    assert_eq!(waiting.code, Some(10), "{waiting:#?}");
    let refused = command(&broker, &["start"]);
    assert!(
        refused.stderr.contains("keybroker rewrap resume"),
        "{refused:#?}"
    );

    let broker = Broker::start_on(broker.stop().0);
    thread::sleep(Duration::from_millis(1_500));
    assert_eq!(moved(&broker), left_then, "a paused run goes on");
    let ended = json(&command(
        &broker,
        &["resume", "--rate", "0", "--wait", "-o", "json"],
    ));
    assert_eq!(
        (&ended["state"], &ended["left"]),
        (&"done".into(), &0.into())
    );
    assert_eq!(
        (&ended["verified"], &ended["rate"]),
        (&150.into(), &Value::Null)
    );
    let idle = command(&broker, &["resume"]);
    assert!(idle.stderr.contains("no re-wrap is paused"), "{idle:#?}");
    all_released(&broker, &users).await;
}

/// The target is the wrapping key that wraps, so it can be no source. An auditor sees the run and cannot change it.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_can_be_chosen_and_the_target_cannot() {
    let users = names(5);
    let site = two_keys(on_sqlite(), &users).await;
    second_key(&site);
    let broker = Broker::start_on(site);
    let mut admin = Caller::of(&broker, "admin").control;
    let keys = admin
        .list_wrapping_keys(ListWrappingKeysRequest {})
        .await
        .unwrap();
    let keys: Vec<_> = keys
        .into_inner()
        .wrapping_keys
        .into_iter()
        .map(|key| key.id)
        .collect();
    let from = |id: &Vec<u8>| StartRewrapRequest {
        source_wrapping_key_id: id.clone(),
        rows_per_second_max: 0,
        from_compromised: false,
    };
    let target = admin.start_rewrap(from(&keys[2])).await;
    let status_of_target = refused(target, "REQUEST");
    assert!(
        status_of_target.message().contains("call"),
        "{status_of_target:?}"
    );
    let mut auditor = Caller::of(&broker, "auditor").control;
    refused(auditor.start_rewrap(from(&keys[0])).await, "POLICY");
    refused(auditor.pause_rewrap(PauseRewrapRequest {}).await, "POLICY");
    let seen = auditor
        .get_rewrap(GetRewrapRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!((seen.rewrap, seen.uses.len()), (None, 3));
    // The second key has no rows.
    admin.start_rewrap(from(&keys[1])).await.unwrap();
    let ended = done(&broker).await;
    assert_eq!((ended.revisions_moved, ended.left), (0, 0));
    assert_eq!(ended.source_wrapping_key_id, keys[1]);
    assert_eq!(ended.target_wrapping_key_id, keys[2]);
    assert_eq!(left(&broker).await, (5, 0));
    admin.start_rewrap(from(&keys[0])).await.unwrap();
    assert_eq!(done(&broker).await.revisions_moved, 5);
    all_released(&broker, &users).await;
}

/// Administrators start, pause and resume at the same time: one run comes of it.
#[tokio::test(flavor = "multi_thread")]
async fn of_several_starts_at_once_one_starts() {
    let site = two_keys(on_sqlite(), &names(3)).await;
    let broker = Broker::start_on(site);
    let starts = join_all((0..8).map(|_| start(&broker, 1))).await;
    let (mut started, mut late) = (0, 0);
    for result in starts {
        match result {
            Ok(true) => started += 1,
            Ok(false) => late += 1,
            Err(status) => {
                assert_eq!(reason(&status), "REVISION", "{status:?}");
                late += 1;
            }
        }
    }
    assert_eq!((started, late), (1, 7));
}
