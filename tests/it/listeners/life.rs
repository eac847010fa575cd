//! Health, age, and the order of a stop.

use std::{
    fs,
    net::TcpStream,
    sync::Arc,
    time::{Duration, Instant},
};

use prost::Message as _;
use rustix::process::Signal;
use tokio::{io::AsyncWriteExt as _, task::JoinHandle};
use tonic::{Code, Status};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use keybroker_proto::UnwrapUserKeyResponse;

use super::{
    raw::{Raw, frame, handshake, tls_config},
    unauthenticated::half_a_request,
};
use crate::{
    client::{Caller, channel, eventually, retrying},
    process::{Broker, freeze, is_alive, send, until},
    site::{Options, Site},
    wire::get,
};

const MATERIAL: &[u8] = b"material of this user";
const SERVICES: [&str; 3] = [
    "keybroker.v1.UserKeyService",
    "keybroker.v1.ControlService",
    "",
];
/// A SETTINGS frame that sets nothing (RFC 9113 section 6.5).
const NO_SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
const SERVING: i32 = 1;
const NOT_SERVING: i32 = 2;

async fn with_ada(options: Options) -> Broker {
    let broker = Broker::start(options);
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("ada", MATERIAL).await.unwrap();
    broker
}

fn health(broker: &Broker) -> HealthClient<tonic::transport::Channel> {
    HealthClient::new(channel(&broker.site.pki, Some("unknown"), broker.grpc))
}

fn about(service: &str) -> HealthCheckRequest {
    HealthCheckRequest {
        service: service.to_owned(),
    }
}

async fn until_health(broker: &Broker, expected: [i32; 3]) {
    let mut last = Vec::new();
    for _ in 0..300 {
        last.clear();
        for service in SERVICES {
            let answer = health(broker).check(about(service)).await.unwrap();
            last.push(answer.into_inner().status);
        }
        if last == expected {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("health is {last:?}, not {expected:?}");
}

/// Health per service, for callers who are nobody: a load balancer has a certificate and no role.
#[tokio::test(flavor = "multi_thread")]
async fn health_follows_the_token() {
    let broker = with_ada(Options::default()).await;
    until_health(&broker, [SERVING, SERVING, SERVING]).await;
    let unknown = health(&broker).check(about("other")).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);

    let directory = broker.site.token.directory();
    let away = directory.with_extension("away");
    fs::rename(&directory, &away).unwrap();
    fs::create_dir(&directory).unwrap();
    for pid in broker.workers() {
        send(pid, Signal::KILL);
    }
    // The control plane can still say what is wrong.
    until_health(&broker, [NOT_SERVING, SERVING, NOT_SERVING]).await;
    let ready = get(broker.status, "/readyz");
    assert!(
        ready.starts_with("HTTP/1.1 503") && ready.contains("token"),
        "{ready}"
    );
    assert!(get(broker.status, "/livez").starts_with("HTTP/1.1 200"));

    fs::remove_dir_all(&directory).unwrap();
    fs::rename(&away, &directory).unwrap();
    until_health(&broker, [SERVING, SERVING, SERVING]).await;
    assert!(get(broker.status, "/readyz").starts_with("HTTP/1.1 200"));
}

/// A connection that grows old is asked to leave, and no call is lost over it.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_connection_is_replaced_without_losing_a_call() {
    let broker = with_ada(Options {
        limits: "connection_age_max_ms = 1000".to_owned(),
        ..Options::default()
    })
    .await;
    let releaser = Caller::of(&broker, "releaser");
    let started = Instant::now();
    while started.elapsed() < Duration::from_millis(3_500) {
        let key = retrying(|| releaser.unwrap("ada")).await.unwrap();
        assert_eq!(key.key_material, MATERIAL);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let audit = broker.site.audit();
    let mut peers: Vec<_> = audit
        .lines()
        .filter(|line| line.contains("user_key.unwrap"))
        .map(|line| line.split_once(r#""peer":""#).unwrap().1.split('"').next())
        .collect();
    peers.dedup();
    assert!(peers.len() >= 3, "{peers:?}");
}

/// A stop waits for calls, and for nothing else: not for watchers of health, half-sent probes, half-made connections.
#[tokio::test(flavor = "multi_thread")]
async fn idlers_do_not_hold_up_a_stop() {
    let broker = with_ada(Options::default()).await;
    let mut watch = health(&broker).watch(about("")).await.unwrap().into_inner();
    let first = watch.message().await.unwrap().unwrap();
    assert_eq!(first.status, SERVING);
    let config = tls_config(&broker.site.pki, Some("releaser"), rustls::ALL_VERSIONS);
    // One that speaks HTTP/2 and then never again: it does not answer GOAWAY.
    let mut deaf = handshake(broker.grpc, Arc::clone(&config)).await.unwrap();
    deaf.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        .await
        .unwrap();
    deaf.write_all(&NO_SETTINGS).await.unwrap();
    let idlers = (
        deaf,
        half_a_request(broker.status),
        TcpStream::connect(broker.status).unwrap(),
        TcpStream::connect(broker.grpc).unwrap(),
        handshake(broker.grpc, config).await.unwrap(),
        Raw::connect(&broker.site.pki, Some("releaser"), broker.grpc).await,
    );
    tokio::time::sleep(Duration::from_millis(200)).await;
    let started = Instant::now();
    let stop = tokio::task::spawn_blocking(|| broker.stop());
    // The watcher is told before it is sent away.
    let told = watch.message().await.unwrap().unwrap();
    assert_eq!(told.status, NOT_SERVING);
    let end = watch.message().await.unwrap_err();
    assert_eq!(end.code(), Code::Unavailable, "{end:?}");
    let (site, status) = stop.await.unwrap();
    assert!(status.success(), "{status}");
    let took = started.elapsed();
    assert!(took < Duration::from_secs(5), "{took:?}\n{}", site.log());
    drop(idlers);
}

/// A broker after SIGTERM whose workers are stopped, so that a call does not end.
async fn stopping_with_a_call_in_progress() -> (
    Broker,
    Vec<u32>,
    JoinHandle<Result<UnwrapUserKeyResponse, Status>>,
) {
    let broker = with_ada(Options::default()).await;
    let workers = broker.workers();
    let releaser = Caller::of(&broker, "releaser");
    assert!(releaser.unwrap("unknown").await.is_err());
    for pid in &workers {
        freeze(*pid);
    }
    let call = tokio::spawn(async move { releaser.unwrap("ada").await });
    until("the call to arrive", || {
        get(broker.status, "/metrics")
            .contains("keybroker_calls_in_progress 1")
            .then_some(())
    });
    broker.signal(Signal::TERM);
    (broker, workers, call)
}

/// While a call is under way after SIGTERM: alive, not ready, no more connections, and the call is answered.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_waits_for_the_call_under_way() {
    let (broker, workers, call) = stopping_with_a_call_in_progress().await;
    until("readiness to end", || {
        get(broker.status, "/readyz")
            .starts_with("HTTP/1.1 503")
            .then_some(())
    });
    until("the port to close", || {
        TcpStream::connect(broker.grpc).err()
    });
    assert!(get(broker.status, "/livez").starts_with("HTTP/1.1 200"));
    assert!(get(broker.status, "/readyz").contains("stopping"));
    for pid in &workers {
        send(*pid, Signal::CONT);
    }
    assert_eq!(call.await.unwrap().unwrap().key_material, MATERIAL);
    let mut broker = broker;
    let status = tokio::task::spawn_blocking(move || broker.wait()).await;
    assert!(status.unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_stops_at_once() {
    let (broker, workers, call) = stopping_with_a_call_in_progress().await;
    until("the drain to begin", || {
        broker.site.log().contains("stopping").then_some(())
    });
    let started = Instant::now();
    broker.signal(Signal::INT);
    let mut broker = broker;
    let status = broker.wait();
    assert!(
        started.elapsed() < Duration::from_secs(2),
        "{:?}",
        started.elapsed()
    );
    assert_eq!(status.code(), Some(130), "{status}");
    assert!(call.await.unwrap().is_err());
    // Stopped or not, they end with the process that made them.
    for pid in workers {
        until("the worker to end", || (!is_alive(pid)).then_some(()));
    }
    // Nothing is left that would stop the next one.
    let again = Broker::start_on(Arc::clone(&broker.site));
    let releaser = Caller::of(&again, "releaser");
    let key = eventually(|| releaser.unwrap("ada")).await;
    assert_eq!(key.key_material, MATERIAL);
}

/// A reload that comes too early is no reason to end.
#[test]
fn sighup_during_start_is_harmless() {
    let site = Arc::new(Site::fresh(Options::default()));
    let broker = Broker::start_as(Arc::clone(&site), |site| {
        // The shell sends it to the process that it becomes, as soon as that has its handlers.
        site.serve_through(
            "(while ! grep -q '^SigCgt:.*[13579bdf]$' /proc/$$/status; do :; done; \
             for n in 1 2 3 4 5 6 7 8 9; do kill -HUP $$ || exit; sleep 0.02; done) & exec \"$0\" \"$@\"",
        )
    });
    let (_, status) = broker.stop();
    assert!(status.success(), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn reflection_answers_only_when_it_is_configured() {
    const PATH: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
    const OLD_PATH: &str = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo";
    let broker = Broker::start(Options {
        limits: "reflection = true".to_owned(),
        ..Options::default()
    });
    let admin = Raw::connect(&broker.site.pki, Some("admin"), broker.grpc).await;
    let request = tonic_reflection::pb::v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(
            tonic_reflection::pb::v1::server_reflection_request::MessageRequest::ListServices(
                String::new(),
            ),
        ),
    };
    for path in [PATH, OLD_PATH] {
        let answer = admin
            .post(path, frame(&request.encode_to_vec()), &[])
            .await
            .unwrap();
        assert_eq!(answer.status().code(), Code::Ok);
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        for service in [
            "keybroker.v1.UserKeyService",
            "keybroker.v1.ControlService",
            "grpc.health.v1.Health",
        ] {
            assert!(text.contains(service), "{text}");
        }
    }
    // Without configuration it is not there: see `a_method_of_an_api_that_the_listener_does_not_serve_is_unimplemented`.
}

/// A tool that asks which services there are is told those of this listener, and can read the details of errors.
#[tokio::test(flavor = "multi_thread")]
async fn reflection_lists_the_services_of_its_listener() {
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_request::MessageRequest,
    };
    const PATH: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
    let site = Site::fresh(Options {
        limits: "reflection = true".to_owned(),
        ..Options::default()
    });
    site.write_configuration(|text| {
        *text = text.replace("apis = [\"grpc\", \"admin\"]", "apis = [\"grpc\"]");
    });
    let broker = Broker::start_on(Arc::new(site));
    let admin = Raw::connect(&broker.site.pki, Some("admin"), broker.grpc).await;
    let ask = async |request: MessageRequest| {
        let request = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(request),
        };
        let answer = admin.post(PATH, frame(&request.encode_to_vec()), &[]);
        String::from_utf8_lossy(&answer.await.unwrap().body).into_owned()
    };
    let listed = ask(MessageRequest::ListServices(String::new())).await;
    assert!(listed.contains("keybroker.v1.UserKeyService"), "{listed}");
    assert!(!listed.contains("ControlService"), "{listed}");
    let details = MessageRequest::FileContainingSymbol("google.rpc.ErrorInfo".to_owned());
    let details = ask(details).await;
    assert!(details.contains("error_details.proto"), "{details}");
}
