//! What the tests of several packages need: SoftHSM tokens, a PKCS#11 module that fails on command, real database servers,
//! an identity service and a Bitwarden server. Each is made for one test; none is shared with another, and none uses a fixed port.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test that meets a surprise stops there and says where"
)]

pub mod bitwarden;
pub mod faulty;
pub mod https;
pub mod identity;
pub mod pooler;
pub mod ports;
pub mod servers;
pub mod skip;
pub mod softhsm;

#[cfg(test)]
mod tests {
    use std::{env, fs, path::Path, process::Command};

    use super::skip;

    const CHILD: &str = "KEYBROKER_TEST_SKIPS";

    /// The test as its own child, in which it skips.
    fn child(ci: &str, collected: &Path) -> bool {
        let mut command = Command::new(env::current_exe().unwrap());
        let name = "tests::what_is_skipped_is_collected_and_fails_in_ci";
        command.args(["--exact", name]);
        command.envs([(CHILD, "1"), ("CI", ci)]);
        command.env("KEYBROKER_SKIPPED", collected);
        command.output().unwrap().status.success()
    }

    #[test]
    fn what_is_skipped_is_collected_and_fails_in_ci() {
        if env::var_os(CHILD).is_some() {
            skip::skip_outside_ci("a part of the machine is missing");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let collected = folder.path().join("skipped");
        assert!(child("false", &collected));
        let lines = fs::read_to_string(&collected).unwrap();
        assert!(
            lines.ends_with("fails_in_ci: a part of the machine is missing\n"),
            "{lines}"
        );
        assert!(!child("true", &collected));
        assert_eq!(fs::read_to_string(&collected).unwrap(), lines);
    }

    /// A message of its own would not be collected.
    #[test]
    fn every_skipped_test_says_so_in_the_same_way() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let found = Command::new("grep")
            .args(["-rlE", r#"print(ln)?!\("SKIPPED"#, "--include=*.rs"])
            .args(["src", "tests"])
            .current_dir(root)
            .output()
            .unwrap();
        let found = String::from_utf8(found.stdout).unwrap();
        assert_eq!(found.trim(), "tests/support/src/skip.rs");
    }
}
