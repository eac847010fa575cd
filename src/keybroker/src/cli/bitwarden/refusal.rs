//! Error answers of a broker, and whether the requested change may have been made.

use reqwest::{Response, StatusCode};
use serde::Deserialize;

use crate::cli::exit::{Exit, Failure};

/// The failure of a request.
pub(super) struct RequestError {
    pub(super) failure: Failure,
    /// Whether the requested change may have been made.
    pub(super) may_have_happened: bool,
}

impl RequestError {
    /// Returns the error for an answer whose status is not 200.
    pub(super) fn answered(answer: &Response, body: &[u8]) -> Self {
        let status = answer.status();
        Self {
            failure: refused(status, retry_after(answer), body),
            // After a server error, such as a timeout of a proxy, the result of the request is
            // unknown.
            may_have_happened: status.is_success() || status.is_server_error(),
        }
    }

    /// The failure of a request to store a key. The message says whether the key may have been
    /// stored.
    pub(super) fn of_change(self) -> Failure {
        if !self.may_have_happened {
            return self.failure;
        }
        Failure {
            message: format!("the key may have been stored: {}", self.failure.message),
            ..self.failure
        }
        .hint(
            "run `keybroker bitwarden fetch` first: if it returns the key, the key was stored and must not be stored \
             again",
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

/// Converts a failure to read back a key that was just stored.
pub(super) fn not_read_back(failure: Failure) -> Failure {
    Failure {
        message: format!("the key was stored, but could not be read back: {}", failure.message),
        ..failure
    }
    .hint(
        "do not convert the account yet: run `keybroker bitwarden fetch`, and compare the fetched key with the master key",
    )
}

/// The body of an error answer from a broker. The fields are `None` if another program sent the
/// answer.
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
    let mut message = format!("the broker returned {status}");
    for part in [&said.reason, &said.message].into_iter().flatten() {
        // The text comes from the network, so control characters are escaped for the terminal.
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
            "the user already has an active or deleted key, and POST never overwrites a key: fetch the key, and \
             check whether the key opens the account"
        }
        (400, _) => "the broker expects `{\"key\": \"<base64 of 32 bytes>\"}`",
        (401, _) => {
            "the access token is expired, from another issuer, or not for this API; the broker's log has the exact \
             reason"
        }
        (403, _) => {
            "a policy forbids this action for this user, or no policy permits it; the operator can run `keybroker policy explain`"
        }
        (404, Some("KEY_NOT_FOUND")) => {
            "the broker has no key for this user: the key has not been enrolled yet, or was deleted"
        }
        (404, _) => "a Key Connector does not have this path: check the path prefix in --url",
        (429, _) => "wait for the given time, then try again",
        (503, _) => {
            "the token, the database or the audit log is unavailable; the broker's log shows the cause"
        }
        (200..=299, _) => "Bitwarden clients treat every status except 200 as an error",
        (300..=399, _) => {
            "Bitwarden clients do not follow redirects of a Key Connector: pass the target of the redirect in --url"
        }
        _ => "the operator can find the call in the broker's log",
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
            "the broker returned 400 Bad Request: KEY_EXISTS: there (call 7\\u{1b}); retry after 2 s"
        );
        let failure = refused(StatusCode::CREATED, None, b"not JSON");
        assert!(failure.hint.unwrap().contains("every status except 200"));
    }

    #[test]
    fn a_change_whose_fate_is_unknown_says_so() {
        for (may_have_happened, words) in
            [(true, "may have been stored: "), (false, "returned 503")]
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
                .contains("`keybroker bitwarden fetch` first");
            assert_eq!(says_fetch, may_have_happened);
            assert_eq!(failure.exit, Exit::Refused);
        }
        let failure = not_read_back(refused(StatusCode::NOT_FOUND, None, b"{}"));
        assert!(
            failure
                .message
                .contains("stored, but could not be read back")
        );
    }
}
