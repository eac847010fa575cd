//! The errors of revocation lists, and of reading and storing the accepted lists.

use rustls::server::VerifierBuilderError;
use x509_parser::{error::X509Error, nom};

use keybroker_core::{call::Timestamp, pem, state};

/// An error while the accepted lists are read or stored.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The state file could not be read or written.
    #[error(transparent)]
    File(#[from] state::Error),
    /// The state file does not contain a list that this CA signed.
    #[error(
        "the state file {path} is not a revocation list that \"{authority}\" signed: find out what changed the file. \
         The broker can start without the file, but then cannot detect that a list is older than the last accepted list"
    )]
    List {
        /// The path of the file.
        path: String,
        /// Name of the CA.
        authority: String,
    },
    /// A state file of an earlier release is malformed.
    #[error("the state file {path} is not a valid list of revocation list versions")]
    Content {
        /// The path of the file.
        path: String,
        /// The error of the parser.
        source: serde_json::Error,
    },
    /// An entry is not hexadecimal.
    #[error("the state file {path} has an entry that is not hexadecimal")]
    Hex {
        /// The path of the file.
        path: String,
        /// The error of the decoder.
        source: hex::FromHexError,
    },
}

/// A problem of a file of revocation lists.
#[derive(Debug, thiserror::Error)]
pub enum ListsError {
    /// A list is older than a previously accepted list.
    #[error(
        "the file has a list of \"{authority}\" ({found}) that is older than the last accepted list ({accepted}): with the older list, certificates that were revoked after the date of the older list would be accepted. \
         Fetch the newest \
         list{how_to_go_back}"
    )]
    GoesBack {
        /// Name of the CA.
        authority: String,
        /// Number and date of the list.
        found: String,
        /// Number and date of the accepted list.
        accepted: String,
        /// Instructions for accepting the older list; may be empty.
        how_to_go_back: String,
    },
    /// A CA certificate does not parse.
    #[error("the file cannot be verified, because a CA certificate cannot be parsed")]
    Authority(#[source] nom::Err<X509Error>),
    /// A list does not parse.
    #[error("the file has a list that cannot be parsed: block {block}")]
    Malformed {
        /// Position in the file, starting at 1.
        block: usize,
        /// The error of the parser.
        source: nom::Err<X509Error>,
    },
    /// A PEM block in the file cannot be read.
    #[error("the file has a PEM block that cannot be read")]
    Block(#[source] pem::DamagedBlock),
    /// The file is too long.
    #[error("the file is longer than {0} bytes, so none of its lists is used")]
    TooLong(u64),
    /// The file has further bytes after a list in DER.
    #[error(
        "the file has more bytes after a revocation list in DER; use PEM for several lists in one file"
    )]
    Trailing,
    /// The file begins like DER, but is not a revocation list.
    #[error("the file is neither PEM nor a list in DER")]
    Der(#[source] nom::Err<X509Error>),
    /// The file has no list.
    #[error("the file has no revocation list")]
    Empty,
    /// The file contains no list of a configured CA.
    #[error(
        "the file has no list of \"{0}\" that this CA signed, so every client of this CA would be refused"
    )]
    Missing(String),
    /// A previously accepted list is no longer in the file.
    #[error(
        "the file no longer has a list of \"{authority}\"; the accepted list ({version}) stays in use until it expires on \
         {until}. Add the newest list of this CA to the file"
    )]
    Gone {
        /// Name of the CA.
        authority: String,
        /// Number and date of the accepted list.
        version: String,
        /// Time when the accepted list expires.
        until: Timestamp,
    },
    /// The file has several lists of a CA whose certificate is not configured.
    #[error(
        "the file has more than one list of the CA \"{0}\". The certificate of this CA is neither in `client_ca_file` nor in `client_crl_issuers_file`, so the broker cannot verify which list this CA signed: add the certificate to `client_crl_issuers_file`, or keep only the newest list of this CA"
    )]
    Ambiguous(String),
    /// The CA did not sign the list.
    #[error(
        "the file has a list of \"{issuer}\" ({version}) that this CA did not sign: the list was changed, or another \
         CA with \
         this name made it"
    )]
    Signature {
        /// Name of the CA.
        issuer: String,
        /// Number and date of the list.
        version: String,
    },
    /// The signature algorithm of the list is not supported.
    #[error(
        "the file has a list of \"{issuer}\" ({version}) whose signature algorithm {algorithm} is not supported for \
         the key of \
         this CA: the CA must sign with RSA (PKCS #1 or PSS), ECDSA (P-256, P-384, P-521) or Ed25519"
    )]
    Algorithm {
        /// Name of the CA.
        issuer: String,
        /// Number and date of the list.
        version: String,
        /// Object identifier of the algorithm.
        algorithm: String,
    },
    /// The TLS library does not accept the list.
    #[error("the file has a list of \"{issuer}\" that cannot be used")]
    Unusable {
        /// Name of the CA.
        issuer: String,
        /// The error of the library.
        source: VerifierBuilderError,
    },
    /// A list has no expiry date.
    #[error("the file has a list of \"{0}\" without `nextUpdate`, so the list would never expire")]
    NoEnd(String),
    /// A list has expired.
    #[error(
        "the file has a list of \"{issuer}\" that expired on {until}: fetch the newest list from this CA"
    )]
    Ended {
        /// Name of the CA.
        issuer: String,
        /// Time when the list expired.
        until: Timestamp,
    },
    /// A list is not valid yet.
    #[error(
        "the file has a list of \"{issuer}\" that is not valid before {from}; check the clock of this machine"
    )]
    NotYetValid {
        /// Name of the CA.
        issuer: String,
        /// Time when the list becomes valid.
        from: Timestamp,
    },
}
