//! Verifies ID tokens (OpenID Connect Core section 3.1.3.7), with which a provider tells the broker who signed in.
//!
//! The keys, the algorithms and the mappings are those of the issuer's access tokens. The audience is the client id of the
//! broker at the provider, and the `nonce` binds the ID token to one sign-in.
//!
//! Mitigation: M30 of `THREAT_MODEL.md`.

use std::{collections::BTreeSet, sync::Arc};

use serde_json::{Map, Value};

use keybroker_core::{call::Timestamp, error::Error, principal::Principal};

use crate::issuer::Settings;

use super::{
    Issuer, Tokens, claims,
    parts::Parts,
    refusal::{Cause, Refusal, shown},
};

/// The name of an ID token in messages.
const ID_TOKEN: &str = "ID token";

/// Verifies the ID tokens that one issuer makes for one client.
#[derive(Debug)]
pub(crate) struct IdTokens {
    issuer: Issuer,
    client_id: String,
    bytes_max: usize,
}

impl Tokens {
    /// Returns the verifier of the ID tokens of an issuer; `None` if no issuer has this name.
    pub(crate) fn id_tokens(&self, issuer: &str, client_id: &str) -> Option<IdTokens> {
        let issuers = &mut self.issuers.iter();
        let found = issuers.find(|one| one.settings.name == issuer)?;
        let settings = Settings {
            audience: BTreeSet::from([client_id.to_owned()]),
            // ID tokens have no scopes, and their `typ` is checked separately.
            token_types: BTreeSet::new(),
            required_scopes: BTreeSet::new(),
            ..found.settings.clone()
        };
        Some(IdTokens {
            issuer: Issuer {
                settings,
                keys: Arc::clone(&found.keys),
            },
            client_id: client_id.to_owned(),
            bytes_max: self.token_bytes_max,
        })
    }
}

impl IdTokens {
    /// The settings of the issuer.
    pub(crate) fn settings(&self) -> &Settings {
        &self.issuer.settings
    }

    /// Returns the principal that an ID token identifies. Only the log has the reason of a refusal.
    pub(crate) async fn verify(&self, token: &[u8], nonce: &str) -> Result<Arc<Principal>, Error> {
        self.find(token, nonce).await.map_err(|refusal| {
            let (name, detail) = (&self.issuer.settings.name, &refusal.detail);
            refusal.error(format!("ID token of the issuer {name:?} refused: {detail}"))
        })
    }

    async fn find(&self, token: &[u8], nonce: &str) -> Result<Arc<Principal>, Refusal> {
        if token.len() > self.bytes_max {
            return Err(Cause::Oversized.because("the ID token is too long"));
        }
        let parts = Parts::read(ID_TOKEN, token)?;
        parts.check_id_token_type()?;
        let (claims, is_expired, _) = self.issuer.verify(token, &parts).await?;
        if is_expired {
            return Err(Cause::Expired.because("the `exp` of the ID token has passed"));
        }
        check_client(&claims, &self.client_id)?;
        let found = claims.get("nonce").and_then(Value::as_str);
        if found != Some(nonce) {
            let detail = "the `nonce` is not the nonce of this sign-in";
            return Err(Cause::Claim.because(detail));
        }
        let now = Timestamp::now();
        let (identity, _) = claims::identity_in(ID_TOKEN, &self.issuer.settings, &claims, now)?;
        let leeway_us = i64::from(self.issuer.settings.leeway_s) * 1_000_000;
        let authenticated = identity.claims.authenticated;
        if authenticated.is_some_and(|at| at.micros() > now.micros() + leeway_us) {
            return Err(Cause::Claim.because("the `auth_time` is in the future"));
        }
        Ok(Arc::new(Principal::authenticated(identity)))
    }
}

/// Checks `azp`, the client for which the ID token was issued. An ID token with several audiences must have it.
fn check_client(claims: &Map<String, Value>, client_id: &str) -> Result<(), Refusal> {
    let has_others = claims
        .get("aud")
        .and_then(Value::as_array)
        .is_some_and(|audiences| audiences.len() > 1);
    match claims.get("azp") {
        None if !has_others => Ok(()),
        Some(Value::String(azp)) if azp == client_id => Ok(()),
        Some(Value::String(azp)) => {
            let detail = format!("the `azp` is {}, which is another client", shown(azp));
            Err(Cause::Audience.because(detail))
        }
        _ => Err(Cause::Audience.because("there are several audiences, but `azp` names no client")),
    }
}
