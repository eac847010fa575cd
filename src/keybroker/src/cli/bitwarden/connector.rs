//! Calls a Key Connector in the same way as a Bitwarden client: `/user-keys` over HTTP/1.1 with an
//! access token. Only status 200 means success.

use std::{path::PathBuf, time::Duration};

use base64ct::{Base64, Base64Unpadded, Encoding as _};
use clap::Args;
use reqwest::{
    Client, Response, StatusCode, Url,
    header::{ACCEPT, AUTHORIZATION, CACHE_CONTROL, CONTENT_TYPE, HeaderValue, PRAGMA},
};
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize as _, Zeroizing};

use crate::cli::{
    client::connect::hint,
    exit::{Exit, Failure},
};
use keybroker_bitwarden::MasterKey;
use keybroker_core::{error::root_cause, loopback::is_loopback_host};

use super::{
    holder::Holder,
    http::{self, BodyError},
    refusal::RequestError,
    secrets,
};

const JSON: &str = "application/json";
/// The header value that Bitwarden's TypeScript clients send.
const JSON_UTF8: &str = "application/json; charset=utf-8";
/// Maximum length of an answer in bytes; longer answers are rejected.
const ANSWER_BYTES_MAX: usize = 16 * 1_024;

/// Options that select the broker and the access token.
#[derive(Args, Clone, Debug)]
pub(super) struct Connector {
    /// URL of the broker as configured in Bitwarden, such as <https://keys.example.org>, with the
    /// path prefix if there is one
    #[arg(long, env = "KEYBROKER_CONNECTOR_URL", value_name = "URL")]
    url: Option<String>,
    /// File with the user's access token, readable only by its owner
    #[arg(long, value_name = "FILE", conflicts_with = "token_fd")]
    token_file: Option<PathBuf>,
    /// Number of an open file descriptor to read the user's access token from
    #[arg(long, value_name = "N")]
    token_fd: Option<u32>,
    /// PEM file with the CA certificates that verify the broker's certificate [default: the CAs of
    /// the system]
    #[arg(long, value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// Allow plain HTTP to a loopback address of this machine
    #[arg(long)]
    allow_http: bool,
    /// Timeout for an answer, in milliseconds
    #[arg(
        long, default_value_t = 30_000, value_name = "MILLISECONDS",
        value_parser = clap::value_parser!(u64).range(1..=600_000)
    )]
    timeout_ms: u64,
}

impl Connector {
    /// Reads the access token and the CA file, and prepares the requests.
    pub(super) fn open(&self) -> Result<Broker, Failure> {
        let Some(url) = &self.url else {
            return Err(Failure::new(Exit::Usage, "no broker specified")
                .hint("pass --url https://host or set KEYBROKER_CONNECTOR_URL"));
        };
        self.check(url)?;
        let source = secrets::Source {
            what: "the access token",
            file: self.token_file.as_deref(),
            descriptor: self.token_fd,
        };
        if source.is_none() {
            let what = "no access token specified";
            return Err(Failure::new(Exit::Usage, what)
                .hint("pass a file with --token-file or a descriptor with --token-fd"));
        }
        let token = source.line()?;
        let holder = Holder::of(token.trim());
        let bearer = Zeroizing::new(format!("Bearer {}", token.trim()));
        let mut bearer = HeaderValue::from_str(&bearer).map_err(|_| {
            Failure::new(
                Exit::Usage,
                "the access token contains characters that are not allowed in access tokens",
            )
        })?;
        bearer.set_sensitive(true);
        Ok(Broker {
            client: self.client()?,
            // Bitwarden clients also append `/user-keys` to the URL, so a URL that ends with a
            // slash produces a double slash.
            user_keys: format!("{url}/user-keys"),
            bearer,
            holder,
        })
    }

    /// Whether the options specify an access token.
    pub(super) fn has_token(&self) -> bool {
        self.token_file.is_some() || self.token_fd.is_some()
    }

    fn check(&self, url: &str) -> Result<(), Failure> {
        let refuse = |why: &str| Failure::new(Exit::Usage, format!("--url {url:?}: {why}"));
        let parsed =
            Url::parse(url).map_err(|error| refuse(&format!("the value is not a URL: {error}")))?;
        if parsed.query().is_some() || parsed.fragment().is_some() {
            return Err(refuse(
                "the URL has a query or a fragment, which Bitwarden clients would drop",
            ));
        }
        if !parsed.username().is_empty() || parsed.password().is_some() {
            return Err(refuse(
                "the URL has a user name or a password; the access token identifies the user",
            ));
        }
        match parsed.scheme() {
            "https" => Ok(()),
            "http" if !self.allow_http => Err(refuse(
                "the URL is not https, and Bitwarden clients refuse plain http",
            )
            .hint("for a test on this machine, pass --allow-http")),
            "http" if parsed.host_str().is_some_and(is_loopback_host) => Ok(()),
            "http" => Err(refuse(
                "the host is not a loopback address: over plain HTTP everyone on the network path could read the key and \
                 the access token",
            )
            .hint("for a test on this machine, use an address such as http://127.0.0.1:8087")),
            _ => Err(refuse("the URL is not https")),
        }
    }

    fn client(&self) -> Result<Client, Failure> {
        let authorities = self.ca_file.as_deref().map(|file| http::Authorities {
            setting: "--ca-file",
            file,
        });
        let timeout = Duration::from_millis(self.timeout_ms);
        http::client(authorities, timeout, !self.allow_http)
    }
}

/// The method of a request that stores a key.
#[derive(Clone, Copy, Debug)]
pub(super) enum Method {
    /// POST, which never overwrites an existing key.
    Post,
    /// PUT, which overwrites an existing key.
    Put,
}

impl Method {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Post => "POST",
            Self::Put => "PUT",
        }
    }
}

/// The JSON body of requests and answers.
#[derive(Serialize, Deserialize)]
struct Body {
    #[serde(alias = "Key")]
    key: String,
}

impl Drop for Body {
    fn drop(&mut self) {
        self.key.zeroize();
    }
}

/// A broker, and the access token of one user for calls to this broker.
pub(super) struct Broker {
    client: Client,
    user_keys: String,
    bearer: HeaderValue,
    holder: Holder,
}

impl Broker {
    pub(super) fn url(&self) -> &str {
        &self.user_keys
    }

    /// The user that the access token's claims identify.
    pub(super) fn holder(&self) -> &Holder {
        &self.holder
    }

    /// Fetches the key of the user that the access token identifies.
    pub(super) async fn fetch(&self) -> Result<MasterKey, Failure> {
        let request = self
            .client
            .get(&self.user_keys)
            .header(CACHE_CONTROL, "no-store")
            .header(PRAGMA, "no-cache");
        let answer = self.send(request).await?;
        let odd = |why: &str| {
            let what = format!("{} returned status 200, but {why}", self.user_keys);
            Failure::new(Exit::Verification, what)
                .hint("check that a Key Connector listens at this URL")
        };
        let body: Body =
            serde_json::from_slice(&answer).map_err(|_| odd("no JSON object `{\"key\": …}`"))?;
        let key = Base64::decode_vec(&body.key).or_else(|_| Base64Unpadded::decode_vec(&body.key));
        let key = Zeroizing::new(key.map_err(|_| odd("the key is not base64"))?);
        MasterKey::from_bytes(key).map_err(|error| odd(&error.to_string()))
    }

    /// Stores the key of the user that the access token identifies.
    pub(super) async fn store(&self, method: Method, key: &MasterKey) -> Result<(), Failure> {
        let body = Body {
            key: Base64::encode_string(key.expose()),
        };
        let text = serde_json::to_vec(&body)
            .map_err(|error| Failure::new(Exit::Internal, error.to_string()))?;
        let request = match method {
            Method::Post => self.client.post(&self.user_keys),
            Method::Put => self.client.put(&self.user_keys),
        };
        let request = request.header(CONTENT_TYPE, JSON_UTF8).body(text);
        let answer = self.send(request).await;
        answer.map(drop).map_err(RequestError::of_change)
    }

    /// Sends a request and returns the body of an answer with status 200.
    async fn send(
        &self,
        request: reqwest::RequestBuilder,
    ) -> Result<Zeroizing<Vec<u8>>, RequestError> {
        let request = request
            .header(ACCEPT, JSON)
            .header(AUTHORIZATION, self.bearer.clone());
        let mut answer = request.send().await.map_err(|error| RequestError {
            failure: self.unreachable(&error),
            may_have_happened: !error.is_connect(),
        })?;
        let body = self.read(&mut answer).await?;
        match answer.status() {
            StatusCode::OK => Ok(body),
            _ => Err(RequestError::answered(&answer, &body)),
        }
    }

    async fn read(&self, answer: &mut Response) -> Result<Zeroizing<Vec<u8>>, Failure> {
        http::body(answer, ANSWER_BYTES_MAX)
            .await
            .map_err(|error| match error {
                BodyError::Lost(error) => self.unreachable(&error),
                BodyError::TooLong => {
                    let what = format!(
                        "the answer from {} is longer than an answer with a key",
                        self.user_keys
                    );
                    Failure::new(Exit::Verification, what)
                        .hint("check that a Key Connector listens at this URL")
                }
            })
    }

    fn unreachable(&self, error: &reqwest::Error) -> Failure {
        let cause = root_cause(error);
        let what = if error.is_timeout() {
            format!("no answer from {} within --timeout-ms", self.user_keys)
        } else {
            format!("cannot reach {}: {cause}", self.user_keys)
        };
        let mut hint = hint(&cause, "--ca-file");
        if cause.contains("UnknownIssuer") {
            hint.push_str(
                "; Bitwarden clients need the CA certificate of the broker in the system's trust store",
            );
        }
        Failure::new(Exit::Unreachable, what).hint(hint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connector(url: &str, allow_http: bool) -> Connector {
        Connector {
            url: Some(url.to_owned()),
            token_file: None,
            token_fd: None,
            ca_file: None,
            allow_http,
            timeout_ms: 1_000,
        }
    }

    #[test]
    fn only_loopback_may_be_spoken_to_in_plain() {
        for (url, allow_http, accepted) in [
            ("https://keys.example.org", false, true),
            ("https://keys.example.org/prefix/", true, true),
            ("http://keys.example.org", false, false),
            ("http://keys.example.org", true, false),
            ("http://127.0.0.1:80", false, false),
            ("http://127.0.0.1:80", true, true),
            ("http://[::1]:80/x", true, true),
            ("http://localhost", true, false),
            ("http://localhost.example.org", true, false),
            ("http://127.0.0.1.example.org", true, false),
            ("ftp://127.0.0.1", true, false),
            ("keys.example.org", true, false),
            ("https://ada@keys.example.org", true, false),
            ("https://keys.example.org?x=1", true, false),
        ] {
            let checked = connector(url, allow_http).check(url);
            assert_eq!(checked.is_ok(), accepted, "{url} {allow_http}");
        }
    }
}
