//! The keys of an issuer, as JSON and as PEM.

use serde_json::Value;

use keybroker_auth::fuzzing;

use super::{issuer, pem};

pub(crate) const WORDS: &[&str] = &[
    "\"keys\"",
    "\"kty\"",
    "\"RSA\"",
    "\"EC\"",
    "\"OKP\"",
    "\"crv\"",
    "\"P-256\"",
    "\"P-384\"",
    "\"Ed25519\"",
    "\"n\"",
    "\"e\"",
    "\"x\"",
    "\"y\"",
    "\"AQAB\"",
    "\"use\"",
    "\"enc\"",
    "\"key_ops\"",
    "\"kid\"",
    "\"alg\"",
    "null",
    "[",
    "]",
    "{",
    "}",
    ",",
    ":",
];

/// Most keys of a set that is accepted.
const KEYS_MAX: usize = 64;

/// Reads a key set, as JSON or as PEM.
///
/// # Panics
/// If a set is accepted without a key, with more keys than it has, or with too many.
pub fn key_set(bytes: &[u8]) -> bool {
    let in_json = fuzzing::key_set(bytes);
    if let Some(keys) = in_json {
        let set: Value = serde_json::from_slice(bytes).unwrap();
        assert!(keys <= set["keys"].as_array().unwrap().len());
    }
    let in_pem = fuzzing::key_file(bytes);
    assert!(in_json.is_none() || in_pem.is_none());
    let keys = in_json.or(in_pem);
    assert!(keys.is_none_or(|keys| (1..=KEYS_MAX).contains(&keys)));
    keys.is_some()
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    // An RSA key of 2,048 bits and an EC key: the examples of RFC 7517 appendix A.1.
    let others = r#"{"keys":[{"kty":"EC","crv":"P-256","x":"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4","y":"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM","use":"sig","kid":"1"},{"kty":"RSA","n":"0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw","e":"AQAB","alg":"RS256","kid":"2011-04-29"}]}"#;
    vec![
        issuer::jwks().to_string().into_bytes(),
        others.as_bytes().to_vec(),
        pem::CERTIFICATE.as_bytes().to_vec(),
    ]
}
