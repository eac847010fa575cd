//! The header `grpc-timeout` of gRPC over HTTP/2.

use std::time::Duration;

use axum::http::HeaderMap;

use keybroker_core::error::Error;

const HEADER: &str = "grpc-timeout";
/// Maximum number of digits of a timeout (gRPC over HTTP/2).
const DIGITS_MAX: usize = 8;

/// Removes the caller's timeout from the headers and returns it. If the `grpc-timeout` header remained, tonic's
/// own timer would return `CANCELLED` instead of `DEADLINE_EXCEEDED`.
pub(super) fn take(headers: &mut HeaderMap) -> Result<Option<Duration>, Error> {
    let Some(value) = headers.remove(HEADER) else {
        return Ok(None);
    };
    let parsed = value.to_str().ok().and_then(parse);
    parsed.map(Some).ok_or_else(|| {
        Error::violation(
            HEADER,
            "one to eight digits, followed by a unit: H, M, S, m, u or n",
        )
    })
}

fn parse(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let plain = (1..=DIGITS_MAX).contains(&digits.len())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_digits_and_a_unit() {
        assert_eq!(parse("100m"), Some(Duration::from_millis(100)));
        assert_eq!(parse("1H"), Some(Duration::from_hours(1)));
        assert_eq!(parse("99999999n"), Some(Duration::from_nanos(99_999_999)));
        for bad in ["", "m", "100", "100x", "999999999m", "-1S", "1.5S", "1ä"] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }
}
