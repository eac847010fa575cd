//! Requests for access: decided once, answered once, with the right code, in time.

use std::{process::Command, sync::Arc};

use tokio::task::JoinSet;

use keybroker_proto::{AccessApprover, AccessRequestState};

use crate::{
    client::{Caller, NAME, refused},
    identity::{Identity, Options},
    process::Broker,
    tokens::{ADA, start, start_as},
};
use keybroker_proto::DeleteUserKeyRequest;

use super::member::{App, CODE, Member};

const WRONG: &[u8] = b"another code of 25 bytes!";

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_decided_once() {
    let service = Identity::start(Options::default());
    let broker = start(&service, "");
    let (ada, first) = Member::with_first_device(&broker, &service, ADA).await;
    let second = App::new(2);
    let request = ada.asks(&second, AccessApprover::Device).await.unwrap();
    let approval = ada.approval(&request, &first, b"sealed");
    ada.approve_access_request(approval.clone()).await.unwrap();
    // The same message again, and another answer.
    refused(ada.approve_access_request(approval).await, "DEVICE_STATE");
    refused(ada.approves(&request, &first).await, "DEVICE_STATE");
    assert_eq!(
        ada.fetches(&request, CODE)
            .await
            .unwrap()
            .encrypted_user_key,
        b"sealed"
    );
    // The member withdraws the approval before it is confirmed.
    let revoked = ada.denies(&request).await.unwrap();
    assert_eq!(revoked.state(), AccessRequestState::Revoked);
    refused(ada.fetches(&request, CODE).await, "DEVICE_STATE");
    refused(ada.denies(&request).await, "DEVICE_STATE");

    let request = ada.asks(&second, AccessApprover::Device).await.unwrap();
    assert_eq!(
        ada.denies(&request).await.unwrap().state(),
        AccessRequestState::Denied
    );
    refused(ada.approves(&request, &first).await, "DEVICE_STATE");
    refused(ada.fetches(&request, CODE).await, "DEVICE_STATE");
    // A signed approval is for one request only, also for the same public key.
    let again = ada.asks(&second, AccessApprover::Device).await.unwrap();
    let mut replayed = ada.approval(&request, &first, b"sealed");
    replayed.access_request_id.clone_from(&again.id);
    refused(
        ada.approve_access_request(replayed).await,
        "DEVICE_SIGNATURE",
    );

    // A device has one pending request: a newer one replaces it.
    let newest = ada.asks(&second, AccessApprover::Device).await.unwrap();
    refused(ada.approves(&again, &first).await, "DEVICE_NOT_FOUND");
    refused(ada.fetches(&again, CODE).await, "DEVICE_NOT_FOUND");
    ada.approves(&newest, &first).await.unwrap();
    let states: Vec<_> = ada
        .requests()
        .await
        .iter()
        .map(keybroker_proto::AccessRequest::state)
        .collect();
    let expected = [
        AccessRequestState::Approved,
        AccessRequestState::Denied,
        AccessRequestState::Revoked,
    ];
    assert_eq!(states, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_decisions_at_the_same_moment_one_wins() {
    let service = Identity::start(Options::default());
    let broker = start(&service, "");
    let (ada, first) = Member::with_first_device(&broker, &service, ADA).await;
    let ada = Arc::new(ada);
    for _ in 0..3 {
        let request = ada
            .asks(&App::new(2), AccessApprover::Device)
            .await
            .unwrap();
        let mut decisions = JoinSet::new();
        for number in 0..8_u8 {
            let approval = ada.approval(&request, &first, &[number]);
            let (ada, request) = (Arc::clone(&ada), request.clone());
            decisions.spawn(async move {
                if number % 2 == 0 {
                    ada.approve_access_request(approval).await.is_ok()
                } else {
                    ada.denies(&request).await.is_ok()
                }
            });
        }
        // An approval may be withdrawn by a denial, but a decided request is never approved.
        let won = decisions.join_all().await;
        let won = won.into_iter().filter(|won| *won).count();
        assert!((1..=2).contains(&won), "{won}");
        let request = ada.requests().await.remove(0);
        assert_ne!(request.state(), AccessRequestState::Pending);
        let expected = match request.state() {
            AccessRequestState::Revoked => 2,
            _ => 1,
        };
        assert_eq!(won, expected, "{request:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_codes_are_counted_for_the_requesting_principal() {
    let service = Identity::start(Options::default());
    let broker = start(&service, "");
    let (ada, first) = Member::with_first_device(&broker, &service, ADA).await;
    let second = App::new(2);
    let request = ada.asks(&second, AccessApprover::Device).await.unwrap();
    ada.approves(&request, &first).await.unwrap();
    for _ in 0..4 {
        refused(ada.fetches(&request, WRONG).await, "ACCESS_CODE");
    }
    // Four wrong codes are no reason to refuse the right one.
    ada.fetches(&request, CODE).await.unwrap();
    refused(ada.fetches(&request, WRONG).await, "ACCESS_CODE");
    refused(ada.fetches(&request, CODE).await, "DEVICE_STATE");
    assert_eq!(ada.requests().await[0].state(), AccessRequestState::Revoked);
    // The code of a request is worth nothing for another one, and is stored nowhere.
    let other = ada
        .asks(&App::new(3), AccessApprover::Device)
        .await
        .unwrap();
    for _ in 0..5 {
        refused(ada.fetches(&other, WRONG).await, "ACCESS_CODE");
    }
    refused(ada.fetches(&other, CODE).await, "DEVICE_STATE");
    assert_eq!(ada.requests().await[0].state(), AccessRequestState::Denied);
    let counted = broker.site.audit();
    assert_eq!(
        counted
            .matches("\"action\":\"access_request.wrong_code\"")
            .count(),
        // An intent and an outcome for each.
        20
    );
    let dump = broker
        .site
        .sql("SELECT hex(code_mac), hex(answer) FROM access_requests");
    assert!(!dump.contains(&hex::encode_upper(CODE)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_has_a_limited_number_of_requests() {
    let service = Identity::start(Options::default());
    let broker = start(&service, "");
    let (ada, _) = Member::with_first_device(&broker, &service, ADA).await;
    let mut requests = Vec::new();
    let requests_of: Vec<App> = (10..15).map(App::new).collect();
    for app in &requests_of {
        requests.push(ada.asks(app, AccessApprover::Administrator).await.unwrap());
    }
    let sixth = ada.asks(&App::new(20), AccessApprover::Device).await;
    refused(sixth, "LIMIT");
    // An app with the id of a device and another key does not replace the request of the device: it is a sixth request.
    let other = App::new(requests_of[0].id[0]);
    refused(
        ada.asks(&other, AccessApprover::Administrator).await,
        "LIMIT",
    );
    // A device that asks again replaces its own request.
    let replaced = ada
        .asks(&requests_of[4], AccessApprover::Administrator)
        .await;
    replaced.unwrap();
    let pending = ada.requests().await;
    assert_eq!(pending.len(), 5);
    assert!(pending.iter().any(|one| one.id == requests[0].id));
    ada.denies(&requests[0]).await.unwrap();
    ada.asks(&App::new(20), AccessApprover::Device)
        .await
        .unwrap();
}

/// A broker whose clock is ahead.
fn ahead(broker: Broker, seconds: i64) -> Broker {
    let (site, _) = broker.stop();
    let library = site.folder().join("clock.so");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/it/clock.c");
    let made = Command::new("cc")
        .args(["-shared", "-fPIC", "-O1", "-o"])
        .args([library.as_os_str(), source.as_ref()])
        .status()
        .unwrap();
    assert!(made.success());
    start_as(site, |site| {
        let mut command = site.serve();
        command
            .env("LD_PRELOAD", &library)
            .env("KEYBROKER_TEST_CLOCK", seconds.to_string());
        command
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_and_answers_expire() {
    let service = Identity::start(Options::default());
    let broker = start(&service, "");
    let (ada, first) = Member::with_first_device(&broker, &service, ADA).await;
    let [second, third, fourth] = [2, 3, 4].map(App::new);
    let fetched = ada.asks(&second, AccessApprover::Device).await.unwrap();
    ada.approves(&fetched, &first).await.unwrap();
    ada.fetches(&fetched, CODE).await.unwrap();
    let pending = ada.asks(&third, AccessApprover::Device).await.unwrap();
    let asked = ada
        .asks(&fourth, AccessApprover::Administrator)
        .await
        .unwrap();

    // Six minutes later, the answer that was fetched is consumed.
    let broker = ahead(broker, 360);
    let ada = Member::of(&broker, &service, ADA);
    refused(ada.fetches(&fetched, CODE).await, "DEVICE_STATE");
    assert_eq!(
        ada.fetches(&pending, CODE).await.unwrap().state(),
        AccessRequestState::Pending
    );
    // Sixteen minutes later, the request to another device is over, and the one to an administrator is not.
    let broker = ahead(broker, 960);
    let ada = Member::of(&broker, &service, ADA);
    first.ahead.set(960_000_000);
    refused(ada.approves(&pending, &first).await, "DEVICE_STATE");
    refused(ada.fetches(&pending, CODE).await, "DEVICE_STATE");
    let states: Vec<_> = ada
        .requests()
        .await
        .iter()
        .map(keybroker_proto::AccessRequest::state)
        .collect();
    let expected = [
        AccessRequestState::Pending,
        AccessRequestState::Expired,
        AccessRequestState::Consumed,
    ];
    assert_eq!(states, expected);
    ada.approves(&asked, &first).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_user_key_is_not_requested() {
    let service = Identity::start(Options::default());
    let broker = start(&service, "");
    let (ada, first) = Member::with_first_device(&broker, &service, ADA).await;
    let mut lifecycle = Caller::of(&broker, "lifecycle").keys;
    let delete = DeleteUserKeyRequest {
        user: ADA.to_owned(),
        key_name: NAME.to_owned(),
        expected_revision: 1,
        request_id: String::new(),
    };
    lifecycle.delete_user_key(delete).await.unwrap();
    let second = App::new(2);
    let asked = ada.asks(&second, AccessApprover::Device).await;
    refused(asked, "KEY_NOT_FOUND");
    refused(ada.trusts(&second, &first).await, "KEY_NOT_FOUND");
    let rotation = ada.rotation(1, b"new user key", &[&first], &[], &first);
    refused(ada.rotate_devices(rotation).await, "KEY_NOT_FOUND");
    // The purge of the record removes its devices.
    broker.site.sql("UPDATE records SET deleted_us = 1");
    let (site, _) = broker.stop();
    let purged = site.run(&["store", "purge"]);
    assert_eq!(purged.code, Some(0), "{purged:#?}");
    assert_eq!(site.sql("SELECT count(*) FROM devices").trim(), "0");
}
