//! The `[[issuer.mapping]]` tables specify which claims of an access token give its holder which kind, roles and tenant.
//!
//! The first mapping whose conditions all hold applies, and no other. Rights of several mappings are never combined: the
//! union of two grants could release keys that neither of them permits.
//!
//! Mitigation: M19 of `THREAT_MODEL.md`.

use std::{
    collections::{BTreeSet, HashSet},
    fmt,
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use keybroker_core::{
    key::{KeyName, Tenant, UserId},
    principal::{Grant, Kind, Reach, Role},
};

/// Largest number of mappings of an issuer.
const MAPPINGS_MAX: usize = 64;
/// Largest number of conditions of a mapping.
const CONDITIONS_MAX: usize = 8;
/// Largest number of values in a condition.
const ACCEPTED_MAX: usize = 256;
/// Longest value in a condition, in bytes.
const VALUE_BYTES_MAX: usize = 512;
/// Largest number of names in the path of a claim.
const PATH_NAMES_MAX: usize = 8;
/// Longest name in the path of a claim, in bytes.
const CLAIM_BYTES_MAX: usize = 256;

/// One `[[issuer.mapping]]` table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mapping {
    /// The name of the mapping in the audit log and in policies.
    pub name: String,
    /// The conditions, which must all hold.
    pub when: Vec<Condition>,
    /// Whether the holders of matching access tokens are users or services.
    #[serde(default = "default_kind")]
    pub kind: Kind,
    /// The tenant whose records the holders can access. If it is not set, the tenant of the issuer applies.
    pub tenant: Option<Tenant>,
    /// The roles of the holders, if they are services.
    #[serde(default)]
    pub roles: BTreeSet<Role>,
    /// The users whose keys services with the role `release` may release, and whose requests those with the role `approver` decide.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub users: Option<Reach<UserId>>,
    /// The names of the keys that services with the role `release` may release.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_names: Option<Reach<KeyName>>,
}

/// A condition of a mapping. The condition holds if the claim has at least one of the values.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Condition {
    /// The claim whose values are compared.
    pub claim: ClaimPath,
    /// The accepted values, compared bytewise.
    pub any_of: BTreeSet<String>,
}

/// The place of a claim: the name of a top-level claim, or the names from the top-level claim to a member inside it. A dot
/// in a name has no special meaning.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(from = "WrittenPath", into = "WrittenPath")]
pub struct ClaimPath(Vec<String>);

#[derive(Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "write the name of a claim, or a list of names for a member inside a claim"
)]
enum WrittenPath {
    Name(String),
    Names(Vec<String>),
}

const fn default_kind() -> Kind {
    Kind::Service
}

impl From<WrittenPath> for ClaimPath {
    fn from(written: WrittenPath) -> Self {
        match written {
            WrittenPath::Name(name) => Self(vec![name]),
            WrittenPath::Names(names) => Self(names),
        }
    }
}

impl From<ClaimPath> for WrittenPath {
    fn from(ClaimPath(names): ClaimPath) -> Self {
        match <[String; 1]>::try_from(names) {
            Ok([name]) => Self::Name(name),
            Err(names) => Self::Names(names),
        }
    }
}

impl fmt::Display for ClaimPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(" / "))
    }
}

impl ClaimPath {
    /// Returns the path of a top-level claim.
    pub(crate) fn top_level(name: &str) -> Self {
        Self(vec![name.to_owned()])
    }

    /// Returns the name of the top-level claim.
    pub(crate) fn first(&self) -> &str {
        self.0.first().map_or("", String::as_str)
    }

    /// Returns the name if the claim is a top-level claim.
    pub(super) fn only(&self) -> Option<&str> {
        match &self.0[..] {
            [name] => Some(name),
            _ => None,
        }
    }

    /// Returns the value of the claim, or `None` if the claim is missing or `null`. If a value on the path is not an object,
    /// returns this value as an error.
    pub(crate) fn find<'a>(
        &self,
        said: &'a Map<String, Value>,
    ) -> Result<Option<&'a Value>, &'a Value> {
        let mut found = said.get(self.first());
        for name in self.0.iter().skip(1) {
            found = match found {
                Some(Value::Object(members)) => members.get(name),
                None | Some(Value::Null) => None,
                Some(other) => return Err(other),
            };
        }
        Ok(found.filter(|value| !value.is_null()))
    }

    /// Returns what is wrong with the path.
    pub(super) fn problem(&self) -> Option<String> {
        let is_good = (1..=PATH_NAMES_MAX).contains(&self.0.len())
            && self
                .0
                .iter()
                .all(|name| (1..=CLAIM_BYTES_MAX).contains(&name.len()));
        (!is_good).then(|| {
            format!(
                "the claim {:?} must have 1 to {PATH_NAMES_MAX} names of 1 to {CLAIM_BYTES_MAX} bytes",
                self.0
            )
        })
    }

    /// Returns a remark if the name looks like a path that is written with dots.
    fn remark(&self) -> Option<String> {
        let name = self.only()?;
        let is_url = name.contains("://");
        (name.contains('.') && !is_url).then(|| {
            let names: Vec<&str> = name.split('.').collect();
            format!(
                "the claim {name:?} is one name with a dot; to use a member inside a claim, write {names:?}"
            )
        })
    }
}

impl Mapping {
    /// Returns the rights of services to which the mapping applies.
    pub(crate) fn grant(&self) -> Grant {
        Grant {
            tenant: self.tenant.clone().unwrap_or_default(),
            roles: self.roles.clone(),
            users: self.users.clone(),
            key_names: self.key_names.clone(),
        }
    }

    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if KeyName::parse(&self.name).is_err() {
            problems.push("`name` must be 1 to 64 bytes of [a-z0-9._-]".to_owned());
        }
        if !(1..=CONDITIONS_MAX).contains(&self.when.len()) {
            problems.push(format!(
                "`when` must have 1 to {CONDITIONS_MAX} conditions, because a mapping without a condition would apply to \
                 every access token"
            ));
        }
        problems.extend(self.when.iter().filter_map(Condition::problem));
        let is_limited = self.users.is_some() || self.key_names.is_some();
        let is_granted = !self.roles.is_empty() || is_limited;
        let releases = self.roles.contains(&Role::Release);
        let has_use = releases || self.key_names.is_none() && self.roles.contains(&Role::Approver);
        if is_limited && self.kind == Kind::Service && !has_use {
            problems.push(
                "`users` and `key_names` limit only the role `release`, and `users` also the role `approver`, which the mapping does \
                 not give: remove them, or add the role"
                    .to_owned(),
            );
        }
        match self.kind {
            Kind::Service => problems.extend(self.grant().problem()),
            Kind::User if is_granted => problems.push(
                "users have no role and can release only their own keys: remove `roles`, `users` and `key_names`, or \
                 remove `kind = \"user\"`"
                    .to_owned(),
            ),
            Kind::User => {}
        }
        problems
    }

    /// Whether this mapping applies to every access token to which the other mapping could apply.
    fn covers(&self, other: &Self) -> bool {
        let is_implied = |condition: &Condition| {
            other.when.iter().any(|narrower| {
                narrower.claim == condition.claim && narrower.any_of.is_subset(&condition.any_of)
            })
        };
        !self.when.is_empty() && self.when.iter().all(is_implied)
    }
}

impl Condition {
    fn problem(&self) -> Option<String> {
        let claim = &self.claim;
        let is_good = |value: &String| (1..=VALUE_BYTES_MAX).contains(&value.len());
        if !(1..=ACCEPTED_MAX).contains(&self.any_of.len()) || !self.any_of.iter().all(is_good) {
            return Some(format!(
                "`any_of` of the claim `{claim}` must have 1 to {ACCEPTED_MAX} values of 1 to {VALUE_BYTES_MAX} bytes; without a \
                 value, the mapping can never apply"
            ));
        }
        claim.problem()
    }
}

/// Returns the problems of each mapping, and of the combination of all mappings of an issuer.
pub(super) fn problems(mappings: &[Mapping]) -> Vec<String> {
    let mut problems = Vec::new();
    if mappings.len() > MAPPINGS_MAX {
        problems.push(format!(
            "there are {} mappings; the maximum is {MAPPINGS_MAX}",
            mappings.len()
        ));
    }
    let mut names = HashSet::new();
    for (at, mapping) in mappings.iter().enumerate() {
        let name = &mapping.name;
        let own = mapping.problems().into_iter();
        problems.extend(own.map(|problem| format!("mapping {name:?}: {problem}")));
        if !names.insert(name) {
            problems.push(format!("mapping {name:?} is configured twice"));
        } else if let Some(earlier) = mappings[..at]
            .iter()
            .find(|earlier| earlier.covers(mapping))
        {
            problems.push(format!(
                "mapping {name:?} can never apply, because mapping {:?} above it applies to the same access tokens; move \
                 {name:?} up, or remove one of them",
                earlier.name
            ));
        }
    }
    problems
}

/// Returns remarks about claims that are probably not what the operator means.
pub(super) fn remarks(mappings: &[Mapping]) -> impl Iterator<Item = String> + '_ {
    let claims: BTreeSet<&ClaimPath> = mappings
        .iter()
        .flat_map(|mapping| mapping.when.iter().map(|condition| &condition.claim))
        .collect();
    claims.into_iter().filter_map(ClaimPath::remark)
}

#[cfg(test)]
mod tests;
