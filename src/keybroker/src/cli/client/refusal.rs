//! What a failed call means for the person who made it.

use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::cli::exit::{Exit, Failure};
use keybroker_core::error::Reason;

/// The failure that a status stands for: with the broker's reason when it gave one, else that of the connection.
pub(in crate::cli) fn failure(status: &Status) -> Failure {
    let details = status.get_error_details();
    let Some(info) = details.error_info() else {
        return without_reason(status);
    };
    let mut message = format!("{}: {}", info.reason, status.message());
    for violation in details
        .bad_request()
        .map(|bad| &bad.field_violations)
        .into_iter()
        .flatten()
    {
        message = format!("{message}; {}: {}", violation.field, violation.description);
    }
    if let Some(delay) = details.retry_info().and_then(|info| info.retry_delay) {
        message = format!("{message}; retry after {} ms", delay.as_millis());
    }
    let known = Reason::ALL
        .into_iter()
        .find(|reason| reason.as_str() == info.reason);
    let exit = match known {
        // The same end as when our own timer fires first: which of the two does is chance.
        Some(Reason::Deadline) => Exit::Unreachable,
        _ => Exit::Refused,
    };
    Failure {
        hint: known.map(|reason| hint(reason).to_owned()),
        reason: Some(info.reason.clone()),
        ..Failure::new(exit, message)
    }
}

/// Whether the call may or may not have been carried out.
pub(in crate::cli) fn is_uncertain(failure: &Failure) -> bool {
    failure.exit == Exit::Unreachable
}

/// What the broker does to a client without an accepted certificate.
const CLOSED: &str = "the broker closes the connection after the TLS handshake";

const ENDED: &str = "the connection ended during the call";

/// The failure with the hint for a client that has sent a certificate, or has not.
pub(super) fn explain_closed(failure: Failure, has_certificate: bool) -> Failure {
    let certainty = if failure.message == CLOSED {
        ""
    } else if failure.message.starts_with(ENDED) {
        "if this was the first call, "
    } else {
        return failure;
    };
    let cause = if has_certificate {
        "the broker does not accept the certificate in --cert: compare its issuer with `client_ca_file` of the listener; the \
         broker's log names the cause"
    } else {
        "this listener requires a client certificate: pass --cert and --key"
    };
    failure.hint(format!("{certainty}{cause}"))
}

fn without_reason(status: &Status) -> Failure {
    let message = status.message();
    // What hyper says when the answer is HTTP, and no gRPC.
    let is_other_protocol = message.contains("invalid compression flag");
    let (what, hint) = match status.code() {
        // What tonic's own timer says when a deadline passes on this side.
        Code::Cancelled if message.contains("Timeout expired") => (
            "no answer within --timeout-ms".to_owned(),
            "the call may or may not have been carried out",
        ),
        // In TLS 1.3 a client without an accepted certificate learns so only at its first call.
        Code::Unknown | Code::Unavailable
            if message.contains("right after the TLS handshake")
                || format!("{status:?}").contains("right after the TLS handshake") =>
        {
            (
                CLOSED.to_owned(),
                "it does not accept the certificate in --cert, or requires one: pass --cert and --key, and compare its issuer with \
             `client_ca_file` of the listener; the broker's log names the cause",
            )
        }
        Code::Cancelled | Code::Unknown | Code::Unavailable => (
            format!("{ENDED}: {message}"),
            "if this was the first call, the broker does not accept the certificate in --cert, or wants one: look at its \
             CA, its dates and the broker's log",
        ),
        _ if is_other_protocol => (
            "the listener at this address does not offer gRPC".to_owned(),
            "perhaps it is the listener of the REST API: compare --endpoint with the [[listener]] sections of the broker's \
             configuration",
        ),
        Code::Unimplemented => (
            format!("this listener does not have the service: {message}"),
            "user keys (API `grpc`) and the admin API may be at different listeners: compare --endpoint with the `apis` of \
             each [[listener]] in the broker's configuration",
        ),
        code => (
            format!("{code:?}: {message}"),
            "the answer carries no reason, as every answer of a broker does: check which program listens at --endpoint",
        ),
    };
    let exit = match status.code() {
        // An answer: the call was not carried out, and another attempt changes nothing.
        Code::Unimplemented => Exit::Refused,
        _ if is_other_protocol => Exit::Refused,
        _ => Exit::Unreachable,
    };
    Failure::new(exit, what).hint(hint)
}

/// What to do next. Exhaustive on purpose: a new reason must say.
#[deny(clippy::wildcard_enum_match_arm)]
const fn hint(reason: Reason) -> &'static str {
    match reason {
        Reason::Request => "correct the fields named above",
        Reason::RequestIdReused => {
            "a retry must send what the first call sent; a new change needs a new id"
        }
        Reason::Credential => {
            "the credential is unknown, expired or revoked; the broker's log says which"
        }
        Reason::Policy => {
            "no policy permits this action for this principal; the operator can run `keybroker policy explain`"
        }
        Reason::KeyNotFound => {
            "`client list` shows what there is; a deleted record can be undeleted"
        }
        Reason::KeyExists => "use `replace` for new material, or `undelete` if it is deleted",
        Reason::Revision => "look at the current revision with `get`, and decide again",
        Reason::RecordDamaged => {
            "do not replace the key: tell the operator, who compares the row with a backup"
        }
        Reason::EnvelopeRejected => {
            "send the envelope as the broker made it, with the context it was made for"
        }
        Reason::KeyState => {
            "`get` shows the state of the record, `client wrapping-keys` those of the keys"
        }
        Reason::Limit => {
            "the operator raises `store.revisions_max` or `store.keys_per_user_max`, or removes rows older than the retention period with `keybroker store purge`"
        }
        Reason::QueueFull => {
            "wait for that long, then try again; more callers at once will not be faster"
        }
        Reason::Rate => "wait for that long; this principal asks more than its rate allows",
        Reason::FailureBudget => {
            "wait for that long, and use another credential: this address has shown too many that were refused"
        }
        Reason::TokenDown | Reason::StoreDown | Reason::AuditDown | Reason::IdentityDown => {
            "the broker recovers by itself once the cause is repaired; its log names the cause"
        }
        Reason::TokenUntrusted => {
            "the operator sees the cause in `client token-state` and with `keybroker token check`"
        }
        Reason::Deadline => {
            "the call may or may not have been carried out; allow more with --timeout-ms"
        }
        Reason::Bug => "report it, with the call id and the broker's log lines of that call",
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, time::Duration};

    use tonic_types::ErrorDetails;

    use super::*;

    fn status(code: Code, reason: &str) -> Status {
        let details = ErrorDetails::with_error_info(reason, "keybroker.v1", HashMap::new());
        Status::with_error_details(code, "fixed text (call 7)", details)
    }

    #[test]
    fn every_reason_has_its_name_its_call_id_and_a_hint() {
        for reason in Reason::ALL {
            let failure = failure(&status(Code::Internal, reason.as_str()));
            assert_eq!(failure.message, format!("{reason}: fixed text (call 7)"));
            assert_eq!(failure.reason.as_deref(), Some(reason.as_str()));
            assert!(failure.hint.is_some());
        }
    }

    #[test]
    fn a_reason_of_a_later_release_is_shown_as_it_is() {
        let failure = failure(&status(Code::Internal, "LATER"));
        assert_eq!((failure.exit, failure.hint), (Exit::Refused, None));
        assert_eq!(failure.reason.as_deref(), Some("LATER"));
    }

    #[test]
    fn violations_and_delays_are_shown() {
        let mut details = ErrorDetails::with_error_info("REQUEST", "keybroker.v1", HashMap::new());
        details.add_bad_request_violation("user", "not empty");
        details.set_retry_info(Some(Duration::from_millis(20)));
        let status = Status::with_error_details(Code::InvalidArgument, "text", details);
        assert_eq!(
            failure(&status).message,
            "REQUEST: text; user: not empty; retry after 20 ms"
        );
    }

    #[test]
    fn both_timers_end_alike() {
        let ours = failure(&Status::cancelled("Timeout expired"));
        let theirs = failure(&status(Code::DeadlineExceeded, "DEADLINE"));
        assert_eq!(
            (ours.exit, theirs.exit),
            (Exit::Unreachable, Exit::Unreachable)
        );
        assert!(ours.message.contains("--timeout-ms"), "{}", ours.message);
    }

    #[test]
    fn a_missing_certificate_is_explained() {
        let failure = failure(&Status::cancelled("operation was canceled"));
        assert_eq!(failure.exit, Exit::Unreachable);
        assert!(failure.hint.unwrap().contains("--cert"));
    }
}
