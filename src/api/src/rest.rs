//! The REST API: what Bitwarden clients ask of a Key Connector. Requests into vocabulary, calls of the broker,
//! answers and errors back.
//!
//! | Request | Answer |
//! |---|---|
//! | `GET /user-keys` | the key of the token's user |
//! | `POST /user-keys` | 200 when it was stored; never over a key that is there |
//! | `PUT /user-keys` | 200 when it was stored, over another one if there is one |
//! | `GET /alive`, `/now`, `/health` | the time, and whether keys can be released; needs no credential |
//!
//! Clients log their user out on any error, and treat every status except 200 as one: short outages of token, store
//! and audit log are waited out here, and 404 is said only of a user who has no key. The user is the subject of the
//! credential; nothing in a request can name another one.
//!
//! Mitigation: M21 of `THREAT_MODEL.md`.

use std::{sync::Arc, time::Duration};

use axum::{Router, routing};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

use keybroker_broker::Broker;

mod answer;
pub(super) mod body;
mod origins;
mod probes;
mod requests;
mod retry;
mod settings;
mod user_keys;

pub use settings::Settings;

/// What calls need besides their content.
#[derive(Clone, Debug)]
pub struct Context {
    /// Where every call ends.
    pub broker: Arc<Broker>,
    /// Longest time for a call.
    pub call_timeout_max: Duration,
    /// Calls under way, also those whose callers have gone.
    pub calls: TaskTracker,
    /// Places for requests that wait for their next try.
    retries: Arc<Semaphore>,
}

impl Context {
    /// What the routes of the REST API need.
    pub fn new(broker: Arc<Broker>, call_timeout_max: Duration, calls: TaskTracker) -> Self {
        Self {
            broker,
            call_timeout_max,
            calls,
            retries: Arc::new(Semaphore::new(retry::RETRIES_MAX)),
        }
    }
}

/// The routes of the REST API. The server must have put a `Caller` among the extensions of each request.
pub fn routes(context: Context, settings: &Settings) -> Router {
    let mut router = Router::new();
    // Clients join the URL that an administrator typed with a path that begins with a slash.
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
