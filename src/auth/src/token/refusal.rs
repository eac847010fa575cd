//! The refusal of an access token, with a cause for the counter and a detail for the log. Neither
//! the cause nor the detail contains the access token.

use std::time::Duration;

use keybroker_core::error::{Error, Reason};

/// The delay after which a caller may retry while the keys of an issuer are unknown.
const KEYS_RETRY: Duration = Duration::from_secs(2);
/// Longest string from an access token that is written to the log, in characters.
const SHOWN_CHARS_MAX: usize = 100;

/// The causes of refusals. Each cause has a counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// The access token is longer than the limit.
    Oversized,
    /// The access token does not have three parts, or a part is not JSON in base64url.
    Malformed,
    /// The `iss` is not configured.
    Issuer,
    /// The `alg` is not allowed for the issuer, or does not match the key.
    Algorithm,
    /// The header contains a key or requires an unknown extension.
    Header,
    /// The `typ` is not one of the types in the issuer's configuration.
    Type,
    /// No key of the issuer has the `kid` of the access token.
    KeyId,
    /// The access token has no `kid`, and more keys match than the broker tries.
    ManyKeys,
    /// The broker has no keys of the issuer.
    NoKeys,
    /// The verification of the signature failed.
    Signature,
    /// `exp` has passed.
    Expired,
    /// The lifetime of the access token is longer than the issuer's configuration permits.
    Lifetime,
    /// `nbf` or `iat` is in the future.
    NotYetValid,
    /// The access token was issued for another audience.
    Audience,
    /// A scope is missing.
    Scope,
    /// A required claim is missing, or has none of the permitted values.
    Claim,
    /// The claim that identifies the holder is not a valid user name.
    Subject,
    /// No mapping of the issuer applies, and the issuer itself gives no rights.
    Mapping,
    /// The provider left a claim that a mapping needs out of the access token, because the claim has too many values.
    Overage,
}

/// A refused access token.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(super) cause: Cause,
    pub(super) detail: String,
    /// Time until the issuer's keys can be fetched again, if a newer key may verify the access token.
    undecided: Option<Duration>,
}

impl Refusal {
    /// Marks the verification as undecided: the issuer's keys can be fetched again after `wait`,
    /// and a newer key may verify the access token.
    pub(super) fn undecided(self, wait: Duration) -> Self {
        if !self.may_change() {
            return self;
        }
        let detail = format!(
            "{}; the broker checks again in {} s whether the issuer has a newer key",
            self.detail,
            whole_seconds(wait).as_secs()
        );
        Self {
            detail,
            undecided: Some(wait),
            ..self
        }
    }

    /// Whether another key set can change the result of the verification.
    fn may_change(&self) -> bool {
        matches!(self.cause, Cause::KeyId | Cause::Signature)
    }

    /// Returns the error for the caller, with `detail` for the log. The error does not report an
    /// access token as rejected while its verification is undecided.
    pub(super) fn error(&self, detail: String) -> Error {
        match (self.cause, self.undecided) {
            // After a key rotation, all valid access tokens may refer to a key that the broker has
            // not fetched yet. Therefore the attempt does not count towards the authentication
            // failure limit. An attacker can also make access tokens with an unknown `kid` and a
            // current `iat`. However, the broker makes no signature check for an unknown `kid`, and
            // the limits on connections and log lines restrict the attacker.
            (Cause::KeyId, Some(wait)) => {
                Error::new(Reason::IdentityDown, detail).retry_after(whole_seconds(wait))
            }
            // The signature was checked, which is costly. Therefore this attempt counts towards the
            // authentication failure limit.
            (_, Some(wait)) => Error::new(Reason::IdentityDown, detail)
                .retry_after(whole_seconds(wait))
                .failed_attempt(),
            (Cause::NoKeys, None) => {
                Error::new(Reason::IdentityDown, detail).retry_after(KEYS_RETRY)
            }
            // The signature was verified, so the access token really comes from the issuer.
            (Cause::Expired, None) => Error::new(Reason::Credential, detail).renewable(),
            (_, None) => Error::new(Reason::Credential, detail),
        }
    }
}

/// Rounds a delay up to whole seconds, because a retry that comes too early fails again.
fn whole_seconds(wait: Duration) -> Duration {
    Duration::from_secs(wait.as_secs() + u64::from(wait.subsec_nanos() > 0))
}

impl Cause {
    /// Returns the label of the cause's counter.
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Oversized => "oversized",
            Self::Malformed => "malformed",
            Self::Issuer => "issuer",
            Self::Algorithm => "algorithm",
            Self::Header => "header",
            Self::Type => "type",
            Self::KeyId | Self::ManyKeys => "kid",
            Self::NoKeys => "no-keys",
            Self::Signature => "signature",
            Self::Expired => "expired",
            Self::Lifetime => "lifetime",
            Self::NotYetValid => "not-yet-valid",
            Self::Audience => "audience",
            Self::Scope => "scope",
            Self::Claim => "claim",
            Self::Subject => "subject",
            Self::Mapping => "mapping",
            Self::Overage => "overage",
        }
    }

    pub(super) fn because(self, detail: impl Into<String>) -> Refusal {
        Refusal {
            cause: self,
            detail: detail.into(),
            undecided: None,
        }
    }
}

/// Quotes and shortens a string from an access token for the log.
pub(super) fn shown(text: &str) -> String {
    let mut cut: String = text.chars().take(SHOWN_CHARS_MAX).collect();
    if cut.len() < text.len() {
        cut.push('…');
    }
    format!("{cut:?}")
}
