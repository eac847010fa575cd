//! Answers that are none of those that were hoped for, and what they mean for a change that was asked for.

use reqwest::{Response, StatusCode};
use serde::Deserialize;

use crate::cli::exit::{Exit, Failure};

/// Why there is no good answer.
pub(super) struct RequestError {
    pub(super) failure: Failure,
    /// Whether a change that was asked for may have been made.
    pub(super) may_have_happened: bool,
}

impl RequestError {
    /// An answer with another status than 200.
    pub(super) fn answered(answer: &Response, body: &[u8]) -> Self {
        let status = answer.status();
        Self {
            failure: refused(status, retry_after(answer), body),
            // A proxy that gave up, or a broker whose own deadline passed, does not know.
            may_have_happened: status.is_success() || status.is_server_error(),
        }
    }

    /// The failure of a change: it says so when its fate is unknown.
    pub(super) fn of_change(self) -> Failure {
        if !self.may_have_happened {
            return self.failure;
        }
        Failure {
            message: format!("the key may have been stored: {}", self.failure.message),
            ..self.failure
        }
        .hint(
            "fetch it before anything else, with `keybroker bitwarden fetch`: if it is there, it was stored, and must not be \
             stored again",
        )
    }
}

impl From<Failure> for RequestError {
    fn from(failure: Failure) -> Self {
        Self {
            failure,
            may_have_happened: true,
        }
    }
}

impl From<RequestError> for Failure {
    fn from(error: RequestError) -> Self {
        error.failure
    }
}

/// The failure to read what was just stored.
pub(super) fn not_read_back(failure: Failure) -> Failure {
    Failure {
        message: format!(
            "the key was stored, but not read back: {}",
            failure.message
        ),
        ..failure
    }
    .hint(
        "do not convert the account yet: fetch the key first, with `keybroker bitwarden fetch`, and compare it",
    )
}

/// The refusal of a broker, if the answer comes from one.
#[derive(Default, Deserialize)]
struct Refusal {
    reason: Option<String>,
    message: Option<String>,
    call_id: Option<String>,
}

fn retry_after(answer: &Response) -> Option<String> {
    let value = answer.headers().get(reqwest::header::RETRY_AFTER)?;
    value.to_str().ok().map(str::to_owned)
}

fn refused(status: StatusCode, retry_after: Option<String>, body: &[u8]) -> Failure {
    let said: Refusal = serde_json::from_slice(body).unwrap_or_default();
    let mut message = format!("the broker answers {status}");
    for part in [&said.reason, &said.message].into_iter().flatten() {
        // From the other side of a network: no control characters on a terminal.
        message = format!("{message}: {}", part.escape_debug());
    }
    if let Some(call) = &said.call_id {
        message = format!("{message} (call {})", call.escape_debug());
    }
    if let Some(seconds) = retry_after {
        message = format!("{message}; retry after {} s", seconds.escape_debug());
    }
    Failure {
        reason: said.reason.clone(),
        ..Failure::new(Exit::Refused, message).hint(hint(status, said.reason.as_deref()))
    }
}

fn hint(status: StatusCode, reason: Option<&str>) -> &'static str {
    match (status.as_u16(), reason) {
        (400, Some("KEY_EXISTS")) => {
            "the user has a key already, perhaps a deleted one; POST never overwrites: fetch it and see whether it opens \
             the account"
        }
        (400, _) => "the broker takes `{\"key\": \"<base64 of 32 bytes>\"}`",
        (401, _) => {
            "the token is expired, of another issuer, or not for this API: the broker's log has the exact reason"
        }
        (403, _) => "no policy lets this user do that: `keybroker policy explain` says why",
        (404, Some("KEY_NOT_FOUND")) => {
            "this user has no key here: it was not enrolled yet, or was deleted"
        }
        (404, _) => "no Key Connector has this path: look at the prefix in --url",
        (429, _) => "wait for that long, then try again",
        (503, _) => "token, database or audit log are unavailable: the broker's log names which",
        (200..=299, _) => "clients take anything but 200 for an error",
        (300..=399, _) => {
            "clients follow no redirect here: name the address that it points to in --url"
        }
        _ => "the operator finds the call in the broker's log",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_name_reason_call_and_delay() {
        let body = br#"{"reason":"KEY_EXISTS","message":"there","call_id":"7\u001b"}"#;
        let failure = refused(StatusCode::BAD_REQUEST, Some("2".to_owned()), body);
        assert_eq!(failure.exit, Exit::Refused);
        assert_eq!(failure.reason.as_deref(), Some("KEY_EXISTS"));
        assert_eq!(
            failure.message,
            "the broker answers 400 Bad Request: KEY_EXISTS: there (call 7\\u{1b}); retry after 2 s"
        );
        let failure = refused(StatusCode::CREATED, None, b"not JSON");
        assert!(failure.hint.unwrap().contains("anything but 200"));
    }

    #[test]
    fn a_change_whose_fate_is_unknown_says_so() {
        for (may_have_happened, words) in [(true, "may have been stored: "), (false, "answers 503")]
        {
            let failure = refused(StatusCode::SERVICE_UNAVAILABLE, None, b"{}");
            let error = RequestError {
                failure,
                may_have_happened,
            };
            let failure = error.of_change();
            assert!(failure.message.contains(words), "{}", failure.message);
            let says_fetch = failure
                .hint
                .unwrap()
                .contains("fetch it before anything else");
            assert_eq!(says_fetch, may_have_happened);
            assert_eq!(failure.exit, Exit::Refused);
        }
        let failure = not_read_back(refused(StatusCode::NOT_FOUND, None, b"{}"));
        assert!(failure.message.contains("stored, but not read back"));
    }
}
