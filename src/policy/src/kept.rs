//! A cache of decisions. A decision is cached if a new decision with the same inputs cannot be
//! different.
//!
//! A new decision takes tens of microseconds. Many decisions depend only on the action, the service
//! and its grant, because no policy that can apply uses the resource or the call. If such a
//! decision allows the action, the decision is cached with all its inputs, and is used again only
//! for the same inputs. Therefore a change of the service's roles or grant leads to a new decision.
//! A change of the policies replaces the policy set that contains the cached decisions.
//!
//! The syntax trees of the policies show whether the policies use other inputs. If a string in a
//! policy is equal to the name of a variable, the check assumes that the policy uses the variable.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{PoisonError, RwLock},
};

use serde_json::Value;

use keybroker_core::{
    key::Tenant,
    principal::{Credential, Identity, Kind, Reach, Role},
};

use super::{Case, verdict::Verdict, vocabulary::is_granted};

/// Largest number of services whose decisions are cached. If there are more services, all cached
/// decisions are dropped.
const SERVICES_MAX: usize = 1_024;
/// Largest number of cached decisions of one service.
const DECISIONS_MAX: usize = 8;

/// The context attribute that states whether the grant of the service covers the resource.
/// [`Inputs`] contains the value of this attribute.
const GRANTED: &str = "granted";

/// The types of entities that a policy may name without preventing the caching of its decisions. A
/// policy that names a record counts as a policy that uses the resource, because only the resource
/// of the call has attributes.
const FIXED_TYPES: [&str; 2] = ["Keybroker::Role", "Keybroker::Action"];

/// The cached decisions of the policies for one action of services.
#[derive(Debug, Default)]
pub(super) struct Kept {
    /// Whether a policy uses more inputs than [`Inputs`] contains.
    looks_further: bool,
    /// The cached decisions, by the name of the service.
    decisions: RwLock<HashMap<String, Vec<Decision>>>,
}

#[derive(Debug)]
struct Decision {
    tenant: Tenant,
    credential: Credential,
    roles: BTreeSet<Role>,
    has_all_users: bool,
    has_all_key_names: bool,
    mapping: Option<String>,
    is_granted: bool,
    verdict: Verdict,
}

/// All inputs of a cached decision.
#[derive(Debug)]
pub(super) struct Inputs<'a> {
    name: &'a str,
    tenant: &'a Tenant,
    credential: Credential,
    roles: &'a BTreeSet<Role>,
    has_all_users: bool,
    has_all_key_names: bool,
    mapping: Option<&'a str>,
    is_granted: bool,
}

impl Inputs<'_> {
    fn are_those_of(&self, decision: &Decision) -> bool {
        self.is_granted == decision.is_granted
            && self.credential == decision.credential
            && self.has_all_users == decision.has_all_users
            && self.has_all_key_names == decision.has_all_key_names
            && *self.tenant == decision.tenant
            && *self.roles == decision.roles
            && self.mapping == decision.mapping.as_deref()
    }
}

impl Kept {
    /// Adds a policy, in Cedar's JSON form, to the policies that make the decisions.
    pub(super) fn admit(&mut self, policy: &Value) {
        self.looks_further |= looks_further(policy);
    }

    /// Returns the inputs of a case, or `None` if the decision must not be cached because it may
    /// depend on other inputs.
    pub(super) fn inputs<'a>(&self, case: &Case<'a>) -> Option<Inputs<'a>> {
        // Each field is named, so that the compiler reports a new field here.
        let Identity {
            name,
            credential,
            kind,
            tenant,
            roles,
            users,
            key_names,
            // Only users have a subject.
            subject: _,
            mapping,
            // Claims are in the context and in the tags. If a policy uses the context or tags, no
            // decision is cached.
            claims: _,
        } = case.identity;
        let may_keep = *kind == Kind::Service && !self.looks_further;
        may_keep.then(|| Inputs {
            name,
            tenant,
            credential: *credential,
            roles,
            has_all_users: *users == Reach::All,
            has_all_key_names: *key_names == Reach::All,
            mapping: mapping.as_deref(),
            is_granted: is_granted(case),
        })
    }

    pub(super) fn find(&self, inputs: &Inputs<'_>) -> Option<Verdict> {
        let decisions = self
            .decisions
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let of_service = decisions.get(inputs.name)?;
        let found = of_service.iter().find(|kept| inputs.are_those_of(kept))?;
        Some(found.verdict.clone())
    }

    /// Caches a decision that allows the action, unless a policy could not be evaluated.
    pub(super) fn keep(&self, inputs: &Inputs<'_>, verdict: &Verdict) {
        if !verdict.allowed || !verdict.errors.is_empty() {
            return;
        }
        let mut decisions = self
            .decisions
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if decisions.len() >= SERVICES_MAX && !decisions.contains_key(inputs.name) {
            decisions.clear();
        }
        let of_service = decisions.entry(inputs.name.to_owned()).or_default();
        if of_service.iter().any(|kept| inputs.are_those_of(kept)) {
            return;
        }
        if of_service.len() >= DECISIONS_MAX {
            of_service.clear();
        }
        of_service.push(Decision {
            tenant: inputs.tenant.clone(),
            credential: inputs.credential,
            roles: inputs.roles.clone(),
            has_all_users: inputs.has_all_users,
            has_all_key_names: inputs.has_all_key_names,
            mapping: inputs.mapping.map(str::to_owned),
            is_granted: inputs.is_granted,
            verdict: verdict.clone(),
        });
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        let decisions = self.decisions.read().unwrap();
        decisions.values().map(Vec::len).sum()
    }
}

/// Whether a policy uses an input that is not in [`Inputs`]. Examples of other inputs are
/// attributes of the resource, context attributes except `granted`, tags, and entities whose type
/// is not in [`FIXED_TYPES`].
fn looks_further(policy: &Value) -> bool {
    let resource = &policy["resource"];
    let is_any = resource["op"] == "All";
    let is_type_only = resource["op"] == "is" && resource.get("in").is_none();
    !(is_any || is_type_only) || mentions_more(&policy["conditions"])
}

fn mentions_more(expression: &Value) -> bool {
    match expression {
        Value::String(text) => {
            matches!(text.as_str(), "resource" | "context" | "getTag" | "hasTag")
        }
        Value::Array(parts) => parts.iter().any(mentions_more),
        Value::Object(fields) => {
            let is_granted = fields.len() == 1
                && fields.get(".").is_some_and(|access| {
                    access["left"] == serde_json::json!({ "Var": "context" })
                        && access["attr"] == GRANTED
                });
            let is_variable = |name: &str| matches!(name, "getTag" | "hasTag");
            if let Some(entity) = fields.get("__entity") {
                return !FIXED_TYPES.iter().any(|known| entity["type"] == *known);
            }
            !is_granted
                && fields
                    .iter()
                    .any(|(name, part)| is_variable(name) || mentions_more(part))
        }
        _ => false,
    }
}
