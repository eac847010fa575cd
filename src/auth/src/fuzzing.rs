//! Gives the fuzz targets of `tests/fuzz-targets` access to parsers of this crate. Only the fuzz
//! targets use this module.

use serde_json::{Map, Value};

use keybroker_core::{call::Timestamp, principal::Identity};

use super::{
    header::{self, Presented},
    issuer::{Algorithm, Settings},
    jwks::{KeySet, Named},
    token::claims,
};

/// Reads a key set in JSON, and looks up a key for every algorithm. Returns the number of keys, or `None` if the key
/// set is refused.
pub fn key_set(json: &[u8]) -> Option<usize> {
    Some(keys(&KeySet::parse_jwks(json).ok()?))
}

/// Reads public keys in PEM, and looks up a key for every algorithm.
pub fn key_file(pem: &[u8]) -> Option<usize> {
    Some(keys(&KeySet::parse_pem(pem).ok()?))
}

fn keys(set: &KeySet) -> usize {
    let kids: Vec<&str> = set.kids().collect();
    for algorithm in Algorithm::ALL {
        let names = kids.iter().map(|kid| Some(*kid)).chain([None]);
        for kid in names {
            let named = Named {
                kid,
                ..Named::default()
            };
            let _none_fits = set.find(named, algorithm);
        }
    }
    set.names().len()
}

/// Reads the claims of an access token without a check of its signature.
pub fn claims(settings: &Settings, json: &[u8], now: Timestamp) -> Option<Identity> {
    let said: Map<String, Value> = serde_json::from_slice(json).ok()?;
    let (identity, _) = claims::identity(settings, &said, now).ok()?;
    Some(identity)
}

/// Reads an `authorization` header. Returns the access token, or the id and the secret of an API client.
pub fn authorization(value: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    match header::read(&[value]).ok()? {
        Presented::Bearer(token) => Some((token.to_vec(), Vec::new())),
        Presented::Basic { id, secret } => Some((id.as_bytes().to_vec(), secret.to_vec())),
    }
}
