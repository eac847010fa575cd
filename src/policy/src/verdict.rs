//! The result of a decision.

use std::sync::Arc;

/// A decision with the policies that led to the decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whether the action is allowed.
    pub allowed: bool,
    /// The policy that the audit log shows.
    pub policy: Arc<str>,
    /// All policies that led to this decision, in their order.
    pub deciding: Vec<Arc<str>>,
    /// The policies that could not be evaluated, each with its error.
    pub errors: Vec<(Arc<str>, String)>,
}

impl Verdict {
    pub(super) fn denied(policy: &str) -> Self {
        Self {
            allowed: false,
            policy: policy.into(),
            deciding: vec![policy.into()],
            errors: Vec::new(),
        }
    }
}
