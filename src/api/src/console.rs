//! The page for approvers: they see the requests of new devices for access, approve or deny them, and end the trust of lost
//! devices. The page calls the same functions of the broker as the gRPC API, so policy, limits and audit are the same.
//!
//! Approvers sign in at the OpenID provider. The browser keeps only a random session id, in a cookie that other sites cannot
//! use. Each form has a token for its purpose, and a form is accepted only from this page's origin. The pages work without scripts:
//! the only script counts down the time until a request expires.
//!
//! Mitigation: M30 of `THREAT_MODEL.md`.

use std::{sync::Arc, time::Duration};

use axum::Router;
use tokio_util::task::TaskTracker;

use keybroker_broker::{Broker, limits::Limits};

mod answer;
mod cookies;
mod decide;
mod devices;
mod forms;
mod logins;
mod pages;
mod paths;
mod provider;
mod serve;
mod sessions;
mod sign_in;
mod views;
mod visit;

pub use provider::Provider;
pub use sessions::{Session, Sessions};

use logins::Logins;

/// The settings of the page.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The origin of the page: `https://host` or `https://host:port`, as a browser sends it.
    pub origin: String,
    /// Time without a request after which a session ends.
    pub idle: Duration,
    /// Time after which a session ends.
    pub lifetime: Duration,
    /// Time after a sign-in with credentials within which an approver can approve.
    pub reauthentication: Duration,
}

/// The state that all requests of the page share.
#[derive(Clone, Debug)]
pub struct Context {
    broker: Arc<Broker>,
    limits: Arc<Limits>,
    provider: Arc<dyn Provider>,
    sessions: Arc<Sessions>,
    logins: Arc<Logins>,
    settings: Arc<Settings>,
    call_timeout_max: Duration,
    /// The calls in progress, including calls whose callers have disconnected.
    calls: TaskTracker,
}

impl Context {
    /// Creates the context of the page. `sessions` must have the lifetimes of `settings`.
    pub fn new(
        broker: Arc<Broker>,
        limits: Arc<Limits>,
        provider: Arc<dyn Provider>,
        sessions: Arc<Sessions>,
        settings: Settings,
        call_timeout_max: Duration,
        calls: TaskTracker,
    ) -> Self {
        Self {
            broker,
            limits,
            provider,
            sessions,
            logins: Arc::default(),
            settings: Arc::new(settings),
            call_timeout_max,
            calls,
        }
    }
}

/// The routes of the page. The server must add a `Caller` and, if the request has a session, the [`Session`] to the extensions of
/// each request.
pub fn routes(context: Context) -> Router {
    Router::new().fallback(serve::serve).with_state(context)
}
