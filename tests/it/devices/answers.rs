//! Approvals that no longer hold: after another user key, after the end of a trust, and after the member revoked them.

use keybroker_proto::{self as proto, AccessApprover, AccessRequestState, DeviceState};

use crate::{
    client::{Caller, refused},
    identity::{Identity, Options},
    tokens::{ADA, start},
};

use super::{
    approvers::{approver, mappings},
    member::{App, CODE, Member},
};

/// A request of an app that a trusted device has approved.
async fn approved(member: &Member, app: &App, signer: &App) -> proto::AccessRequest {
    let request = member.asks(app, AccessApprover::Device).await.unwrap();
    member.approves(&request, signer).await.unwrap();
    request
}

/// A request whose answer the app has fetched and confirmed.
async fn consumed(member: &Member, app: &App, signer: &App) -> proto::AccessRequest {
    let request = approved(member, app, signer).await;
    member.fetches(&request, CODE).await.unwrap();
    member.confirms(&request).await.unwrap();
    request
}

/// The trust of an app that signs itself, because its request was approved.
fn own_trust(
    app: &App,
    revision: u64,
    request: &proto::AccessRequest,
) -> proto::EstablishTrustRequest {
    proto::EstablishTrustRequest {
        access_request_id: request.id.clone(),
        ..app.trust(ADA, revision, app)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_opens_only_the_current_user_key() {
    let service = Identity::start(Options::default());
    let broker = start(&service, "");
    let (ada, first) = Member::with_first_device(&broker, &service, ADA).await;
    let [second, third] = [2, 3].map(App::new);
    let unread = approved(&ada, &second, &first).await;
    let read = approved(&ada, &third, &first).await;
    ada.fetches(&read, CODE).await.unwrap();
    let rotation = ada.rotation(1, b"new user key", &[&first], &[], &first);
    ada.rotate_devices(rotation).await.unwrap();
    for (app, request) in [(&second, &unread), (&third, &read)] {
        refused(ada.fetches(request, CODE).await, "DEVICE_STATE");
        let trust = own_trust(app, 2, request);
        refused(ada.establish_trust(trust).await, "DEVICE_SIGNATURE");
    }
    // Another approval is one of the new user key.
    let request = approved(&ada, &second, &first).await;
    ada.fetches(&request, CODE).await.unwrap();

    // The answer of a deleted user key is not handed out, and a purge removes it.
    let lifecycle = Caller::of(&broker, "lifecycle");
    lifecycle.delete(ADA, 2).await.unwrap();
    refused(ada.fetches(&request, CODE).await, "KEY_NOT_FOUND");
    let (site, _) = broker.stop();
    site.sql("UPDATE records SET deleted_us = 1");
    let purged = site.run(&["store", "purge"]);
    assert_eq!(purged.code, Some(0), "{purged:#?}");
    // A new user key with the same name would have the same revision again.
    assert_eq!(site.sql("SELECT count(*) FROM access_requests").trim(), "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_void_after_the_end_of_a_trust() {
    let service = Identity::start(Options::default());
    let broker = start(&service, &mappings());
    let (ada, first) = Member::with_first_device(&broker, &service, ADA).await;
    let [second, third] = [2, 3].map(App::new);
    ada.trusts(&second, &first).await.unwrap();
    // The lost device approved another one in advance.
    let unread = approved(&ada, &third, &second).await;
    let ended = ada.end(&[&second], true, Some(&first));
    ada.untrust_devices(ended).await.unwrap();
    refused(ada.fetches(&unread, CODE).await, "DEVICE_STATE");

    let read = approved(&ada, &third, &first).await;
    ada.fetches(&read, CODE).await.unwrap();
    let carol = approver(&broker, &service, "approvers");
    let all = proto::UntrustDevicesRequest {
        user: ADA.to_owned(),
        all: true,
        ..proto::UntrustDevicesRequest::default()
    };
    carol.untrust_devices(all).await.unwrap();
    refused(ada.fetches(&read, CODE).await, "DEVICE_STATE");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_revokes_an_approval_and_the_trust_that_followed() {
    let service = Identity::start(Options::default());
    let broker = start(&service, &mappings());
    let (ada, first) = Member::with_first_device(&broker, &service, ADA).await;
    let [second, third, fourth] = [2, 3, 4].map(App::new);
    // The answer was consumed, but no trust followed yet. This needs no signature, like a denial.
    let request = consumed(&ada, &second, &first).await;
    let revoked = ada.denies(&request).await.unwrap();
    assert_eq!(revoked.state(), AccessRequestState::Revoked);
    let trust = own_trust(&second, 1, &request);
    refused(ada.establish_trust(trust).await, "DEVICE_SIGNATURE");

    // A trust followed. An access token alone does not end it, and neither does the signature of a stranger.
    let request = consumed(&ada, &third, &first).await;
    let trust = own_trust(&third, 1, &request);
    ada.establish_trust(trust).await.unwrap();
    for signer in [None, Some(&fourth)] {
        let refusal = ada.ends_approval(&request, signer).await;
        refused(refusal, "DEVICE_SIGNATURE");
    }
    ada.keys_of(&third).await.unwrap();
    let revoked = ada.ends_approval(&request, Some(&first)).await.unwrap();
    assert_eq!(revoked.state(), AccessRequestState::Revoked);
    refused(ada.keys_of(&third).await, "DEVICE_STATE");
    let again = ada.ends_approval(&request, Some(&first)).await;
    refused(again, "DEVICE_STATE");

    // An approver does it without a signature, also if the device did not confirm the answer.
    let request = approved(&ada, &fourth, &first).await;
    let trust = own_trust(&fourth, 1, &request);
    ada.establish_trust(trust).await.unwrap();
    let carol = approver(&broker, &service, "approvers");
    carol.denies(&request).await.unwrap();
    let states: Vec<_> = ada
        .devices()
        .await
        .iter()
        .map(proto::Device::state)
        .collect();
    let expected = [
        DeviceState::Trusted,
        DeviceState::Untrusted,
        DeviceState::Untrusted,
    ];
    assert_eq!(states, expected);
    ada.keys_of(&first).await.unwrap();
}
