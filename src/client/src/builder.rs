//! The settings of a client: endpoint, TLS, credential, deadline and retries.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use keybroker_core::{error::root_cause, key::ClientId};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use zeroize::Zeroizing;

use crate::{
    Client,
    call::Shared,
    credential::{BearerToken, ClientSecret, Credential},
    error::{BoxError, BuildError},
    link::Link,
    retry::RetryPolicy,
};

/// Default deadline of a call.
const DEADLINE: Duration = Duration::from_secs(10);
/// Longest wait for a connection: half of the default deadline, so that there is time for another attempt.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Time without traffic during a call after which the client sends an HTTP/2 ping.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(20);
/// Time without an answer to a ping after which the client closes the connection.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);
const USER_AGENT: &str = concat!("keybroker-client/", env!("CARGO_PKG_VERSION"));

/// Bytes in PEM form, or the path of a PEM file.
#[derive(Debug)]
enum Pem {
    File(PathBuf),
    Bytes(Zeroizing<Vec<u8>>),
}

impl Pem {
    fn file(path: impl AsRef<Path>) -> Self {
        Self::File(path.as_ref().to_owned())
    }

    fn bytes(pem: impl Into<Vec<u8>>) -> Self {
        Self::Bytes(Zeroizing::new(pem.into()))
    }

    fn read(&self) -> Result<Zeroizing<Vec<u8>>, BuildError> {
        match self {
            Self::Bytes(bytes) => Ok(bytes.clone()),
            Self::File(path) => fs::read(path).map(Zeroizing::new).map_err(|source| {
                let path = path.clone();
                BuildError::File { path, source }
            }),
        }
    }
}

/// A certificate chain and its private key.
struct Pair {
    certificate: Pem,
    key: Pem,
}

#[derive(Debug)]
enum Authorization {
    ApiClient(ClientId, ClientSecret),
    Bearer(BearerToken),
    Ready(Credential),
}

/// The destination of the client's calls.
enum Target {
    Endpoint(String),
    Channel(Channel),
}

/// Builds a [`Client`]. [`Client::builder`] and [`Client::builder_with_channel`] create a builder.
///
/// A client that connects to an endpoint needs `ca_file` or `ca_pem`. If several of `bearer_token`,
/// `bearer_token_provider` and `api_client` are set, the credential that was set last is used. An
/// access token or an API client replaces the client certificate, because the broker ignores the
/// certificate of a call with an `authorization` header.
#[must_use = "a builder does nothing until `build` is called"]
pub struct ClientBuilder {
    target: Target,
    ca: Option<Pem>,
    identity: Option<Pair>,
    server_name: Option<String>,
    authorization: Authorization,
    deadline: Duration,
    connect_timeout: Duration,
    retry: RetryPolicy,
}

impl std::fmt::Debug for ClientBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let endpoint = match &self.target {
            Target::Endpoint(endpoint) => endpoint.as_str(),
            Target::Channel(_) => "(a channel)",
        };
        f.debug_struct("ClientBuilder")
            .field("endpoint", &endpoint)
            .field("deadline", &self.deadline)
            .field("retry", &self.retry)
            .finish_non_exhaustive()
    }
}

impl ClientBuilder {
    pub(crate) fn to_endpoint(endpoint: String) -> Self {
        Self::new(Target::Endpoint(endpoint))
    }

    pub(crate) fn with_channel(channel: Channel) -> Self {
        Self::new(Target::Channel(channel))
    }

    fn new(target: Target) -> Self {
        Self {
            target,
            ca: None,
            identity: None,
            server_name: None,
            authorization: Authorization::Ready(Credential::Certificate),
            deadline: DEADLINE,
            connect_timeout: CONNECT_TIMEOUT,
            retry: RetryPolicy::default(),
        }
    }

    /// Trusts the CA certificates in a PEM file, which is read by [`build`](Self::build). No other CA is trusted.
    pub fn ca_file(mut self, path: impl AsRef<Path>) -> Self {
        self.ca = Some(Pem::file(path));
        self
    }

    /// Trusts the CA certificates in `pem`, and no other CA.
    pub fn ca_pem(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.ca = Some(Pem::bytes(pem));
        self
    }

    /// Authenticates with a client certificate. One PEM file contains the certificate chain, leaf first, and the other
    /// PEM file contains the private key.
    pub fn identity_files(mut self, certificate: impl AsRef<Path>, key: impl AsRef<Path>) -> Self {
        self.identity = Some(Pair {
            certificate: Pem::file(certificate),
            key: Pem::file(key),
        });
        self
    }

    /// Authenticates with a client certificate. The certificate chain, leaf first, and the private key are in PEM
    /// form.
    pub fn identity_pem(
        mut self,
        certificate: impl Into<Vec<u8>>,
        key: impl Into<Vec<u8>>,
    ) -> Self {
        self.identity = Some(Pair {
            certificate: Pem::bytes(certificate),
            key: Pem::bytes(key),
        });
        self
    }

    /// Expects this DNS name or IP address in the broker's certificate instead of the endpoint's host.
    pub fn server_name(mut self, name: impl Into<String>) -> Self {
        self.server_name = Some(name.into());
        self
    }

    /// Authenticates each call with an access token that never changes. For access tokens that expire, use
    /// [`bearer_token_provider`](Self::bearer_token_provider).
    pub fn bearer_token(mut self, token: BearerToken) -> Self {
        self.authorization = Authorization::Bearer(token);
        self
    }

    /// Authenticates each call with an access token from `provider`.
    ///
    /// The provider runs before every attempt, within the call's deadline. The provider should cache the access token
    /// and renew it before the expiry. If the provider fails, the call is not sent. The error then has the kind
    /// [`ErrorKind::Credential`](crate::ErrorKind::Credential) and the provider's error as its source.
    pub fn bearer_token_provider<P, F>(mut self, provider: P) -> Self
    where
        P: Fn() -> F + Send + Sync + 'static,
        F: Future<Output = Result<BearerToken, BoxError>> + Send + 'static,
    {
        self.authorization = Authorization::Ready(Credential::provider(provider));
        self
    }

    /// Authenticates each call as an API client of the broker, by its id and secret (`authorization: Basic`).
    pub fn api_client(mut self, id: ClientId, secret: ClientSecret) -> Self {
        self.authorization = Authorization::ApiClient(id, secret);
        self
    }

    /// Sets the deadline of each call, which includes all attempts and pauses. The default is 10 s.
    /// [`Read::deadline`](crate::Read::deadline) and [`Change::deadline`](crate::Change::deadline) set the deadline of
    /// a single call. The broker shortens a deadline that is longer than its `call_timeout_max`.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Sets the longest wait for a connection, including the TCP and TLS handshakes. Default 5 s.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// Sets how failed attempts are repeated. Default [`RetryPolicy::default`].
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.retry = policy;
        self
    }

    /// Builds the client and reads its files. [`Client::connect`] or the first call opens the
    /// connection. The client opens a lost connection again.
    ///
    /// This method must be called within a tokio runtime.
    ///
    /// # Errors
    /// Returns an error if the endpoint is not an `https` URL, no CA is set, a file cannot be read, or a certificate,
    /// private key or credential cannot be used.
    pub fn build(self) -> Result<Client, BuildError> {
        let credential = match &self.authorization {
            Authorization::ApiClient(id, secret) => Credential::api_client(*id, secret)?,
            Authorization::Bearer(token) => Credential::bearer(token)?,
            Authorization::Ready(credential) => credential.clone(),
        };
        let link = match &self.target {
            Target::Endpoint(endpoint) => Link::to(self.endpoint(endpoint)?),
            Target::Channel(channel) => Link::over(channel.clone()),
        };
        Ok(Client::new(Shared::new(
            link,
            credential,
            self.deadline,
            self.retry,
        )))
    }

    fn endpoint(&self, url: &str) -> Result<Endpoint, BuildError> {
        let unusable = |problem: String| BuildError::Endpoint {
            endpoint: url.to_owned(),
            problem,
        };
        if !url.starts_with("https://") {
            return Err(unusable(
                "must begin with https://; a broker accepts gRPC over TLS only".to_owned(),
            ));
        }
        let ca = self.ca.as_ref().ok_or(BuildError::NoCa)?.read()?;
        let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca.as_slice()));
        if let Some(name) = &self.server_name {
            tls = tls.domain_name(name.clone());
        }
        if let Some(Pair { certificate, key }) = &self.identity {
            let (certificate, key) = (certificate.read()?, key.read()?);
            tls = tls.identity(Identity::from_pem(certificate.as_slice(), key.as_slice()));
        }
        let endpoint = Endpoint::from_shared(url.to_owned())
            .and_then(|endpoint| endpoint.user_agent(USER_AGENT))
            .map_err(|error| unusable(root_cause(&error)))?
            .tls_config(tls)
            .map_err(|source| BuildError::Tls { source })?;
        Ok(endpoint
            .connect_timeout(self.connect_timeout)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn builder(endpoint: &str) -> ClientBuilder {
        Client::builder(endpoint)
    }

    #[tokio::test]
    async fn endpoints_are_https_urls() {
        for bad in [
            "http://localhost:1",
            "localhost:1",
            "https://",
            "https://a b",
            "",
        ] {
            let built = builder(bad).ca_pem("").build();
            assert!(
                matches!(built, Err(BuildError::Endpoint { .. })),
                "{bad}: {built:?}"
            );
        }
    }

    #[tokio::test]
    async fn a_ca_is_required_and_its_file_is_read() {
        let built = builder("https://localhost:1").build();
        assert!(matches!(built, Err(BuildError::NoCa)), "{built:?}");
        let built = builder("https://localhost:1")
            .ca_file("/absent/ca.pem")
            .build();
        let Err(BuildError::File { path, .. }) = built else {
            panic!("{built:?}");
        };
        assert_eq!(path, Path::new("/absent/ca.pem"));
    }

    #[tokio::test]
    async fn a_key_that_is_not_pem_is_refused_and_not_shown() {
        let built = builder("https://localhost:1")
            .ca_pem("")
            .identity_pem("certificate", "secret key")
            .build();
        assert!(matches!(built, Err(BuildError::Tls { .. })), "{built:?}");
        assert!(!format!("{built:?}").contains("secret key"));
    }

    #[tokio::test]
    async fn a_credential_that_no_header_can_carry_is_refused() {
        let channel = Endpoint::from_static("http://127.0.0.1:1").connect_lazy();
        let built = Client::builder_with_channel(channel)
            .bearer_token(BearerToken::new("a\nb"))
            .build();
        assert!(matches!(built, Err(BuildError::Credential(_))), "{built:?}");
    }
}
