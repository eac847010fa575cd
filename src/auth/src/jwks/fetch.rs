//! Fetches a key set over HTTP.
//!
//! Keys are fetched only from the configured URL, or from the URL in the issuer's discovery document.

use crate::{
    http::Http,
    issuer::{KeySource, Settings, url_problem},
};

use super::{KeySet, SourceError};

/// Fetches the key set of one issuer.
#[derive(Debug)]
pub(super) struct Fetcher {
    http: Http,
    source: KeySource,
    issuer: String,
    allow_http: bool,
}

impl Fetcher {
    /// Creates a fetcher for an issuer whose keys come from a URL.
    pub(super) fn new(settings: &Settings) -> Result<Self, SourceError> {
        Ok(Self {
            http: Http::new(settings)?,
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
        let bytes = self.http.get(&url).await?;
        // The key set is parsed in a separate thread, because parsing a set with many long RSA keys
        // takes a large part of a second.
        let parsing = tokio::task::spawn_blocking(move || KeySet::parse_jwks(&bytes));
        let parsed = parsing.await.map_err(SourceError::Task)?;
        parsed.map_err(|source| SourceError::Set { place: url, source })
    }

    async fn discover(&self, url: &str) -> Result<String, SourceError> {
        let document = self.http.discovery(url, &self.issuer).await?;
        match url_problem(&document.jwks_uri, self.allow_http) {
            Some(problem) => Err(SourceError::KeysUrl {
                url: url.to_owned(),
                jwks_uri: document.jwks_uri,
                problem,
            }),
            None => Ok(document.jwks_uri),
        }
    }
}
