//! Fetches a key set over HTTP.
//!
//! Keys are fetched only from the configured URL, or from the URL in the issuer's discovery document. The HTTP client
//! follows no redirect, ignores proxies from the environment, and limits the size and time of an answer.

use std::{path::Path, time::Duration};

use reqwest::{Certificate, Client, redirect};
use serde::Deserialize;

use crate::issuer::{KeySource, Settings, url_problem};
use keybroker_core::{
    pem,
    trusted_file::{self, Purpose},
};

use super::{KeySet, SET_BYTES_MAX, SourceError};

/// Longest CA file, in bytes. The CA file of a Linux distribution is about 0.3 MiB long.
const AUTHORITIES_BYTES_MAX: u64 = 4 * 1024 * 1024;
const AUTHORITIES: Purpose =
    Purpose::trust("other users could decide whose access tokens are accepted");

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Time limit for one request, from the connection to the last byte.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Fetches the key set of one issuer.
#[derive(Debug)]
pub(super) struct Fetcher {
    client: Client,
    source: KeySource,
    issuer: String,
    allow_http: bool,
}

#[derive(Deserialize)]
struct Discovery {
    issuer: String,
    jwks_uri: String,
}

/// Reads the CAs of a `ca_file`.
fn authorities(path: &Path) -> Result<Vec<Certificate>, SourceError> {
    let text = trusted_file::read(path, AUTHORITIES_BYTES_MAX, AUTHORITIES)
        .map_err(|error| SourceError::AuthorityFile(Box::new(error)))?;
    let shown = || path.display().to_string();
    let ders = pem::certificates(&text).map_err(|source| SourceError::AuthorityPem {
        path: shown(),
        source,
    })?;
    tracing::info!(
        file = shown(),
        certificates = ders.len(),
        "the CA certificates in `ca_file` of an issuer were read"
    );
    ders.iter()
        .map(|der| Certificate::from_der(der))
        .collect::<Result<_, _>>()
        .map_err(|source| SourceError::Authority {
            path: shown(),
            source,
        })
}

impl Fetcher {
    /// Creates a fetcher for an issuer whose keys come from a URL.
    pub(super) fn new(settings: &Settings) -> Result<Self, SourceError> {
        let mut builder = Client::builder()
            .user_agent(concat!("keybroker/", env!("CARGO_PKG_VERSION")))
            .redirect(redirect::Policy::none())
            .referer(false)
            .no_proxy()
            .https_only(!settings.allow_http)
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(REQUEST_TIMEOUT)
            .pool_max_idle_per_host(0);
        if let Some(path) = &settings.ca_file {
            builder = builder.tls_certs_only(authorities(path)?);
        }
        let client = builder.build().map_err(SourceError::Client)?;
        Ok(Self {
            client,
            source: settings.key_source(),
            issuer: settings.issuer.clone(),
            allow_http: settings.allow_http,
        })
    }

    /// Fetches the key set. If the URL of the key set is in a discovery document, the function
    /// fetches the discovery document first.
    pub(super) async fn fetch(&self) -> Result<KeySet, SourceError> {
        let url = match &self.source {
            KeySource::Discovery(url) => self.discover(url).await?,
            KeySource::Url(url) => url.clone(),
            KeySource::Set(_) | KeySource::Pem(_) => return Err(SourceError::OtherSource),
        };
        let bytes = self.get(&url).await?;
        // The key set is parsed in a separate thread, because parsing a set with many long RSA keys
        // takes a large part of a second.
        let parsing = tokio::task::spawn_blocking(move || KeySet::parse_jwks(&bytes));
        let parsed = parsing.await.map_err(SourceError::Task)?;
        parsed.map_err(|source| SourceError::Set { place: url, source })
    }

    async fn discover(&self, url: &str) -> Result<String, SourceError> {
        let bytes = self.get(url).await?;
        let url = || url.to_owned();
        let document: Discovery = serde_json::from_slice(&bytes)
            .map_err(|source| SourceError::Discovery { url: url(), source })?;
        if document.issuer != self.issuer {
            return Err(SourceError::OtherIssuer {
                url: url(),
                found: document.issuer,
                configured: self.issuer.clone(),
            });
        }
        match url_problem(&document.jwks_uri, self.allow_http) {
            Some(problem) => Err(SourceError::KeysUrl {
                url: url(),
                jwks_uri: document.jwks_uri,
                problem,
            }),
            None => Ok(document.jwks_uri),
        }
    }

    async fn get(&self, url: &str) -> Result<Vec<u8>, SourceError> {
        let request = self.client.get(url).header("accept", "application/json");
        let failed = |error: reqwest::Error| failed(url, error);
        let url = || url.to_owned();
        let mut response = request.send().await.map_err(failed)?;
        let status = response.status();
        if status.is_redirection() {
            return Err(SourceError::Redirect { url: url(), status });
        }
        if status != reqwest::StatusCode::OK {
            return Err(SourceError::Status { url: url(), status });
        }
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(failed)? {
            if bytes.len() + chunk.len() > SET_BYTES_MAX {
                return Err(SourceError::TooLong { url: url() });
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }
}

/// Returns the error of a failed request. Removes the URL from the HTTP client's error, because the returned error
/// already contains the URL.
fn failed(url: &str, source: reqwest::Error) -> SourceError {
    let (url, source) = (url.to_owned(), source.without_url());
    if source.is_timeout() {
        SourceError::Timeout { url, source }
    } else {
        SourceError::Request { url, source }
    }
}
