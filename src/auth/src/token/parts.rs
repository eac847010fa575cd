//! The parts of an access token or an ID token before it is verified.

use base64ct::{Base64UrlUnpadded, Encoding as _};
use serde_json::{Map, Value};

use crate::{
    issuer::{Algorithm, Settings},
    jwks::Named,
};

use super::refusal::{Cause, Refusal, shown};

/// The header members that contain a key or the address of a key. A key inside the access token
/// proves nothing, because anyone can create such an access token.
const KEYS_OF_ITS_OWN: [&str; 4] = ["jku", "jwk", "x5u", "x5c"];

/// The header and the claims, both unverified.
pub(super) struct Parts {
    /// The name of the JSON Web Token in messages: `access token` or `ID token`.
    noun: &'static str,
    header: Map<String, Value>,
    claims: Map<String, Value>,
}

impl Parts {
    pub(super) fn read(noun: &'static str, token: &[u8]) -> Result<Self, Refusal> {
        let parts: Vec<&[u8]> = token.split(|byte| *byte == b'.').collect();
        let [header, claims, _signature] = parts[..] else {
            return Err(Cause::Malformed.because(format!(
                "the {noun} has {} parts instead of three, so it is not a signed JSON Web Token",
                parts.len()
            )));
        };
        let read = |part: &[u8], name: &str| {
            str::from_utf8(part)
                .ok()
                .and_then(|text| Base64UrlUnpadded::decode_vec(text).ok())
                .and_then(|json| serde_json::from_slice(&json).ok())
                .ok_or_else(|| {
                    Cause::Malformed
                        .because(format!("the {name} is not a JSON object in base64url"))
                })
        };
        Ok(Self {
            noun,
            header: read(header, "header")?,
            claims: read(claims, "payload")?,
        })
    }

    /// The name of the JSON Web Token in messages: `access token` or `ID token`.
    pub(super) fn noun(&self) -> &'static str {
        self.noun
    }

    /// Returns the issuer that the access token claims. The value is used only to choose the configuration of an
    /// issuer.
    pub(super) fn issuer(&self) -> Result<&str, Refusal> {
        let issuer = self.claims.get("iss").and_then(Value::as_str);
        issuer.ok_or_else(|| Cause::Issuer.because(format!("the {} has no `iss`", self.noun)))
    }

    /// Returns the time of issue that the access token claims, in seconds since 1970.
    pub(super) fn issued_s(&self) -> Option<i64> {
        self.claims.get("iat").and_then(Value::as_i64)
    }

    /// Returns the algorithm of the access token if the issuer's configuration permits this
    /// algorithm. Refuses headers with keys or with unknown extensions.
    pub(super) fn algorithm(&self, settings: &Settings) -> Result<Algorithm, Refusal> {
        for member in KEYS_OF_ITS_OWN {
            if self.header.contains_key(member) {
                return Err(Cause::Header.because(format!(
                    "the header has `{member}`, but the broker does not trust keys that an {} itself contains or \
                     refers to",
                    self.noun
                )));
            }
        }
        if self.header.contains_key("crit") {
            return Err(Cause::Header
                .because("the header has `crit`, but the broker supports no extensions"));
        }
        let name = self.header.get("alg").and_then(Value::as_str).unwrap_or("");
        let algorithm = Algorithm::parse(name).filter(|one| settings.algorithms.contains(one));
        algorithm.ok_or_else(|| {
            Cause::Algorithm.because(format!(
                "the `alg` is {}, but `algorithms` of the issuer is {:?}",
                shown(name),
                settings.algorithms
            ))
        })
    }

    /// Checks `typ`. The prefix `application/` may be omitted, and case is ignored (RFC 9068
    /// section 2.1).
    pub(super) fn check_type(&self, settings: &Settings) -> Result<(), Refusal> {
        if settings.token_types.is_empty() {
            return Ok(());
        }
        let plain = |text: &str| {
            let text = text.to_ascii_lowercase();
            text.strip_prefix("application/")
                .unwrap_or(&text)
                .to_owned()
        };
        let name = self.header.get("typ").and_then(Value::as_str).unwrap_or("");
        let mut wanted = settings.token_types.iter();
        if wanted.any(|wanted| plain(wanted) == plain(name)) {
            return Ok(());
        }
        Err(Cause::Type.because(format!(
            "the `typ` is {}, but `token_types` of the issuer is {:?}",
            shown(name),
            settings.token_types
        )))
    }

    /// Checks the `typ` of an ID token: `JWT`, or none. An access token of RFC 9068 has another type.
    pub(super) fn check_id_token_type(&self) -> Result<(), Refusal> {
        match self.header.get("typ") {
            None => Ok(()),
            Some(Value::String(typ)) if typ.eq_ignore_ascii_case("JWT") => Ok(()),
            Some(typ) => Err(Cause::Type.because(format!(
                "the `typ` is {}, which is not the type of an ID token",
                shown(typ.as_str().unwrap_or_default())
            ))),
        }
    }

    /// Returns the references to a key in the header.
    pub(super) fn named_key(&self) -> Result<Named<'_>, Refusal> {
        let text = |member: &str| match self.header.get(member) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.as_str())),
            Some(_) => Err(Cause::Malformed.because(format!("the `{member}` is not a string"))),
        };
        Ok(Named {
            kid: text("kid")?,
            sha1: text("x5t")?,
            sha256: text("x5t#S256")?,
        })
    }
}
