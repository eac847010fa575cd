//! What Cargo says about a workspace: its dependency tree, its manifests and its lock file.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    process::Command,
};

use serde::Deserialize;

use crate::Policy;

/// Why the facts about a workspace could not be collected.
#[derive(Debug, thiserror::Error)]
pub enum WorkspaceError {
    /// Cargo could not be started.
    #[error("cannot start cargo {arguments}")]
    Start {
        /// The arguments.
        arguments: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Cargo failed.
    #[error("cargo {arguments} failed: {stderr}")]
    Failed {
        /// The arguments.
        arguments: String,
        /// What Cargo wrote to standard error.
        stderr: String,
    },
    /// A line of `cargo tree` has another form than the one asked for.
    #[error("cannot read this line of cargo tree: {0}")]
    Tree(String),
    /// The output of `cargo metadata` has another form than the documented one.
    #[error("cannot read the output of cargo metadata")]
    Metadata(#[source] serde_json::Error),
    /// `Cargo.lock` cannot be read.
    #[error("cannot read {path}")]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// `Cargo.lock` has another form than the documented one.
    #[error("cannot parse Cargo.lock")]
    LockFormat(#[source] toml::de::Error),
}

/// A crate of the dependency tree.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version, with a leading `v`.
    pub version: String,
    /// The licence expression of its manifest; empty when there is none.
    pub licence: String,
}

/// A crate of the workspace itself.
#[derive(Debug, Clone)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// Whether its manifest forbids publishing it.
    pub private: bool,
    /// What its manifest depends on.
    pub dependencies: Vec<Dependency>,
}

/// A dependency as a manifest of the workspace declares it.
#[derive(Debug, Clone)]
pub struct Dependency {
    /// The name of the crate.
    pub name: String,
    /// The version requirement; `*` when the manifest has none.
    pub requirement: String,
    /// Whether the crate comes from a directory.
    pub is_path: bool,
}

/// An entry of `Cargo.lock`.
#[derive(Debug, Clone, Deserialize)]
pub struct Locked {
    /// The name of the crate.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Where it comes from; nothing for a crate in a directory.
    pub source: Option<String>,
}

/// The facts that the policy is about.
#[derive(Debug, Clone)]
pub struct Workspace {
    /// Every crate of the dependency trees of the policy's targets, those of tests and build scripts too.
    pub packages: BTreeSet<Package>,
    /// The crates of the workspace.
    pub members: Vec<Member>,
    /// Every entry of the lock file, those of other targets too.
    pub locked: Vec<Locked>,
}

impl Workspace {
    /// Collects the facts about the workspace at `root`, without network access.
    pub fn read(root: &Path, policy: &Policy) -> Result<Self, WorkspaceError> {
        let mut packages = BTreeSet::new();
        for target in policy.targets() {
            packages.extend(tree(root, target, policy.all_features())?);
        }
        Ok(Self {
            packages,
            members: members(root)?,
            locked: locked(root)?,
        })
    }

    pub(crate) fn has_member(&self, name: &str) -> bool {
        self.members.iter().any(|member| member.name == name)
    }
}

fn cargo(root: &Path, arguments: &[&str]) -> Result<Vec<u8>, WorkspaceError> {
    // Cargo sets this for what it runs; outside Cargo the one in PATH is meant.
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(program)
        .args(arguments)
        .current_dir(root)
        .output()
        .map_err(|source| WorkspaceError::Start {
            arguments: arguments.join(" "),
            source,
        })?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(WorkspaceError::Failed {
        arguments: arguments.join(" "),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// `cargo tree` resolves features as a build does; the graph of `cargo metadata` also has crates that nothing uses.
fn tree(
    root: &Path,
    target: &str,
    all_features: bool,
) -> Result<BTreeSet<Package>, WorkspaceError> {
    let mut arguments = vec![
        "tree",
        "--offline",
        "--locked",
        "--workspace",
        "--edges",
        "normal,build,dev",
        "--prefix",
        "none",
        "--format",
        "{p}|{l}|",
        "--target",
        target,
    ];
    if all_features {
        arguments.push("--all-features");
    }
    let output = cargo(root, &arguments)?;
    String::from_utf8_lossy(&output)
        .lines()
        .filter(|line| !line.is_empty())
        .map(|line| package(line).ok_or_else(|| WorkspaceError::Tree(line.to_owned())))
        .collect()
}

/// A line such as `clap_derive v4.6.7 (proc-macro)|MIT OR Apache-2.0| (*)`.
fn package(line: &str) -> Option<Package> {
    let mut parts = line.split('|');
    let mut words = parts.next()?.split(' ');
    Some(Package {
        name: words.next()?.to_owned(),
        version: words.next()?.to_owned(),
        licence: parts.next()?.to_owned(),
    })
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Manifest>,
}

#[derive(Deserialize)]
struct Manifest {
    name: String,
    /// The registries that the crate may be published to; nothing means any.
    publish: Option<Vec<String>>,
    dependencies: Vec<Declared>,
}

#[derive(Deserialize)]
struct Declared {
    name: String,
    req: String,
    path: Option<PathBuf>,
}

fn members(root: &Path) -> Result<Vec<Member>, WorkspaceError> {
    let arguments = [
        "metadata",
        "--offline",
        "--locked",
        "--no-deps",
        "--format-version",
        "1",
    ];
    let output = cargo(root, &arguments)?;
    let metadata: Metadata = serde_json::from_slice(&output).map_err(WorkspaceError::Metadata)?;
    let members = metadata.packages.into_iter().map(|manifest| Member {
        name: manifest.name,
        private: manifest
            .publish
            .is_some_and(|registries| registries.is_empty()),
        dependencies: manifest
            .dependencies
            .into_iter()
            .map(|declared| Dependency {
                name: declared.name,
                requirement: declared.req,
                is_path: declared.path.is_some(),
            })
            .collect(),
    });
    Ok(members.collect())
}

#[derive(Deserialize)]
struct LockFile {
    package: Vec<Locked>,
}

fn locked(root: &Path) -> Result<Vec<Locked>, WorkspaceError> {
    let path = root.join("Cargo.lock");
    let text =
        std::fs::read_to_string(&path).map_err(|source| WorkspaceError::Lock { path, source })?;
    let file: LockFile = toml::from_str(&text).map_err(WorkspaceError::LockFormat)?;
    Ok(file.package)
}
