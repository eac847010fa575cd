//! The configuration file: one typed document, unknown fields refused. `keybroker.example.toml` is its manual.

use std::{mem, path::Path};

use serde::{Deserialize, Serialize};

use crate::server;
use keybroker_api::rest;
use keybroker_audit as audit;
use keybroker_auth as auth;
use keybroker_broker::limits;
use keybroker_core::trusted_file::{self, Purpose};
use keybroker_hsm as hsm;
use keybroker_policy as policy;
use keybroker_store as store;

mod check;
mod files;
#[cfg(test)]
mod tests;

/// Longest configuration file, in bytes.
const BYTES_MAX: u64 = 1024 * 1024;
const CONFIGURATION: Purpose = Purpose::trust(
    "other users could change the configuration, and with it who obtains keys and which code is given the PIN",
);

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
    /// `[policy]`.
    #[serde(default)]
    pub policy: policy::Settings,
    /// `[limits]`.
    #[serde(default)]
    pub limits: server::Limits,
    /// `[rates]`.
    #[serde(default)]
    pub rates: limits::Settings,
    /// `[rest]`.
    #[serde(default)]
    pub rest: rest::Settings,
    /// `[[listener]]`.
    #[serde(rename = "listener", default)]
    pub listeners: Vec<server::ListenerSettings>,
    /// `[[principal]]`.
    #[serde(rename = "principal", default)]
    pub principals: Vec<auth::Settings>,
    /// `[client_credentials]`.
    #[serde(default)]
    pub client_credentials: auth::client_secret::Settings,
    /// `[[issuer]]`.
    #[serde(rename = "issuer", default)]
    pub issuers: Vec<auth::issuer::Settings>,
}

impl Config {
    /// Reads a file. The error says where and what.
    pub fn load(path: &Path) -> Result<Self, String> {
        let mut bytes = trusted_file::read(path, BYTES_MAX, CONFIGURATION).map_err(|error| {
            let remedy = if error.is_missing() {
                "; name another file with --config, or begin with keybroker.example.toml"
            } else {
                ""
            };
            format!("the configuration: {error}{remedy}")
        })?;
        let text = String::from_utf8(mem::take(&mut *bytes))
            .map_err(|error| format!("{}: it is not UTF-8: {error}", path.display()))?;
        // An editor's byte order mark is not part of the document.
        let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
        Self::parse(text).map_err(|what| format!("{}: {what}", path.display()))
    }

    /// Parses the text of a file. The error names the place, and does not repeat the line: whoever writes a secret into a
    /// field that does not exist must not find it in the log.
    pub fn parse(text: &str) -> Result<Self, String> {
        toml::from_str(text).map_err(|error| {
            let message = error.message().trim_end().replace('\n', "; ");
            match error.span() {
                Some(span) => format!("{}: {message}", place(text, span.start)),
                None => message,
            }
        })
    }
}

/// Where a byte of a text is, for a person with an editor.
fn place(text: &str, offset: usize) -> String {
    let before = text.get(..offset).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
    format!("line {line}, column {column}")
}
