//! Why the TLS files of a listener are refused.

use std::path::Path;

use x509_parser::{error::X509Error, nom};

use keybroker_core::{call::Timestamp, pem, trusted_file};

use super::revocation::{ListsError, MemoryError};

/// Why the TLS files of a listener are refused. The message has the setting or the file, and a remedy if there is one.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read.
    #[error("`{setting}`")]
    File {
        /// The setting with the path of the file.
        setting: &'static str,
        /// Why the file could not be read.
        source: Box<trusted_file::Error>,
    },
    /// A file does not have the required PEM content.
    #[error("`{setting}` {path}")]
    Pem {
        /// The setting with the path of the file.
        setting: &'static str,
        /// The file.
        path: String,
        /// The problem of the file.
        source: pem::Error,
    },
    /// Client certificates are requested, but no CA is configured.
    #[error(
        "`client_certificates` requests client certificates, but `client_ca_file` is not set; the broker needs \
         `client_ca_file` to verify client certificates"
    )]
    NoAuthorities,
    /// The file of the server's certificate has no certificate.
    #[error("{path} has no PEM certificate")]
    NoCertificate {
        /// The file.
        path: String,
    },
    /// The server's certificate does not parse.
    #[error("{path} cannot be parsed")]
    Certificate {
        /// The file.
        path: String,
        /// Where the parser stopped.
        source: nom::Err<X509Error>,
    },
    /// The server's certificate is no longer valid.
    #[error(
        "{path} expired on {until}, so every client would refuse the certificate; renew the certificate"
    )]
    Expired {
        /// The file.
        path: String,
        /// Last second of the certificate's validity.
        until: Timestamp,
    },
    /// The server's certificate is not valid yet.
    #[error("{path} is not valid before {from}; check the clock of this machine")]
    NotYetValid {
        /// The file.
        path: String,
        /// First second of the certificate's validity.
        from: Timestamp,
    },
    /// The certificate that belongs to the private key is not the first certificate in the chain.
    #[error(
        "{path}: the certificate that belongs to the key {key_path} is number {number} of {count}; it must be the \
         first, and each further certificate must be the issuer of the previous one"
    )]
    ChainOrder {
        /// The file of the certificate chain.
        path: String,
        /// The file of the private key.
        key_path: String,
        /// Position of the certificate in the chain, starting at 1.
        number: usize,
        /// Number of certificates in the chain.
        count: usize,
    },
    /// The private key belongs to another certificate.
    #[error(
        "`key_file` {key_path} is not the private key of the certificate in `certificate_file` {path}; check that both \
         were renewed together"
    )]
    OtherKey {
        /// The file of the certificate chain.
        path: String,
        /// The file of the private key.
        key_path: String,
    },
    /// The TLS library refuses the certificate and the private key for another reason.
    #[error("{path} and {key_path} cannot be used")]
    Unusable {
        /// The file of the certificate chain.
        path: String,
        /// The file of the private key.
        key_path: String,
        /// The error of the library.
        source: rustls::Error,
    },
    /// The file of the CA certificates has a certificate that is not a CA certificate.
    #[error("{path} has a certificate that is not a CA certificate")]
    Authority {
        /// The file.
        path: String,
        /// The error of the library.
        source: rustls::Error,
    },
    /// The library could not make a verifier of client certificates.
    #[error("{path} and its revocation lists cannot be used")]
    Verifier {
        /// The file of the CA certificates.
        path: String,
        /// The error of the library.
        source: rustls::server::VerifierBuilderError,
    },
    /// The revocation lists are refused. The error of the lists completes the message.
    #[error("`client_crl_file` {path}: {problem}")]
    Lists {
        /// The file.
        path: String,
        /// The problem of the lists.
        #[source]
        problem: Box<ListsError>,
    },
    /// The accepted revocation lists could not be read or stored.
    #[error(transparent)]
    Memory(Box<MemoryError>),
}

impl From<MemoryError> for Error {
    fn from(error: MemoryError) -> Self {
        Self::Memory(Box::new(error))
    }
}

impl Error {
    pub(super) fn lists(path: Option<&Path>, problem: ListsError) -> Self {
        Self::Lists {
            path: shown(path.unwrap_or(Path::new(""))),
            problem: Box::new(problem),
        }
    }

    pub(super) fn certificate(path: &Path, source: nom::Err<X509Error>) -> Self {
        Self::Certificate {
            path: shown(path),
            source,
        }
    }
}

/// Formats a path for messages.
pub(super) fn shown(path: &Path) -> String {
    path.display().to_string()
}
