//! Bad inputs: signatures, blobs, ids of other members, limits.

use keybroker_proto::{self as proto, AccessApprover};

use crate::{
    client::{NAME, reason, refused},
    identity::{Identity, Options},
    tokens::{ADA, BOB, start},
};

use super::member::{App, Member, now_us};

/// An access token alone must not lock a member out.
#[tokio::test(flavor = "multi_thread")]
async fn an_access_token_alone_changes_no_trust() {
    let service = Identity::start(Options::default());
    let broker = start(&service, "");
    let (ada, first) = Member::with_first_device(&broker, &service, ADA).await;
    let thief = App::new(9);
    // The thief is signed in as Ada. A device of the thief's own is not trusted, with its own signature or with a wrong one.
    refused(ada.trusts(&thief, &thief).await, "DEVICE_SIGNATURE");
    let posing = App::new(1);
    refused(ada.trusts(&thief, &posing).await, "DEVICE_SIGNATURE");
    refused(ada.trusts(&posing, &posing).await, "DEVICE_SIGNATURE");
    // A request of the thief permits nothing while it is pending. The thief cannot approve the request.
    let request = ada.asks(&thief, AccessApprover::Device).await.unwrap();
    for signer in [&thief, &posing] {
        refused(ada.approves(&request, signer).await, "DEVICE_SIGNATURE");
    }
    let mut trust = thief.trust(ADA, 1, &thief);
    trust.access_request_id.clone_from(&request.id);
    refused(ada.establish_trust(trust).await, "DEVICE_SIGNATURE");
    for signer in [None, Some(&thief), Some(&posing)] {
        for apps in [&[&first][..], &[]] {
            let ended = ada.end(apps, false, signer);
            refused(ada.untrust_devices(ended).await, "DEVICE_SIGNATURE");
        }
    }
    let rotation = ada.rotation(1, b"of the thief", &[&first], &[], &posing);
    refused(ada.rotate_devices(rotation).await, "DEVICE_SIGNATURE");
    // Nothing was changed.
    let keys = ada.keys_of(&first).await.unwrap();
    assert_eq!((keys.keys, keys.revision), (Some(first.keys()), 1));
    assert_eq!(ada.devices().await.len(), 1);
    assert_eq!(
        ada.holder.unwrap(ADA).await.unwrap(),
        b"material of this user"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signature_counts_once_for_exactly_one_change() {
    type Edit = fn(&mut proto::EstablishTrustRequest);
    let service = Identity::start(Options::default());
    let broker = start(&service, "");
    let (ada, first) = Member::with_first_device(&broker, &service, ADA).await;
    let [second, third] = [2, 3].map(App::new);
    let trust = second.trust(ADA, 1, &first);
    ada.establish_trust(trust.clone()).await.unwrap();
    refused(ada.establish_trust(trust.clone()).await, "DEVICE_SIGNATURE");

    // Each signed field counts.
    let edits: [Edit; 7] = [
        |r| r.device_id = vec![8; 16],
        |r| r.name.push('x'),
        |r| r.r#type.push('x'),
        |r| r.verification_key[0] ^= 1,
        |r| r.keys.as_mut().unwrap().user_key.push(0),
        |r| r.keys.as_mut().unwrap().public_key.push(0),
        |r| r.keys.as_mut().unwrap().private_key.push(0),
    ];
    for edit in edits {
        let mut changed = third.trust(ADA, 1, &first);
        edit(&mut changed);
        refused(ada.establish_trust(changed).await, "DEVICE_SIGNATURE");
    }
    // Also bytes that move from one field to the next.
    let mut moved = third.trust(ADA, 1, &first);
    moved.name.push('l');
    moved.r#type = "aptop".to_owned();
    refused(ada.establish_trust(moved).await, "DEVICE_SIGNATURE");

    // The time is signed, and close to the broker's.
    for ahead in [-400_000_000, 400_000_000] {
        let skewed = App::new(1);
        skewed.ahead.set(ahead);
        let late = third.trust(ADA, 1, &skewed);
        refused(ada.establish_trust(late).await, "DEVICE_SIGNATURE");
    }
    let mut postponed = third.trust(ADA, 1, &first);
    postponed.signature.as_mut().unwrap().sign_time_us = now_us() + 1_000_000;
    refused(ada.establish_trust(postponed).await, "DEVICE_SIGNATURE");
    // A signature for one change is not one for another change.
    let ended = proto::UntrustDevicesRequest {
        signature: third.trust(ADA, 1, &first).signature,
        ..ada.end(&[&second], false, None)
    };
    refused(ada.untrust_devices(ended).await, "DEVICE_SIGNATURE");
    ada.trusts(&third, &first).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_of_devices_belong_to_their_member() {
    let service = Identity::start(Options::default());
    let broker = start(&service, "");
    let (ada, of_ada) = Member::with_first_device(&broker, &service, ADA).await;
    // The same id with other keys.
    let (bob, of_bob) = Member::with_first_device(&broker, &service, BOB).await;
    assert_eq!(of_ada.id, of_bob.id);
    let ended = bob.end(&[&of_ada], false, Some(&of_ada));
    refused(bob.untrust_devices(ended).await, "DEVICE_SIGNATURE");
    let other = App::new(5);
    ada.trusts(&other, &of_ada).await.unwrap();
    let ended = bob.end(&[&other], false, Some(&of_bob));
    refused(bob.untrust_devices(ended).await, "DEVICE_NOT_FOUND");
    let foreign = proto::UntrustDevicesRequest {
        user: ADA.to_owned(),
        ..bob.end(&[&other], false, Some(&of_bob))
    };
    refused(bob.untrust_devices(foreign).await, "POLICY");
    let list = proto::ListDevicesRequest {
        user: ADA.to_owned(),
    };
    refused(bob.list_devices(list).await, "POLICY");
    refused(bob.keys_of(&other).await, "DEVICE_NOT_FOUND");
    assert_eq!(
        ada.keys_of(&of_ada).await.unwrap().keys,
        Some(of_ada.keys())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn blobs_and_keys_have_their_limits() {
    let service = Identity::start(Options::default());
    let broker = start(&service, "");
    let (ada, first) = Member::with_first_device(&broker, &service, ADA).await;
    let second = App::new(2);
    for length in [0, 8_193, 1 << 20] {
        let mut trust = second.trust(ADA, 1, &first);
        trust.keys.as_mut().unwrap().private_key = vec![1; length];
        let error = ada.establish_trust(trust).await.unwrap_err();
        assert_eq!(reason(&error), "REQUEST", "{length}: {error:?}");
    }
    // The user key must be the current one of an existing record.
    let stale = second.trust(ADA, 2, &first);
    refused(ada.establish_trust(stale).await, "REVISION");
    let bob = Member::of(&broker, &service, BOB);
    refused(bob.trusts(&second, &second).await, "KEY_NOT_FOUND");

    for public_key in [
        Vec::new(),
        vec![0x30; 294],
        vec![1; 1 << 20],
        // P-256 is not RSA.
        hex::decode(
            "3059301306072a8648ce3d020106082a8648ce3d03010703420004\
             6b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296\
             4fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5",
        )
        .unwrap(),
    ] {
        let mut wanted = second.wants(AccessApprover::Device);
        wanted.public_key = public_key;
        refused(ada.create_access_request(wanted).await, "REQUEST");
    }
    let mut wanted = second.wants(AccessApprover::Device);
    wanted.access_code.truncate(15);
    refused(ada.create_access_request(wanted).await, "REQUEST");
    let mut wanted = second.wants(AccessApprover::Device);
    wanted.key_name = "other".to_owned();
    refused(ada.create_access_request(wanted).await, "KEY_NOT_FOUND");
    let wanted = second.wants(AccessApprover::Unspecified);
    refused(ada.create_access_request(wanted).await, "REQUEST");
    let trusted = first.wants(AccessApprover::Device);
    refused(ada.create_access_request(trusted).await, "DEVICE_STATE");
    assert_eq!(ada.devices().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_has_a_limited_number_of_devices() {
    let service = Identity::start(Options::default());
    let broker = start(&service, "[devices]\ntrusted_max = 3\n");
    let (ada, first) = Member::with_first_device(&broker, &service, ADA).await;
    let apps: Vec<App> = (2..=5).map(App::new).collect();
    ada.trusts(&apps[0], &first).await.unwrap();
    ada.trusts(&apps[1], &first).await.unwrap();
    refused(ada.trusts(&apps[2], &first).await, "LIMIT");
    // A trusted device replaces its own keys, and one that was untrusted makes room.
    ada.trusts(&apps[1], &first).await.unwrap();
    let ended = ada.end(&[&apps[0]], false, Some(&first));
    ada.untrust_devices(ended).await.unwrap();
    ada.trusts(&apps[2], &first).await.unwrap();
    refused(ada.trusts(&apps[3], &first).await, "LIMIT");
    // A thousand rows of one member in SQL, none of which a broker wrote.
    broker.site.sql(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000) \
         INSERT INTO devices SELECT tenant, user, randomblob(16), signer_key_id, state, name, kind, verification_key, key_name, \
         revision, sealed_user_key, sealed_public_key, sealed_private_key, trusted_us, changed_us, signed_us, lost_us, used_us, mac \
         FROM devices, n WHERE device_id = x'01010101010101010101010101010101'",
    );
    refused(ada.trusts(&apps[3], &first).await, "RECORD_DAMAGED");
    let listed = ada.devices().await;
    assert_eq!(listed.len(), 200);
    assert!(listed.iter().any(|device| device.altered));
    assert_eq!(ada.keys_of(&first).await.unwrap().key_name, NAME);
}
