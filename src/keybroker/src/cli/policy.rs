//! `keybroker policy`.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::json;

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
    /// Use the policies of this directory instead of `policy.directory`; needs no configuration
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
            // Without a configuration there is nothing to compare names with.
            let unknown = if source.directory.is_none() {
                let config = context.config()?;
                config.unknown_principals().unwrap_or_default()
            } else {
                Vec::new()
            };
            for remark in &unknown {
                context.output.note(&format!("warning: {remark}"));
            }
            return context.output.fields(vec![
                ("verdict", json!("the policies are good")),
                ("files", json!(summary.files)),
                ("permits", json!(summary.permits)),
                ("forbids", json!(summary.forbids)),
                ("unknown_principals", json!(unknown.len())),
            ]);
        }
        Err(Problems(problems)) => problems,
    };
    let rows = problems.iter().map(row).collect();
    context.output.list(rows, "")?;
    Err(refused(settings.directory.as_deref(), &problems))
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
