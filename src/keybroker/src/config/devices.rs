//! The section `[devices]`: limits and lifetimes of trusted devices and of requests for access.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use keybroker_broker::DeviceRules;

use super::range::range;

/// The largest number of trusted devices of one member. A rotation sends the encrypted keys of all of them in one message of 64 KiB.
const TRUSTED_MAX: u32 = 100;
/// The longest lifetime of a request that another device approves, in minutes: one day.
const MINUTES_MAX: u32 = 24 * 60;
/// The longest lifetime of a request that an administrator approves, in hours: 30 days. A request needs the wrapping key that
/// authenticates it, so a longer time would delay the destruction of wrapping keys.
const HOURS_MAX: u32 = 30 * 24;

/// The largest number of approvers that a request can need.
const APPROVERS_MAX: u32 = 2;

/// The `[devices]` section of the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Largest number of trusted devices of one member, 1 to 100.
    pub trusted_max: u32,
    /// The time in minutes within which another device must approve a request, and the answer must be fetched: 1 to 1,440.
    pub request_minutes: u32,
    /// The time in hours within which an administrator must approve a request: 1 to 720.
    pub administrator_request_hours: u32,
    /// The time in hours within which the answer must be fetched after an administrator approved the request: 1 to 720.
    pub answer_hours: u32,
    /// How many approvers must approve a request, 1 or 2.
    pub approvers_needed: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            trusted_max: 50,
            request_minutes: 15,
            administrator_request_hours: 7 * 24,
            answer_hours: 12,
            approvers_needed: 1,
        }
    }
}

impl Settings {
    /// The rules of the broker. `kept` is the time for which rows that are over stay in the database.
    pub fn rules(&self, kept: Duration) -> DeviceRules {
        DeviceRules {
            trusted_max: self.trusted_max,
            request_lifetime: Duration::from_mins(self.request_minutes.into()),
            administrator_lifetime: Duration::from_hours(self.administrator_request_hours.into()),
            answer_lifetime: Duration::from_hours(self.answer_hours.into()),
            approvers_needed: self.approvers_needed,
            kept,
        }
    }

    /// The problems of the section.
    pub(super) fn problems(&self) -> Vec<String> {
        let limits = [
            ("trusted_max", self.trusted_max, TRUSTED_MAX),
            ("request_minutes", self.request_minutes, MINUTES_MAX),
            (
                "administrator_request_hours",
                self.administrator_request_hours,
                HOURS_MAX,
            ),
            ("answer_hours", self.answer_hours, HOURS_MAX),
            ("approvers_needed", self.approvers_needed, APPROVERS_MAX),
        ];
        let mut problems = Vec::new();
        for (name, value, max) in limits {
            let name = format!("[devices] {name}");
            range(&mut problems, &name, value.into(), 1..=max.into());
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_those_of_the_broker_and_every_limit_is_checked() {
        let defaults = Settings::default();
        let kept = DeviceRules::default().kept;
        assert_eq!(defaults.rules(kept), DeviceRules::default());
        assert!(defaults.problems().is_empty());
        for value in [0, 1_441] {
            let wrong = Settings {
                trusted_max: value,
                request_minutes: value,
                administrator_request_hours: value,
                answer_hours: value,
                approvers_needed: value,
            };
            assert_eq!(wrong.problems().len(), 5, "{value}");
        }
    }
}
