//! Explains a decision by the result of each policy.
//!
//! Each policy is evaluated alone, with all attributes of the case. If a policy does not apply, its
//! parts are evaluated separately. The results show the part of the scope or the condition that
//! does not match.

use std::sync::Arc;

use cedar_policy::{AuthorizationError, Authorizer, Effect, Policy, PolicyId, PolicySet};
use serde_json::{Value, json};

use keybroker_core::error::chain;

use super::{
    Case, Verdict,
    error::Error,
    set::Set,
    vocabulary::{Asked, VOCABULARY, Wanted},
};

/// A decision with its reasons.
#[derive(Clone, Debug)]
pub struct Explanation {
    /// The decision.
    pub verdict: Verdict,
    /// All policies in force, in the order in which they were loaded; empty if a rule in the code
    /// made the decision.
    pub policies: Vec<PolicyView>,
}

/// The result of one policy for a case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyView {
    /// The id of the policy, as in the audit log.
    pub id: Arc<str>,
    /// "permit" or "forbid".
    pub effect: &'static str,
    /// The name of the policy file.
    pub file: Arc<str>,
    /// Whether the policy's scope includes the action.
    pub is_about: bool,
    /// Whether the policy applies.
    pub applies: Applies,
}

/// Whether a policy applies to a case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Applies {
    /// The policy applies.
    Yes,
    /// The policy does not apply, for this reason.
    No(String),
    /// The policy could not be evaluated.
    Failed(String),
}

pub(super) fn explain(set: &Set, case: &Case<'_>) -> Vec<PolicyView> {
    let Ok(asked) = VOCABULARY.ask(case, Wanted::All, None) else {
        return Vec::new();
    };
    set.in_order()
        .into_iter()
        .filter_map(|(id, known)| {
            let policy = set.policies().policy(id)?;
            Some(PolicyView {
                id: Arc::clone(&known.id),
                effect: match known.effect {
                    Effect::Permit => "permit",
                    Effect::Forbid => "forbid",
                },
                file: Arc::clone(&known.origin),
                is_about: matches!(ask_part(&asked, policy, "action"), Ok(Answer::Yes)),
                applies: view(&asked, policy)
                    .unwrap_or_else(|error| Applies::Failed(chain(&error))),
            })
        })
        .collect()
}

/// The result of a policy that is evaluated alone.
enum Answer {
    Yes,
    No,
    Failed(String),
}

fn ask(asked: &Asked, policy: Policy) -> Result<Answer, Error> {
    let alone = PolicySet::from_policies([policy]).map_err(Error::on("ask one policy alone"))?;
    let response = Authorizer::new().is_authorized(&asked.request, &alone, &asked.entities);
    let mut errors = response.diagnostics().errors();
    if let Some(AuthorizationError::PolicyEvaluationError(error)) = errors.next() {
        return Ok(Answer::Failed(error.inner().to_string()));
    }
    let is_satisfied = response.diagnostics().reason().next().is_some();
    Ok(if is_satisfied {
        Answer::Yes
    } else {
        Answer::No
    })
}

fn view(asked: &Asked, policy: &Policy) -> Result<Applies, Error> {
    match ask(asked, policy.clone())? {
        Answer::Yes => return Ok(Applies::Yes),
        Answer::Failed(error) => return Ok(Applies::Failed(error)),
        Answer::No => {}
    }
    let mut others = Vec::new();
    for part in ["principal", "action", "resource"] {
        if !matches!(ask_part(asked, policy, part)?, Answer::Yes) {
            others.push(format!("another {part}"));
        }
    }
    if !others.is_empty() {
        return Ok(Applies::No(others.join(", ")));
    }
    let json = policy
        .to_json()
        .map_err(Error::on("write a policy as JSON"))?;
    let clauses = json["conditions"].as_array().cloned().unwrap_or_default();
    for clause in clauses {
        let is_when = clause["kind"] == "when";
        let joint = if is_when { "&&" } else { "||" };
        // The parts of a condition are evaluated in order, because the evaluation of a later part may fail if an
        // earlier part is false.
        for part in parts(&clause["body"], joint) {
            let (answer, text) = ask_condition(asked, part)?;
            if is_when && !matches!(answer, Answer::Yes) {
                return Ok(Applies::No(format!("condition not met: {text}")));
            }
            if !is_when && matches!(answer, Answer::Yes) {
                return Ok(Applies::No(format!("unless: {text}")));
            }
        }
    }
    Ok(Applies::No("a condition is not met".to_owned()))
}

/// Evaluates one part of a policy's scope.
fn ask_part(asked: &Asked, policy: &Policy, part: &str) -> Result<Answer, Error> {
    let json = policy
        .to_json()
        .map_err(Error::on("write a policy as JSON"))?;
    let mut bare = bare();
    bare[part] = json[part].clone();
    ask(asked, from_json(bare)?)
}

/// Evaluates one condition, and returns the result with the text of the condition.
fn ask_condition(asked: &Asked, condition: &Value) -> Result<(Answer, String), Error> {
    let mut bare = bare();
    bare["conditions"] = json!([{ "kind": "when", "body": condition }]);
    let policy = from_json(bare)?;
    let text = policy.to_cedar().unwrap_or_default();
    let inner = text
        .split_once('{')
        .and_then(|(_, rest)| rest.rsplit_once('}'));
    let inner = inner.map_or(text.as_str(), |(inner, _)| inner);
    let inner = inner.split_whitespace().collect::<Vec<_>>().join(" ");
    Ok((ask(asked, policy)?, inner))
}

/// Returns a policy that permits every action, in Cedar's JSON form.
fn bare() -> Value {
    json!({
        "effect": "permit",
        "principal": { "op": "All" },
        "action": { "op": "All" },
        "resource": { "op": "All" },
        "conditions": [],
    })
}

fn from_json(json: Value) -> Result<Policy, Error> {
    Policy::from_json(Some(PolicyId::new("part")), json)
        .map_err(Error::on("parse a part of a policy"))
}

/// Splits an expression such as `a && b && c` into its operands, from left to right.
fn parts<'a>(expression: &'a Value, joint: &str) -> Vec<&'a Value> {
    match expression.get(joint) {
        Some(both) => {
            let mut all = parts(&both["left"], joint);
            all.extend(parts(&both["right"], joint));
            all
        }
        None => vec![expression],
    }
}
