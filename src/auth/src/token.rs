//! Verifies access tokens (RFC 7519, RFC 9068). The configuration specifies the required content of
//! an access token. The access token only identifies its holder: it does not decide what the holder
//! may do.
//!
//! Before the signature is verified, `iss` chooses the configuration of the issuer. If `iss` is
//! forged, the verification of the signature fails. The header's `alg` must be an algorithm of both
//! the issuer and the key. The header cannot select another algorithm. An access token that
//! contains a key, or the address of a key, is refused.
//!
//! Mitigation: M19 of `THREAT_MODEL.md`.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use aws_lc_rs::digest;
use jsonwebtoken::{DecodingKey, TokenData, Validation, errors::ErrorKind};
use moka::sync::Cache;
use serde_json::{Map, Value};
use tokio_util::sync::CancellationToken;

use keybroker_core::{call::Timestamp, error::Error, metrics, principal::Principal};

use super::{
    issuer::{self, Algorithm, Settings},
    jwks::{KeySet, Keys, Named, Newer, NoKey, Pace, SourceError},
};

pub(super) mod claims;
mod id_token;
mod mapping;
mod parts;
mod refusal;
#[cfg(test)]
mod tests;

pub(crate) use id_token::IdTokens;

use parts::Parts;
use refusal::{Cause, Refusal, shown};

/// Default limit for the length of an access token, in bytes. Providers list each group or
/// organisation of a user in the access token. With 180 organisations, an access token is 9 to 11
/// KB long.
pub const TOKEN_BYTES_MAX: usize = 16 * 1024;
/// Total size of the verified access tokens that are remembered, in bytes.
const VERIFIED_BYTES_MAX: u64 = 32 * 1024 * 1024;
/// Memory that a remembered access token takes in addition to its claims, in bytes.
const VERIFIED_OVERHEAD: usize = 1024;
/// The value of the label `issuer` for access tokens whose issuer is not configured.
const UNKNOWN_ISSUER: &str = "unknown";
/// The name of an access token in messages. ID tokens pass through the same checks under their own name.
const ACCESS_TOKEN: &str = "access token";
/// Longest time for which a verified access token is remembered.
const VERIFIED_FOR: Duration = Duration::from_mins(1);

/// Verifies the access tokens of all issuers.
#[derive(Debug)]
pub struct Tokens {
    issuers: Vec<Arc<Issuer>>,
    /// The index of each issuer by its `iss`.
    by_name: HashMap<String, usize>,
    /// The verified access tokens. The key of the cache is the SHA-256 of an access token.
    verified: Cache<[u8; 32], Verified>,
    token_bytes_max: usize,
}

#[derive(Debug)]
struct Issuer {
    settings: Settings,
    keys: Arc<Keys>,
}

/// A verified access token, with the time until which the result may be reused.
#[derive(Clone, Debug)]
struct Verified {
    principal: Arc<Principal>,
    /// Length of the access token in bytes, which is an upper bound for the size of its claims.
    bytes: usize,
    issuer: usize,
    /// Digest of the key set that verified the access token.
    set: [u8; 32],
    /// The end of the access token's validity, on the wall clock.
    until: Timestamp,
    /// The time of the verification, on the monotonic clock.
    since: Instant,
}

/// The reason why the configured issuers are refused.
#[derive(Debug, thiserror::Error)]
pub enum IssuerError {
    /// The settings of an issuer are wrong.
    #[error("{0}")]
    Settings(String),
    /// The key file of an issuer cannot be used, or the HTTP client cannot be created.
    #[error("issuer {issuer:?}")]
    Keys {
        /// Name of the issuer.
        issuer: String,
        /// The cause.
        source: Box<SourceError>,
    },
}

impl Tokens {
    /// Creates a verifier. The settings of the issuers must be valid individually and in
    /// combination. The providers may be unavailable when the verifier is created.
    pub fn new(issuers: &[Settings]) -> Result<Self, IssuerError> {
        Self::paced(issuers, Pace::of)
    }

    fn paced(issuers: &[Settings], pace: impl Fn(&Settings) -> Pace) -> Result<Self, IssuerError> {
        if let Some(problem) = issuer::problems(issuers).into_iter().next() {
            return Err(IssuerError::Settings(problem));
        }
        let mut known = Vec::with_capacity(issuers.len());
        register_series(UNKNOWN_ISSUER);
        let mut by_name = HashMap::new();
        for settings in issuers {
            let keys = Keys::new(settings, pace(settings)).map_err(|source| IssuerError::Keys {
                issuer: settings.name.clone(),
                source: Box::new(source),
            })?;
            by_name.insert(settings.issuer.clone(), known.len());
            register_series(&settings.name);
            metrics::ISSUER_FETCH_FAILURES
                .with([settings.name.clone()])
                .increment(0);
            known.push(Arc::new(Issuer {
                settings: settings.clone(),
                keys: Arc::new(keys),
            }));
        }
        Ok(Self {
            issuers: known,
            by_name,
            verified: Cache::builder()
                .max_capacity(VERIFIED_BYTES_MAX)
                .weigher(|_, verified: &Verified| {
                    u32::try_from(verified.bytes + VERIFIED_OVERHEAD).unwrap_or(u32::MAX)
                })
                .time_to_live(VERIFIED_FOR)
                .build(),
            token_bytes_max: TOKEN_BYTES_MAX,
        })
    }

    /// Sets the largest accepted length of an access token, in bytes.
    #[must_use]
    pub fn with_token_bytes_max(self, token_bytes_max: usize) -> Self {
        Self {
            token_bytes_max,
            ..self
        }
    }

    /// Refreshes the key sets regularly until `stop` is cancelled.
    pub async fn refresh(self: Arc<Self>, stop: CancellationToken) {
        let issuers = self.issuers.iter();
        let refreshing = issuers.map(|issuer| Arc::clone(&issuer.keys).refresh(stop.clone()));
        futures_util::future::join_all(refreshing).await;
    }

    /// Waits until the broker has requested the keys of every provider once, successfully or not,
    /// but at most for `limit`. Without this wait, the broker would refuse valid access tokens
    /// immediately after its start. Some client programs log the user out after a refusal.
    pub async fn asked_once(&self, limit: Duration) {
        let until = Instant::now() + limit;
        let is_open = |issuer: &Arc<Issuer>| {
            issuer.keys.current().is_err() && issuer.keys.problem().is_none()
        };
        while self.issuers.iter().any(is_open) && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Returns the principal that an access token identifies. The reason for a refusal is only in
    /// the log. The caller does not get the reason for a refusal.
    pub async fn verify(&self, token: &[u8]) -> Result<Arc<Principal>, Error> {
        let mut name = "";
        self.find(token, &mut name).await.map_err(|refusal| {
            let issuer = if name.is_empty() {
                UNKNOWN_ISSUER
            } else {
                name
            };
            debug_assert!(metrics::TOKEN_CAUSES.contains(&refusal.cause.as_str()));
            metrics::ACCESS_TOKEN_REFUSALS
                .with([issuer.to_owned(), refusal.cause.as_str().to_owned()])
                .increment(1);
            let detail = if name.is_empty() {
                format!("access token refused: {}", refusal.detail)
            } else {
                format!(
                    "access token of the issuer {name:?} refused: {}",
                    refusal.detail
                )
            };
            refusal.error(detail)
        })
    }

    /// Verifies an access token. Sets `name` to the name of the issuer when the issuer is known.
    async fn find<'a>(
        &'a self,
        token: &[u8],
        name: &mut &'a str,
    ) -> Result<Arc<Principal>, Refusal> {
        if token.len() > self.token_bytes_max {
            return Err(Cause::Oversized.because(format!(
                "the access token is too long: {} bytes, but `limits.access_token_bytes_max` is {}",
                token.len(),
                self.token_bytes_max
            )));
        }
        let digest = sha256(token);
        if let Some(known) = self.remembered(&digest) {
            return Ok(known);
        }
        let parts = Parts::read(ACCESS_TOKEN, token)?;
        let Some(at) = self.by_name.get(parts.issuer()?).copied() else {
            return Err(Cause::Issuer.because(format!(
                "the `iss` is {}, which no [[issuer]] has",
                shown(parts.issuer()?)
            )));
        };
        let issuer = &self.issuers[at];
        *name = &issuer.settings.name;
        let (claims, is_expired, set) = issuer.verify(token, &parts).await?;
        let (identity, until) = claims::identity(&issuer.settings, &claims, Timestamp::now())?;
        if is_expired {
            // The expiry is checked last. Therefore a caller is told to renew the access token only
            // if a renewed access token of the same kind would be accepted.
            let (exp, now) = (identity.claims.expires, Timestamp::now());
            let ended = exp.map_or_else(String::new, |exp| {
                let age = now.micros().saturating_sub(exp.micros()) / 1_000_000;
                format!(" (the `exp` was {exp}, {age} s ago)")
            });
            return Err(Cause::Expired.because(format!(
                "the `exp` has passed, even with the leeway of {} s{ended}; the client needs a new access token",
                issuer.settings.leeway_s
            )));
        }
        let principal = Arc::new(Principal::authenticated(identity));
        let verified = Verified {
            principal: Arc::clone(&principal),
            bytes: token.len(),
            issuer: at,
            set: *set.digest(),
            until,
            since: Instant::now(),
        };
        self.verified.insert(digest, verified);
        Ok(principal)
    }

    /// Returns the principal of an access token that was verified within the last minute, if the
    /// issuer's key set has not changed since then.
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
    /// Verifies header and signature. Returns the claims, whether the access token has expired, and the key set.
    async fn verify(
        &self,
        token: &[u8],
        parts: &Parts,
    ) -> Result<(Map<String, Value>, bool, Arc<KeySet>), Refusal> {
        let algorithm = parts.algorithm(&self.settings)?;
        parts.check_type(&self.settings)?;
        let named = parts.named_key()?;
        let set = self.keys.current();
        let mut set = set.map_err(|error| Cause::NoKeys.because(error.to_string()))?;
        let noun = parts.noun();
        let mut outcome = self.verify_with(&set, token, noun, named, algorithm);
        // The provider may have a newer key. If the access token has no `kid`, only the failed signature can show that
        // a newer key is needed.
        let may_be_newer = match &outcome {
            Err(refusal) => match refusal.cause {
                Cause::KeyId | Cause::ManyKeys => true,
                Cause::Signature => named.kid.is_none() || set.kids().next().is_none(),
                _ => false,
            },
            Ok(_) => false,
        };
        if may_be_newer {
            let wait = match self.keys.newer_than(&set).await {
                Newer::Set(newer) => {
                    set = newer;
                    outcome = self.verify_with(&set, token, noun, named, algorithm);
                    None
                }
                Newer::Unknown(wait) => Some(wait),
                // Without both `iat` and `kid`, the age of the access token's key is unknown. An
                // access token whose key has an unknown age is rejected, although the provider's
                // answer may be an outdated copy of the key set.
                Newer::SameCopy(wait) => {
                    (named.kid.is_some() && parts.issued_s().is_some()).then_some(wait)
                }
                Newer::Same => None,
            };
            // The access token is rejected only if no newer key can verify it. While the provider
            // may have a newer key, the access token is neither accepted nor rejected. After a key
            // rotation, an immediate rejection would let a caller with invented key ids cause the
            // rejection of valid access tokens.
            if let Some(wait) = wait
                && !self.is_hopeless(parts, named)
            {
                outcome = outcome.map_err(|refusal| refusal.undecided(wait));
            }
        }
        let (claims, is_expired) = outcome?;
        Ok((claims, is_expired, set))
    }

    /// Whether no key set of the provider can verify the access token: the provider has no key with
    /// its `kid`, or its `iat` is in the future.
    fn is_hopeless(&self, parts: &Parts, named: Named<'_>) -> bool {
        let issued_s = parts.issued_s();
        let leeway_s = i64::from(self.settings.leeway_s);
        let latest_s = Timestamp::now().micros() / 1_000_000 + leeway_s;
        issued_s.is_some_and(|issued| issued > latest_s)
            || named
                .kid
                .is_some_and(|kid| self.keys.is_absent(kid, issued_s))
    }

    fn verify_with(
        &self,
        set: &KeySet,
        token: &[u8],
        noun: &'static str,
        named: Named<'_>,
        algorithm: Algorithm,
    ) -> Result<(Map<String, Value>, bool), Refusal> {
        let keys = set.find(named, algorithm).map_err(|why| match why {
            NoKey::Unknown => Cause::KeyId.because(match named.kid {
                Some(kid) => format!(
                    "the `kid` is {}, which is none of {:?}",
                    shown(kid),
                    set.names()
                ),
                None => format!(
                    "the `x5t` or `x5t#S256` is not the thumbprint of a certificate of the keys {:?}",
                    set.names()
                ),
            }),
            NoKey::TooMany => Cause::ManyKeys.because(format!(
                "the {noun} has no `kid`, and too many keys match the `alg`: {:?}",
                set.names()
            )),
            NoKey::OtherAlgorithm => Cause::Algorithm.because(format!(
                "the `alg` is {}, which is not the algorithm of the key",
                algorithm.as_str()
            )),
        })?;
        let validation = self.validation(algorithm);
        let mut refused = Cause::Signature.because("no key".to_owned());
        for key in keys {
            match jsonwebtoken::decode(token, key, &validation) {
                Ok(TokenData { claims, .. }) => return Ok((claims, false)),
                Err(error) if *error.kind() == ErrorKind::ExpiredSignature => {
                    return self.verify_expired(token, noun, key, validation);
                }
                Err(error) => refused = self.refusal(noun, &error),
            }
            if refused.cause != Cause::Signature {
                break;
            }
        }
        Err(refused)
    }

    /// Checks everything except the expiry. The JWT library reports that an access token has expired before the library
    /// checks `nbf`, `iss` and `aud`.
    fn verify_expired(
        &self,
        token: &[u8],
        noun: &'static str,
        key: &DecodingKey,
        mut validation: Validation,
    ) -> Result<(Map<String, Value>, bool), Refusal> {
        validation.validate_exp = false;
        match jsonwebtoken::decode(token, key, &validation) {
            Ok(TokenData { claims, .. }) => Ok((claims, true)),
            Err(error) => Err(self.refusal(noun, &error)),
        }
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

    fn refusal(&self, noun: &'static str, error: &jsonwebtoken::errors::Error) -> Refusal {
        let leeway = self.settings.leeway_s;
        match error.kind() {
            ErrorKind::InvalidSignature => Cause::Signature.because(format!(
                "the signature does not verify: the {noun} was changed, or signed with another key that has the same `kid`"
            )),
            ErrorKind::ImmatureSignature => Cause::NotYetValid.because(format!(
                "the `nbf` is more than {leeway} s in the future: check the clocks of the issuer and of this machine"
            )),
            ErrorKind::InvalidAudience => Cause::Audience.because(format!(
                "the `aud` contains none of the accepted audiences {:?}",
                self.settings.audience
            )),
            ErrorKind::MissingRequiredClaim(claim) => {
                Cause::Claim.because(format!("the {noun} has no `{claim}` claim, or the claim has the wrong type"))
            }
            ErrorKind::InvalidIssuer => Cause::Issuer.because("the `iss` is not a string"),
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

/// Creates the counters of an issuer, so that they are exported before the first refusal.
fn register_series(issuer: &str) {
    for cause in metrics::TOKEN_CAUSES {
        metrics::ACCESS_TOKEN_REFUSALS
            .with([issuer.to_owned(), cause.to_owned()])
            .increment(0);
    }
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = digest::digest(&digest::SHA256, bytes);
    digest.as_ref().try_into().expect("SHA-256 gives 32 bytes")
}
