//! The section `[release]`: the form in which user keys are released.

use serde::{Deserialize, Serialize};

/// The `[release]` section of the configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Whether user keys are wrapped only under sealed wrapping keys, and released only to recipients. The setting is not in the
    /// database, so a row from before the move to a sealed wrapping key cannot bring back a plain release.
    pub sealed_only: bool,
}
