//! What happens around every call of `/user-keys`: its id, who calls, its deadline, its panics.
//!
//! A call runs in a task of its own: one whose caller hangs up, or whose deadline passes, still reaches its audit entry.
//!
//! Mitigations: M3, M21 of `THREAT_MODEL.md`.

use std::{sync::Arc, time::Instant};

use axum::{
    body::Body,
    extract::{Request, State},
    http::{HeaderValue, Method, Response, StatusCode, header},
};
use http_body_util::BodyExt as _;

use keybroker_broker::UserKeyRef;
use keybroker_core::{
    call::{Call, CallId, Deadline, caller::Caller, under_way::UnderWay},
    error::{Error, Reason},
    key::KeyName,
    principal::{Action, Principal},
};

use super::{Surroundings, answer, body, patience::Patience, probes, user_keys::Entered};

/// Which of a user's keys is that of Bitwarden.
const KEY_NAME: &str = "bitwarden";

/// `/user-keys`.
pub(super) async fn user_keys(
    State(around): State<Surroundings>,
    request: Request,
) -> Response<Body> {
    let Some(action) = action(request.method()) else {
        return probes::no_method("GET, POST, PUT");
    };
    let method = request.method().as_str().to_owned();
    let response = around.run(request, action).await;
    let status = response.status().as_str().to_owned();
    metrics::counter!("keybroker_rest_calls_total", "method" => method, "status" => status)
        .increment(1);
    response
}

/// What a method asks of the broker.
fn action(method: &Method) -> Option<Action> {
    match *method {
        Method::GET => Some(Action::Unwrap),
        Method::POST => Some(Action::Create),
        Method::PUT => Some(Action::Replace),
        _ => None,
    }
}

impl Surroundings {
    async fn run(self, mut request: Request, action: Action) -> Response<Body> {
        let id = CallId::fresh();
        let Some(caller) = request.extensions_mut().remove::<Caller>() else {
            let error = Error::new(Reason::Bug, "a call without a connection");
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
        let deadline = call.deadline.instant();
        let place = Arc::clone(caller.calls()).acquire_owned();
        let place = tokio::time::timeout_at(deadline.into(), place).await;
        let Some(place) = place.ok().filter(|_| Instant::now() < deadline) else {
            let error = Error::new(Reason::Deadline, "no time left for a call that just begins");
            let error = self.broker.unserved(&principal, &call, action, error).await;
            return answer::refusal(&error, id);
        };
        let serving = self.clone().serve(request, principal, call, action);
        let handle = self.calls.spawn(async move {
            let response = serving.await;
            // Until the answer is on its way, or a connection that ends could take it for silence.
            response.map(|body| held(body, place))
        });
        match tokio::time::timeout_at(deadline.into(), handle).await {
            Ok(Ok(response)) => response,
            Ok(Err(_)) => {
                tracing::error!(alarm = "bug", call_id = %id, "a handler panicked");
                answer::refusal(&Error::new(Reason::Bug, "a handler panicked"), id)
            }
            Err(_) => answer::refusal(&Error::new(Reason::Deadline, "deadline passed"), id),
        }
    }

    async fn serve(
        self,
        request: Request,
        principal: Arc<Principal>,
        call: Call,
        action: Action,
    ) -> Response<Body> {
        let _under_way = UnderWay::new();
        let id = call.id;
        let key = match own_key(&principal) {
            Ok(key) => key,
            Err(error) => {
                let error = self.broker.unserved(&principal, &call, action, error).await;
                return answer::refusal(&error, id);
            }
        };
        let entered = Entered {
            broker: self.broker,
            principal,
            call,
            key,
        };
        let mut patience = Patience::new(entered.call.clone());
        let answered = if action == Action::Unwrap {
            entered.get(&mut patience).await
        } else {
            let (head, body) = request.into_parts();
            match body::key(&head.headers, body).await {
                Ok(key) if action == Action::Create => entered.post(&mut patience, &key).await,
                Ok(key) => entered.put(&mut patience, &key).await,
                Err(malformed) => return entered.malformed(action, malformed).await,
            }
        };
        answered.unwrap_or_else(|error| answer::refusal(&error, patience.last()))
    }
}

impl Entered {
    /// The refusal of a body, audited. What was left of it was taken within limits; what may still come is not: the connection
    /// ends with the answer, unless it is 400, where the body was read.
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

/// The only key that this API offers to the caller. Services use gRPC; over REST only users have keys.
fn own_key(principal: &Principal) -> Result<UserKeyRef, Error> {
    let Some(user) = principal.subject() else {
        let detail = format!("{principal} is no user, and has no key of its own");
        return Err(Error::new(Reason::Policy, detail));
    };
    Ok(UserKeyRef {
        user: user.clone(),
        name: KeyName::parse(KEY_NAME)?,
    })
}

/// A body that keeps something until it was sent or given up.
fn held(body: Body, what: impl Send + 'static) -> Body {
    Body::new(body.map_frame(move |frame| {
        let _ = &what;
        frame
    }))
}
