//! The configuration file: one typed document, unknown fields refused. `keybroker.example.toml` is its manual.

use serde::{Deserialize, Serialize};

use crate::{audit, auth, hsm, server, store};

/// All of the configuration.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// `[token]`.
    pub token: hsm::Settings,
    /// `[store]`.
    pub store: store::Settings,
    /// `[audit]`.
    pub audit: audit::Settings,
    /// `[[listener]]`.
    #[serde(rename = "listener", default)]
    pub listeners: Vec<server::ListenerSettings>,
    /// `[status]`.
    pub status: server::StatusSettings,
    /// `[[principal]]`.
    #[serde(rename = "principal", default)]
    pub principals: Vec<auth::Settings>,
    /// `[limits]`.
    #[serde(default)]
    pub limits: server::Limits,
}
