//! What decides about a request without a person: the policy and the inventory of an organisation.

use crate::{
    cli::{
        exit::{Exit, Failure},
        output::printable,
    },
    config::bitwarden::Settings,
};
use keybroker_core::{call::Timestamp, organization::Guid};
use keybroker_policy::{
    DEFAULT_DENY,
    device_approval::{DeviceApprovalPolicy, DeviceRequest, DeviceVerdict},
};

use super::{inventory::Inventory, pending::Pending};

/// Longest text about the errors of policies, in characters. An error may contain a value that the server sent.
const ERRORS_CHARS_MAX: usize = 300;

/// The policy and the inventory. The default permits nothing.
#[derive(Debug, Default)]
pub(super) struct Rules {
    policy: Option<DeviceApprovalPolicy>,
    inventory: Inventory,
}

/// What is known about a request beside its content.
#[derive(Clone, Copy, Debug)]
pub(super) struct Facts {
    /// When the member's wrapped key was pinned.
    pub(super) key_pinned: Timestamp,
    /// Number of pending requests of the member.
    pub(super) pending_of_member: u32,
}

impl Rules {
    /// Loads the files that the settings name.
    pub(super) fn load(settings: &Settings) -> Result<Self, Failure> {
        let bad = |setting: &str, why: String| {
            Failure::new(Exit::Configuration, format!("`{setting}`: {why}"))
        };
        let policy = settings
            .policy_file
            .as_deref()
            .map(DeviceApprovalPolicy::load);
        let inventory = settings.inventory_file.as_deref().map(Inventory::load);
        Ok(Self {
            policy: policy
                .transpose()
                .map_err(|problems| bad("policy_file", problems.to_string()))?,
            inventory: inventory
                .transpose()
                .map_err(|error| bad("inventory_file", error.to_string()))?
                .unwrap_or_default(),
        })
    }

    /// Decides about a request. Returns the policy that approves it, or the reason why it waits for a person.
    pub(super) fn decide(
        &self,
        organization: Guid,
        settings: &Settings,
        pending: &Pending,
        facts: Facts,
    ) -> Result<String, String> {
        let Some(policy) = &self.policy else {
            return Err("no `policy_file` is configured, or the file is invalid".to_owned());
        };
        let networks = pending.address.map(|address| settings.networks_of(address));
        let verdict = policy.decide(&DeviceRequest {
            organization,
            member: pending.member,
            email: &pending.email,
            device: &pending.device,
            device_type: &pending.device_type,
            address: pending.address,
            country: pending.country.as_deref(),
            networks: &networks.unwrap_or_default(),
            is_in_inventory: self.inventory.has(&pending.device, &pending.email),
            key_pinned: facts.key_pinned,
            pending_of_member: facts.pending_of_member,
            created: pending.created,
            at: Timestamp::now(),
        });
        if verdict.approves {
            return Ok(verdict.policy);
        }
        Err(why(&verdict))
    }
}

/// Why a policy does not approve a request, with the policies that cannot be evaluated.
fn why(verdict: &DeviceVerdict) -> String {
    let reason = match verdict.policy.as_str() {
        DEFAULT_DENY => "no policy permits the approval".to_owned(),
        policy if verdict.errors.iter().any(|(broken, _)| broken == policy) => {
            format!("policy {policy} cannot be evaluated")
        }
        policy => format!("policy {policy} forbids the approval"),
    };
    let errors = verdict
        .errors
        .iter()
        .map(|(policy, error)| format!("; error in policy {policy}: {error}"));
    let errors: String = errors.collect();
    let errors: String = errors.chars().take(ERRORS_CHARS_MAX).collect();
    format!("{reason}{}", printable(&errors))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(policy: &str, errors: &[(&str, &str)]) -> DeviceVerdict {
        let errors = errors
            .iter()
            .map(|(policy, error)| ((*policy).to_owned(), (*error).to_owned()));
        DeviceVerdict {
            approves: false,
            policy: policy.to_owned(),
            errors: errors.collect(),
        }
    }

    #[test]
    fn the_reason_names_the_policies_that_cannot_be_evaluated() {
        let none: &[(&str, &str)] = &[];
        for (policy, errors, expected) in [
            (DEFAULT_DENY, none, "no policy permits the approval"),
            ("no", none, "policy no forbids the approval"),
            (
                DEFAULT_DENY,
                &[("fleet", "overflow")],
                "no policy permits the approval; error in policy fleet: overflow",
            ),
            (
                "no",
                &[("no", "\u{1b}[2J"), ("fleet", "overflow")],
                "policy no cannot be evaluated; error in policy no: \\u{1b}[2J; error in policy fleet: overflow",
            ),
        ] {
            assert_eq!(why(&verdict(policy, errors)), expected);
        }
        let long = "x".repeat(10_000);
        let reason = why(&verdict("no", &[("fleet", &*long)]));
        assert!(reason.len() < 400, "{reason}");
    }
}
