//! Access tokens: none but those that the issuer signed is accepted.

use std::{collections::HashSet, fs, sync::LazyLock};

use serde_json::json;
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};

use keybroker_auth::token::Tokens;

use super::issuer;

pub(crate) const WORDS: &[&str] = &[
    ".",
    "eyJ",
    "e30",
    "eyJhbGciOiJub25lIn0",
    "eyJhbGciOiJFZERTQSJ9",
    "=",
    "_",
    "-",
];

struct World {
    runtime: Runtime,
    tokens: Tokens,
    signed: Vec<String>,
    accepted: HashSet<Vec<u8>>,
    _directory: TempDir,
}

static WORLD: LazyLock<World> = LazyLock::new(|| {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("keys.json");
    fs::write(&path, issuer::jwks().to_string()).unwrap();
    let claims = issuer::claims();
    let signed: Vec<String> = [
        json!({ "alg": "EdDSA", "kid": "first", "typ": "at+jwt" }),
        json!({ "alg": "EdDSA" }),
    ]
    .iter()
    .map(|header| issuer::token(header, &claims))
    .collect();
    World {
        runtime: Builder::new_current_thread().enable_time().build().unwrap(),
        tokens: Tokens::new(&[issuer::settings(&path)]).unwrap(),
        accepted: signed
            .iter()
            .map(|token| token.clone().into_bytes())
            .collect(),
        signed,
        _directory: directory,
    }
});

/// Verifies an access token.
///
/// # Panics
/// If a token is accepted that the issuer did not sign, or one that it signed is refused.
pub fn access_token(token: &[u8]) -> bool {
    let world = &*WORLD;
    let verified = world.runtime.block_on(world.tokens.verify(token));
    assert_eq!(
        verified.is_ok(),
        world.accepted.contains(token),
        "{verified:?}"
    );
    verified.is_ok()
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let signed = WORLD.signed.iter();
    signed.map(|token| token.clone().into_bytes()).collect()
}
