//! The answers of the page, and the headers that all of them have.
//!
//! Mitigation: M30 of `THREAT_MODEL.md`.

use askama::Template;
use axum::{
    body::Body,
    http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header},
};

use keybroker_core::{
    call::CallId,
    error::{Error, Reason},
};

use crate::retry_after::retry_after_seconds;

use super::pages;

/// The headers of every answer. The page loads its own style sheet and script and nothing else, sends forms only to itself, and no
/// other page can embed it. With the referrer policy `no-referrer`, browsers would send forms with the origin `null`, and the check
/// of the origin would be impossible. With `same-origin`, other sites receive no referrer either.
const HEADERS: [(HeaderName, &str); 11] = [
    (
        header::CONTENT_SECURITY_POLICY,
        "default-src 'none'; style-src 'self'; script-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    ),
    (header::X_FRAME_OPTIONS, "DENY"),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::REFERRER_POLICY, "same-origin"),
    (header::CACHE_CONTROL, "no-store"),
    (header::STRICT_TRANSPORT_SECURITY, "max-age=31536000"),
    (
        HeaderName::from_static("cross-origin-opener-policy"),
        "same-origin",
    ),
    (
        HeaderName::from_static("cross-origin-resource-policy"),
        "same-origin",
    ),
    (
        HeaderName::from_static("cross-origin-embedder-policy"),
        "require-corp",
    ),
    (
        HeaderName::from_static("permissions-policy"),
        "camera=(), geolocation=(), microphone=()",
    ),
    (HeaderName::from_static("x-robots-tag"), "noindex, nofollow"),
];

const HTML: &str = "text/html; charset=utf-8";

/// An answer with text.
pub(super) fn text(
    status: StatusCode,
    kind: &'static str,
    text: impl Into<Body>,
) -> Response<Body> {
    let mut response = Response::new(text.into());
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    add_headers(headers);
    response
}

/// A page.
pub(super) fn page(status: StatusCode, template: &impl Template) -> Response<Body> {
    match template.render() {
        Ok(html) => text(status, HTML, html),
        Err(error) => {
            keybroker_core::alert!(Bug, %error, "a page cannot be rendered");
            text(
                StatusCode::INTERNAL_SERVER_ERROR,
                "text/plain; charset=utf-8",
                "internal error\n",
            )
        }
    }
}

/// Sends the browser to another page, with GET.
pub(super) fn see_other(to: &str) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SEE_OTHER;
    let headers = response.headers_mut();
    if let Ok(to) = HeaderValue::from_str(to) {
        headers.insert(header::LOCATION, to);
    }
    add_headers(headers);
    response
}

fn add_headers(headers: &mut HeaderMap) {
    for (name, value) in HEADERS {
        headers.insert(name, HeaderValue::from_static(value));
    }
}

/// A request that the page refuses.
#[derive(Debug)]
pub(super) struct Failure {
    status: StatusCode,
    message: pages::Message,
    retry_after_s: Option<u64>,
    allow: Option<&'static str>,
}

impl Failure {
    pub(super) fn new(status: StatusCode, title: &'static str, text: &str) -> Box<Self> {
        Box::new(Self {
            status,
            message: pages::Message::new(title, text),
            retry_after_s: None,
            allow: None,
        })
    }

    /// The failure for an error of the broker. The page leaves out the error's detail, which is in the log under the call id.
    pub(super) fn of(error: &Error, call: CallId) -> Box<Self> {
        let reason = error.reason();
        let text = format!("{}.", capitalised(reason.text()));
        let mut failure = Self::new(status(reason), "The action failed", &text);
        for violation in error.violations() {
            let what = format!("{}.", capitalised(&violation.description));
            failure.message.texts.push(what);
        }
        if error.is_outcome_unknown() {
            let what = "The change may have been made nevertheless. Look at the page again before you repeat it.";
            failure.message.texts.push(what.to_owned());
        }
        failure.message.call = call.to_string();
        failure.retry_after_s = error.retry_delay().map(retry_after_seconds);
        failure
    }

    /// The failure for a method that a path does not have.
    pub(super) fn no_method(allowed: &'static str) -> Box<Self> {
        let mut failure = Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "The page does not support this action",
            "Go back, and use the buttons of the page. Nothing was changed.",
        );
        failure.allow = Some(allowed);
        failure
    }

    /// The same failure with a link.
    pub(super) fn with_link(mut self: Box<Self>, address: String, text: &'static str) -> Box<Self> {
        self.message.link = pages::Link { address, text };
        self
    }

    #[cfg(test)]
    pub(super) fn status(&self) -> StatusCode {
        self.status
    }

    pub(super) fn answer(&self) -> Response<Body> {
        let mut response = page(self.status, &self.message);
        let headers = response.headers_mut();
        if let Some(delay) = self.retry_after_s {
            headers.insert(header::RETRY_AFTER, delay.into());
        }
        if let Some(allowed) = self.allow {
            headers.insert(header::ALLOW, HeaderValue::from_static(allowed));
        }
        response
    }
}

fn capitalised(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().map(|first| first.to_ascii_uppercase());
    first.into_iter().chain(chars).collect()
}

/// Returns the HTTP status for a reason. The match is exhaustive, so the compiler requires a status for each new reason.
#[deny(clippy::wildcard_enum_match_arm)]
const fn status(reason: Reason) -> StatusCode {
    match reason {
        Reason::Request | Reason::RequestIdReused | Reason::EnvelopeRejected => {
            StatusCode::BAD_REQUEST
        }
        Reason::Credential | Reason::Policy | Reason::DeviceSignature | Reason::AccessCode => {
            StatusCode::FORBIDDEN
        }
        Reason::KeyNotFound | Reason::DeviceNotFound => StatusCode::NOT_FOUND,
        Reason::KeyExists
        | Reason::Revision
        | Reason::KeyState
        | Reason::ReleaseForm
        | Reason::ApprovalNeeded
        | Reason::ApprovalState
        | Reason::DeviceState
        | Reason::Limit => StatusCode::CONFLICT,
        Reason::QueueFull | Reason::Rate | Reason::FailureBudget => StatusCode::TOO_MANY_REQUESTS,
        Reason::TokenDown
        | Reason::StoreDown
        | Reason::AuditDown
        | Reason::IdentityDown
        | Reason::TokenUntrusted
        | Reason::Deadline => StatusCode::SERVICE_UNAVAILABLE,
        Reason::RecordDamaged | Reason::Bug => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;

    async fn html(response: Response<Body>) -> String {
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        String::from_utf8(bytes.to_vec()).unwrap()
    }

    #[tokio::test]
    async fn every_reason_keeps_its_inside_to_itself() {
        for reason in Reason::ALL {
            let id = CallId::fresh();
            let error = Error::new(reason, "secret inside").explained("x", "<b>why</b>");
            let response = Failure::of(&error, id).answer();
            assert_eq!(response.status(), status(reason));
            let html = html(response).await;
            assert!(!html.contains("inside"), "{html}");
            assert!(html.contains(&id.to_string()));
            assert!(html.contains("why") && !html.contains("<b>"), "{html}");
        }
    }

    #[test]
    fn every_answer_has_the_headers() {
        for response in [
            see_other("/"),
            text(StatusCode::OK, "text/css", ""),
            Failure::no_method("GET").answer(),
        ] {
            for (name, value) in HEADERS {
                assert_eq!(response.headers()[name], value);
            }
        }
    }
}
