//! What is shipped beside the binary, held against the binary and against the tools that read it.

#![allow(
    clippy::unwrap_used,
    reason = "a test that meets a surprise stops there"
)]

use std::{path::Path, process::Command};

#[path = "packaging/containers.rs"]
mod containers;
#[path = "packaging/systemd.rs"]
mod systemd;

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

#[test]
fn the_restore_drill_ends_well_on_sqlite() {
    hold_the_drill("sqlite");
}

#[test]
fn the_restore_drill_ends_well_on_postgresql() {
    hold_the_drill("postgres");
}

#[test]
fn the_restore_drill_ends_well_on_mariadb() {
    hold_the_drill("mariadb");
}

/// The drill that operators are told to hold, held.
fn hold_the_drill(engine: &str) {
    let output = Command::new(root().join("scripts/restore-drill.sh"))
        .args(["--engine", engine, env!("CARGO_BIN_EXE_keybroker")])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    assert!(
        said.contains("25 released keys equal the enrolled keys"),
        "{said}"
    );
    assert!(said.ends_with("restore: ok\n"), "{said}");
}
