//! Handles requests to `/user-keys`: assigns the call id, identifies the caller, sets the deadline and returns the answer.
//!
//! Mitigations: M3, M21 of `THREAT_MODEL.md`.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Request, State},
    http::{HeaderValue, Method, Response, StatusCode, header},
};
use tracing::Instrument as _;

use keybroker_broker::UserKeyRef;
use keybroker_core::{
    call::{Call, CallId, Deadline, caller::Caller, in_progress::CallInProgress},
    error::{Error, Reason},
    key::KeyName,
    metrics,
    principal::{Action, Principal},
};

use crate::request::{self, Unanswered};

use super::{Context, answer, body, probes, retry::Retry, user_keys::UserRequest};

/// The key name under which the broker stores a user's Bitwarden key.
const KEY_NAME: &str = "bitwarden";

/// Handles a request to `/user-keys`.
pub(super) async fn user_keys(State(context): State<Context>, request: Request) -> Response<Body> {
    let Some(action) = action(request.method()) else {
        return probes::no_method("GET, POST, PUT");
    };
    let method = request.method().as_str().to_owned();
    let response = context.run(request, action).await;
    let status = response.status().as_str().to_owned();
    metrics::REST_CALLS.with([method, status]).increment(1);
    response
}

/// The action of an HTTP method; `None` for an unsupported method.
fn action(method: &Method) -> Option<Action> {
    match *method {
        Method::GET => Some(Action::Unwrap),
        Method::POST => Some(Action::Create),
        Method::PUT => Some(Action::Replace),
        _ => None,
    }
}

impl Context {
    async fn run(self, mut request: Request, action: Action) -> Response<Body> {
        let id = CallId::fresh();
        let Some(caller) = request.extensions_mut().remove::<Caller>() else {
            let error = Error::new(Reason::Bug, "the request has no connection data");
            return answer::refusal(&error, id);
        };
        let principal = match caller.principal() {
            Ok(principal) => Arc::clone(principal),
            Err(error) => {
                let peer = caller.peer();
                self.broker
                    .refuse_unauthenticated(peer, peer.ip(), error, id);
                return answer::refusal(error, id);
            }
        };
        let call = Call {
            id,
            peer: caller.peer().to_string(),
            deadline: Deadline::after(self.call_timeout_max),
        };
        let span = request::span(id, Some(action), Some(&principal));
        self.run_known(request, caller, principal, call, action)
            .instrument(span)
            .await
    }

    async fn run_known(
        self,
        request: Request,
        caller: Caller,
        principal: Arc<Principal>,
        call: Call,
        action: Action,
    ) -> Response<Body> {
        let serving = self
            .clone()
            .serve(request, Arc::clone(&principal), call.clone(), action);
        match request::run(
            caller.calls(),
            call.deadline,
            &self.calls,
            Box::pin(serving),
        )
        .await
        {
            Ok(response) => response,
            Err(Unanswered::NotBegun(error)) => {
                let error = self.broker.unserved(&principal, &call, action, error).await;
                answer::refusal(&error, call.id)
            }
            Err(Unanswered::Ended(error)) => answer::refusal(&error, call.id),
        }
    }

    async fn serve(
        self,
        request: Request,
        principal: Arc<Principal>,
        call: Call,
        action: Action,
    ) -> Response<Body> {
        let _in_progress = CallInProgress::new();
        let id = call.id;
        let key = match own_key(&principal) {
            Ok(key) => key,
            Err(error) => {
                let error = self.broker.unserved(&principal, &call, action, error).await;
                return answer::refusal(&error, id);
            }
        };
        let entered = UserRequest {
            broker: self.broker,
            principal,
            call,
            key,
        };
        let mut retry = Retry::new(entered.call.clone(), self.retries, entered.principal.name());
        let answered = if action == Action::Unwrap {
            entered.get(&mut retry).await
        } else {
            let (head, body) = request.into_parts();
            match body::key(&head.headers, body).await {
                Ok(key) if action == Action::Create => entered.post(&mut retry, &key).await,
                Ok(key) => Box::pin(entered.put(&mut retry, &key)).await,
                Err(malformed) => return entered.malformed(action, malformed).await,
            }
        };
        answered.unwrap_or_else(|error| answer::refusal(&error, retry.last()))
    }
}

impl UserRequest {
    /// Refuses a request whose body is malformed, and writes an audit entry. If the status is not 400, the connection
    /// is closed, because more of the body may follow.
    async fn malformed(&self, action: Action, malformed: body::Malformed) -> Response<Body> {
        let (principal, call) = (&self.principal, &self.call);
        let error = malformed.error();
        let error = self.broker.unserved(principal, call, action, error).await;
        if error.reason() == Reason::AuditDown {
            return answer::refusal(&error, call.id);
        }
        let mut response = answer::refusal_as(malformed.status(), &error, call.id);
        if response.status() != StatusCode::BAD_REQUEST {
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(header::CONNECTION, close);
        }
        response
    }
}

/// Returns the only user key that a caller can access through the REST API. A service has no key in the REST API and must use
/// the gRPC API.
fn own_key(principal: &Principal) -> Result<UserKeyRef, Error> {
    let Some(user) = principal.subject() else {
        let detail = format!("{principal} is a service, and only users have keys in the REST API");
        return Err(Error::new(Reason::Policy, detail));
    };
    Ok(UserKeyRef {
        user: user.clone(),
        name: KeyName::parse(KEY_NAME)?,
    })
}
