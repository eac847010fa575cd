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
    time::Duration,
};

use aws_lc_rs::{digest, rand};
use base64ct::{Base64UrlUnpadded, Encoding as _};
use zeroize::Zeroizing;

use keybroker_core::{
    error::{Error, Reason, chain},
    principal::Principal,
    sign_in::{Answer, Begun},
    trusted_file::{self, Purpose},
};

use super::{
    http::Http,
    jwks::SourceError,
    token::{IdTokens, Tokens},
};

mod endpoints;
mod exchange;

pub use endpoints::endpoint_problem;

use endpoints::{Endpoints, Finder};

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
    http: Arc<Http>,
    tokens: IdTokens,
    endpoints: Arc<Finder>,
}

/// A client secret, which has no readable `Debug` output.
struct Secret(Zeroizing<String>);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[secret]")
    }
}

impl Provider {
    /// Creates the client of a provider. The provider may be unavailable.
    pub fn new(tokens: &Tokens, settings: Settings) -> Result<Self, SignInError> {
        let id_tokens = tokens
            .id_tokens(&settings.issuer, &settings.client_id)
            .ok_or_else(|| SignInError::NoIssuer(settings.issuer.clone()))?;
        let secret = settings.client_secret_file.as_deref().map(read_secret);
        let secret = secret.transpose()?;
        let http = Arc::new(Http::new(id_tokens.settings())?);
        let endpoints = Finder::new(Arc::clone(&http), id_tokens.settings(), &settings);
        Ok(Self {
            settings,
            secret,
            http,
            tokens: id_tokens,
            endpoints: Arc::new(endpoints),
        })
    }

    /// Begins a sign-in. With `max_age`, the provider must ask for the credentials again, and must say when the person
    /// authenticated.
    pub async fn begin(&self, max_age: Option<Duration>) -> Result<Begun, Error> {
        let endpoints = self.endpoints.find().await?;
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
        let endpoints = self.endpoints.find().await?;
        let issuer = &self.tokens.settings().issuer;
        let is_other = match &answer.issuer {
            Some(found) => found != issuer,
            None => endpoints.has_issuer,
        };
        if is_other {
            return Err(refused(
                "the answer is not from the configured issuer: its `iss` differs or is missing",
            ));
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
        exchange::id_token(url, &sent)
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

fn refused(detail: &str) -> Error {
    Error::new(Reason::Credential, format!("sign-in: {detail}"))
}
