//! How a command ends: exit codes as `docs/cli.md` lists them, and words of its message.

use crate::site::Finished;

pub(crate) const USAGE: i32 = 2;
pub(crate) const CONFIGURATION: i32 = 3;
pub(crate) const TOKEN: i32 = 4;
pub(crate) const PIN: i32 = 5;
pub(crate) const UNTRUSTED: i32 = 6;
pub(crate) const STORE: i32 = 7;
pub(crate) const AUDIT: i32 = 8;
pub(crate) const INTERRUPTED: i32 = 130;

/// A user of this machine who owns no file of a test.
pub(crate) const OTHER_USER: u32 = 65_534;

/// Asserts with which code a command ended and that its message has these words. `what` names the case.
#[track_caller]
pub(crate) fn says(what: &str, finished: &Finished, code: i32, words: &[&str]) {
    assert_eq!(finished.code, Some(code), "{what}: {finished:#?}");
    for word in words {
        assert!(
            finished.stderr.contains(word),
            "{what}: {word:?} is not in {finished:#?}"
        );
    }
}
