//! Signs persons in at an OpenID provider, with the authorization code flow (OpenID Connect Core section 3.1) and PKCE
//! (RFC 7636).
//!
//! The browser brings only a code, which can be used once, and only together with the PKCE verifier that this process keeps.
//! The broker exchanges the code for an ID token over its own connection to the provider. The caller must keep the secrets of
//! [`Begun`] on the server, and must compare the `state` that the browser returns.
//!
//! Mitigation: M30 of `THREAT_MODEL.md`.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use aws_lc_rs::{digest, rand};
use base64ct::{Base64UrlUnpadded, Encoding as _};
use reqwest::{StatusCode, Url};
use serde::Deserialize;
use tokio::sync::Mutex;
use zeroize::Zeroizing;

use keybroker_core::{
    error::{Error, Reason, chain},
    principal::Principal,
    sign_in::{Answer, Begun},
    trusted_file::{self, Purpose},
};

use super::{
    http::Http,
    issuer::{Settings as Issuer, url_problem},
    jwks::SourceError,
    token::{IdTokens, Tokens},
};

/// Time after which the discovery document is fetched again.
const ENDPOINTS_KEPT: Duration = Duration::from_mins(15);
/// Time after which a caller may try again while the provider is unavailable.
const RETRY: Duration = Duration::from_secs(5);
/// Longest client secret, in bytes.
const SECRET_BYTES_MAX: u64 = 4 * 1024;
const SECRET: Purpose = Purpose::secret("client secret");
/// Bytes of randomness of the state, the nonce and the PKCE verifier.
const RANDOM_BYTES: usize = 32;

/// The registration of the broker at the provider.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Name of the issuer.
    pub issuer: String,
    /// The id of the client.
    pub client_id: String,
    /// File with the secret of the client; `None` for a public client.
    pub client_secret_file: Option<PathBuf>,
    /// The URL to which the provider sends the browser back.
    pub redirect_url: String,
    /// The requested scopes.
    pub scopes: BTreeSet<String>,
    /// The authorization endpoint, if it is not in the discovery document.
    pub authorization_url: Option<String>,
    /// The token endpoint, if it is not in the discovery document.
    pub token_url: Option<String>,
}

/// The reason why the settings are refused.
#[derive(Debug, thiserror::Error)]
pub enum SignInError {
    /// No issuer has the configured name.
    #[error("no [[issuer]] has the name {0:?}")]
    NoIssuer(String),
    /// The HTTP client cannot be created.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The file with the client secret cannot be read.
    #[error("`client_secret_file`")]
    SecretFile(#[source] trusted_file::Error),
    /// The file with the client secret has no valid text.
    #[error("`client_secret_file` {0}: the file must contain the secret as one line of text")]
    Secret(String),
}

/// The provider at which persons sign in.
#[derive(Debug)]
pub struct Provider {
    settings: Settings,
    secret: Option<Secret>,
    http: Http,
    tokens: IdTokens,
    endpoints: Mutex<Option<(Instant, Arc<Endpoints>)>>,
}

/// A client secret, which has no readable `Debug` output.
struct Secret(Zeroizing<String>);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[secret]")
    }
}

#[derive(Debug)]
struct Endpoints {
    authorization: Url,
    token: String,
    /// Whether the client id and the secret are in the form instead of the header.
    is_secret_in_form: bool,
    /// Whether the provider adds its `iss` to the answer (RFC 9207).
    has_issuer: bool,
}

#[derive(Deserialize)]
struct TokenAnswer {
    id_token: Option<String>,
}

#[derive(Deserialize)]
struct TokenProblem {
    error: String,
}

impl Provider {
    /// Creates the client of a provider. The provider may be unavailable.
    pub fn new(tokens: &Tokens, settings: Settings) -> Result<Self, SignInError> {
        let id_tokens = tokens
            .id_tokens(&settings.issuer, &settings.client_id)
            .ok_or_else(|| SignInError::NoIssuer(settings.issuer.clone()))?;
        let secret = settings.client_secret_file.as_deref().map(read_secret);
        Ok(Self {
            secret: secret.transpose()?,
            http: Http::new(id_tokens.settings())?,
            tokens: id_tokens,
            settings,
            endpoints: Mutex::default(),
        })
    }

    /// Begins a sign-in. With `max_age`, the provider must ask for the credentials again, and must say when the person
    /// authenticated.
    pub async fn begin(&self, max_age: Option<Duration>) -> Result<Begun, Error> {
        let endpoints = self.endpoints().await?;
        let (state, nonce, verifier) = (random()?, random()?, random()?);
        let challenge = digest::digest(&digest::SHA256, verifier.as_bytes());
        let challenge = Base64UrlUnpadded::encode_string(challenge.as_ref());
        let scopes: Vec<&str> = self.settings.scopes.iter().map(String::as_str).collect();
        let mut url = endpoints.authorization.clone();
        let mut query = url.query_pairs_mut();
        query
            .append_pair("response_type", "code")
            .append_pair("client_id", &self.settings.client_id)
            .append_pair("redirect_uri", &self.settings.redirect_url)
            .append_pair("scope", &scopes.join(" "))
            .append_pair("state", &state)
            .append_pair("nonce", &nonce)
            .append_pair("code_challenge", &challenge)
            .append_pair("code_challenge_method", "S256");
        if let Some(max_age) = max_age {
            // A provider that ignores one of the two asks because of the other. `max_age` also requires `auth_time`.
            query
                .append_pair("prompt", "login")
                .append_pair("max_age", &max_age.as_secs().to_string());
        }
        drop(query);
        Ok(Begun {
            url: url.into(),
            state,
            nonce,
            verifier,
        })
    }

    /// Exchanges the code for an ID token, and returns the principal that the ID token identifies.
    pub async fn finish(&self, answer: &Answer) -> Result<Arc<Principal>, Error> {
        let endpoints = self.endpoints().await?;
        let issuer = &self.issuer().issuer;
        let is_other = match &answer.issuer {
            Some(found) => found != issuer,
            None => endpoints.has_issuer,
        };
        if is_other {
            return refuse(
                "the answer is not from the configured issuer: its `iss` differs or is missing",
            );
        }
        let token = self.exchange(&endpoints, answer).await?;
        self.tokens.verify(token.as_bytes(), &answer.nonce).await
    }

    async fn exchange(&self, endpoints: &Endpoints, answer: &Answer) -> Result<String, Error> {
        let (form, in_header) = self.form(endpoints, answer);
        // The header contains the form encoding of both (RFC 6749 section 2.3.1).
        let id = &self.settings.client_id;
        let header = in_header.map(|secret| (encoded(id), encoded(secret)));
        let header = header
            .as_ref()
            .map(|(id, secret)| (id.as_str(), secret.as_str()));
        let url = &endpoints.token;
        let sent = self.http.post_form(url, form, header).await;
        let sent = sent.map_err(|error| unavailable(&chain(&error)))?;
        if sent.status != StatusCode::OK {
            let problem: Option<TokenProblem> = serde_json::from_slice(&sent.body).ok();
            let problem = problem.map_or_else(String::new, |problem| problem.error);
            if problem == "invalid_grant" {
                return refuse(
                    "the provider refuses the code: it was used before, it has expired, or it is not of this sign-in",
                );
            }
            let shown: String = problem.chars().take(64).collect();
            return Err(unavailable(&format!(
                "{url}: the provider answered with status {} and the error {shown:?}",
                sent.status
            )));
        }
        let answer: TokenAnswer = serde_json::from_slice(&sent.body)
            .map_err(|_| unavailable(&format!("{url}: the answer is not an answer with tokens")))?;
        answer.id_token.ok_or_else(|| {
            unavailable(&format!(
                "{url}: the answer has no `id_token`; request the scope `openid`"
            ))
        })
    }

    /// The form for the token endpoint, and the secret that belongs into the header, if any.
    fn form(&self, endpoints: &Endpoints, answer: &Answer) -> (String, Option<&str>) {
        let settings = &self.settings;
        let mut form = form_urlencoded::Serializer::new(String::new());
        form.append_pair("grant_type", "authorization_code")
            .append_pair("code", &answer.code)
            .append_pair("redirect_uri", &settings.redirect_url)
            .append_pair("code_verifier", &answer.verifier);
        let secret = self.secret.as_ref().map(|secret| secret.0.as_str());
        let in_header = secret.filter(|_| !endpoints.is_secret_in_form);
        if in_header.is_none() {
            form.append_pair("client_id", &settings.client_id);
            if let Some(secret) = secret {
                form.append_pair("client_secret", secret);
            }
        }
        (form.finish(), in_header)
    }

    fn issuer(&self) -> &Issuer {
        self.tokens.settings()
    }

    async fn endpoints(&self) -> Result<Arc<Endpoints>, Error> {
        let mut kept = self.endpoints.lock().await;
        if let Some((at, endpoints)) = &*kept
            && at.elapsed() < ENDPOINTS_KEPT
        {
            return Ok(Arc::clone(endpoints));
        }
        match self.find_endpoints().await {
            Ok(found) => {
                let found = Arc::new(found);
                *kept = Some((Instant::now(), Arc::clone(&found)));
                Ok(found)
            }
            Err(error) => match &*kept {
                // The endpoints rarely change, so an outage of the discovery document must not prevent sign-ins.
                Some((_, endpoints)) => Ok(Arc::clone(endpoints)),
                None => Err(error),
            },
        }
    }

    async fn find_endpoints(&self) -> Result<Endpoints, Error> {
        let settings = &self.settings;
        if let (Some(authorization), Some(token)) =
            (&settings.authorization_url, &settings.token_url)
        {
            return self.checked(authorization, token.clone());
        }
        let (url, issuer) = (self.issuer().discovery_place(), &self.issuer().issuer);
        let found = self.http.discovery(&url, issuer).await;
        let found = found.map_err(|error| unavailable(&chain(&error)))?;
        let missing =
            |name: &str| unavailable(&format!("{url}: the discovery document has no `{name}`"));
        let authorization = settings.authorization_url.clone();
        let authorization = authorization.or(found.authorization_endpoint);
        let authorization = authorization.ok_or_else(|| missing("authorization_endpoint"))?;
        let token = settings.token_url.clone().or(found.token_endpoint);
        let token = token.ok_or_else(|| missing("token_endpoint"))?;
        let methods = found.token_endpoint_auth_methods_supported.as_deref();
        let has = |name: &str| methods.is_some_and(|methods| methods.iter().any(|one| one == name));
        Ok(Endpoints {
            is_secret_in_form: has("client_secret_post") && !has("client_secret_basic"),
            has_issuer: found.authorization_response_iss_parameter_supported,
            ..self.checked(&authorization, token)?
        })
    }

    fn checked(&self, authorization: &str, token: String) -> Result<Endpoints, Error> {
        for url in [authorization, &token] {
            if let Some(problem) = url_problem(url, self.issuer().allow_http) {
                return Err(unavailable(&format!("endpoint {url:?}: {problem}")));
            }
        }
        let authorization = Url::parse(authorization)
            .map_err(|error| unavailable(&format!("authorization endpoint: {error}")))?;
        Ok(Endpoints {
            authorization,
            token,
            is_secret_in_form: false,
            has_issuer: false,
        })
    }
}

fn read_secret(path: &Path) -> Result<Secret, SignInError> {
    let bytes =
        trusted_file::read(path, SECRET_BYTES_MAX, SECRET).map_err(SignInError::SecretFile)?;
    let text = str::from_utf8(&bytes)
        .ok()
        .map(|text| text.trim_end_matches(['\r', '\n']));
    let text = text.filter(|text| !text.is_empty() && !text.contains(char::is_control));
    match text {
        Some(text) => Ok(Secret(Zeroizing::new(text.to_owned()))),
        None => Err(SignInError::Secret(path.display().to_string())),
    }
}

fn random() -> Result<String, Error> {
    let mut bytes = [0; RANDOM_BYTES];
    rand::fill(&mut bytes).map_err(|_| Error::new(Reason::Bug, "no random bytes"))?;
    Ok(Base64UrlUnpadded::encode_string(&bytes))
}

fn encoded(text: &str) -> String {
    form_urlencoded::byte_serialize(text.as_bytes()).collect()
}

fn unavailable(detail: &str) -> Error {
    Error::new(Reason::IdentityDown, format!("sign-in: {detail}")).retry_after(RETRY)
}

fn refuse<T>(detail: &str) -> Result<T, Error> {
    Err(Error::new(Reason::Credential, format!("sign-in: {detail}")))
}
