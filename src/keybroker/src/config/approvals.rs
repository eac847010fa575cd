//! The section `[approvals]`: which changes need the approval of a second person, and who the persons are.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use keybroker_broker::{ApprovalRules, Person};
use keybroker_core::principal::{Action, NAME_BYTES_MAX};

const HOURS_DEFAULT: u32 = 24;
/// The longest time for which a request can be approved and used: one week. A request needs the wrapping key that authenticates it,
/// so a longer time would delay the destruction of wrapping keys.
const HOURS_MAX: u32 = 168;
/// Longest name of a person, in bytes.
const PERSON_BYTES_MAX: usize = 128;
/// The kinds of names that a `[[principal]]` of the configuration has.
const CONFIGURED: [&str; 2] = ["URI:", "DNS:"];

/// The `[approvals]` section of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The actions that need an approval, by their names in policies. `client_credential.create` needs an approval only for API
    /// clients with the role `admin`.
    #[serde(default = "all_actions")]
    pub actions: BTreeSet<String>,
    /// The time in hours within which a request must be approved and used, 1 to 168.
    #[serde(default = "hours_default")]
    pub expire_after_hours: u32,
    /// The `[[approvals.person]]` sections. Without any, no change needs an approval.
    #[serde(rename = "person", default)]
    pub persons: Vec<PersonSettings>,
}

/// A person and the principals that belong to this person.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PersonSettings {
    /// The name of the person, 1 to 128 bytes.
    pub name: String,
    /// The names of the principals of this person, as in the audit log.
    pub principals: BTreeSet<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            actions: all_actions(),
            expire_after_hours: HOURS_DEFAULT,
            persons: Vec::new(),
        }
    }
}

impl Settings {
    /// The rules of the broker. `kept` is the time for which requests stay in the database after they expired.
    pub fn rules(&self, kept: Duration) -> ApprovalRules {
        let is_named = |action: &Action| self.actions.contains(action.as_str());
        let persons = self.persons.iter().map(|person| Person {
            name: person.name.clone(),
            principals: person.principals.clone(),
        });
        ApprovalRules {
            actions: ApprovalRules::ACTIONS
                .into_iter()
                .filter(is_named)
                .collect(),
            expire_after: Duration::from_hours(self.expire_after_hours.into()),
            persons: persons.collect(),
            kept,
        }
    }

    /// Logs which actions need an approval, so that a broker with other settings than its neighbours is noticed.
    pub(crate) fn log(&self) {
        let actions: Vec<&str> = if self.persons.is_empty() {
            Vec::new()
        } else {
            self.actions.iter().map(String::as_str).collect()
        };
        tracing::info!(
            actions = actions.join(","),
            persons = self.persons.len(),
            "actions that need the approval of a second person"
        );
    }

    /// The problems of the section. `sans` are the names of the configured principals.
    pub(super) fn problems(&self, sans: &BTreeSet<&str>) -> Vec<String> {
        let mut problems = Vec::new();
        let known = all_actions();
        for action in self.actions.difference(&known) {
            let known: Vec<&str> = known.iter().map(String::as_str).collect();
            problems.push(format!(
                "[approvals]: `actions` has {action:?}; an approval is possible for {}",
                known.join(", ")
            ));
        }
        if !(1..=HOURS_MAX).contains(&self.expire_after_hours) {
            problems.push(format!(
                "`[approvals] expire_after_hours` is {}; it must be 1 to {HOURS_MAX}",
                self.expire_after_hours
            ));
        }
        if let [only] = &self.persons[..] {
            problems.push(format!(
                "[[approvals.person]]: {:?} is the only person, so no person could approve a change; add a second person, or remove the \
                 section to make changes without approvals",
                only.name
            ));
        }
        if self.persons.is_empty() && *self != Self::default() {
            problems.push(
                "[approvals]: there is no [[approvals.person]], so no change needs an approval; add at least two persons, or remove the \
                 section"
                    .to_owned(),
            );
        }
        if !self.persons.is_empty() && self.actions.is_empty() {
            problems.push(
                "[approvals]: `actions` is empty, so no change needs an approval; name at least one action, or remove the section"
                    .to_owned(),
            );
        }
        problems.extend(self.problem_of_clients());
        let mut owners: BTreeMap<&str, &str> = BTreeMap::new();
        let mut names = BTreeSet::new();
        for person in &self.persons {
            problems.extend(person.problems(sans));
            if !names.insert(&person.name) {
                problems.push(format!(
                    "[[approvals.person]]: `name` {:?} appears twice",
                    person.name
                ));
            }
            for principal in &person.principals {
                if let Some(other) = owners.insert(principal, &person.name)
                    && other != person.name
                {
                    problems.push(format!(
                        "[[approvals.person]]: the principal {principal:?} belongs to both {other:?} and {:?}, so one person could \
                         approve their own change; leave it in one of the sections",
                        person.name
                    ));
                }
            }
        }
        problems
    }

    /// The problem that one administrator could make a secret of another person's API client, and approve as this person.
    fn problem_of_clients(&self) -> Option<String> {
        if self.actions.is_empty() || self.actions.contains(Action::CreateClient.as_str()) {
            return None;
        }
        let mut principals = self.persons.iter().flat_map(|person| &person.principals);
        let client = principals.find(|principal| principal.starts_with("client:"))?;
        Some(format!(
            "[[approvals.person]]: {client:?} is an API client, but `actions` lacks {}, so one administrator could make another \
             administrator's credential; add the action, or use other principals",
            Action::CreateClient
        ))
    }
}

impl PersonSettings {
    fn problems(&self, sans: &BTreeSet<&str>) -> Vec<String> {
        let mut problems = Vec::new();
        let name = &self.name;
        let is_good =
            (1..=PERSON_BYTES_MAX).contains(&name.len()) && !name.chars().any(char::is_control);
        if !is_good {
            problems.push(format!(
                "[[approvals.person]]: `name` is {name:?}; it must be 1 to {PERSON_BYTES_MAX} bytes without control characters"
            ));
        }
        if self.principals.is_empty() {
            problems.push(format!(
                "[[approvals.person]] {name:?}: `principals` is empty; list the principals of this person by their names in the audit log"
            ));
        }
        for principal in &self.principals {
            if !(1..=NAME_BYTES_MAX).contains(&principal.len()) {
                problems.push(format!(
                    "[[approvals.person]] {name:?}: `principals` has a name of {} bytes; a principal has 1 to {NAME_BYTES_MAX}",
                    principal.len()
                ));
            }
            let is_configured = CONFIGURED.iter().any(|kind| principal.starts_with(kind));
            let is_of_provider =
                principal.starts_with("token:") || principal.starts_with("client:");
            if is_configured && !sans.contains(principal.as_str()) {
                problems.push(format!(
                    "[[approvals.person]] {name:?}: no [[principal]] has the `san` {principal:?}"
                ));
            } else if !is_configured && !is_of_provider {
                problems.push(format!(
                    "[[approvals.person]] {name:?}: {principal:?} is not the name of a principal; write the `san` of a [[principal]], \
                     `token:<issuer>:<subject>` or `client:<id>`"
                ));
            }
        }
        problems
    }
}

fn all_actions() -> BTreeSet<String> {
    ApprovalRules::ACTIONS
        .iter()
        .map(|action| action.as_str().to_owned())
        .collect()
}

const fn hours_default() -> u32 {
    HOURS_DEFAULT
}

#[cfg(test)]
mod tests {
    use super::*;

    const SANS: [&str; 2] = ["URI:spiffe://x/ada", "URI:spiffe://x/bob"];

    fn problems(text: &str) -> Vec<String> {
        let settings: Settings = toml::from_str(text).unwrap();
        settings.problems(&BTreeSet::from(SANS))
    }

    fn persons(persons: &[(&str, &str)]) -> String {
        let person = |(name, principals): &(&str, &str)| {
            format!("[[person]]\nname = \"{name}\"\nprincipals = [{principals}]\n")
        };
        persons.iter().map(person).collect()
    }

    #[test]
    fn approvals_are_off_without_persons_and_on_with_two() {
        let off = Settings::default();
        assert!(off.rules(Duration::ZERO).persons.is_empty());
        assert_eq!(off.problems(&BTreeSet::new()), Vec::<String>::new());
        let on = persons(&[
            ("Ada", "\"URI:spiffe://x/ada\", \"token:sso:ada\""),
            (
                "Bob",
                "\"URI:spiffe://x/bob\", \"client:00112233445566778899aabbccddeeff\"",
            ),
        ]);
        assert_eq!(problems(&on), Vec::<String>::new());
        let settings: Settings = toml::from_str(&on).unwrap();
        let rules = settings.rules(Duration::ZERO);
        assert_eq!(rules.actions, BTreeSet::from(ApprovalRules::ACTIONS));
        assert_eq!(rules.expire_after, Duration::from_hours(24));
    }

    #[test]
    fn each_mistake_is_named() {
        let (ada, bob) = ("\"URI:spiffe://x/ada\"", "\"URI:spiffe://x/bob\"");
        let both = format!("{ada}, {bob}");
        let long = "x".repeat(129);
        let good = persons(&[("Ada", ada), ("Bob", bob)]);
        let of_client = persons(&[
            ("Ada", ada),
            ("Bob", "\"client:00112233445566778899aabbccddeeff\""),
        ]);
        for (text, word) in [
            (persons(&[("Ada", ada)]), "only person"),
            (
                persons(&[("Ada", ada), ("Bob", &both)]),
                "both \"Ada\" and \"Bob\"",
            ),
            (persons(&[("Ada", ada), ("Ada", bob)]), "appears twice"),
            (persons(&[("Ada", ada), ("Bob", "")]), "is empty"),
            (persons(&[("", ada), ("Bob", bob)]), "1 to 128 bytes"),
            (persons(&[(&long, ada), ("Bob", bob)]), "1 to 128 bytes"),
            (
                persons(&[("Ada", ada), ("Bob", "\"URI:spiffe://x/eve\"")]),
                "no [[principal]]",
            ),
            (
                persons(&[("Ada", ada), ("Bob", "\"bob\"")]),
                "not the name of a principal",
            ),
            (
                format!("actions = [\"wrapping_key.compromise\"]\n{good}"),
                "wrapping_key.compromise",
            ),
            (format!("expire_after_hours = 0\n{good}"), "1 to 168"),
            (format!("expire_after_hours = 169\n{good}"), "1 to 168"),
            (
                "expire_after_hours = 5".to_owned(),
                "no [[approvals.person]]",
            ),
            (format!("actions = []\n{good}"), "`actions` is empty"),
            (
                format!("actions = [\"wrapping_key.destroy\"]\n{of_client}"),
                "lacks client_credential.create",
            ),
        ] {
            let found = problems(&text);
            assert!(
                found.len() == 1 && found[0].contains(word),
                "{text}: {found:?}"
            );
        }
        assert!(toml::from_str::<Settings>("unknown = 1").is_err());
    }
}
