//! Why a token is refused: a cause for the counter, and the exact reason for the log. Neither ever shows the token.

use std::time::Duration;

use keybroker_core::error::{Error, Reason};

/// When to come again while an issuer's keys are not known.
const KEYS_RETRY: Duration = Duration::from_secs(2);
/// Longest text of a token that is repeated in the log, in characters.
const SHOWN_CHARS_MAX: usize = 100;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// Longer than the limit.
    Oversized,
    /// Not three parts, not base64url, not JSON.
    Malformed,
    /// An `iss` that is not configured.
    Issuer,
    /// An `alg` that is not allowed, or not the key's.
    Algorithm,
    /// A header that brings its own keys, or asks for what is not understood.
    Header,
    /// A `typ` that is not asked for.
    Type,
    /// A `kid` that no key has.
    KeyId,
    /// No `kid`, and more keys fit than are tried.
    ManyKeys,
    /// The issuer's keys are not known.
    NoKeys,
    /// The signature does not verify.
    Signature,
    /// `exp` has passed.
    Expired,
    /// It is valid for longer than its issuer's access tokens may be.
    Lifetime,
    /// `nbf` or `iat` is ahead.
    NotYetValid,
    /// Issued for another audience.
    Audience,
    /// A scope is missing.
    Scope,
    /// A claim is missing, or has none of the values asked for.
    Claim,
    /// A `sub` that can be no user.
    Subject,
}

/// A refused token.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) cause: Cause,
    pub(super) detail: String,
    /// Time until the issuer's keys can be fetched again, if a newer key may verify the token.
    undecided: Option<Duration>,
}

impl Refusal {
    /// Marks the refusal as one that a newer key of the issuer may change, after this time.
    pub(super) fn undecided(self, wait: Duration) -> Self {
        if !self.may_change() {
            return self;
        }
        let detail = format!(
            "{}; whether its issuer has a newer key is looked up again in {} s",
            self.detail,
            whole_seconds(wait).as_secs()
        );
        Self {
            detail,
            undecided: Some(wait),
            ..self
        }
    }

    /// Whether another key set can change the outcome.
    fn may_change(&self) -> bool {
        matches!(self.cause, Cause::KeyId | Cause::Signature)
    }

    /// The error for the caller, with this detail for the log. A token that cannot be verified now is not a rejected one.
    pub(super) fn error(&self, detail: String) -> Error {
        match (self.cause, self.undecided) {
            // After a key rotation, every token from a network may name a key that the broker has not fetched yet, so the attempt does not
            // count as failed. An attacker can make such tokens too, with an `iat` of now. They cost no signature check, and
            // the limits on connections and on log lines apply.
            (Cause::KeyId, Some(wait)) => {
                Error::new(Reason::IdentityDown, detail).retry_after(whole_seconds(wait))
            }
            // Signatures were checked.
            (_, Some(wait)) => Error::new(Reason::IdentityDown, detail)
                .retry_after(whole_seconds(wait))
                .failed_attempt(),
            (Cause::NoKeys, None) => {
                Error::new(Reason::IdentityDown, detail).retry_after(KEYS_RETRY)
            }
            // The signature was verified before: only the issuer can make such a token.
            (Cause::Expired, None) => Error::new(Reason::Credential, detail).renewable(),
            (_, None) => Error::new(Reason::Credential, detail),
        }
    }
}

/// Rounded up: a retry that comes earlier fails again.
fn whole_seconds(wait: Duration) -> Duration {
    Duration::from_secs(wait.as_secs() + u64::from(wait.subsec_nanos() > 0))
}

impl Cause {
    /// Label of the counter.
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

/// Text of a token for the log: quoted, and not at any length.
pub(super) fn shown(text: &str) -> String {
    let mut cut: String = text.chars().take(SHOWN_CHARS_MAX).collect();
    if cut.len() < text.len() {
        cut.push('…');
    }
    format!("{cut:?}")
}
