//! Reads the configuration file into typed settings, and rejects unknown fields.
//! `keybroker.example.toml` explains every setting.

use std::{
    env,
    path::{Path, PathBuf},
    str,
};

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

pub(crate) mod accepted;
mod advice;
pub(crate) mod approvals;
pub(crate) mod bitwarden;
mod certificates;
mod check;
mod check_token;
pub(crate) mod console;
pub(crate) mod devices;
mod files;
mod named;
pub(crate) mod notices;
mod range;
pub(crate) mod release;
#[cfg(test)]
mod tests;
mod tokens;
pub(crate) mod wrapping_keys;

pub use tokens::{SelectionError, TOKENS_MAX, Tokens};

/// Environment variable that takes precedence over `audit.instance`, so that replicas can share a configuration file.
pub const INSTANCE_VARIABLE: &str = "KEYBROKER_AUDIT_INSTANCE";

/// Maximum length of a configuration file, in bytes.
const BYTES_MAX: u64 = 1024 * 1024;
/// The byte order marks of UTF-16, which Keybroker does not support.
const UTF16_MARKS: [&[u8]; 2] = [b"\xff\xfe", b"\xfe\xff"];
const CONFIGURATION: Purpose = Purpose::trust(
    "other users could change the configuration, which determines who receives keys and which code receives the PIN",
);

/// The result of examining the files of the configuration.
#[derive(Debug, Default)]
pub struct FileReport {
    /// The problems with their solutions.
    pub problems: Vec<String>,
    /// Remarks that are not problems, for example about the content of PEM files or about secrets that a group can read.
    pub notes: Vec<String>,
}

/// The complete configuration.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The `[token]` section, or a `[[token]]` section for each of several tokens.
    #[serde(rename = "token")]
    pub tokens: Tokens,
    /// The `[store]` section.
    pub store: store::Settings,
    /// The `[audit]` section.
    pub audit: audit::Settings,
    /// The `[status]` section.
    pub status: server::StatusSettings,
    /// The `[policy]` section.
    #[serde(default)]
    pub policy: policy::Settings,
    /// The `[limits]` section.
    #[serde(default)]
    pub limits: server::Limits,
    /// The `[rates]` section.
    #[serde(default)]
    pub rates: limits::Settings,
    /// The `[rest]` section.
    #[serde(default)]
    pub rest: rest::Settings,
    /// The `[[listener]]` sections.
    #[serde(rename = "listener", default)]
    pub listeners: Vec<server::ListenerSettings>,
    /// The `[[principal]]` sections.
    #[serde(rename = "principal", default)]
    pub principals: Vec<auth::Settings>,
    /// The `[client_credentials]` section.
    #[serde(default)]
    pub client_credentials: auth::client_secret::Settings,
    /// The `[wrapping_keys]` section.
    #[serde(default)]
    pub wrapping_keys: wrapping_keys::Settings,
    /// The `[release]` section.
    #[serde(default)]
    pub release: release::Settings,
    /// The `[approvals]` section.
    #[serde(default)]
    pub approvals: approvals::Settings,
    /// The `[[bitwarden_organization]]` sections.
    #[serde(rename = "bitwarden_organization", default)]
    pub bitwarden_organizations: Vec<bitwarden::Settings>,
    /// The `[devices]` section.
    #[serde(default)]
    pub devices: devices::Settings,
    /// The `[notices]` section; without it, no notices are sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notices: Option<notices::Settings>,
    /// The `[[network]]` sections.
    #[serde(rename = "network", default)]
    pub networks: Vec<policy::NamedNetwork>,
    /// The `[console]` section.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<console::Settings>,
    /// The `[[issuer]]` sections.
    #[serde(rename = "issuer", default)]
    pub issuers: Vec<auth::issuer::Settings>,
}

/// An error while a configuration file is loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file cannot be read, or other users could change it.
    #[error("the configuration: {0}")]
    File(#[source] trusted_file::Error),
    /// The file is encoded in UTF-16.
    #[error("{} is UTF-16", path.display())]
    Utf16 {
        /// The path of the file.
        path: PathBuf,
    },
    /// The file is not UTF-8.
    #[error("{} is not UTF-8", path.display())]
    NotUtf8 {
        /// The path of the file.
        path: PathBuf,
        /// The position of the first invalid byte.
        source: str::Utf8Error,
    },
    /// The text is not a valid configuration.
    #[error("{}: {source}", path.display())]
    Document {
        /// The path of the file.
        path: PathBuf,
        /// The problem in the text.
        source: ParseError,
    },
}

impl LoadError {
    /// The hint for this error.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::File(error) if error.is_missing() => Some(
                "pass another file with --config, or start from keybroker.example.toml".to_owned(),
            ),
            Self::File(error) if error.is_directory() => {
                Some("pass a file with --config, such as /etc/keybroker/keybroker.toml".to_owned())
            }
            Self::Utf16 { .. } | Self::NotUtf8 { .. } => Some("save the file as UTF-8".to_owned()),
            Self::File(_) => None,
            Self::Document { source, .. } => Some(
                source
                    .hint
                    .clone()
                    .unwrap_or_else(|| "keybroker.example.toml explains every setting".to_owned()),
            ),
        }
    }
}

/// An error while a configuration is parsed. The message contains the position but not the line,
/// because a line may contain a secret, which must not reach the log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct ParseError {
    text: String,
    /// Advice on how to correct the invalid text; `None` if there is no advice.
    hint: Option<String>,
}

impl ParseError {
    /// Advice on how to correct the invalid text; `None` if there is no advice.
    pub fn hint(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

impl Config {
    /// Reads a file. If `KEYBROKER_AUDIT_INSTANCE` is set, its value replaces the name of the
    /// instance in the file.
    pub fn load(path: &Path) -> Result<Self, LoadError> {
        let bytes = trusted_file::read(path, BYTES_MAX, CONFIGURATION).map_err(LoadError::File)?;
        if UTF16_MARKS.iter().any(|mark| bytes.starts_with(mark)) {
            return Err(LoadError::Utf16 {
                path: path.to_owned(),
            });
        }
        let text = str::from_utf8(&bytes).map_err(|source| LoadError::NotUtf8 {
            path: path.to_owned(),
            source,
        })?;
        // Editors may add a byte order mark, which is not part of the TOML document.
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let mut config = Self::parse(text).map_err(|source| LoadError::Document {
            path: path.to_owned(),
            source,
        })?;
        if let Some(instance) = env::var_os(INSTANCE_VARIABLE) {
            // An instance name that is not UTF-8 is reported together with the other problems of
            // the configuration.
            config.audit.instance = instance.to_string_lossy().into_owned();
        }
        Ok(config)
    }

    /// The token for commands that use one token: the only token, or the token that
    /// [`Config::select_token`] selected.
    pub fn token(&self) -> &hsm::Settings {
        self.tokens.selected()
    }

    /// Selects the token for commands that use one token. If no name is given, the configuration
    /// must have only one token.
    pub fn select_token(&mut self, name: Option<&str>) -> Result<(), SelectionError> {
        self.tokens.select(name)
    }

    /// Parses the text of a file.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        toml::from_str(text).map_err(|error| {
            let message = error.message().trim_end().replace('\n', "; ");
            let Some(span) = error.span() else {
                return ParseError {
                    text: message,
                    hint: None,
                };
            };
            ParseError {
                hint: advice::on(text, span.clone(), &message),
                text: format!("{}: {message}", place(text, span.start)),
            }
        })
    }
}

/// The line and the column of a byte in a file's text.
fn place(text: &str, offset: usize) -> String {
    let before = text.get(..offset).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
    format!("line {line}, column {column}")
}
