//! Fetches a key set over HTTP.
//!
//! Only from where the configuration says, or the discovery document of the issuer that the configuration names: no
//! redirect is followed, no proxy of the environment is asked, and no answer may be large or slow.

use std::{path::Path, time::Duration};

use reqwest::{Certificate, Client, redirect};
use serde::Deserialize;

use crate::issuer::{KeySource, Settings, url_problem};
use keybroker_core::{
    error::causes,
    pem,
    trusted_file::{self, Purpose},
};

use super::KeySet;

/// Longest key set and discovery document, in bytes.
pub(crate) const SET_BYTES_MAX: usize = 64 * 1024;

/// Longest file of authorities, in bytes; that of a Linux distribution has 0.3 MiB.
const AUTHORITIES_BYTES_MAX: u64 = 4 * 1024 * 1024;
const AUTHORITIES: Purpose = Purpose::trust("other users could decide whose tokens are accepted");

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// For one request, from the connection to the last byte.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Knows how to fetch the key set of one issuer.
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

/// The authorities of a `ca_file`.
fn authorities(path: &Path) -> Result<Vec<Certificate>, String> {
    let text = trusted_file::read(path, AUTHORITIES_BYTES_MAX, AUTHORITIES)
        .map_err(|error| format!("`ca_file`: {error}"))?;
    let shown = path.display();
    let ders = pem::certificates(&text).map_err(|error| format!("`ca_file` {shown}: {error}"))?;
    tracing::info!(file = %shown, certificates = ders.len(), "authorities of an issuer read");
    ders.iter()
        .map(|der| Certificate::from_der(der))
        .collect::<Result<_, _>>()
        .map_err(|error| format!("`ca_file` {shown}: {}", whole(&error)))
}

impl Fetcher {
    /// For an issuer whose keys are not in a file.
    pub(super) fn new(settings: &Settings) -> Result<Self, String> {
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
        let client = builder.build().map_err(|error| {
            format!(
                "cannot prepare to fetch its keys: {}; if this machine has no public authorities, set `ca_file`",
                whole(&error)
            )
        })?;
        Ok(Self {
            client,
            source: settings.key_source(),
            issuer: settings.issuer.clone(),
            allow_http: settings.allow_http,
        })
    }

    /// Fetches the set, by way of the discovery document where that says where it is.
    pub(super) async fn fetch(&self) -> Result<KeySet, String> {
        let url = match &self.source {
            KeySource::Discovery(url) => self.discover(url).await?,
            KeySource::Url(url) => url.clone(),
            KeySource::Set(_) | KeySource::Pem(_) => {
                return Err("its keys come from a file".to_owned());
            }
        };
        let bytes = self.get(&url).await?;
        // A set full of long RSA keys takes a good part of a second to examine.
        let parsing = tokio::task::spawn_blocking(move || KeySet::parse_jwks(&bytes));
        let parsed = parsing.await.unwrap_or_else(|error| Err(error.to_string()));
        parsed.map_err(|problem| format!("{url}: {problem}"))
    }

    async fn discover(&self, url: &str) -> Result<String, String> {
        let bytes = self.get(url).await?;
        let document: Discovery = serde_json::from_slice(&bytes)
            .map_err(|error| format!("{url}: it is not a discovery document: {error}"))?;
        if document.issuer != self.issuer {
            return Err(format!(
                "{url}: its `issuer` is {:?}, and `issuer` of the configuration is {:?}; they must be equal byte for byte; if its tokens have \
                 the configured issuer all the same, name the key set itself with `jwks_url`",
                document.issuer, self.issuer
            ));
        }
        match url_problem(&document.jwks_uri, self.allow_http) {
            Some(problem) => Err(format!(
                "{url}: its `jwks_uri` is {:?}, which {problem}",
                document.jwks_uri
            )),
            None => Ok(document.jwks_uri),
        }
    }

    async fn get(&self, url: &str) -> Result<Vec<u8>, String> {
        let failed = |error: &reqwest::Error| format!("{url}: {}", whole(error));
        let request = self.client.get(url).header("accept", "application/json");
        let mut response = request.send().await.map_err(|error| failed(&error))?;
        let status = response.status();
        if status.is_redirection() {
            return Err(format!(
                "{url}: answered {status}; redirects are not followed: configure the address that it leads to"
            ));
        }
        if status != reqwest::StatusCode::OK {
            return Err(format!("{url}: answered {status}"));
        }
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|error| failed(&error))? {
            if bytes.len() + chunk.len() > SET_BYTES_MAX {
                return Err(format!(
                    "{url}: the answer is longer than {SET_BYTES_MAX} bytes"
                ));
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }
}

/// The causes of an error, whose outermost text says only that a request failed.
fn whole(error: &reqwest::Error) -> String {
    let text = causes(error);
    if error.is_timeout() {
        return format!("no answer in time ({text})");
    }
    text
}
