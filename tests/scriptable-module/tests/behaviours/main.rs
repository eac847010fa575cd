//! Each behaviour of the module, with the setting and without it: a test fails when the setting makes no difference.
//!
//! A test runs itself twice as a child, since the module reads its environment and a crash ends the process: once with the
//! script of the test, and once with a script that only names the real module. Each child has its own token.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test that meets a surprise stops there and says where"
)]

mod attributes;
mod interfaces;
mod login;
mod module;
mod profiles;
mod rules;
mod scripts;
mod token;

use std::{
    env, fs,
    os::unix::process::ExitStatusExt as _,
    path::Path,
    process::{Command, ExitStatus},
};

use keybroker_scriptable_pkcs11::{BEHAVIOURS, SCRIPT_FILE, SCRIPT_VARIABLE};
use keybroker_test_support::{
    faulty,
    softhsm::{self, Token},
};

use crate::module::Module;

/// Set in a child; what it prints begins with [`OBSERVED`].
const CHILD: &str = "SCRIPTABLE_PKCS11_TEST_CHILD";
const OBSERVED: &str = "observed: ";

/// A test of one or more behaviours.
struct Case {
    /// The name of the test.
    test: &'static str,
    /// The script; `{pin}` and `{profiles}` are filled in.
    script: &'static str,
    /// What is observed with the script, and without it.
    with: &'static str,
    without: &'static str,
}

impl Case {
    /// Observes with and without the script.
    #[track_caller]
    fn check(&self, observe: impl Fn(&Module) -> String) {
        let Some(with) = observed(self.test, self.script, &observe) else {
            return;
        };
        let without = observed(self.test, "", &observe);
        assert_eq!(with, self.with, "with the setting");
        assert_eq!(
            without.as_deref(),
            Some(self.without),
            "without the setting"
        );
        assert_ne!(self.with, self.without, "the setting makes no difference");
    }
}

/// What this test observes in a child with this script. A process that ends otherwise is observed by its end. `None` in the
/// child, where the test is over.
fn observed(test: &str, script: &str, observe: impl Fn(&Module) -> String) -> Option<String> {
    if env::var_os(CHILD).is_some() {
        println!("{OBSERVED}{}", observe(&Module::load()));
        return None;
    }
    let token = Token::fresh();
    let folder = tempfile::tempdir().unwrap();
    let profiles = Path::new(env!("CARGO_MANIFEST_DIR")).join("profiles");
    let script = script
        .replace("{pin}", token.pin())
        .replace("{profiles}", profiles.to_str().unwrap());
    let real = softhsm::module();
    let text = format!("module = '{}'\n{script}", real.display());
    fs::write(folder.path().join(SCRIPT_FILE), text).unwrap();
    let output = Command::new(env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env(CHILD, token.pin())
        .env("SOFTHSM2_CONF", token.configuration())
        .env(SCRIPT_VARIABLE, folder.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let printed = text.lines().find_map(|line| line.split_once(OBSERVED));
    let observed = printed.map(|(_, observed)| observed.to_owned());
    observed.or_else(|| end(output.status)).or_else(|| {
        panic!("{text}\n{}", String::from_utf8_lossy(&output.stderr));
    })
}

/// How a process ended that was not the end of a test.
fn end(status: ExitStatus) -> Option<String> {
    match (status.signal(), status.code()) {
        (Some(signal), _) => Some(format!("signal {signal}")),
        // 0 is a test that ran, and 101 one that failed.
        (None, Some(code)) if code != 0 && code != 101 => Some(format!("exit {code}")),
        _ => None,
    }
}

/// Tests of behaviours, and the list of the behaviours that they cover.
macro_rules! cases {
    ($($name:ident covers [$($behaviour:literal),+]: $with:literal, not $without:literal, with $script:literal, $observe:expr;)*) => {
        /// The behaviours that the tests of this module cover.
        pub(crate) const COVERED: &[&str] = &[$($($behaviour),+),*];

        $(
            #[test]
            fn $name() {
                let path = concat!(module_path!(), "::", stringify!($name));
                let (_, test) = path.split_once("::").unwrap();
                $crate::Case { test, script: $script, with: $with, without: $without }.check($observe);
            }
        )*
    };
}
pub(crate) use cases;

/// The numbers of behaviours and profiles are printed by every complete run: `.config/nextest.toml`.
#[test]
fn counts_every_behaviour_and_profile() {
    let tested = [
        attributes::COVERED,
        interfaces::COVERED,
        login::COVERED,
        rules::COVERED,
        token::COVERED,
    ]
    .concat();
    let untested: Vec<_> = BEHAVIOURS
        .iter()
        .filter(|behaviour| !tested.contains(behaviour))
        .collect();
    assert!(untested.is_empty(), "no test covers {untested:?}");
    let unknown: Vec<_> = tested
        .iter()
        .filter(|behaviour| !BEHAVIOURS.contains(behaviour))
        .collect();
    assert!(unknown.is_empty(), "{unknown:?} is not a behaviour");
    println!(
        "scriptable module: {} behaviours, each with a test that fails without it; {} profiles with {} sources",
        BEHAVIOURS.len(),
        profiles::COVERED.len(),
        profiles::sources()
    );
}

/// The module that the tests use is the one that was built with them.
#[test]
fn the_module_is_beside_the_tests() {
    assert!(faulty::module().is_file());
}
