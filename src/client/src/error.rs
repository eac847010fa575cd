//! The errors of this library: [`BuildError`] when a client is built, and [`Error`] for calls.

use std::{borrow::Cow, error::Error as StdError, fmt, path::PathBuf, time::Duration};

use keybroker_core::{
    call::{CallId, RequestId},
    error::Reason,
    key::ApprovalId,
};
use tonic::{Code, ConnectError, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::retry::Verdict;

/// `domain` of the broker's `google.rpc.ErrorInfo`.
const DOMAIN: &str = "keybroker.v1";
/// Name of the call id in the metadata of `google.rpc.ErrorInfo`.
const CALL_ID: &str = "call_id";
/// Name of the outcome in the metadata of `google.rpc.ErrorInfo`. The value is `unknown` if the broker does not know
/// whether the change was made.
const OUTCOME: &str = "outcome";
const UNKNOWN: &str = "unknown";
/// Name of the request for approval in the metadata of `google.rpc.ErrorInfo`.
const APPROVAL: &str = "approval";
/// tonic reports an expired deadline as `CANCELLED` with this text.
const TONIC_DEADLINE: &str = "Timeout expired";

/// An error of any type that another crate returns to this crate.
pub type BoxError = Box<dyn StdError + Send + Sync + 'static>;

/// Why a client cannot be built. The library has not sent anything.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The endpoint is not an `https://host:port` URL.
    #[error("endpoint {endpoint:?}: {problem}")]
    Endpoint {
        /// The endpoint as given.
        endpoint: String,
        /// The problem with the endpoint.
        problem: String,
    },
    /// No CA certificate was given. The library does not use the CAs of the operating system.
    #[error("no CA certificate given: set `ca_file` or `ca_pem`")]
    NoCa,
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    File {
        /// The path as given.
        path: PathBuf,
        /// The operating system's error.
        #[source]
        source: std::io::Error,
    },
    /// The CA certificate, the client certificate or the private key is not PEM, or they cannot be used together.
    #[error("cannot use the CA certificate, client certificate or private key")]
    Tls {
        /// The TLS library's error.
        #[source]
        source: tonic::transport::Error,
    },
    /// An access token or the secret of an API client contains a character that an HTTP header cannot carry.
    #[error("the {0} contains a character that is not allowed in an HTTP header")]
    Credential(&'static str),
}

/// A user, key name or request id that is not valid. The library has not sent anything.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} must be {requirement}")]
pub struct InvalidField {
    field: &'static str,
    requirement: Cow<'static, str>,
}

impl InvalidField {
    pub(crate) const REQUEST_ID: Self = Self {
        field: "request_id",
        requirement: Cow::Borrowed("a UUID that is not nil"),
    };

    /// The name of the field in the protocol.
    pub fn field(&self) -> &'static str {
        self.field
    }

    /// The requirement that the field does not meet.
    pub fn requirement(&self) -> &str {
        &self.requirement
    }
}

impl From<keybroker_core::error::Error> for InvalidField {
    fn from(error: keybroker_core::error::Error) -> Self {
        let violation = error.violations().first();
        Self {
            field: violation.map_or("request", |violation| violation.field),
            requirement: violation.map_or(Cow::Borrowed("valid"), |violation| {
                violation.description.clone()
            }),
        }
    }
}

/// The kind of failure of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The broker refused the call and gave a reason: see [`Error::reason`].
    Refused,
    /// No answer arrived before the deadline. Set a longer deadline with `deadline`, or check the broker's load.
    DeadlineExceeded,
    /// The connection could not be made, or ended during the call.
    ///
    /// If the broker does not accept the client certificate, the first call over TLS 1.3 also fails with this kind of
    /// error.
    Connection,
    /// The response has no reason, so it does not come from a broker's API. The sender may be a
    /// proxy, another service, or a listener that does not serve the called API.
    UnexpectedResponse,
    /// The provider of access tokens failed. See [`std::error::Error::source`].
    Credential,
    /// The response lacks a required field, or a field of the response is out of range.
    InvalidResponse,
}

/// A failed call.
///
/// `Display` describes what happened. The [source](std::error::Error::source) is the error of the layer below, such as
/// a [`tonic::Status`].
pub struct Error {
    pub(crate) kind: ErrorKind,
    pub(crate) refusal: Option<Box<Refusal>>,
    pub(crate) attempts: u32,
    pub(crate) request_id: Option<RequestId>,
    pub(crate) outcome_unknown: bool,
    pub(crate) detail: &'static str,
    pub(crate) source: Option<BoxError>,
}

impl Error {
    /// The kind of the failure.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The broker's reason. `None` if the broker sent no reason, or a reason that this release does not recognise.
    /// [`Refusal::reason_name`] returns an unknown reason as text.
    pub fn reason(&self) -> Option<Reason> {
        self.refusal.as_ref()?.reason()
    }

    /// The details of the broker's refusal. Every error of the kind [`ErrorKind::Refused`] has a refusal. An error of
    /// the kind [`ErrorKind::DeadlineExceeded`] has a refusal only if the broker itself reported the deadline.
    pub fn refusal(&self) -> Option<&Refusal> {
        self.refusal.as_deref()
    }

    /// The gRPC status of the last attempt, with its code, message and details. `None` if no status exists: the
    /// client's own timer ended the call, [`Client::connect`](crate::Client::connect) could not connect, the provider
    /// of access tokens failed, or a response was invalid.
    pub fn status(&self) -> Option<&Status> {
        self.source.as_deref()?.downcast_ref()
    }

    /// The number of attempts that were made. The number does not include attempts for which the provider of access
    /// tokens failed.
    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// The request id of a change, which all attempts of the change carried. `None` for reads and for changes without a
    /// request id.
    pub fn request_id(&self) -> Option<RequestId> {
        self.request_id
    }

    /// Whether the same call may succeed later: the broker's reason says so, or the connection failed. Repeat a change
    /// only with its [request id](Self::request_id). The library has already repeated the call as often as the
    /// [`RetryPolicy`](crate::RetryPolicy) allows.
    pub fn is_transient(&self) -> bool {
        match &self.refusal {
            Some(refusal) => refusal.is_transient(),
            None => self.kind == ErrorKind::Connection,
        }
    }

    /// Whether the call is a change that may or may not have been made. Either an attempt got no answer, or the broker
    /// answered that it does not know the outcome because its database or audit log failed during the call.
    ///
    /// To find out whether the change was made, repeat the call with the same content and [request
    /// id](Self::request_id) within 24 hours. If the first call took effect, the broker returns the answer of the first
    /// call again. If the first call did not take effect, the repeated call takes effect. A change of API clients has
    /// no request id: to find out whether the change was made, list the API clients.
    pub fn outcome_unknown(&self) -> bool {
        self.outcome_unknown
    }
}

/// Classifies the status of a call with the generated stubs of [`proto`](crate::proto). The status is treated as the
/// result of the only attempt of a change.
impl From<Status> for Error {
    fn from(status: Status) -> Self {
        let failed = Classified::of(status.into());
        Self {
            kind: failed.kind,
            refusal: failed.refusal,
            attempts: 1,
            request_id: None,
            outcome_unknown: failed.outcome_unknown,
            detail: failed.detail,
            source: failed.source,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.kind, &self.refusal) {
            (ErrorKind::Refused, Some(refusal)) => {
                write!(f, "the broker refused the call: {refusal}")?;
            }
            (ErrorKind::Refused, None) => f.write_str("the broker refused the call")?,
            (ErrorKind::DeadlineExceeded, _) => f.write_str("no answer before the deadline")?,
            (ErrorKind::Connection, _) => {
                f.write_str("the connection failed or ended during the call")?;
            }
            (ErrorKind::UnexpectedResponse, _) => {
                f.write_str("the response does not come from a broker; check the endpoint")?;
            }
            (ErrorKind::Credential, _) => f.write_str("the provider of access tokens failed")?,
            (ErrorKind::InvalidResponse, _) => {
                write!(f, "the broker's response is not valid: {}", self.detail)?;
            }
        }
        if self.attempts > 1 {
            write!(f, " ({} attempts)", self.attempts)?;
        }
        if self.outcome_unknown {
            f.write_str("; the change may or may not have been made")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Error")
            .field("kind", &self.kind)
            .field("refusal", &self.refusal)
            .field("attempts", &self.attempts)
            .field("request_id", &self.request_id)
            .field("outcome_unknown", &self.outcome_unknown)
            .field("detail", &self.detail)
            .field("source", &self.source)
            .finish()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        let source = self.source.as_deref()?;
        Some(source)
    }
}

/// A field that the broker did not accept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldViolation {
    /// Path of the field in the request message, such as `key_material`.
    pub field: String,
    /// The requirement that the field does not meet.
    pub description: String,
}

/// The content of the broker's refusal. `docs/errors.md` in the broker's repository explains each reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    reason_name: String,
    text: String,
    violations: Vec<FieldViolation>,
    retry_delay: Option<Duration>,
    call_id: Option<CallId>,
    outcome_unknown: bool,
    approval: Option<ApprovalId>,
}

impl Refusal {
    /// The reason, or `None` if this release of the library does not recognise the reason.
    pub fn reason(&self) -> Option<Reason> {
        Reason::ALL
            .into_iter()
            .find(|reason| reason.as_str() == self.reason_name)
    }

    /// The reason as the broker named it, such as `KEY_NOT_FOUND`. Later releases of the broker may have more reasons.
    pub fn reason_name(&self) -> &str {
        &self.reason_name
    }

    /// The fixed text of the reason, written for people.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The fields that the broker did not accept, or what the broker explains to an administrator.
    pub fn violations(&self) -> &[FieldViolation] {
        &self.violations
    }

    /// The delay after which the broker accepts a retry (`google.rpc.RetryInfo`).
    pub fn retry_delay(&self) -> Option<Duration> {
        self.retry_delay
    }

    /// The id of the call in the broker's log and audit log. Report the call id when you ask the operator for help.
    pub fn call_id(&self) -> Option<CallId> {
        self.call_id
    }

    /// The request for approval on which the change waits, if the reason is [`Reason::ApprovalNeeded`].
    pub fn approval(&self) -> Option<ApprovalId> {
        self.approval
    }

    /// Returns the refusal of one item of a batch, which has only a reason and a text.
    pub(crate) fn of_item(reason_name: String, text: String) -> Self {
        Self {
            reason_name,
            text,
            violations: Vec::new(),
            retry_delay: None,
            call_id: None,
            outcome_unknown: false,
            approval: None,
        }
    }

    fn of(status: &Status, details: &ErrorDetails) -> Option<Self> {
        let info = details.error_info().filter(|info| info.domain == DOMAIN)?;
        let violations = details
            .bad_request()
            .map(|bad| bad.field_violations.as_slice());
        let violation = |violation: &tonic_types::FieldViolation| FieldViolation {
            field: violation.field.clone(),
            description: violation.description.clone(),
        };
        Some(Self {
            reason_name: info.reason.clone(),
            text: status.message().to_owned(),
            violations: violations.into_iter().flatten().map(violation).collect(),
            retry_delay: details.retry_info().and_then(|info| info.retry_delay),
            call_id: info.metadata.get(CALL_ID).and_then(|id| CallId::parse(id)),
            outcome_unknown: info
                .metadata
                .get(OUTCOME)
                .is_some_and(|text| text == UNKNOWN),
            approval: info
                .metadata
                .get(APPROVAL)
                .and_then(|id| ApprovalId::from_hex(id)),
        })
    }

    /// Whether the same call may succeed later, as `docs/errors.md` states for each reason.
    pub fn is_transient(&self) -> bool {
        matches!(
            self.reason(),
            Some(
                Reason::QueueFull
                    | Reason::Rate
                    | Reason::TokenDown
                    | Reason::StoreDown
                    | Reason::AuditDown
                    | Reason::IdentityDown
                    | Reason::Deadline
            )
        )
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason_name, self.text)?;
        for FieldViolation { field, description } in &self.violations {
            write!(f, "; {field}: {description}")?;
        }
        Ok(())
    }
}

/// Why one attempt failed.
#[derive(Debug)]
pub(crate) enum AttemptError {
    /// The call returned a gRPC status.
    Status(Box<Status>),
    /// The answer lacks a required field, or a field of the answer is invalid.
    Invalid(&'static str),
    /// The client's own timer fired.
    TimedOut,
    /// The provider of access tokens failed.
    Credential(BoxError),
}

impl From<Status> for AttemptError {
    fn from(status: Status) -> Self {
        Self::Status(Box::new(status))
    }
}

/// The classification of a failed attempt.
#[derive(Debug)]
pub(crate) struct Classified {
    pub(crate) kind: ErrorKind,
    pub(crate) refusal: Option<Box<Refusal>>,
    pub(crate) verdict: Verdict,
    /// Whether the attempt may have made a change.
    pub(crate) outcome_unknown: bool,
    pub(crate) detail: &'static str,
    pub(crate) source: Option<BoxError>,
}

impl Classified {
    pub(crate) fn of(error: AttemptError) -> Self {
        let plain = |kind, outcome_unknown, detail, source| Self {
            kind,
            refusal: None,
            verdict: Verdict::Permanent,
            outcome_unknown,
            detail,
            source,
        };
        match error {
            AttemptError::Status(status) => Self::of_status(*status),
            AttemptError::Invalid(detail) => plain(ErrorKind::InvalidResponse, true, detail, None),
            AttemptError::TimedOut => plain(ErrorKind::DeadlineExceeded, true, "", None),
            AttemptError::Credential(source) => {
                plain(ErrorKind::Credential, false, "", Some(source))
            }
        }
    }

    fn of_status(status: Status) -> Self {
        let refusal = Refusal::of(&status, &status.get_error_details());
        let Some(refusal) = refusal else {
            return Self::without_reason(status);
        };
        let is_deadline = refusal.reason() == Some(Reason::Deadline);
        Self {
            // The client's own timer or the broker's timer may fire first, so both timers lead to the same kind of
            // error.
            kind: if is_deadline {
                ErrorKind::DeadlineExceeded
            } else {
                ErrorKind::Refused
            },
            verdict: if refusal.is_transient() {
                Verdict::Transient {
                    delay: refusal.retry_delay,
                }
            } else {
                Verdict::Permanent
            },
            outcome_unknown: is_deadline || refusal.outcome_unknown,
            refusal: Some(Box::new(refusal)),
            detail: "",
            source: Some(status.into()),
        }
    }

    /// Classifies a failure of the connection, or an answer that does not come from the broker's API, such as the
    /// answer of a proxy.
    fn without_reason(status: Status) -> Self {
        let is_local = status.source().is_some();
        let (kind, verdict) = match status.code() {
            // tonic reports the client's own expired deadline with this code and text.
            Code::Cancelled if status.message().contains(TONIC_DEADLINE) => {
                (ErrorKind::DeadlineExceeded, Verdict::Permanent)
            }
            Code::DeadlineExceeded => (ErrorKind::DeadlineExceeded, Verdict::Permanent),
            // The APIs of the broker send UNAVAILABLE and CANCELLED only with a reason. Proxies also send UNAVAILABLE.
            Code::Unavailable | Code::Cancelled => (ErrorKind::Connection, Verdict::Disconnected),
            // A status with a source, for example "h2 protocol error", comes from tonic itself and
            // not from the server.
            Code::Internal | Code::Unknown if is_local => {
                (ErrorKind::Connection, Verdict::Disconnected)
            }
            _ => (ErrorKind::UnexpectedResponse, Verdict::Permanent),
        };
        Self {
            kind,
            refusal: None,
            verdict,
            // A server answers UNIMPLEMENTED without running the call.
            outcome_unknown: status.code() != Code::Unimplemented && !was_never_sent(&status),
            detail: "",
            source: Some(status.into()),
        }
    }
}

/// Whether the request was never sent because the connection could not be made.
fn was_never_sent(status: &Status) -> bool {
    let mut cause = status.source();
    while let Some(error) = cause {
        if error.is::<ConnectError>() {
            return true;
        }
        cause = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn details(reason: &str) -> ErrorDetails {
        let id = "0192f0c1-2345-7000-8000-000000000001";
        let metadata = HashMap::from([(CALL_ID.to_owned(), id.to_owned())]);
        ErrorDetails::with_error_info(reason, DOMAIN, metadata)
    }

    fn classified(reason: &str) -> Classified {
        let status = Status::with_error_details(Code::Internal, "text", details(reason));
        Classified::of(status.into())
    }

    /// The table of `docs/errors.md`. A call that fails with a reason outside the table would fail again.
    #[test]
    fn transient_reasons_are_those_of_the_documentation() {
        let page = include_str!("../../../docs/errors.md");
        let (_, rule) = page.split_once("## Retrying").unwrap();
        let mut named: Vec<&str> = Vec::new();
        for word in rule.split('`').skip(1).step_by(2) {
            let is_reason = Reason::ALL.iter().any(|reason| reason.as_str() == word);
            // The explanations below the list name some of the reasons again.
            if is_reason && !named.contains(&word) {
                named.push(word);
            }
        }
        let transient: Vec<&str> = Reason::ALL
            .into_iter()
            .map(Reason::as_str)
            .filter(|reason| classified(reason).verdict != Verdict::Permanent)
            .collect();
        assert_eq!(named, transient);
    }

    #[test]
    fn a_refusal_keeps_what_the_broker_says() {
        let mut all = details("REQUEST");
        all.add_bad_request_violation("user", "not empty");
        all.set_retry_info(Some(Duration::from_millis(20)));
        let status = Status::with_error_details(Code::InvalidArgument, "text", all);
        let refusal = *Classified::of(status.into()).refusal.unwrap();
        assert_eq!(refusal.reason(), Some(Reason::Request));
        assert_eq!(refusal.retry_delay(), Some(Duration::from_millis(20)));
        assert_eq!(
            refusal.call_id().unwrap().to_string(),
            "0192f0c1-2345-7000-8000-000000000001"
        );
        assert_eq!(refusal.to_string(), "REQUEST: text; user: not empty");
    }

    #[test]
    fn a_reason_of_a_later_release_is_final_and_keeps_its_name() {
        let classified = classified("LATER");
        assert_eq!(
            (classified.kind, classified.verdict),
            (ErrorKind::Refused, Verdict::Permanent)
        );
        let refusal = classified.refusal.unwrap();
        assert_eq!((refusal.reason(), refusal.reason_name()), (None, "LATER"));
    }

    #[test]
    fn all_deadlines_are_the_same_kind_and_leave_the_outcome_open() {
        for error in [
            Status::cancelled(TONIC_DEADLINE).into(),
            Status::deadline_exceeded("proxy").into(),
            AttemptError::TimedOut,
        ] {
            let classified = Classified::of(error);
            assert_eq!(classified.kind, ErrorKind::DeadlineExceeded);
            assert_eq!(classified.verdict, Verdict::Permanent);
            assert!(classified.outcome_unknown);
        }
        let broker = classified("DEADLINE");
        assert_eq!(broker.kind, ErrorKind::DeadlineExceeded);
        assert_eq!(broker.verdict, Verdict::Transient { delay: None });
        assert!(broker.outcome_unknown);
    }

    #[test]
    fn a_refusal_says_whether_the_change_may_have_been_made() {
        for (metadata, expected) in [
            (HashMap::new(), false),
            (
                HashMap::from([(OUTCOME.to_owned(), UNKNOWN.to_owned())]),
                true,
            ),
        ] {
            let details = ErrorDetails::with_error_info("STORE_DOWN", DOMAIN, metadata);
            let status = Status::with_error_details(Code::Unavailable, "text", details);
            assert_eq!(Error::from(status).outcome_unknown(), expected);
        }
    }

    #[test]
    fn failures_of_the_connection_are_repeated_and_other_responses_are_not() {
        let local = Status::from_error("h2 protocol error".into());
        assert_eq!(local.code(), Code::Unknown);
        for status in [
            local,
            Status::unavailable("tcp connect error"),
            Status::cancelled("operation was canceled"),
        ] {
            let classified = Classified::of(status.into());
            assert_eq!(
                (classified.kind, classified.verdict),
                (ErrorKind::Connection, Verdict::Disconnected)
            );
        }
        for status in [
            Status::unimplemented("no such service"),
            Status::unknown("from the wire"),
            Status::internal("from the wire"),
            Status::permission_denied("a proxy"),
        ] {
            let code = status.code();
            let classified = Classified::of(status.into());
            assert_eq!(
                (classified.kind, classified.verdict),
                (ErrorKind::UnexpectedResponse, Verdict::Permanent)
            );
            assert_eq!(classified.outcome_unknown, code != Code::Unimplemented);
        }
    }

    #[test]
    fn an_error_info_of_another_domain_is_not_the_brokers() {
        let info = ErrorDetails::with_error_info("TOKEN_DOWN", "example.org", HashMap::new());
        let status = Status::with_error_details(Code::PermissionDenied, "text", info);
        assert_eq!(
            Classified::of(status.into()).kind,
            ErrorKind::UnexpectedResponse
        );
    }
}
