//! The client of the server's API: the endpoints that Bitwarden's command line uses to approve devices, with a personal API key.
//! Nothing that the server sends is trusted: answers are bounded, redirects are refused, and each part is parsed strictly.

use std::time::{Duration, Instant};

use aws_lc_rs::digest;
use reqwest::{
    Client, Method, StatusCode, Url,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderValue},
};
use serde::Deserialize;
use serde_json::{Value, json};
use zeroize::Zeroizing;

use crate::{
    cli::{
        bitwarden::http::{self, Authorities, BodyError},
        exit::{Exit, Failure},
        output::printable,
        secrets::Source,
    },
    config::bitwarden::Settings,
};
use keybroker_bitwarden::EncString;
use keybroker_core::{call::Timestamp, error::root_cause, organization::Guid};

use super::{
    Organization,
    key::Details,
    pending::{Pending, RequestError, Unreadable},
};

/// Longest list of requests, in bytes, and its highest number of requests. A request has about a thousand bytes.
const LIST_BYTES_MAX: usize = 4 * 1_024 * 1_024;
const LIST_MAX: usize = 1_000;
/// Longest other answer, in bytes.
const ANSWER_BYTES_MAX: usize = 64 * 1_024;
/// Longest access token, in bytes.
const TOKEN_BYTES_MAX: usize = 16 * 1_024;
/// An access token is renewed this time before it expires.
const RENEWED_BEFORE: Duration = Duration::from_mins(1);
/// Longest text of an error answer that is shown, in characters.
const MESSAGE_CHARS_MAX: usize = 300;
/// The number of a command line for Linux in Bitwarden's list of device types.
const DEVICE_TYPE: &str = "25";
const DEVICE_ID_DOMAIN: &[u8] = b"keybroker/bitwarden-device-id/v1";

/// The failure of a call.
#[derive(Debug)]
pub(super) struct CallError {
    pub(super) failure: Failure,
    /// HTTP status of the answer, if there was one.
    pub(super) status: Option<u16>,
    /// Whether the server may have done what the call requested.
    pub(super) may_have_happened: bool,
    /// Whether the same call about another request may succeed: the server answered, accepts the credential and does not limit the
    /// rate of calls.
    pub(super) others_may_succeed: bool,
}

impl From<Failure> for CallError {
    /// The failure of a call that was not sent.
    fn from(failure: Failure) -> Self {
        Self {
            failure,
            status: None,
            may_have_happened: false,
            others_may_succeed: false,
        }
    }
}

impl From<CallError> for Failure {
    fn from(error: CallError) -> Self {
        error.failure
    }
}

/// A request whose user key was re-encrypted for the device.
#[derive(Debug)]
pub(super) struct Approved {
    pub(super) request: Guid,
    /// The user key under the public key of the device.
    pub(super) ciphertext: Vec<u8>,
}

impl Approved {
    fn key(&self) -> String {
        let ciphertext = self.ciphertext.clone();
        EncString::RsaOaepSha1 { ciphertext }.to_string()
    }
}

/// The pending requests of an organisation.
#[derive(Debug, Default)]
pub(super) struct Requests {
    pub(super) pending: Vec<Pending>,
    pub(super) unreadable: Vec<Unreadable>,
}

/// An access token.
struct Access {
    bearer: HeaderValue,
    until: Instant,
}

/// A server, and the credential of one administrator.
pub(super) struct Api<'a> {
    client: Client,
    organization: Organization<'a>,
    access: Option<Access>,
}

#[derive(Deserialize)]
struct TokenAnswer {
    access_token: String,
    token_type: String,
    expires_in: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ListAnswer {
    data: Vec<Value>,
    #[serde(default)]
    continuation_token: Option<String>,
}

#[derive(Default, Deserialize)]
struct ErrorAnswer {
    #[serde(default)]
    message: Option<String>,
    /// The identity service follows RFC 6749.
    #[serde(default)]
    error_description: Option<String>,
}

impl<'a> Api<'a> {
    pub(super) fn open(organization: Organization<'a>) -> Result<Self, Failure> {
        let settings = organization.settings;
        let authorities = settings.ca_file.as_deref().map(|file| Authorities {
            setting: "[[bitwarden_organization]] `ca_file`",
            file,
        });
        let timeout = Duration::from_millis(settings.timeout_ms);
        Ok(Self {
            client: http::client(authorities, timeout, true)?,
            organization,
            access: None,
        })
    }

    /// Returns the pending requests. A request that cannot be read does not hide the others.
    pub(super) async fn pending(&mut self) -> Result<Requests, Failure> {
        let url = self.organization_url(&["auth-requests"])?;
        let body = self.call(Method::GET, url, None, LIST_BYTES_MAX).await?;
        let list: ListAnswer = parse(&body, "the list of requests")?;
        if list.data.len() > LIST_MAX || list.continuation_token.is_some() {
            let what =
                format!("the server lists more than {LIST_MAX} requests, or in several pages");
            return Err(Failure::new(Exit::Verification, what));
        }
        let now = Timestamp::now();
        let mut found = Requests::default();
        for value in &list.data {
            match Pending::parse(value, now) {
                Ok(pending) if found.pending.iter().any(|one| one.id == pending.id) => {
                    found.unreadable.push(Unreadable {
                        id: Some(pending.id),
                        why: RequestError::Twice,
                    });
                }
                Ok(pending) => found.pending.push(pending),
                Err(unreadable) => found.unreadable.push(unreadable),
            }
        }
        Ok(found)
    }

    /// Returns what the server keeps for the recovery of a member's account; `None` if there is no such member.
    pub(super) async fn details(&mut self, member: Guid) -> Result<Option<Details>, CallError> {
        let member = member.to_string();
        let url = self.organization_url(&["users", &member, "reset-password-details"])?;
        let answer = self.send(Method::GET, url, None, ANSWER_BYTES_MAX).await?;
        match answer.status {
            StatusCode::OK => {
                let details = parse(&answer.body, "the details of a member").map(Some);
                details.map_err(|failure| CallError {
                    failure,
                    status: Some(answer.status.as_u16()),
                    may_have_happened: false,
                    others_may_succeed: true,
                })
            }
            StatusCode::NOT_FOUND => Ok(None),
            _ => Err(answer.error(&self.organization.settings.api_url)),
        }
    }

    /// Approves one request, or several in one call.
    pub(super) async fn approve(&mut self, approved: &[Approved]) -> Result<(), CallError> {
        let (url, body) = match approved {
            [one] => (
                self.organization_url(&["auth-requests", &one.request.to_string()])?,
                json!({"encryptedUserKey": one.key(), "requestApproved": true}),
            ),
            several => (
                self.organization_url(&["auth-requests"])?,
                several
                    .iter()
                    .map(|one| json!({"id": one.request.to_string(), "key": one.key(), "approved": true}))
                    .collect(),
            ),
        };
        self.call(Method::POST, url, Some(body), ANSWER_BYTES_MAX)
            .await
            .map(drop)
    }

    /// Denies requests.
    pub(super) async fn deny(&mut self, requests: &[Guid]) -> Result<(), CallError> {
        let url = self.organization_url(&["auth-requests", "deny"])?;
        let ids: Vec<String> = requests.iter().map(Guid::to_string).collect();
        let body = Some(json!({"ids": ids}));
        self.call(Method::POST, url, body, ANSWER_BYTES_MAX)
            .await
            .map(drop)
    }

    fn organization_url(&self, path: &[&str]) -> Result<Url, Failure> {
        let id = self.organization.id.to_string();
        let path = [&["organizations", &*id][..], path].concat();
        join(&self.organization.settings.api_url, &path)
    }

    /// Sends a request, and returns the body of an answer with a status of success.
    async fn call(
        &mut self,
        method: Method,
        url: Url,
        body: Option<Value>,
        bytes_max: usize,
    ) -> Result<Zeroizing<Vec<u8>>, CallError> {
        let answer = self.send(method, url, body, bytes_max).await?;
        if answer.status.is_success() {
            return Ok(answer.body);
        }
        Err(answer.error(&self.organization.settings.api_url))
    }

    async fn send(
        &mut self,
        method: Method,
        url: Url,
        body: Option<Value>,
        bytes_max: usize,
    ) -> Result<Answer, CallError> {
        let bearer = self.bearer().await?;
        let mut request = self
            .client
            .request(method, url)
            .header(ACCEPT, "application/json")
            .header(AUTHORIZATION, bearer);
        if let Some(body) = body {
            request = request
                .header(CONTENT_TYPE, "application/json")
                .body(body.to_string());
        }
        exchange(request, &self.organization.settings.api_url, bytes_max).await
    }

    /// Returns the access token, and requests a new one if it expires soon.
    async fn bearer(&mut self) -> Result<HeaderValue, Failure> {
        let soon = Instant::now() + RENEWED_BEFORE;
        if let Some(access) = self.access.as_ref().filter(|access| access.until > soon) {
            return Ok(access.bearer.clone());
        }
        let access = self.log_in().await?;
        let bearer = access.bearer.clone();
        self.access = Some(access);
        Ok(bearer)
    }

    /// Logs in with the personal API key (OAuth client credentials).
    async fn log_in(&self) -> Result<Access, Failure> {
        let settings = self.organization.settings;
        let url = join(&settings.identity_url, &["connect", "token"])?;
        let secret = Source {
            what: "`client_secret_file`",
            file: Some(&settings.client_secret_file),
            descriptor: None,
        };
        let form = form(settings, &secret.line()?)?;
        let request = self
            .client
            .post(url)
            .header(ACCEPT, "application/json")
            .header(
                CONTENT_TYPE,
                "application/x-www-form-urlencoded; charset=utf-8",
            )
            .body(form.to_string());
        let answer = exchange(request, &settings.identity_url, ANSWER_BYTES_MAX).await?;
        if answer.status != StatusCode::OK {
            let failure = answer.refused(&settings.identity_url);
            return Err(if answer.status == StatusCode::BAD_REQUEST {
                failure.hint(
                    "check `client_id` and the content of `client_secret_file`: a personal API key changes when its owner \
                     rotates it",
                )
            } else {
                failure
            });
        }
        let token: TokenAnswer = parse(&answer.body, "the answer of the identity service")?;
        let is_good = token.token_type.eq_ignore_ascii_case("bearer")
            && (1..=TOKEN_BYTES_MAX).contains(&token.access_token.len());
        let access_token = Zeroizing::new(token.access_token);
        let bearer = Zeroizing::new(format!("Bearer {}", *access_token));
        let bearer = HeaderValue::from_str(&bearer).ok().filter(|_| is_good);
        let mut bearer = bearer.ok_or_else(|| {
            Failure::new(
                Exit::Verification,
                "the identity service sent no bearer token",
            )
        })?;
        bearer.set_sensitive(true);
        let lifetime = Duration::from_secs(token.expires_in.min(24 * 3_600));
        Ok(Access {
            bearer,
            until: Instant::now() + lifetime,
        })
    }
}

/// The form with which a command line logs in. The server requires the description of a device.
fn form(settings: &Settings, secret: &str) -> Result<Zeroizing<String>, Failure> {
    let device = device_of(&settings.client_id).to_string();
    let mut url = join(&settings.identity_url, &[])?;
    url.query_pairs_mut()
        .append_pair("grant_type", "client_credentials")
        .append_pair("scope", "api")
        .append_pair("client_id", &settings.client_id)
        .append_pair("client_secret", secret)
        .append_pair("deviceType", DEVICE_TYPE)
        .append_pair("deviceIdentifier", &device)
        .append_pair("deviceName", "keybroker");
    Ok(Zeroizing::new(url.query().unwrap_or_default().to_owned()))
}

/// The identifier of this client, which is the same at each start, so that the server does not add a device each time.
fn device_of(client: &str) -> Guid {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(DEVICE_ID_DOMAIN);
    context.update(client.as_bytes());
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&context.finish().as_ref()[..16]);
    Guid::from_bytes(bytes)
}

/// Adds segments to the path of a URL, whose path may end with a slash.
fn join(base: &str, path: &[&str]) -> Result<Url, Failure> {
    let bad = || {
        Failure::new(
            Exit::Configuration,
            format!("{base:?} is not the URL of a server"),
        )
    };
    let mut url = Url::parse(base).map_err(|_| bad())?;
    url.path_segments_mut()
        .map_err(|()| bad())?
        .pop_if_empty()
        .extend(path);
    Ok(url)
}

/// An answer with any status.
struct Answer {
    status: StatusCode,
    body: Zeroizing<Vec<u8>>,
}

impl Answer {
    /// The error of a call with this answer.
    fn error(&self, server: &str) -> CallError {
        let concerns_all = [StatusCode::UNAUTHORIZED, StatusCode::TOO_MANY_REQUESTS];
        CallError {
            failure: self.refused(server),
            status: Some(self.status.as_u16()),
            // After an error of the server, such as a timeout of a proxy, the result is unknown.
            may_have_happened: self.status.is_server_error(),
            others_may_succeed: !concerns_all.contains(&self.status),
        }
    }

    fn refused(&self, server: &str) -> Failure {
        let said: ErrorAnswer = serde_json::from_slice(&self.body).unwrap_or_default();
        let mut message = format!("{server} returned {}", self.status);
        let text = [said.message, said.error_description].into_iter().flatten();
        for part in text {
            let part: String = part.chars().take(MESSAGE_CHARS_MAX).collect();
            message = format!("{message}: {}", printable(&part));
        }
        Failure::new(Exit::Refused, message).hint(match self.status.as_u16() {
            300..=399 => "redirects are refused, because only the configured server may receive the credential: correct the URL",
            400 | 404 => "another administrator may have decided the request, or it has expired: list the requests again",
            401 | 403 => "the owner of the API key needs the permission to manage account recovery",
            429 => "the server limits the rate of calls: wait before you try again",
            _ => "the log of the server shows the cause",
        })
    }
}

async fn exchange(
    request: reqwest::RequestBuilder,
    server: &str,
    bytes_max: usize,
) -> Result<Answer, CallError> {
    let unreachable = |error: &reqwest::Error| {
        let what = if error.is_timeout() {
            format!("no answer from {server} within `timeout_ms`")
        } else {
            format!("cannot reach {server}: {}", root_cause(error))
        };
        Failure::new(Exit::Unreachable, what)
    };
    let mut answer = request.send().await.map_err(|error| CallError {
        failure: unreachable(&error),
        status: None,
        may_have_happened: !error.is_connect() && !error.is_builder(),
        others_may_succeed: false,
    })?;
    let status = answer.status();
    let body = http::body(&mut answer, bytes_max).await;
    let body = body.map_err(|error| CallError {
        status: Some(status.as_u16()),
        others_may_succeed: matches!(error, BodyError::TooLong),
        failure: match error {
            BodyError::Lost(error) => unreachable(&error),
            BodyError::TooLong => {
                let what = format!("the answer from {server} is longer than {bytes_max} bytes");
                Failure::new(Exit::Verification, what)
            }
        },
        may_have_happened: true,
    })?;
    Ok(Answer { status, body })
}

fn parse<'b, T: Deserialize<'b>>(body: &'b [u8], what: &str) -> Result<T, Failure> {
    serde_json::from_slice(body).map_err(|error| {
        let what = format!(
            "{what} does not have the expected form (line {}, column {})",
            error.line(),
            error.column()
        );
        Failure::new(Exit::Verification, what).hint("check `api_url` and `identity_url`")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_joined_with_one_slash() {
        for base in ["https://x.example/api", "https://x.example/api/"] {
            let url = join(base, &["organizations", "a/b"]).unwrap();
            assert_eq!(url.as_str(), "https://x.example/api/organizations/a%2Fb");
        }
        assert!(join("mailto:x", &[]).is_err());
    }

    #[test]
    fn the_identifier_of_the_client_does_not_change() {
        assert_eq!(device_of("user.x"), device_of("user.x"));
        assert_ne!(device_of("user.x"), device_of("user.y"));
    }

    #[test]
    fn text_of_the_server_is_harmless_on_a_terminal() {
        let body = json!({"message": format!("\u{1b}[2J{}", "x".repeat(1_000))}).to_string();
        let answer = Answer {
            status: StatusCode::BAD_REQUEST,
            body: Zeroizing::new(body.into_bytes()),
        };
        let failure = answer.refused("https://x.example");
        assert_eq!(failure.exit, Exit::Refused);
        assert!(!failure.message.contains('\u{1b}'));
        assert!(failure.message.len() < 500, "{}", failure.message);
    }

    #[test]
    fn only_a_refused_credential_and_a_limited_rate_concern_every_request() {
        for (status, may_have_happened, others_may_succeed) in [
            (StatusCode::BAD_REQUEST, false, true),
            (StatusCode::UNAUTHORIZED, false, false),
            (StatusCode::FORBIDDEN, false, true),
            (StatusCode::TOO_MANY_REQUESTS, false, false),
            (StatusCode::BAD_GATEWAY, true, true),
        ] {
            let body = Zeroizing::new(Vec::new());
            let error = Answer { status, body }.error("https://x.example");
            assert_eq!(error.may_have_happened, may_have_happened, "{status}");
            assert_eq!(error.others_may_succeed, others_may_succeed, "{status}");
            assert_eq!(error.status, Some(status.as_u16()));
        }
    }
}
