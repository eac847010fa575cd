//! Requests to OpenID providers.
//!
//! The HTTP client follows no redirect, ignores proxies from the environment, and limits the size and time of an answer.

use std::{path::Path, time::Duration};

use reqwest::{Certificate, Client, RequestBuilder, Response, StatusCode, redirect};
use serde::Deserialize;

use crate::{
    issuer::Settings,
    jwks::{error::SourceError, limits::SET_BYTES_MAX},
};
use keybroker_core::{
    pem,
    trusted_file::{self, Purpose},
};

/// Longest CA file, in bytes. The CA file of a Linux distribution is about 0.3 MiB long.
const AUTHORITIES_BYTES_MAX: u64 = 4 * 1024 * 1024;
const AUTHORITIES: Purpose =
    Purpose::trust("other users could decide whose access tokens are accepted");

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Time limit for one request, from the connection to the last byte.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// The HTTP client for one issuer.
#[derive(Debug)]
pub(crate) struct Http(Client);

/// The discovery document of an OpenID provider.
#[derive(Debug, Deserialize)]
pub(crate) struct Discovery {
    issuer: String,
    pub(crate) jwks_uri: String,
    pub(crate) authorization_endpoint: Option<String>,
    pub(crate) token_endpoint: Option<String>,
    pub(crate) token_endpoint_auth_methods_supported: Option<Vec<String>>,
    #[serde(default)]
    pub(crate) authorization_response_iss_parameter_supported: bool,
}

/// The answer to a form that was sent to a provider.
pub(crate) struct FormAnswer {
    pub(crate) status: StatusCode,
    pub(crate) body: Vec<u8>,
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

impl Http {
    pub(crate) fn new(settings: &Settings) -> Result<Self, SourceError> {
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
        builder.build().map(Self).map_err(SourceError::Client)
    }

    /// Fetches a JSON document.
    pub(crate) async fn get(&self, url: &str) -> Result<Vec<u8>, SourceError> {
        let response = send(url, self.0.get(url)).await?;
        let status = response.status();
        if status != StatusCode::OK {
            return Err(SourceError::Status {
                url: url.to_owned(),
                status,
            });
        }
        read(url, response).await
    }

    /// Fetches a discovery document, and checks that the document is for this issuer.
    pub(crate) async fn discovery(
        &self,
        url: &str,
        issuer: &str,
    ) -> Result<Discovery, SourceError> {
        let bytes = self.get(url).await?;
        let url = || url.to_owned();
        let document: Discovery = serde_json::from_slice(&bytes)
            .map_err(|source| SourceError::Discovery { url: url(), source })?;
        if document.issuer == issuer {
            return Ok(document);
        }
        Err(SourceError::OtherIssuer {
            url: url(),
            found: document.issuer,
            configured: issuer.to_owned(),
        })
    }

    /// Sends a form. `client` is the id and the secret of the client for HTTP Basic authentication.
    pub(crate) async fn post_form(
        &self,
        url: &str,
        form: String,
        client: Option<(&str, &str)>,
    ) -> Result<FormAnswer, SourceError> {
        let mut request = self
            .0
            .post(url)
            .header("content-type", "application/x-www-form-urlencoded")
            .body(form);
        if let Some((id, secret)) = client {
            request = request.basic_auth(id, Some(secret));
        }
        let response = send(url, request).await?;
        let status = response.status();
        let body = read(url, response).await?;
        Ok(FormAnswer { status, body })
    }
}

async fn send(url: &str, request: RequestBuilder) -> Result<Response, SourceError> {
    let sending = request.header("accept", "application/json").send();
    let response = sending.await.map_err(|error| failed(url, error))?;
    let status = response.status();
    if status.is_redirection() {
        return Err(SourceError::Redirect {
            url: url.to_owned(),
            status,
        });
    }
    Ok(response)
}

async fn read(url: &str, mut response: Response) -> Result<Vec<u8>, SourceError> {
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|error| failed(url, error))? {
        if bytes.len() + chunk.len() > SET_BYTES_MAX {
            return Err(SourceError::TooLong {
                url: url.to_owned(),
            });
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
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
