//! The error type of the broker, and the frozen list of reasons that a caller can receive.
//!
//! Every layer has its own error type, and converts it into [`Error`] at its boundary. A caller receives the [`Reason`], its
//! fixed text, violations and a retry delay. The `detail` is only for the log and never leaves the broker.

use std::{borrow::Cow, fmt, sync::Arc, time::Duration};

use crate::key::ApprovalId;

/// The reason for a failed call, in the form that the caller may see. The list of reasons is frozen: `docs/errors.md`
/// documents each reason, and a test of the wire contract fails if a reason is renamed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// The request is malformed; the violations name the invalid fields.
    Request,
    /// The request id was used before with other content.
    RequestIdReused,
    /// The call has no credential, or its credential is not accepted.
    Credential,
    /// No policy permits the call, or a policy forbids it. The answer does not show whether the user key exists.
    Policy,
    /// The record or the wrapping key does not exist.
    KeyNotFound,
    /// A record with this name already exists, active or deleted.
    KeyExists,
    /// The current revision is not the revision that the caller expects.
    Revision,
    /// A stored envelope cannot be parsed, or its MAC is wrong.
    RecordDamaged,
    /// An envelope that the caller sent is not accepted. The caller receives the same answer for every cause of the
    /// rejection.
    EnvelopeRejected,
    /// The state of the wrapping key forbids the operation.
    KeyState,
    /// The key cannot be released in the requested form, plain or sealed.
    ReleaseForm,
    /// A second person must approve the change. The broker has stored a request for approval.
    ApprovalNeeded,
    /// The state of the request for approval forbids the operation, for example because the request expired.
    ApprovalState,
    /// The device or the request for access does not exist.
    DeviceNotFound,
    /// The state of the device or of the request for access forbids the operation, for example because the request expired.
    DeviceState,
    /// The change needs the signature of a trusted device, and the signature is missing or not accepted.
    DeviceSignature,
    /// The access code of a request for access is wrong.
    AccessCode,
    /// A limit of the store is reached: the number of revisions of a record, of user keys or devices of one user, or of requests.
    Limit,
    /// The queue for the token is full, or the database is busy.
    QueueFull,
    /// The caller has reached its rate limit.
    Rate,
    /// The authentication failure limit, or the limit of rejected envelopes, is reached.
    FailureBudget,
    /// The token is unavailable.
    TokenDown,
    /// The store is unavailable.
    StoreDown,
    /// The audit log cannot be written.
    AuditDown,
    /// The identity provider is unavailable, and its public keys are not known.
    IdentityDown,
    /// The token answers but must not be used: an attribute, the self-test or the PIN is wrong.
    TokenUntrusted,
    /// The deadline has passed, or the broker cannot meet it.
    Deadline,
    /// A defect of the broker made the call fail.
    Bug,
}

impl Reason {
    /// All reasons, in the order of the documentation.
    pub const ALL: [Self; 28] = [
        Self::Request,
        Self::RequestIdReused,
        Self::Credential,
        Self::Policy,
        Self::KeyNotFound,
        Self::KeyExists,
        Self::Revision,
        Self::RecordDamaged,
        Self::EnvelopeRejected,
        Self::KeyState,
        Self::ReleaseForm,
        Self::ApprovalNeeded,
        Self::ApprovalState,
        Self::DeviceNotFound,
        Self::DeviceState,
        Self::DeviceSignature,
        Self::AccessCode,
        Self::Limit,
        Self::QueueFull,
        Self::Rate,
        Self::FailureBudget,
        Self::TokenDown,
        Self::StoreDown,
        Self::AuditDown,
        Self::IdentityDown,
        Self::TokenUntrusted,
        Self::Deadline,
        Self::Bug,
    ];

    /// Name on the wire, in metrics and in the audit log.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Request => "REQUEST",
            Self::RequestIdReused => "REQUEST_ID_REUSED",
            Self::Credential => "CREDENTIAL",
            Self::Policy => "POLICY",
            Self::KeyNotFound => "KEY_NOT_FOUND",
            Self::KeyExists => "KEY_EXISTS",
            Self::Revision => "REVISION",
            Self::RecordDamaged => "RECORD_DAMAGED",
            Self::EnvelopeRejected => "ENVELOPE_REJECTED",
            Self::KeyState => "KEY_STATE",
            Self::ReleaseForm => "RELEASE_FORM",
            Self::ApprovalNeeded => "APPROVAL_NEEDED",
            Self::ApprovalState => "APPROVAL_STATE",
            Self::DeviceNotFound => "DEVICE_NOT_FOUND",
            Self::DeviceState => "DEVICE_STATE",
            Self::DeviceSignature => "DEVICE_SIGNATURE",
            Self::AccessCode => "ACCESS_CODE",
            Self::Limit => "LIMIT",
            Self::QueueFull => "QUEUE_FULL",
            Self::Rate => "RATE",
            Self::FailureBudget => "FAILURE_BUDGET",
            Self::TokenDown => "TOKEN_DOWN",
            Self::StoreDown => "STORE_DOWN",
            Self::AuditDown => "AUDIT_DOWN",
            Self::IdentityDown => "IDENTITY_DOWN",
            Self::TokenUntrusted => "TOKEN_UNTRUSTED",
            Self::Deadline => "DEADLINE",
            Self::Bug => "BUG",
        }
    }

    /// Returns the reason with this name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.as_str() == name)
    }

    /// The fixed text that a caller receives. The fixed text has no internal details.
    pub const fn text(self) -> &'static str {
        match self {
            Self::Request => "the request is malformed",
            Self::RequestIdReused => "this request id was used before with other content",
            Self::Credential => "no accepted credential",
            Self::Policy => "not permitted",
            Self::KeyNotFound => "the key does not exist",
            Self::KeyExists => "a key with this name already exists",
            Self::Revision => "the expected revision is not the current revision",
            Self::RecordDamaged => "the stored record is damaged; the operator has been alerted",
            Self::EnvelopeRejected => "the envelope is not accepted",
            Self::KeyState => "the state of the key forbids the operation",
            Self::ReleaseForm => "the key cannot be released in the requested form",
            Self::ApprovalNeeded => "a second person must approve this change",
            Self::ApprovalState => "the state of the request for approval forbids the operation",
            Self::DeviceNotFound => "the device or the request for access does not exist",
            Self::DeviceState => {
                "the state of the device or of the request for access forbids the operation"
            }
            Self::DeviceSignature => "the signature of a trusted device is missing or not accepted",
            Self::AccessCode => "the access code is wrong",
            Self::Limit => "the limit of stored revisions or keys is reached",
            Self::QueueFull => "the token or the database is busy; try again after the given delay",
            Self::Rate => "too many requests; try again after the given delay",
            Self::FailureBudget => "too many failed attempts; try again after the given delay",
            Self::TokenDown => "the token is unavailable; try again after the given delay",
            Self::StoreDown => "the store is unavailable; try again after the given delay",
            Self::AuditDown => "the audit log is unavailable; try again after the given delay",
            Self::IdentityDown => {
                "the identity provider is unavailable; try again after the given delay"
            }
            Self::TokenUntrusted => "the token must not be used; the operator has been alerted",
            Self::Deadline => "the deadline has passed",
            Self::Bug => "internal error",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An invalid field of a request. A violation contains no bytes that the caller sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Path of the field in the request, with the names in the protobuf definition.
    pub field: &'static str,
    /// The requirement that the field does not meet.
    pub description: Cow<'static, str>,
}

/// Longest explanation that an administrator receives, in bytes.
pub const EXPLANATION_BYTES_MAX: usize = 2_000;

/// A failed call.
#[derive(Clone, Debug)]
pub struct Error {
    reason: Reason,
    violations: Vec<Violation>,
    retry_after: Option<Duration>,
    detail: String,
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
    is_renewable: bool,
    is_failed_attempt: bool,
    is_outcome_unknown: bool,
    approval: Option<ApprovalId>,
}

impl Error {
    /// An error with a reason, and a detail for the log.
    pub fn new(reason: Reason, detail: impl Into<String>) -> Self {
        Self {
            reason,
            violations: Vec::new(),
            retry_after: None,
            detail: detail.into(),
            source: None,
            is_renewable: false,
            is_failed_attempt: false,
            is_outcome_unknown: false,
            approval: None,
        }
    }

    /// An error with a reason and another error as its cause. The detail for the log is the text of the cause and of all further
    /// causes.
    pub fn caused(reason: Reason, cause: impl std::error::Error + Send + Sync + 'static) -> Self {
        let detail = chain(&cause);
        Self {
            source: Some(Arc::new(cause)),
            ..Self::new(reason, detail)
        }
    }

    /// An error for a malformed request: the field, and what the field must be.
    pub fn violation(field: &'static str, description: impl Into<Cow<'static, str>>) -> Self {
        let description = description.into();
        let detail = format!("{field}: {description}");
        Self {
            violations: vec![Violation { field, description }],
            ..Self::new(Reason::Request, detail)
        }
    }

    /// Adds an explanation for the caller, truncated to [`EXPLANATION_BYTES_MAX`] bytes. Use this function only for
    /// calls of administrators, who may know the state of the token and of the registry, and for explanations that tell a
    /// caller nothing but the form of the release that the caller must request.
    #[must_use]
    pub fn explained(mut self, field: &'static str, explanation: &str) -> Self {
        let end = explanation.floor_char_boundary(EXPLANATION_BYTES_MAX);
        self.violations.push(Violation {
            field,
            description: explanation[..end].to_owned().into(),
        });
        self
    }

    /// Adds the delay after which the caller may retry.
    #[must_use]
    pub fn retry_after(self, delay: Duration) -> Self {
        Self {
            retry_after: Some(delay),
            ..self
        }
    }

    /// Marks the error as caused by a credential that has expired but is otherwise valid. The holder has to renew the
    /// credential.
    #[must_use]
    pub fn renewable(self) -> Self {
        Self {
            is_renewable: true,
            ..self
        }
    }

    /// Counts the error as a failed attempt although the credential was not rejected, because the check of the credential was
    /// costly.
    #[must_use]
    pub fn failed_attempt(self) -> Self {
        Self {
            is_failed_attempt: true,
            ..self
        }
    }

    /// Marks the error of a change that may have been made although the call failed.
    #[must_use]
    pub fn outcome_unknown(self) -> Self {
        Self {
            is_outcome_unknown: true,
            ..self
        }
    }

    /// Names the request for approval on which the change waits.
    #[must_use]
    pub fn waiting_for(self, approval: ApprovalId) -> Self {
        Self {
            approval: Some(approval),
            ..self
        }
    }

    /// The request for approval on which the change waits.
    pub fn approval(&self) -> Option<ApprovalId> {
        self.approval
    }

    /// Whether the change may have been made although the call failed.
    pub fn is_outcome_unknown(&self) -> bool {
        self.is_outcome_unknown
    }

    /// Whether the credential has expired but is otherwise valid. An expired credential is not a sign of an attack, so its
    /// refusal is not counted as a failed attempt.
    pub fn is_renewable(&self) -> bool {
        self.is_renewable
    }

    /// Whether the error is counted as a failed attempt of the caller's address.
    pub fn is_failed_attempt(&self) -> bool {
        self.is_failed_attempt || self.reason == Reason::Credential && !self.is_renewable
    }

    /// Why the call failed.
    pub fn reason(&self) -> Reason {
        self.reason
    }

    /// The invalid fields of a malformed request, or the explanation for an administrator.
    pub fn violations(&self) -> &[Violation] {
        &self.violations
    }

    /// The delay after which the caller may retry.
    pub fn retry_delay(&self) -> Option<Duration> {
        self.retry_after
    }

    /// The detail, only for the log.
    pub fn detail(&self) -> &str {
        &self.detail
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason, self.detail)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        let source = self.source.as_deref()?;
        Some(source)
    }
}

/// The text of an error with its causes, outermost first: `cannot read /x: permission denied`.
///
/// The text of many errors already contains the text of the cause. Therefore, the function leaves out a cause whose text is
/// already part of the result.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let deeper = error.to_string();
        if !text.contains(&deeper) {
            text = format!("{text}: {deeper}");
        }
        cause = error.source();
    }
    text
}

/// The text of the causes of an error, without the text of the error itself. If the error has no cause, the function returns the
/// text of the error. Use this function for errors of libraries whose outermost text says only that a request failed.
pub fn causes(error: &dyn std::error::Error) -> String {
    chain(error.source().unwrap_or(error))
}

/// The innermost cause of an error.
pub fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Layer {
        text: &'static str,
        source: Option<Box<Layer>>,
    }

    fn layers(texts: &[&'static str]) -> Layer {
        let (text, deeper) = texts.split_first().unwrap();
        Layer {
            text,
            source: (!deeper.is_empty()).then(|| Box::new(layers(deeper))),
        }
    }

    #[test]
    fn an_error_is_printed_with_all_its_causes() {
        let error = layers(&["cannot start", "cannot read /x", "permission denied"]);
        assert_eq!(
            chain(&error),
            "cannot start: cannot read /x: permission denied"
        );
        assert_eq!(causes(&error), "cannot read /x: permission denied");
        assert_eq!(root_cause(&error), "permission denied");
        assert_eq!(causes(&layers(&["alone"])), "alone");
    }

    #[test]
    fn a_cause_that_its_error_prints_is_not_repeated() {
        let error = layers(&["cannot read /x: permission denied", "permission denied"]);
        assert_eq!(chain(&error), "cannot read /x: permission denied");
    }
}
