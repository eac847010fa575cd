//! Handles the requests that need no credential: `/alive` and `/now` return the time, and `/health` returns
//! whether the broker can release keys.

use axum::{
    body::Body,
    extract::State,
    http::{HeaderValue, Method, Response, StatusCode, header},
};
use serde_json::json;

use keybroker_core::{
    call::{CallId, Timestamp},
    error::Error,
};

use super::{Context, answer};

const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");

/// Answers `/alive` and `/now` with the time in UTC, as a JSON string.
pub(super) async fn now(method: Method) -> Response<Body> {
    if let Some(refused) = unless_read(&method) {
        return refused;
    }
    answer::json(StatusCode::OK, &json!(Timestamp::now().to_string()))
}

/// Answers `/health`: the HTTP status shows whether the token, the store and the audit log work, without
/// details.
pub(super) async fn health(State(context): State<Context>, method: Method) -> Response<Body> {
    if let Some(refused) = unless_read(&method) {
        return refused;
    }
    let (status, text) = if context.broker.health().user_keys {
        (StatusCode::OK, "Healthy")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "Unhealthy")
    };
    let mut response = answer::empty(status);
    response.headers_mut().insert(header::CONTENT_TYPE, TEXT);
    *response.body_mut() = Body::from(text);
    response
}

/// Answers a request for an unknown path with status 404. A request for a user without a key also
/// gets status 404, but with a different reason, so an operator can recognise a wrong URL.
pub(super) async fn nothing() -> Response<Body> {
    let error = Error::violation(
        "path",
        "this path does not exist; the paths are /user-keys, /alive, /now and /health, each after the configured \
         `path_prefix`",
    );
    answer::refusal_as(StatusCode::NOT_FOUND, &error, CallId::fresh())
}

/// The answer to a method that a path does not support.
pub(super) fn no_method(allowed: &'static str) -> Response<Body> {
    let error = Error::violation("method", allowed);
    let status = StatusCode::METHOD_NOT_ALLOWED;
    let mut response = answer::refusal_as(status, &error, CallId::fresh());
    let allowed = HeaderValue::from_static(allowed);
    response.headers_mut().insert(header::ALLOW, allowed);
    response
}

fn unless_read(method: &Method) -> Option<Response<Body>> {
    (!matches!(*method, Method::GET | Method::HEAD)).then(|| no_method("GET, HEAD"))
}
