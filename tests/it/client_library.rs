//! The client library `keybroker-client` at the real broker: credentials, errors, retries across a restart of a worker.

use std::{fs, sync::Arc, time::Duration};

use keybroker_client::{
    BearerToken, Client, ClientBuilder, ClientId, ClientSecret, Code, ErrorKind, KeyMaterial,
    ListUserKeys, Reason, RetryPolicy, Revision, Service, ServiceHealth, Status, UserKeyRef,
    UserKeyState, new_request_id, parse_request_id, proto,
};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
};

use crate::{
    client::{never_in_a_log, sending},
    pki::{EXPIRED, Pki},
    process::Broker,
    site::{Options, Site},
    wire::get,
};

const MATERIAL: &[u8] = b"material of this user";
const OTHER: &[u8] = b"other material of theirs";

fn builder(broker: &Broker) -> ClientBuilder {
    let port = broker.grpc.port();
    Client::builder(format!("https://localhost:{port}")).ca_file(broker.site.pki.ca_file())
}

/// A client with the certificate of that name.
fn of(broker: &Broker, name: &str) -> Client {
    let pki = &broker.site.pki;
    builder(broker)
        .identity_files(pki.certificate_file(name), pki.key_file(name))
        .build()
        .unwrap()
}

fn key(user: &str) -> UserKeyRef {
    UserKeyRef::parse(user, "vault").unwrap()
}

fn material(bytes: &[u8]) -> KeyMaterial {
    KeyMaterial::new(sending(bytes)).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_of_the_user_key_service_works() {
    let broker = Broker::start(Options::default());
    let (enroller, releaser) = (of(&broker, "enroller"), of(&broker, "releaser"));
    let lifecycle = of(&broker, "lifecycle");
    let (ada, bob) = (key("ada"), key("bob"));

    let created = enroller
        .create_user_key(&ada, &material(MATERIAL))
        .await
        .unwrap();
    assert_eq!((&created.key, created.revision), (&ada, Revision::FIRST));
    assert_eq!(created.state, UserKeyState::Active);
    let released = releaser.unwrap_user_key(&ada).await.unwrap();
    assert_eq!(released.key_material.expose(), MATERIAL);
    assert_eq!(released.revision, Revision::FIRST);

    let second = enroller
        .replace_user_key(&ada, &material(OTHER), Revision::FIRST)
        .await
        .unwrap();
    assert_eq!(second.revision, Revision::FIRST.next());
    assert_eq!(second.record_id, created.record_id);
    let items = [ada.clone(), bob.clone()];
    let batch = releaser.batch_unwrap_user_keys(&items).await.unwrap();
    let [Ok(first), Err(refusal)] = &batch[..] else {
        panic!("{batch:?}");
    };
    assert_eq!(first.key_material.expose(), OTHER);
    assert_eq!(refusal.reason(), Some(Reason::KeyNotFound));

    let third = lifecycle
        .restore_user_key_revision(&ada, Revision::FIRST, second.revision)
        .await
        .unwrap();
    let released = releaser.unwrap_user_key(&ada).await.unwrap();
    assert_eq!(released.key_material.expose(), MATERIAL);
    let deleted = lifecycle
        .delete_user_key(&ada, third.revision)
        .await
        .unwrap();
    assert_eq!(deleted.state, UserKeyState::Deleted);
    assert!(deleted.delete_time.is_some());
    lifecycle.undelete_user_key(&ada).await.unwrap();
    let got = lifecycle.get_user_key(&ada).await.unwrap();
    assert_eq!((got.state, got.delete_time), (UserKeyState::Active, None));

    enroller
        .create_user_key(&bob, &material(MATERIAL))
        .await
        .unwrap();
    let mut list = ListUserKeys {
        page_size: 1,
        ..ListUserKeys::default()
    };
    let mut listed = Vec::new();
    for _ in 0..3 {
        let page = lifecycle.list_user_keys(&list).await.unwrap();
        listed.extend(page.user_keys.into_iter().map(|record| record.key));
        match page.next_page_token {
            Some(token) => list.page_token = token,
            None => break,
        }
    }
    assert_eq!(listed, [ada, bob]);
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_have_their_reason_and_their_call_id() {
    let broker = Broker::start(Options::default());
    let (enroller, releaser) = (of(&broker, "enroller"), of(&broker, "releaser"));
    let ada = key("ada");

    let missing = releaser.unwrap_user_key(&ada).await.unwrap_err();
    assert_eq!(missing.reason(), Some(Reason::KeyNotFound), "{missing:?}");
    let call_id = missing.refusal().unwrap().call_id().unwrap().to_string();
    assert!(broker.site.audit().contains(&call_id));

    let id = new_request_id();
    let create = |bytes| {
        let material = material(bytes);
        let (enroller, ada) = (enroller.clone(), ada.clone());
        async move {
            enroller
                .create_user_key(&ada, &material)
                .request_id(id)
                .await
        }
    };
    let first = create(MATERIAL).await.unwrap();
    // The same change again, as after a lost answer: the first answer, and one record.
    assert_eq!(create(MATERIAL).await.unwrap(), first);
    let reused = create(OTHER).await.unwrap_err();
    assert_eq!(reused.reason(), Some(Reason::RequestIdReused));
    assert_eq!(reused.request_id(), Some(id));
    assert!(!reused.outcome_unknown());
    assert_eq!(parse_request_id(&id.to_string()).unwrap(), id);

    let other = material(OTHER);
    let stale = enroller.replace_user_key(&ada, &other, Revision::FIRST.next());
    let stale = stale.await.unwrap_err();
    assert_eq!(stale.reason(), Some(Reason::Revision));
    let denied = enroller.unwrap_user_key(&ada).await.unwrap_err();
    assert_eq!(denied.reason(), Some(Reason::Policy));
    let list = ListUserKeys {
        page_size: 1_001,
        ..ListUserKeys::default()
    };
    let malformed = of(&broker, "lifecycle")
        .list_user_keys(&list)
        .await
        .unwrap_err();
    let violations = malformed.refusal().unwrap().violations().to_vec();
    assert_eq!(violations[0].field, "page_size", "{malformed:?}");
}

/// The pauses of the default policy last longer than the supervisor needs to start another worker.
#[tokio::test(flavor = "multi_thread")]
async fn calls_outlast_a_token_that_leaves_and_returns() {
    let broker = Broker::start(Options::default());
    let (enroller, releaser) = (of(&broker, "enroller"), of(&broker, "releaser"));
    let ada = key("ada");
    enroller
        .create_user_key(&ada, &material(MATERIAL))
        .await
        .unwrap();
    let without_retries = builder(&broker)
        .identity_files(
            broker.site.pki.certificate_file("releaser"),
            broker.site.pki.key_file("releaser"),
        )
        .retry(RetryPolicy::never())
        .build()
        .unwrap();
    let directory = broker.site.token.directory();
    let elsewhere = directory.with_extension("elsewhere");
    fs::rename(&directory, &elsewhere).unwrap();
    // The negative twin: without retries a call fails.
    let mut refused = None;
    for _ in 0..1_000 {
        if let Err(error) = without_retries.unwrap_user_key(&ada).await {
            refused = error.reason();
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(refused, Some(Reason::TokenDown));
    let waiting = releaser.unwrap_user_key(&ada);
    let (released, returned) = tokio::join!(waiting, async {
        // The first attempt is refused meanwhile.
        tokio::time::sleep(Duration::from_millis(100)).await;
        fs::rename(&elsewhere, &directory)
    });
    returned.unwrap();
    assert_eq!(released.unwrap().key_material.expose(), MATERIAL);
    let other = material(OTHER);
    let replaced = enroller.replace_user_key(&ada, &other, Revision::FIRST);
    assert_eq!(replaced.await.unwrap().revision.get(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_client_is_made_used_and_revoked() {
    let site = Site::fresh(Options {
        limits: "\n[client_credentials]\ngrantable_roles = [\"enrol\"]".to_owned(),
        ..Options::default()
    });
    site.write_configuration(|text| {
        let apis = "apis = [\"grpc\", \"admin\"]";
        *text = text.replace(apis, &format!("{apis}\nclient_certificates = \"optional\""));
    });
    let broker = Broker::start_on(Arc::new(site));
    let admin = of(&broker, "admin");
    let grant = proto::CreateClientCredentialRequest {
        label: "backup service".to_owned(),
        roles: vec!["enrol".to_owned()],
        ..Default::default()
    };
    let made = admin.create_client_credential(grant).await.unwrap();
    never_in_a_log(made.secret.expose().as_bytes());
    let id = ClientId::from_hex(&made.client_credential.id).unwrap();
    let with = |secret: &str| {
        let secret = ClientSecret::new(secret);
        builder(&broker).api_client(id, secret).build().unwrap()
    };
    let service = with(made.secret.expose());
    let ada = key("ada");
    service
        .create_user_key(&ada, &material(MATERIAL))
        .await
        .unwrap();
    let wrong = with("kbs_wrong").get_user_key(&ada).await.unwrap_err();
    assert_eq!(wrong.reason(), Some(Reason::Credential));

    let second = admin.add_client_secret(id, None).await.unwrap();
    never_in_a_log(second.secret.expose().as_bytes());
    assert_eq!(second.secret_number, made.secret_number + 1);
    admin.revoke_client_credential(id, None).await.unwrap();
    let listed = admin.list_client_credentials(proto::ListClientCredentialsRequest::default());
    assert!(
        listed.await.unwrap().client_credentials[0]
            .revoke_time
            .is_some()
    );
    let revoked = service
        .create_user_key(&key("bob"), &material(MATERIAL))
        .await
        .unwrap_err();
    assert_eq!(revoked.reason(), Some(Reason::Credential));

    let token = BearerToken::new("not a token");
    let holder = builder(&broker).bearer_token(token).build().unwrap();
    let refused = holder.unwrap_user_key(&ada).await.unwrap_err();
    assert_eq!(refused.reason(), Some(Reason::Credential));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_control_plane_is_read() {
    let broker = Broker::start(Options::default());
    let auditor = of(&broker, "auditor");
    let keys = auditor.list_wrapping_keys().await.unwrap();
    let id = keybroker_client::WrappingKeyId::from_slice(&keys[0].id).unwrap();
    let one = auditor.get_wrapping_key(id).await.unwrap();
    assert!(one.public_key_pem.starts_with("-----BEGIN PUBLIC KEY-----"));
    let state = auditor.get_token_state().await.unwrap();
    assert_eq!(state.serving(), proto::TokenServing::Up);
    let tail = auditor.tail_audit_log(5).await.unwrap();
    assert!(!tail.is_empty() && tail.len() <= 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn services_report_their_health() {
    let broker = Broker::start(Options::default());
    let auditor = of(&broker, "auditor");
    for service in Service::ALL {
        let health = auditor.check_health(service).await.unwrap();
        assert_eq!(health, ServiceHealth::Serving, "{service:?}");
    }
}

/// The listener of this broker has the user-key service alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_call_of_another_listeners_service_shows_its_status() {
    let site = Site::fresh(Options::default());
    site.write_configuration(|text| {
        *text = text.replace("apis = [\"grpc\", \"admin\"]", "apis = [\"grpc\"]");
    });
    let broker = Broker::start_on(Arc::new(site));
    let auditor = of(&broker, "auditor");
    let error = auditor.get_token_state().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnexpectedResponse, "{error:?}");
    let code = error.status().map(Status::code);
    assert_eq!(code, Some(Code::Unimplemented), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_made_early_and_separately() {
    let broker = Broker::start(Options::default());
    let first = of(&broker, "releaser");
    let second = first.with_separate_connection();
    for (client, connections) in [(&first, 1), (&first.clone(), 1), (&second, 2)] {
        let missing = client.unwrap_user_key(&key("ada")).await.unwrap_err();
        assert_eq!(missing.reason(), Some(Reason::KeyNotFound), "{missing:?}");
        let metrics = get(broker.status, "/metrics");
        let open = format!("\nkeybroker_connections {connections}\n");
        assert!(metrics.contains(&open), "{metrics}");
    }
    second.connect().await.unwrap();

    let port = broker.grpc.port();
    let distrusting = Client::builder(format!("https://localhost:{port}"))
        .ca_file(Pki::fresh().ca_file())
        .build()
        .unwrap();
    let error = distrusting.connect().await.unwrap_err();
    assert_eq!((error.kind(), error.attempts()), (ErrorKind::Connection, 1));
    let cause = keybroker_core::error::root_cause(&error);
    assert!(cause.contains("invalid peer certificate"), "{cause}");
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = silent.local_addr().unwrap().port();
    let waiting = Client::builder(format!("https://localhost:{port}"))
        .ca_file(broker.site.pki.ca_file())
        .deadline(Duration::from_millis(300))
        .build()
        .unwrap();
    let error = waiting.connect().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DeadlineExceeded, "{error:?}");
}

/// A server whose certificate another CA signed, and clients whose certificate the broker does not accept.
#[tokio::test(flavor = "multi_thread")]
async fn wrong_certificates_are_errors_of_the_connection() {
    let broker = Broker::start(Options::default());
    let other = Pki::fresh();
    let pki = &broker.site.pki;
    let once = |builder: ClientBuilder| builder.retry(RetryPolicy::never()).build().unwrap();
    let endpoint = format!("https://localhost:{}", broker.grpc.port());
    let of_another_ca = once(
        Client::builder(endpoint)
            .ca_pem(fs::read(other.ca_file()).unwrap())
            .identity_files(pki.certificate_file("releaser"), pki.key_file("releaser")),
    );
    let expired =
        once(builder(&broker).identity_files(pki.certificate_file(EXPIRED), pki.key_file(EXPIRED)));
    let anonymous = once(builder(&broker));
    for client in [of_another_ca, expired, anonymous] {
        let error = client
            .unwrap_user_key(&key("ada"))
            .deadline(Duration::from_secs(5))
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Connection, "{error:?}");
        assert_eq!(error.reason(), None);
    }
}

/// The peer accepts the first connection and says nothing, as a host does that fails at that moment.
#[tokio::test(flavor = "multi_thread")]
async fn a_silent_connection_is_replaced_after_the_deadline() {
    let broker = Broker::start(Options::default());
    let proxy = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = proxy.local_addr().unwrap().port();
    let to = broker.grpc;
    tokio::spawn(async move {
        let silent = proxy.accept().await.unwrap();
        for _ in 0..10 {
            let (mut inbound, _) = proxy.accept().await.unwrap();
            let mut outbound = TcpStream::connect(to).await.unwrap();
            tokio::spawn(async move { copy_bidirectional(&mut inbound, &mut outbound).await });
        }
        drop(silent);
    });
    let pki = &broker.site.pki;
    let releaser = Client::builder(format!("https://localhost:{port}"))
        .ca_file(pki.ca_file())
        .identity_files(pki.certificate_file("releaser"), pki.key_file("releaser"))
        .build()
        .unwrap();
    let ada = key("ada");
    let silent = releaser
        .unwrap_user_key(&ada)
        .deadline(Duration::from_millis(500))
        .await
        .unwrap_err();
    assert_eq!(silent.kind(), ErrorKind::DeadlineExceeded, "{silent:?}");
    let answered = releaser.unwrap_user_key(&ada).await.unwrap_err();
    assert_eq!(answered.reason(), Some(Reason::KeyNotFound), "{answered:?}");
}
