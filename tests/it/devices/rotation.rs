//! Rotations: all devices and the user key, or nothing.

use std::{fs, thread, time::Duration};

use crate::{
    client::{Caller, refused},
    identity::{Identity, Options},
    site::policy_section,
    tokens::{ADA, start, start_on},
};

use super::member::{App, Member};

/// Number of rotations that are cut off. More follow until a rotation was not there and another was whole.
const ROUNDS: u32 = 8;
const ROUNDS_MAX: u32 = 16;

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_names_every_trusted_device_once() {
    let service = Identity::start(Options::default());
    let broker = start(&service, "");
    let (ada, first) = Member::with_first_device(&broker, &service, ADA).await;
    let [second, third] = [2, 3].map(App::new);
    ada.trusts(&second, &first).await.unwrap();
    ada.trusts(&third, &first).await.unwrap();
    for (kept, untrusted) in [
        (&[&first, &second][..], &[][..]),
        (&[&first], &[&second]),
        (&[&first, &second, &second], &[&third]),
        (&[&first, &second, &third], &[&third]),
        (&[], &[&first, &second, &third, &App::new(4)]),
    ] {
        let rotation = ada.rotation(1, b"new user key", kept, untrusted, &first);
        refused(ada.rotate_devices(rotation).await, "DEVICE_STATE");
    }
    let stale = ada.rotation(2, b"new user key", &[&first, &second, &third], &[], &first);
    refused(ada.rotate_devices(stale).await, "REVISION");
    assert_eq!(ada.keys_of(&first).await.unwrap().revision, 1);

    // The public key of the third device did not open.
    let rotation = ada.rotation(1, b"new user key", &[&first, &second], &[&third], &second);
    assert_eq!(
        ada.rotate_devices(rotation.clone()).await.unwrap().revision,
        2
    );
    refused(ada.keys_of(&third).await, "DEVICE_STATE");
    refused(ada.rotate_devices(rotation).await, "DEVICE_SIGNATURE");
    assert_eq!(ada.holder.unwrap(ADA).await.unwrap(), b"new user key");
}

/// With the published policy `devices-only`, an access token reaches no user key, and a trusted device still rotates it.
#[tokio::test(flavor = "multi_thread")]
async fn a_trusted_device_rotates_a_key_that_no_access_token_replaces() {
    let folder = tempfile::tempdir().unwrap();
    let policy = include_str!("../../../docs/policies/devices-only.cedar");
    fs::write(folder.path().join("devices-only.cedar"), policy).unwrap();
    let service = Identity::start(Options::default());
    let broker = start(&service, &policy_section(folder.path()));
    let (ada, first) = Member::with_first_device(&broker, &service, ADA).await;
    refused(ada.holder.unwrap(ADA).await, "POLICY");
    refused(ada.holder.replace(ADA, 1).await, "POLICY");
    let rotation = ada.rotation(1, b"new user key", &[&first], &[], &first);
    assert_eq!(ada.rotate_devices(rotation).await.unwrap().revision, 2);
    let forged = ada.rotation(2, b"of a thief", &[&first], &[], &App::new(2));
    refused(ada.rotate_devices(forged).await, "DEVICE_SIGNATURE");
    let key = Caller::of(&broker, "releaser").unwrap(ADA).await.unwrap();
    assert_eq!(key.key_material, b"new user key");
}

/// A broker that is killed at any moment of a rotation leaves the old keys everywhere or the new keys everywhere.
#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_that_is_cut_off_is_whole_or_not_there() {
    let service = Identity::start(Options::default());
    let mut broker = start(&service, "");
    let (mut ada, first) = Member::with_first_device(&broker, &service, ADA).await;
    let apps: Vec<App> = (2..=8).map(App::new).collect();
    for app in &apps {
        ada.trusts(app, &first).await.unwrap();
    }
    let mut kept: Vec<&App> = vec![&first];
    kept.extend(&apps);
    let (mut not_there, mut whole) = (0, 0);
    // The time of a rotation is not known, so the pause approaches it: most kills are near the commit.
    let mut pause = Duration::from_millis(6);
    for round in 0..ROUNDS_MAX {
        let before = ada.keys_of(&first).await.unwrap().revision;
        let material = format!("user key of round {round}");
        let rotation = ada.rotation(before, material.as_bytes(), &kept, &[], &first);
        let call = tokio::spawn(async move { ada.rotate_devices(rotation).await.is_ok() });
        thread::sleep(pause);
        let site = broker.kill();
        let was_answered = call.await.unwrap();
        broker = start_on(site);
        ada = Member::of(&broker, &service, ADA);
        let record = ada.holder.unwrap(ADA);
        let record = record.await.unwrap();
        let after = ada.keys_of(&first).await.unwrap().revision;
        assert!(after == before || after == before + 1);
        assert!(
            !was_answered || after == before + 1,
            "an answered rotation is there"
        );
        for app in &kept {
            let keys = ada.keys_of(app).await.unwrap();
            assert_eq!(keys.revision, after, "{}", app.name);
            if after > before {
                let expected = [b"rotated user key ", material.as_bytes(), &app.id].concat();
                assert_eq!(keys.keys.unwrap().user_key, expected);
            }
        }
        assert_eq!(record == material.as_bytes(), after > before);
        if after > before {
            whole += 1;
            pause /= 2;
        } else {
            not_there += 1;
            pause *= 2;
        }
        if round + 1 >= ROUNDS && not_there > 0 && whole > 0 {
            break;
        }
    }
    assert!(
        not_there > 0 && whole > 0,
        "{not_there} rotations were not there, {whole} were whole"
    );
    let (site, _) = broker.stop();
    let checked = site.run(&["store", "check"]);
    assert_eq!(checked.code, Some(0), "{checked:#?}");
}
