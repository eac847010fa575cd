//! `keybroker audit`: the log read offline.

use std::path::PathBuf;

use clap::Subcommand;
use serde_json::json;

use crate::audit;

use super::{
    Context,
    exit::{Exit, Failure},
};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Check every line of a log: canonical, one log id, no gap in the sequence
    Verify {
        /// Directory of the log [default: that of this instance]
        directory: Option<PathBuf>,
    },
    /// Show the last entries of a log
    Show {
        /// Directory of the log [default: that of this instance]
        directory: Option<PathBuf>,
        /// How many
        #[arg(long, default_value_t = 20)]
        last: usize,
    },
}

pub(super) fn run(command: &Command, context: &Context) -> Result<(), Failure> {
    match command {
        Command::Verify { directory } => {
            let report = audit::verify(&resolve(directory.as_ref(), context)?)?;
            context.output.fields(vec![
                ("segments", json!(report.segments)),
                ("entries", json!(report.entries)),
                ("last_sequence", json!(report.last_sequence)),
                ("open_intents", json!(report.open_intents)),
                ("torn_tails", json!(report.torn_tails)),
                ("problems", json!(report.problems.len())),
            ])?;
            if report.problems.is_empty() {
                return Ok(());
            }
            let what = format!(
                "the log is not as it was written; keep it and ask how it changed:\n  {}",
                report.problems.join("\n  ")
            );
            Err(Failure::new(Exit::Verification, what))
        }
        Command::Show { directory, last } => {
            let lines = audit::tail(&resolve(directory.as_ref(), context)?, *last)?;
            context.output.json_lines(&lines)
        }
    }
}

fn resolve(directory: Option<&PathBuf>, context: &Context) -> Result<PathBuf, Failure> {
    if let Some(directory) = directory {
        return Ok(directory.clone());
    }
    let audit = context.config()?.audit;
    Ok(audit.directory.join(audit.instance))
}
