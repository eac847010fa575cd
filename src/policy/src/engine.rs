//! Makes a decision by evaluating all policies that can apply. If a forbid policy applies, the
//! action is denied. If only permit policies apply, the action is allowed.

use std::{collections::BTreeMap, sync::Arc};

use cedar_policy::{AuthorizationError, Authorizer, Decision, Effect, Response};

use keybroker_core::error::chain;

use super::{
    Case, DEFAULT_DENY, UNASKED,
    set::{Known, Set},
    verdict::Verdict,
    vocabulary::{VOCABULARY, Wanted},
};

/// Returns the cached decision for a case, or makes a new decision if the cache has no decision for
/// the case.
pub(super) fn decide(set: &Set, case: &Case<'_>) -> Verdict {
    let slice = set.slice_of(case.action, case.identity.kind);
    let kept = slice.and_then(|slice| Some((&slice.kept, slice.kept.inputs(case)?)));
    if let Some(verdict) = kept.as_ref().and_then(|(kept, inputs)| kept.find(inputs)) {
        return verdict;
    }
    let verdict = evaluate(set, case);
    if let Some((kept, inputs)) = kept {
        kept.keep(&inputs, &verdict);
    }
    verdict
}

pub(super) fn evaluate(set: &Set, case: &Case<'_>) -> Verdict {
    let Some(slice) = set.slice_of(case.action, case.identity.kind) else {
        return Verdict::denied(UNASKED);
    };
    let wanted = Wanted::Mentioned(&slice.words);
    let asked = match VOCABULARY.ask(case, wanted, None) {
        Ok(asked) => asked,
        Err(error) => {
            let error = chain(&error);
            keybroker_core::alert!(Bug, action = %case.action, %error, "policy evaluation failed");
            return Verdict::denied(UNASKED);
        }
    };
    let response =
        Authorizer::new().is_authorized(&asked.request, &slice.policies, &asked.entities);
    verdict(set, &response)
}

/// Makes the decision of [`evaluate`] with all policies and all attributes.
#[cfg(test)]
pub(super) fn evaluate_all(set: &Set, case: &Case<'_>) -> Verdict {
    let asked = VOCABULARY
        .ask(case, Wanted::All, None)
        .expect("a case can be asked");
    verdict(
        set,
        &Authorizer::new().is_authorized(&asked.request, set.policies(), &asked.entities),
    )
}

/// Cedar ignores a policy that it cannot evaluate, for example because of an overflow or a missing
/// attribute. It is safe to ignore a permit policy, because an ignored permit policy allows
/// nothing. It is not safe to ignore a forbid policy, because a caller could bypass the policy with
/// an input that cannot be evaluated. Therefore a forbid policy that cannot be evaluated denies the
/// action.
fn verdict(set: &Set, response: &Response) -> Verdict {
    let errors: Vec<(&Known, String)> = response
        .diagnostics()
        .errors()
        .filter_map(|AuthorizationError::PolicyEvaluationError(error)| {
            Some((set.known(error.policy_id())?, error.inner().to_string()))
        })
        .collect();
    let broken = errors
        .iter()
        .map(|(known, _)| *known)
        .filter(|known| known.effect == Effect::Forbid);
    let matched = response
        .diagnostics()
        .reason()
        .filter_map(|id| set.known(id));
    let effect = if response.decision() == Decision::Allow {
        Effect::Permit
    } else {
        Effect::Forbid
    };
    let mut deciding: BTreeMap<usize, Arc<str>> = matched
        .filter(|known| known.effect == effect)
        .map(|known| (known.place, Arc::clone(&known.id)))
        .collect();
    let broken: BTreeMap<usize, Arc<str>> = broken
        .map(|known| (known.place, Arc::clone(&known.id)))
        .collect();
    let allowed = response.decision() == Decision::Allow && broken.is_empty();
    if !allowed && effect == Effect::Permit {
        deciding.clear();
    }
    deciding.extend(broken);
    let deciding: Vec<Arc<str>> = deciding.into_values().collect();
    let named = errors
        .into_iter()
        .map(|(known, what)| (Arc::clone(&known.id), what));
    Verdict {
        allowed,
        policy: deciding
            .first()
            .cloned()
            .unwrap_or_else(|| DEFAULT_DENY.into()),
        deciding,
        errors: named.collect(),
    }
}
