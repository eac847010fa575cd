//! Converts the error of a call to a message and a hint for the person who made the call.

use std::{env, time::Duration};

use keybroker_client::{ApprovalId, Code, Error, ErrorKind, Reason, Status};
use keybroker_core::error::chain;

use crate::cli::{
    exit::{Exit, Failure},
    output::printable,
};

/// Converts the error of a call to a failure with the broker's reason or with the cause of a failed
/// connection.
pub(in crate::cli) fn failure(error: &Error) -> Failure {
    let Some(refusal) = error.refusal() else {
        return without_reason(error);
    };
    let mut message = format!("{}: {}", refusal.reason_name(), refusal.text());
    for violation in refusal.violations() {
        message = format!("{message}; {}: {}", violation.field, violation.description);
    }
    if let Some(delay) = refusal.retry_delay() {
        message = format!("{message}; retry after {} ms", delay.as_millis());
    }
    let exit = match error.kind() {
        // The exit code is the same as for a timeout of the client, because either timer may expire
        // first.
        ErrorKind::DeadlineExceeded => Exit::Unreachable,
        _ => Exit::Refused,
    };
    let is_about = |field: &str| refusal.violations().iter().any(|one| one.field == field);
    let hint = match (refusal.approval(), refusal.reason()) {
        (Some(approval), _) => Some(next_commands(approval)),
        (None, Some(Reason::Limit)) if is_about("approval") => Some(TOO_MANY_REQUESTS.to_owned()),
        (None, Some(Reason::Policy)) if is_about("principal") => Some(OTHER_PERSON.to_owned()),
        (None, Some(_)) if is_about("phrase_words") => Some(OTHER_WORDS.to_owned()),
        (None, reason) => reason.map(|reason| hint(reason).to_owned()),
    };
    Failure {
        hint,
        reason: Some(refusal.reason_name().to_owned()),
        // The broker's explanation can contain texts of other persons.
        ..Failure::new(exit, printable(&message))
    }
}

/// The hint for the limits of requests for approval, which no setting changes.
const TOO_MANY_REQUESTS: &str = "`keybroker approval list --all` shows the requests: let a second person decide about the pending ones, make the \
     approved changes, withdraw your own requests with `keybroker approval reject ID`, or wait until they expire";

/// The hint if the rule for two persons refused the call, which no policy explains.
const OTHER_PERSON: &str =
    "the section `[approvals]` of the broker's configuration has the persons and their principals";

/// The hint if an approver typed other words than those of the phrase.
const OTHER_WORDS: &str = "ask the member again for the words that the new device shows. If the member does not know about the request, or reads other \
     words, deny the request with `keybroker device deny ID`";

/// The two commands that make a change that waits for an approval.
fn next_commands(approval: ApprovalId) -> String {
    let again: Vec<String> = env::args().skip(1).map(|word| quoted(&word)).collect();
    format!(
        "the other person runs `keybroker approval approve {approval}`; then run the same command again: `keybroker {}`",
        again.join(" ")
    )
}

/// A word of a command line as a person types it into a shell.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The message if the broker rejects the client's certificate.
const CLOSED: &str = "the broker closed the connection after the TLS handshake";

const ENDED: &str = "the connection ended during the call";

/// The message if no answer arrived in time.
pub(super) const TIMED_OUT: &str = "no answer within --timeout-ms";

/// The hint if no answer arrived in time.
const MAY_HAVE_CHANGED: &str =
    "raise --timeout-ms; if the call was a change, the broker may have made the change";

/// Adds the value of the timeout to the message about an answer that did not arrive in time.
pub(super) fn with_timeout(failure: Failure, timeout: Duration) -> Failure {
    let Some(start) = failure.message.strip_suffix(TIMED_OUT) else {
        return failure;
    };
    let message = format!(
        "{start}no answer within {} ms (--timeout-ms)",
        timeout.as_millis()
    );
    Failure { message, ..failure }
}

/// Adds a hint that depends on the credentials of the caller: whether there is a client certificate, and whether there is any
/// credential.
pub(super) fn explain(failure: Failure, has_certificate: bool, has_credential: bool) -> Failure {
    if !has_credential && failure.reason.as_deref() == Some(Reason::Credential.as_str()) {
        return failure.hint(NO_CREDENTIAL);
    }
    explain_closed(failure, has_certificate)
}

/// The hint if the call had no credential at all.
const NO_CREDENTIAL: &str = "the command sent no credential: pass --token-file, or --cert and --key, or --client-id and --client-secret-file";

fn explain_closed(failure: Failure, has_certificate: bool) -> Failure {
    let certainty = if failure.message == CLOSED {
        ""
    } else if failure.message.starts_with(ENDED) {
        "if this was the first call, "
    } else {
        return failure;
    };
    let cause = if has_certificate {
        "the broker does not accept the certificate in --cert: compare the issuer of this certificate with \
         `client_ca_file` of the listener; the broker's log shows the cause"
    } else {
        "this listener requires a client certificate: pass --cert and --key"
    };
    failure.hint(format!("{certainty}{cause}"))
}

fn without_reason(error: &Error) -> Failure {
    match error.kind() {
        ErrorKind::DeadlineExceeded => {
            Failure::new(Exit::Unreachable, TIMED_OUT).hint(MAY_HAVE_CHANGED)
        }
        // In TLS 1.3, a client learns only during its first call that the server rejected the
        // certificate.
        ErrorKind::Connection if chain(error).contains("right after the TLS handshake") => {
            Failure::new(Exit::Unreachable, CLOSED).hint(
                "the broker does not accept the certificate in --cert, or requires a client certificate: pass --cert and \
                 --key, and compare the issuer with `client_ca_file` of the listener; the broker's log shows the cause",
            )
        }
        ErrorKind::Connection => {
            let cause = error.status().map_or_else(|| chain(error), |status| status.message().to_owned());
            Failure::new(Exit::Unreachable, format!("{ENDED}: {cause}")).hint(
                "if this was the first call, the broker does not accept the client certificate in --cert, or requires a \
                 client certificate: check the CA and the dates of the client certificate, and the broker's log",
            )
        }
        ErrorKind::InvalidResponse => Failure::new(Exit::Refused, error.to_string())
            .hint("check whether the broker has a later release than this client"),
        _ => match error.status() {
            Some(status) => of_another_service(status),
            None => Failure::new(Exit::Unreachable, chain(error)),
        },
    }
}

/// The failure for an answer that does not come from the API of a broker.
fn of_another_service(status: &Status) -> Failure {
    let message = status.message();
    // The library tonic returns this text if the answer is HTTP but not gRPC.
    if message.contains("invalid compression flag") {
        let what = "the listener at this address does not offer gRPC";
        return Failure::new(Exit::Refused, what).hint(
            "the listener may serve the REST API: compare --endpoint with the [[listener]] sections of the broker's \
             configuration",
        );
    }
    // The server did not carry out the call, and a retry would have the same result.
    if status.code() == Code::Unimplemented {
        let what = format!("this listener does not serve the called service: {message}");
        return Failure::new(Exit::Refused, what).hint(
            "the gRPC API (user keys) and the admin API may have different listeners: compare --endpoint with the \
             `apis` of each [[listener]] in the broker's configuration",
        );
    }
    Failure::new(Exit::Unreachable, format!("{:?}: {message}", status.code())).hint(
        "every error of a broker has a reason, but this error has none: check which program listens at --endpoint",
    )
}

/// The hint for a reason. The compiler checks that every reason has a hint.
#[deny(clippy::wildcard_enum_match_arm)]
const fn hint(reason: Reason) -> &'static str {
    match reason {
        Reason::Request => "correct the fields in the error message",
        Reason::RequestIdReused => {
            "a retry must send the same content as the first call; a different change needs a new request id"
        }
        Reason::Credential => {
            "the credential is unknown, expired or revoked; the broker's log shows the cause"
        }
        Reason::Policy => {
            "a policy forbids this action for this principal, or no policy permits it; the operator can run `keybroker policy explain`"
        }
        Reason::KeyNotFound => "`client list` shows the records; a deleted record can be undeleted",
        Reason::KeyExists => {
            "use `client replace` to store new key material, or `client undelete` if the record is \
         deleted"
        }
        Reason::Revision => {
            "`client get` shows the current revision; check this revision before you repeat the change"
        }
        Reason::RecordDamaged => {
            "do not replace the key: report the error to the operator, who can compare the row with a backup"
        }
        Reason::EnvelopeRejected => {
            "send the envelope exactly as the broker returned it, with the same context"
        }
        Reason::KeyState => {
            "`client get` shows the state of the record, and `client wrapping-keys` shows the states of the wrapping keys"
        }
        Reason::ReleaseForm => {
            "a key under a sealed wrapping key needs `--recipient`, and a key under a plain wrapping key is released without it"
        }
        Reason::ApprovalNeeded => {
            "let a second person approve the change with `keybroker approval approve ID`, then run the same command again"
        }
        Reason::ApprovalState => {
            "`keybroker approval list --all` shows the requests for approval and their states"
        }
        Reason::DeviceNotFound => {
            "`keybroker device list` and `keybroker device requests` show the devices and requests"
        }
        Reason::DeviceState => {
            "`keybroker device list` and `keybroker device requests --all` show the states of devices and requests"
        }
        Reason::DeviceSignature => {
            "the change needs the signature of a trusted device of the member; docs/devices.md describes the signed bytes"
        }
        Reason::AccessCode => {
            "send the access code with which the device made the request; after five wrong codes, the request is over"
        }
        Reason::Limit => {
            "the operator can raise `store.revisions_max` or `store.keys_per_user_max`, or remove old rows with \
             `keybroker store purge`"
        }
        Reason::QueueFull => {
            "wait for the given time, then try again; more concurrent calls do not increase the throughput"
        }
        Reason::Rate => "wait for the given time; this principal has exceeded its rate limit",
        Reason::FailureBudget => {
            "wait for the given time, and use a valid credential: too many credentials from this address were refused"
        }
        Reason::TokenDown | Reason::StoreDown | Reason::AuditDown | Reason::IdentityDown => {
            "the broker recovers automatically after the cause is repaired; the broker's log shows the cause"
        }
        Reason::TokenUntrusted => {
            "`client token-state` and `keybroker token check` show the operator the cause"
        }
        Reason::Deadline => MAY_HAVE_CHANGED,
        Reason::Bug => "report the error with the call id and the broker's log lines of this call",
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tonic_types::{ErrorDetails, StatusExt as _};

    use super::*;

    fn refusal(code: Code, reason: &str) -> Error {
        let details = ErrorDetails::with_error_info(reason, "keybroker.v1", HashMap::new());
        Status::with_error_details(code, "fixed text (call 7)", details).into()
    }

    #[test]
    fn every_reason_has_its_name_its_call_id_and_a_hint() {
        for reason in Reason::ALL {
            let failure = failure(&refusal(Code::Internal, reason.as_str()));
            assert_eq!(failure.message, format!("{reason}: fixed text (call 7)"));
            assert_eq!(failure.reason.as_deref(), Some(reason.as_str()));
            assert!(failure.hint.is_some());
        }
    }

    #[test]
    fn a_change_that_waits_shows_both_commands() {
        let id = "07".repeat(16);
        let metadata = HashMap::from([("approval".to_owned(), id.clone())]);
        let details = ErrorDetails::with_error_info("APPROVAL_NEEDED", "keybroker.v1", metadata);
        let status = Status::with_error_details(Code::FailedPrecondition, "text", details);
        let hint = failure(&status.into()).hint.unwrap();
        assert!(
            hint.contains(&format!("`keybroker approval approve {id}`")),
            "{hint}"
        );
        assert!(hint.contains("then run the same command again"), "{hint}");
        for (word, expected) in [
            ("--yes", "--yes"),
            ("a b", "'a b'"),
            ("", "''"),
            ("it's", r"'it'\''s'"),
        ] {
            assert_eq!(quoted(word), expected);
        }
    }

    /// A policy that forbids the action may have decided, or the rule for two persons.
    #[test]
    fn a_denial_is_explained_by_its_cause() {
        let general = failure(&refusal(Code::PermissionDenied, "POLICY"));
        let general = general.hint.unwrap();
        for cause in ["a policy forbids", "or no policy permits"] {
            assert!(general.contains(cause), "{general}");
        }
        let mut details = ErrorDetails::with_error_info("POLICY", "keybroker.v1", HashMap::new());
        details.add_bad_request_violation("principal", "another person has to approve it");
        let status = Status::with_error_details(Code::PermissionDenied, "text", details);
        let of_persons = failure(&status.into()).hint.unwrap();
        assert!(of_persons.contains("[approvals]"), "{of_persons}");
    }

    #[test]
    fn a_call_without_a_credential_says_how_to_pass_one() {
        let refused = || failure(&refusal(Code::Unauthenticated, "CREDENTIAL"));
        let without = explain(refused(), false, false).hint.unwrap();
        assert!(without.contains("--token-file"), "{without}");
        for has_certificate in [false, true] {
            let with = explain(refused(), has_certificate, true);
            assert_eq!(with.hint, refused().hint);
        }
    }

    #[test]
    fn wrong_words_of_a_phrase_have_their_own_hint() {
        let mut details = ErrorDetails::with_error_info("REQUEST", "keybroker.v1", HashMap::new());
        details.add_bad_request_violation("phrase_words", "the two hidden words");
        let status = Status::with_error_details(Code::InvalidArgument, "text", details);
        let hint = failure(&status.into()).hint.unwrap();
        assert!(hint.contains("device deny"), "{hint}");
    }

    /// The settings of the store do not change the limits of requests for approval.
    #[test]
    fn the_limit_of_requests_for_approval_has_its_own_hint() {
        let mut details = ErrorDetails::with_error_info("LIMIT", "keybroker.v1", HashMap::new());
        details.add_bad_request_violation("approval", "20 requests of Ada are open");
        let status = Status::with_error_details(Code::FailedPrecondition, "text", details);
        let of_approvals = failure(&status.into()).hint.unwrap();
        assert!(of_approvals.contains("approval reject"), "{of_approvals}");
        assert!(!of_approvals.contains("store."), "{of_approvals}");
        let general = failure(&refusal(Code::FailedPrecondition, "LIMIT")).hint;
        assert!(general.unwrap().contains("store.revisions_max"));
    }

    #[test]
    fn a_reason_of_a_later_release_is_shown_as_it_is() {
        let failure = failure(&refusal(Code::Internal, "LATER"));
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
            failure(&status.into()).message,
            "REQUEST: text; user: not empty; retry after 20 ms"
        );
    }

    #[test]
    fn the_explanation_of_the_broker_cannot_control_the_terminal() {
        let mut details = ErrorDetails::with_error_info("POLICY", "keybroker.v1", HashMap::new());
        details.add_bad_request_violation("id", "\"Ada\"\u{1b}[2J\u{202e} rejected");
        let status = Status::with_error_details(Code::PermissionDenied, "text", details);
        assert_eq!(
            failure(&status.into()).message,
            r#"POLICY: text; id: "Ada"\u{1b}[2J\u{202e} rejected"#
        );
    }

    #[test]
    fn both_timers_end_alike() {
        let ours = failure(&Status::cancelled("Timeout expired").into());
        let theirs = failure(&refusal(Code::DeadlineExceeded, "DEADLINE"));
        assert_eq!(
            (ours.exit, theirs.exit),
            (Exit::Unreachable, Exit::Unreachable)
        );
        assert_eq!(ours.hint, theirs.hint);
        let shown = with_timeout(ours, Duration::from_millis(300));
        assert_eq!(shown.message, "no answer within 300 ms (--timeout-ms)");
        let connecting = Failure::new(Exit::Unreachable, format!("cannot reach it: {TIMED_OUT}"));
        let shown = with_timeout(connecting, Duration::from_millis(300));
        assert_eq!(
            shown.message,
            "cannot reach it: no answer within 300 ms (--timeout-ms)"
        );
    }

    #[test]
    fn a_missing_certificate_is_explained() {
        let failure = failure(&Status::cancelled("operation was canceled").into());
        assert_eq!(failure.exit, Exit::Unreachable);
        assert!(failure.hint.unwrap().contains("--cert"));
    }
}
