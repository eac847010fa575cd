//! TLS: versions, client certificates, and files that change while the broker serves.

use std::{fs, sync::Arc, time::Duration};

use rustix::process::Signal;
use rustls::HandshakeKind;
use tokio::io::AsyncReadExt as _;

use super::raw::{Raw, handshake, tls_config};
use crate::{
    client::{Caller, NAME, eventually, refused},
    pki,
    process::{Broker, until},
    site::{Options, Site},
    wire::get,
};
use keybroker_proto::UnwrapUserKeyRequest;

const MATERIAL: &[u8] = b"material of this user";
const UNWRAP: &str = "/keybroker.v1.UserKeyService/UnwrapUserKey";

fn ada() -> UnwrapUserKeyRequest {
    UnwrapUserKeyRequest {
        user: "ada".to_owned(),
        key_name: NAME.to_owned(),
        recipient: None,
    }
}

async fn enrol(broker: &Broker) {
    let enroller = Caller::of(broker, "enroller");
    enroller.create("ada", MATERIAL).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn both_versions_of_tls_are_spoken_and_nothing_but_http_2() {
    let broker = Broker::start(Options::default());
    enrol(&broker).await;
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let config = tls_config(&broker.site.pki, Some("releaser"), &[version]);
        let stream = handshake(broker.grpc, config).await.unwrap();
        assert_eq!(stream.get_ref().1.protocol_version(), Some(version.version));
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
        let answer = Raw::over(stream).await.unwrap().call(UNWRAP, &ada()).await;
        assert_eq!(answer.status().code(), tonic::Code::Ok);
        assert!(answer.body.ends_with(&[0x10, 1]) && answer.body.len() > MATERIAL.len());
    }
    let config = tls_config(&broker.site.pki, Some("releaser"), rustls::ALL_VERSIONS);
    let mut http_1 = (*config).clone();
    http_1.alpn_protocols = vec![b"http/1.1".to_vec()];
    handshake(broker.grpc, Arc::new(http_1)).await.unwrap_err();
}

/// A resumed session would bring the certificate of the first one, unverified and whatever has become of it since.
#[tokio::test(flavor = "multi_thread")]
async fn no_session_is_resumed() {
    let broker = Broker::start(Options::default());
    enrol(&broker).await;
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        // One configuration, so that the second connection could use what the first was given.
        let config = tls_config(&broker.site.pki, Some("releaser"), &[version]);
        for _ in 0..2 {
            let stream = handshake(broker.grpc, Arc::clone(&config)).await.unwrap();
            assert_eq!(
                stream.get_ref().1.handshake_kind(),
                Some(HandshakeKind::Full)
            );
            let answer = Raw::over(stream).await.unwrap().call(UNWRAP, &ada()).await;
            assert_eq!(answer.status().code(), tonic::Code::Ok);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn client_certificates_are_required_optional_or_not_asked_for() {
    let site = Site::fresh(Options::default());
    site.write_configuration(|text| {
        let from = text.find("[[listener]]").unwrap();
        let until = text.find("[limits]").unwrap();
        let listener = text[from..until].to_owned();
        for clients in ["optional", "none"] {
            let apis = "apis = [\"grpc\", \"admin\"]";
            let with = format!("{apis}\nclient_certificates = \"{clients}\"");
            text.insert_str(
                text.find("[limits]").unwrap(),
                &listener.replace(apis, &with),
            );
        }
    });
    let broker = Broker::start_on(Arc::new(site));
    let [required, optional, none] = broker.listeners[..] else {
        panic!("{:?}", broker.listeners)
    };
    enrol(&broker).await;
    let pki = &broker.site.pki;
    let code = async |certificate, address| {
        let answer = Raw::connect(pki, certificate, address).await;
        answer.call(UNWRAP, &ada()).await.status()
    };
    for address in [required, optional] {
        let status = code(Some("releaser"), address).await;
        assert_eq!(status.code(), tonic::Code::Ok, "{status:?}");
    }
    // A listener that asks for no certificate is not given one.
    for (certificate, address) in [(None, optional), (None, none), (Some("releaser"), none)] {
        let status = code(certificate, address).await;
        let status = refused(Err::<(), _>(status), "CREDENTIAL");
        assert_eq!(status.code(), tonic::Code::Unauthenticated);
    }
    // One that is sent must be good, also where none need be.
    for (certificate, address) in [
        (None, required),
        (Some(pki::OTHER_CA), required),
        (Some(pki::OTHER_CA), optional),
        (Some(pki::EXPIRED), optional),
    ] {
        let config = tls_config(pki, certificate, rustls::ALL_VERSIONS);
        let mut stream = handshake(address, config).await.unwrap();
        stream
            .read_to_end(&mut Vec::new())
            .await
            .expect_err("the server says why in an alert");
    }
}

/// The leaf that a new connection is shown.
async fn leaf(broker: &Broker) -> Vec<u8> {
    let config = tls_config(&broker.site.pki, Some("releaser"), rustls::ALL_VERSIONS);
    let stream = handshake(broker.grpc, config).await.unwrap();
    stream.get_ref().1.peer_certificates().unwrap()[0].to_vec()
}

async fn until_leaf_changes(broker: &Broker, from: &[u8]) {
    for _ in 0..100 {
        if leaf(broker).await != from {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("still the old certificate\n{}", broker.site.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_certificate_is_taken_over_and_a_bad_one_is_not() {
    let broker = Broker::start(Options::default());
    enrol(&broker).await;
    let old = Raw::connect(&broker.site.pki, Some("releaser"), broker.grpc).await;
    let first = leaf(&broker).await;
    broker.site.pki.issue_server();
    broker.signal(Signal::HUP);
    until_leaf_changes(&broker, &first).await;
    let second = leaf(&broker).await;

    // Without a signal too.
    broker.site.pki.issue_server();
    until_leaf_changes(&broker, &second).await;
    let third = leaf(&broker).await;

    // A certificate that has expired, and one that is not there: reported once each, and the good one stays.
    let certificate = broker.site.pki.certificate_file("server");
    let alerts = || broker.site.log().matches("tls-reload").count();
    broker.site.pki.issue_expired_server();
    until("the expired certificate to be reported", || {
        (alerts() == 1).then_some(())
    });
    fs::remove_file(&certificate).unwrap();
    until("the missing certificate to be reported", || {
        (alerts() == 2).then_some(())
    });
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    assert_eq!(alerts(), 2, "each problem is reported once");
    assert_eq!(leaf(&broker).await, third);
    // Whoever sends the signal wants to know.
    broker.signal(Signal::HUP);
    until("the report that was asked for", || {
        (alerts() == 3).then_some(())
    });

    // The connection from before all this still serves.
    let answer = old.call(UNWRAP, &ada()).await;
    assert_eq!(answer.status().code(), tonic::Code::Ok);

    broker.site.pki.issue_server();
    until_leaf_changes(&broker, &third).await;
}

/// Whom an old CA vouched for does not keep a connection.
#[tokio::test(flavor = "multi_thread")]
async fn a_changed_client_ca_ends_old_connections() {
    let site = Site::fresh(Options::default());
    let ca = site.folder().join("client-ca.pem");
    fs::copy(site.pki.ca_file(), &ca).unwrap();
    site.write_configuration(|text| {
        let line = format!("client_ca_file = \"{}\"", site.pki.ca_file().display());
        *text = text.replace(&line, &format!("client_ca_file = \"{}\"", ca.display()));
    });
    let broker = Broker::start_on(Arc::new(site));
    enrol(&broker).await;
    let old = Raw::connect(&broker.site.pki, Some("releaser"), broker.grpc).await;
    assert_eq!(
        old.call(UNWRAP, &ada()).await.status().code(),
        tonic::Code::Ok
    );

    fs::copy(broker.site.pki.certificate_file("other-ca"), &ca).unwrap();
    let body = super::raw::frame(&prost::Message::encode_to_vec(&ada()));
    for _ in 0..100 {
        if old.post(UNWRAP, body.clone(), &[]).await.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    old.post(UNWRAP, body, &[])
        .await
        .expect_err("the old connection is gone");
    // The other CA's client is the releaser now, and the first one's is nobody.
    let releaser = Caller::of(&broker, pki::OTHER_CA);
    assert_eq!(
        eventually(|| releaser.unwrap("ada")).await.key_material,
        MATERIAL
    );
    Caller::of(&broker, "releaser")
        .unwrap("ada")
        .await
        .unwrap_err();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_expiry_of_the_certificate_and_the_connections_are_measured() {
    let broker = Broker::start(Options::default());
    enrol(&broker).await;
    let metrics = get(broker.status, "/metrics");
    let line = metrics
        .lines()
        .find(|line| line.starts_with("keybroker_certificate_expiry_timestamp_seconds{"));
    let (series, expiry) = line.unwrap().rsplit_once(' ').unwrap();
    assert!(series.contains("server.pem"), "{metrics}");
    let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
    assert!(expiry.parse::<f64>().unwrap() > now, "{metrics}");
    assert!(metrics.contains("keybroker_connections "), "{metrics}");
}
