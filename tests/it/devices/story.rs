//! The whole way of a member: first device, second device by the first, a thief, a lost device, a new user key.

use serde_json::Value;

use keybroker_bitwarden::FingerprintPhrase;
use keybroker_proto::{self as proto, AccessApprover, AccessRequestState, DeviceState};

use crate::{
    client::refused,
    identity::{Identity, Options},
    tokens::{ADA, BOB, start},
};

use super::member::{App, CODE, Member};

#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::too_many_lines, reason = "one story")]
async fn a_second_device_is_approved_by_the_first() {
    let service = Identity::start(Options::default());
    let broker = start(&service, "");
    let (ada, first) = Member::with_first_device(&broker, &service, ADA).await;
    let keys = ada.keys_of(&first).await.unwrap();
    assert_eq!((keys.keys, keys.revision), (Some(first.keys()), 1));

    let second = App::new(2);
    refused(ada.keys_of(&second).await, "DEVICE_NOT_FOUND");
    let request = ada.asks(&second, AccessApprover::Device).await.unwrap();
    assert_eq!(request.state(), AccessRequestState::Pending);
    // Both apps compute the phrase themselves, and so does the broker.
    let phrase = FingerprintPhrase::new(ADA, &request.public_key);
    assert_eq!(request.phrase, phrase.words());
    let pending = ada.fetches(&request, CODE).await.unwrap();
    assert_eq!(pending.state(), AccessRequestState::Pending);
    assert!(pending.encrypted_user_key.is_empty());

    // A thief with another account reaches nothing of it.
    let bob = Member::of(&broker, &service, BOB);
    refused(bob.fetches(&request, CODE).await, "DEVICE_NOT_FOUND");
    refused(bob.denies(&request).await, "DEVICE_NOT_FOUND");
    refused(bob.approves(&request, &first).await, "DEVICE_NOT_FOUND");
    refused(bob.keys_of(&first).await, "DEVICE_NOT_FOUND");
    assert!(bob.requests().await.is_empty() && bob.devices().await.is_empty());

    let approved = ada.approves(&request, &first).await.unwrap();
    assert_eq!(approved.state(), AccessRequestState::Approved);
    assert_eq!(approved.decided_by_device_id, first.id);
    for _ in 0..2 {
        let answer = ada.fetches(&request, CODE).await.unwrap();
        assert_eq!(answer.encrypted_user_key, b"sealed answer");
        assert_eq!(answer.encryption, "rsa-oaep-sha256");
    }
    ada.confirms(&request).await.unwrap();
    refused(ada.fetches(&request, CODE).await, "DEVICE_STATE");
    refused(ada.confirms(&request).await, "DEVICE_STATE");

    let mut trust = second.trust(ADA, 1, &second);
    trust.access_request_id.clone_from(&request.id);
    let trusted = ada.establish_trust(trust).await.unwrap().device.unwrap();
    assert_eq!(trusted.state(), DeviceState::Trusted);
    assert!(trusted.verified && !trusted.altered);
    let keys = ada.keys_of(&second).await.unwrap();
    assert_eq!(keys.keys, Some(second.keys()));
    let listed = ada.devices().await;
    assert_eq!(listed.len(), 2);
    assert!(
        listed
            .iter()
            .all(|device| device.verified && device.last_use_time.is_some())
    );

    let audit = broker.site.audit();
    let entries: Vec<Value> = audit
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .filter(|entry: &Value| entry["access_request"] == hex::encode(&request.id))
        .collect();
    let approval: Vec<_> = entries
        .iter()
        .filter(|entry| entry["action"] == "access_request.approve" && entry["kind"] == "outcome")
        .collect();
    let [approval] = approval[..] else {
        panic!("{entries:#?}");
    };
    let ada_name = format!("token:vault:{ADA}");
    assert_eq!(approval["principal"], ada_name.as_str());
    assert_eq!(approval["asked_by"], ada_name.as_str());
    assert_eq!(approval["device"], hex::encode(&second.id));
    let sha256 = hex::encode(&request.public_key_sha256);
    assert_eq!(approval["public_key"], sha256.as_str());
    for action in ["access_request.create", "access_request.fetch"] {
        assert!(
            entries.iter().any(|entry| entry["action"] == action),
            "{action}"
        );
    }
    let code = String::from_utf8(CODE.to_vec()).unwrap();
    assert!(!audit.contains(&code) && !broker.site.log().contains(&code));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_device_is_untrusted_and_the_key_rotated() {
    let service = Identity::start(Options::default());
    let broker = start(&service, "");
    let (ada, first) = Member::with_first_device(&broker, &service, ADA).await;
    let [phone, tablet] = [2, 3].map(App::new);
    ada.trusts(&phone, &first).await.unwrap();
    ada.trusts(&tablet, &phone).await.unwrap();
    let rename = |app: &App| proto::RenameDeviceRequest {
        device_id: app.id.clone(),
        name: "Ada's tablet".to_owned(),
    };
    let renamed = ada.rename_device(rename(&tablet)).await.unwrap();
    assert_eq!(renamed.device.unwrap().name, "Ada's tablet");

    // A report needs no signature, and ends no trust.
    let report = || proto::ReportDeviceLostRequest {
        device_id: phone.id.clone(),
    };
    let reported = ada.report_device_lost(report()).await.unwrap();
    let reported = reported.device.unwrap();
    assert!(reported.lost_time.is_some());
    assert_eq!(reported.state(), DeviceState::Trusted);
    refused(ada.report_device_lost(report()).await, "DEVICE_STATE");

    let ended = ada.end(&[&phone], true, Some(&first));
    let ended = ada.untrust_devices(ended).await.unwrap().devices;
    assert_eq!(ended.len(), 1);
    assert_eq!(ended[0].state(), DeviceState::Lost);
    assert!(ended[0].encrypted_public_key.is_empty());
    refused(ada.keys_of(&phone).await, "DEVICE_STATE");
    let again = ada.end(&[&phone], true, Some(&first));
    refused(ada.untrust_devices(again).await, "DEVICE_STATE");
    let stored = broker.site.sql(
        "SELECT length(sealed_user_key) + length(sealed_public_key) + length(sealed_private_key) \
         FROM devices WHERE state = 'lost'",
    );
    assert_eq!(stored.trim(), "0");

    let rotation = ada.rotation(1, b"new user key", &[&first, &tablet], &[], &first);
    assert_eq!(ada.rotate_devices(rotation).await.unwrap().revision, 2);
    for app in [&first, &tablet] {
        let keys = ada.keys_of(app).await.unwrap();
        assert_eq!(keys.revision, 2);
        let keys = keys.keys.unwrap();
        assert!(keys.user_key.starts_with(b"rotated user key new user key"));
        assert_eq!(keys.private_key, app.keys().private_key);
    }
    assert_eq!(ada.holder.unwrap(ADA).await.unwrap(), b"new user key");

    // All of them, also the one that signs.
    let all = ada.end(&[], false, Some(&tablet));
    let ended = ada.untrust_devices(all).await.unwrap().devices;
    assert_eq!(ended.len(), 2);
    let none = ada.end(&[], false, Some(&tablet));
    refused(ada.untrust_devices(none).await, "DEVICE_SIGNATURE");
    // Without any trusted device, the member begins again.
    let mut trust = tablet.trust(ADA, 2, &tablet);
    trust.access_request_id.clear();
    ada.establish_trust(trust).await.unwrap();
}
