//! The errors in the TLS files of a listener.

use std::path::Path;

use x509_parser::{error::X509Error, nom};

use keybroker_core::{call::Timestamp, pem, trusted_file};

use super::revocation::{ListsError, MemoryError};

/// An error in the TLS files of a listener. The message contains the setting or the file, and the
/// solution if it is known.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read.
    #[error("`{setting}`")]
    File {
        /// Name of the setting that contains the path of the file.
        setting: &'static str,
        /// The error that occurred while the file was read.
        source: Box<trusted_file::Error>,
    },
    /// A file does not contain the required PEM data.
    #[error("`{setting}` {path}")]
    Pem {
        /// Name of the setting that contains the path of the file.
        setting: &'static str,
        /// The path of the file.
        path: String,
        /// The problem of the file.
        source: pem::Error,
    },
    /// The listener requests client certificates, but no CA for them is configured.
    #[error(
        "`client_certificates` requests client certificates, but `client_ca_file` is not set; the broker needs \
         `client_ca_file` to verify client certificates"
    )]
    NoAuthorities,
    /// The file for the server's certificate contains no certificate.
    #[error("{path} has no PEM certificate")]
    NoCertificate {
        /// The path of the file.
        path: String,
    },
    /// The server's certificate cannot be parsed.
    #[error("{path} cannot be parsed")]
    Certificate {
        /// The path of the file.
        path: String,
        /// The error of the parser.
        source: nom::Err<X509Error>,
    },
    /// The server's certificate is no longer valid.
    #[error(
        "{path} expired on {until}, so every client would refuse the certificate; renew the certificate"
    )]
    Expired {
        /// The path of the file.
        path: String,
        /// Last second of the certificate's validity.
        until: Timestamp,
    },
    /// The server's certificate is not valid yet.
    #[error("{path} is not valid before {from}; check the clock of this machine")]
    NotYetValid {
        /// The path of the file.
        path: String,
        /// First second of the certificate's validity.
        from: Timestamp,
    },
    /// The certificate of the private key is not the first certificate in the chain.
    #[error(
        "{path}: the certificate that belongs to the key {key_path} is number {number} of {count}; it must be the \
         first, followed by the certificate of its issuer and the certificates of further issuers in order"
    )]
    ChainOrder {
        /// The path of the file with the certificate chain.
        path: String,
        /// The path of the file with the private key.
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
        /// The path of the file with the certificate chain.
        path: String,
        /// The path of the file with the private key.
        key_path: String,
    },
    /// The TLS library rejects the certificate and the private key for another reason.
    #[error("{path} and {key_path} cannot be used")]
    Unusable {
        /// The path of the file with the certificate chain.
        path: String,
        /// The path of the file with the private key.
        key_path: String,
        /// The error of the library.
        source: rustls::Error,
    },
    /// The TLS library does not accept a certificate in the file of CA certificates.
    #[error("{path} has a certificate that is not a CA certificate")]
    Authority {
        /// The path of the file.
        path: String,
        /// The error of the library.
        source: rustls::Error,
    },
    /// The TLS library could not create a verifier of client certificates.
    #[error("the CA certificates in {path} and the revocation lists cannot be used")]
    Verifier {
        /// The path of the file with the CA certificates.
        path: String,
        /// The error of the library.
        source: rustls::server::VerifierBuilderError,
    },
    /// The revocation lists are refused. The source error, about the lists, completes the message.
    #[error("`client_crl_file` {path}: {problem}")]
    Lists {
        /// The path of the file.
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
