//! An approver approves the request of a member: the token encrypts the user key to the new device.

use std::sync::Arc;

use serde_json::Value;
use tokio::task::JoinSet;

use keybroker_proto::{
    self as proto, AccessApprover, AccessRequestState, DeleteUserKeyRequest, DeviceState,
};

use crate::{
    client::{Caller, NAME, refused},
    identity::{Identity, Options},
    process::Broker,
    sealed::Pair,
    tokens::{ADA, BOB, start, start_sealed},
};

use super::{
    approvers::{CAROL, Command, approver, mappings, token},
    member::{App, CODE, Member, spki},
};

pub(super) const DAVE: &str = "1b9d6bcd-bbfd-4b2d-9b5d-ab8dfbbd4bed";

fn approval(
    request: &proto::AccessRequest,
    asked: &proto::AccessRequest,
) -> proto::ApproveForMemberRequest {
    let pairs = request.phrase.iter().zip(&asked.phrase);
    let hidden = pairs.filter(|(shown, _)| shown.is_empty());
    proto::ApproveForMemberRequest {
        access_request_id: asked.id.clone(),
        phrase_words: hidden.map(|(_, said)| said.clone()).collect(),
    }
}

/// What the approver sends after the member said the two words.
pub(super) async fn heard(
    approver: &Member,
    asked: &proto::AccessRequest,
) -> proto::ApproveForMemberRequest {
    let listed = approver.requests().await;
    let shown = listed.iter().find(|one| one.id == asked.id).unwrap();
    approval(shown, asked)
}

/// A request to administrators, with a key pair that the test can open.
pub(super) async fn asks(member: &Member, app: &App) -> (proto::AccessRequest, Pair) {
    let pair = Pair::fresh();
    let mut wanted = app.wants(AccessApprover::Administrator);
    wanted.public_key.clone_from(&pair.public);
    let made = member.create_access_request(wanted).await.unwrap();
    (made.access_request.unwrap(), pair)
}

pub(super) fn dave(broker: &Broker, service: &Identity) -> Member {
    Member::with_token(broker, DAVE, &token(service, DAVE, "approvers"))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_token_seals_the_user_key_to_the_new_device() {
    let service = Identity::start(Options::default());
    let broker = start_sealed(&service, &mappings());
    let (ada, first) = Member::with_first_device(&broker, &service, ADA).await;
    let second = App::new(2);
    let (asked, pair) = asks(&ada, &second).await;
    let carol = approver(&broker, &service, "approvers");
    let right = heard(&carol, &asked).await;
    // Wrong words, swapped words, and persons who may not approve.
    let swapped = right.phrase_words.iter().rev().cloned().collect();
    for phrase_words in [vec!["abacus".to_owned(), "abacus".to_owned()], swapped] {
        let wrong = proto::ApproveForMemberRequest {
            phrase_words,
            ..right.clone()
        };
        refused(carol.approve_for_member(wrong).await, "REQUEST");
    }
    let own = Member::with_token(&broker, ADA, &token(&service, ADA, "approvers"));
    refused(own.approve_for_member(right.clone()).await, "POLICY");
    refused(ada.approve_for_member(right.clone()).await, "POLICY");
    let of_bob = approver(&broker, &service, "approvers-of-bob");
    refused(of_bob.approve_for_member(right.clone()).await, "POLICY");
    let pending = ada.fetches(&asked, CODE).await.unwrap();
    assert_eq!(pending.state(), AccessRequestState::Pending);

    let approved = carol.approve_for_member(right.clone()).await.unwrap();
    let approved = approved.access_request.unwrap();
    assert_eq!(approved.state(), AccessRequestState::Approved);
    assert!(approved.public_key.is_empty());
    refused(carol.approve_for_member(right).await, "DEVICE_STATE");
    // The approver gets nothing of the answer, and the new device opens it.
    refused(carol.fetches(&asked, CODE).await, "POLICY");
    let answer = ada.fetches(&asked, CODE).await.unwrap();
    assert_eq!(answer.encryption, "rsa-oaep-sha1");
    let opened = pair.open_bytes(&answer.encrypted_user_key, &answer.encryption);
    assert_eq!(opened, b"material of this user");
    ada.confirms(&asked).await.unwrap();
    let mut trust = second.trust(ADA, 1, &second);
    trust.access_request_id.clone_from(&asked.id);
    let trusted = ada.establish_trust(trust).await.unwrap().device.unwrap();
    assert_eq!(trusted.state(), DeviceState::Trusted);
    // The member sees the approval of the own account.
    let shown = ada.requests().await.remove(0);
    assert_eq!(shown.decided_by, format!("token:vault:{CAROL}"));

    let audit = broker.site.audit();
    let entries = audit
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    let outcome = entries.into_iter().find(|entry| {
        entry["action"] == "access_request.approve_for_member"
            && entry["kind"] == "outcome"
            && entry["outcome"] == "ok"
    });
    let outcome = outcome.unwrap();
    assert_eq!(
        outcome["principal"],
        format!("token:vault:{CAROL}").as_str()
    );
    assert_eq!(outcome["asked_by"], format!("token:vault:{ADA}").as_str());
    assert_eq!(outcome["user"], ADA);
    let sha256 = hex::encode(&asked.public_key_sha256);
    assert_eq!(outcome["public_key"], sha256.as_str());
    assert!(outcome["record_id"].is_string() && outcome["wrapping_key"].is_string());
    ada.keys_of(&first).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_approvers_one_wins_or_both_are_needed() {
    let service = Identity::start(Options::default());
    let broker = start_sealed(&service, &mappings());
    let (ada, _) = Member::with_first_device(&broker, &service, ADA).await;
    let approvers = [
        Arc::new(approver(&broker, &service, "approvers")),
        Arc::new(dave(&broker, &service)),
    ];
    for number in 2..5 {
        let (asked, _) = asks(&ada, &App::new(number)).await;
        let right = heard(&approvers[0], &asked).await;
        let mut decisions = JoinSet::new();
        for approver in &approvers {
            let (approver, right) = (Arc::clone(approver), right.clone());
            decisions.spawn(async move { approver.approve_for_member(right).await.is_ok() });
        }
        let won = decisions.join_all().await;
        assert_eq!(won.iter().filter(|won| **won).count(), 1, "{won:?}");
    }

    let both = format!("{}\n[devices]\napprovers_needed = 2\n", mappings());
    let broker = start_sealed(&service, &both);
    let (ada, _) = Member::with_first_device(&broker, &service, ADA).await;
    let (asked, pair) = asks(&ada, &App::new(2)).await;
    let [carol, dave] = [
        approver(&broker, &service, "approvers"),
        dave(&broker, &service),
    ];
    let right = heard(&carol, &asked).await;
    let first = carol.approve_for_member(right.clone()).await.unwrap();
    let first = first.access_request.unwrap();
    assert_eq!(first.state(), AccessRequestState::Pending);
    assert_eq!(first.first_approved_by, format!("token:vault:{CAROL}"));
    refused(
        carol.approve_for_member(right.clone()).await,
        "DEVICE_STATE",
    );
    let pending = ada.fetches(&asked, CODE).await.unwrap();
    assert!(pending.encrypted_user_key.is_empty());
    let words = right.phrase_words.clone();
    let command = Command::of(&broker, &token(&service, DAVE, "approvers"));
    let id = hex::encode(&asked.id);
    let approve = ["device", "approve", &id, "--words", &words[0], &words[1]];
    assert_eq!(command.json(&approve)["state"], "approved");
    refused(dave.approve_for_member(right).await, "DEVICE_STATE");
    let answer = ada.fetches(&asked, CODE).await.unwrap();
    let opened = pair.open_bytes(&answer.encrypted_user_key, &answer.encryption);
    assert_eq!(opened, b"material of this user");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_released_for_a_wrong_request() {
    let service = Identity::start(Options::default());
    let broker = start_sealed(&service, &mappings());
    let (ada, _) = Member::with_first_device(&broker, &service, ADA).await;
    let carol = approver(&broker, &service, "approvers");
    // A request for another device of the member.
    let to_device = ada
        .asks(&App::new(2), AccessApprover::Device)
        .await
        .unwrap();
    let right = heard(&carol, &to_device).await;
    refused(carol.approve_for_member(right).await, "DEVICE_STATE");
    // A public key of the attacker, and a request that was moved to another member.
    let (asked, _) = asks(&ada, &App::new(3)).await;
    let right = heard(&carol, &asked).await;
    let evil = hex::encode(spki());
    let good = hex::encode(&asked.public_key);
    let edit = |set: String| {
        let id = hex::encode(&asked.id);
        let update = format!("UPDATE access_requests SET {set} WHERE request_id = x'{id}'");
        broker.site.sql(&update);
    };
    edit(format!("public_key = x'{evil}'"));
    refused(
        carol.approve_for_member(right.clone()).await,
        "RECORD_DAMAGED",
    );
    edit(format!("public_key = x'{good}', user = '{BOB}'"));
    refused(
        carol.approve_for_member(right.clone()).await,
        "RECORD_DAMAGED",
    );
    edit(format!("user = '{ADA}'"));
    // A removed user key.
    let mut lifecycle = Caller::of(&broker, "lifecycle").keys;
    let delete = DeleteUserKeyRequest {
        user: ADA.to_owned(),
        key_name: NAME.to_owned(),
        expected_revision: 1,
        request_id: String::new(),
    };
    lifecycle.delete_user_key(delete).await.unwrap();
    refused(carol.approve_for_member(right).await, "KEY_NOT_FOUND");

    // A user key under a plain wrapping key cannot be sealed.
    let broker = start(&service, &mappings());
    let (ada, _) = Member::with_first_device(&broker, &service, ADA).await;
    let carol = approver(&broker, &service, "approvers");
    let (asked, _) = asks(&ada, &App::new(2)).await;
    let right = heard(&carol, &asked).await;
    refused(carol.approve_for_member(right).await, "RELEASE_FORM");
    let pending = ada.fetches(&asked, CODE).await.unwrap();
    assert_eq!(pending.state(), AccessRequestState::Pending);
}
