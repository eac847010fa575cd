//! Decides which `[[issuer.mapping]]` applies to an access token.
//!
//! A claim that is missing or `null` has no value. If the broker cannot know the values of a claim, it refuses the access
//! token instead of trying the next mapping, because the next mapping or the issuer itself may give more rights.
//!
//! Mitigation: M19 of `THREAT_MODEL.md`.

use std::{borrow::Cow, collections::BTreeSet};

use serde_json::{Map, Value};

use keybroker_core::principal::{Grant, Kind};

use crate::issuer::{ClaimPath, Condition, Mapping, Settings};

use super::refusal::{Cause, Refusal, shown};

/// Largest number of values of a claim that are compared.
const VALUES_MAX: usize = 1_024;
/// Largest number of claims that are shown in the log.
const SHOWN_CLAIMS_MAX: usize = 4;
/// The claim that lists the claims whose values are elsewhere (OpenID Connect Core section 5.6.2). Entra ID lists `groups`
/// if the user has too many groups for an access token.
const CLAIM_NAMES: &str = "_claim_names";
/// The claim with which Entra ID replaces `groups` if the client got the access token with the implicit flow.
const HAS_GROUPS: &str = "hasgroups";

type Said = Map<String, Value>;

/// What the holder of an access token is and may do.
pub(super) struct Access {
    pub(super) kind: Kind,
    pub(super) grant: Grant,
    pub(super) mapping: Option<String>,
}

/// Returns the rights that the first matching mapping gives, or the rights of the issuer if no mapping applies.
pub(super) fn access(settings: &Settings, said: &Said) -> Result<Access, Refusal> {
    for mapping in &settings.mappings {
        if applies(mapping, said)? {
            return Ok(Access {
                kind: mapping.kind,
                grant: mapping.grant(),
                mapping: Some(mapping.name.clone()),
            });
        }
    }
    if !settings.mappings.is_empty() && settings.refuses_unmapped() {
        return Err(Cause::Mapping.because(format!(
            "no [[issuer.mapping]] applies: {}",
            shown_claims(settings, said)
        )));
    }
    Ok(Access {
        kind: settings.kind,
        grant: settings.grant(),
        mapping: None,
    })
}

/// Whether all conditions of a mapping hold. A condition that certainly does not hold decides, even if another condition
/// cannot be evaluated.
fn applies(mapping: &Mapping, said: &Said) -> Result<bool, Refusal> {
    let mut unknown = None;
    for condition in &mapping.when {
        match holds(condition, said) {
            Ok(true) => {}
            Ok(false) => return Ok(false),
            Err(refusal) => unknown = unknown.or(Some(refusal)),
        }
    }
    match unknown {
        None => Ok(true),
        Some(Refusal { cause, detail, .. }) => {
            Err(cause.because(format!("mapping {:?}: {detail}", mapping.name)))
        }
    }
}

fn holds(condition: &Condition, said: &Said) -> Result<bool, Refusal> {
    let values = values(&condition.claim, said)?;
    Ok(values
        .iter()
        .any(|value| condition.any_of.contains(&**value)))
}

/// Returns the values of a claim. The error says why the values are unknown.
fn values<'a>(claim: &ClaimPath, said: &'a Said) -> Result<Vec<Cow<'a, str>>, Refusal> {
    let malformed = |value: &Value| {
        Cause::Claim.because(format!(
            "the claim `{claim}` contains {}, but its values must be strings, numbers or booleans, or the names of members \
             that are objects",
            kind_of(Some(value))
        ))
    };
    let Some(value) = claim.find(said).map_err(malformed)? else {
        return if is_elsewhere(claim.first(), said) {
            Err(Cause::Overage.because(format!(
                "the provider left out the claim `{claim}`, because it has too many values, so the roles are unknown; \
                 configure the provider to list fewer groups, or use a claim with application roles"
            )))
        } else {
            Ok(Vec::new())
        };
    };
    let parts = match value {
        Value::Array(parts) => parts.as_slice(),
        one => std::slice::from_ref(one),
    };
    let mut values = Vec::new();
    for part in parts {
        match part {
            Value::String(text) => values.push(Cow::from(text)),
            Value::Number(number) => values.push(number.to_string().into()),
            Value::Bool(truth) => values.push(truth.to_string().into()),
            // Zitadel writes each role as the name of a member, whose value is an object with the organisations that
            // granted the role. Another value, such as `false`, may mean that the holder does not have the role.
            Value::Object(members) if members.values().all(Value::is_object) => {
                values.extend(members.keys().map(Cow::from));
            }
            Value::Null | Value::Array(_) | Value::Object(_) => return Err(malformed(part)),
        }
    }
    if values.len() > VALUES_MAX {
        return Err(Cause::Claim.because(format!(
            "the claim `{claim}` has {} values; the maximum is {VALUES_MAX}",
            values.len()
        )));
    }
    Ok(values)
}

/// Whether the provider says that it left a claim out of the access token.
fn is_elsewhere(name: &str, said: &Said) -> bool {
    let names = said.get(CLAIM_NAMES).and_then(Value::as_object);
    let has_groups = said
        .get(HAS_GROUPS)
        .is_some_and(|value| matches!(value, Value::Bool(true)) || *value == "true");
    names.is_some_and(|names| names.contains_key(name)) || (name == "groups" && has_groups)
}

/// Describes the type of a value for the log.
pub(super) fn kind_of(value: Option<&Value>) -> &'static str {
    match value {
        None => "missing",
        Some(Value::Null) => "null",
        Some(Value::Bool(_)) => "a boolean",
        Some(Value::Number(_)) => "a number",
        Some(Value::String(_)) => "a string",
        Some(Value::Array(_)) => "a list",
        Some(Value::Object(_)) => "an object",
    }
}

/// Shows the claims that the mappings compare, for the log.
fn shown_claims(settings: &Settings, said: &Said) -> String {
    let conditions = settings.mappings.iter().flat_map(|mapping| &mapping.when);
    let claims: BTreeSet<&ClaimPath> = conditions.map(|condition| &condition.claim).collect();
    let claims = claims.into_iter().take(SHOWN_CLAIMS_MAX).map(|claim| {
        let values = values(claim, said).unwrap_or_default();
        if values.is_empty() {
            format!("the `{claim}` has no value that the broker can compare")
        } else {
            format!("the `{claim}` is {}", shown(&values.join(" ")))
        }
    });
    claims.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests;
