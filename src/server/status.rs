//! Plain HTTP on loopback for probes and metrics: `/livez`, `/readyz`, `/metrics`.

use std::sync::Arc;

use axum::{Router, extract::State, http::StatusCode, routing::get};
use metrics_exporter_prometheus::PrometheusHandle;

use crate::broker::Broker;

#[derive(Clone)]
struct Probe {
    broker: Arc<Broker>,
    metrics: PrometheusHandle,
}

/// The routes. `/livez` asks nothing of token, store or audit log: a restart cures none of them.
pub(super) fn routes(broker: Arc<Broker>, metrics: PrometheusHandle) -> Router {
    Router::new()
        .route("/livez", get(async || "alive\n"))
        .route("/readyz", get(ready))
        .route(
            "/metrics",
            get(async |State(probe): State<Probe>| probe.metrics.render()),
        )
        .with_state(Probe { broker, metrics })
}

async fn ready(State(probe): State<Probe>) -> (StatusCode, String) {
    let health = probe.broker.health();
    if health.user_keys {
        (StatusCode::OK, "ready\n".to_owned())
    } else {
        let text = format!("not ready: {}\n", health.detail);
        (StatusCode::SERVICE_UNAVAILABLE, text)
    }
}
