//! The keys that verify an issuer's access tokens, read from a key set or a PEM file.
//!
//! A key's type, curve, `use`, `key_ops` and `alg` all limit the algorithms for which the key is
//! used. Keys for other purposes are ignored. Weak and malformed keys are refused and reported by
//! name, and the rest of the set is used. A set without a valid key is refused.
//!
//! Mitigation: M19 of `THREAT_MODEL.md`.

use aws_lc_rs::{digest, signature};
use base64ct::{Base64UrlUnpadded, Encoding as _};
use jsonwebtoken::DecodingKey;
use rustls_pki_types::pem::SectionKind;
use serde::Deserialize;
use x509_parser::{
    oid_registry::{OID_EC_P256, OID_NIST_EC_P384, OID_SIG_ED25519},
    prelude::{FromDer as _, X509Certificate},
    public_key::PublicKey,
    x509::SubjectPublicKeyInfo,
};

use keybroker_core::{error::chain, pem};

use super::issuer::Algorithm;

mod absent;
pub(super) mod error;
mod fetch;
mod keys;
pub(super) mod limits;
mod strength;
#[cfg(test)]
mod tests;

use error::{KeyError, LeftOut};
use limits::{EXPONENT_BITS_MAX, EXPONENT_MIN, KEYS_MAX, RSA_BITS};

pub use error::{SetError, SourceError};
pub(super) use keys::{Keys, Newer, Pace};

/// Largest number of keys that are tried for an access token without a `kid`.
const TRIES_MAX: usize = 4;
/// The name that the log uses for a key without a `kid`.
const WITHOUT_NAME: &str = "(key without `kid`)";
/// Longest key name that is written to the log, in characters.
const SHOWN_CHARS_MAX: usize = 100;
/// Longest text about a key or a provider's answer that is written to the log, in characters.
const PROBLEM_CHARS_MAX: usize = 200;
/// Largest number of refused keys of a set that the log lists by name. The log lists a limited
/// number of refused keys, because the provider decides how many keys a set contains.
const REFUSED_NAMED_MAX: usize = KEYS_MAX;

const RSA: [Algorithm; 6] = [
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::PS384,
    Algorithm::PS512,
];

/// A key set: the public keys of an issuer at one point in time.
#[derive(Debug)]
pub(super) struct KeySet {
    keys: Vec<Key>,
    /// The weak and malformed keys, each with its name and its problem.
    refused: Vec<String>,
    /// SHA-256 of the bytes from which the set was read.
    digest: [u8; 32],
}

#[derive(Debug)]
struct Key {
    kid: Option<String>,
    thumbprints: Thumbprints,
    algorithms: Vec<Algorithm>,
    decoding: DecodingKey,
}

/// The digests of a key's certificate, in base64url (RFC 7515 sections 4.1.7 and 4.1.8).
#[derive(Debug, Default)]
struct Thumbprints {
    sha1: Option<String>,
    sha256: Option<String>,
}

/// The references to a key in the header of an access token. The references in the header only
/// select the keys to try. Only a key that verifies the signature is accepted.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Named<'a> {
    /// `kid`.
    pub(super) kid: Option<&'a str>,
    /// `x5t`.
    pub(super) sha1: Option<&'a str>,
    /// `x5t#S256`.
    pub(super) sha256: Option<&'a str>,
}

/// The reason why a key of a set is not used.
enum Unused {
    /// The key is for another purpose, such as encryption.
    Other(String),
    /// The key is weak or malformed.
    Bad(KeyError),
}

/// The reason why a key set has no key for an access token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoKey {
    /// No key matches. A newer key set may contain a matching key.
    Unknown,
    /// The access token has no `kid`, and more than [`TRIES_MAX`] keys match.
    TooMany,
    /// The key is for another algorithm.
    OtherAlgorithm,
}

/// The relevant members of a key in a set (RFC 7517, RFC 7518, RFC 8037).
#[derive(Deserialize)]
struct Jwk {
    kty: String,
    kid: Option<String>,
    alg: Option<String>,
    #[serde(rename = "use")]
    purpose: Option<String>,
    key_ops: Option<Vec<String>>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
    x5t: Option<String>,
    #[serde(rename = "x5t#S256")]
    x5t_sha256: Option<String>,
}

#[derive(Deserialize)]
struct Jwks {
    keys: Vec<serde_json::Value>,
}

impl KeySet {
    /// Parses a JSON Web Key Set.
    pub(super) fn parse_jwks(bytes: &[u8]) -> Result<Self, SetError> {
        let set: Jwks = serde_json::from_slice(bytes).map_err(SetError::Json)?;
        let (mut keys, mut left_out, mut refused) = (Vec::new(), Vec::new(), Vec::new());
        for (index, value) in set.keys.into_iter().enumerate() {
            let kid = value.get("kid").and_then(serde_json::Value::as_str);
            let name = match kid {
                Some(kid) => shown(kid),
                None => format!("number {}", index + 1),
            };
            let read = serde_json::from_value::<Jwk>(value)
                .map_err(|error| Unused::Bad(KeyError::Json(error)))
                .and_then(Jwk::key);
            match read {
                Ok(key) => keys.push(key),
                Err(Unused::Other(why)) => left_out.push(format!("{name}: {why}")),
                Err(Unused::Bad(why)) => refused.push(format!("{name}: {}", brief(&chain(&why)))),
            }
        }
        if !left_out.is_empty() {
            tracing::debug!(
                ?left_out,
                "the key set contains keys that do not verify access tokens; these keys are ignored"
            );
        }
        Self::of(keys, refused, left_out, bytes)
    }

    /// Parses public keys or certificates in PEM.
    pub(super) fn parse_pem(bytes: &[u8]) -> Result<Self, SetError> {
        let (mut keys, mut refused) = (Vec::new(), Vec::new());
        let mut take =
            |info: &SubjectPublicKeyInfo<'_>, thumbprints, number: usize| match from_info(info) {
                Ok(key) => keys.push(Key { thumbprints, ..key }),
                Err(why) => refused.push(format!("number {number}: {}", chain(&why))),
            };
        let blocks = pem::blocks(bytes)?;
        for (index, block) in blocks.iter().enumerate() {
            match block.kind() {
                Some(SectionKind::PublicKey) => {
                    let (_, info) =
                        SubjectPublicKeyInfo::from_der(block.der()).map_err(SetError::PublicKey)?;
                    take(&info, Thumbprints::default(), index + 1);
                }
                Some(SectionKind::Certificate) => {
                    let (_, certificate) =
                        X509Certificate::from_der(block.der()).map_err(SetError::Certificate)?;
                    take(
                        certificate.public_key(),
                        Thumbprints::of(block.der()),
                        index + 1,
                    );
                }
                _ if block.is_private_key() => return Err(SetError::PrivateKey),
                _ => return Err(block.unexpected().into()),
            }
        }
        Self::of(keys, refused, Vec::new(), bytes)
    }

    fn of(
        keys: Vec<Key>,
        mut refused: Vec<String>,
        mut other: Vec<String>,
        bytes: &[u8],
    ) -> Result<Self, SetError> {
        if keys.is_empty() {
            refused.truncate(REFUSED_NAMED_MAX);
            other.truncate(REFUSED_NAMED_MAX);
            return Err(SetError::NoKey(LeftOut { refused, other }));
        }
        if keys.len() > KEYS_MAX {
            return Err(SetError::TooMany);
        }
        let digest = digest::digest(&digest::SHA256, bytes);
        Ok(Self {
            keys,
            refused,
            digest: digest.as_ref().try_into().expect("SHA-256 gives 32 bytes"),
        })
    }

    /// Returns the SHA-256 of the bytes from which the set was read.
    pub(super) fn digest(&self) -> &[u8; 32] {
        &self.digest
    }

    /// Returns the names of the keys, for the log.
    pub(super) fn names(&self) -> Vec<String> {
        let names = self.keys.iter().map(|key| key.kid.as_deref());
        names
            .map(|name| plain(name.unwrap_or(WITHOUT_NAME), SHOWN_CHARS_MAX))
            .collect()
    }

    /// Returns the key ids of the keys in this set.
    pub(super) fn kids(&self) -> impl Iterator<Item = &str> {
        self.keys.iter().filter_map(|key| key.kid.as_deref())
    }

    /// The number of weak or malformed keys in the set.
    pub(super) fn refused_count(&self) -> usize {
        self.refused.len()
    }

    /// The first weak or malformed keys for the log, each with its name and reason.
    pub(super) fn refused(&self) -> &[String] {
        &self.refused[..self.refused.len().min(REFUSED_NAMED_MAX)]
    }

    /// Returns the keys to try for an access token. If the header of the access token refers to
    /// keys, only these keys are returned. Otherwise, all keys are returned. Only keys that match
    /// the algorithm are returned.
    pub(super) fn find(
        &self,
        named: Named<'_>,
        algorithm: Algorithm,
    ) -> Result<Vec<&DecodingKey>, NoKey> {
        let are_unnamed = self.keys.iter().all(|key| key.kid.is_none());
        let meant: Vec<&Key> = match named.kid {
            Some(kid) if !are_unnamed => {
                let keys = self.keys.iter();
                keys.filter(|key| key.kid.as_deref() == Some(kid)).collect()
            }
            _ => self.with_thumbprint(named),
        };
        if meant.is_empty() {
            return Err(NoKey::Unknown);
        }
        let fitting = meant
            .into_iter()
            .filter(|key| key.algorithms.contains(&algorithm));
        let found: Vec<&DecodingKey> = fitting.map(|key| &key.decoding).collect();
        if found.is_empty() {
            return Err(NoKey::OtherAlgorithm);
        }
        // A set of keys without `kid` comes from a file that an operator chose, so all of its keys
        // are tried.
        if named.kid.is_none() && !are_unnamed && found.len() > TRIES_MAX {
            return Err(NoKey::TooMany);
        }
        Ok(found)
    }

    /// Returns the keys whose certificate the access token refers to. Returns all keys if the access token does not
    /// refer to a certificate, or if the key set has no certificates.
    fn with_thumbprint(&self, named: Named<'_>) -> Vec<&Key> {
        let pairs = |key: &Key| {
            let Thumbprints { sha1, sha256 } = &key.thumbprints;
            let pairs = [(named.sha1, sha1.clone()), (named.sha256, sha256.clone())];
            pairs.map(|(named, known)| Some((named?.trim_end_matches('=').to_owned(), known?)))
        };
        let is_known = |key: &Key| pairs(key).iter().any(Option::is_some);
        let is_named = |key: &Key| {
            pairs(key)
                .into_iter()
                .flatten()
                .any(|(named, known)| named == known)
        };
        let keys = self.keys.iter();
        if self.keys.iter().any(is_known) {
            keys.filter(|key| is_named(key)).collect()
        } else {
            keys.collect()
        }
    }
}

impl Key {
    fn new(algorithms: Vec<Algorithm>, decoding: DecodingKey) -> Self {
        Self {
            kid: None,
            thumbprints: Thumbprints::default(),
            algorithms,
            decoding,
        }
    }
}

impl Thumbprints {
    fn of(certificate: &[u8]) -> Self {
        let digest = |algorithm| {
            let digest = digest::digest(algorithm, certificate);
            Some(Base64UrlUnpadded::encode_string(digest.as_ref()))
        };
        Self {
            sha1: digest(&digest::SHA1_FOR_LEGACY_USE_ONLY),
            sha256: digest(&digest::SHA256),
        }
    }
}

impl Jwk {
    fn key(self) -> Result<Key, Unused> {
        if self
            .purpose
            .as_deref()
            .is_some_and(|purpose| purpose != "sig")
        {
            return Err(Unused::Other("the key's `use` is not `sig`".to_owned()));
        }
        if let Some(operations) = &self.key_ops
            && !operations.iter().any(|operation| operation == "verify")
        {
            return Err(Unused::Other(
                "the key's `key_ops` do not allow `verify`".to_owned(),
            ));
        }
        let key = self.public_key()?;
        let wanted = self.alg.as_deref();
        let algorithms: Vec<Algorithm> = key
            .algorithms
            .into_iter()
            .filter(|algorithm| wanted.is_none_or(|wanted| wanted == algorithm.as_str()))
            .collect();
        if algorithms.is_empty() {
            let alg = shown(wanted.unwrap_or(""));
            return Err(Unused::Other(format!("the key's `alg` is {alg}")));
        }
        let plain = |text: String| text.trim_end_matches('=').to_owned();
        Ok(Key {
            kid: self.kid,
            thumbprints: Thumbprints {
                sha1: self.x5t.map(plain),
                sha256: self.x5t_sha256.map(plain),
            },
            algorithms,
            decoding: key.decoding,
        })
    }

    fn public_key(&self) -> Result<Key, Unused> {
        let member = |value: &Option<String>, member: &'static str| {
            let text = value.as_deref().ok_or(KeyError::Missing(member))?;
            Base64UrlUnpadded::decode_vec(text.trim_end_matches('='))
                .map_err(|source| KeyError::Base64 { member, source })
        };
        let point = || {
            let (x, y) = (member(&self.x, "x")?, member(&self.y, "y")?);
            Ok::<_, KeyError>([vec![UNCOMPRESSED], x, y].concat())
        };
        let key = match (self.kty.as_str(), self.crv.as_deref()) {
            ("RSA", _) => {
                member(&self.n, "n").and_then(|modulus| rsa(&modulus, &member(&self.e, "e")?))
            }
            ("EC", Some("P-256")) => point().and_then(|point| elliptic(&point, Algorithm::ES256)),
            ("EC", Some("P-384")) => point().and_then(|point| elliptic(&point, Algorithm::ES384)),
            ("OKP", Some("Ed25519")) => member(&self.x, "x").and_then(|x| edwards(&x)),
            (kty, curve) => {
                let kind = format!(
                    "the key's type is {} {}",
                    shown(kty),
                    curve.map_or_else(String::new, shown)
                );
                return Err(Unused::Other(kind));
            }
        };
        key.map_err(Unused::Bad)
    }
}

/// First byte of an uncompressed point (SEC 1 section 2.3.3).
const UNCOMPRESSED: u8 = 4;

fn from_info(info: &SubjectPublicKeyInfo<'_>) -> Result<Key, KeyError> {
    if info.algorithm.algorithm == OID_SIG_ED25519 {
        return edwards(&info.subject_public_key.data);
    }
    match info.parsed() {
        Ok(PublicKey::RSA(key)) => rsa(trim_zeros(key.modulus), trim_zeros(key.exponent)),
        Ok(PublicKey::EC(point)) => {
            let curve = info.algorithm.parameters.as_ref();
            let curve = curve
                .and_then(|any| any.as_oid().ok())
                .ok_or(KeyError::Type)?;
            if curve == OID_EC_P256 {
                elliptic(point.data(), Algorithm::ES256)
            } else if curve == OID_NIST_EC_P384 {
                elliptic(point.data(), Algorithm::ES384)
            } else {
                Err(KeyError::Type)
            }
        }
        _ => Err(KeyError::Type),
    }
}

fn rsa(modulus: &[u8], exponent: &[u8]) -> Result<Key, KeyError> {
    let (modulus, exponent) = (trim_zeros(modulus), trim_zeros(exponent));
    strength::check_rsa(modulus, exponent)?;
    let decoding = DecodingKey::from_rsa_raw_components(modulus, exponent);
    Ok(Key::new(RSA.to_vec(), decoding))
}

fn elliptic(point: &[u8], algorithm: Algorithm) -> Result<Key, KeyError> {
    match algorithm {
        Algorithm::ES256 => strength::check_nist(point, 32, &signature::ECDSA_P256_SHA256_FIXED)?,
        _ => strength::check_nist(point, 48, &signature::ECDSA_P384_SHA384_FIXED)?,
    }
    Ok(Key::new(vec![algorithm], DecodingKey::from_ec_der(point)))
}

fn edwards(point: &[u8]) -> Result<Key, KeyError> {
    strength::check_ed25519(point)?;
    Ok(Key::new(
        vec![Algorithm::EdDSA],
        DecodingKey::from_ed_der(point),
    ))
}

/// Quotes and shortens a string from a provider for the log.
fn shown(text: &str) -> String {
    format!("{:?}", plain(text, SHOWN_CHARS_MAX))
}

/// Shortens the description of a problem for the log. A parser's error message repeats the input
/// that the parser cannot parse, and a provider may send a long input.
fn brief(problem: &str) -> String {
    plain(problem, PROBLEM_CHARS_MAX)
}

/// Returns the first characters of a string, with `...` if the string is longer. Each character
/// outside printable ASCII becomes `?`, because an escape sequence would make the string longer.
fn plain(text: &str, chars_max: usize) -> String {
    let printable = |c: char| {
        if c.is_ascii() && !c.is_ascii_control() {
            c
        } else {
            '?'
        }
    };
    let mut cut: String = text.chars().take(chars_max).map(printable).collect();
    if text.chars().nth(chars_max).is_some() {
        cut.push_str("...");
    }
    cut
}

fn trim_zeros(number: &[u8]) -> &[u8] {
    let significant = number.iter().position(|byte| *byte != 0);
    number
        .get(significant.unwrap_or(number.len())..)
        .unwrap_or(&[])
}
