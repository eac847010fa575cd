//! What every process of ours does first: no core dumps, and no other process of the same user may read its memory. And
//! the rule for files that hold a secret.
//!
//! Mitigation: M7, M15 of `THREAT_MODEL.md`.

use std::{fs::Metadata, os::unix::fs::MetadataExt as _, path::Path};

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

/// Hardens this process. A kernel that refuses is reported, because a core dump would hold key material.
pub fn harden() -> Result<(), String> {
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, none).map_err(|error| format!("core dumps not disabled: {error}"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(|error| format!("process still dumpable: {error}"))
}

/// What nobody else may do with a file of ours that holds a secret.
const OPEN_TO_OTHERS: u32 = 0o077;
/// What nobody may do with such a file of root's. Its group may read it, because root chose who is in it: that is how
/// systemd's credentials and Kubernetes' secrets reach a user who is not root.
const OPEN_BEYOND_GROUP: u32 = 0o037;
/// What nobody else may do with a file that decides something, but may be read by all.
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// Whether others than its owner, and those whom root lets, can read or change a file that holds a secret.
pub fn is_open_to_others(meta: &Metadata) -> bool {
    let ours = rustix::process::geteuid().as_raw();
    meta.mode() & forbidden(meta.uid(), ours) != 0
}

/// Whether others than this user and root can change a file that decides something.
pub fn is_writable_by_others(meta: &Metadata) -> bool {
    let ours = rustix::process::geteuid().as_raw();
    meta.mode() & WRITABLE_BY_OTHERS != 0 || (meta.uid() != ours && meta.uid() != 0)
}

/// Refuses a file that others can read, or that belongs to neither this user nor root. `secret` is what it holds.
pub fn check_secret_file(meta: &Metadata, path: &Path, secret: &str) -> Result<(), String> {
    let shown = path.display();
    if is_open_to_others(meta) {
        return Err(format!(
            "{shown} has mode {:04o}: others can read it; run `chmod 600 {shown}`, and change the {secret} if others may \
             have read it",
            meta.mode() & 0o7777
        ));
    }
    let ours = rustix::process::geteuid().as_raw();
    if meta.uid() != ours && meta.uid() != 0 {
        return Err(format!(
            "{shown} belongs to user {}; it must belong to user {ours} or root",
            meta.uid()
        ));
    }
    Ok(())
}

const fn forbidden(owner: u32, ours: u32) -> u32 {
    if owner == 0 && ours != 0 {
        OPEN_BEYOND_GROUP
    } else {
        OPEN_TO_OTHERS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_root_may_let_a_group_read_a_secret() {
        const US: u32 = 1_000;
        for (owner, ours, mode, open) in [
            (US, US, 0o600, false),
            (US, US, 0o400, false),
            (US, US, 0o440, true),
            (US, US, 0o604, true),
            (0, US, 0o440, false),
            (0, US, 0o640, false),
            (0, US, 0o660, true),
            (0, US, 0o444, true),
            (0, 0, 0o600, false),
            (0, 0, 0o440, true),
            (US + 1, US, 0o440, true),
        ] {
            let is_open = mode & forbidden(owner, ours) != 0;
            assert_eq!(is_open, open, "{owner} {ours} {mode:o}");
        }
    }
}
