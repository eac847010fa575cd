//! Sealed release with the real binary: sealed wrapping keys, recipients, the floor in the configuration, the move of plain records, and
//! what callers of each API are told.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use aws_lc_rs::{
    encoding::AsDer as _,
    rsa::{
        KeySize, OAEP_SHA1_MGF1SHA1, OAEP_SHA256_MGF1SHA256, OaepPrivateDecryptingKey,
        PrivateDecryptingKey,
    },
};
use base64ct::{Base64, Encoding as _};
use keybroker_proto::{
    BatchUnwrapUserKeysRequest, GetRewrapRequest, ListWrappingKeysRequest, Recipient, RewrapState,
    RotateWrappingKeyRequest, Sealing, StartRewrapRequest, UnwrapUserKeyRequest,
    UnwrapUserKeyResponse, WrappingKeyPurpose, WrappingKeyState,
    batch_unwrap_result::Result as BatchResult,
};
use reqwest::Method;
use serde_json::Value;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::{
    client::{Caller, item, reason, refused},
    client_commands::client,
    modules::{Maker, Stand},
    process::{Broker, until},
    rest::site::RestSite,
    site::{Options, Site},
};

const MATERIAL: &[u8] = b"material of a sealed record";
const DONE_WITHIN: Duration = Duration::from_mins(1);

/// The key pair of a recipient.
pub(crate) struct Pair {
    pub(crate) public: Vec<u8>,
    private: PrivateDecryptingKey,
}

impl Pair {
    pub(crate) fn fresh() -> Self {
        Self::of(KeySize::Rsa2048)
    }

    fn of(size: KeySize) -> Self {
        let private = PrivateDecryptingKey::generate(size).unwrap();
        let public = private.public_key().as_der().unwrap();
        Self {
            public: public.as_ref().to_vec(),
            private,
        }
    }

    /// Opens an answer, and checks what it says about the recipient.
    pub(crate) fn open(&self, answer: &UnwrapUserKeyResponse) -> Vec<u8> {
        assert!(answer.key_material.is_empty(), "not plain");
        let sealed = answer.sealed.as_ref().unwrap();
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &self.public);
        assert_eq!(sealed.recipient_fingerprint, digest.as_ref());
        self.open_bytes(&sealed.ciphertext, &sealed.algorithm)
    }

    /// Opens a ciphertext. `algorithm` is the name in an answer of the user-key service or of the device service.
    pub(crate) fn open_bytes(&self, ciphertext: &[u8], algorithm: &str) -> Vec<u8> {
        let parameters = match algorithm {
            "RSA-OAEP-SHA-1" | "rsa-oaep-sha1" => &OAEP_SHA1_MGF1SHA1,
            "RSA-OAEP-SHA-256" | "rsa-oaep-sha256" => &OAEP_SHA256_MGF1SHA256,
            other => panic!("{other}"),
        };
        let private = OaepPrivateDecryptingKey::new(self.private.clone()).unwrap();
        let mut plaintext = vec![0; private.min_output_size()];
        let opened = private.decrypt(parameters, ciphertext, &mut plaintext, None);
        opened.unwrap().to_vec()
    }
}

pub(crate) fn make_sealed_key(site: &Site) {
    let generate = ["key", "generate", "--bits", "2048", "--purpose", "sealed"];
    site.expect_ok(&generate);
}

/// A broker whose only wrapping key is a sealed one.
pub(crate) fn broker(options: Options) -> Broker {
    let site = Site::without_keys(options);
    site.expect_ok(&["store", "migrate"]);
    make_sealed_key(&site);
    site.expect_ok(&["token", "check"]);
    Broker::start_on(Arc::new(site))
}

/// The field about which a refusal says something, with what it says.
fn violation(status: &Status) -> (String, String) {
    let details = status.get_error_details();
    let violations = &details.bad_request().unwrap().field_violations;
    (
        violations[0].field.clone(),
        violations[0].description.clone(),
    )
}

/// The wrapping keys, as `(purpose, state, sealing)`.
async fn keys(broker: &Broker) -> Vec<(WrappingKeyPurpose, WrappingKeyState, Sealing)> {
    let mut control = Caller::of(broker, "admin").control;
    let listed = control.list_wrapping_keys(ListWrappingKeysRequest {}).await;
    let keys = listed.unwrap().into_inner().wrapping_keys;
    let mut keys: Vec<_> = keys
        .iter()
        .map(|key| (key.purpose(), key.state(), key.sealing()))
        .collect();
    keys.sort();
    keys
}

async fn rewrap(broker: &Broker) {
    let mut control = Caller::of(broker, "admin").control;
    let start = StartRewrapRequest::default();
    control.start_rewrap(start).await.unwrap();
    let since = Instant::now();
    loop {
        let run = control.get_rewrap(GetRewrapRequest {}).await.unwrap();
        let run = run.into_inner().rewrap.unwrap();
        if run.state() == RewrapState::Done {
            assert_eq!(run.failed, 0, "{run:?}");
            return;
        }
        assert!(since.elapsed() < DONE_WITHIN, "{run:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sealed_record_is_released_only_to_a_recipient() {
    let broker = broker(Options::default());
    let (enroller, releaser) = (
        Caller::of(&broker, "enroller"),
        Caller::of(&broker, "releaser"),
    );
    enroller.create("ada", MATERIAL).await.unwrap();
    for size in [KeySize::Rsa2048, KeySize::Rsa3072, KeySize::Rsa4096] {
        let pair = Pair::of(size);
        let answer = releaser.unwrap_for("ada", &pair.public).await.unwrap();
        assert_eq!(pair.open(&answer), MATERIAL);
        assert_eq!(answer.sealed.unwrap().sealing(), Sealing::Enforced);
    }
    let plain = refused(releaser.unwrap("ada").await, "RELEASE_FORM");
    assert_eq!(plain.code(), Code::FailedPrecondition);
    assert_eq!(violation(&plain).0, "recipient");

    // Every change of a record works as under a plain wrapping key.
    enroller.replace("ada", b"second", 1, "").await.unwrap();
    let lifecycle = Caller::of(&broker, "lifecycle");
    let pair = Pair::fresh();
    let answer = releaser.unwrap_for("ada", &pair.public).await.unwrap();
    assert_eq!(pair.open(&answer), b"second");
    lifecycle.restore("ada", 1, 2).await.unwrap();
    let answer = releaser.unwrap_for("ada", &pair.public).await.unwrap();
    assert_eq!(
        (pair.open(&answer).as_slice(), answer.revision),
        (MATERIAL, 3)
    );

    let sealed = (
        WrappingKeyPurpose::Sealed,
        WrappingKeyState::Active,
        Sealing::Enforced,
    );
    assert_eq!(keys(&broker).await, [sealed]);
    let audit = broker.site.audit();
    let recipient = hex::encode(aws_lc_rs::digest::digest(
        &aws_lc_rs::digest::SHA256,
        &pair.public,
    ));
    let with_recipient = |line: &&str| line.contains(&format!(r#""recipient":"{recipient}""#));
    assert_eq!(audit.lines().filter(with_recipient).count(), 2, "{audit}");
    let refusals = audit.lines().filter(|line| line.contains("RELEASE_FORM"));
    assert_eq!(refusals.count(), 1, "{audit}");
    broker.site.assert_no_secrets();

    // All of it survives a restart.
    let (site, _) = broker.stop();
    site.expect_ok(&["store", "check"]);
    let broker = Broker::start_on(site);
    let releaser = Caller::of(&broker, "releaser");
    let answer = releaser.unwrap_for("ada", &pair.public).await.unwrap();
    assert_eq!(pair.open(&answer), MATERIAL);
}

/// The public keys that are refused, each with a word of the reason.
fn bad_recipients() -> Vec<(Vec<u8>, &'static str)> {
    let pair = Pair::fresh();
    let spki = pair.public.clone();
    let of = |modulus: &[u8], exponent: &[u8]| der_of(modulus, exponent);
    let mut odd = vec![0xff; 256];
    let modulus = |length: usize| {
        let mut modulus = vec![0xa5; length];
        modulus[length - 1] = 0x01;
        modulus
    };
    // Divisible by 3: the sum of the bytes is.
    odd[255] = 0xff;
    let private = pair.private.as_der().unwrap();
    vec![
        (Vec::new(), "DER"),
        (b"no key".to_vec(), "DER"),
        (spki[..spki.len() - 1].to_vec(), "DER"),
        ([&spki[..], &[0]].concat(), "DER"),
        (vec![0x30; 60_000], "DER"),
        (private.as_ref().to_vec(), "DER"),
        (P256_PUBLIC.to_vec(), "DER"),
        (of(&modulus(128), &[1, 0, 1]), "1024 bits"),
        (of(&modulus(1_024), &[1, 0, 1]), "at most 4096 bits"),
        (of(&modulus(256), &[3]), "65537"),
        (of(&modulus(256), &[1, 0, 3]), "65537"),
        (of(&odd, &[1, 0, 1]), "weak"),
    ]
}

/// The DER SubjectPublicKeyInfo of an elliptic-curve key (P-256), of another type than RSA: the base point of the curve.
const P256_PUBLIC: [u8; 91] = {
    let head = *b"\x30\x59\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07\x03\x42\x00\x04";
    let point = *b"\x6b\x17\xd1\xf2\xe1\x2c\x42\x47\xf8\xbc\xe6\xe5\x63\xa4\x40\xf2\x77\x03\x7d\x81\x2d\xeb\x33\xa0\xf4\xa1\x39\x45\
\xd8\x98\xc2\x96\x4f\xe3\x42\xe2\xfe\x1a\x7f\x9b\x8e\xe7\xeb\x4a\x7c\x0f\x9e\x16\x2b\xce\x33\x57\x6b\x31\x5e\xce\xcb\xb6\x40\x68\x37\xbf\
\x51\xf5";
    let mut key = [0; 91];
    let mut at = 0;
    while at < 91 {
        key[at] = if at < 27 { head[at] } else { point[at - 27] };
        at += 1;
    }
    key
};

/// Encodes an RSA public key without checking it.
fn der_of(modulus: &[u8], exponent: &[u8]) -> Vec<u8> {
    let integer = |bytes: &[u8]| {
        let sign: &[u8] = if bytes[0] >= 0x80 { &[0] } else { &[] };
        der(0x02, &[sign, bytes].concat())
    };
    let key = der(0x30, &[integer(modulus), integer(exponent)].concat());
    let rsa = b"\x30\x0d\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01\x05\x00";
    let bits = der(0x03, &[&[0], &key[..]].concat());
    der(0x30, &[&rsa[..], &bits].concat())
}

fn der(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = u16::try_from(content.len()).unwrap().to_be_bytes();
    let head = match content.len() {
        0..0x80 => vec![tag, length[1]],
        0x80..0x100 => vec![tag, 0x81, length[1]],
        _ => vec![tag, 0x82, length[0], length[1]],
    };
    [head, content.to_vec()].concat()
}

/// Each bad recipient gets the same reason, and releases nothing. The worker is not disturbed.
#[tokio::test(flavor = "multi_thread")]
async fn bad_recipients_are_refused() {
    let broker = broker(Options::default());
    Caller::of(&broker, "enroller")
        .create("ada", MATERIAL)
        .await
        .unwrap();
    let releaser = Caller::of(&broker, "releaser");
    let workers = broker.workers();
    for (public, word) in bad_recipients() {
        let status = refused(releaser.unwrap_for("ada", &public).await, "REQUEST");
        let (field, text) = violation(&status);
        assert_eq!(field, "recipient.public_key");
        assert!(text.contains(word), "{word}: {text}");
    }
    // SoftHSM has only SHA-1.
    let pair = Pair::fresh();
    for (hash, is_good) in [(0, true), (1, false), (2, true), (3, false)] {
        let request = UnwrapUserKeyRequest {
            recipient: Some(Recipient {
                public_key: pair.public.clone(),
                hash,
            }),
            ..item("ada")
        };
        let answer = releaser.keys.clone().unwrap_user_key(request).await;
        match answer {
            Ok(answer) => {
                assert!(is_good, "{hash}");
                assert_eq!(pair.open(&answer.into_inner()), MATERIAL);
            }
            Err(status) => {
                assert!(!is_good, "{hash}: {status:?}");
                assert_eq!(reason(&status), "REQUEST");
                assert_eq!(violation(&status).0, "recipient.hash");
            }
        }
    }
    assert_eq!(broker.workers(), workers);
}

#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::too_many_lines, reason = "one story")]
async fn plain_records_are_moved_and_the_floor_keeps_them_sealed() {
    let broker = Broker::start(Options::default());
    let enroller = Caller::of(&broker, "enroller");
    for user in ["ada", "eve"] {
        enroller.create(user, MATERIAL).await.unwrap();
        enroller.replace(user, b"second", 1, "").await.unwrap();
    }
    let pair = Pair::fresh();
    let releaser = Caller::of(&broker, "releaser");
    let early = refused(
        releaser.unwrap_for("ada", &pair.public).await,
        "RELEASE_FORM",
    );
    let (field, text) = violation(&early);
    assert!(
        field == "recipient" && text.contains("moved"),
        "{field} {text}"
    );

    // A sealed wrapping key is in use from now on; the plain one still unwraps.
    let mut control = Caller::of(&broker, "admin").control;
    let rotation = RotateWrappingKeyRequest {
        modulus_bits: 2_048,
        without_backup: true,
        purpose: WrappingKeyPurpose::Sealed.into(),
        ..Default::default()
    };
    control.rotate_wrapping_key(rotation).await.unwrap();
    let plain = (
        WrappingKeyPurpose::Plain,
        WrappingKeyState::Deactivated,
        Sealing::Unspecified,
    );
    let sealed = (
        WrappingKeyPurpose::Sealed,
        WrappingKeyState::Active,
        Sealing::Enforced,
    );
    assert_eq!(keys(&broker).await, [plain, sealed]);
    enroller.create("bob", MATERIAL).await.unwrap();
    let mixed = BatchUnwrapUserKeysRequest {
        items: vec![
            item("ada"),
            item("bob"),
            UnwrapUserKeyRequest {
                recipient: Some(Recipient {
                    public_key: pair.public.clone(),
                    hash: 0,
                }),
                ..item("bob")
            },
        ],
    };
    let answer = releaser.keys.clone().batch_unwrap_user_keys(mixed).await;
    let results = answer.unwrap().into_inner().results;
    let results: Vec<_> = results.into_iter().map(|one| one.result.unwrap()).collect();
    let [
        BatchResult::Released(ada),
        BatchResult::Error(refusal),
        BatchResult::Released(bob),
    ] = results.as_slice()
    else {
        panic!("{results:?}");
    };
    assert_eq!(ada.key_material, b"second");
    assert_eq!(refusal.reason, "RELEASE_FORM");
    assert_eq!(pair.open(bob), MATERIAL);

    // The rows from before the move, which somebody may keep.
    let before = broker.site.sql(
        "SELECT hex(envelope) FROM revisions WHERE revision = 2 AND record_id = \
         (SELECT record_id FROM records WHERE user = 'ada')",
    );
    rewrap(&broker).await;
    refused(releaser.unwrap("ada").await, "RELEASE_FORM");
    let answer = releaser.unwrap_for("ada", &pair.public).await.unwrap();
    assert_eq!(pair.open(&answer), b"second");
    Caller::of(&broker, "lifecycle")
        .restore("eve", 1, 2)
        .await
        .unwrap();
    let answer = releaser.unwrap_for("eve", &pair.public).await.unwrap();
    assert_eq!(pair.open(&answer), MATERIAL, "all revisions were moved");

    // From one sealed wrapping key to the next.
    let rotation = RotateWrappingKeyRequest {
        modulus_bits: 2_048,
        without_backup: true,
        ..Default::default()
    };
    control.rotate_wrapping_key(rotation).await.unwrap();
    rewrap(&broker).await;
    let answer = releaser.unwrap_for("bob", &pair.public).await.unwrap();
    assert_eq!(pair.open(&answer), MATERIAL);
    assert_eq!(
        keys(&broker)
            .await
            .iter()
            .map(|key| key.0)
            .collect::<Vec<_>>(),
        [
            WrappingKeyPurpose::Plain,
            WrappingKeyPurpose::Sealed,
            WrappingKeyPurpose::Sealed
        ]
    );

    // A row that is put back verifies, because its MAC is authentic. Only the configuration forbids its release.
    let (site, _) = broker.stop();
    let put_back = format!(
        "UPDATE revisions SET envelope = x'{}', wrapping_key_id = substr(x'{}', 4, 16) WHERE revision = 2 AND record_id = \
         (SELECT record_id FROM records WHERE user = 'ada')",
        before.trim(),
        before.trim()
    );
    site.sql(&put_back);
    let broker = Broker::start_on(site);
    let releaser = Caller::of(&broker, "releaser");
    let released = releaser.unwrap("ada").await.unwrap();
    assert_eq!(released.key_material, b"second");
    let (site, _) = broker.stop();
    site.write_configuration(|text| text.push_str("\n[release]\nsealed_only = true\n"));
    let broker = Broker::start_on(site);
    let releaser = Caller::of(&broker, "releaser");
    refused(releaser.unwrap("ada").await, "RELEASE_FORM");
    refused(
        releaser.unwrap_for("ada", &pair.public).await,
        "RELEASE_FORM",
    );
    let answer = releaser.unwrap_for("bob", &pair.public).await.unwrap();
    assert_eq!(pair.open(&answer), MATERIAL);
}

/// No move takes user keys from a sealed to a plain wrapping key.
#[tokio::test(flavor = "multi_thread")]
async fn sealed_records_stay_sealed() {
    let broker = broker(Options::default());
    Caller::of(&broker, "enroller")
        .create("ada", MATERIAL)
        .await
        .unwrap();
    let mut control = Caller::of(&broker, "admin").control;
    let rotation = RotateWrappingKeyRequest {
        modulus_bits: 2_048,
        without_backup: true,
        purpose: WrappingKeyPurpose::Plain.into(),
        ..Default::default()
    };
    let rotated = control.rotate_wrapping_key(rotation).await.unwrap();
    let sealed = rotated.into_inner().previous_id;
    let named = StartRewrapRequest {
        source_wrapping_key_id: sealed,
        ..Default::default()
    };
    let status = refused(control.start_rewrap(named).await, "REQUEST");
    assert!(violation(&status).1.contains("never moved"), "{status:?}");
    rewrap(&broker).await;
    let releaser = Caller::of(&broker, "releaser");
    refused(releaser.unwrap("ada").await, "RELEASE_FORM");
    let pair = Pair::fresh();
    let answer = releaser.unwrap_for("ada", &pair.public).await.unwrap();
    assert_eq!(pair.open(&answer), MATERIAL);
}

/// A worker that died during sealed releases is replaced, and no caller sees it.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_worker_fails_no_sealed_release() {
    let broker = broker(Options::default());
    Caller::of(&broker, "enroller")
        .create("ada", MATERIAL)
        .await
        .unwrap();
    let releaser = Caller::of(&broker, "releaser");
    let pair = Pair::fresh();
    for round in 0..20 {
        if round == 5 {
            crate::process::send(broker.workers()[0], rustix::process::Signal::KILL);
        }
        let answer = releaser.unwrap_for("ada", &pair.public).await.unwrap();
        assert_eq!(pair.open(&answer), MATERIAL);
    }
}

fn pem(label: &str, der: &[u8]) -> String {
    format!(
        "-----BEGIN {label}-----\n{}\n-----END {label}-----\n",
        Base64::encode_string(der)
            .as_bytes()
            .chunks(64)
            .map(|line| str::from_utf8(line).unwrap())
            .collect::<Vec<_>>()
            .join("\n")
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_opens_with_a_private_key_and_passes_on_with_a_public_key() {
    let broker = broker(Options::default());
    Caller::of(&broker, "enroller")
        .create("ada", MATERIAL)
        .await
        .unwrap();
    let pair = Pair::fresh();
    let write = |name: &str, text: String| -> PathBuf {
        let path = broker.site.folder().join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        path
    };
    let private = pair.private.as_der().unwrap();
    let private = write("recipient.pem", pem("PRIVATE KEY", private.as_ref()));
    let public = write("recipient.pub", pem("PUBLIC KEY", &pair.public));
    let unwrap = |options: &[&str]| {
        let arguments = [&["unwrap", "--user", "ada", "--key-name", "vault"], options].concat();
        client(&broker, "releaser", &arguments).output().unwrap()
    };
    let opened = unwrap(&["--recipient", private.to_str().unwrap()]);
    assert!(opened.status.success(), "{opened:?}");
    assert_eq!(opened.stdout, MATERIAL);
    let passed = unwrap(&["--recipient", public.to_str().unwrap(), "-o", "json"]);
    assert!(passed.status.success(), "{passed:?}");
    let fields: Value = serde_json::from_slice(&passed.stdout).unwrap();
    assert_eq!(fields["sealing"], "enforced", "{fields}");
    let ciphertext = Base64::decode_vec(fields["ciphertext"].as_str().unwrap()).unwrap();
    assert_eq!(ciphertext.len(), 256);
    let plain = unwrap(&[]);
    let error = String::from_utf8_lossy(&plain.stderr).into_owned();
    assert!(
        error.contains("RELEASE_FORM") && error.contains("--recipient"),
        "{error}"
    );
    let bad = unwrap(&[
        "--recipient",
        broker.site.configuration_file().to_str().unwrap(),
    ]);
    assert!(!bad.status.success(), "{bad:?}");
}

/// REST has no sealed release: it neither releases a sealed record nor stores a key that it could not release.
#[tokio::test(flavor = "multi_thread")]
async fn rest_refuses_sealed_records_clearly() {
    let rest = RestSite::open_with(Options::default(), "", "");
    let user = uuid::Uuid::new_v4().to_string();
    rest.store(Method::POST, &user, &[7; 32])
        .await
        .expect_stored();
    let broker = &rest.broker;
    let mut control = Caller::of(broker, "admin").control;
    let rotation = RotateWrappingKeyRequest {
        modulus_bits: 2_048,
        without_backup: true,
        purpose: WrappingKeyPurpose::Sealed.into(),
        ..Default::default()
    };
    control.rotate_wrapping_key(rotation).await.unwrap();
    rest.get(&user).await.expect_key(&[7; 32]);
    for (method, whose) in [
        (Method::POST, uuid::Uuid::new_v4().to_string()),
        (Method::PUT, user.clone()),
    ] {
        let refused = rest.store(method, &whose, &[8; 32]).await;
        refused.expect_refused(400, "RELEASE_FORM");
    }
    rest.get(&user).await.expect_key(&[7; 32]);
    rewrap(broker).await;
    rest.get(&user).await.expect_refused(400, "RELEASE_FORM");
}

/// The steps of sealed release on a module of another maker.
fn releases_sealed_on(maker: Maker) {
    let stand = Stand::new(maker);
    make_sealed_key(&stand.site);
    stand.site.expect_ok(&["token", "check"]);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let broker = Broker::start_on(Arc::clone(&stand.site));
        Caller::of(&broker, "enroller")
            .create("ada", MATERIAL)
            .await
            .unwrap();
        let releaser = Caller::of(&broker, "releaser");
        for size in [KeySize::Rsa2048, KeySize::Rsa3072, KeySize::Rsa4096] {
            let pair = Pair::of(size);
            let answer = releaser.unwrap_for("ada", &pair.public).await.unwrap();
            assert_eq!(pair.open(&answer), MATERIAL);
        }
        refused(releaser.unwrap("ada").await, "RELEASE_FORM");
        let workers = broker.workers();
        crate::process::send(workers[0], rustix::process::Signal::KILL);
        let pair = Pair::fresh();
        let answer = releaser.unwrap_for("ada", &pair.public).await.unwrap();
        assert_eq!(pair.open(&answer), MATERIAL);
        let sealed = (
            WrappingKeyPurpose::Sealed,
            WrappingKeyState::Active,
            Sealing::Enforced,
        );
        until("the key to be shown", || {
            (!broker.workers().is_empty()).then_some(())
        });
        assert_eq!(keys(&broker).await, [sealed]);
        drop(broker.stop());
    });
}

#[test]
fn softhsm_releases_sealed() {
    releases_sealed_on(Maker::SoftHsm);
}

#[test]
fn kryoptic_releases_sealed() {
    releases_sealed_on(Maker::Kryoptic);
}
