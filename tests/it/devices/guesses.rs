//! What an approver may try, what the audit log says about it, and what happens if the token is gone meanwhile.

use serde_json::Value;

use keybroker_proto::{self as proto, AccessRequestState};

use crate::{
    client::{eventually, refused},
    faulty::{Fault, code},
    faulty_token::behind_faults,
    identity::{Identity, Options},
    tokens::{ADA, sealed_site, start_on, start_sealed},
};

use super::{
    approvers::{CAROL, approver, mappings},
    for_members::{asks, dave, heard},
    member::{App, CODE, Member},
};

#[tokio::test(flavor = "multi_thread")]
async fn wrong_words_end_the_request() {
    let service = Identity::start(Options::default());
    let broker = start_sealed(&service, &mappings());
    let (ada, _) = Member::with_first_device(&broker, &service, ADA).await;
    let (asked, _) = asks(&ada, &App::new(2)).await;
    let carol = approver(&broker, &service, "approvers");
    let right = heard(&carol, &asked).await;
    let wrong = proto::ApproveForMemberRequest {
        phrase_words: vec!["abacus".to_owned(), "abacus".to_owned()],
        ..right.clone()
    };
    // The guesses of all approvers count together.
    let other = dave(&broker, &service);
    for approver in [&carol, &carol, &other, &carol, &other] {
        refused(approver.approve_for_member(wrong.clone()).await, "REQUEST");
    }
    refused(carol.approve_for_member(right).await, "DEVICE_STATE");
    let shown = ada.requests().await.remove(0);
    assert_eq!(shown.state(), AccessRequestState::Denied);
    let counted = broker.site.entries("access_request.wrong_words");
    assert_eq!(counted.len(), 10, "an intent and an outcome for each");
    for entry in &counted {
        assert_eq!(entry["access_request"], hex::encode(&asked.id));
        assert_eq!(entry["recipient"], Value::Null);
    }
    assert!(
        broker
            .site
            .entries("access_request.approve_for_member")
            .iter()
            .all(|entry| entry["outcome"] != "ok")
    );
}

/// An approver who guesses is refused for a while, also for other requests.
#[tokio::test(flavor = "multi_thread")]
async fn wrong_words_count_as_failed_attempts() {
    let service = Identity::start(Options::default());
    let site = sealed_site(&service, &mappings());
    site.edit_configuration(|text| {
        *text = text.replace("failures_per_minute = 100000", "failures_per_minute = 1");
    });
    let broker = start_on(site);
    let (ada, _) = Member::with_first_device(&broker, &service, ADA).await;
    let (asked, _) = asks(&ada, &App::new(2)).await;
    let (other, _) = asks(&ada, &App::new(3)).await;
    let carol = approver(&broker, &service, "approvers");
    let right = heard(&carol, &other).await;
    let wrong = proto::ApproveForMemberRequest {
        access_request_id: asked.id.clone(),
        phrase_words: vec!["abacus".to_owned(), "abacus".to_owned()],
    };
    // The attempt after the last permitted one reaches the limit.
    for _ in 0..2 {
        refused(carol.approve_for_member(wrong.clone()).await, "REQUEST");
    }
    refused(carol.approve_for_member(right).await, "FAILURE_BUDGET");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_of_two_approvals_releases_nothing_and_says_so() {
    let service = Identity::start(Options::default());
    let both = format!("{}\n[devices]\napprovers_needed = 2\n", mappings());
    let broker = start_sealed(&service, &both);
    let (ada, _) = Member::with_first_device(&broker, &service, ADA).await;
    let (asked, pair) = asks(&ada, &App::new(2)).await;
    let carol = approver(&broker, &service, "approvers");
    let right = heard(&carol, &asked).await;
    let outcomes = |principal: &str| -> Vec<Value> {
        let all = broker.site.entries("access_request.approve_for_member");
        let ok = all.into_iter().filter(|entry| entry["outcome"] == "ok");
        ok.filter(|entry| entry["principal"] == principal).collect()
    };
    carol.approve_for_member(right.clone()).await.unwrap();
    let [carol, dave_name] =
        [CAROL, super::for_members::DAVE].map(|sub| format!("token:vault:{sub}"));
    let first = outcomes(&carol);
    assert_eq!(first.len(), 2, "{first:#?}");
    for entry in &first {
        assert_eq!(entry["recipient"], Value::Null, "{entry}");
        assert_eq!(entry["cause"], "first-approval", "{entry}");
    }
    assert_eq!(
        broker.site.sql("SELECT count(*) FROM last_uses").trim(),
        "0"
    );
    dave(&broker, &service)
        .approve_for_member(right)
        .await
        .unwrap();
    for entry in &outcomes(&dave_name) {
        assert_eq!(entry["recipient"], entry["public_key"], "{entry}");
        assert_eq!(entry["cause"], Value::Null, "{entry}");
    }
    let answer = ada.fetches(&asked, CODE).await.unwrap();
    let opened = pair.open_bytes(&answer.encrypted_user_key, &answer.encryption);
    assert_eq!(opened, b"material of this user");
    // The release counts as a use of the user key.
    let (site, _) = broker.stop();
    assert_eq!(site.sql("SELECT count(*) FROM last_uses").trim(), "1");
}

/// Nothing is released and nothing is lost if the token is gone in the middle of an approval.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_gone_in_the_middle_leaves_the_request_pending() {
    let service = Identity::start(Options::default());
    let site = sealed_site(&service, &mappings());
    let faulty = behind_faults(&site);
    let broker = start_on(site);
    let (ada, _) = Member::with_first_device(&broker, &service, ADA).await;
    let (asked, pair) = asks(&ada, &App::new(2)).await;
    let carol = approver(&broker, &service, "approvers");
    let right = heard(&carol, &asked).await;
    for function in ["C_UnwrapKey", "C_WrapKey"] {
        faulty.set(function, &Fault::always(code::DEVICE_REMOVED));
        refused(carol.approve_for_member(right.clone()).await, "TOKEN_DOWN");
        faulty.clear(function);
        let pending = eventually(|| ada.fetches(&asked, CODE)).await;
        assert_eq!(pending.state(), AccessRequestState::Pending);
        assert!(pending.encrypted_user_key.is_empty());
        let stored = broker
            .site
            .sql("SELECT length(answer), state FROM access_requests");
        assert_eq!(stored.trim(), "0|pending");
    }
    let approved = eventually(|| carol.approve_for_member(right.clone())).await;
    assert_eq!(
        approved.access_request.unwrap().state(),
        AccessRequestState::Approved
    );
    let answer = eventually(|| ada.fetches(&asked, CODE)).await;
    let opened = pair.open_bytes(&answer.encrypted_user_key, &answer.encryption);
    assert_eq!(opened, b"material of this user");
    let released = broker.site.entries("access_request.approve_for_member");
    let released = released
        .iter()
        .filter(|entry| entry["kind"] == "outcome" && entry["outcome"] == "ok");
    assert_eq!(released.count(), 1);
}
