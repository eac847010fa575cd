//! Tests, and parts of tests, that cannot be made on this machine. A test that is not made counts as passed, so it says so:
//! `scripts/test.sh` repeats what was skipped after its summary. CI has everything that they need, so there they fail.

use std::{env, fs::OpenOptions, io::Write as _, thread};

/// Names the file that collects what was skipped.
const COLLECTED: &str = "KEYBROKER_SKIPPED";

/// Says that something is not tested here, also in CI.
pub fn skip(reason: &str) {
    eprintln!("SKIPPED: {reason}");
    let Some(path) = env::var_os(COLLECTED) else {
        return;
    };
    let thread = thread::current();
    let line = format!("{}: {reason}\n", thread.name().unwrap_or("?"));
    // One write, so that lines of several processes stay whole.
    let collected = OpenOptions::new().append(true).create(true).open(path);
    collected.unwrap().write_all(line.as_bytes()).unwrap();
}

/// The same for want of something that CI has. Fails there.
#[track_caller]
pub fn skip_outside_ci(reason: &str) {
    let is_ci = env::var("CI").is_ok_and(|value| value == "true");
    assert!(!is_ci, "CI must not skip: {reason}");
    skip(reason);
}

/// Whether this is root, who can give files away. If not, says what is not tested.
#[track_caller]
pub fn is_root(what: &str) -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        skip_outside_ci(&format!("{what}: needs root"));
    }
    is_root
}
