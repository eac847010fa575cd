//! The page for approvers as an API of a listener: the provider at which they sign in, and the sessions that identify them.
//!
//! A session replaces the client certificate of a connection, and an `authorization` header has no effect: a browser would send both
//! without the intention of its user.
//!
//! Mitigation: M30 of `THREAT_MODEL.md`.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use axum::{
    Router,
    body::Body,
    extract::Request,
    http::{Response, header::AUTHORIZATION},
    middleware::{self, Next},
};
use tokio_util::task::TaskTracker;

use crate::{
    cli::exit::{Exit, Failure},
    config::Config,
};
use keybroker_api::console::{self, Provider, Session, Sessions};
use keybroker_auth::{sign_in, token::Tokens};
use keybroker_broker::{Broker, limits::Limits};
use keybroker_core::{
    call::caller::Caller,
    error::{Error, Reason, chain},
    principal::Principal,
    sign_in::{Answer, Begun},
};

use super::unauthenticated::Authentication;

/// The provider of the configuration.
#[derive(Debug)]
struct Configured(sign_in::Provider);

#[async_trait]
impl Provider for Configured {
    async fn begin(&self, max_age: Option<Duration>) -> Result<Begun, Error> {
        self.0.begin(max_age).await
    }

    async fn finish(&self, answer: Answer) -> Result<Arc<Principal>, Error> {
        self.0.finish(&answer).await
    }
}

/// Creates the client of the provider, if the configuration has the page. Reads the file with the client secret, so that a mistake
/// prevents the start.
pub(super) fn provider(
    config: &Config,
    tokens: &Tokens,
) -> Result<Option<Arc<dyn Provider>>, Failure> {
    let Some(settings) = &config.console else {
        return Ok(None);
    };
    match sign_in::Provider::new(tokens, settings.registration()) {
        Ok(provider) => Ok(Some(Arc::new(Configured(provider)))),
        Err(error) => Err(Failure::new(
            Exit::Configuration,
            format!("[console]: {}", chain(&error)),
        )),
    }
}

/// The page, which all listeners with the API `console` share.
#[derive(Clone, Debug)]
pub(super) struct Console {
    context: console::Context,
    identifier: SessionIdentifier,
}

/// Finds the session of a request.
#[derive(Clone, Debug)]
struct SessionIdentifier {
    sessions: Arc<Sessions>,
    limits: Arc<Limits>,
}

impl Console {
    /// Creates the page; `None` if the configuration does not have it.
    pub(super) fn new(
        config: &Config,
        provider: Option<Arc<dyn Provider>>,
        broker: &Arc<Broker>,
        limits: &Arc<Limits>,
        calls: &TaskTracker,
    ) -> Option<Self> {
        let (provider, settings) = (provider?, config.console.as_ref()?.page());
        let sessions = Arc::new(Sessions::new(settings.idle, settings.lifetime));
        let context = console::Context::new(
            Arc::clone(broker),
            Arc::clone(limits),
            provider,
            Arc::clone(&sessions),
            settings,
            Duration::from_millis(config.limits.call_timeout_max_ms),
            calls.clone(),
        );
        let limits = Arc::clone(limits);
        Some(Self {
            context,
            identifier: SessionIdentifier { sessions, limits },
        })
    }

    /// The routes of a listener.
    pub(super) fn routes(&self) -> Router {
        let identifier = self.identifier.clone();
        let layer = middleware::from_fn(move |request, next| {
            let identifier = identifier.clone();
            async move { identifier.run(request, next).await }
        });
        console::routes(self.context.clone()).layer(layer)
    }
}

impl SessionIdentifier {
    async fn run(self, mut request: Request, next: Next) -> Response<Body> {
        request.headers_mut().remove(AUTHORIZATION);
        let extensions = request.extensions();
        let caller = extensions.get::<Caller>().cloned();
        let authentication = extensions.get::<Arc<Authentication>>().cloned();
        if let (Some(caller), Some(authentication)) = (caller, authentication) {
            let session = self.sessions.find(request.headers());
            let session = session.filter(|_| authentication.accepts_credentials());
            let admitted = self.admit(session.as_ref());
            if let Ok(principal) = &admitted {
                authentication.complete(principal);
            }
            let extensions = request.extensions_mut();
            extensions.insert(caller.with_principal(admitted));
            if let Some(session) = session {
                extensions.insert(session);
            }
        }
        next.run(request).await
    }

    /// Returns the principal of a session, if the principal has not reached its rate limit.
    fn admit(&self, session: Option<&Session>) -> Result<Arc<Principal>, Error> {
        let Some(session) = session else {
            return Err(Error::new(Reason::Credential, "the request has no session"));
        };
        let principal = session.principal();
        self.limits.take_calls(principal, 1)?;
        Ok(Arc::clone(principal))
    }
}
