//! What every process of ours does first: no core dumps, and no other process of the same user may read its memory.
//!
//! Mitigation: M7 of `THREAT_MODEL.md`.

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
