//! Checks the dependency tree of a workspace against its `deny.toml`: banned crates, licences, sources, wildcards.
//!
//! `cargo deny` does the same and more, but takes minutes to build. This crate reads the same file, refuses a setting
//! that it does not enforce, and asks Cargo for the tree. Advisories are not checked here, because the advisory database
//! has to be downloaded: run `cargo deny check advisories` for them.

mod policy;
mod workspace;

pub use policy::{Policy, PolicyError};
pub use workspace::{Dependency, Locked, Member, Package, Workspace, WorkspaceError};

use spdx::{Expression, ParseMode};

/// Every violation of the policy in the workspace, one line each.
pub fn violations(policy: &Policy, workspace: &Workspace) -> Vec<String> {
    let mut found = Vec::new();
    for package in &workspace.packages {
        found.extend(banned(policy, package));
        found.extend(licence(policy, package));
    }
    for member in &workspace.members {
        found.extend(wildcards(policy, member));
    }
    for locked in &workspace.locked {
        found.extend(source(policy, workspace, locked));
    }
    found
}

fn banned(policy: &Policy, package: &Package) -> Option<String> {
    policy
        .bans(&package.name)
        .then(|| format!("{} {}: the crate is banned", package.name, package.version))
}

/// Only the manifest counts: a crate without a licence expression is refused, whatever its licence file says.
fn licence(policy: &Policy, package: &Package) -> Option<String> {
    let Package {
        name,
        version,
        licence,
    } = package;
    if licence.is_empty() {
        return Some(format!("{name} {version}: the manifest names no licence"));
    }
    // Old manifests write `MIT/Apache-2.0` for `MIT OR Apache-2.0`.
    let lax = ParseMode {
        allow_slash_as_or_operator: true,
        ..ParseMode::STRICT
    };
    match Expression::parse_mode(licence, lax) {
        Err(error) => Some(format!(
            "{name} {version}: licence {licence} is no SPDX expression: {}",
            error.reason
        )),
        Ok(expression) if expression.evaluate(|required| policy.allows_licence(required)) => None,
        Ok(_) => Some(format!(
            "{name} {version}: licence {licence} is not allowed"
        )),
    }
}

fn wildcards(policy: &Policy, member: &Member) -> Vec<String> {
    let excused = policy.allows_wildcard_paths() && member.private;
    member
        .dependencies
        .iter()
        .filter(|dependency| dependency.requirement == "*" && !(dependency.is_path && excused))
        .map(|dependency| {
            format!(
                "{}: dependency {} has no version requirement",
                member.name, dependency.name
            )
        })
        .collect()
}

fn source(policy: &Policy, workspace: &Workspace, locked: &Locked) -> Option<String> {
    let Locked {
        name,
        version,
        source,
    } = locked;
    match source {
        Some(source) if policy.allows_source(source) => None,
        Some(source) => Some(format!("{name} {version}: source {source} is not allowed")),
        None if workspace.has_member(name) => None,
        None => Some(format!(
            "{name} {version}: comes from a directory outside the workspace"
        )),
    }
}

#[cfg(test)]
mod tests;
