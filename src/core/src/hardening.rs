//! What every process of ours does first: no core dumps, and no other process of the same user may read its memory.
//!
//! Mitigation: M7 of `THREAT_MODEL.md`.

use rustix::{
    io::Errno,
    process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit},
};

/// The kernel refused to protect the memory of this process.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A core dump of this process could be written.
    #[error("core dumps cannot be disabled")]
    CoreDumps(#[source] Errno),
    /// Another process of the same user could read its memory.
    #[error("the process cannot be made unreadable for other processes of its user")]
    Dumpable(#[source] Errno),
}

/// Hardens this process. A kernel that refuses is reported, because a core dump would hold key material.
pub fn harden() -> Result<(), Error> {
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, none).map_err(Error::CoreDumps)?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(Error::Dumpable)
}
