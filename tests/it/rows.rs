//! A thief who can write the database: damaged, swapped, re-created, rolled back and forged rows. Each is refused by its
//! MAC, before the RSA key is used.

use std::sync::Arc;

use aws_lc_rs::rsa::{OAEP_SHA1_MGF1SHA1, OaepPublicEncryptingKey, PublicEncryptingKey};
use keybroker_core::{
    envelope::{Algorithm, Context, Unsealed},
    key::{KeyAddress, KeyName, RecordId, Revision, Tenant, UserId, WrappingKeyId},
};
use keybroker_proto::{GetWrappingKeyRequest, ListWrappingKeysRequest};
use rustls_pki_types::{SubjectPublicKeyInfoDer, pem::PemObject as _};
use tonic::Code;

use crate::{
    client::{Caller, NAME, refused},
    client_commands::client,
    process::Broker,
    site::{Finished, Options, Site},
};

/// Lengths of the parts before the wrapped bytes: version, kind, algorithm, key id, length.
const HEADER_BYTES: usize = 3 + 16 + 2;

fn envelope(site: &Site, user: &str) -> Vec<u8> {
    let text = site.sql(&format!(
        "SELECT hex(envelope) FROM revisions JOIN records USING (record_id, revision) WHERE user = '{user}'"
    ));
    hex::decode(text.trim()).unwrap()
}

pub(crate) fn set_envelope(site: &Site, user: &str, bytes: &[u8]) {
    let changed = site.sql(&format!(
        "UPDATE revisions SET envelope = x'{}' WHERE (record_id, revision) =
             (SELECT record_id, revision FROM records WHERE user = '{user}');
         SELECT changes()",
        hex::encode(bytes)
    ));
    assert_eq!(changed.trim(), "1", "{user}");
}

async fn enrolled(users: &[&str]) -> Broker {
    let broker = Broker::start(Options::default());
    let enroller = Caller::of(&broker, "enroller");
    for user in users {
        enroller
            .create(user, format!("material of {user}").as_bytes())
            .await
            .unwrap();
    }
    broker
}

/// Every one of the users is refused as damaged, with an alert, and none reached the RSA key.
async fn all_refused(site: Arc<Site>, users: &[&str]) {
    let broker = Broker::start_on(site);
    let releaser = Caller::of(&broker, "releaser");
    for user in users {
        let status = refused(releaser.unwrap(user).await, "RECORD_DAMAGED");
        assert_eq!(status.code(), Code::DataLoss, "{user}");
    }
    let log = broker.site.log();
    assert_eq!(
        log.matches("record-damaged").count(),
        users.len(),
        "one alert each"
    );
    assert!(
        !log.contains("although the MAC of the envelope is valid"),
        "the RSA key was used"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_rows_are_refused_before_the_rsa_key_is_used() {
    type Damage = (&'static str, fn(&mut Vec<u8>));
    let damages: [Damage; 11] = [
        ("version", |bytes| bytes[0] ^= 2),
        ("kind", |bytes| bytes[1] = 2),
        ("algorithm", |bytes| bytes[2] = 1),
        ("key id", |bytes| bytes[3] ^= 1),
        ("length", |bytes| bytes[HEADER_BYTES - 1] ^= 1),
        ("first wrapped byte", |bytes| bytes[HEADER_BYTES] ^= 1),
        ("last wrapped byte", |bytes| {
            bytes[HEADER_BYTES + 255] ^= 0x80;
        }),
        ("mac", |bytes| *bytes.last_mut().unwrap() ^= 1),
        ("cut short", |bytes| bytes.truncate(bytes.len() - 1)),
        ("one byte more", |bytes| bytes.push(0)),
        ("empty", Vec::clear),
    ];
    let users = damages.map(|(user, _)| user);
    let (site, _) = enrolled(&users).await.stop();
    for (user, damage) in damages {
        let before = envelope(&site, user);
        let mut bytes = before.clone();
        damage(&mut bytes);
        assert_ne!(bytes, before, "{user}");
        set_envelope(&site, user, &bytes);
    }
    all_refused(site, &users).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_swapped_between_users_are_refused() {
    let (site, _) = enrolled(&["ada", "bob"]).await.stop();
    let (ada, bob) = (envelope(&site, "ada"), envelope(&site, "bob"));
    set_envelope(&site, "ada", &bob);
    set_envelope(&site, "bob", &ada);
    all_refused(Arc::clone(&site), &["ada", "bob"]).await;

    // Swapped back, both work again: nothing was repaired or deleted.
    set_envelope(&site, "ada", &ada);
    set_envelope(&site, "bob", &bob);
    let broker = Broker::start_on(site);
    let releaser = Caller::of(&broker, "releaser");
    for user in ["ada", "bob"] {
        let key = releaser.unwrap(user).await.unwrap();
        assert_eq!(key.key_material, format!("material of {user}").as_bytes());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_under_another_name_is_refused() {
    let (site, _) = enrolled(&["victim", "other"]).await.stop();
    site.sql("UPDATE records SET user = 'thief' WHERE user = 'victim'");
    site.sql(
        "UPDATE records SET key_name = 'vault2' WHERE user = 'other';
              UPDATE records SET key_name = 'vault', user = 'another' WHERE user = 'other'",
    );
    all_refused(site, &["thief", "another"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_row_of_a_purged_and_recreated_key_is_refused() {
    let (site, _) = enrolled(&["ada"]).await.stop();
    let old = envelope(&site, "ada");
    site.sql("DELETE FROM revisions; DELETE FROM records;");
    let broker = Broker::start_on(site);
    Caller::of(&broker, "enroller")
        .create("ada", b"another material")
        .await
        .unwrap();
    let (site, _) = broker.stop();
    set_envelope(&site, "ada", &old);
    all_refused(site, &["ada"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_earlier_revision_in_the_place_of_the_current_one_is_refused() {
    let broker = enrolled(&["ada"]).await;
    Caller::of(&broker, "enroller")
        .replace("ada", b"second material", 1, "")
        .await
        .unwrap();
    let (site, _) = broker.stop();
    site.sql("UPDATE revisions SET envelope = (SELECT envelope FROM revisions WHERE revision = 1) WHERE revision = 2");
    all_refused(site, &["ada"]).await;
}

/// A person with the public key can wrap, but has no integrity key: neither a made-up MAC nor that of another row helps.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_made_with_the_public_key_alone_is_refused() {
    let broker = enrolled(&["ada", "bob"]).await;
    let (id, spki) = public_key(&broker).await;
    let (site, _) = broker.stop();
    let bobs_mac: [u8; 32] = *envelope(&site, "bob").last_chunk().unwrap();
    for (user, mac) in [("ada", [0x5a; 32]), ("bob", bobs_mac)] {
        let forged = forge(id, &spki, mac, user);
        set_envelope(&site, user, &forged);
    }
    all_refused(site, &["ada", "bob"]).await;
}

async fn public_key(broker: &Broker) -> (WrappingKeyId, Vec<u8>) {
    let mut control = Caller::of(broker, "admin").control;
    let keys = control
        .list_wrapping_keys(ListWrappingKeysRequest {})
        .await
        .unwrap()
        .into_inner();
    let id = keys.wrapping_keys[0].id.clone();
    let request = GetWrappingKeyRequest { id: id.clone() };
    let key = control
        .get_wrapping_key(request)
        .await
        .unwrap()
        .into_inner()
        .wrapping_key
        .unwrap();
    let spki = SubjectPublicKeyInfoDer::from_pem_slice(key.public_key_pem.as_bytes()).unwrap();
    (
        WrappingKeyId::from_slice(&id).unwrap(),
        spki.as_ref().to_vec(),
    )
}

/// A well-formed envelope with key material of the thief's choice.
fn forge(id: WrappingKeyId, spki: &[u8], mac: [u8; 32], user: &str) -> Vec<u8> {
    let key = OaepPublicEncryptingKey::new(PublicEncryptingKey::from_der(spki).unwrap()).unwrap();
    let mut wrapped = vec![0; key.ciphertext_size()];
    let length = key
        .encrypt(
            &OAEP_SHA1_MGF1SHA1,
            b"chosen by the thief",
            &mut wrapped,
            None,
        )
        .unwrap()
        .len();
    assert_eq!(length, wrapped.len());
    let address = KeyAddress {
        tenant: Tenant::default(),
        user: UserId::parse(user).unwrap(),
        name: KeyName::parse(NAME).unwrap(),
    };
    let context = Context::Record {
        address: &address,
        record_id: RecordId::from_bytes([1; 16]),
        revision: Revision::FIRST,
    };
    let unsealed = Unsealed::new(Algorithm::RsaOaepSha1, id, wrapped).unwrap();
    unsealed.seal(&context, mac).to_bytes()
}

/// Whatever is altered in the registry, the broker finds out from the token and does not serve.
#[test]
fn an_altered_registry_row_is_refused() {
    let site = Site::fresh(Options::default());
    for alteration in [
        "state = 'suspended'",
        "sequence = sequence + 1",
        "registered_us = registered_us + 1",
        "backup_confirmed_us = 1",
        "token_serial = '0123456789abcdef'",
        "fingerprint = zeroblob(32)",
        "mac = zeroblob(32)",
        "key_id = zeroblob(16)",
    ] {
        site.sql("DROP TABLE IF EXISTS saved; CREATE TABLE saved AS SELECT * FROM wrapping_keys");
        site.sql(&format!("UPDATE wrapping_keys SET {alteration}"));
        let finished = site.serve_to_its_end();
        // Without a token of the registry there is no login, so that nothing verifies the row.
        let code = if alteration.starts_with("token_serial") {
            4
        } else {
            6
        };
        assert_eq!(
            finished.code,
            Some(code),
            "{alteration}: {}",
            finished.stderr
        );
        assert!(!site.ready_file().exists(), "{alteration}");
        site.sql("DELETE FROM wrapping_keys; INSERT INTO wrapping_keys SELECT * FROM saved; DROP TABLE saved");
    }
    drop(Broker::start_on(Arc::new(site)));
}

/// The answer that is stored for a request id comes under a MAC: whatever of it is edited, a retry is not told what never was.
#[tokio::test(flavor = "multi_thread")]
async fn an_altered_answer_to_a_request_id_is_refused() {
    const ID: &str = "7d444840-9dc0-11d1-b245-5ffdce74fad2";
    const MATERIAL: &[u8] = b"material of ada";
    let broker = enrolled(&["bob"]).await;
    let enroller = Caller::of(&broker, "enroller");
    let first = enroller.create_with_id("ada", MATERIAL, ID).await.unwrap();
    let again = enroller.create_with_id("ada", MATERIAL, ID).await.unwrap();
    assert_eq!(again, first);

    let site = &broker.site;
    site.sql("CREATE TABLE saved AS SELECT * FROM requests");
    for (alteration, reason) in [
        ("user = 'eve'", "RECORD_DAMAGED"),
        ("key_name = 'other'", "RECORD_DAMAGED"),
        ("record_id = zeroblob(16)", "RECORD_DAMAGED"),
        ("record_id = zeroblob(3)", "RECORD_DAMAGED"),
        ("state = 'deleted'", "RECORD_DAMAGED"),
        ("state = 'gone'", "RECORD_DAMAGED"),
        ("revision = 7", "RECORD_DAMAGED"),
        ("wrapping_key_id = zeroblob(16)", "RECORD_DAMAGED"),
        ("created_us = created_us - 1", "RECORD_DAMAGED"),
        ("updated_us = updated_us + 1", "RECORD_DAMAGED"),
        ("deleted_us = 1", "RECORD_DAMAGED"),
        ("content_mac = zeroblob(32)", "RECORD_DAMAGED"),
        ("key_id = zeroblob(16)", "RECORD_DAMAGED"),
        ("result_mac = zeroblob(32)", "RECORD_DAMAGED"),
        ("result_mac = zeroblob(5)", "RECORD_DAMAGED"),
        // As a row of a release before there was a MAC.
        ("result_mac = x''", "REVISION"),
        // Not found under its request id any more.
        ("request_id = zeroblob(16)", "KEY_EXISTS"),
        ("tenant = 'other'", "KEY_EXISTS"),
        ("principal = 'other'", "KEY_EXISTS"),
        ("used_us = 0", "KEY_EXISTS"),
    ] {
        site.sql(&format!(
            "PRAGMA ignore_check_constraints = ON; UPDATE requests SET {alteration}"
        ));
        let status = enroller
            .create_with_id("ada", MATERIAL, ID)
            .await
            .expect_err(alteration);
        assert_eq!(crate::client::reason(&status), reason, "{alteration}");
        site.sql("DELETE FROM requests; INSERT INTO requests SELECT * FROM saved");
    }
    assert_eq!(site.log().matches("record-damaged").count(), 15);
    let again = enroller.create_with_id("ada", MATERIAL, ID).await.unwrap();
    assert_eq!(again, first);
}

fn listed(broker: &Broker, arguments: &[&str]) -> Finished {
    Finished::from(client(broker, "auditor", arguments).output().unwrap())
}

/// Damaged rows at the beginning, in the middle and at the end of a page: a list names them, raises an alert and goes on.
#[tokio::test(flavor = "multi_thread")]
async fn damaged_records_are_listed_and_hide_no_others() {
    let (site, _) = enrolled(&["ada", "bob", "carl", "dan", "eve"]).await.stop();
    site.sql(
        "PRAGMA ignore_check_constraints = ON; \
         UPDATE records SET state = 'gone' WHERE user = 'ada'; \
         UPDATE records SET user = CAST(x'6361ff' AS TEXT) WHERE user = 'carl'; \
         INSERT INTO revisions SELECT record_id, 2, envelope, wrapping_key_id, created_us FROM revisions \
             WHERE record_id = (SELECT record_id FROM records WHERE user = 'dan'); \
         UPDATE records SET record_id = zeroblob(3) WHERE user = 'eve'",
    );
    let broker = Broker::start_on(site);
    let auditor = Caller::of(&broker, "auditor");
    for size in [1, 2, 5, 1_000] {
        let (mut good, mut damaged, mut token) = (Vec::new(), Vec::new(), String::new());
        // A page that does not advance would never end.
        for _ in 0..10 {
            let page = auditor.list(size, &token).await.unwrap();
            good.extend(page.user_keys.into_iter().map(|key| key.user));
            damaged.extend(page.damaged.into_iter().map(|row| {
                let has_id = row.record_id.len() == 16;
                (row.user, row.key_name, has_id, row.problem)
            }));
            token = page.next_page_token;
            if token.is_empty() {
                break;
            }
        }
        assert!(token.is_empty(), "{size}: the pages do not end");
        assert_eq!(good, ["bob"], "{size}");
        let row = |user: &str, has_id, problem: &str| {
            (user.to_owned(), NAME.to_owned(), has_id, problem.to_owned())
        };
        let expected = [
            row("ada", true, "unreadable"),
            row("", true, "unreadable"),
            row("dan", true, "set-back"),
            row("eve", false, "unreadable"),
        ];
        assert_eq!(damaged, expected, "{size}");
    }
    let shown = listed(&broker, &["list", "-o", "json"]);
    let shown: serde_json::Value = serde_json::from_str(&shown.stdout).unwrap();
    let problems = shown.as_array().unwrap().iter();
    let problems: Vec<_> = problems.filter_map(|row| row["problem"].as_str()).collect();
    assert_eq!(
        problems,
        ["unreadable", "unreadable", "set-back", "unreadable"]
    );
    let table = listed(&broker, &["list"]);
    assert!(table.stdout.contains("set-back"), "{table:?}");
    assert!(table.stderr.contains("4 rows are damaged"), "{table:?}");
    let log = broker.site.log();
    assert!(log.contains("record-damaged"), "no alert: {log}");
}
