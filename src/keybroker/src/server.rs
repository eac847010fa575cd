//! `keybroker serve`: the listeners, the limits, and the start and stop of the broker.

use std::{collections::BTreeSet, net::SocketAddr, path::PathBuf};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use keybroker_auth::token;
use keybroker_core::state::StateDirectory;

mod apis;
mod clients;
mod connection;
mod connection_service;
mod console;
mod descriptors;
mod file_problems;
mod frames;
mod handshake;
mod identify;
mod listener;
mod log_limit;
mod notices;
mod notify;
mod opening;
mod run;
mod shared;
mod status;
mod tls;
mod token_reload;
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
    /// The page for approvers.
    Console,
}

impl Api {
    /// The name of the API in the configuration.
    const fn as_str(self) -> &'static str {
        match self {
            Self::Grpc => "grpc",
            Self::Admin => "admin",
            Self::Rest => "rest",
            Self::Console => "console",
        }
    }
}

/// Whether a listener requests client certificates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClientCertificates {
    /// The listener closes a connection without an accepted certificate.
    #[default]
    Required,
    /// The listener accepts connections without a certificate. A call without any credential is refused with `CREDENTIAL`.
    Optional,
    /// The listener does not request certificates. Every call must have a credential in a header.
    None,
}

/// The addresses that are permitted for a listener without TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Plaintext {
    /// Loopback addresses only.
    Loopback,
    /// Any address. With the value `any`, anyone on the network path can read keys and access
    /// tokens.
    Any,
}

/// TLS settings of a listener. All files have the PEM format. The broker reads the files again on
/// SIGHUP and when their content changes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsSettings {
    /// File with the certificate chain, which begins with the server's certificate.
    pub certificate_file: PathBuf,
    /// File with the private key; other users must not have permission to read the file.
    pub key_file: PathBuf,
    /// File with the CA certificates that verify client certificates.
    pub client_ca_file: Option<PathBuf>,
    /// File with the revocation lists of the CAs in `client_ca_file`. If this setting is missing,
    /// the broker does not check whether client certificates were revoked.
    pub client_crl_file: Option<PathBuf>,
    /// File with the certificates of further CAs whose lists are in `client_crl_file`, such as
    /// intermediate CAs. The certificates in this file only verify revocation lists and are not
    /// trust anchors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_crl_issuers_file: Option<PathBuf>,
    /// Whether a client certificate must have the `extendedKeyUsage` `clientAuth`. If the value is
    /// false, the broker also accepts certificates without `extendedKeyUsage`.
    #[serde(default = "default_client_auth_usage_required")]
    pub client_auth_usage_required: bool,
    /// Trust domains whose SPIFFE ids the broker accepts. If this set is empty, the broker accepts
    /// every trust domain.
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
    /// Networks of load balancers and proxies, whose connections transport calls of many clients.
    /// The limits for one network or one principal do not apply to the connections of trusted
    /// proxies. Of the limits on connections, only the limits for all connections together apply to
    /// trusted proxies.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trusted_proxies: Vec<IpNet>,
}

impl ListenerSettings {
    /// Reads the TLS files in the same way as `serve`, and returns the numbers of certificates and
    /// lists; `None` for a listener without TLS. The error message contains the file and the
    /// solution.
    pub fn check_tls(&self) -> Result<Option<TlsContents>, TlsError> {
        Ok(self.load_tls(None)?.map(|tls| tls.contents()))
    }

    fn load_tls(&self, state: Option<&StateDirectory>) -> Result<Option<tls::Tls>, TlsError> {
        let Some(files) = &self.tls else {
            return Ok(None);
        };
        let mut protocols = vec![b"h2".to_vec()];
        if self.apis.contains(&Api::Rest) || self.apis.contains(&Api::Console) {
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
    /// Whether clients must present a certificate: `Required` if `client_ca_file` is set.
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

    /// Reads the TLS files of the remote status listener in the same way as `serve`, and returns
    /// the numbers of certificates and lists; `None` without TLS.
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
    /// Maximum duration of a TLS handshake, in milliseconds.
    pub handshake_timeout_ms: u64,
    /// Maximum number of concurrent calls on one connection.
    pub streams_per_connection_max: u32,
    /// Maximum number of concurrent calls on a connection without an accepted client certificate.
    pub streams_without_certificate_max: u32,
    /// Maximum total size of the gRPC messages in progress on all connections, in bytes. The first
    /// 4 KiB of each message do not count towards this limit.
    pub message_bytes_max: usize,
    /// Maximum duration of a call in milliseconds, and the deadline of calls that set no deadline.
    pub call_timeout_max_ms: u64,
    /// Age in milliseconds at which a connection receives GOAWAY.
    pub connection_age_max_ms: u64,
    /// Maximum time for which a stopping broker waits for open calls, in milliseconds.
    pub drain_timeout_ms: u64,
    /// Maximum length of an access token, in bytes.
    pub access_token_bytes_max: usize,
    /// Whether the broker offers gRPC server reflection.
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
