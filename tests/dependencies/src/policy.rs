//! The policy: what `deny.toml` says, as far as it is checked here.

use std::collections::BTreeSet;

use serde::Deserialize;
use spdx::{LicenseReq, Licensee, ParseError};

/// Why a `deny.toml` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// The file is not TOML, or has a setting or a value that this crate does not enforce.
    #[error("deny.toml has a setting or value that this check does not enforce")]
    Setting(#[source] toml::de::Error),
    /// An allowed licence is not an SPDX identifier.
    #[error("deny.toml allows {licence}, which is no SPDX licence")]
    Licence {
        /// The entry of `licenses.allow`.
        licence: String,
        /// What is wrong with it.
        #[source]
        source: ParseError,
    },
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct File {
    graph: Graph,
    licenses: Licences,
    bans: Bans,
    sources: Sources,
    /// Needs the advisory database: `cargo deny check advisories` reads this section.
    #[serde(rename = "advisories")]
    _advisories: Option<toml::Table>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Graph {
    targets: Vec<String>,
    all_features: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Licences {
    allow: Vec<String>,
    /// For `cargo deny`, which may read licence texts. This check accepts expressions in manifests only.
    #[serde(rename = "confidence-threshold")]
    _confidence_threshold: Option<f64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Bans {
    #[serde(rename = "multiple-versions")]
    _multiple_versions: Allow,
    #[serde(rename = "wildcards")]
    _wildcards: Deny,
    #[serde(default)]
    allow_wildcard_paths: bool,
    deny: Vec<Ban>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Ban {
    #[serde(rename = "crate")]
    name: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Sources {
    #[serde(rename = "unknown-registry")]
    _unknown_registry: Deny,
    #[serde(rename = "unknown-git")]
    _unknown_git: Deny,
    allow_registry: Vec<String>,
}

/// The only value of a setting that this crate implements.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Allow {
    Allow,
}

/// The only value of a setting that this crate implements.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Deny {
    Deny,
}

/// What may be in the dependency tree.
#[derive(Debug)]
pub struct Policy {
    targets: Vec<String>,
    all_features: bool,
    banned: BTreeSet<String>,
    licences: Vec<Licensee>,
    allow_wildcard_paths: bool,
    registries: BTreeSet<String>,
}

impl Policy {
    /// Reads the text of a `deny.toml`.
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        let file: File = toml::from_str(text).map_err(PolicyError::Setting)?;
        let licences = file.licenses.allow.into_iter().map(|licence| {
            Licensee::parse(&licence).map_err(|source| PolicyError::Licence { licence, source })
        });
        Ok(Self {
            targets: file.graph.targets,
            all_features: file.graph.all_features,
            banned: file.bans.deny.into_iter().map(|ban| ban.name).collect(),
            licences: licences.collect::<Result<_, _>>()?,
            allow_wildcard_paths: file.bans.allow_wildcard_paths,
            registries: file.sources.allow_registry.into_iter().collect(),
        })
    }

    /// The target triples whose dependency trees count.
    pub fn targets(&self) -> &[String] {
        &self.targets
    }

    /// Whether the trees are those with every feature of the workspace.
    pub fn all_features(&self) -> bool {
        self.all_features
    }

    pub(crate) fn bans(&self, name: &str) -> bool {
        self.banned.contains(name)
    }

    pub(crate) fn allows_licence(&self, required: &LicenseReq) -> bool {
        self.licences
            .iter()
            .any(|licence| licence.satisfies(required))
    }

    pub(crate) fn allows_wildcard_paths(&self) -> bool {
        self.allow_wildcard_paths
    }

    /// A source as `Cargo.lock` writes it, such as `registry+URL`.
    pub(crate) fn allows_source(&self, source: &str) -> bool {
        source
            .strip_prefix("registry+")
            .is_some_and(|registry| self.registries.contains(registry))
    }
}
