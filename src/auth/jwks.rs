//! The keys that an issuer's tokens are verified with: what a key set, or a PEM file, says.
//!
//! A key is used for what it is for and nothing else: its type, its curve, its `use`, its `key_ops` and its `alg` all limit
//! the algorithms it may verify. What a set holds beside such keys is left out; a set with none of them is not a set.
//!
//! Mitigation: M19 of `THREAT_MODEL.md`.

use std::collections::BTreeSet;

use aws_lc_rs::digest;
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

use crate::pem;

use super::issuer::Algorithm;

mod fetch;
mod keys;

pub(super) use fetch::SET_BYTES_MAX;
pub(super) use keys::{Keys, Pace};

/// Most keys in a set. Providers publish two or three.
const KEYS_MAX: usize = 64;
/// Shortest RSA modulus, in bits.
const RSA_BITS_MIN: usize = 2_048;

const RSA: [Algorithm; 6] = [
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::PS384,
    Algorithm::PS512,
];

/// The keys of one issuer at one moment.
#[derive(Debug)]
pub(super) struct KeySet {
    keys: Vec<Key>,
    /// SHA-256 of the bytes it was read from.
    digest: [u8; 32],
}

#[derive(Debug)]
struct Key {
    kid: Option<String>,
    algorithms: Vec<Algorithm>,
    decoding: DecodingKey,
}

/// Why a set has no key for a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoKey {
    /// None of that name. A newer set may have it.
    Unknown,
    /// The token names none, and there are several.
    Unnamed,
    /// It is not for that algorithm.
    OtherAlgorithm,
}

/// A key of a set (RFC 7517, RFC 7518, RFC 8037), as far as it matters here.
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
}

#[derive(Deserialize)]
struct Jwks {
    keys: Vec<serde_json::Value>,
}

impl KeySet {
    /// From the JSON of a key set.
    pub(super) fn parse_jwks(bytes: &[u8]) -> Result<Self, String> {
        let set: Jwks = serde_json::from_slice(bytes)
            .map_err(|error| format!("it is not a JSON Web Key Set: {error}"))?;
        let mut keys = Vec::new();
        let mut left_out = BTreeSet::new();
        for value in set.keys {
            let kid = value.get("kid").map(ToString::to_string);
            let read = serde_json::from_value::<Jwk>(value)
                .map_err(|error| error.to_string())
                .and_then(Jwk::key);
            match read {
                Ok(key) => keys.push(key),
                Err(why) => {
                    left_out.insert(format!("{}: {why}", kid.unwrap_or_default()));
                }
            }
        }
        if !left_out.is_empty() {
            tracing::debug!(?left_out, "keys of the set that verify no token here");
        }
        Self::of(keys, bytes).map_err(|problem| {
            if left_out.is_empty() {
                problem
            } else {
                format!("{problem}; left out: {left_out:?}")
            }
        })
    }

    /// From public keys, or certificates, in PEM.
    pub(super) fn parse_pem(bytes: &[u8]) -> Result<Self, String> {
        let mut keys = Vec::new();
        for block in pem::blocks(bytes).map_err(|error| error.to_string())? {
            match block.kind() {
                Some(SectionKind::PublicKey) => {
                    let (_, info) = SubjectPublicKeyInfo::from_der(block.der())
                        .map_err(|error| format!("a public key does not parse: {error}"))?;
                    keys.push(from_info(&info)?);
                }
                Some(SectionKind::Certificate) => {
                    let (_, certificate) = X509Certificate::from_der(block.der())
                        .map_err(|error| format!("a certificate does not parse: {error}"))?;
                    keys.push(from_info(certificate.public_key())?);
                }
                _ if block.is_private_key() => {
                    return Err(
                        "it holds a private key, with which tokens for any user can be made; remove it from this machine, and \
                         write the public key with `openssl pkey -in private.pem -pubout`"
                            .to_owned(),
                    );
                }
                _ => return Err(block.unexpected().to_string()),
            }
        }
        Self::of(keys, bytes)
    }

    fn of(keys: Vec<Key>, bytes: &[u8]) -> Result<Self, String> {
        if keys.is_empty() {
            return Err("it holds no public key that verifies signatures".to_owned());
        }
        if keys.len() > KEYS_MAX {
            return Err(format!("it holds more than {KEYS_MAX} keys"));
        }
        let digest = digest::digest(&digest::SHA256, bytes);
        Ok(Self {
            keys,
            digest: digest.as_ref().try_into().expect("SHA-256 gives 32 bytes"),
        })
    }

    /// What tells one set from the next.
    pub(super) fn digest(&self) -> &[u8; 32] {
        &self.digest
    }

    /// Names of its keys, for the log.
    pub(super) fn names(&self) -> Vec<&str> {
        let names = self.keys.iter().map(|key| key.kid.as_deref());
        names.map(|name| name.unwrap_or("(no name)")).collect()
    }

    /// The keys that a token with that `kid` may be signed with: one, or those of a set that names none.
    pub(super) fn find(
        &self,
        kid: Option<&str>,
        algorithm: Algorithm,
    ) -> Result<Vec<&DecodingKey>, NoKey> {
        let are_unnamed = self.keys.iter().all(|key| key.kid.is_none());
        let meant: Vec<&Key> = match kid {
            _ if are_unnamed => self.keys.iter().collect(),
            Some(kid) => {
                let named = self.keys.iter();
                named
                    .filter(|key| key.kid.as_deref() == Some(kid))
                    .collect()
            }
            None if self.keys.len() == 1 => self.keys.iter().collect(),
            None => return Err(NoKey::Unnamed),
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
        Ok(found)
    }
}

impl Jwk {
    fn key(self) -> Result<Key, String> {
        if self
            .purpose
            .as_deref()
            .is_some_and(|purpose| purpose != "sig")
        {
            return Err("its `use` is not `sig`".to_owned());
        }
        if let Some(operations) = &self.key_ops
            && !operations.iter().any(|operation| operation == "verify")
        {
            return Err("its `key_ops` do not allow `verify`".to_owned());
        }
        let member = |value: &Option<String>, name: &str| {
            let text = value.as_deref().ok_or(format!("it has no `{name}`"))?;
            Base64UrlUnpadded::decode_vec(text.trim_end_matches('='))
                .map_err(|_| format!("its `{name}` is not base64url"))
        };
        let key = match (self.kty.as_str(), self.crv.as_deref()) {
            ("RSA", _) => rsa(&member(&self.n, "n")?, &member(&self.e, "e")?),
            ("EC", Some(curve @ ("P-256" | "P-384"))) => {
                let point = [
                    vec![UNCOMPRESSED],
                    member(&self.x, "x")?,
                    member(&self.y, "y")?,
                ];
                let algorithm = match curve {
                    "P-256" => Algorithm::ES256,
                    _ => Algorithm::ES384,
                };
                elliptic(&point.concat(), algorithm)
            }
            ("OKP", Some("Ed25519")) => edwards(&member(&self.x, "x")?),
            (kty, curve) => Err(format!("its type is {kty:?} {}", curve.unwrap_or(""))),
        }?;
        let wanted = self.alg.as_deref();
        let algorithms: Vec<Algorithm> = key
            .algorithms
            .into_iter()
            .filter(|algorithm| wanted.is_none_or(|wanted| wanted == algorithm.as_str()))
            .collect();
        if algorithms.is_empty() {
            return Err(format!("its `alg` is {:?}", wanted.unwrap_or("")));
        }
        Ok(Key {
            kid: self.kid,
            algorithms,
            decoding: key.decoding,
        })
    }
}

/// First byte of an uncompressed point (SEC 1 section 2.3.3).
const UNCOMPRESSED: u8 = 4;

fn from_info(info: &SubjectPublicKeyInfo<'_>) -> Result<Key, String> {
    let unknown = || "a public key of a type that signs no tokens here".to_owned();
    if info.algorithm.algorithm == OID_SIG_ED25519 {
        return edwards(&info.subject_public_key.data);
    }
    match info.parsed() {
        Ok(PublicKey::RSA(key)) => rsa(trim_zeros(key.modulus), trim_zeros(key.exponent)),
        Ok(PublicKey::EC(point)) => {
            let curve = info.algorithm.parameters.as_ref();
            let curve = curve
                .and_then(|any| any.as_oid().ok())
                .ok_or_else(unknown)?;
            if curve == OID_EC_P256 {
                elliptic(point.data(), Algorithm::ES256)
            } else if curve == OID_NIST_EC_P384 {
                elliptic(point.data(), Algorithm::ES384)
            } else {
                Err(unknown())
            }
        }
        _ => Err(unknown()),
    }
}

fn rsa(modulus: &[u8], exponent: &[u8]) -> Result<Key, String> {
    let bits = trim_zeros(modulus).len() * 8;
    if bits < RSA_BITS_MIN {
        return Err(format!(
            "an RSA key of {bits} bits; {RSA_BITS_MIN} is the least"
        ));
    }
    Ok(Key {
        kid: None,
        algorithms: RSA.to_vec(),
        decoding: DecodingKey::from_rsa_raw_components(trim_zeros(modulus), trim_zeros(exponent)),
    })
}

fn elliptic(point: &[u8], algorithm: Algorithm) -> Result<Key, String> {
    let coordinate = match algorithm {
        Algorithm::ES256 => 32,
        _ => 48,
    };
    if point.len() != 1 + 2 * coordinate || point.first() != Some(&UNCOMPRESSED) {
        return Err("a point that is not on its curve's coordinates".to_owned());
    }
    Ok(Key {
        kid: None,
        algorithms: vec![algorithm],
        decoding: DecodingKey::from_ec_der(point),
    })
}

fn edwards(point: &[u8]) -> Result<Key, String> {
    if point.len() != 32 {
        return Err("an Ed25519 key that is not 32 bytes long".to_owned());
    }
    Ok(Key {
        kid: None,
        algorithms: vec![Algorithm::EdDSA],
        decoding: DecodingKey::from_ed_der(point),
    })
}

fn trim_zeros(number: &[u8]) -> &[u8] {
    let significant = number.iter().position(|byte| *byte != 0);
    number
        .get(significant.unwrap_or(number.len())..)
        .unwrap_or(&[])
}
