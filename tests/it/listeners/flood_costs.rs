//! What floods cost: memory, bytes of logs, and the latency of other clients. `docs/reliability.md` has the figures of the release build,
//! which `KEYBROKER_TEST_PROGRAM` names.

use std::{
    fmt::Write as _,
    fs,
    io::Read as _,
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use hyper::{Request, body::Bytes, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::TlsConnector;

use super::{
    floods::{
        BATCH, HEALTH, MATERIAL, MESSAGE_BYTES, REFLECTION, UNWRAP, connect_from, endless, flood,
        flood_with, metric, peak_kib, resident_kib, served, with_ada,
    },
    raw::{handshake, tls_config},
};
use crate::{
    client::Caller,
    pki,
    process::{Broker, until},
    rest::site::RestSite,
    site::Options,
};

const MIB: u64 = 1_024;
/// Memory that a flood may add to the front.
const GROWTH_KIB: u64 = 32 * MIB;

/// With a release build, what the front may take at most in any flood of unauthenticated callers.
const RELEASE_KIB_MAX: u64 = 80 * MIB;

fn is_release() -> bool {
    std::env::var_os("KEYBROKER_TEST_PROGRAM").is_some()
}

/// Forgets the most memory that the front has had (proc(5), `clear_refs`): a start takes more than it keeps. Returns what it has now.
fn reset_peak(broker: &Broker) -> u64 {
    fs::write(format!("/proc/{}/clear_refs", broker.pid()), "5").unwrap();
    resident_kib(broker)
}

fn assert_bounded(broker: &Broker, before: u64, what: &str) {
    let peak = peak_kib(broker);
    eprintln!("{what}: {before} KiB before, {peak} KiB at most");
    assert!(
        peak < before + GROWTH_KIB,
        "{what}: {before} KiB before, {peak} KiB"
    );
    if is_release() {
        assert!(peak < RELEASE_KIB_MAX, "{what}: {peak} KiB");
    }
}

/// How the length of a body is stated.
#[derive(Clone, Copy, Debug)]
enum Length {
    Declared,
    Chunked,
}

/// 128 requests at once on each of four connections, each with 4 MiB that arrive slowly and never end.
async fn flood_rest_over_http2(rest: &RestSite, token: Option<&str>, length: Length) {
    let mut config = (*tls_config(&rest.broker.site.pki, None, rustls::ALL_VERSIONS)).clone();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let config = Arc::new(config);
    let connect = async || {
        let stream = handshake(rest.tls, Arc::clone(&config)).await.unwrap();
        let io = TokioIo::new(stream);
        let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await.unwrap();
        tokio::spawn(connection);
        sender
    };
    let make = || {
        let mut request =
            Request::post("https://localhost/user-keys").header("content-type", "application/json");
        if let Length::Declared = length {
            request = request.header("content-length", MESSAGE_BYTES);
        }
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let body = endless(b"{\"key\":\"".to_vec(), MESSAGE_BYTES);
        request.body(body).unwrap()
    };
    flood_with(connect, make).await;
}

/// The same on 128 connections of HTTP/1.1. Each sends as long as the broker takes bytes, at most 4 MiB.
async fn flood_rest_over_http1(rest: &RestSite, token: Option<&str>, length: Length) {
    let mut head =
        "POST /user-keys HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            .to_owned();
    match length {
        Length::Declared => write!(head, "Content-Length: {MESSAGE_BYTES}\r\n").unwrap(),
        Length::Chunked => head.push_str("Transfer-Encoding: chunked\r\n"),
    }
    if let Some(token) = token {
        write!(head, "Authorization: Bearer {token}\r\n").unwrap();
    }
    head.push_str("\r\n");
    let part = match length {
        Length::Declared => vec![b'x'; 16 * 1_024],
        Length::Chunked => [b"4000\r\n".to_vec(), vec![b'x'; 0x4000], b"\r\n".to_vec()].concat(),
    };
    let part = Arc::new(part);
    let sending = (0..128).map(|_| {
        let (head, part) = (head.clone(), Arc::clone(&part));
        let target = rest.plain;
        async move {
            let mut stream = tokio::net::TcpStream::connect(target).await?;
            stream.write_all(head.as_bytes()).await?;
            for _ in 0..MESSAGE_BYTES / part.len() {
                stream.write_all(&part).await?;
            }
            stream.read_u8().await
        }
    });
    // The broker stops reading, answers or closes: each is fine, and none takes longer than this to show.
    tokio::time::timeout(Duration::from_secs(2), join_all(sending))
        .await
        .ok();
}

/// REST with 4 MiB bodies, declared and chunked, over both versions of HTTP, without a credential and with one. Without the limits that
/// is up to 2 GiB.
#[tokio::test(flavor = "multi_thread")]
async fn large_rest_bodies_do_not_fill_the_memory() {
    let rest = RestSite::open();
    let user = uuid::Uuid::new_v4().to_string();
    rest.get(&user).await.expect_refused(404, "KEY_NOT_FOUND");
    let before = reset_peak(&rest.broker);
    let token = rest.token(&user);
    for token in [None, Some(token.as_str())] {
        for length in [Length::Declared, Length::Chunked] {
            let who = token.map_or("unauthenticated", |_| "authenticated");
            flood_rest_over_http2(&rest, token, length).await;
            assert_bounded(&rest.broker, before, &format!("{who}, HTTP/2, {length:?}"));
            flood_rest_over_http1(&rest, token, length).await;
            assert_bounded(
                &rest.broker,
                before,
                &format!("{who}, HTTP/1.1, {length:?}"),
            );
        }
    }
    // Another user is served all the same.
    let other = uuid::Uuid::new_v4().to_string();
    rest.get(&other).await.expect_refused(404, "KEY_NOT_FOUND");
}

/// 128 messages of 4 MiB on each of four connections, over gRPC, also to reflection and with a certificate.
#[tokio::test(flavor = "multi_thread")]
async fn large_grpc_messages_do_not_fill_the_memory() {
    let (broker, releaser) = with_ada(Options {
        limits: "reflection = true".to_owned(),
        ..Options::default()
    })
    .await;
    served(&releaser).await;
    let before = reset_peak(&broker);
    for (client, path) in [
        (pki::UNKNOWN, HEALTH),
        (pki::UNKNOWN, UNWRAP),
        (pki::UNKNOWN, REFLECTION),
        ("releaser", UNWRAP),
        ("releaser", REFLECTION),
    ] {
        flood(&broker, client, path, 4 << 20, MESSAGE_BYTES).await;
        served(&releaser).await;
        assert_bounded(&broker, before, &format!("{client} {path}"));
    }
}

/// A frame of HTTP/2 on stream 1.
fn http2_frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
    let [_, high, middle, low] = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = vec![high, middle, low, kind, flags, 0, 0, 0, 1];
    frame.extend(payload);
    frame
}

/// Headers that never end (CVE-2024-27316): one HEADERS frame, then CONTINUATION frames, of which none says that it is the last.
#[tokio::test(flavor = "multi_thread")]
async fn headers_without_end_close_the_connection_and_do_not_fill_the_memory() {
    const HEADERS: u8 = 1;
    const CONTINUATION: u8 = 9;
    const BYTES_MAX: usize = 64 * 1_024 * 1_024;
    let (broker, releaser) = with_ada(Options::default()).await;
    served(&releaser).await;
    let before = reset_peak(&broker);
    // A literal field with a name and a value of 4,000 bytes (RFC 7541 section 6.2.2), and what looks like an endless indexed field.
    let literal: Vec<u8> = [vec![0, 1, b'x', 0x7f, 0xa1, 0x1e], vec![b'y'; 4_000]].concat();
    for block in [literal.repeat(4), vec![0x82; 16 * 1_024], Vec::new()] {
        for client in [pki::UNKNOWN, "other-releaser"] {
            let config = tls_config(&broker.site.pki, Some(client), rustls::ALL_VERSIONS);
            let attack = async {
                let mut stream = handshake(broker.grpc, config).await.unwrap();
                let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
                let begin = [
                    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
                    settings.to_vec(),
                    http2_frame(HEADERS, 0, &block),
                ];
                stream.write_all(&begin.concat()).await?;
                let more = http2_frame(CONTINUATION, 0, &block);
                let mut sent = 0;
                while sent < BYTES_MAX {
                    stream.write_all(&more).await?;
                    sent += more.len();
                }
                std::io::Result::Ok(())
            };
            let ended = tokio::time::timeout(Duration::from_mins(1), attack).await;
            ended.expect("the connection is closed").unwrap_err();
            served(&releaser).await;
            assert_bounded(&broker, before, &format!("{client}, {} bytes", block.len()));
        }
    }
}

/// Anonymous memory, and pages of files such as the program itself.
fn memory_kinds(broker: &Broker) -> String {
    let status = fs::read_to_string(format!("/proc/{}/status", broker.pid())).unwrap();
    let kinds = status.lines().filter(|line| line.starts_with("Rss"));
    kinds.collect::<Vec<_>>().join(", ")
}

/// After the floods, the memory goes back to the operating system.
#[tokio::test(flavor = "multi_thread")]
async fn memory_returns_after_a_flood() {
    const WAIT_MAX: Duration = Duration::from_mins(2);
    let (broker, releaser) = with_ada(Options {
        limits: "reflection = true".to_owned(),
        ..Options::default()
    })
    .await;
    // What is used for the first time stays.
    for _ in 0..200 {
        served(&releaser).await;
    }
    let before = reset_peak(&broker);
    eprintln!("{}", memory_kinds(&broker));
    for (client, path) in [
        (pki::UNKNOWN, HEALTH),
        (pki::UNKNOWN, UNWRAP),
        ("releaser", UNWRAP),
        ("releaser", REFLECTION),
    ] {
        flood(&broker, client, path, 4 << 20, MESSAGE_BYTES).await;
    }
    // Messages within the limit, which take memory until their calls end.
    flood(&broker, "other-releaser", BATCH, 60_000, 50_000).await;
    // Connections, and calls on each of them.
    let mut open = Vec::new();
    for _ in 0..500 {
        open.push(Caller::of(&broker, "releaser"));
    }
    let calls = open.iter().map(|caller| async {
        for _ in 0..4 {
            // Overload is refused, which is fine here.
            drop(caller.unwrap("ada").await);
        }
    });
    join_all(calls).await;
    drop(open);
    let after = resident_kib(&broker);
    let started = Instant::now();
    let mut now = after;
    while now > before + before / 5 && started.elapsed() < WAIT_MAX {
        tokio::time::sleep(Duration::from_millis(500)).await;
        now = resident_kib(&broker);
    }
    eprintln!("{}", memory_kinds(&broker));
    eprintln!(
        "{before} KiB before, {} KiB at most, {after} KiB after the flood, {now} KiB after {:.1} s",
        peak_kib(&broker),
        started.elapsed().as_secs_f64()
    );
    assert!(now <= before + before / 5, "{before} KiB before, {now} KiB");
    served(&releaser).await;
}

/// Raises the limit of open files of this process.
fn raise_descriptors() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    setrlimit(Resource::Nofile, raised).unwrap();
    limit.maximum.unwrap_or(u64::MAX)
}

/// 4,096 connections of one network on which nothing is said, renewed as they are closed; meanwhile clients on open connections and
/// on new ones call. `KEYBROKER_TEST_HALF_OPEN_SECONDS=30` is the run of docs/reliability.md, and asserts the latency.
#[tokio::test(flavor = "multi_thread")]
async fn half_open_connections_of_one_network_do_not_slow_other_clients() {
    const HALF_OPEN: usize = 4_096;
    let seconds = std::env::var("KEYBROKER_TEST_HALF_OPEN_SECONDS").ok();
    let promised = seconds.map(|text| Duration::from_secs(text.parse().unwrap()));
    let length = promised.unwrap_or(Duration::from_secs(3));
    assert!(
        raise_descriptors() > 8_192,
        "the limit of open files is too low"
    );
    // So that all of them are open at once, however slowly they come.
    let (broker, releaser) = with_ada(Options {
        limits: "handshake_timeout_ms = 60000".to_owned(),
        ..Options::default()
    })
    .await;
    served(&releaser).await;
    let target = broker.grpc;
    let stop = Arc::new(AtomicBool::new(false));
    let attackers: Vec<_> = (0..4_u8)
        .map(|number| {
            let stop = Arc::clone(&stop);
            thread::spawn(move || hold_half_open(target, number, HALF_OPEN / 4, &stop))
        })
        .collect();
    until("the half-open connections", || {
        (metric(
            &broker,
            r#"keybroker_handshakes_failed_total{cause="displaced"}"#,
        ) > 0)
            .then_some(())
    });
    let until = Instant::now() + length;
    let mut known = Vec::new();
    let mut fresh = Vec::new();
    while Instant::now() < until {
        let started = Instant::now();
        let key = releaser.unwrap("ada").await.unwrap();
        assert_eq!(key.key_material, MATERIAL);
        known.push(started.elapsed());
        let started = Instant::now();
        let key = Caller::of(&broker, "releaser").unwrap("ada").await.unwrap();
        assert_eq!(key.key_material, MATERIAL);
        fresh.push(started.elapsed());
    }
    stop.store(true, Ordering::Relaxed);
    let opened: usize = attackers
        .into_iter()
        .map(|attacker| attacker.join().unwrap())
        .sum();
    for (what, times) in [("open", &mut known), ("new", &mut fresh)] {
        times.sort_unstable();
        let p99 = times[times.len() * 99 / 100];
        eprintln!(
            "{what} connections: {} calls, p99 {p99:?}, slowest {:?}; {opened} half-open connections",
            times.len(),
            times.last().unwrap()
        );
        if promised.is_some() {
            assert!(p99 < Duration::from_secs(1), "{what}: {p99:?}");
        }
    }
}

/// Keeps so many silent connections open until told to stop, and says how many it has opened.
fn hold_half_open(target: SocketAddr, host: u8, count: usize, stop: &AtomicBool) -> usize {
    let source = format!("127.0.7.{host}");
    let mut held = Vec::with_capacity(count);
    let mut opened = 0;
    while !stop.load(Ordering::Relaxed) {
        held.retain_mut(|stream: &mut TcpStream| {
            let mut byte = [0];
            let read = stream.read(&mut byte);
            read.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
        });
        for _ in held.len()..count {
            let stream = connect_from(&source, target);
            stream.set_nonblocking(true).unwrap();
            held.push(stream);
            opened += 1;
        }
        thread::sleep(Duration::from_millis(20));
    }
    opened
}

/// 100 networks send calls without a credential, and with wrong ones, as fast as they are answered. Log and audit log grow by no more than
/// 10 MB an hour. `KEYBROKER_TEST_LOG_FLOOD_SECONDS=60` is the run of docs/reliability.md.
#[tokio::test(flavor = "multi_thread")]
async fn unauthenticated_calls_do_not_fill_the_disk_with_log_lines() {
    const NETWORKS: u8 = 100;
    const HOUR_BYTES_MAX: f64 = 10e6;
    let seconds = std::env::var("KEYBROKER_TEST_LOG_FLOOD_SECONDS").ok();
    let length = seconds.map_or(6, |text| text.parse().unwrap());
    let rest = RestSite::open();
    let before = bytes_written(&rest.broker);
    let config = tls_config(&rest.broker.site.pki, None, rustls::ALL_VERSIONS);
    let stop = Arc::new(AtomicBool::new(false));
    let calling: Vec<_> = (0..NETWORKS)
        .map(|network| {
            let (config, stop) = (Arc::clone(&config), Arc::clone(&stop));
            let target = rest.tls;
            tokio::spawn(async move { call_unauthenticated(target, network, config, &stop).await })
        })
        .collect();
    // The first lines come at once, and their limits are by the minute: they count once a minute. What comes after them is constant.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let burst = bytes_written(&rest.broker) - before;
    let started = Instant::now();
    tokio::time::sleep(Duration::from_secs(length)).await;
    let more = bytes_written(&rest.broker) - before - burst;
    let elapsed = started.elapsed().as_secs_f64();
    stop.store(true, Ordering::Relaxed);
    let calls: u64 = join_all(calling)
        .await
        .into_iter()
        .map(|calls| calls.unwrap())
        .sum();
    let steady = f64::from(u32::try_from(more).unwrap()) / elapsed * 3_600.0;
    let hour = f64::from(u32::try_from(burst).unwrap()) * 60.0 + steady;
    eprintln!(
        "{calls} calls ({:.0}/s); {burst} bytes in the first 2 s, then {more} bytes in {elapsed:.1} s; in an hour {:.2} MB",
        f64::from(u32::try_from(calls).unwrap()) / (elapsed + 2.0),
        hour / 1e6
    );
    assert!(calls > 1_000, "{calls} calls are no flood");
    assert!(hour < HOUR_BYTES_MAX, "{hour} bytes an hour");
}

/// Bytes of the log and of the audit log.
fn bytes_written(broker: &Broker) -> u64 {
    let audit = fs::read_dir(broker.site.audit_directory()).unwrap();
    let audit: u64 = audit
        .map(|entry| entry.unwrap().metadata().unwrap())
        .filter(fs::Metadata::is_file)
        .map(|meta| meta.len())
        .sum();
    audit + u64::try_from(broker.site.log().len()).unwrap()
}

/// Calls over one connection from its own network, again and again, without a credential and with wrong ones in turn.
async fn call_unauthenticated(
    target: SocketAddr,
    network: u8,
    config: Arc<rustls::ClientConfig>,
    stop: &AtomicBool,
) -> u64 {
    let mut calls = 0;
    while !stop.load(Ordering::Relaxed) {
        let stream = connect_from(&format!("127.1.{network}.1"), target);
        stream.set_nonblocking(true).unwrap();
        let stream = tokio::net::TcpStream::from_std(stream).unwrap();
        let name = rustls::pki_types::ServerName::try_from("localhost").unwrap();
        let connector = TlsConnector::from(Arc::clone(&config));
        let Ok(stream) = connector.connect(name, stream).await else {
            continue;
        };
        let handshake = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
        let Ok((mut sender, connection)) = handshake else {
            continue;
        };
        tokio::spawn(connection);
        while !stop.load(Ordering::Relaxed) {
            let mut request = Request::get("https://localhost/user-keys");
            match calls % 4 {
                0 | 1 => {}
                2 => request = request.header("authorization", "Bearer nonsense"),
                _ => request = request.header("authorization", "Basic bm9ib2R5Om5vdGhpbmc="),
            }
            let body = http_body_util::Empty::<Bytes>::new();
            if sender.ready().await.is_err() {
                break;
            }
            let answer = sender.send_request(request.body(body).unwrap()).await;
            if answer.is_err() {
                break;
            }
            calls += 1;
        }
    }
    calls
}
