//! Converts errors to gRPC statuses. The caller receives the reason, a fixed text, violations, the retry delay and the
//! call id.
//!
//! Mitigation: M6 of `THREAT_MODEL.md`.

use std::collections::HashMap;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt as _};

use keybroker_core::{
    call::{CallId, spread},
    error::{Error, Reason},
};

/// The `domain` of every `google.rpc.ErrorInfo`, which must never change.
pub(super) const DOMAIN: &str = "keybroker.v1";

/// Returns the gRPC code for a reason. The match is exhaustive, so the compiler requires a code for
/// each new reason.
#[deny(clippy::wildcard_enum_match_arm)]
pub(super) const fn code(reason: Reason) -> Code {
    match reason {
        Reason::Request | Reason::RequestIdReused | Reason::EnvelopeRejected => {
            Code::InvalidArgument
        }
        Reason::Credential => Code::Unauthenticated,
        Reason::Policy | Reason::DeviceSignature | Reason::AccessCode => Code::PermissionDenied,
        Reason::KeyNotFound | Reason::DeviceNotFound => Code::NotFound,
        Reason::KeyExists => Code::AlreadyExists,
        Reason::Revision => Code::Aborted,
        Reason::RecordDamaged => Code::DataLoss,
        Reason::KeyState
        | Reason::ReleaseForm
        | Reason::ApprovalNeeded
        | Reason::ApprovalState
        | Reason::DeviceState
        | Reason::Limit => Code::FailedPrecondition,
        Reason::QueueFull | Reason::Rate | Reason::FailureBudget => Code::ResourceExhausted,
        Reason::TokenDown
        | Reason::StoreDown
        | Reason::AuditDown
        | Reason::IdentityDown
        | Reason::TokenUntrusted => Code::Unavailable,
        Reason::Deadline => Code::DeadlineExceeded,
        Reason::Bug => Code::Internal,
    }
}

/// Returns the gRPC status for an error. The status leaves out the error's detail, which is in the log under the call
/// id.
pub(super) fn to_status(error: &Error, call: CallId) -> Status {
    let reason = error.reason();
    let mut metadata = HashMap::from([("call_id".to_owned(), call.to_string())]);
    if error.is_outcome_unknown() {
        metadata.insert("outcome".to_owned(), "unknown".to_owned());
    }
    if let Some(approval) = error.approval() {
        metadata.insert("approval".to_owned(), approval.to_string());
    }
    let mut details = ErrorDetails::with_error_info(reason.as_str(), DOMAIN, metadata);
    if !error.violations().is_empty() {
        let violations: Vec<_> = error
            .violations()
            .iter()
            .map(|violation| FieldViolation::new(violation.field, violation.description.clone()))
            .collect();
        details.set_bad_request(violations);
    }
    if let Some(delay) = error.retry_delay() {
        // Add a random time of at most half the delay, so that callers that were refused at the
        // same time retry at different times.
        details.set_retry_info(Some(spread(delay, delay / 2)));
    }
    let text = format!("{} (call {call})", reason.text());
    Status::with_error_details(code(reason), text, details)
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, time::Duration};

    use keybroker_core::key::ApprovalId;

    use super::*;

    #[test]
    fn every_reason_keeps_its_inside_to_itself() {
        let call = CallId::fresh();
        for reason in Reason::ALL {
            let status = to_status(&Error::new(reason, "secret inside"), call);
            assert_eq!(status.code(), code(reason));
            assert_eq!(status.message(), format!("{} (call {call})", reason.text()));
            let details = status.get_error_details();
            let info = details.error_info().unwrap();
            assert_eq!(
                (info.reason.as_str(), info.domain.as_str()),
                (reason.as_str(), DOMAIN)
            );
            let bytes = String::from_utf8_lossy(status.details()).into_owned();
            assert!(!bytes.contains("inside"), "{reason}");
        }
    }

    #[test]
    fn a_change_that_waits_names_its_request_for_approval() {
        let id = ApprovalId::from_bytes([7; 16]);
        let error = Error::new(Reason::ApprovalNeeded, "").waiting_for(id);
        let details = to_status(&error, CallId::fresh()).get_error_details();
        let metadata = &details.error_info().unwrap().metadata;
        assert_eq!(metadata.get("approval"), Some(&"07".repeat(16)));
    }

    #[test]
    fn only_a_change_that_may_have_been_made_says_that_its_outcome_is_unknown() {
        let error = Error::new(Reason::StoreDown, "");
        for (error, expected) in [
            (error.clone(), None),
            (error.outcome_unknown(), Some("unknown")),
        ] {
            let status = to_status(&error, CallId::fresh());
            let details = status.get_error_details();
            let metadata = &details.error_info().unwrap().metadata;
            assert_eq!(metadata.get("outcome").map(String::as_str), expected);
        }
    }

    /// The list of reasons must not change, and the documentation must contain each reason with its
    /// code.
    #[test]
    fn the_documentation_has_every_reason() {
        let text = include_str!("../../../../docs/errors.md");
        let rows = text.lines().filter(|line| line.starts_with("| `")).count();
        assert_eq!(rows, Reason::ALL.len());
        for reason in Reason::ALL {
            let name = format!("{:?}", code(reason));
            let screaming = name
                .char_indices()
                .fold(String::new(), |mut text, (at, c)| {
                    if c.is_ascii_uppercase() && at > 0 {
                        text.push('_');
                    }
                    text.push(c.to_ascii_uppercase());
                    text
                });
            let row = format!("| `{reason}` | {screaming} |");
            assert!(text.contains(&row), "{row}");
        }
    }

    #[test]
    fn violations_and_delays_are_handed_on() {
        let call = CallId::fresh();
        let status = to_status(&Error::violation("user", "not empty"), call);
        let details = status.get_error_details();
        assert_eq!(
            details.bad_request().unwrap().field_violations[0].field,
            "user"
        );
        let error = Error::new(Reason::QueueFull, "").retry_after(Duration::from_millis(20));
        let details = to_status(&error, call).get_error_details();
        let delay = details.retry_info().unwrap().retry_delay;
        let asked = Duration::from_millis(20)..=Duration::from_millis(30);
        assert!(asked.contains(&delay.unwrap()), "{delay:?}");
        let delays: HashSet<_> = (0..64)
            .map(|_| {
                to_status(&error, call)
                    .get_error_details()
                    .retry_info()
                    .unwrap()
                    .retry_delay
            })
            .collect();
        assert!(delays.len() > 1, "all would return together");
    }
}
