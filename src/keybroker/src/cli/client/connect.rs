//! Connections to a broker, for `client` and `bench`.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Args;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use zeroize::Zeroizing;

use crate::cli::exit::{Exit, Failure};
use keybroker_auth::PeerCertificate;
use keybroker_core::{
    error::root_cause,
    pem,
    trusted_file::{self, Purpose},
};

/// Longest PEM file, in bytes; the authorities of a Linux distribution have 0.3 MiB.
const PEM_BYTES_MAX: u64 = 4 * 1024 * 1024;
const AUTHORITIES: Purpose = Purpose::trust("other users could decide which broker is believed");
const CERTIFICATE: Purpose = Purpose::trust("other users could replace the client certificate");
const KEY: Purpose = Purpose::secret("private key");

/// Which broker, and who we are to it.
#[derive(Args, Clone, Debug)]
pub(in crate::cli) struct Connection {
    /// The broker, `https://host:port`
    #[arg(long, env = "KEYBROKER_ENDPOINT", value_name = "URL")]
    pub(in crate::cli) endpoint: Option<String>,
    /// PEM file with the CA of the broker's certificate
    #[arg(long, env = "KEYBROKER_CA", value_name = "FILE")]
    ca: PathBuf,
    /// PEM file with our certificate chain, if we have one
    #[arg(long, env = "KEYBROKER_CERT", value_name = "FILE", requires = "key")]
    cert: Option<PathBuf>,
    /// PEM file with our private key
    #[arg(long, env = "KEYBROKER_KEY", value_name = "FILE", requires = "cert")]
    key: Option<PathBuf>,
    /// Longest wait for the connection, and for each answer
    #[arg(
        long, env = "KEYBROKER_TIMEOUT_MS", default_value_t = 10_000, value_name = "MILLISECONDS",
        value_parser = clap::value_parser!(u64).range(1..=600_000)
    )]
    timeout_ms: u64,
}

impl Connection {
    /// The endpoint that was named.
    pub(in crate::cli) fn named_endpoint(&self) -> Result<String, Failure> {
        self.endpoint.clone().ok_or_else(|| {
            Failure::new(Exit::Usage, "it is not said which broker to call")
                .hint("name it with --endpoint https://host:port or KEYBROKER_ENDPOINT")
        })
    }

    /// What our certificate says of us.
    pub(in crate::cli) fn certificate(&self) -> Result<PeerCertificate, Failure> {
        let unusable = |what: String| Failure::new(Exit::Usage, format!("--cert: {what}"));
        let Some(cert) = &self.cert else {
            let what = "it is not said which certificate is ours";
            return Err(Failure::new(Exit::Usage, what).hint("name it with --cert and --key"));
        };
        let chain = pem::chain(&read("--cert", cert, CERTIFICATE)?)
            .map_err(|error| unusable(error.to_string()))?;
        let leaf = chain
            .first()
            .ok_or_else(|| unusable("no certificate".to_owned()))?;
        PeerCertificate::read(leaf).map_err(unusable)
    }

    /// Longest wait for an answer.
    pub(in crate::cli) fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }

    /// How to connect, with the TLS files read.
    pub(in crate::cli) fn endpoint(&self, url: &str) -> Result<Endpoint, Failure> {
        if !url.starts_with("https://") {
            let what = format!("--endpoint {url:?} does not begin with https://");
            return Err(Failure::new(Exit::Usage, what).hint("a broker speaks gRPC over TLS alone"));
        }
        let malformed = |option: &str, path: &Path, error: pem::Error| {
            Failure::new(Exit::Usage, format!("{option} {}: {error}", path.display()))
        };
        let authorities = pem::certificates(&read("--ca", &self.ca, AUTHORITIES)?)
            .map_err(|error| malformed("--ca", &self.ca, error))?;
        let authorities = Certificate::from_pem(pem::encode(&authorities));
        let mut tls = ClientTlsConfig::new().ca_certificate(authorities);
        if let (Some(cert), Some(key)) = (&self.cert, &self.key) {
            let chain = pem::chain(&read("--cert", cert, CERTIFICATE)?)
                .map_err(|error| malformed("--cert", cert, error))?;
            let text = read("--key", key, KEY)?;
            let key = pem::private_key(&text).map_err(|error| malformed("--key", key, error))?;
            let key = pem::encode_key(&key);
            tls = tls.identity(Identity::from_pem(pem::encode(&chain), key.as_bytes()));
        }
        let unusable = |what: &str, error: tonic::transport::Error| {
            Failure::new(Exit::Usage, format!("{what}: {}", root_cause(&error)))
        };
        let endpoint = Endpoint::from_shared(url.to_owned())
            .map_err(|error| unusable(&format!("--endpoint {url:?}"), error))?
            .tls_config(tls)
            .map_err(|error| {
                unusable("--ca, --cert and --key cannot be used", error)
                    .hint("each is a PEM file; --key must be the private key of the certificate in --cert")
            })?;
        Ok(endpoint.tcp_nodelay(true))
    }
}

/// One connection, ready for calls. tonic's own timeout ends with TCP; this one covers the TLS handshake, too.
pub(in crate::cli) async fn connect(
    endpoint: &Endpoint,
    timeout: Duration,
) -> Result<Channel, Failure> {
    let url = endpoint.uri();
    let unreachable =
        |cause: &str| Failure::new(Exit::Unreachable, format!("cannot reach {url}: {cause}"));
    let running = "look at the address, and whether the broker runs: its `/readyz` answers there";
    let Ok(connected) = tokio::time::timeout(timeout, endpoint.connect()).await else {
        return Err(unreachable("no answer within --timeout-ms").hint(running));
    };
    connected.map_err(|error| {
        let cause = root_cause(&error);
        unreachable(&cause).hint(if cause.contains("UnknownIssuer") || cause.contains("BadSignature") {
            "the broker's certificate is not signed by the CA in --ca"
        } else if cause.contains("certificate") {
            "look at the names and the dates of the broker's certificate: `openssl x509 -text -in …`"
        } else {
            running
        })
    })
}

fn read(option: &str, path: &Path, purpose: Purpose) -> Result<Zeroizing<Vec<u8>>, Failure> {
    trusted_file::read(path, PEM_BYTES_MAX, purpose)
        .map_err(|error| Failure::new(Exit::Usage, format!("{option}: {error}")))
}
