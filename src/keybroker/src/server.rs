//! `keybroker serve`: listeners, limits, start and stop of the broker.

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
    /// The admin API over gRPC.
    Admin,
    /// User keys over REST, for Bitwarden clients.
    Rest,
}

impl Api {
    /// The name of the API in the configuration.
    const fn as_str(self) -> &'static str {
        match self {
            Self::Grpc => "grpc",
            Self::Admin => "admin",
            Self::Rest => "rest",
        }
    }
}

/// Whether a listener requests client certificates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClientCertificates {
    /// The listener refuses a connection without an accepted certificate.
    #[default]
    Required,
    /// The listener accepts connections without a certificate. A call without any credential is refused with `CREDENTIAL`.
    Optional,
    /// The listener does not request certificates; every call has its credential in a header.
    None,
}

/// The addresses that are allowed for a listener without TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Plaintext {
    /// Loopback addresses only.
    Loopback,
    /// Any address; everyone on the network path can read keys and access tokens.
    Any,
}

/// TLS settings of a listener. All files are PEM; the broker reads them again on SIGHUP and when their content changes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsSettings {
    /// Certificate chain; the server's certificate is the first.
    pub certificate_file: PathBuf,
    /// Private key; only its owner may read it.
    pub key_file: PathBuf,
    /// CA certificates that client certificates must chain to.
    pub client_ca_file: Option<PathBuf>,
    /// Revocation lists of the CAs in `client_ca_file`. If this file is not set, client certificates are not checked for
    /// revocation.
    pub client_crl_file: Option<PathBuf>,
    /// Certificates of further CAs whose lists are in `client_crl_file`, such as intermediate CAs. The certificates in this
    /// file only verify revocation lists and are not trust anchors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_crl_issuers_file: Option<PathBuf>,
    /// Whether a client certificate must have the `extendedKeyUsage` `clientAuth`. If the value is false, a certificate without
    /// `extendedKeyUsage` is accepted, too.
    #[serde(default = "default_client_auth_usage_required")]
    pub client_auth_usage_required: bool,
    /// Trust domains of accepted SPIFFE ids. If this set is empty, every trust domain is accepted.
    #[serde(default)]
    pub trust_domains: BTreeSet<String>,
}

const fn default_client_auth_usage_required() -> bool {
    true
}

/// A `[[listener]]` section of the configuration.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListenerSettings {
    /// Address and port.
    pub address: SocketAddr,
    /// The APIs that the listener serves. Earlier releases called this setting `doors`.
    #[serde(alias = "doors")]
    pub apis: Vec<Api>,
    /// TLS settings; required unless `plaintext` is set.
    pub tls: Option<TlsSettings>,
    /// Allows HTTP without TLS, for a listener behind a proxy that terminates TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plaintext: Option<Plaintext>,
    /// Whether the listener requests client certificates.
    #[serde(default)]
    pub client_certificates: ClientCertificates,
    /// Networks of load balancers and proxies. Connections from these networks carry calls of many clients. Only the limits for
    /// all connections together apply to these connections, and not the limits for one network or one principal.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trusted_proxies: Vec<IpNet>,
}

impl ListenerSettings {
    /// Reads the TLS files as `serve` does, and returns their contents; `None` for a listener without TLS. The error message
    /// contains the file and the remedy.
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

/// The `[status]` section: the listener that serves probes and metrics over plain HTTP.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StatusSettings {
    /// Loopback address and port for `/livez`, `/readyz` and `/metrics`.
    pub address: SocketAddr,
    /// A second status listener on an address that other machines can reach.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote: Option<RemoteStatusSettings>,
}

/// The `[status.remote]` section: a listener for a central collector of metrics.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemoteStatusSettings {
    /// Address and port.
    pub address: SocketAddr,
    /// TLS settings. If `client_ca_file` is set, clients must present a certificate.
    pub tls: Option<TlsSettings>,
    /// Allows HTTP without TLS; the only accepted value is `any`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plaintext: Option<Plaintext>,
}

impl RemoteStatusSettings {
    /// Whether clients must have a certificate, which depends on `client_ca_file`.
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

    /// Reads the TLS files of the remote status listener as `serve` does, and returns their contents; `None` without TLS.
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

/// The `[limits]` section. Every limit has a default, and no limit can be disabled.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Maximum number of open connections of all listeners together.
    pub connections_max: usize,
    /// Maximum number of open connections of one principal.
    pub connections_per_principal_max: usize,
    /// Longest time for a TLS handshake.
    pub handshake_timeout_ms: u64,
    /// Maximum number of concurrent calls on one connection.
    pub streams_per_connection_max: u32,
    /// Maximum number of concurrent calls on a connection without an accepted client certificate.
    pub streams_without_certificate_max: u32,
    /// Maximum number of bytes of gRPC messages in progress on all connections together. The first 4 KiB of each message do not
    /// count.
    pub message_bytes_max: usize,
    /// Longest time for a call, and the time limit of a call that sets no deadline.
    pub call_timeout_max_ms: u64,
    /// Age at which a connection receives GOAWAY.
    pub connection_age_max_ms: u64,
    /// Longest wait for open calls when the broker stops.
    pub drain_timeout_ms: u64,
    /// Longest access token, in bytes.
    pub access_token_bytes_max: usize,
    /// Whether gRPC reflection is offered.
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
