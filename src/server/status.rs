//! Plain HTTP on loopback for probes and metrics: `/livez`, `/readyz`, `/metrics`. It is the last to close when the
//! broker stops, so that probes can tell a drain from a crash.

use std::{convert::Infallible, sync::Arc, time::Duration};

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
use tokio::{net::TcpListener, sync::Semaphore, time};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::broker::Broker;

/// Probes come from this machine: a few at a time.
const CONNECTIONS_MAX: usize = 64;
/// For a request's head; a connection without a request ends with it.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection is for a few probes, not for ever.
const AGE_MAX: Duration = Duration::from_mins(1);
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// The format that Prometheus reads.
const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What probes are told.
#[derive(Clone, Debug)]
pub(super) struct Probe {
    pub(super) broker: Arc<Broker>,
    pub(super) metrics: PrometheusHandle,
    /// Cancelled when the broker begins to stop.
    pub(super) stopping: CancellationToken,
}

/// The routes. `/livez` asks nothing of token, store or audit log: a restart cures none of them.
fn routes(probe: Probe) -> Router {
    Router::new()
        .route("/livez", get(async || "alive\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .with_state(probe)
}

async fn metrics(State(probe): State<Probe>) -> impl IntoResponse {
    (
        [(header::CONTENT_TYPE, METRICS_TYPE)],
        probe.metrics.render(),
    )
}

async fn ready(State(probe): State<Probe>) -> (StatusCode, String) {
    let health = probe.broker.health();
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

/// Answers until `stop`, and then waits for nobody.
pub(super) async fn serve(socket: TcpListener, probe: Probe, stop: CancellationToken) {
    let service = TowerToHyperService::new(routes(probe));
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let connections = TaskTracker::new();
    loop {
        let place = Arc::clone(&places).acquire_owned();
        let (place, accepted) = tokio::select! {
            () = stop.cancelled() => return,
            both = async { (place.await, socket.accept().await) } => both,
        };
        let (stream, _) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::debug!(%error, "accept failed on the status listener");
                time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let service = service.clone();
        let stop = stop.clone();
        connections.spawn(async move {
            let _place = place;
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                () = stop.cancelled() => {}
                ended = time::timeout(AGE_MAX, connection) => {
                    if let Ok(Err(error)) = ended {
                        tracing::debug!(%error, "status connection ended");
                    }
                }
            }
            Ok::<(), Infallible>(())
        });
    }
}
