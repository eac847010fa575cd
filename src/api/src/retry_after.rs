//! The header `Retry-After` of HTTP answers (RFC 9110, section 10.2.3).

use std::time::Duration;

/// Converts a delay to whole seconds, rounded up, but at least one second.
pub(crate) fn retry_after_seconds(delay: Duration) -> u64 {
    let part = u64::from(delay.subsec_nanos() > 0);
    delay.as_secs().saturating_add(part).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caller_never_returns_too_early() {
        for (delay, seconds) in [(0, 1), (1, 1), (1_000, 1), (1_001, 2), (59_999, 60)] {
            assert_eq!(
                retry_after_seconds(Duration::from_millis(delay)),
                seconds,
                "{delay} ms"
            );
        }
    }
}
