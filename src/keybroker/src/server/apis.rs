//! The APIs of a listener: gRPC, REST, or both, or the page for approvers.

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
use keybroker_core::error::chain;

use super::{Api, ListenerSettings, console::Console, identify::Identifier};

/// The objects that the APIs of all listeners share: the broker, the limits and the stop signal.
pub(super) struct Apis<'a> {
    pub(super) config: &'a Config,
    pub(super) broker: &'a Arc<Broker>,
    pub(super) health: &'a HealthReporter,
    pub(super) calls: &'a TaskTracker,
    pub(super) stop: &'a CancellationToken,
    pub(super) memory: &'a rpc::Memory,
    /// Limit on the number of REST requests that wait for a retry, for all listeners together.
    pub(super) rest_retries: &'a rest::RetryPlaces,
    pub(super) identifier: &'a Identifier,
    /// The page for approvers, if it is configured.
    pub(super) console: Option<Console>,
}

impl Apis<'_> {
    /// The routes of a listener, with the authentication of its callers.
    pub(super) fn routes(&self, listener: &ListenerSettings) -> Result<Router, Failure> {
        let has = |api| listener.apis.contains(&api);
        if has(Api::Console) {
            let absent = || {
                let what = "a listener has the API `console`, but there is no section [console]";
                Failure::new(Exit::Configuration, what)
            };
            return Ok(self.console.as_ref().ok_or_else(absent)?.routes());
        }
        let speaks_grpc = has(Api::Grpc) || has(Api::Admin);
        let routes = match (has(Api::Rest), speaks_grpc) {
            (false, _) => self.grpc(listener)?,
            (true, false) => self.rest(),
            (true, true) => side_by_side(self.rest(), self.grpc(listener)?),
        };
        Ok(self.identifier.clone().wrap(routes))
    }

    fn grpc(&self, listener: &ListenerSettings) -> Result<Router, Failure> {
        let services = rpc::Services {
            user_keys: listener.apis.contains(&Api::Grpc),
            control: listener.apis.contains(&Api::Admin),
            reflection: self.config.limits.reflection,
        };
        let health = tonic_health::pb::health_server::HealthServer::new(
            tonic_health::server::HealthService::from_health_reporter(self.health.clone()),
        )
        .max_decoding_message_size(rpc::HEALTH_BYTES_MAX);
        let context = rpc::Context {
            broker: Arc::clone(self.broker),
            call_timeout_max: self.call_timeout_max(),
            calls: self.calls.clone(),
            stop: self.stop.clone(),
            memory: self.memory.clone(),
        };
        rpc::routes(context, services, health)
            .map_err(|error| Failure::new(Exit::Internal, chain(&error)))
    }

    fn rest(&self) -> Router {
        let context = rest::Context::new(
            Arc::clone(self.broker),
            self.call_timeout_max(),
            self.calls.clone(),
            self.rest_retries.clone(),
        );
        rest::routes(context, &self.config.rest)
    }

    fn call_timeout_max(&self) -> Duration {
        Duration::from_millis(self.config.limits.call_timeout_max_ms)
    }
}

/// Routes requests with a gRPC content type to the gRPC API, and all other requests to the REST
/// API.
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
