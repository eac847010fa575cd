//! Reads PEM files (RFC 7468) completely or not at all. Only a file of revocation lists is an exception: [`revocation_lists`]
//! returns its readable blocks and reports the others.
//!
//! A PEM parser usually skips text that it does not understand. If a parser skips a block in a file that decides who is
//! trusted, a certificate authority, an intermediate certificate or a key is missing without an error. Therefore this
//! module splits the file itself and accounts for every `BEGIN` line. The parser of `rustls-pki-types` then decodes
//! each block.
//!
//! The module accepts a UTF-8 byte order mark, CRLF line ends, an `END` and a `BEGIN` on one line, and text between
//! blocks. The module refuses any other text that is not a block of a permitted kind, and reports the line number and a
//! remedy.
//!
//! Mitigation: M15 of `THREAT_MODEL.md`.

use std::fmt;

use base64ct::{Base64, Encoding as _};
use rustls_pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer,
    pem::{self, PemObject as _, SectionKind},
};
use zeroize::Zeroizing;

#[cfg(test)]
mod tests;

const BEGIN: &[u8] = b"-----BEGIN ";
const END: &[u8] = b"-----END ";
const DASHES: &[u8] = b"-----";
const UTF8_MARK: &[u8] = b"\xef\xbb\xbf";
const UTF16_MARKS: [&[u8]; 2] = [b"\xff\xfe", b"\xfe\xff"];
/// First byte of a DER structure: SEQUENCE.
const DER_SEQUENCE: u8 = 0x30;
const LABEL_BYTES_MAX: usize = 64;
/// Highest number of unreadable parts of a file of revocation lists. After this number of unreadable parts, the rest of the file
/// is ignored.
pub const DAMAGED_BLOCKS_MAX: usize = 1_000;
/// Number of characters in a line of base64 (RFC 7468, section 2).
const LINE_LENGTH: usize = 64;

/// Labels of the blocks that may precede a key or a certificate chain, and are ignored. For example, `openssl ecparam -genkey`
/// writes a block of parameters before the key.
const PARAMETERS: [&str; 2] = ["EC PARAMETERS", "DH PARAMETERS"];

/// The reason why a file was refused. The text of the error is a clause that follows the name of
/// the file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Binary DER.
    #[error(
        "the file is DER and not PEM; convert it with `openssl x509 -inform der -in FILE -out FILE.pem` (for a key \
         `openssl pkey`, for a revocation list `openssl crl`)"
    )]
    Der,
    /// The file is UTF-16, which some editors write.
    #[error("the file is UTF-16; save it as UTF-8 or ASCII")]
    Utf16,
    /// A line that looks like a BEGIN or END line but is malformed.
    #[error(
        "line {0} looks like a BEGIN or END line but is malformed; it must be `-----BEGIN LABEL-----`"
    )]
    Malformed(usize),
    /// A BEGIN line without an END line.
    #[error(
        "the block {label} that begins in line {line} has no END line of the same label; the file is truncated or damaged"
    )]
    Unclosed {
        /// The number of the BEGIN line.
        line: usize,
        /// The label in the BEGIN line.
        label: String,
    },
    /// An END line without a BEGIN line.
    #[error("line {0} is an END line without a BEGIN line; the file is damaged")]
    StrayEnd(usize),
    /// The content of a block is not base64.
    #[error("the block {label} that begins in line {line} cannot be decoded: {source}")]
    Undecodable {
        /// The number of the BEGIN line.
        line: usize,
        /// The label in the BEGIN line.
        label: String,
        /// The message of the parser.
        #[source]
        source: Box<pem::Error>,
    },
    /// A private key that is encrypted with a passphrase.
    #[error(
        "the private key that begins in line {0} is encrypted, and keybroker cannot ask for a passphrase; decrypt the \
         private key with `openssl pkey -in FILE -out key.pem`, and restrict the mode of key.pem"
    )]
    Encrypted(usize),
    /// A block of a kind that is not permitted in this file.
    #[error("line {line} begins a block {label}; {remedy}")]
    Unexpected {
        /// The number of the BEGIN line.
        line: usize,
        /// The label in the BEGIN line.
        label: String,
        /// The remedy, as a clause.
        remedy: &'static str,
    },
    /// The file contains no block of the required kind.
    #[error("the file contains no {0} in PEM")]
    Nothing(&'static str),
    /// The file contains several private keys, but only one is used.
    #[error(
        "the file contains {0} private keys; keep only the private key that belongs to the certificate"
    )]
    Keys(usize),
    /// The file has so many unreadable parts that the rest of the file is ignored.
    #[error(
        "more than {0} blocks or lines of the file cannot be read; the rest of the file is ignored"
    )]
    TooDamaged(usize),
}

/// The position of a part of a file. Blocks are counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The part is the block with this number.
    Block(usize),
    /// The part is the text between the block with this number and the next block.
    After(usize),
    /// The part is the text before the first block, or a complete file without a block.
    Beginning,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Block(number) => write!(f, "block {number}"),
            Self::After(number) => write!(f, "after block {number}"),
            Self::Beginning => f.write_str("at its beginning"),
        }
    }
}

/// An unreadable part of a file. The text of the error is a clause that follows the name of the file.
#[derive(Debug, thiserror::Error)]
#[error("{place}")]
pub struct DamagedBlock {
    /// The position of the part in the file.
    pub place: Place,
    /// The reason why the part is unreadable.
    #[source]
    pub source: Error,
}

/// A decoded block.
pub struct Block {
    kind: Option<SectionKind>,
    label: String,
    line: usize,
    der: Zeroizing<Vec<u8>>,
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Block")
            .field("label", &self.label)
            .field("line", &self.line)
            .finish_non_exhaustive()
    }
}

impl Block {
    /// The kind of the block; absent if the parser does not recognise the label.
    pub fn kind(&self) -> Option<SectionKind> {
        self.kind
    }

    /// The content of the block.
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// Whether the block is a private key, in any format.
    pub fn is_private_key(&self) -> bool {
        self.label.ends_with("PRIVATE KEY")
    }

    fn is_parameters(&self) -> bool {
        PARAMETERS.contains(&self.label.as_str())
    }

    fn certificate(&self) -> CertificateDer<'static> {
        self.der.to_vec().into()
    }

    /// The error for a block that is not permitted in this file.
    pub fn unexpected(&self) -> Error {
        if self.label == "ENCRYPTED PRIVATE KEY" {
            return Error::Encrypted(self.line);
        }
        Error::Unexpected {
            line: self.line,
            label: self.label.clone(),
            remedy: remedy(&self.label),
        }
    }
}

fn remedy(label: &str) -> &'static str {
    match label {
        "TRUSTED CERTIFICATE" => {
            "the block is in OpenSSL's own format; write a plain certificate with `openssl x509 -in FILE -out FILE.pem`"
        }
        "X509 CERTIFICATE" => "write CERTIFICATE instead of this label in the BEGIN and END lines",
        "RSA PUBLIC KEY" => {
            "the block is in PKCS #1 format; convert it with `openssl rsa -RSAPublicKey_in -in FILE -pubout -out FILE.pem`"
        }
        "OPENSSH PRIVATE KEY" => "convert the private key with `ssh-keygen -p -m PKCS8 -f FILE`",
        "PKCS7" | "CMS" => {
            "write the certificates of the block with `openssl pkcs7 -print_certs -in FILE -out FILE.pem`"
        }
        "CERTIFICATE REQUEST" | "NEW CERTIFICATE REQUEST" => {
            "the block is a certificate request; use the certificate that the CA issued for this request"
        }
        "X509 CRL" => {
            "the block is a revocation list; move this block to the file of the setting for revocation lists"
        }
        "CERTIFICATE" => "a certificate does not belong in this file; remove the certificate",
        _ if label.ends_with("PRIVATE KEY") => {
            "a private key does not belong in this file; remove the private key, and replace it if other users may have read it"
        }
        _ => "the block does not belong in this file; remove the block",
    }
}

/// The certificates of a file of authorities, which must contain nothing else.
pub fn certificates(bytes: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    let mut found = Vec::new();
    for block in blocks(bytes)? {
        match block.kind {
            Some(SectionKind::Certificate) => found.push(block.certificate()),
            _ => return Err(block.unexpected()),
        }
    }
    not_empty(found, "certificate")
}

/// The certificates of a chain file. The file may also contain a private key.
pub fn chain(bytes: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    let mut found = Vec::new();
    for block in blocks(bytes)? {
        match block.kind {
            Some(SectionKind::Certificate) => found.push(block.certificate()),
            Some(_) if block.is_private_key() => {}
            _ if block.is_parameters() => {}
            _ => return Err(block.unexpected()),
        }
    }
    not_empty(found, "certificate")
}

/// The only private key of a file. The file may also contain the certificates of this key.
pub fn private_key(bytes: &[u8]) -> Result<PrivateKeyDer<'static>, Error> {
    let mut found = Vec::new();
    for block in blocks(bytes)? {
        let key = block
            .kind
            .and_then(|kind| PrivateKeyDer::from_pem(kind, block.der.to_vec()));
        match key {
            Some(key) => found.push(key),
            None if block.kind == Some(SectionKind::Certificate) || block.is_parameters() => {}
            None => return Err(block.unexpected()),
        }
    }
    let mut found = not_empty(found, "private key")?;
    match (found.pop(), found.len()) {
        (Some(key), 0) => Ok(key),
        (_, more) => Err(Error::Keys(more + 1)),
    }
}

/// The revocation lists of a file that should contain nothing else. For each other part of the file, the result has the reason
/// why the part is not a revocation list. A file that contains no revocation list is accepted. A file of revocation lists comes
/// from other machines and may be damaged. One damaged block must not prevent the use of the lists of all other authorities.
///
/// After [`DAMAGED_BLOCKS_MAX`] unreadable parts, the last entry reports that the rest of the file is ignored.
pub fn revocation_lists(
    bytes: &[u8],
) -> Vec<Result<CertificateRevocationListDer<'static>, DamagedBlock>> {
    let mut scan = Scan::new(bytes);
    let (mut found, mut damaged) = (Vec::new(), 0);
    while let Some(block) = scan.next() {
        let read = match block {
            Ok(block) if block.kind == Some(SectionKind::Crl) => Ok(block.der.to_vec().into()),
            Ok(block) => Err(block.unexpected()),
            Err(error) => Err(error),
        };
        let place = scan.place;
        let damage = |source| DamagedBlock { place, source };
        if read.is_err() {
            damaged += 1;
        }
        if damaged > DAMAGED_BLOCKS_MAX {
            let source = Error::TooDamaged(DAMAGED_BLOCKS_MAX);
            found.push(Err(damage(source)));
            break;
        }
        found.push(read.map_err(damage));
    }
    found
}

/// Writes certificates in the simplest PEM form, for a library that has its own PEM parser.
pub fn encode(certificates: &[CertificateDer<'_>]) -> String {
    let mut text = String::new();
    for certificate in certificates {
        text.push_str("-----BEGIN CERTIFICATE-----\n");
        let encoded = Base64::encode_string(certificate);
        for line in encoded.as_bytes().chunks(LINE_LENGTH) {
            text.push_str(&String::from_utf8_lossy(line));
            text.push('\n');
        }
        text.push_str("-----END CERTIFICATE-----\n");
    }
    text
}

/// Writes a private key in the simplest PEM form, for a library that has its own PEM parser.
pub fn encode_key(key: &PrivateKeyDer<'_>) -> Zeroizing<String> {
    let label = match key {
        PrivateKeyDer::Pkcs1(_) => "RSA PRIVATE KEY",
        PrivateKeyDer::Sec1(_) => "EC PRIVATE KEY",
        _ => "PRIVATE KEY",
    };
    let encoded = Zeroizing::new(Base64::encode_string(key.secret_der()));
    let marks = 2 * (LABEL_BYTES_MAX + BEGIN.len() + DASHES.len());
    let mut text = Zeroizing::new(String::with_capacity(encoded.len() + marks));
    for part in [
        "-----BEGIN ",
        label,
        "-----\n",
        &encoded,
        "\n-----END ",
        label,
        "-----\n",
    ] {
        text.push_str(part);
    }
    text
}

fn not_empty<T>(found: Vec<T>, what: &'static str) -> Result<Vec<T>, Error> {
    if found.is_empty() {
        return Err(Error::Nothing(what));
    }
    Ok(found)
}

/// All blocks of a file, in order.
pub fn blocks(bytes: &[u8]) -> Result<Vec<Block>, Error> {
    Scan::new(bytes).collect()
}

/// Reads a file block by block. After a block that cannot be read, the scan continues with the next BEGIN line.
struct Scan<'a> {
    text: &'a [u8],
    /// The position at which the search for the next block begins; absent at the end of the file.
    at: Option<usize>,
    /// The reason why the complete file is refused.
    refused: Option<Error>,
    /// The number of BEGIN lines so far.
    blocks: usize,
    /// The position of the part that was read last.
    place: Place,
    /// The last position whose line number was computed, and the line number itself.
    counted: (usize, usize),
}

impl<'a> Scan<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        let text = bytes.strip_prefix(UTF8_MARK).unwrap_or(bytes);
        let refused = if UTF16_MARKS.iter().any(|mark| bytes.starts_with(mark)) {
            Some(Error::Utf16)
        } else if is_der(text) {
            Some(Error::Der)
        } else {
            None
        };
        Self {
            text,
            at: refused.is_none().then_some(0),
            refused,
            blocks: 0,
            place: Place::Beginning,
            counted: (0, 1),
        }
    }

    /// The line number of a position. The count continues from the last position, so that the lines of a file are counted only
    /// once.
    fn line(&mut self, at: usize) -> usize {
        let (from, line) = match self.counted {
            (from, line) if from <= at => (from, line),
            _ => (0, 1),
        };
        let ends = self.text[from..at].iter().filter(|byte| **byte == b'\n');
        self.counted = (at, line + ends.count());
        self.counted.1
    }

    /// Text between blocks is a comment, unless it looks like a part of a block that an editor or a tool damaged.
    fn check_between(&mut self, from: usize, to: usize) -> Result<(), Error> {
        // The search begins at the last dash of the previous END line. Therefore it also finds a `BEGIN` or `END` that
        // directly follows this dash and has too few dashes.
        let before = from.saturating_sub(1);
        let between = &self.text[before..to];
        if let Some(offset) = find_marker(between, b"BEGIN ") {
            return Err(Error::Malformed(self.line(before + offset)));
        }
        if let Some(offset) = find(between, END) {
            return Err(Error::StrayEnd(self.line(before + offset)));
        }
        match find_marker(between, b"END ") {
            Some(offset) => Err(Error::Malformed(self.line(before + offset))),
            None => Ok(()),
        }
    }

    /// Reads the block whose BEGIN line is at this position, and sets the start of the next search.
    fn block(&mut self, begin: usize) -> Result<Block, Error> {
        let text = self.text;
        let line = self.line(begin);
        let label_at = begin + BEGIN.len();
        self.at = Some(label_at);
        let label_end = find(&text[label_at..], DASHES).map(|offset| label_at + offset);
        let label = label_end.and_then(|end| label(&text[label_at..end]));
        let (Some(label_end), Some(label)) = (label_end, label) else {
            return Err(Error::Malformed(line));
        };
        let body_at = label_end + DASHES.len();
        self.at = Some(body_at);
        let end_line = [END, label.as_bytes(), DASHES].concat();
        match find(&text[body_at..], DASHES).map(|offset| body_at + offset) {
            Some(end) if text[end..].starts_with(&end_line) => {
                self.at = Some(end + end_line.len());
                block(&text[body_at..end], label, line)
            }
            _ => Err(Error::Unclosed { line, label }),
        }
    }
}

impl Iterator for Scan<'_> {
    type Item = Result<Block, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(refused) = self.refused.take() {
            return Some(Err(refused));
        }
        let at = self.at?;
        let begin = find(&self.text[at..], BEGIN).map(|offset| at + offset);
        if let Err(error) = self.check_between(at, begin.unwrap_or(self.text.len())) {
            self.at = begin;
            if self.blocks > 0 {
                self.place = Place::After(self.blocks);
            }
            return Some(Err(error));
        }
        let Some(begin) = begin else {
            self.at = None;
            return None;
        };
        self.blocks += 1;
        self.place = Place::Block(self.blocks);
        Some(self.block(begin))
    }
}

fn label(bytes: &[u8]) -> Option<String> {
    let is_plain = |byte: &u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || *byte == b' ';
    if bytes.is_empty() || bytes.len() > LABEL_BYTES_MAX || !bytes.iter().all(is_plain) {
        return None;
    }
    String::from_utf8(bytes.to_vec()).ok()
}

/// The position of a word that follows a hyphen or one of the dashes that word processors insert.
fn find_marker(text: &[u8], word: &[u8]) -> Option<usize> {
    text.windows(word.len()).enumerate().find_map(|(at, part)| {
        let mut before = text[..at].iter().rev().filter(|byte| **byte != b' ');
        let is_marker = part.eq_ignore_ascii_case(word)
            && before
                .next()
                .is_some_and(|byte| *byte == b'-' || !byte.is_ascii());
        is_marker.then_some(at)
    })
}

fn block(body: &[u8], label: String, line: usize) -> Result<Block, Error> {
    if find(body, b"Proc-Type:").is_some() && find(body, b"ENCRYPTED").is_some() {
        return Err(Error::Encrypted(line));
    }
    let Ok(kind) = SectionKind::try_from(label.as_bytes()) else {
        return Ok(Block {
            kind: None,
            label,
            line,
            der: Zeroizing::default(),
        });
    };
    // The body of a block may have lines of any length, and spaces instead of line ends.
    let mut plain = Zeroizing::new(Vec::with_capacity(body.len() + 2 * LABEL_BYTES_MAX + 64));
    for part in [BEGIN, label.as_bytes(), DASHES, b"\n"] {
        plain.extend_from_slice(part);
    }
    plain.extend(body.iter().filter(|byte| !byte.is_ascii_whitespace()));
    for part in [b"\n", END, label.as_bytes(), DASHES, b"\n"] {
        plain.extend_from_slice(part);
    }
    match <(SectionKind, Vec<u8>)>::from_pem_slice(&plain) {
        Ok((_, der)) => Ok(Block {
            kind: Some(kind),
            der: Zeroizing::new(der),
            label,
            line,
        }),
        Err(source) => Err(Error::Undecodable {
            line,
            label,
            source: Box::new(source),
        }),
    }
}

/// Whether a file is in DER. A PEM file may begin with text whose first byte is also the first byte of DER.
pub fn is_der(bytes: &[u8]) -> bool {
    bytes.first() == Some(&DER_SEQUENCE) && find(bytes, BEGIN).is_none()
}

fn find(text: &[u8], wanted: &[u8]) -> Option<usize> {
    text.windows(wanted.len()).position(|part| part == wanted)
}
