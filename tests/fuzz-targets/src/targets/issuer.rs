//! An issuer of access tokens whose key is fixed.

use std::{path::Path, sync::LazyLock};

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
use base64ct::{Base64UrlUnpadded, Encoding as _};
use serde_json::{Value, json};

use keybroker_auth::issuer::Settings;
use keybroker_core::call::Timestamp;

const ISSUER: &str = "https://vault.example.org/identity";
pub(super) const ADA: &str = "4c2f1f2e-6d0b-4d9c-9b55-3f6a8f1e7d10";
/// The role with which a token gives the role `auditor`.
pub(super) const AUDITOR: &str = "keybroker-auditor";
/// Longest life of a token, in seconds.
pub(super) const LIFE_S: i64 = 3_600;

static KEY: LazyLock<Ed25519KeyPair> =
    LazyLock::new(|| Ed25519KeyPair::from_seed_unchecked(&[7; 32]).unwrap());

/// The settings of the issuer, with its keys in that file.
pub(super) fn settings(jwks_file: &Path) -> Settings {
    let text = format!(
        "name = \"vault\"\nissuer = \"{ISSUER}\"\njwks_file = \"{}\"\nalgorithms = [\"EdDSA\"]\nsubject = \"guid\"\n\
         token_lifetime_max_minutes = {}\naudience = [\"keys\"]\nrequired_scopes = [\"api\"]\ndevice_claim = \"device\"\n\
         organisation_claims = [\"orgowner\"]\n[required_claims]\namr = [\"Application\"]\n[attributes]\npremium = \"premium\"\n\
         [[mapping]]\nname = \"auditors\"\nwhen = [{{ claim = [\"realm_access\", \"roles\"], any_of = [\"{AUDITOR}\"] }}]\n\
         roles = [\"auditor\"]\n",
        jwks_file.display(),
        LIFE_S / 60
    );
    toml::from_str(&text).unwrap()
}

/// The key of the issuer as a key set.
pub(super) fn jwks() -> Value {
    let x = Base64UrlUnpadded::encode_string(KEY.public_key().as_ref());
    json!({ "keys": [{ "kty": "OKP", "crv": "Ed25519", "use": "sig", "alg": "EdDSA", "kid": "first", "x": x }] })
}

/// Claims that the issuer's settings accept now.
pub(super) fn claims() -> Value {
    let now = Timestamp::now().micros() / 1_000_000;
    json!({
        "iss": ISSUER, "sub": ADA, "aud": "keys", "iat": now - 60, "nbf": now - 60, "exp": now - 60 + LIFE_S,
        "scope": ["api", "offline_access"], "amr": ["Application"], "premium": true, "orgowner": ["one", "two"],
        "device": "phone", "auth_time": now - 90,
    })
}

/// A signed token.
pub(super) fn token(header: &Value, claims: &Value) -> String {
    let encoded = |value: &Value| Base64UrlUnpadded::encode_string(value.to_string().as_bytes());
    let signed = format!("{}.{}", encoded(header), encoded(claims));
    let signature = KEY.sign(signed.as_bytes());
    format!(
        "{signed}.{}",
        Base64UrlUnpadded::encode_string(signature.as_ref())
    )
}
