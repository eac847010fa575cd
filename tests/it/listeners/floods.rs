//! Floods: what a caller can send or hold open costs the broker a bounded amount of memory and nobody else's calls.

use std::{
    convert::Infallible,
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt as _, future::join_all, stream};
use http_body_util::{StreamBody, combinators::BoxBody};
use hyper::{
    Request,
    body::{Bytes, Frame},
    client::conn::http2::{self, SendRequest},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustix::{
    net::{AddressFamily, SocketType, bind, connect, socket},
    process::Signal,
};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use super::raw::{Raw, frame, handshake, tls_config};
use crate::{
    client::{Caller, channel, eventually},
    pki,
    process::{Broker, freeze, send, until},
    site::{Options, Site},
    wire::get,
};

pub(super) const MESSAGE_BYTES: usize = 4 * 1024 * 1024;
pub(super) const MATERIAL: &[u8] = b"material of this user";
pub(super) const HEALTH: &str = "/grpc.health.v1.Health/Check";
pub(super) const UNWRAP: &str = "/keybroker.v1.UserKeyService/UnwrapUserKey";
pub(super) const BATCH: &str = "/keybroker.v1.UserKeyService/BatchUnwrapUserKeys";
pub(super) const REFLECTION: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";

pub(super) type Body = BoxBody<Bytes, Infallible>;

pub(super) async fn with_ada(options: Options) -> (Broker, Caller) {
    let broker = Broker::start(options);
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("ada", MATERIAL).await.unwrap();
    let releaser = Caller::of(&broker, "releaser");
    (broker, releaser)
}

pub(super) async fn served(releaser: &Caller) {
    let key = eventually(|| releaser.unwrap("ada")).await;
    assert_eq!(key.key_material, MATERIAL);
}

pub(super) fn metric(broker: &Broker, name: &str) -> u64 {
    let metrics = get(broker.status, "/metrics");
    let prefix = format!("{name} ");
    let line = metrics.lines().find_map(|line| line.strip_prefix(&prefix));
    line.map_or(0, |count| count.trim().parse().unwrap())
}

/// The most memory that the front has had, in KiB.
pub(super) fn peak_kib(broker: &Broker) -> u64 {
    status_kib(broker, "VmHWM:")
}

/// The memory that the front has now, in KiB.
pub(crate) fn resident_kib(broker: &Broker) -> u64 {
    status_kib(broker, "VmRSS:")
}

fn status_kib(broker: &Broker, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", broker.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let text = line.unwrap().trim().trim_end_matches(" kB");
    text.parse().unwrap()
}

async fn http2(broker: &Broker, client: &str) -> SendRequest<Body> {
    let config = tls_config(&broker.site.pki, Some(client), rustls::ALL_VERSIONS);
    let stream = handshake(broker.grpc, config).await.unwrap();
    let io = TokioIo::new(stream);
    let (send, connection) = http2::handshake(TokioExecutor::new(), io).await.unwrap();
    tokio::spawn(connection);
    send
}

/// A body that begins with these bytes, then has as many zeros as wanted, and never ends.
pub(super) fn endless(begin: Vec<u8>, zeros: usize) -> Body {
    let chunk = Bytes::from_static(&[0; 16 * 1024]);
    let chunks = stream::iter((0..zeros.div_ceil(chunk.len())).map(move |_| chunk.clone()));
    let bytes = stream::iter([Bytes::from(begin)]).chain(chunks);
    let frames = bytes.map(|bytes| Ok(Frame::data(bytes)));
    http_body_util::BodyExt::boxed(StreamBody::new(frames.chain(stream::pending())))
}

fn request(path: &str, body: Body) -> Request<Body> {
    Request::post(format!("https://localhost{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(body)
        .unwrap()
}

/// Sends 128 gRPC messages at once on each of four connections, until each is answered or two seconds have passed.
pub(super) async fn flood(broker: &Broker, client: &str, path: &str, declared: u32, zeros: usize) {
    let mut begin = vec![0];
    begin.extend(declared.to_be_bytes());
    let make = || request(path, endless(begin.clone(), zeros));
    flood_with(async || http2(broker, client).await, make).await;
}

/// Sends 128 requests at once on each of four connections, until each is answered or two seconds have passed.
pub(super) async fn flood_with(
    connect: impl AsyncFn() -> SendRequest<Body>,
    make: impl Fn() -> Request<Body>,
) {
    let mut in_progress = Vec::new();
    for _ in 0..4 {
        let sender = connect().await;
        for _ in 0..128 {
            let (mut sender, request) = (sender.clone(), make());
            in_progress.push(tokio::spawn(async move {
                sender.ready().await?;
                sender.send_request(request).await
            }));
        }
    }
    // Calls that are refused at once are over by then; others are held.
    let all = join_all(in_progress.iter_mut());
    tokio::time::timeout(Duration::from_secs(2), all).await.ok();
    for call in in_progress {
        call.abort();
    }
}

/// Four connections with 128 calls each that send 4 MiB. Without the limits that is up to 2 GiB.
#[tokio::test(flavor = "multi_thread")]
async fn large_messages_do_not_fill_the_memory() {
    let (broker, releaser) = with_ada(Options {
        limits: "reflection = true".to_owned(),
        ..Options::default()
    })
    .await;
    let before = peak_kib(&broker);
    for (client, path, declared) in [
        (pki::UNKNOWN, HEALTH, 4 << 20),
        (pki::UNKNOWN, "/grpc.health.v1.Health/Watch", 4 << 20),
        // A message that states a length within the limit, and goes on.
        (pki::UNKNOWN, HEALTH, 1_000),
        (pki::UNKNOWN, UNWRAP, 4 << 20),
        ("releaser", UNWRAP, 4 << 20),
        ("releaser", REFLECTION, 4 << 20),
    ] {
        flood(&broker, client, path, declared, MESSAGE_BYTES).await;
        served(&releaser).await;
        let peak = peak_kib(&broker);
        assert!(
            peak < before.max(48 * 1024) + 32 * 1024,
            "{client} {path}: {before} KiB before, {peak} KiB"
        );
    }
}

/// Large messages that are within the limit and never end take shares of one total, and small ones are served all the same.
#[tokio::test(flavor = "multi_thread")]
async fn large_messages_of_one_client_leave_room_for_the_calls_of_others() {
    let (broker, releaser) = with_ada(Options {
        limits: "message_bytes_max = 1048576".to_owned(),
        ..Options::default()
    })
    .await;
    let before = peak_kib(&broker);
    flood(&broker, "other-releaser", BATCH, 60_000, 50_000).await;
    served(&releaser).await;
    assert!(metric(&broker, "keybroker_messages_refused_total") > 0);
    let peak = peak_kib(&broker);
    assert!(peak < before + 64 * 1024, "{before} KiB before, {peak} KiB");
}

/// Far more silent connections than places, from the network of an honest client and from others: the oldest of them give way, and
/// an honest client need not wait until their handshakes time out.
#[tokio::test(flavor = "multi_thread")]
async fn half_open_connections_do_not_keep_a_client_out() {
    let (broker, _) = with_ada(Options {
        limits: "connections_max = 64\nhandshake_timeout_ms = 60000".to_owned(),
        ..Options::default()
    })
    .await;
    let mut silent = Vec::new();
    for network in 0..4 {
        for _ in 0..100 {
            silent.push(connect_from(&format!("127.0.{network}.7"), broker.grpc));
        }
    }
    let releaser = Caller::of(&broker, "releaser");
    served(&releaser).await;
    let displaced = r#"keybroker_handshakes_failed_total{cause="displaced"}"#;
    until("silent connections to be closed", || {
        (metric(&broker, displaced) >= 300).then_some(())
    });
    assert!(
        broker
            .site
            .log()
            .contains("too many handshakes in progress")
    );
}

pub(super) fn connect_from(source: &str, target: SocketAddr) -> TcpStream {
    let socket = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    let source = SocketAddr::new(source.parse().unwrap(), 0);
    bind(&socket, &source).unwrap();
    connect(&socket, &target).unwrap();
    TcpStream::from(socket)
}

/// One principal has a part of the connections, and an open health watch does not make more of them.
#[tokio::test(flavor = "multi_thread")]
async fn one_principal_cannot_take_every_connection() {
    let (broker, releaser) = with_ada(Options {
        limits: "connections_max = 24\nconnections_per_principal_max = 6".to_owned(),
        ..Options::default()
    })
    .await;
    served(&releaser).await;
    let mut watches = Vec::new();
    for _ in 0..30 {
        let channel = channel(&broker.site.pki, Some("other-releaser"), broker.grpc);
        let request = HealthCheckRequest::default();
        if let Ok(watch) = HealthClient::new(channel).watch(request).await {
            watches.push(watch.into_inner());
        }
    }
    let refused = r#"keybroker_connections_refused_total{cause="principal"}"#;
    until("refused connections to be counted", || {
        (metric(&broker, refused) >= 24).then_some(())
    });
    assert!(watches.len() <= 6, "{}", watches.len());
    served(&Caller::of(&broker, "releaser")).await;
    assert!(broker.site.log().contains(
        "connection refused, because the limit of unauthenticated connections, or of one principal's connections, is reached"
    ));
}

/// A watch keeps no connection without a principal open.
#[tokio::test(flavor = "multi_thread")]
async fn an_open_watch_does_not_keep_an_unauthenticated_connection() {
    let (broker, _) = with_ada(Options {
        limits: "handshake_timeout_ms = 200".to_owned(),
        ..Options::default()
    })
    .await;
    let channel = channel(&broker.site.pki, Some(pki::UNKNOWN), broker.grpc);
    let request = HealthCheckRequest::default();
    let mut watch = HealthClient::new(channel)
        .watch(request)
        .await
        .unwrap()
        .into_inner();
    let ended = async { while let Ok(Some(_)) = watch.message().await {} };
    let ended = tokio::time::timeout(Duration::from_secs(30), ended).await;
    ended.expect("the watch ends with its connection");
}

/// The limit of connections leaves a line in the log and a metric.
#[tokio::test(flavor = "multi_thread")]
async fn the_limit_of_connections_is_reported() {
    let (broker, _) = with_ada(Options {
        limits: "connections_max = 4".to_owned(),
        ..Options::default()
    })
    .await;
    let mut held = Vec::new();
    for _ in 0..6 {
        let config = tls_config(&broker.site.pki, Some("releaser"), rustls::ALL_VERSIONS);
        let target = broker.grpc;
        held.push(tokio::spawn(async move {
            let connection = Raw::over(handshake(target, config).await.ok()?).await;
            std::future::pending::<()>().await;
            connection.ok()
        }));
    }
    until("the limit to be reported", || {
        let is_counted = metric(&broker, "keybroker_connections_full_total") > 0;
        let log = broker.site.log();
        let is_logged = log.contains("the limit of connections is reached");
        (is_counted && is_logged).then_some(())
    });
    for one in held {
        one.abort();
    }
}

/// Calls that expire while the broker stands still do not end the connection of the calls that are still in time.
#[tokio::test(flavor = "multi_thread")]
async fn expired_calls_of_a_stall_cost_no_other_call() {
    let (broker, releaser) = with_ada(Options::default()).await;
    served(&releaser).await;
    freeze(broker.pid());
    let mut in_time = Vec::new();
    for _ in 0..10 {
        let releaser = releaser.clone();
        in_time.push(tokio::spawn(async move { releaser.unwrap("ada").await }));
    }
    // No more at once than a connection carries; each expires while the broker stands still.
    for _ in 0..2 {
        let expiring = (0..100).map(|_| {
            let mut keys = releaser.keys.clone();
            async move {
                let mut request = tonic::Request::new(crate::client::item("ada"));
                request.set_timeout(Duration::from_millis(300));
                keys.unwrap_user_key(request).await.unwrap_err();
            }
        });
        join_all(expiring).await;
    }
    send(broker.pid(), Signal::CONT);
    for call in in_time {
        let key = call.await.unwrap().unwrap();
        assert_eq!(key.key_material, MATERIAL);
    }
}

/// Rapid reset (CVE-2023-44487): a client that begins calls and cancels them at once loses its connection.
#[tokio::test(flavor = "multi_thread")]
async fn rapid_resets_end_the_connection() {
    let (broker, releaser) = with_ada(Options::default()).await;
    for client in [pki::UNKNOWN, "other-releaser"] {
        let mut sender = http2(&broker, client).await;
        let is_cut = async {
            loop {
                if sender.ready().await.is_err() {
                    return;
                }
                let call = sender.send_request(request(UNWRAP, endless(vec![0], 0)));
                // Long enough to send the head.
                drop(tokio::time::timeout(Duration::from_millis(1), call).await);
            }
        };
        let is_cut = tokio::time::timeout(Duration::from_mins(1), is_cut).await;
        is_cut.expect("the connection is ended");
        served(&releaser).await;
    }
    let cut = r#"keybroker_connections_refused_total{cause="resets"}"#;
    assert_eq!(metric(&broker, cut), 2);
}

/// A thousand connections to the status listener, idle, half-sent and kept alive: probes and metrics answer.
#[test]
fn connections_to_the_status_listener_keep_no_probe_out() {
    let broker = Broker::start_on(Arc::new(Site::fresh(Options::default())));
    let held = crowd(broker.status);
    for path in ["/livez", "/readyz", "/metrics"] {
        let answer = get(broker.status, path);
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    // No probe waited for a place: the oldest connections were closed instead.
    let displaced = metric(
        &broker,
        r#"keybroker_connections_refused_total{cause="status"}"#,
    );
    assert!(displaced > 0, "{displaced}");
    let status = broker.status.to_string();
    broker
        .site
        .expect_ok(&["probe", "live", "--status", &status]);
    drop(held);
}

/// A thousand connections of one local user.
pub(crate) fn crowd(status: SocketAddr) -> Vec<TcpStream> {
    (0..1_000)
        .map(|number| {
            let mut stream = TcpStream::connect(status).unwrap();
            match number % 3 {
                0 => {}
                // What is closed already cannot be written to.
                1 => drop(stream.write_all(b"GET /livez HTTP/1.1\r\nHost: loc")),
                _ => {
                    drop(stream.write_all(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"));
                    drop(stream.read(&mut [0; 16]));
                }
            }
            stream
        })
        .collect()
}

/// A message that ends early is refused, and the connection goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_frame_cut_short_is_a_refusal_and_no_panic() {
    let (broker, releaser) = with_ada(Options::default()).await;
    let raw = Raw::connect(&broker.site.pki, Some("releaser"), broker.grpc).await;
    let whole = frame(&[0; 100]);
    for length in [0, 1, 4, 5, 50] {
        let answer = raw.post(UNWRAP, whole[..length].to_vec(), &[]).await;
        assert_ne!(answer.unwrap().status().code(), tonic::Code::Ok);
    }
    served(&releaser).await;
}
