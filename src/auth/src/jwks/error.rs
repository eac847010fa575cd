//! The errors that explain why a key, a key set, or the source of a key set is refused.

use std::sync::Arc;

use aws_lc_rs::error::KeyRejected;
use reqwest::StatusCode;
use rsa::BigUint;
use tokio::task::JoinError;
use x509_parser::{error::X509Error, nom};

use keybroker_core::{pem, trusted_file};

use super::limits::{EXPONENT_BITS_MAX, EXPONENT_MIN, KEYS_MAX, RSA_BITS, SET_BYTES_MAX};

/// The reason why a public key is not used.
#[derive(Debug, thiserror::Error)]
pub(super) enum KeyError {
    #[error("RSA modulus of {0} bits; {min} to {max} bits are accepted", min = RSA_BITS.start(), max = RSA_BITS.end())]
    ModulusBits(usize),
    #[error("even RSA modulus")]
    EvenModulus,
    #[error("RSA modulus that is divisible by {0}")]
    Factor(u32),
    #[error("RSA exponent {0}, which is below the minimum {EXPONENT_MIN}")]
    SmallExponent(BigUint),
    #[error("RSA exponent that is even or longer than {EXPONENT_BITS_MAX} bits")]
    Exponent,
    #[error("the point at infinity")]
    Infinity,
    #[error("not an uncompressed point with coordinates of {0} bytes")]
    Point(usize),
    #[error("a point that is not on its curve")]
    OffCurve(#[source] KeyRejected),
    #[error("an Ed25519 key of {0} bytes instead of 32")]
    Ed25519Length(usize),
    #[error("an Ed25519 key that is not a point of the curve")]
    Ed25519Point,
    #[error(
        "an Ed25519 key of small order, for which one signature can be valid for many messages"
    )]
    Ed25519SmallOrder,
    #[error("an Ed25519 key that is not in its canonical encoding")]
    Ed25519Encoding,
    #[error("an Ed25519 key that cannot be parsed")]
    Ed25519(#[source] KeyRejected),
    #[error("a public key of a type that is not supported for access tokens")]
    Type,
    #[error("the member `{0}` is missing")]
    Missing(&'static str),
    #[error("the member `{member}` is not base64url")]
    Base64 {
        member: &'static str,
        source: base64ct::Error,
    },
    #[error("the entry is not a JSON Web Key")]
    Json(#[source] serde_json::Error),
}

/// The reason why a complete key set is refused.
#[derive(Debug, thiserror::Error)]
pub enum SetError {
    /// The text is not a JSON Web Key Set.
    #[error("the content is not a JSON Web Key Set")]
    Json(#[source] serde_json::Error),
    /// The file is not valid PEM.
    #[error(transparent)]
    Pem(#[from] pem::Error),
    /// A public key in PEM does not parse.
    #[error("a public key cannot be parsed")]
    PublicKey(#[source] nom::Err<X509Error>),
    /// A certificate in PEM does not parse.
    #[error("a certificate cannot be parsed")]
    Certificate(#[source] nom::Err<X509Error>),
    /// The file contains a private key, which must not be on this machine.
    #[error(
        "the file contains a private key, which can sign access tokens for any user; remove the private key from this \
         machine, and write the public key with `openssl pkey -in private.pem -pubout`"
    )]
    PrivateKey,
    /// No key of the set can be used.
    #[error("the key set contains no public key that verifies signatures{0}")]
    NoKey(LeftOut),
    /// The set has more keys than any provider needs.
    #[error("the key set contains more than {KEYS_MAX} keys")]
    TooMany,
}

/// The keys of a set that are not used, each with its name and the reason.
#[derive(Debug)]
pub struct LeftOut {
    /// Weak or malformed keys.
    pub(super) refused: Vec<String>,
    /// The names of the keys for purposes other than signatures.
    pub(super) other: Vec<String>,
}

impl std::fmt::Display for LeftOut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if !self.refused.is_empty() {
            write!(f, "; weak or malformed keys: {}", self.refused.join("; "))?;
        }
        if !self.other.is_empty() {
            write!(
                f,
                "; keys for purposes other than signatures: {:?}",
                self.other
            )?;
        }
        Ok(())
    }
}

/// The reason why the keys of an issuer could not be read or fetched.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The key file cannot be read.
    #[error(transparent)]
    File(Box<trusted_file::Error>),
    /// The key set is refused.
    #[error("{place}")]
    Set {
        /// File or URL.
        place: String,
        /// The reason for the refusal.
        source: SetError,
    },
    /// The operation does not match the source of the issuer's keys. For example, the operation is
    /// for keys from a URL, but the source is a file.
    #[error("internal error: the operation does not match the source of the issuer's keys")]
    OtherSource,
    /// The CA file cannot be read.
    #[error("`ca_file`")]
    AuthorityFile(#[source] Box<trusted_file::Error>),
    /// The CA file is not valid PEM.
    #[error("`ca_file` {path}")]
    AuthorityPem {
        /// The file.
        path: String,
        /// The problem of the CA file.
        source: pem::Error,
    },
    /// The HTTP client refuses a CA.
    #[error("`ca_file` {path}")]
    Authority {
        /// The file.
        path: String,
        /// The error of the HTTP client.
        source: reqwest::Error,
    },
    /// The HTTP client cannot be created.
    #[error(
        "cannot create the HTTP client that fetches the issuer's keys (if this machine has no public CAs, set `ca_file`)"
    )]
    Client(#[source] reqwest::Error),
    /// The server did not answer in time.
    #[error("{url}: no answer in time")]
    Timeout {
        /// The requested URL.
        url: String,
        /// The error of the HTTP client.
        source: reqwest::Error,
    },
    /// The request failed.
    #[error("{url}")]
    Request {
        /// The requested URL.
        url: String,
        /// The error of the HTTP client.
        source: reqwest::Error,
    },
    /// The server answered with a redirect.
    #[error(
        "{url}: the server answered with status {status}; the broker does not follow redirects: configure the URL to \
         which the server redirects"
    )]
    Redirect {
        /// The requested URL.
        url: String,
        /// The status of the answer.
        status: StatusCode,
    },
    /// The status of the answer is not 200.
    #[error("{url}: the server answered with status {status}")]
    Status {
        /// The requested URL.
        url: String,
        /// The status of the answer.
        status: StatusCode,
    },
    /// The answer is too long.
    #[error("{url}: the answer is longer than {SET_BYTES_MAX} bytes")]
    TooLong {
        /// The requested URL.
        url: String,
    },
    /// The discovery document does not parse.
    #[error("{url}: the answer is not a discovery document")]
    Discovery {
        /// The requested URL.
        url: String,
        /// The error of the parser.
        source: serde_json::Error,
    },
    /// The discovery document is for another issuer.
    #[error(
        "{url}: the discovery document has the `issuer` {found:?}, and the configuration has {configured:?}; both must \
         be equal byte for byte. If the access tokens have the configured issuer, set `jwks_url` to the URL of the key \
         set"
    )]
    OtherIssuer {
        /// The requested URL.
        url: String,
        /// The issuer in the document.
        found: String,
        /// The issuer in the configuration.
        configured: String,
    },
    /// The discovery document contains a URL from which keys must not be fetched.
    #[error("{url}: the discovery document has the `jwks_uri` {jwks_uri:?}, but {problem}")]
    KeysUrl {
        /// The requested URL.
        url: String,
        /// The URL of the key set.
        jwks_uri: String,
        /// The reason why keys must not be fetched from the URL.
        problem: &'static str,
    },
    /// The task that read the key set ended early.
    #[error("cannot read the key set")]
    Task(#[source] JoinError),
}

/// The reason why no key set is available to verify an access token.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum NoSet {
    #[error("no key set is available: {0}")]
    Unknown(Arc<str>),
    #[error("the last valid key set is older than `keep_hours`: {0}")]
    Old(Arc<str>),
}
