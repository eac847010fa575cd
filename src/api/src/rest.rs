//! The REST API, which implements the Key Connector interface of Bitwarden clients. The API parses requests, calls the
//! broker, and converts answers and errors.
//!
//! `GET /user-keys` returns the key of the access token's user. `POST /user-keys` stores a key and
//! never replaces an existing key. `PUT /user-keys` stores a key and replaces an existing key. `GET
//! /alive` and `GET /now` return the time, and `GET /health` returns whether the broker can release
//! keys. `/alive`, `/now` and `/health` need no credential.
//!
//! Clients log their user out after an error, and treat every status except 200 as an error.
//! Therefore the API retries calls to the broker during short outages of the token, the store or
//! the audit log. The API returns 404 only if the user has no key. The user is the subject of the
//! credential; a request cannot select another user.
//!
//! Mitigation: M21 of `THREAT_MODEL.md`.

use std::{sync::Arc, time::Duration};

use axum::{Router, routing};
use tokio_util::task::TaskTracker;

use keybroker_broker::Broker;

mod answer;
pub(super) mod body;
mod origins;
mod places;
mod probes;
mod requests;
mod retry;
mod settings;
mod user_keys;

pub use places::RetryPlaces;
pub use settings::Settings;

/// The state that all calls of the REST API share.
#[derive(Clone, Debug)]
pub struct Context {
    /// The broker that handles every call.
    pub broker: Arc<Broker>,
    /// Longest time for a call.
    pub call_timeout_max: Duration,
    /// The calls in progress, including calls whose callers have disconnected.
    pub calls: TaskTracker,
    /// Limits the number of requests that wait for a retry.
    retries: RetryPlaces,
}

impl Context {
    /// Creates the context of the REST API. `retries` limits the number of requests that wait for
    /// their next attempt.
    pub fn new(
        broker: Arc<Broker>,
        call_timeout_max: Duration,
        calls: TaskTracker,
        retries: RetryPlaces,
    ) -> Self {
        Self {
            broker,
            call_timeout_max,
            calls,
            retries,
        }
    }
}

/// The routes of the REST API. The server must add a `Caller` to the extensions of each request.
pub fn routes(context: Context, settings: &Settings) -> Router {
    let mut router = Router::new();
    // Clients append a path that begins with a slash to the configured URL, which may end with a slash.
    for prefix in [
        settings.path_prefix.clone(),
        format!("{}/", settings.path_prefix),
    ] {
        router = router
            .route(
                &format!("{prefix}/user-keys"),
                routing::any(requests::user_keys),
            )
            .route(&format!("{prefix}/alive"), routing::any(probes::now))
            .route(&format!("{prefix}/now"), routing::any(probes::now))
            .route(&format!("{prefix}/health"), routing::any(probes::health));
    }
    let router = router.fallback(probes::nothing).with_state(context);
    match origins::layer(&settings.allowed_origins) {
        Some(layer) => router.layer(layer),
        None => router,
    }
}
