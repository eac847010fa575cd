//! Decisions about several requests with one command: a result for each, and an exit code for all.

use std::fmt::Write as _;

use serde_json::Value;

use keybroker_proto::{self as proto, AccessApprover, AccessRequestState};

use crate::{
    identity::{Identity, Options},
    site::Finished,
    tokens::{ADA, BOB, start, start_sealed},
};

use super::{
    approvers::{CAROL, Command, approver, mappings, token},
    for_members::{asks, heard},
    member::{App, Member},
};

fn rows(finished: &Finished) -> Vec<Value> {
    let rows: Value = serde_json::from_str(&finished.stdout).unwrap();
    rows.as_array().unwrap().clone()
}

async fn states(member: &Member) -> Vec<AccessRequestState> {
    let requests = member.requests().await;
    requests.iter().map(proto::AccessRequest::state).collect()
}

#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::too_many_lines, reason = "one story")]
async fn several_requests_are_approved_with_the_words_of_each() {
    let service = Identity::start(Options::default());
    let broker = start_sealed(&service, &mappings());
    let (ada, _) = Member::with_first_device(&broker, &service, ADA).await;
    let (bob, _) = Member::with_first_device(&broker, &service, BOB).await;
    let carol = approver(&broker, &service, "approvers");
    let asked = [
        asks(&ada, &App::new(2)).await.0,
        asks(&bob, &App::new(2)).await.0,
        asks(&ada, &App::new(3)).await.0,
    ];
    let mut text = "# on the telephone\n".to_owned();
    for (number, request) in asked.iter().enumerate() {
        let id = hex::encode(&request.id);
        let words = heard(&carol, request).await.phrase_words.join(" ");
        // The words of the second request are not those that the member sees.
        let words = if number == 1 { "abacus abacus" } else { &words };
        writeln!(text, "{id} {words}").unwrap();
    }
    let unknown = "0f".repeat(16);
    writeln!(text, "{unknown} abacus abacus").unwrap();
    let file = broker.site.folder().join("words");
    std::fs::write(&file, text).unwrap();
    let file = file.to_str().unwrap();
    let command = Command::of(&broker, &token(&service, CAROL, "approvers"));
    let finished = command.run(&["device", "approve", "--words-file", file]);
    assert_eq!(finished.code, Some(10), "{finished:#?}");
    let rows = rows(&finished);
    let shown = |name: &str| rows.iter().map(|row| row[name].clone()).collect::<Vec<_>>();
    let ids: Vec<Value> = asked
        .iter()
        .map(|one| hex::encode(&one.id).into())
        .collect();
    assert_eq!(shown("id"), [&ids[..], &[unknown.clone().into()]].concat());
    let approved = || Value::from("approved");
    assert_eq!(
        shown("state"),
        [approved(), Value::Null, approved(), Value::Null]
    );
    assert_eq!(shown("reason")[1], "REQUEST");
    assert!(
        rows[1]["error"].as_str().unwrap().contains("phrase_words"),
        "{rows:?}"
    );
    assert!(
        rows[3]["error"]
            .as_str()
            .unwrap()
            .contains("no pending request"),
        "{rows:?}"
    );
    assert!(
        finished
            .stderr
            .contains("2 of 4 requests were not approved"),
        "{finished:#?}"
    );
    assert_eq!(states(&ada).await, [AccessRequestState::Approved; 2]);
    assert_eq!(states(&bob).await, [AccessRequestState::Pending]);

    // Neither words nor a terminal; words for two requests; an id twice. Nothing is decided.
    let [id, other] = [&ids[1], &ids[0]].map(|id| id.as_str().unwrap());
    for words in [
        &["device", "approve", id, other][..],
        &[
            "device", "approve", id, other, "--words", "abacus", "abacus",
        ],
        &["device", "approve", id, id],
        &["device", "approve", id, "--words-file", file],
        &["device", "approve"],
        &["device", "deny", id, id],
        &["device", "deny", id, "--user", BOB],
        &["device", "deny"],
    ] {
        let finished = command.run(words);
        assert_eq!(finished.code, Some(2), "{words:?}: {finished:#?}");
    }
    assert_eq!(states(&bob).await, [AccessRequestState::Pending]);
}

#[tokio::test(flavor = "multi_thread")]
async fn several_requests_are_denied_or_all_of_one_member() {
    let service = Identity::start(Options::default());
    let broker = start(&service, &mappings());
    let (ada, _) = Member::with_first_device(&broker, &service, ADA).await;
    let (bob, _) = Member::with_first_device(&broker, &service, BOB).await;
    for number in 2..5 {
        ada.asks(&App::new(number), AccessApprover::Administrator)
            .await
            .unwrap();
        bob.asks(&App::new(number), AccessApprover::Administrator)
            .await
            .unwrap();
    }
    let command = Command::of(&broker, &token(&service, CAROL, "approvers"));
    // The confirmation needs a terminal.
    let finished = command.run(&["device", "deny", "--user", ADA]);
    assert_eq!(finished.code, Some(2), "{finished:#?}");
    assert!(finished.stderr.contains("--yes"), "{finished:#?}");
    assert_eq!(states(&ada).await, [AccessRequestState::Pending; 3]);

    let finished = command.run(&["device", "deny", "--user", ADA, "--yes"]);
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    for row in rows(&finished) {
        assert_eq!(
            (&row["state"], &row["user"]),
            (&"denied".into(), &ADA.into())
        );
        assert_eq!(
            (&row["reason"], &row["error"]),
            (&Value::Null, &Value::Null)
        );
    }
    assert_eq!(states(&ada).await, [AccessRequestState::Denied; 3]);
    assert_eq!(states(&bob).await, [AccessRequestState::Pending; 3]);
    let finished = command.run(&["device", "deny", "--user", ADA, "--yes"]);
    assert_eq!((finished.code, rows(&finished).len()), (Some(0), 0));

    let ids: Vec<String> = [ada.requests().await, bob.requests().await]
        .concat()
        .iter()
        .map(|one| hex::encode(&one.id))
        .collect();
    let finished = command.run(&["device", "deny", &ids[0], &ids[3], &ids[4]]);
    assert_eq!(finished.code, Some(10), "{finished:#?}");
    let reasons: Vec<Value> = rows(&finished)
        .iter()
        .map(|row| row["reason"].clone())
        .collect();
    assert_eq!(reasons, ["DEVICE_STATE".into(), Value::Null, Value::Null]);
    assert!(
        finished.stderr.contains("1 of 3 requests were not denied"),
        "{finished:#?}"
    );
}
