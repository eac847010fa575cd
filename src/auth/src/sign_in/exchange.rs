//! The answer of the token endpoint: an ID token, or an error whose cause is the caller, the broker or the provider.
//!
//! Mitigation: M30 of `THREAT_MODEL.md`.

use reqwest::StatusCode;
use serde::Deserialize;

use keybroker_core::error::Error;

use crate::http::FormAnswer;

use super::{refused, unavailable};

/// Longest error of a provider that is written to the log, in characters.
const ERROR_CHARS_MAX: usize = 64;

#[derive(Deserialize)]
struct Tokens {
    id_token: Option<String>,
}

/// An error of a token endpoint (RFC 6749 section 5.2).
#[derive(Deserialize)]
struct Problem {
    error: String,
}

/// Returns the ID token in the answer of the token endpoint `url`.
pub(super) fn id_token(url: &str, answer: &FormAnswer) -> Result<String, Error> {
    if answer.status != StatusCode::OK {
        return Err(problem(url, answer));
    }
    let tokens: Tokens = serde_json::from_slice(&answer.body)
        .map_err(|_| unavailable(&format!("{url}: the answer is not an answer with tokens")))?;
    tokens.id_token.ok_or_else(|| {
        unavailable(&format!(
            "{url}: the answer has no `id_token`; request the scope `openid`"
        ))
    })
}

fn problem(url: &str, answer: &FormAnswer) -> Error {
    let found: Option<Problem> = serde_json::from_slice(&answer.body).ok();
    let error = found.map_or_else(String::new, |found| found.error);
    if error == "invalid_grant" {
        return refused(
            "the provider refuses the code: it was used before, it has expired, or it is not of this sign-in",
        );
    }
    let shown: String = error.chars().take(ERROR_CHARS_MAX).collect();
    let detail = format!(
        "{url}: the provider answered with status {} and the error {shown:?}",
        answer.status
    );
    if is_of_caller(answer.status, &error) {
        refused(&detail)
    } else {
        unavailable(&detail)
    }
}

/// Whether an answer is a failed attempt of the caller, who chooses the code. Providers refuse a malformed code with different
/// errors, so every refusal counts that names neither the credentials of the broker nor an overload of the provider. A token endpoint
/// answers with status 401 only about the credentials of its client (RFC 6749, section 5.2).
fn is_of_caller(status: StatusCode, error: &str) -> bool {
    let is_other = matches!(
        status,
        StatusCode::UNAUTHORIZED | StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS
    );
    let is_of_broker = matches!(error, "invalid_client" | "unauthorized_client");
    status.is_client_error() && !is_other && !is_of_broker
}

#[cfg(test)]
mod tests {
    use keybroker_core::error::Reason;

    use super::*;

    const URL: &str = "https://login.example.org/token";

    fn read(status: u16, body: &str) -> Result<String, Error> {
        let answer = FormAnswer {
            status: StatusCode::from_u16(status).unwrap(),
            body: body.as_bytes().to_vec(),
        };
        id_token(URL, &answer)
    }

    #[test]
    fn an_id_token_is_found() {
        let body = r#"{"access_token": "a", "id_token": "b"}"#;
        assert_eq!(read(200, body).unwrap(), "b");
    }

    #[test]
    fn a_refused_code_is_a_failed_attempt_of_the_caller() {
        for (status, body) in [
            (400, r#"{"error": "invalid_grant"}"#),
            (400, r#"{"error": "invalid_request"}"#),
            (400, r#"{"error": "something else"}"#),
            (400, "<html>Bad request</html>"),
            (403, ""),
            (404, "{}"),
        ] {
            let error = read(status, body).unwrap_err();
            assert_eq!(error.reason(), Reason::Credential, "{status} {body}");
            assert!(error.is_failed_attempt(), "{status} {body}");
        }
    }

    #[test]
    fn a_fault_of_the_broker_or_the_provider_is_no_attempt_of_the_caller() {
        for (status, body) in [
            (400, r#"{"error": "invalid_client"}"#),
            (401, r#"{"error": "invalid_client"}"#),
            (401, ""),
            (400, r#"{"error": "unauthorized_client"}"#),
            (408, ""),
            (429, r#"{"error": "invalid_request"}"#),
            (500, r#"{"error": "server_error"}"#),
            (503, ""),
            (200, "{}"),
            (200, "not JSON"),
        ] {
            let error = read(status, body).unwrap_err();
            assert_eq!(error.reason(), Reason::IdentityDown, "{status} {body}");
            assert!(!error.is_failed_attempt(), "{status} {body}");
            assert!(error.retry_delay().is_some(), "{status} {body}");
        }
    }

    #[test]
    fn the_log_has_the_status_and_a_short_error() {
        let body = format!(r#"{{"error": "{}"}}"#, "x".repeat(1_000));
        let error = read(418, &body).unwrap_err();
        assert!(error.detail().contains("418"), "{error}");
        assert!(error.detail().contains(URL), "{error}");
        assert!(error.detail().len() < 200, "{error}");
    }
}
