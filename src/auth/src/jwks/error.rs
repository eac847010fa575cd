//! Why a key, a key set, or the place that a key set comes from is refused.

use std::sync::Arc;

use aws_lc_rs::error::KeyRejected;
use reqwest::StatusCode;
use rsa::BigUint;
use tokio::task::JoinError;
use x509_parser::{error::X509Error, nom};

use keybroker_core::{pem, trusted_file};

use super::{EXPONENT_BITS_MAX, EXPONENT_MIN, KEYS_MAX, RSA_BITS, SET_BYTES_MAX};

/// Why a public key is not used.
#[derive(Debug, thiserror::Error)]
pub(super) enum KeyError {
    #[error("RSA modulus of {0} bits; {min} to {max} are accepted", min = RSA_BITS.start(), max = RSA_BITS.end())]
    ModulusBits(usize),
    #[error("even RSA modulus")]
    EvenModulus,
    #[error("RSA modulus with the factor {0}")]
    Factor(u32),
    #[error("RSA exponent {0}; {EXPONENT_MIN} is the least that is accepted")]
    SmallExponent(BigUint),
    #[error("RSA exponent that is even or longer than {EXPONENT_BITS_MAX} bits")]
    Exponent,
    #[error("the point at infinity")]
    Infinity,
    #[error("not an uncompressed point with coordinates of {0} bytes")]
    Point(usize),
    #[error("a point that is not on its curve")]
    OffCurve(#[source] KeyRejected),
    #[error("an Ed25519 key of {0} bytes and not 32")]
    Ed25519Length(usize),
    #[error("an Ed25519 key that is not a point of the curve")]
    Ed25519Point,
    #[error("an Ed25519 key of small order, with which one signature fits many messages")]
    Ed25519SmallOrder,
    #[error("an Ed25519 key that is not in its canonical encoding")]
    Ed25519Encoding,
    #[error("an Ed25519 key that does not parse")]
    Ed25519(#[source] KeyRejected),
    #[error("a public key of a type that signs no tokens here")]
    Type,
    #[error("it has no `{0}`")]
    Missing(&'static str),
    #[error("its `{member}` is not base64url")]
    Base64 {
        member: &'static str,
        source: base64ct::Error,
    },
    #[error("it is not a JSON Web Key")]
    Json(#[source] serde_json::Error),
}

/// Why a key set is refused as a whole.
#[derive(Debug, thiserror::Error)]
pub enum SetError {
    /// It is not JSON of that form.
    #[error("it is not a JSON Web Key Set")]
    Json(#[source] serde_json::Error),
    /// It is not PEM.
    #[error(transparent)]
    Pem(#[from] pem::Error),
    /// A public key in PEM does not parse.
    #[error("a public key does not parse")]
    PublicKey(#[source] nom::Err<X509Error>),
    /// A certificate in PEM does not parse.
    #[error("a certificate does not parse")]
    Certificate(#[source] nom::Err<X509Error>),
    /// It holds a secret that does not belong on this machine.
    #[error(
        "it holds a private key, with which tokens for any user can be made; remove it from this machine, and write the \
         public key with `openssl pkey -in private.pem -pubout`"
    )]
    PrivateKey,
    /// No key of it can be used.
    #[error("it holds no public key that verifies signatures{0}")]
    NoKey(LeftOut),
    /// It is longer than any provider needs.
    #[error("it holds more than {KEYS_MAX} keys")]
    TooMany,
}

/// Keys of a set that are not used, each with its name and the reason.
#[derive(Debug)]
pub struct LeftOut {
    /// Weak or malformed.
    pub(super) refused: Vec<String>,
    /// For something else than signatures.
    pub(super) other: Vec<String>,
}

impl std::fmt::Display for LeftOut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if !self.refused.is_empty() {
            write!(f, "; weak or malformed: {}", self.refused.join("; "))?;
        }
        if !self.other.is_empty() {
            write!(f, "; left out: {:?}", self.other)?;
        }
        Ok(())
    }
}

/// Why the keys of an issuer could not be read or fetched.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// A key file was not read.
    #[error(transparent)]
    File(Box<trusted_file::Error>),
    /// The set from this place is refused.
    #[error("{place}")]
    Set {
        /// File or URL.
        place: String,
        /// Why it is refused.
        source: SetError,
    },
    /// The issuer has no key file, or no URL: the configuration says the other.
    #[error("its keys come from another kind of source")]
    OtherSource,
    /// The authorities of the provider's certificate were not read.
    #[error("`ca_file`")]
    AuthorityFile(#[source] Box<trusted_file::Error>),
    /// The file of the authorities is not PEM.
    #[error("`ca_file` {path}")]
    AuthorityPem {
        /// The file.
        path: String,
        /// What is wrong with it.
        source: pem::Error,
    },
    /// The HTTP client refuses an authority.
    #[error("`ca_file` {path}")]
    Authority {
        /// The file.
        path: String,
        /// What the client says.
        source: reqwest::Error,
    },
    /// There is no HTTP client.
    #[error(
        "cannot prepare to fetch its keys (if this machine has no public authorities, set `ca_file`)"
    )]
    Client(#[source] reqwest::Error),
    /// No answer in time.
    #[error("{url}: no answer in time")]
    Timeout {
        /// What was asked for.
        url: String,
        /// What the HTTP client says.
        source: reqwest::Error,
    },
    /// The request failed.
    #[error("{url}")]
    Request {
        /// What was asked for.
        url: String,
        /// What the HTTP client says.
        source: reqwest::Error,
    },
    /// An answer that leads elsewhere.
    #[error(
        "{url}: answered {status}; redirects are not followed: configure the address that it leads to"
    )]
    Redirect {
        /// What was asked for.
        url: String,
        /// The answer.
        status: StatusCode,
    },
    /// Another answer than 200.
    #[error("{url}: answered {status}")]
    Status {
        /// What was asked for.
        url: String,
        /// The answer.
        status: StatusCode,
    },
    /// An answer without end.
    #[error("{url}: the answer is longer than {SET_BYTES_MAX} bytes")]
    TooLong {
        /// What was asked for.
        url: String,
    },
    /// The discovery document does not parse.
    #[error("{url}: it is not a discovery document")]
    Discovery {
        /// What was asked for.
        url: String,
        /// Where the parser stopped.
        source: serde_json::Error,
    },
    /// The discovery document of another issuer.
    #[error(
        "{url}: its `issuer` is {found:?}, and `issuer` of the configuration is {configured:?}; they must be equal byte for byte; \
         if its tokens have the configured issuer all the same, name the key set itself with `jwks_url`"
    )]
    OtherIssuer {
        /// What was asked for.
        url: String,
        /// The issuer of the document.
        found: String,
        /// The configured one.
        configured: String,
    },
    /// The discovery document names a URL from which keys are not fetched.
    #[error("{url}: its `jwks_uri` is {jwks_uri:?}, which {problem}")]
    KeysUrl {
        /// What was asked for.
        url: String,
        /// The URL that it names.
        jwks_uri: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The task that read the set ended early.
    #[error("the key set was not read")]
    Task(#[source] JoinError),
}

/// Why there is no key set to verify a token with.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum NoSet {
    #[error("no key set is known: {0}")]
    Unknown(Arc<str>),
    #[error("the last good key set is older than `keep_hours`: {0}")]
    Old(Arc<str>),
}
