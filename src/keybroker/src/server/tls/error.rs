//! Why the TLS files of a listener are refused.

use std::path::Path;

use x509_parser::{error::X509Error, nom};

use keybroker_core::{call::Timestamp, pem, trusted_file};

use super::revocation::{ListsError, MemoryError};

/// Why the TLS files of a listener are refused. The text names the setting or the file, and the remedy where there is one.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file was not read.
    #[error("`{setting}`")]
    File {
        /// The setting that names the file.
        setting: &'static str,
        /// Why it was not read.
        source: Box<trusted_file::Error>,
    },
    /// A file is not the PEM that it should be.
    #[error("`{setting}` {path}")]
    Pem {
        /// The setting that names the file.
        setting: &'static str,
        /// The file.
        path: String,
        /// What is wrong with it.
        source: pem::Error,
    },
    /// Client certificates are asked for, and no authority is configured.
    #[error(
        "client certificates are asked for, but `client_ca_file` is not set; without it no client could be authenticated"
    )]
    NoAuthorities,
    /// The file of the server's certificate holds none.
    #[error("{path} holds no PEM certificate")]
    NoCertificate {
        /// The file.
        path: String,
    },
    /// The server's certificate does not parse.
    #[error("{path} does not parse")]
    Certificate {
        /// The file.
        path: String,
        /// Where the parser stopped.
        source: nom::Err<X509Error>,
    },
    /// The server's certificate is no longer valid.
    #[error("{path} expired on {until}; every client would refuse it: renew it")]
    Expired {
        /// The file.
        path: String,
        /// Its last second.
        until: Timestamp,
    },
    /// The server's certificate is not valid yet.
    #[error("{path} is not valid before {from}; look at the clock of this machine")]
    NotYetValid {
        /// The file.
        path: String,
        /// Its first second.
        from: Timestamp,
    },
    /// The certificate of the key is not the first one of the chain.
    #[error(
        "{path}: the certificate of the key {key_path} is number {number} of {count}; it must be the first, and each \
         certificate after it the issuer of the one before"
    )]
    ChainOrder {
        /// The file of the chain.
        path: String,
        /// The file of the key.
        key_path: String,
        /// Where in the chain it is, counted from 1.
        number: usize,
        /// Certificates of the chain.
        count: usize,
    },
    /// The key belongs to another certificate.
    #[error(
        "`key_file` {key_path} is not the private key of the certificate in `certificate_file` {path}; were both renewed \
         together?"
    )]
    OtherKey {
        /// The file of the chain.
        path: String,
        /// The file of the key.
        key_path: String,
    },
    /// The TLS library refuses certificate and key for another reason.
    #[error("{path} and {key_path} cannot be used")]
    Unusable {
        /// The file of the chain.
        path: String,
        /// The file of the key.
        key_path: String,
        /// What the library says.
        source: rustls::Error,
    },
    /// The file of the authorities holds something else.
    #[error("{path} holds a certificate that is no CA")]
    Authority {
        /// The file.
        path: String,
        /// What the library says.
        source: rustls::Error,
    },
    /// No verifier of client certificates could be made.
    #[error("{path} and its revocation lists cannot be used")]
    Verifier {
        /// The file of the authorities.
        path: String,
        /// What the library says.
        source: rustls::server::VerifierBuilderError,
    },
    /// The revocation lists are refused. Their error completes the sentence.
    #[error("`client_crl_file` {path} {problem}")]
    Lists {
        /// The file.
        path: String,
        /// What is wrong with the lists.
        #[source]
        problem: Box<ListsError>,
    },
    /// What was accepted before is not known, or cannot be stored.
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

/// A path as the messages show it.
pub(super) fn shown(path: &Path) -> String {
    path.display().to_string()
}
