//! `keybroker policy`: checks policies and explains decisions.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::json;

use crate::config::Config;
use keybroker_policy::{Networks, Problem, Problems, Settings};

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
    /// Show the decision on a request, and the policies that determine it
    Explain(Box<explain::Arguments>),
}

/// Options that select the policies.
#[derive(Args, Debug)]
pub(super) struct Source {
    /// Use the policies in this directory instead of `policy.directory`. With this option, the
    /// command does not need a configuration. If a configuration exists, the command also checks
    /// that the configuration defines the principals in the policies
    #[arg(long, value_name = "DIRECTORY")]
    directory: Option<PathBuf>,
    /// Omit the broker's default permit policies; requires --directory
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

    /// The networks of the configuration. With `--directory`, the configuration may be missing, and then no address has a place.
    fn networks(context: &Context) -> Networks {
        let config = context.config();
        config.map_or_else(
            |_| Networks::default(),
            |config| Networks::new(&config.networks),
        )
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
                ("verdict", json!("the policies are valid")),
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
    // In text output, the error message describes a single problem. JSON output always lists all
    // problems.
    if problems.len() > 1 || context.output.is_json() {
        let rows = problems.iter().map(row).collect();
        context.output.list(rows, "")?;
    }
    Err(refused(shown, &problems))
}

/// Remarks about principals that the policies name but the configuration does not define. Returns
/// `None` if `--directory` selects the policies and no configuration exists.
fn unknown_principals(
    source: &Source,
    settings: &Settings,
    context: &Context,
) -> Result<Option<Vec<String>>, Failure> {
    let config = match context.config() {
        Ok(config) => config,
        Err(failure) if source.directory.is_some() => {
            context.output.note(&format!(
                "note: the principals in the policies were not compared with a configuration: {failure}"
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

/// The error of a command that found invalid policies.
fn refused(directory: Option<&Path>, problems: &[Problem]) -> Failure {
    let shown = directory.unwrap_or(Path::new("(shipped)")).display();
    let count = problems.len();
    let what = match problems {
        [problem] => format!("{shown}: {problem}"),
        _ => format!("{shown}: {count} problems in the policies"),
    };
    Failure::new(Exit::Configuration, what)
        .hint("docs/policy.md describes the language of policies; run `keybroker policy check` after a correction")
}
