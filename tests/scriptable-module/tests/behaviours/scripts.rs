//! Scripts: how they are read, and what processes and threads share.

use std::{env, fs, path::PathBuf, process::Command, thread};

use keybroker_scriptable_pkcs11::{MODULE_VARIABLE, SCRIPT_FILE, check};
use keybroker_test_support::softhsm::{self, Token};

use crate::{
    CHILD,
    module::{Module, outcome},
    observed,
};

const RANDOM_FAILS: &str = r#"
    [[rule]]
    name = "fails"
    function = "C_GenerateRandom"
    on = { CONDITION }
    do = { return = "CKR_DEVICE_ERROR" }
"#;

#[test]
fn an_invalid_script_fails_every_call_until_it_is_valid() {
    let seen = observed(
        "scripts::an_invalid_script_fails_every_call_until_it_is_valid",
        "",
        |module| {
            let session = module.ready();
            let script = module.script();
            module.set_script("nonsense = true");
            let mut seen = vec![outcome(module.random(session))];
            module.set_script(&script);
            seen.push(outcome(module.random(session)));
            fs::remove_file(module.folder().join(SCRIPT_FILE)).unwrap();
            seen.push(outcome(module.random(session)));
            module.set_script(&script);
            seen.push(outcome(module.random(session)));
            seen.join(" ")
        },
    );
    if let Some(seen) = seen {
        assert_eq!(seen, "CKR_GENERAL_ERROR ok CKR_GENERAL_ERROR ok");
    }
}

#[test]
fn without_a_script_everything_is_forwarded() {
    let test = "scripts::without_a_script_everything_is_forwarded";
    if env::var_os(CHILD).is_some() {
        let module = Module::load();
        let session = module.ready();
        println!("random: {}", outcome(module.random(session)));
        return;
    }
    let token = Token::fresh();
    let child = |module: Option<PathBuf>| {
        let mut command = Command::new(env::current_exe().unwrap());
        command
            .args([test, "--exact", "--nocapture"])
            .env(CHILD, token.pin())
            .env("SOFTHSM2_CONF", token.configuration());
        if let Some(module) = module {
            command.env(MODULE_VARIABLE, module);
        }
        command.output().unwrap()
    };
    let output = child(Some(softhsm::module()));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("random: ok"), "{output:?}");
    for (module, reason) in [
        (None, "no real module"),
        (Some(PathBuf::from("/nowhere.so")), "/nowhere.so"),
    ] {
        let output = child(module);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && text.contains(reason),
            "{output:?}"
        );
    }
}

#[test]
fn a_script_that_is_not_valid_is_refused_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(SCRIPT_FILE);
    for (script, reason) in [
        ("nonsense = true", "nonsense"),
        ("[token]\npad = \"blue\"", "blue"),
        ("[[rule]]\nfunction = \"C_Nothing\"\ndo = {}", "C_Nothing"),
        (
            "[[rule]]\nfunction = \"C_Sign\"\ndo = { return = \"CKR_NOTHING\" }",
            "CKR_NOTHING",
        ),
        ("[[attribute]]\nname = \"CKA_NOTHING\"", "CKA_NOTHING"),
        (
            "[[attribute]]\nname = \"CKA_ID\"\non_read = { value = \"cafe\" }",
            "value",
        ),
        ("include = [\"script.toml\"]", "too many files"),
        ("include = [\"other.toml\"]", "other.toml"),
    ] {
        fs::write(&path, script).unwrap();
        let error = check(&path).expect_err(script).to_string();
        assert!(error.contains(reason), "{script}: {error}");
    }
}

#[test]
fn an_included_file_is_merged_and_read_again_when_it_changes() {
    let seen = observed(
        "scripts::an_included_file_is_merged_and_read_again_when_it_changes",
        "",
        |module| {
            let other = module.folder().join("other.toml");
            let write = |text: &str| {
                let partial = module.folder().join("partial-other");
                fs::write(&partial, text).unwrap();
                fs::rename(partial, &other).unwrap();
            };
            write("token.label = \"included\"\ntoken.serial = \"1\"");
            module.set_script(&format!(
                "include = [\"other.toml\"]\n{}\ntoken.serial = \"2\"",
                module.script()
            ));
            module.initialize().unwrap();
            let shown = |module: &Module| {
                let info = module.info();
                let text = |field: &[u8]| String::from_utf8_lossy(field).trim().to_owned();
                format!("{} {}", text(&info.label), text(&info.serialNumber))
            };
            let first = shown(module);
            write("token.label = \"changed\"");
            format!("{first}, {}", shown(module))
        },
    );
    if let Some(seen) = seen {
        assert_eq!(seen, "included 2, changed 2");
    }
}

#[test]
fn threads_are_counted_without_loss() {
    let seen = observed(
        "scripts::threads_are_counted_without_loss",
        &RANDOM_FAILS.replace("CONDITION", "every = 10"),
        |module| {
            let session = module.ready();
            let failed: usize = thread::scope(|scope| {
                let threads: Vec<_> = (0..4)
                    .map(|_| {
                        scope.spawn(|| {
                            let own = module.open().unwrap();
                            (0..250).filter(|_| module.random(own).is_err()).count()
                        })
                    })
                    .collect();
                threads
                    .into_iter()
                    .map(|thread| thread.join().unwrap())
                    .sum()
            });
            module.random(session).unwrap();
            format!("{failed} of {}", module.calls("C_GenerateRandom"))
        },
    );
    if let Some(seen) = seen {
        assert_eq!(seen, "100 of 1001");
    }
}

#[test]
fn processes_share_the_counter_of_a_rule() {
    const SECOND: &str = "SCRIPTABLE_PKCS11_TEST_SECOND";
    let test = "scripts::processes_share_the_counter_of_a_rule";
    let seen = observed(
        test,
        &RANDOM_FAILS.replace("CONDITION", "call = 2"),
        |module| {
            let session = module.ready();
            let own = outcome(module.random(session));
            if env::var_os(SECOND).is_some() {
                return own;
            }
            let output = Command::new(env::current_exe().unwrap())
                .args([test, "--exact", "--nocapture"])
                .env(SECOND, "1")
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let other = text.contains("CKR_DEVICE_ERROR");
            format!(
                "{own}, the other hit: {other}, then {}",
                outcome(module.random(session))
            )
        },
    );
    if let Some(seen) = seen {
        assert_eq!(seen, "ok, the other hit: true, then ok");
    }
}

/// The child of a fork finds its own state, and its calls count with those of its parent.
#[test]
fn a_forked_process_can_call_the_module() {
    let seen = observed(
        "scripts::a_forked_process_can_call_the_module",
        "",
        |module| {
            let session = module.ready();
            module.random(session).unwrap();
            // SAFETY: the child calls the module and leaves without running anything else of this test.
            let child = unsafe { libc::fork() };
            if child == 0 {
                let code = i32::from(module.random(session).is_err());
                // SAFETY: ends the child.
                unsafe { libc::_exit(code) };
            }
            let mut status = 0;
            // SAFETY: waits for the child that was just made.
            assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
            assert_eq!(status, 0, "the child failed");
            format!("{} calls", module.calls("C_GenerateRandom"))
        },
    );
    if let Some(seen) = seen {
        assert_eq!(seen, "2 calls");
    }
}

/// Sessions and operations go through, and no place of the table is empty.
#[test]
fn every_function_of_the_table_is_there() {
    let seen = observed(
        "scripts::every_function_of_the_table_is_there",
        "",
        |module| {
            assert!(env::var_os(CHILD).is_some());
            let text = format!("{:?}", module.list);
            format!(
                "{} functions, {} missing",
                text.matches("C_").count(),
                text.matches("None").count()
            )
        },
    );
    if let Some(seen) = seen {
        assert_eq!(seen, "68 functions, 0 missing");
    }
}
