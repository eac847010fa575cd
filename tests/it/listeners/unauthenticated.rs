//! Connections that say nothing, or not what belongs here.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::raw::{Raw, handshake, tls_config};
use crate::{
    client::{Caller, eventually, refused},
    pki,
    process::{Broker, WAIT_MAX, until},
    site::{Options, Site},
    wire::get,
};

const MATERIAL: &[u8] = b"material of this user";

async fn with_ada(options: Options) -> Broker {
    let broker = Broker::start(options);
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("ada", MATERIAL).await.unwrap();
    broker
}

async fn served(broker: &Broker) {
    let releaser = Caller::of(broker, "other-releaser");
    let key = eventually(|| releaser.unwrap("ada")).await;
    assert_eq!(key.key_material, MATERIAL);
}

fn handshakes_failed(broker: &Broker, cause: &str) -> u64 {
    let name = format!("keybroker_handshakes_failed_total{{cause=\"{cause}\"}} ");
    let metrics = get(broker.status, "/metrics");
    let line = metrics.lines().find_map(|line| line.strip_prefix(&name));
    line.map_or(0, |count| count.trim().parse().unwrap())
}

/// A handshake is not enough to keep a place: the first bytes of HTTP/2 must follow within the same time.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_is_silent_after_the_handshake_is_cut() {
    let options = Options {
        limits: "connections_max = 8\nhandshake_timeout_ms = 700".to_owned(),
        ..Options::default()
    };
    let broker = with_ada(options).await;
    let config = tls_config(&broker.site.pki, Some("releaser"), rustls::ALL_VERSIONS);
    let mut silent = Vec::new();
    for said in [&b""[..], b"PRI * HTTP/2.0", b""] {
        let mut stream = handshake(broker.grpc, Arc::clone(&config)).await.unwrap();
        stream.write_all(said).await.unwrap();
        silent.push(stream);
    }
    for mut stream in silent {
        let mut heard = Vec::new();
        let end = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut heard));
        // Closed one way or the other; what counts is that it does not stay open.
        drop(end.await.expect("a silent connection must be cut"));
    }
    assert_eq!(handshakes_failed(&broker, "timeout"), 3);
    served(&broker).await;
}

/// A connection without a principal keeps a place only while a call is under way, and all of them never have every place.
#[tokio::test(flavor = "multi_thread")]
async fn unauthenticated_connections_do_not_keep_the_places() {
    let options = Options {
        limits: "connections_max = 16\nhandshake_timeout_ms = 700".to_owned(),
        ..Options::default()
    };
    let broker = with_ada(options).await;
    let mut idle = Vec::new();
    for _ in 0..4 {
        let mut connection = Raw::connect(&broker.site.pki, Some(pki::UNKNOWN), broker.grpc).await;
        connection.ready().await.unwrap();
        // The server has placed it, too.
        let answer = connection.call("/grpc.health.v1.Health/Check", &()).await;
        assert_eq!(answer.status().code(), tonic::Code::Ok);
        idle.push(connection);
    }
    let config = tls_config(&broker.site.pki, Some(pki::UNKNOWN), rustls::ALL_VERSIONS);
    let mut more = Vec::new();
    for _ in 0..8 {
        let stream = handshake(broker.grpc, Arc::clone(&config)).await.unwrap();
        let connection = Raw::over(stream).await;
        if let Ok(connection) = &connection {
            let health = "/grpc.health.v1.Health/Check";
            connection.post(health, Vec::new(), &[]).await.unwrap_err();
        }
        more.push(connection);
    }
    let refused = "keybroker_connections_refused_total{cause=\"unauthenticated\"} 8";
    until("unauthenticated connections to be refused", || {
        get(broker.status, "/metrics")
            .contains(refused)
            .then_some(())
    });
    served(&broker).await;
    for mut connection in idle {
        let gone = async {
            while connection.ready().await.is_ok() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let gone = tokio::time::timeout(Duration::from_secs(10), gone).await;
        gone.expect("an idle unauthenticated connection is closed");
    }
}

/// After a good handshake, something that is not HTTP/2.
#[tokio::test(flavor = "multi_thread")]
async fn http_1_inside_tls_is_cut() {
    let broker = with_ada(Options::default()).await;
    let config = tls_config(&broker.site.pki, Some("releaser"), rustls::ALL_VERSIONS);
    let mut stream = handshake(broker.grpc, config).await.unwrap();
    stream
        .write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .await
        .unwrap();
    let mut answer = Vec::new();
    let end = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut answer));
    drop(end.await.expect("cut at once"));
    assert!(!answer.starts_with(b"HTTP/"), "{answer:?}");
    until("the cause to be counted", || {
        (handshakes_failed(&broker, "not_http2") == 1).then_some(())
    });
    served(&broker).await;
}

/// Each cause of a refused handshake is in the metrics, in one warning that names the peer, and in the audit log.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_handshake_is_counted_logged_and_audited_by_its_cause() {
    let site = Site::fresh(Options::default());
    site.pki.revoke(&["lifecycle"], 86_400);
    let list = format!("client_crl_file = \"{}\"", site.pki.crl_file().display());
    site.write_configuration(|text| {
        *text = text.replace("client_ca_file", &format!("{list}\nclient_ca_file"));
    });
    let broker = Broker::start_on(Arc::new(site));
    let pki = &broker.site.pki;
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("ada", MATERIAL).await.unwrap();
    for client in [
        pki::EXPIRED,
        pki::NOT_YET_VALID,
        pki::OTHER_CA,
        pki::NO_USAGE,
        "lifecycle",
    ] {
        Caller::of(&broker, client).unwrap("ada").await.unwrap_err();
    }
    let nobody = tls_config(pki, None, rustls::ALL_VERSIONS);
    // With TLS 1.3 the client learns of its refusal only when it reads.
    let mut stream = handshake(broker.grpc, nobody).await.unwrap();
    stream.read_to_end(&mut Vec::new()).await.unwrap_err();
    let mut other = (*tls_config(pki, Some("releaser"), rustls::ALL_VERSIONS)).clone();
    other.alpn_protocols = vec![b"another protocol".to_vec()];
    handshake(broker.grpc, Arc::new(other)).await.unwrap_err();
    let mut plain = TcpStream::connect(broker.grpc).unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    plain.set_read_timeout(Some(WAIT_MAX)).unwrap();
    plain.read_to_end(&mut answer).ok();
    assert!(!answer.starts_with(b"HTTP/"), "{answer:?}");
    drop(TcpStream::connect(broker.grpc).unwrap());
    let causes = [
        ("expired", "CREDENTIAL"),
        ("not_yet_valid", "CREDENTIAL"),
        ("unknown_ca", "CREDENTIAL"),
        ("bad_certificate", "CREDENTIAL"),
        ("revoked", "CREDENTIAL"),
        ("no_certificate", "CREDENTIAL"),
        ("incompatible", "REQUEST"),
        ("not_tls", "REQUEST"),
    ];
    for cause in causes.map(|(cause, _)| cause).into_iter().chain(["closed"]) {
        until(cause, || {
            (handshakes_failed(&broker, cause) >= 1).then_some(())
        });
    }
    served(&broker).await;
    let (site, _) = broker.stop();
    let (log, audit) = (site.log(), site.audit());
    for (cause, reason) in causes {
        let named = format!("\"cause\":\"{cause}\"");
        let has = |words: &[&str], line: &&str| {
            line.contains(&named) && words.iter().all(|word| line.contains(word))
        };
        let warning = ["\"WARN\"", "connection refused", "\"peer\":\"127.0.0.1:"];
        assert!(
            log.lines().any(|line| has(&warning, &line)),
            "{cause}: {log}"
        );
        let entry = ["connection.refused", reason, "\"peer\":\"127.0.0.0/24\""];
        let entries = audit.lines().filter(|line| has(&entry, line));
        assert_eq!(entries.count(), 1, "{cause}: {audit}");
    }
    // A connection that says nothing was refused nothing: a load balancer's probe leaves no trace.
    assert!(!audit.contains("\"closed\"") && !log.contains("\"closed\""));
}

/// With few file descriptors to begin with, the broker takes what the system allows, and unauthenticated connections cannot use
/// them up.
#[tokio::test(flavor = "multi_thread")]
async fn unauthenticated_connections_cannot_take_the_file_descriptors() {
    for (line, connections) in [
        // A low soft limit is raised.
        ("ulimit -Sn 128; exec \"$0\" \"$@\"", 400),
        // A low hard limit bounds the connections instead.
        ("ulimit -n 160; exec \"$0\" \"$@\"", 300),
    ] {
        let site = Arc::new(Site::fresh(Options {
            limits: "handshake_timeout_ms = 2000".to_owned(),
            ..Options::default()
        }));
        let broker = Broker::start_as(site, |site| site.serve_through(line));
        let enroller = Caller::of(&broker, "enroller");
        enroller.create("ada", MATERIAL).await.unwrap();
        let silent: Vec<_> = (0..connections)
            .map(|_| TcpStream::connect(broker.grpc).unwrap())
            .collect();
        // On the connection that is open already: store, audit log and token still have theirs.
        enroller.create("bob", MATERIAL).await.unwrap();
        served(&broker).await;
        assert!(!broker.site.log().contains("Too many open files"), "{line}");
        drop(silent);
    }
}

/// A request that never ends keeps neither the status listener nor its connection.
#[test]
fn a_half_sent_probe_is_cut() {
    let broker = Broker::start(Options::default());
    let mut half = half_a_request(broker.status);
    assert!(get(broker.status, "/livez").starts_with("HTTP/1.1 200"));
    let started = Instant::now();
    half.read_to_end(&mut Vec::new()).ok();
    assert!(
        started.elapsed() < Duration::from_secs(15),
        "{:?}",
        started.elapsed()
    );
}

pub(super) fn half_a_request(address: SocketAddr) -> TcpStream {
    let mut half = TcpStream::connect(address).unwrap();
    half.set_read_timeout(Some(WAIT_MAX)).unwrap();
    half.write_all(b"GET /livez HTTP/1.1\r\nHost: loc").unwrap();
    half
}

/// An unknown name is refused on each call, and says so the same way whoever asks.
#[tokio::test(flavor = "multi_thread")]
async fn a_common_name_is_no_name() {
    let broker = with_ada(Options::default()).await;
    refused(
        Caller::of(&broker, pki::COMMON_NAME).unwrap("ada").await,
        "CREDENTIAL",
    );
}
