//! The configuration file: one typed document, unknown fields refused. `keybroker.example.toml` is its manual.

use std::{fs, path::Path};

use serde::{Deserialize, Serialize};

use crate::{audit, auth, hsm, server, store};

mod check;
#[cfg(test)]
mod tests;

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
    /// `[status]`.
    pub status: server::StatusSettings,
    /// `[limits]`.
    #[serde(default)]
    pub limits: server::Limits,
    /// `[[listener]]`.
    #[serde(rename = "listener", default)]
    pub listeners: Vec<server::ListenerSettings>,
    /// `[[principal]]`.
    #[serde(rename = "principal", default)]
    pub principals: Vec<auth::Settings>,
}

impl Config {
    /// Reads a file. The error says where and what.
    pub fn load(path: &Path) -> Result<Self, String> {
        let text = fs::read_to_string(path).map_err(|error| {
            format!(
                "cannot read the configuration {}: {error}; name another with --config, or begin with \
                 keybroker.example.toml",
                path.display()
            )
        })?;
        Self::parse(&text).map_err(|what| format!("{}: {what}", path.display()))
    }

    /// Parses the text of a file.
    pub fn parse(text: &str) -> Result<Self, String> {
        toml::from_str(text).map_err(|error| error.to_string())
    }
}
