//! What is shipped beside the binary, held against the binary and against the tools that read it.

#![allow(
    clippy::unwrap_used,
    reason = "a test that meets a surprise stops there"
)]

use std::{path::Path, process::Command};

#[path = "packaging/systemd.rs"]
mod systemd;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The drill that operators are told to hold, held.
#[test]
fn the_restore_drill_ends_well() {
    let output = Command::new(root().join("scripts/restore-drill.sh"))
        .arg(env!("CARGO_BIN_EXE_keybroker"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    assert!(said.contains("25 keys came back as they were"), "{said}");
    assert!(said.ends_with("restore: ok\n"), "{said}");
}
