//! Bearer tokens (RFC 7519, RFC 9068): the configuration says what a token must be, and the token says only who it is for.
//!
//! The one thing that is read before the signature is verified is `iss`, to choose the configuration; with the wrong one
//! the signature does not verify. The header's `alg` is compared with what the issuer may use and what the key is for, and
//! chooses nothing. No key in a token and no address of one is ever followed: such tokens are refused.
//!
//! Mitigation: M19 of `THREAT_MODEL.md`.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use aws_lc_rs::digest;
use jsonwebtoken::{TokenData, Validation, errors::ErrorKind};
use moka::sync::Cache;
use serde_json::{Map, Value};
use tokio_util::sync::CancellationToken;

use crate::{call::Timestamp, error::Error, principal::Principal};

use super::{
    issuer::{self, Algorithm, Settings},
    jwks::{KeySet, Keys, NoKey, Pace},
};

mod claims;
mod parts;
mod refusal;
#[cfg(test)]
mod tests;

use parts::Parts;
use refusal::{Cause, Refusal, shown};

/// Longest token, in bytes.
pub const TOKEN_BYTES_MAX: usize = 8 * 1024;
/// Verified tokens that are remembered.
const VERIFIED_MAX: u64 = 10_000;
/// For how long, at most.
const VERIFIED_FOR: Duration = Duration::from_mins(1);

/// Knows the issuers.
#[derive(Debug)]
pub struct Tokens {
    issuers: Vec<Arc<Issuer>>,
    /// By `iss`.
    by_name: HashMap<String, usize>,
    /// By SHA-256 of the token.
    verified: Cache<[u8; 32], Verified>,
}

#[derive(Debug)]
struct Issuer {
    settings: Settings,
    keys: Arc<Keys>,
}

/// A token that was found good, and until when that may be said again.
#[derive(Clone, Debug)]
struct Verified {
    principal: Arc<Principal>,
    issuer: usize,
    /// Digest of the key set that it was verified with.
    set: [u8; 32],
    /// By the clock of the token.
    until: Timestamp,
    /// By ours.
    since: Instant,
}

impl Tokens {
    /// From issuers that are good by themselves and beside each other. A provider may be down.
    pub fn new(issuers: &[Settings]) -> Result<Self, String> {
        Self::paced(issuers, Pace::of)
    }

    fn paced(issuers: &[Settings], pace: impl Fn(&Settings) -> Pace) -> Result<Self, String> {
        if let Some(problem) = issuer::problems(issuers).into_iter().next() {
            return Err(problem);
        }
        let mut known = Vec::with_capacity(issuers.len());
        let mut by_name = HashMap::new();
        for settings in issuers {
            let keys = Keys::new(settings, pace(settings))
                .map_err(|problem| format!("issuer {:?}: {problem}", settings.name))?;
            by_name.insert(settings.issuer.clone(), known.len());
            known.push(Arc::new(Issuer {
                settings: settings.clone(),
                keys: Arc::new(keys),
            }));
        }
        Ok(Self {
            issuers: known,
            by_name,
            verified: Cache::builder()
                .max_capacity(VERIFIED_MAX)
                .time_to_live(VERIFIED_FOR)
                .build(),
        })
    }

    /// Keeps the key sets fresh until `stop`.
    pub async fn refresh(self: Arc<Self>, stop: CancellationToken) {
        let issuers = self.issuers.iter();
        let refreshing = issuers.map(|issuer| Arc::clone(&issuer.keys).refresh(stop.clone()));
        futures_util::future::join_all(refreshing).await;
    }

    /// Waits until every provider was asked for its keys once, whatever came of it, at most for so long. Whoever calls before that
    /// is refused for no fault of theirs, and some clients take that for the end of their session.
    pub async fn asked_once(&self, patience: Duration) {
        let until = Instant::now() + patience;
        let is_open = |issuer: &Arc<Issuer>| {
            issuer.keys.current().is_err() && issuer.keys.problem().is_none()
        };
        while self.issuers.iter().any(is_open) && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The principal that a token is for. The caller learns only that it is not accepted; the log, why.
    pub async fn verify(&self, token: &[u8]) -> Result<Arc<Principal>, Error> {
        let mut name = "";
        self.find(token, &mut name).await.map_err(|refusal| {
            let issuer = if name.is_empty() { "unknown" } else { name };
            metrics::counter!(
                "keybroker_token_refusals_total",
                "issuer" => issuer.to_owned(), "cause" => refusal.cause.as_str()
            )
            .increment(1);
            let detail = if name.is_empty() {
                format!("token refused: {}", refusal.detail)
            } else {
                format!("token of the issuer {name:?} refused: {}", refusal.detail)
            };
            refusal.cause.error(detail)
        })
    }

    /// `name` becomes that of the issuer as soon as it is known.
    async fn find<'a>(
        &'a self,
        token: &[u8],
        name: &mut &'a str,
    ) -> Result<Arc<Principal>, Refusal> {
        if token.len() > TOKEN_BYTES_MAX {
            return Err(Cause::Oversized.because(format!(
                "it has {} bytes; {TOKEN_BYTES_MAX} are the most",
                token.len()
            )));
        }
        let digest = sha256(token);
        if let Some(known) = self.remembered(&digest) {
            return Ok(known);
        }
        let parts = Parts::read(token)?;
        let Some(at) = self.by_name.get(parts.issuer()?).copied() else {
            return Err(Cause::Issuer.because(format!(
                "its `iss` is {}, which no [[issuer]] has",
                shown(parts.issuer()?)
            )));
        };
        let issuer = &self.issuers[at];
        *name = &issuer.settings.name;
        let (claims, set) = issuer.verify(token, &parts).await?;
        let (identity, until) = claims::identity(&issuer.settings, &claims, Timestamp::now())?;
        let principal = Arc::new(Principal::authenticated(identity));
        let verified = Verified {
            principal: Arc::clone(&principal),
            issuer: at,
            set: *set.digest(),
            until,
            since: Instant::now(),
        };
        self.verified.insert(digest, verified);
        Ok(principal)
    }

    /// A token that was found good a moment ago, with keys that are still in use.
    fn remembered(&self, digest: &[u8; 32]) -> Option<Arc<Principal>> {
        let known = self.verified.get(digest)?;
        let set = self.issuers[known.issuer].keys.current().ok();
        let is_good = known.until > Timestamp::now()
            && known.since.elapsed() < VERIFIED_FOR
            && set.is_some_and(|set| *set.digest() == known.set);
        if !is_good {
            self.verified.invalidate(digest);
            return None;
        }
        Some(known.principal)
    }
}

impl Issuer {
    /// The claims of a token whose header is in order and whose signature verifies.
    async fn verify(
        &self,
        token: &[u8],
        parts: &Parts,
    ) -> Result<(Map<String, Value>, Arc<KeySet>), Refusal> {
        let algorithm = parts.algorithm(&self.settings)?;
        parts.check_type(&self.settings)?;
        let kid = parts.kid()?;
        let set = self.keys.current();
        let mut set = set.map_err(|problem| Cause::NoKeys.because(problem))?;
        if set.find(kid, algorithm).err() == Some(NoKey::Unknown)
            && let Some(newer) = self.keys.newer_than(&set).await
        {
            set = newer;
        }
        let keys = set.find(kid, algorithm).map_err(|why| match why {
            NoKey::Unknown => Cause::KeyId.because(format!(
                "its `kid` is {}, which is none of {:?}",
                shown(kid.unwrap_or("")),
                set.names()
            )),
            NoKey::Unnamed => Cause::KeyId.because(format!(
                "it names no `kid`, and there are several keys: {:?}",
                set.names()
            )),
            NoKey::OtherAlgorithm => Cause::Algorithm.because(format!(
                "its `alg` is {}, which is not what the key is for",
                algorithm.as_str()
            )),
        })?;
        let validation = self.validation(algorithm);
        let mut refused = Cause::Signature.because("no key".to_owned());
        for key in keys {
            match jsonwebtoken::decode(token, key, &validation) {
                Ok(TokenData { claims, .. }) => return Ok((claims, set)),
                Err(error) => refused = self.refusal(&error),
            }
            if refused.cause != Cause::Signature {
                break;
            }
        }
        Err(refused)
    }

    fn validation(&self, algorithm: Algorithm) -> Validation {
        let mut validation = Validation::new(algorithm.into());
        validation.leeway = self.settings.leeway_s.into();
        validation.validate_nbf = true;
        validation.set_issuer(&[&self.settings.issuer]);
        let mut required = vec!["exp", "iss", "sub"];
        if self.settings.audience.is_empty() {
            validation.validate_aud = false;
        } else {
            required.push("aud");
            let audience: Vec<&String> = self.settings.audience.iter().collect();
            validation.set_audience(&audience);
        }
        validation.set_required_spec_claims(&required);
        validation
    }

    fn refusal(&self, error: &jsonwebtoken::errors::Error) -> Refusal {
        let leeway = self.settings.leeway_s;
        match error.kind() {
            ErrorKind::InvalidSignature => Cause::Signature.because(
                "its signature does not verify: it was changed, or signed with another key of the same name",
            ),
            ErrorKind::ExpiredSignature => {
                Cause::Expired.because(format!("its `exp` has passed by more than {leeway} s"))
            }
            ErrorKind::ImmatureSignature => Cause::NotYetValid.because(format!(
                "its `nbf` is more than {leeway} s ahead: look at both clocks"
            )),
            ErrorKind::InvalidAudience => Cause::Audience.because(format!(
                "its `aud` holds none of {:?}",
                self.settings.audience
            )),
            ErrorKind::MissingRequiredClaim(claim) => {
                Cause::Claim.because(format!("it has no `{claim}`, or not in the form that it must have"))
            }
            ErrorKind::InvalidIssuer => Cause::Issuer.because("its `iss` is not one text"),
            _ => Cause::Malformed.because(format!("{error}")),
        }
    }
}

impl From<Algorithm> for jsonwebtoken::Algorithm {
    fn from(algorithm: Algorithm) -> Self {
        match algorithm {
            Algorithm::RS256 => Self::RS256,
            Algorithm::RS384 => Self::RS384,
            Algorithm::RS512 => Self::RS512,
            Algorithm::PS256 => Self::PS256,
            Algorithm::PS384 => Self::PS384,
            Algorithm::PS512 => Self::PS512,
            Algorithm::ES256 => Self::ES256,
            Algorithm::ES384 => Self::ES384,
            Algorithm::EdDSA => Self::EdDSA,
        }
    }
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = digest::digest(&digest::SHA256, bytes);
    digest.as_ref().try_into().expect("SHA-256 gives 32 bytes")
}
