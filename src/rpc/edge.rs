//! What happens around every call: its id, its deadline, its panics, and the statuses that tonic makes by itself.
//!
//! Mitigation: M3 of `THREAT_MODEL.md`.

use std::{panic::AssertUnwindSafe, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::Request,
    http::{HeaderMap, Response},
    middleware::{self, Next},
};
use futures_util::FutureExt as _;
use tonic::Code;

use crate::{
    call::{CallId, Deadline},
    error::{Error, Reason},
};

use super::status;

const TIMEOUT_HEADER: &str = "grpc-timeout";
const STATUS_HEADER: &str = "grpc-status";
const DETAILS_HEADER: &str = "grpc-status-details-bin";
/// `grpc-timeout` has at most eight digits (gRPC over HTTP/2).
const TIMEOUT_DIGITS_MAX: usize = 8;

/// Given to every call before any handler sees it.
#[derive(Clone, Debug)]
pub(super) struct Ticket {
    pub(super) id: CallId,
    pub(super) deadline: Deadline,
}

pub(super) fn wrap(routes: Router, call_timeout_max: Duration) -> Router {
    routes.layer(middleware::from_fn(move |request, next| {
        run(request, next, call_timeout_max)
    }))
}

async fn run(mut request: Request, next: Next, call_timeout_max: Duration) -> Response<Body> {
    let id = CallId::fresh();
    let timeout = match timeout(request.headers()) {
        Ok(wanted) => wanted.map_or(call_timeout_max, |wanted| wanted.min(call_timeout_max)),
        Err(error) => return answer(&error, id),
    };
    let deadline = Deadline::after(timeout);
    // tonic has a timer of its own, which would answer CANCELLED where the caller must read DEADLINE_EXCEEDED.
    request.headers_mut().remove(TIMEOUT_HEADER);
    request.extensions_mut().insert(Ticket { id, deadline });
    let work = AssertUnwindSafe(next.run(request)).catch_unwind();
    match tokio::time::timeout_at(deadline.instant().into(), work).await {
        Ok(Ok(response)) => remap(response, id),
        Ok(Err(_)) => {
            tracing::error!(alarm = "bug", call_id = %id, "a handler panicked");
            answer(&Error::new(Reason::Bug, "a handler panicked"), id)
        }
        Err(_) => answer(&Error::new(Reason::Deadline, "deadline passed"), id),
    }
}

fn answer(error: &Error, id: CallId) -> Response<Body> {
    status::to_status(error, id).into_http()
}

fn timeout(headers: &HeaderMap) -> Result<Option<Duration>, Error> {
    let Some(value) = headers.get(TIMEOUT_HEADER) else {
        return Ok(None);
    };
    let parsed = value.to_str().ok().and_then(parse_timeout);
    parsed.map(Some).ok_or_else(|| {
        Error::violation(
            "grpc-timeout",
            "at most eight digits and one of H M S m u n",
        )
    })
}

fn parse_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let plain = (1..=TIMEOUT_DIGITS_MAX).contains(&digits.len())
        && digits.bytes().all(|byte| byte.is_ascii_digit());
    if !plain {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(number * 3_600)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

/// A refusal that tonic made before any handler ran: a message that is too long, or that is no message. Ours carry
/// details; these do not.
fn remap(response: Response<Body>, id: CallId) -> Response<Body> {
    let headers = response.headers();
    let Some(code) = headers.get(STATUS_HEADER) else {
        return response;
    };
    if headers.contains_key(DETAILS_HEADER) {
        return response;
    }
    let malformed = match Code::from_bytes(code.as_bytes()) {
        Code::OutOfRange | Code::ResourceExhausted => "at most 64 KiB",
        Code::Internal | Code::InvalidArgument | Code::Unknown => {
            "a protobuf message of this method"
        }
        _ => return response,
    };
    answer(&Error::violation("message", malformed), id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_digits_and_a_unit() {
        assert_eq!(parse_timeout("100m"), Some(Duration::from_millis(100)));
        assert_eq!(parse_timeout("1H"), Some(Duration::from_hours(1)));
        assert_eq!(
            parse_timeout("99999999n"),
            Some(Duration::from_nanos(99_999_999))
        );
        for bad in ["", "m", "100", "100x", "999999999m", "-1S", "1.5S", "1ä"] {
            assert_eq!(parse_timeout(bad), None, "{bad:?}");
        }
    }
}
