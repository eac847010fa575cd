//! Who is calling. The one place that turns a verified credential into a [`Principal`](crate::principal::Principal).
//!
//! The credential is the client certificate that the TLS handshake verified: its SAN URIs and DNS names are looked up in
//! the configured principals. Exactly one principal must match; none and several are refused alike.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::{key::Tenant, principal::Role};

/// One `[[principal]]` of the configuration.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// `URI:spiffe://example.org/app` or `DNS:app.example.org`: the SAN that names this caller, compared bytewise.
    pub san: String,
    /// Whose records it can reach.
    #[serde(default)]
    pub tenant: Tenant,
    /// What it may do.
    pub roles: BTreeSet<Role>,
}
