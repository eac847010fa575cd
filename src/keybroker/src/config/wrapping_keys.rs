//! The section `[wrapping_keys]`: how long a wrapping key may be used, and how long its destruction waits.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Two years: NIST SP 800-57 part 1 (section 5.3.6) recommends at most this cryptoperiod for a key
/// that wraps keys.
const DAYS_DEFAULT: u32 = 730;
/// The maximum value of `rotate_after_days`: about a hundred years.
pub(super) const DAYS_MAX: u32 = 36_500;
/// The waiting time before a key is destroyed, in days: long enough to find an old backup that needs the key.
const WAIT_DAYS_DEFAULT: u32 = 30;
/// The longest waiting time, in days: about ten years.
pub(super) const WAIT_DAYS_MAX: u32 = 3_650;
const HOURS_PER_DAY: u64 = 24;

/// The `[wrapping_keys]` section of the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Age in days after which the broker raises the alert `key-age` about the active wrapping key.
    /// The value 0 disables the alert.
    #[serde(default = "days_default")]
    pub rotate_after_days: u32,
    /// The shortest time in days between the request to destroy a wrapping key and its destruction, 1 to 3650.
    #[serde(default = "wait_days_default")]
    pub destroy_after_days: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            rotate_after_days: DAYS_DEFAULT,
            destroy_after_days: WAIT_DAYS_DEFAULT,
        }
    }
}

impl Settings {
    /// The age after which a wrapping key must be rotated; `None` for no limit.
    pub fn rotate_after(self) -> Option<Duration> {
        let hours = u64::from(self.rotate_after_days) * HOURS_PER_DAY;
        (hours > 0).then(|| Duration::from_hours(hours))
    }
}

const fn days_default() -> u32 {
    DAYS_DEFAULT
}

const fn wait_days_default() -> u32 {
    WAIT_DAYS_DEFAULT
}
