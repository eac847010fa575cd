//! `keybroker policy`.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::json;

use crate::config::Config;
use keybroker_policy::{Problem, Problems, Settings};

use super::{
    Context,
    exit::{Exit, Failure},
    output::Field,
};

mod describe;
mod explain;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Validate policies as `serve` does, and report every problem
    Check(Source),
    /// Show how a request would be decided, and which policies decide it
    Explain(Box<explain::Arguments>),
}

/// Which policies.
#[derive(Args, Debug)]
pub(super) struct Source {
    /// Use the policies of this directory instead of `policy.directory`. No configuration is
    /// needed. If there is one, the command also checks the names of principals against it
    #[arg(long, value_name = "DIRECTORY")]
    directory: Option<PathBuf>,
    /// Leave out the permits that come with the broker; requires --directory
    #[arg(long, requires = "directory")]
    no_defaults: bool,
}

impl Source {
    fn settings(&self, context: &Context) -> Result<Settings, Failure> {
        match &self.directory {
            Some(directory) => Ok(Settings {
                defaults: !self.no_defaults,
                directory: Some(directory.clone()),
            }),
            None => Ok(context.config()?.policy),
        }
    }
}

pub(super) fn run(command: &Command, context: &Context) -> Result<(), Failure> {
    match command {
        Command::Check(source) => check(source, context),
        Command::Explain(arguments) => explain::run(arguments, context),
    }
}

fn check(source: &Source, context: &Context) -> Result<(), Failure> {
    let settings = source.settings(context)?;
    let problems = match settings.check() {
        Ok(summary) => {
            let unknown = unknown_principals(source, &settings, context)?;
            let ignored = settings.ignored_files();
            for remark in unknown.iter().flatten().chain(&ignored) {
                context.output.note(&format!("warning: {remark}"));
            }
            return context.output.fields(vec![
                ("verdict", json!("the policies are good")),
                ("files", json!(summary.files)),
                ("permits", json!(summary.permits)),
                ("forbids", json!(summary.forbids)),
                (
                    "unknown_principals",
                    json!(unknown.map(|unknown| unknown.len())),
                ),
            ]);
        }
        Err(Problems(problems)) => problems,
    };
    let shown = settings.directory.as_deref();
    // A single problem is in the error itself, for a person; a program reads all of them from the list.
    if problems.len() > 1 || context.output.is_json() {
        let rows = problems.iter().map(row).collect();
        context.output.list(rows, "")?;
    }
    Err(refused(shown, &problems))
}

/// Remarks on principals that the policies name and the configuration does not know. Absent when the policies are those of
/// `--directory` and there is no configuration to compare them with.
fn unknown_principals(
    source: &Source,
    settings: &Settings,
    context: &Context,
) -> Result<Option<Vec<String>>, Failure> {
    let config = match context.config() {
        Ok(config) => config,
        Err(failure) if source.directory.is_some() => {
            context.output.note(&format!(
                "note: the names of principals were not compared with a configuration: {failure}"
            ));
            return Ok(None);
        }
        Err(failure) => return Err(failure),
    };
    let config = Config {
        policy: settings.clone(),
        ..config
    };
    Ok(Some(config.unknown_principals().unwrap_or_default()))
}

fn row(problem: &Problem) -> Vec<Field> {
    vec![
        ("file", json!(problem.file)),
        ("line", json!(problem.place.map(|(line, _)| line))),
        ("column", json!(problem.place.map(|(_, column)| column))),
        ("problem", json!(problem.message)),
    ]
}

/// Policies that are not valid.
fn refused(directory: Option<&Path>, problems: &[Problem]) -> Failure {
    let shown = directory.unwrap_or(Path::new("(shipped)")).display();
    let count = problems.len();
    let what = match problems {
        [problem] => format!("{shown}: {problem}"),
        _ => format!("{shown}: {count} mistakes in the policies"),
    };
    Failure::new(Exit::Configuration, what)
        .hint("docs/policy.md has the words that policies are written in; `keybroker policy check` looks again")
}
