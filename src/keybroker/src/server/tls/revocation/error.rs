//! Why revocation lists are not used, and why their memory could not be read or written.

use rustls::server::VerifierBuilderError;
use x509_parser::{error::X509Error, nom};

use keybroker_core::{call::Timestamp, pem, state};

/// Why the accepted lists could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The file was not read or written.
    #[error(transparent)]
    File(#[from] state::Error),
    /// It is not a list of that authority.
    #[error(
        "the state file {path} is not a revocation list that \"{authority}\" signed: find out what changed it. The broker starts \
         without the file, but then does not know which list it accepted last"
    )]
    List {
        /// The file.
        path: String,
        /// Name of the authority.
        authority: String,
    },
    /// It is not what an earlier release wrote.
    #[error("the state file {path} does not list versions of revocation lists")]
    Content {
        /// The file.
        path: String,
        /// Where the parser stopped.
        source: serde_json::Error,
    },
    /// An entry is not hexadecimal.
    #[error("the state file {path} holds an entry that is not hexadecimal")]
    Hex {
        /// The file.
        path: String,
        /// What it holds instead.
        source: hex::FromHexError,
    },
}

/// What is wrong with a file of revocation lists, after its name.
#[derive(Debug, thiserror::Error)]
pub enum ListsError {
    /// Older than a list that was accepted before.
    #[error(
        "holds an older list of \"{authority}\" than one accepted before ({found}; accepted: {accepted}): it would accept \
         certificates that were revoked since. Fetch the newest list{how_to_go_back}"
    )]
    GoesBack {
        /// Name of the authority.
        authority: String,
        /// Number and date of the list.
        found: String,
        /// Number and date of the accepted one.
        accepted: String,
        /// What to do if the older list is meant, or nothing.
        how_to_go_back: String,
    },
    /// A certificate of an authority does not parse.
    #[error("cannot be compared with the CA")]
    Authority(#[source] nom::Err<X509Error>),
    /// A list does not parse.
    #[error("holds a list that does not parse: block {block}")]
    Malformed {
        /// Where it is in the file, counted from 1.
        block: usize,
        /// Where the parser stopped.
        source: nom::Err<X509Error>,
    },
    /// A part of the file cannot be read.
    #[error("holds a part that cannot be read")]
    Block(#[source] pem::DamagedBlock),
    /// The file is too long.
    #[error("is longer than {0} bytes, so none of it is read")]
    TooLong(u64),
    /// One list in DER, and more after it.
    #[error("has more bytes after a list in DER; put several lists into one file as PEM")]
    Trailing,
    /// It begins like DER, and is no list.
    #[error("is neither PEM nor a list in DER")]
    Der(#[source] nom::Err<X509Error>),
    /// No list at all.
    #[error("holds no revocation list")]
    Empty,
    /// An authority without a list.
    #[error(
        "holds no list of \"{0}\" that this CA signed: every client of that authority would be refused"
    )]
    Missing(String),
    /// A list that was accepted before is no longer in the file.
    #[error(
        "no longer holds a list of \"{authority}\" that it held before; the accepted one ({version}) stays in use until it ends \
         on {until}. Add its newest list to the file"
    )]
    Gone {
        /// Name of the authority.
        authority: String,
        /// Number and date of the accepted list.
        version: String,
        /// When that list ends.
        until: Timestamp,
    },
    /// Several lists of an authority whose certificate is not configured.
    #[error(
        "holds more than one list of \"{0}\", which is neither in `client_ca_file` nor in \
         `client_crl_issuers_file`, so which of them it signed cannot be verified here: add its certificate to \
         `client_crl_issuers_file`, or keep its newest list only"
    )]
    Ambiguous(String),
    /// The signature is not that of the authority.
    #[error(
        "holds a list of \"{issuer}\" ({version}) that is not signed by it: it was changed, or made by another authority of that name"
    )]
    Signature {
        /// Name of the authority.
        issuer: String,
        /// Number and date of the list.
        version: String,
    },
    /// The signature cannot be verified.
    #[error(
        "holds a list of \"{issuer}\" ({version}) whose signature algorithm {algorithm} is not supported for the key of that \
         authority: let it sign with RSA (PKCS #1 or PSS), ECDSA (P-256, P-384, P-521) or Ed25519"
    )]
    Algorithm {
        /// Name of the authority.
        issuer: String,
        /// Number and date of the list.
        version: String,
        /// Object identifier of the algorithm.
        algorithm: String,
    },
    /// The library of the handshake does not take the list.
    #[error("holds a list of \"{issuer}\" that cannot be used")]
    Unusable {
        /// Name of the authority.
        issuer: String,
        /// What the library says.
        source: VerifierBuilderError,
    },
    /// A list without an end.
    #[error("holds a list of \"{0}\" without `nextUpdate`: it would never expire")]
    NoEnd(String),
    /// A list that has ended.
    #[error(
        "holds a list of \"{issuer}\" that ended on {until}: fetch the newest one from that authority"
    )]
    Ended {
        /// Name of the authority.
        issuer: String,
        /// When it ended.
        until: Timestamp,
    },
    /// A list that is not valid yet.
    #[error(
        "holds a list of \"{issuer}\" that is not valid before {from}; look at the clock of this machine"
    )]
    NotYetValid {
        /// Name of the authority.
        issuer: String,
        /// When it begins.
        from: Timestamp,
    },
}
