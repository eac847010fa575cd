//! The check whether a number of the configuration is in its range.

use std::ops::RangeInclusive;

/// Adds a problem to the list if a value is out of range.
pub(super) fn range(
    problems: &mut Vec<String>,
    name: &str,
    value: u64,
    allowed: RangeInclusive<u64>,
) {
    if !allowed.contains(&value) {
        problems.push(format!(
            "`{name}` is {value}; it must be {} to {}",
            allowed.start(),
            allowed.end()
        ));
    }
}

/// A number without a loss.
pub(super) fn wide(value: usize) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}
