//! The status listeners: HTTP for probes and metrics (`/livez`, `/readyz`, `/metrics`). The local
//! listener uses plain HTTP on a loopback address. The optional `[status.remote]` listener uses TLS
//! unless the configuration sets `plaintext`. When the broker stops, the status listeners close
//! last, so that probes can distinguish a drain from a crash.
//!
//! Mitigation: M3 of `THREAT_MODEL.md`.

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    time,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use keybroker_broker::Broker;
use keybroker_core::metrics;

use super::{
    file_problems::FileProblems, handshake::Refused, tls::Tls, unauthenticated, waiting::Waiting,
};

/// Maximum number of open connections. At the maximum, a new connection replaces an older
/// connection, so that a local user with many connections cannot block probes.
const CONNECTIONS_MAX: usize = 64;
/// Maximum time to receive the head of a request.
const HEADER_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum time for a request and its answer together.
const AGE_MAX: Duration = Duration::from_secs(10);
/// Size of the read buffer in bytes. The HTTP library does not permit a smaller buffer.
const BUFFER_BYTES_MAX: usize = 8 * 1_024;
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Content type of the Prometheus text format.
const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The state that the probes report.
#[derive(Clone, Debug)]
pub(super) struct Probe {
    pub(super) broker: Arc<Broker>,
    pub(super) files: Arc<FileProblems>,
    pub(super) metrics: PrometheusHandle,
    /// The signal that the broker is stopping.
    pub(super) stopping: CancellationToken,
}

/// Returns the routes. The probe `/livez` does not check the token, the store or the audit log,
/// because a restart would not repair them.
pub(super) fn routes(probe: Probe) -> Router {
    Router::new()
        .route("/livez", get(async || "alive\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(show_metrics))
        .with_state(probe)
}

async fn show_metrics(State(probe): State<Probe>) -> impl IntoResponse {
    metrics_process::Collector::default().collect();
    (
        [(header::CONTENT_TYPE, METRICS_TYPE)],
        probe.metrics.render(),
    )
}

async fn ready(State(probe): State<Probe>) -> (StatusCode, String) {
    let health = probe.files.health(&probe.broker);
    let problem = if probe.stopping.is_cancelled() {
        "stopping".to_owned()
    } else if health.user_keys {
        let text = if health.detail.is_empty() {
            "ready\n".to_owned()
        } else {
            format!("ready, but {}\n", health.detail)
        };
        return (StatusCode::OK, text);
    } else {
        health.detail
    };
    let text = format!("not ready: {problem}\n");
    (StatusCode::SERVICE_UNAVAILABLE, text)
}

/// Serves a status listener until `stop`, then closes its connections.
pub(super) async fn serve(
    socket: TcpListener,
    tls: Option<Arc<Tls>>,
    routes: Router,
    stop: CancellationToken,
) {
    let waiting = Waiting::new(CONNECTIONS_MAX);
    let connections = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = socket.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::debug!(%error, "cannot accept a connection on the status listener");
                time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // On a loopback address, the connections of each network are not limited, because all
        // clients have the same address.
        let network = tls
            .is_some()
            .then(|| unauthenticated::network(peer.ip(), &[]));
        let ticket = waiting.enter(network.flatten());
        if ticket.made_room() {
            metrics::CONNECTIONS_REFUSED.with(["status"]).increment(1);
        }
        let answering = answer_over(stream, tls.clone(), routes.clone());
        let stop = stop.clone();
        connections.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = ticket.closed() => {}
                () = answering => {}
            }
        });
    }
}

async fn answer_over(stream: TcpStream, tls: Option<Arc<Tls>>, routes: Router) {
    let Some(tls) = tls else {
        return answer(stream, routes).await;
    };
    let acceptor = TlsAcceptor::from(Arc::clone(&tls.current().config));
    let refused = match time::timeout(HEADER_TIMEOUT, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => return answer(stream, routes).await,
        Ok(Err(error)) => Refused::Tls(error),
        Err(_) => Refused::Timeout,
    };
    metrics::HANDSHAKES_FAILED
        .with([refused.cause()])
        .increment(1);
    tracing::debug!(error = %refused, "status connection refused");
}

/// Answers one request and closes the connection.
pub(super) async fn answer(stream: impl AsyncRead + AsyncWrite + Unpin, routes: Router) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(BUFFER_BYTES_MAX)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes));
    if let Ok(Err(error)) = time::timeout(AGE_MAX, connection).await {
        tracing::debug!(%error, "status connection ended");
    }
}
