//! Strangers on the port, and callers that send too much: others are not disturbed.

use std::{
    collections::BTreeSet,
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::Arc,
    time::Duration,
};

use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::Code;

use crate::{
    client::{Caller, eventually, refused},
    listeners::raw::{handshake, tls_config},
    pki,
    process::{Broker, WAIT_MAX},
    site::{Options, Site},
};

const MATERIAL: &[u8] = b"material of this user";

async fn with_ada(options: Options) -> (Broker, Caller) {
    let broker = Broker::start(options);
    Caller::of(&broker, "enroller")
        .create("ada", MATERIAL)
        .await
        .unwrap();
    let releaser = Caller::of(&broker, "releaser");
    (broker, releaser)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_oversized_message_is_refused() {
    let (broker, releaser) = with_ada(Options::default()).await;
    let enroller = Caller::of(&broker, "enroller");
    for bytes in [64 * 1024, 65 * 1024, 1024 * 1024, 8 * 1024 * 1024] {
        let status = refused(enroller.create("bob", &vec![0x42; bytes]).await, "REQUEST");
        assert_eq!(status.code(), Code::InvalidArgument, "{bytes}");
    }
    assert_eq!(releaser.unwrap("ada").await.unwrap().key_material, MATERIAL);
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_on_the_port_disturbs_no_other_client() {
    let (broker, releaser) = with_ada(Options::default()).await;
    let noise: Vec<u8> = (0..100_000_u32)
        .map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0])
        .collect();
    let http = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let hello = [0x16, 3, 1, 0xff, 0xff];
    for garbage in [
        noise.as_slice(),
        http,
        &hello,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\0",
    ] {
        for address in [broker.grpc, broker.status] {
            let mut stream = TcpStream::connect(address).unwrap();
            // The broker may close before all of it is sent.
            stream.write_all(garbage).ok();
            stream.shutdown(std::net::Shutdown::Write).ok();
        }
        assert_eq!(releaser.unwrap("ada").await.unwrap().key_material, MATERIAL);
    }
    let before = broker.site.audit().lines().count();
    assert!(
        before < 50,
        "an unauthenticated client cannot fill the audit log: {before} lines"
    );
}

/// Connections that never say a word are cut after the handshake timeout, and callers are served meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_silent_connections_disturb_no_other_client() {
    let limit = getrlimit(Resource::Nofile);
    let wanted = rustix::process::Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, wanted).unwrap();

    let options = Options {
        limits: "handshake_timeout_ms = 3000".to_owned(),
        ..Options::default()
    };
    let (broker, releaser) = with_ada(options).await;
    let silent = silent_connections(broker.grpc, 1_000);
    // A new connection too, not only the one that was open.
    let other = Caller::of(&broker, "other-releaser");
    for caller in [&releaser, &other] {
        assert_eq!(caller.unwrap("ada").await.unwrap().key_material, MATERIAL);
    }
    all_cut(silent);
}

/// Even when they take every place, service comes back by itself.
#[tokio::test(flavor = "multi_thread")]
async fn silent_connections_cannot_keep_every_place() {
    let options = Options {
        limits: "connections_max = 32\nhandshake_timeout_ms = 500".to_owned(),
        ..Options::default()
    };
    let (broker, releaser) = with_ada(options).await;
    let silent = silent_connections(broker.grpc, 200);
    let other = Caller::of(&broker, "other-releaser");
    for caller in [&releaser, &other] {
        let key = eventually(|| caller.unwrap("ada")).await;
        assert_eq!(key.key_material, MATERIAL);
    }
    all_cut(silent);
}

fn silent_connections(address: SocketAddr, count: usize) -> Vec<TcpStream> {
    (0..count)
        .map(|_| TcpStream::connect(address).unwrap())
        .collect()
}

fn all_cut(silent: Vec<TcpStream>) {
    for mut stream in silent {
        stream.set_read_timeout(Some(WAIT_MAX)).unwrap();
        // Closed, reset, or closed after a TLS alert; never still open.
        if let Err(error) = stream.read_to_end(&mut Vec::new()) {
            assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
        }
    }
}

/// Liveness is independent of the token; readiness is not. Neither tells an unauthenticated caller anything.
#[test]
fn probes_and_metrics_answer_in_plain_http() {
    let broker = Broker::start(Options::default());
    for (path, expected) in [
        ("/livez", "200"),
        ("/readyz", "200"),
        ("/metrics", "200"),
        ("/other", "404"),
    ] {
        let answer = get(broker.status, path);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {expected}")),
            "{path}: {answer}"
        );
    }
    let metrics = get(broker.status, "/metrics");
    assert!(
        metrics.contains("keybroker_token_serving{token=\"default\"} 1"),
        "{metrics}"
    );
}

/// What `promtool check metrics` asks of the text, and that no series appears only with its first event.
#[test]
fn metrics_are_described_and_counters_exist_from_the_start() {
    let broker = Broker::start(Options::default());
    let answer = get(broker.status, "/metrics");
    let (_, text) = answer.split_once("\r\n\r\n").unwrap();
    let (mut helped, mut typed) = (BTreeSet::new(), BTreeSet::new());
    for line in text.lines() {
        let word = |at: usize| line.split(' ').nth(at).unwrap().to_owned();
        if line.starts_with("# HELP ") {
            assert!(helped.insert(word(2)), "{line}");
            assert!(line.split(' ').count() > 4, "{line}");
        } else if line.starts_with("# TYPE ") {
            assert!(typed.insert(word(2)), "{line}");
        } else if !line.is_empty() {
            let name = line.split(['{', ' ']).next().unwrap();
            let family = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|suffix| name.strip_suffix(suffix).filter(|it| typed.contains(*it)));
            let family = family.unwrap_or(name);
            assert!(helped.contains(family) && typed.contains(family), "{line}");
        }
    }
    for expected in [
        "keybroker_audit_tampering_total 0",
        "keybroker_bulk_releases_total 0",
        "keybroker_calls_total{action=\"user_key.unwrap\",reason=\"OK\"} 0",
        "keybroker_connections_refused_total{cause=\"resets\"} 0",
        "keybroker_handshakes_failed_total{cause=\"revoked\"} 0",
        "keybroker_refusals_total{reason=\"CREDENTIAL\"} 0",
        "keybroker_build_info{version=\"",
        "process_resident_memory_bytes ",
        "process_cpu_seconds_total ",
        "process_open_fds ",
    ] {
        assert!(text.contains(expected), "{expected}\n{text}");
    }
    if let Some(file) = std::env::var_os("KEYBROKER_TEST_METRICS_FILE") {
        std::fs::write(file, text).unwrap();
    }
}

/// What the status listener answers, headers and body.
pub(crate) fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// A collector on another machine: over TLS, and with a certificate where the configuration asks for one.
#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_collected_over_tls_with_a_client_certificate() {
    let site = Site::fresh(Options::default());
    let pki = &site.pki;
    let tls = format!(
        "\n[status.remote]\naddress = \"127.0.0.1:0\"\n[status.remote.tls]\ncertificate_file = \"{}\"\nkey_file = \"{}\"\n\
         client_ca_file = \"{}\"\n",
        pki.certificate_file("server").display(),
        pki.key_file("server").display(),
        pki.ca_file().display()
    );
    site.write_configuration(|text| text.push_str(&tls));
    let broker = Broker::start_on(Arc::new(site));
    let remote = *broker.listeners.last().unwrap();
    let ask = async |client: Option<&str>| -> std::io::Result<String> {
        let mut config = (*tls_config(&broker.site.pki, client, rustls::ALL_VERSIONS)).clone();
        // As collectors do; the answer is HTTP/1.1.
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let mut stream = handshake(remote, Arc::new(config)).await?;
        let request = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n";
        stream.write_all(request).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer)
    };
    let answer = ask(Some("releaser")).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(
        answer.contains("keybroker_token_serving{token=\"default\"} 1"),
        "{answer}"
    );
    for client in [None, Some(pki::OTHER_CA)] {
        ask(client).await.unwrap_err();
    }
    let answer = get(broker.status, "/metrics");
    for cause in ["no_certificate", "unknown_ca"] {
        let counted = format!("keybroker_handshakes_failed_total{{cause=\"{cause}\"}} 1\n");
        assert!(answer.contains(&counted), "{answer}");
    }
    // The listener on loopback stays as it is.
    assert!(get(broker.status, "/livez").starts_with("HTTP/1.1 200"));
}

/// An address that others reach needs TLS, or a word that accepts what goes without.
#[test]
fn a_status_listener_for_others_needs_tls_or_an_explicit_word() {
    let site = Site::fresh(Options::default());
    let original = std::fs::read_to_string(site.configuration_file()).unwrap();
    for (lines, problem) in [
        ("", Some("there is no [status.remote.tls]")),
        (
            "plaintext = \"loopback\"",
            Some("there is no [status.remote.tls]"),
        ),
        ("plaintext = \"any\"", None),
    ] {
        site.write_configuration(|text| {
            *text = format!("{original}\n[status.remote]\naddress = \"127.0.0.1:0\"\n{lines}\n");
        });
        let finished = site.run(&["config", "check"]);
        match problem {
            Some(words) => assert!(finished.stderr.contains(words), "{finished:#?}"),
            None => assert_eq!(finished.code, Some(0), "{finished:#?}"),
        }
    }
}
