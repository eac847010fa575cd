//! The command line against its documentation and its promises.

use clap::{Arg, ArgAction, CommandFactory as _};

use super::*;

const PAGE: &str = include_str!("../../docs/cli.md");

/// Every visible command that does something, with its full name.
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

/// A secret is named by a file or a descriptor. No option takes one as its value, and none comes from the environment.
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
