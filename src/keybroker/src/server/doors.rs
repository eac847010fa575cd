//! What answers on a listener: gRPC, REST, or both side by side.

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::Request,
    http::{Response, header},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic_health::server::HealthReporter;
use tower::ServiceExt as _;

use crate::{
    cli::exit::{Exit, Failure},
    config::Config,
};
use keybroker_api::{rest, rpc};
use keybroker_broker::Broker;

use super::{Door, ListenerSettings};

/// What the APIs of all listeners share.
pub(super) struct Doors<'a> {
    pub(super) config: &'a Config,
    pub(super) broker: &'a Arc<Broker>,
    pub(super) health: &'a HealthReporter,
    pub(super) calls: &'a TaskTracker,
    pub(super) stop: &'a CancellationToken,
    pub(super) memory: &'a rpc::Memory,
}

impl Doors<'_> {
    /// The routes of a listener.
    pub(super) fn routes(&self, listener: &ListenerSettings) -> Result<Router, Failure> {
        let has = |door| listener.doors.contains(&door);
        let speaks_grpc = has(Door::Grpc) || has(Door::Admin);
        match (has(Door::Rest), speaks_grpc) {
            (false, _) => self.grpc(listener),
            (true, false) => Ok(self.rest()),
            (true, true) => Ok(side_by_side(self.rest(), self.grpc(listener)?)),
        }
    }

    fn grpc(&self, listener: &ListenerSettings) -> Result<Router, Failure> {
        let services = rpc::Services {
            user_keys: listener.doors.contains(&Door::Grpc),
            control: listener.doors.contains(&Door::Admin),
            reflection: self.config.limits.reflection,
        };
        let health = tonic_health::pb::health_server::HealthServer::new(
            tonic_health::server::HealthService::from_health_reporter(self.health.clone()),
        )
        .max_decoding_message_size(rpc::HEALTH_BYTES_MAX);
        let around = rpc::Surroundings {
            broker: Arc::clone(self.broker),
            call_timeout_max: self.call_timeout_max(),
            calls: self.calls.clone(),
            stop: self.stop.clone(),
            memory: self.memory.clone(),
        };
        rpc::routes(around, services, health).map_err(|what| Failure::new(Exit::Internal, what))
    }

    fn rest(&self) -> Router {
        let around = rest::Surroundings {
            broker: Arc::clone(self.broker),
            call_timeout_max: self.call_timeout_max(),
            calls: self.calls.clone(),
        };
        rest::routes(around, &self.config.rest)
    }

    fn call_timeout_max(&self) -> Duration {
        Duration::from_millis(self.config.limits.call_timeout_max_ms)
    }
}

/// gRPC says what it is, and everything else is REST's.
fn side_by_side(rest: Router, grpc: Router) -> Router {
    let choose = move |request: Request| {
        let router = if is_grpc(&request) { &grpc } else { &rest };
        let router = router.clone();
        async move {
            let response: Result<Response<Body>, _> = router.oneshot(request).await;
            response
        }
    };
    Router::new().fallback_service(tower::service_fn(choose))
}

fn is_grpc(request: &Request) -> bool {
    let content_type = request.headers().get(header::CONTENT_TYPE);
    content_type.is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"))
}
