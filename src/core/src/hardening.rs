//! Protects the memory of a process. Every process of the project first disables core dumps, and prevents other
//! processes of the same user from reading the memory of the process.
//!
//! Mitigation: M7 of `THREAT_MODEL.md`.

use rustix::{
    io::Errno,
    process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit},
};

/// The kernel refused to protect the memory of this process.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Core dumps cannot be disabled, so a core dump of this process could be written.
    #[error("cannot disable core dumps")]
    CoreDumps(#[source] Errno),
    /// Another process of the same user could read the memory of this process.
    #[error("cannot prevent other processes of this user from reading the memory of this process")]
    Dumpable(#[source] Errno),
}

/// Hardens this process. Returns an error if the kernel refuses, because a core dump or another process could then
/// obtain key material.
pub fn harden() -> Result<(), Error> {
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, none).map_err(Error::CoreDumps)?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(Error::Dumpable)
}
