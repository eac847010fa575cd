//! The setting of the allocator (mimalloc, with blocks overwritten when they are freed: `main.rs`).
//!
//! By default mimalloc keeps freed pages for a second and returns them only when it is asked for other memory, so that after a flood
//! a silent broker keeps what the flood took. With a delay of 0 the pages go back to the operating system at once. Calls
//! pay for it: `scripts/compare.sh` with and without the variable in the environment shows the CPU time of the front for a call.
//!
//! mimalloc reads its settings from the environment when the process starts, and has no other safe interface. The program
//! therefore executes itself once with the setting; its process id stays the same.

use std::{
    env,
    io::{Error, Result},
    os::unix::process::CommandExt as _,
    process::Command,
};

/// Milliseconds until freed pages are returned.
const PURGE_DELAY: &str = "MIMALLOC_PURGE_DELAY";

/// Executes this program again with the setting, unless the environment has one. Returns only if there was nothing to do, or with
/// the reason why that failed.
pub(crate) fn apply() -> Result<()> {
    if env::var_os(PURGE_DELAY).is_some() {
        return Ok(());
    }
    // By its name: a process list shows the name of the file that was executed.
    let mut command = Command::new(env::current_exe()?);
    let mut arguments = env::args_os();
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    let error: Error = command.args(arguments).env(PURGE_DELAY, "0").exec();
    Err(error)
}
