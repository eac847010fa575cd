//! Converts errors to HTTP answers. The caller receives the status, the reason, a fixed text, the retry delay and the
//! call id.
//!
//! Mitigation: M6 of `THREAT_MODEL.md`.

use std::time::Duration;

use axum::{
    body::Body,
    http::{HeaderValue, Response, StatusCode, header},
};
use serde_json::{Value, json};

use keybroker_core::{
    call::CallId,
    error::{Error, Reason},
};

use crate::retry_after::retry_after_seconds;

const JSON: HeaderValue = HeaderValue::from_static("application/json");
/// Retry delay of an answer, in seconds, if the error specifies no delay.
const RETRY_SECONDS: u64 = 5;

/// Returns the HTTP status for a reason. The match is exhaustive, so the compiler requires a status
/// for each new reason.
#[deny(clippy::wildcard_enum_match_arm)]
const fn status(reason: Reason) -> StatusCode {
    match reason {
        Reason::Request | Reason::RequestIdReused | Reason::EnvelopeRejected => {
            StatusCode::BAD_REQUEST
        }
        Reason::Credential => StatusCode::UNAUTHORIZED,
        Reason::Policy => StatusCode::FORBIDDEN,
        // A client that receives 404 treats the user as new, so `KeyNotFound` must be the only reason with this
        // status.
        Reason::KeyNotFound => StatusCode::NOT_FOUND,
        // Only calls of the admin API need approvals, and REST has no such call. REST has no devices, either. A retry does
        // not help after `ReleaseForm`, because REST has no sealed release.
        Reason::KeyExists
        | Reason::ReleaseForm
        | Reason::ApprovalNeeded
        | Reason::ApprovalState
        | Reason::DeviceNotFound
        | Reason::DeviceState
        | Reason::DeviceSignature
        | Reason::AccessCode
        | Reason::Limit => StatusCode::BAD_REQUEST,
        Reason::QueueFull | Reason::Rate | Reason::FailureBudget => StatusCode::TOO_MANY_REQUESTS,
        // The caller should retry, because the cause is temporary or an operator can repair it.
        Reason::TokenDown
        | Reason::StoreDown
        | Reason::AuditDown
        | Reason::IdentityDown
        | Reason::TokenUntrusted
        | Reason::KeyState
        | Reason::Deadline
        | Reason::Revision => StatusCode::SERVICE_UNAVAILABLE,
        // Clients retry after status 503. A retry does not help after `RecordDamaged` and `Bug`, so
        // their status is 500.
        Reason::RecordDamaged | Reason::Bug => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// The answer to a failed call. The answer leaves out the error's detail, which is in the log under the call id.
pub(super) fn refusal(error: &Error, id: CallId) -> Response<Body> {
    refusal_as(status(error.reason()), error, id)
}

/// The answer to a failed call, with the HTTP status `status` instead of the usual status of the
/// reason.
pub(super) fn refusal_as(status: StatusCode, error: &Error, id: CallId) -> Response<Body> {
    let reason = error.reason();
    let violation = error.violations().first();
    let message = violation.map_or_else(
        || reason.text().to_owned(),
        |violation| format!("{}: {}", violation.field, violation.description),
    );
    let mut body = json!({
        "object": "error",
        "message": message,
        "reason": reason.as_str(),
        "call_id": id.to_string(),
    });
    if error.is_outcome_unknown() {
        // The gRPC API uses the same name and value in the metadata of `ErrorInfo`.
        body["outcome"] = "unknown".into();
    }
    let mut response = json(status, &body);
    let headers = response.headers_mut();
    if status == StatusCode::UNAUTHORIZED {
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    if matches!(
        status,
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
    ) {
        headers.insert(header::RETRY_AFTER, seconds(error.retry_delay()).into());
    }
    response
}

/// The value of the header `Retry-After`.
fn seconds(delay: Option<Duration>) -> u64 {
    delay.map_or(RETRY_SECONDS, retry_after_seconds)
}

/// An answer with a JSON body. Answers must not be cached.
pub(super) fn json(status: StatusCode, value: &Value) -> Response<Body> {
    let mut response = empty(status);
    response.headers_mut().insert(header::CONTENT_TYPE, JSON);
    *response.body_mut() = Body::from(value.to_string());
    response
}

/// An answer without a body.
pub(super) fn empty(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(
        header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    );
    response
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;

    async fn text(response: Response<Body>) -> String {
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        String::from_utf8(bytes.to_vec()).unwrap()
    }

    #[tokio::test]
    async fn every_reason_keeps_its_inside_to_itself() {
        for reason in Reason::ALL {
            let id = CallId::fresh();
            let response = refusal(&Error::new(reason, "secret inside"), id);
            assert_eq!(response.status(), status(reason));
            assert_eq!(response.headers()["cache-control"], "no-store");
            let retry = response.headers().contains_key("retry-after");
            assert_eq!(
                retry,
                [429, 503].contains(&response.status().as_u16()),
                "{reason}"
            );
            let is_credential = reason == Reason::Credential;
            let challenge = response.headers().contains_key("www-authenticate");
            assert_eq!(challenge, is_credential);
            let body = text(response).await;
            assert!(!body.contains("inside"), "{body}");
            let body: Value = serde_json::from_str(&body).unwrap();
            assert_eq!(body["reason"], reason.as_str());
            assert_eq!(body["call_id"], id.to_string());
        }
    }

    #[tokio::test]
    async fn only_a_change_that_may_have_been_made_says_that_its_outcome_is_unknown() {
        let error = || Error::new(Reason::StoreDown, "");
        for (error, expected) in [
            (error(), Value::Null),
            (error().outcome_unknown(), json!("unknown")),
        ] {
            let body = text(refusal(&error, CallId::fresh())).await;
            let body: Value = serde_json::from_str(&body).unwrap();
            assert_eq!(body["outcome"], expected);
        }
    }

    /// A client that receives 404 sends a new key with POST.
    #[test]
    fn one_reason_alone_is_404() {
        for reason in Reason::ALL {
            let is_absent = reason == Reason::KeyNotFound;
            assert_eq!(status(reason) == StatusCode::NOT_FOUND, is_absent);
        }
    }

    /// `docs/bitwarden.md` must list the status of each reason.
    #[test]
    fn the_documentation_has_every_status() {
        let page = include_str!("../../../../docs/bitwarden.md");
        for reason in Reason::ALL {
            let row = format!("| `{reason}` | {} |", status(reason).as_u16());
            assert!(page.contains(&row), "{row}");
        }
    }

    #[test]
    fn delays_are_whole_seconds_and_never_none() {
        for (delay, expected) in [
            (None, RETRY_SECONDS),
            (Some(Duration::ZERO), 1),
            (Some(Duration::from_millis(20)), 1),
            (Some(Duration::from_secs(2)), 2),
            (Some(Duration::from_millis(2_001)), 3),
        ] {
            assert_eq!(seconds(delay), expected);
        }
    }
}
