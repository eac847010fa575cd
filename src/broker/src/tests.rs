//! Tests of situations that cannot be produced with a real token, such as an answer exactly at the deadline.

use std::{thread, time::Duration};

use async_trait::async_trait;

use crate::limits::{self, Limits};
use keybroker_core::{
    call::{CallId, Timestamp},
    client_credential::Document,
    envelope::{Algorithm, Context, Envelope, Mac, Unsealed, mac::MacMessage},
    key::{ClientId, Fingerprint, Tenant, WrappingKeyId, WrappingKeyState},
    principal::{Reach, Role},
    secret::KeyMaterial,
    state::StateDirectory,
};
use keybroker_hsm as hsm;
use keybroker_hsm::{TokenInfo, TokenKey};
use keybroker_store as store;
use keybroker_store::{ClientRow, RegistryRow};

use super::*;

mod approvals;
mod notices;
mod recipients;
mod registry;
mod tokens;

use tokens::{Tokens, mac_by};

const KEY: WrappingKeyId = WrappingKeyId::from_bytes([7; 16]);
const SUSPENDED: WrappingKeyId = WrappingKeyId::from_bytes([8; 16]);
const SERIAL: &str = "0001";

fn state_of(serving: Serving, keys: &[WrappingKeyId], tokens: Vec<TokenState>) -> TokenState {
    TokenState {
        name: String::new(),
        priority: 0,
        serving,
        note: None,
        info: Some(TokenInfo {
            label: "late".to_owned(),
            serial: SERIAL.to_owned(),
            model: String::new(),
            is_hardware: false,
        }),
        keys: keys.iter().map(|id| token_key_called(*id)).collect(),
        unusable: Arc::new([]),
        assurance: None,
        workers: Vec::new(),
        queue_length: 0,
        last_self_test: None,
        is_checking_keys: false,
        tokens,
    }
}

fn token_key_called(id: WrappingKeyId) -> TokenKey {
    TokenKey {
        id,
        fingerprint: Fingerprint([1; 32]),
        spki: Vec::new(),
        modulus_bits: 2_048,
        algorithm: Algorithm::RsaOaepSha256,
        sealing: None,
    }
}

fn registered(id: WrappingKeyId, state: WrappingKeyState, sequence: u64) -> RegistryRow {
    RegistryRow {
        registered: Timestamp::now(),
        ..testing::registered(id, state, sequence)
    }
}

async fn broker(folder: &std::path::Path) -> Arc<Broker> {
    let rows = [
        registered(SUSPENDED, WrappingKeyState::Suspended, 1),
        registered(KEY, WrappingKeyState::Active, 2),
    ];
    broker_with(folder, Tokens::late(&[KEY, SUSPENDED]), &rows).await
}

async fn broker_with(
    folder: &std::path::Path,
    token: Arc<dyn Token>,
    rows: &[RegistryRow],
) -> Arc<Broker> {
    let without_persons = ApprovalRules {
        actions: std::collections::BTreeSet::new(),
        expire_after: Duration::from_hours(24),
        persons: Vec::new(),
        kept: Duration::from_hours(24),
    };
    broker_with_approvals(folder, token, rows, without_persons).await
}

async fn broker_with_approvals(
    folder: &std::path::Path,
    token: Arc<dyn Token>,
    rows: &[RegistryRow],
    approvals: ApprovalRules,
) -> Arc<Broker> {
    let url = format!("sqlite:{}", folder.join("keybroker.db").display());
    let settings = serde_json::from_value(serde_json::json!({ "url": url })).unwrap();
    store::migrate(&settings, false).await.unwrap();
    let store = store::open(&settings).await.unwrap();
    for row in rows {
        store.register(row).await.unwrap();
    }
    let (audit, _) = AuditLog::open(&folder.join("log"), 1 << 20).unwrap();
    let broker = Broker::new(Parts {
        sealed_only: false,
        policy: Policy::load(
            &keybroker_policy::Settings::default(),
            keybroker_policy::Networks::default(),
        )
        .unwrap(),
        audit,
        store,
        token,
        client_rules: ClientRules {
            grantable_roles: [Role::Release, Role::Admin, Role::Auditor].into(),
            hash: Arc::new(|_| Ok("$argon2id$".to_owned())),
        },
        weights: BTreeMap::new(),
        limits: Limits::new(&limits::Settings::default()),
        state: StateDirectory::below(folder),
        instance: "serve".to_owned(),
        retention: Duration::from_hours(24),
        capacity: Capacity {
            revisions_max: 1_000,
            keys_per_user_max: 1_000,
        },
        expect: Expect::new(|_, _| Vec::new()),
        configured: ConfiguredTokens::default(),
        rotate_after: None,
        destroy_after_days: 30,
        approvals,
        devices: DeviceRules::default(),
        notices: None,
        accepted_risks: Vec::new(),
    });
    broker
        .load_registry(Deadline::after(Duration::from_secs(1)))
        .await
        .unwrap();
    broker
}

/// A mutation that has done its work on the token, but runs out of time before its intent, leaves an entry like any
/// other failure.
#[tokio::test(flavor = "multi_thread")]
async fn a_mutation_that_is_too_late_for_its_intent_is_audited() {
    let folder = tempfile::tempdir().unwrap();
    let broker = broker(folder.path()).await;
    let principal = testing::service("URI:ada", &[Role::Enrol]);
    let call = Call::start("127.0.0.1:1", Deadline::after(Duration::from_millis(200)));
    let key = UserKeyRef {
        user: UserId::parse("ada").unwrap(),
        name: KeyName::parse("vault").unwrap(),
    };
    let material = KeyMaterial::new(vec![1; 32]).unwrap();
    let error = broker
        .create(&principal, &call, &key, material, None)
        .await
        .unwrap_err();
    assert_eq!(error.reason(), Reason::Deadline);
    let line = broker.audit.tail(1).unwrap().remove(0);
    let call_id = format!("\"call_id\":\"{}\"", call.id);
    for field in [
        call_id.as_str(),
        r#""action":"user_key.create""#,
        r#""kind":"decision""#,
        r#""outcome":"failed""#,
        r#""reason":"DEADLINE""#,
        r#""user":"ada""#,
        r#""wrapping_key":"07070707070707070707070707070707""#,
    ] {
        assert!(line.contains(field), "{field}: {line}");
    }
    let address = key.address(&principal);
    assert_eq!(broker.store.record(&address).await.unwrap(), None);
}

fn client_row(number: u8, key: WrappingKeyId, document: Vec<u8>) -> ClientRow {
    ClientRow {
        id: ClientId::from_bytes([number; 16]),
        revision: 1,
        document,
        mac: [0; 32],
        key,
        created: Timestamp::now(),
        updated: Timestamp::now(),
    }
}

fn client_document() -> Document {
    let mut document = Document {
        label: "backup".to_owned(),
        tenant: Tenant::default(),
        roles: [Role::Enrol].into(),
        users: None,
        key_names: None,
        created: Timestamp::now(),
        revoked: None,
        secrets: Vec::new(),
    };
    document.add_secret("$argon2id$".to_owned(), Timestamp::now(), None);
    document
}

/// A problem that requires an operator differs from a temporary problem.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_is_refused_for_what_is_wrong_with_it_alone() {
    const LATER: WrappingKeyId = WrappingKeyId::from_bytes([9; 16]);
    const NOBODYS: WrappingKeyId = WrappingKeyId::from_bytes([10; 16]);
    let folder = tempfile::tempdir().unwrap();
    let broker = broker(folder.path()).await;
    let good = client_document().to_bytes().unwrap();
    let later = registered(LATER, WrappingKeyState::Active, 3);
    broker.store.register(&later).await.unwrap();
    for (number, key, document, expected) in [
        (1, KEY, good.clone(), None),
        (2, SUSPENDED, good.clone(), Some(Reason::KeyState)),
        // The key was registered after this broker started. The broker reads the registry again and finds the new key.
        (3, LATER, good.clone(), Some(Reason::TokenDown)),
        (4, NOBODYS, good, Some(Reason::Credential)),
        (5, KEY, b"{}".to_vec(), Some(Reason::Credential)),
    ] {
        let row = client_row(number, key, document);
        let call = CallId::fresh();
        broker.store.insert_client(&row, call).await.unwrap();
        let found = broker.verified_client(row.id).await;
        assert_eq!(found.err().map(|error| error.reason()), expected);
    }
}

/// A suspended key prevents a client from authenticating. It must be possible to revoke the client. It must not be
/// possible to revoke only one of its secrets, because the new row would make the client valid again.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_under_a_suspended_key_can_be_revoked() {
    let folder = tempfile::tempdir().unwrap();
    let broker = broker(folder.path()).await;
    let row = client_row(1, SUSPENDED, client_document().to_bytes().unwrap());
    let call = Call::start("127.0.0.1:1", Deadline::after(Duration::from_secs(10)));
    broker.store.insert_client(&row, call.id).await.unwrap();
    let admin = testing::service("URI:admin", &[Role::Admin]);
    let one = broker.revoke_client(&admin, &call, row.id, Some(1)).await;
    assert_eq!(one.unwrap_err().reason(), Reason::KeyState);
    let call = Call {
        id: CallId::fresh(),
        ..call
    };
    let all = broker.revoke_client(&admin, &call, row.id, None).await;
    assert!(all.unwrap().document.revoked.is_some());
    let stored = broker.store.client(row.id).await.unwrap().unwrap();
    assert_eq!((stored.key, stored.revision), (KEY, 2));
    let known = broker.verified_client(row.id).await.unwrap().unwrap();
    assert_eq!(known.document.live_secrets(Timestamp::now()).count(), 0);
}

/// A client whose document is longer than the limit for new secrets can still be revoked.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_is_too_long_to_grow_can_be_revoked() {
    let folder = tempfile::tempdir().unwrap();
    let broker = broker(folder.path()).await;
    let admin = testing::service("URI:admin", &[Role::Admin]);
    let call = || Call::start("127.0.0.1:1", Deadline::after(Duration::from_secs(10)));
    let users = |count: usize| {
        let users = (0..count).map(|number| UserId::parse(&format!("{number:0>200}")).unwrap());
        Some(Reach::Only(users.collect()))
    };
    let new = |count| NewClient {
        label: "backup".to_owned(),
        roles: [Role::Release].into(),
        users: users(count),
        key_names: None,
        expires: None,
    };
    let refused = broker.create_client(&admin, &call(), new(122)).await;
    assert_eq!(refused.unwrap_err().violations()[0].field, "users");
    broker
        .create_client(&admin, &call(), new(118))
        .await
        .unwrap();

    let mut long = client_document();
    (long.roles, long.users) = ([Role::Release].into(), users(159));
    let row = client_row(1, KEY, long.to_bytes().unwrap());
    let inserted = broker.store.insert_client(&row, CallId::fresh());
    inserted.await.unwrap();
    let another = broker
        .add_client_secret(&admin, &call(), row.id, None)
        .await;
    assert_eq!(another.unwrap_err().violations()[0].field, "id");
    for secret in [Some(1), None] {
        let revoked = broker.revoke_client(&admin, &call(), row.id, secret).await;
        let document = revoked.unwrap().document;
        assert_eq!(document.live_secrets(Timestamp::now()).count(), 0);
    }
}
