//! Wiring of `keybroker serve`: listeners, limits, start and stop.

use std::{collections::BTreeSet, net::SocketAddr, path::PathBuf};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use keybroker_auth::token;
use keybroker_core::state::StateDirectory;

mod apis;
mod clients;
mod connection;
mod descriptors;
mod file_problems;
mod frames;
mod handshake;
mod identify;
mod listener;
mod log_limit;
mod notify;
mod opening;
mod run;
mod shared;
mod status;
mod tls;
mod unauthenticated;
mod waiting;
mod watch;
mod zeroed_reads;

pub use run::run;
pub use tls::{Contents as TlsContents, Error as TlsError};

/// An API that a listener can serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Api {
    /// User keys over gRPC.
    Grpc,
    /// The control plane over gRPC.
    Admin,
    /// User keys over REST, for Bitwarden clients.
    Rest,
}

impl Api {
    /// Its name in the configuration.
    const fn as_str(self) -> &'static str {
        match self {
            Self::Grpc => "grpc",
            Self::Admin => "admin",
            Self::Rest => "rest",
        }
    }
}

/// Whether a listener asks for client certificates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClientCertificates {
    /// A connection without an accepted one is refused.
    #[default]
    Required,
    /// Accepted when sent; a call without one is `CREDENTIAL`.
    Optional,
    /// Never asked for; every call brings its credential in a header.
    None,
}

/// From where a listener without TLS may be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Plaintext {
    /// This machine.
    Loopback,
    /// Any address: everyone on the network path can read keys and tokens.
    Any,
}

/// TLS of a listener. All files are PEM and are read again on SIGHUP and when their content changes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsSettings {
    /// Certificate chain, leaf first.
    pub certificate_file: PathBuf,
    /// Private key; only its owner may read it.
    pub key_file: PathBuf,
    /// CA certificates that client certificates must chain to.
    pub client_ca_file: Option<PathBuf>,
    /// Revocation lists of those CAs; without it certificates are not checked for revocation.
    pub client_crl_file: Option<PathBuf>,
    /// Certificates of further authorities whose lists are in that file, such as intermediate CAs. They are no trust anchors: their lists
    /// are verified with them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_crl_issuers_file: Option<PathBuf>,
    /// Whether a client certificate must have the `extendedKeyUsage` `clientAuth`; otherwise one without any is accepted, too.
    #[serde(default = "default_client_auth_usage_required")]
    pub client_auth_usage_required: bool,
    /// Trust domains of SPIFFE ids that are accepted here; empty: any.
    #[serde(default)]
    pub trust_domains: BTreeSet<String>,
}

const fn default_client_auth_usage_required() -> bool {
    true
}

/// One `[[listener]]` of the configuration.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListenerSettings {
    /// Address and port.
    pub address: SocketAddr,
    /// The APIs that it serves. Earlier releases called this setting `doors`.
    #[serde(alias = "doors")]
    pub apis: Vec<Api>,
    /// TLS; required unless `plaintext` says otherwise.
    pub tls: Option<TlsSettings>,
    /// HTTP without TLS, for a proxy that ends TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plaintext: Option<Plaintext>,
    /// Whether client certificates are asked for.
    #[serde(default)]
    pub client_certificates: ClientCertificates,
    /// Networks of load balancers and proxies. Their connections carry many clients, so only the limits for all connections
    /// together apply to them, not those for one network or one principal.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trusted_proxies: Vec<IpNet>,
}

impl ListenerSettings {
    /// Reads the TLS files as `serve` would, and says how much each gave; nothing for a listener without TLS. The error
    /// names the file and the remedy.
    pub fn check_tls(&self) -> Result<Option<TlsContents>, TlsError> {
        Ok(self.load_tls(None)?.map(|tls| tls.contents()))
    }

    fn load_tls(&self, state: Option<&StateDirectory>) -> Result<Option<tls::Tls>, TlsError> {
        let Some(files) = &self.tls else {
            return Ok(None);
        };
        let mut protocols = vec![b"h2".to_vec()];
        if self.apis.contains(&Api::Rest) {
            protocols.push(handshake::ALPN_HTTP1.to_vec());
        }
        tls::Tls::load(files.clone(), self.client_certificates, protocols, state).map(Some)
    }
}

/// The `[status]` section: plain HTTP for probes and metrics.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StatusSettings {
    /// A loopback address and port for `/livez`, `/readyz` and `/metrics`.
    pub address: SocketAddr,
    /// The same answers on an address that other machines reach.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote: Option<RemoteStatusSettings>,
}

/// The `[status.remote]` section: a listener for a central collector of metrics.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemoteStatusSettings {
    /// Address and port.
    pub address: SocketAddr,
    /// TLS. With `client_ca_file`, a client certificate is required.
    pub tls: Option<TlsSettings>,
    /// HTTP without TLS; only `any` has a meaning here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plaintext: Option<Plaintext>,
}

impl RemoteStatusSettings {
    /// Whether clients must have a certificate.
    pub fn client_certificates(&self) -> ClientCertificates {
        let has_authorities = self
            .tls
            .as_ref()
            .is_some_and(|tls| tls.client_ca_file.is_some());
        if has_authorities {
            ClientCertificates::Required
        } else {
            ClientCertificates::None
        }
    }

    /// Reads the TLS files as `serve` would.
    pub fn check_tls(&self) -> Result<Option<TlsContents>, TlsError> {
        Ok(self.load_tls(None)?.map(|tls| tls.contents()))
    }

    fn load_tls(&self, state: Option<&StateDirectory>) -> Result<Option<tls::Tls>, TlsError> {
        let Some(files) = &self.tls else {
            return Ok(None);
        };
        let protocols = vec![handshake::ALPN_HTTP1.to_vec()];
        tls::Tls::load(files.clone(), self.client_certificates(), protocols, state).map(Some)
    }
}

/// The `[limits]` section. Every limit has a default; none can be switched off.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Open connections, all listeners together.
    pub connections_max: usize,
    /// Open connections of one principal.
    pub connections_per_principal_max: usize,
    /// Time for a TLS handshake.
    pub handshake_timeout_ms: u64,
    /// Calls under way on one connection.
    pub streams_per_connection_max: u32,
    /// The same on a connection without an accepted client certificate.
    pub streams_without_certificate_max: u32,
    /// Bytes of gRPC messages under way, all connections together; the first 4 KiB of each message do not count.
    pub message_bytes_max: usize,
    /// Deadline of a call that brings none, and the longest one accepted.
    pub call_timeout_max_ms: u64,
    /// An idle or old connection gets GOAWAY at this age.
    pub connection_age_max_ms: u64,
    /// Time for open calls when the broker stops.
    pub drain_timeout_ms: u64,
    /// Longest access token, in bytes.
    pub access_token_bytes_max: usize,
    /// gRPC reflection.
    pub reflection: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_max: 4_096,
            connections_per_principal_max: 1_024,
            handshake_timeout_ms: 5_000,
            streams_per_connection_max: 128,
            streams_without_certificate_max: 32,
            message_bytes_max: 64 * 1_024 * 1_024,
            call_timeout_max_ms: 30_000,
            connection_age_max_ms: 3_600_000,
            drain_timeout_ms: 30_000,
            access_token_bytes_max: token::TOKEN_BYTES_MAX,
            reflection: false,
        }
    }
}
