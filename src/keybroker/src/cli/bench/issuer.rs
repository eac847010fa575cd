//! An issuer of access tokens for one measurement.
//!
//! The signing key is generated for the run and exists only in the memory of this process. Only a
//! broker that this command starts with a changed copy of the configuration trusts the signing key.
//! The operator's configuration remains unchanged, and the copy is removed at the end. If this
//! process is killed, the copy may remain. The signing key is then lost, so no further access
//! tokens can be signed. The users of this issuer are in a separate tenant, so its access tokens
//! cannot release other users' keys.

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::{
    rand::SystemRandom,
    rsa::{KeyPair, KeySize},
    signature::{KeyPair as _, RSA_PKCS1_SHA256},
};
use base64ct::{Base64UrlUnpadded, Encoding as _};
use serde_json::{Value, json};
use toml::Table;

use crate::cli::exit::Failure;
use keybroker_core::key::Tenant;

use super::{internal, served::Changed};

const NAME: &str = "keybroker-bench";
/// The top-level domain `invalid` is reserved, so no identity provider can have this URL.
const ISSUER: &str = "https://keybroker-bench.invalid";
const TENANT: &str = "keybroker-bench";
const KEY_ID: &str = "bench";
/// Lifetime of the access tokens in seconds: longer than a login storm and its preparation.
const LIFETIME_S: u64 = 6 * 3_600;

/// Signs access tokens. Clones share the key.
#[derive(Clone)]
pub(super) struct Issuer(Arc<KeyPair>);

impl Issuer {
    /// Generates a key and adds the issuer, and a REST listener without client certificates, to a copy of the configuration.
    pub(super) fn trusted_by(changed: &mut Changed) -> Result<Self, Failure> {
        let issuer = Self(Arc::new(
            KeyPair::generate(KeySize::Rsa2048).map_err(internal)?,
        ));
        let keys = changed
            .folder
            .write("issuer.jwks", &issuer.key_set().to_string())?;
        let mut section = Table::new();
        for (name, value) in [("name", NAME), ("issuer", ISSUER), ("tenant", TENANT)] {
            section.insert(name.to_owned(), value.into());
        }
        let keys = keys.to_string_lossy().into_owned();
        section.insert("jwks_file".to_owned(), keys.into());
        section.insert("audience".to_owned(), vec![NAME].into());
        changed.push("issuer", section)?;
        let listener = rest_listener(&changed.configuration)?;
        changed.push("listener", listener)?;
        Ok(issuer)
    }

    /// The tenant of the users of this issuer.
    pub(super) fn tenant() -> Result<Tenant, Failure> {
        Tenant::parse(TENANT).map_err(internal)
    }

    /// Signs an access token for a user.
    pub(super) fn access_token(&self, user: &str) -> Result<String, Failure> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_err(internal)?.as_secs();
        let header = json!({"alg": "RS256", "typ": "at+jwt", "kid": KEY_ID});
        let claims = json!({
            "iss": ISSUER,
            "aud": NAME,
            "sub": user,
            "iat": now,
            "nbf": now,
            "exp": now + LIFETIME_S,
        });
        let message = format!("{}.{}", encoded(&header), encoded(&claims));
        let mut signature = vec![0; self.0.public_modulus_len()];
        let random = SystemRandom::new();
        self.0
            .sign(
                &RSA_PKCS1_SHA256,
                &random,
                message.as_bytes(),
                &mut signature,
            )
            .map_err(internal)?;
        let signature = Base64UrlUnpadded::encode_string(&signature);
        Ok(format!("{message}.{signature}"))
    }

    /// The public key as a JSON Web Key Set.
    fn key_set(&self) -> Value {
        let public = self.0.public_key();
        let number = |bytes: &[u8]| Base64UrlUnpadded::encode_string(bytes);
        json!({"keys": [{
            "kty": "RSA",
            "use": "sig",
            "alg": "RS256",
            "kid": KEY_ID,
            "n": number(public.modulus().big_endian_without_leading_zero()),
            "e": number(public.exponent().big_endian_without_leading_zero()),
        }]})
    }
}

fn encoded(part: &Value) -> String {
    Base64UrlUnpadded::encode_string(part.to_string().as_bytes())
}

/// A REST listener on a free port, with the server certificate of the first listener that has a
/// certificate.
fn rest_listener(configuration: &Table) -> Result<Table, Failure> {
    let listeners = configuration
        .get("listener")
        .and_then(toml::Value::as_array);
    let tls = listeners
        .into_iter()
        .flatten()
        .find_map(|listener| listener.get("tls")?.as_table())
        .ok_or_else(|| internal("no [[listener]] has a section `tls`"))?;
    let files = tls
        .iter()
        .filter(|(name, _)| ["certificate_file", "key_file"].contains(&name.as_str()))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect::<Table>();
    let mut listener = Table::new();
    listener.insert("address".to_owned(), "127.0.0.1:0".into());
    listener.insert("apis".to_owned(), vec!["rest"].into());
    listener.insert("client_certificates".to_owned(), "none".into());
    listener.insert("tls".to_owned(), files.into());
    Ok(listener)
}
