//! Compares the command line with its documentation, and tests its general rules.

use std::{
    collections::BTreeSet,
    fs, process,
    sync::{Arc, Barrier},
};

use clap::{Arg, ArgAction, CommandFactory as _};
use clap_complete::Shell;

use super::*;

const PAGE: &str = include_str!("../../../../docs/cli.md");

/// Returns every visible command without subcommands, with its full name.
fn commands() -> Vec<(String, clap::Command)> {
    let mut found = Vec::new();
    let mut waiting = vec![(String::new(), Cli::command())];
    while let Some((name, command)) = waiting.pop() {
        let mut is_leaf = true;
        for inner in command.get_subcommands() {
            is_leaf = false;
            if !inner.is_hide_set() {
                let name = format!("{name} {}", inner.get_name());
                waiting.push((name.trim().to_owned(), inner.clone()));
            }
        }
        if is_leaf {
            found.push((name, command));
        }
    }
    found
}

#[test]
fn the_definition_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn the_documentation_has_every_command_and_no_other() {
    let mut documented: Vec<String> = PAGE
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once('`'))
        .map(|(name, _)| name.to_owned())
        .filter(|name| {
            Cli::command()
                .find_subcommand(name.split(' ').next().unwrap())
                .is_some()
        })
        .filter(|name| !name.ends_with('…'))
        .collect();
    let mut real: Vec<String> = commands().into_iter().map(|(name, _)| name).collect();
    documented.sort();
    real.sort();
    assert_eq!(documented, real);
}

/// Secrets come from files and descriptors. No option has a secret as its value, and no secret
/// comes from the environment.
#[test]
fn no_option_takes_a_secret() {
    let files_or_numbers = ["FILE", "N", "BYTES"];
    let mut looked_at = 0;
    for (name, command) in commands() {
        for argument in command.get_arguments() {
            let id = argument.get_id().as_str();
            let is_secret = ["pin", "material", "secret", "password", "generate"]
                .iter()
                .any(|word| id.split('_').any(|part| part == *word));
            if !is_secret {
                continue;
            }
            looked_at += 1;
            assert!(
                argument.get_env().is_none(),
                "{name}: {id} comes from the environment"
            );
            assert!(
                is_flag(argument) || files_or_numbers.contains(&value_name(argument).as_str()),
                "{name}: --{id} takes {}",
                value_name(argument)
            );
        }
    }
    assert!(looked_at > 10, "only {looked_at} options were looked at");
}

fn is_flag(argument: &Arg) -> bool {
    matches!(argument.get_action(), ArgAction::SetTrue)
}

fn value_name(argument: &Arg) -> String {
    argument
        .get_value_names()
        .map(|names| names.iter().map(ToString::to_string).collect())
        .unwrap_or_default()
}

#[test]
fn every_command_and_option_says_what_it_is_for() {
    for (name, command) in commands() {
        assert!(command.get_about().is_some(), "{name}");
        for argument in command.get_arguments() {
            assert!(
                argument.get_help().is_some(),
                "{name}: {}",
                argument.get_id()
            );
        }
    }
}

/// Every visible command and every group of commands has a manual page. Hidden commands have no
/// page.
#[test]
fn every_command_has_a_manual_page() {
    let folder = tempfile::tempdir().unwrap();
    manual::write_pages(folder.path()).unwrap();
    let mut expected = BTreeSet::from(["keybroker.1".to_owned()]);
    for (name, command) in commands() {
        let words: Vec<&str> = name.split(' ').collect();
        for end in 1..=words.len() {
            expected.insert(format!("keybroker-{}.1", words[..end].join("-")));
        }
        let page = folder
            .path()
            .join(format!("keybroker-{}.1", name.replace(' ', "-")));
        let page = fs::read_to_string(page).unwrap();
        for argument in command.get_arguments() {
            let Some(long) = argument.get_long() else {
                continue;
            };
            let escaped = format!("\\-\\-{}", long.replace('-', "\\-"));
            assert!(page.contains(&escaped), "{name}: no {escaped}");
        }
    }
    let written: BTreeSet<String> = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(written, expected);
}

#[test]
fn completions_name_every_command_and_no_hidden_one() {
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        let script = String::from_utf8(manual::script(shell)).unwrap();
        for (name, _) in commands() {
            for word in name.split(' ') {
                assert!(script.contains(word), "{shell}: {name}");
            }
        }
        for hidden in ["token-worker", "token-admin-worker"] {
            assert!(!script.contains(hidden), "{shell}: {hidden}");
        }
    }
}

/// With the completion script, bash offers exactly the commands of a group after the name of the
/// group.
#[test]
fn bash_offers_each_command_of_each_group() {
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("keybroker.bash");
    fs::write(&script, manual::script(Shell::Bash)).unwrap();
    for (group, words) in [
        (
            "",
            &["serve", "token", "store", "config", "completions", "man"][..],
        ),
        ("token ", &["list", "init", "check", "backup-confirmed"]),
        ("config ", &["check", "show"]),
        ("client ", &["unwrap", "create", "health"]),
        ("client-credential ", &["add-secret", "create", "revoke"]),
    ] {
        let program = format!(
            "source {script}; COMP_WORDS=(keybroker {group}''); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); \
             _keybroker keybroker '' {last}; printf '%s\\n' \"${{COMPREPLY[@]}}\"",
            script = script.display(),
            last = group
                .split(' ')
                .next()
                .filter(|word| !word.is_empty())
                .unwrap_or("keybroker"),
        );
        let output = process::Command::new("bash")
            .args(["--norc", "-c", &program])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let offered = String::from_utf8(output.stdout).unwrap();
        let offered: Vec<&str> = offered.lines().collect();
        for word in words {
            assert!(
                offered.contains(word),
                "{group}: {word} is not in {offered:?}"
            );
        }
    }
}

#[test]
fn a_panic_has_an_exit_code_of_the_table() {
    let failure = without_panic(|| panic!("secret")).unwrap_err();
    assert_eq!(failure.exit, Exit::Internal);
    assert!(!format!("{failure:?}").contains("secret"), "{failure:?}");
    assert!(without_panic(|| Ok(())).is_ok());
}

/// Pieces of blocking work in a peak. Each waits for all others, so each needs a thread.
const PEAK: usize = 40;
/// Pause between the pieces of the regular work after the peak.
const PAUSE: Duration = Duration::from_millis(250);
/// Pieces of the regular work: fifteen seconds.
const PIECES_MAX: usize = 60;
/// Threads that the regular work keeps.
const REGULAR: usize = 6;

fn threads() -> usize {
    fs::read_dir("/proc/self/task").unwrap().count()
}

/// The runtime gives blocking work to its threads in turn. If a thread waited long for more work, little regular work would keep all
/// threads of a peak for ever.
#[test]
fn the_threads_of_a_peak_end() {
    let runtime = runtime().unwrap();
    let before = threads();
    let all = Arc::new(Barrier::new(PEAK));
    runtime.block_on(async {
        let peak: Vec<_> = (0..PEAK)
            .map(|_| {
                let all = Arc::clone(&all);
                tokio::task::spawn_blocking(move || all.wait())
            })
            .collect();
        for piece in peak {
            piece.await.unwrap();
        }
        for _ in 0..PIECES_MAX {
            tokio::time::sleep(PAUSE).await;
            tokio::task::spawn_blocking(|| ()).await.unwrap();
            if threads() <= before + REGULAR {
                return;
            }
        }
        panic!("{before} threads before the peak, {} after it", threads());
    });
}
