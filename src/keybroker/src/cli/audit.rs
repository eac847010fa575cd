//! `keybroker audit`: the log read offline.

use std::{
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use clap::Subcommand;
use serde_json::json;

use keybroker_audit as audit;

use super::{
    Context,
    change::local_operator,
    entries::Filter,
    exit::{Exit, Failure},
};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Check every line of a log: canonical form, log id, sequence without gaps
    ///
    /// The log of this instance is also compared with the last durable entry, so lines removed from its end are
    /// found. Values that were replaced by other valid values are not found.
    Verify {
        /// Directory of the log [default: that of this instance]
        directory: Option<PathBuf>,
    },
    /// Acknowledge that the files of the audit log were tampered with, so that the broker continues
    ///
    /// Investigate first, and copy the log directory for the auditors. The command prints what was found and records who
    /// acknowledged it. A running broker writes that into the audit log and goes on within a second, a stopped one at its next
    /// start. Missing entries stay visible as a gap in the sequence.
    Acknowledge,
    /// Remove the oldest segments of this instance's log, after they were copied to another machine
    ///
    /// A running broker removes them within a second, a stopped one at its next start, and an entry in the log records who asked
    /// for it. The newest segment always stays. Do not remove segments by hand: the broker takes that for tampering.
    RemoveSegments {
        /// Number of the last segment to remove, as in its file name: 12 removes 00000012.jsonl and all before it
        #[arg(long, value_name = "NUMBER")]
        through: u64,
    },
    /// Show the last entries of a log
    Show {
        /// Directory of the log [default: that of this instance]
        directory: Option<PathBuf>,
        /// Number of entries to show at most, the newest ones
        #[arg(long, default_value_t = 20, value_name = "NUMBER")]
        last: usize,
        #[command(flatten)]
        filter: Filter,
        /// Print the lines byte for byte as they are in the log
        #[arg(long)]
        raw: bool,
    },
}

pub(super) fn run(command: &Command, context: &Context) -> Result<(), Failure> {
    match command {
        Command::Verify { directory } => {
            let report = match directory {
                Some(directory) => audit::verify(directory)?,
                None => context.config()?.audit.verify_instance()?,
            };
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
        Command::Acknowledge => acknowledge(context),
        Command::RemoveSegments { through } => remove_segments(*through, context),
        Command::Show {
            directory,
            last,
            filter,
            raw,
        } => {
            let directory = resolve(directory.as_ref(), context)?;
            let lines = if filter.is_empty() {
                audit::tail(&directory, *last)?
            } else {
                audit::tail_matching(&directory, *last, |line| filter.passes(line))?
            };
            if *raw {
                return lines.iter().try_for_each(|line| context.output.text(line));
            }
            context.output.entries(&lines)
        }
    }
}

/// How long a running broker may take to carry out a request.
const TAKEN_IN_TIMEOUT: Duration = Duration::from_secs(5);
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

fn acknowledge(context: &Context) -> Result<(), Failure> {
    let settings = context.config()?.audit;
    let Some(tampering) = settings.tampering()? else {
        let what = format!(
            "there is nothing to acknowledge: no tampering with the log of instance {} was found",
            settings.instance
        );
        return Err(Failure::new(Exit::Usage, what)
            .hint("a running broker reports what is wrong with `keybroker probe ready`"));
    };
    settings.acknowledge_tampering(&tampering, &local_operator())?;
    let is_open = is_still(|| Ok(settings.tampering()?.is_some()))?;
    let effect = if is_open { "at the next start" } else { "now" };
    context.output.fields(vec![
        ("finding", json!(tampering.finding)),
        ("found_us", json!(tampering.found_us)),
        ("effect", json!(effect)),
    ])?;
    if is_open {
        context.output.note(
            "no running broker has taken this in: if one is running, its log says why the audit log cannot go on",
        );
    }
    Ok(())
}

/// Whether a request is still there after the time in which a running broker carries it out.
fn is_still(is_pending: impl Fn() -> Result<bool, audit::Error>) -> Result<bool, audit::Error> {
    let until = Instant::now() + TAKEN_IN_TIMEOUT;
    while is_pending()? {
        if Instant::now() >= until {
            return Ok(true);
        }
        thread::sleep(LOOK_INTERVAL);
    }
    Ok(false)
}

fn remove_segments(through: u64, context: &Context) -> Result<(), Failure> {
    let settings = context.config()?.audit;
    let before = settings.segments()?;
    let old = |segments: &[u64]| segments.iter().filter(|one| **one <= through).count();
    if before.last().is_none_or(|newest| *newest <= through) || old(&before) == 0 {
        let what = match (before.first(), before.last()) {
            (Some(first), Some(last)) => format!(
                "--through {through}: the log of instance {} has the segments {first} to {last}, and the newest one stays",
                settings.instance
            ),
            _ => format!("the log of instance {} has no segments", settings.instance),
        };
        return Err(Failure::new(Exit::Usage, what));
    }
    if let Some(tampering) = settings.tampering()? {
        let what = format!("the log was tampered with: {}", tampering.finding);
        return Err(Failure::new(Exit::Audit, what)
            .hint("investigate, and run `keybroker audit acknowledge` first"));
    }
    settings.request_removal(through, &local_operator())?;
    let is_open = is_still(|| settings.is_removal_pending())?;
    let left = old(&settings.segments()?);
    if !is_open && left > 0 {
        let what = format!("{left} of {} segments could not be removed", old(&before));
        return Err(Failure::new(Exit::Audit, what).hint("the log of the broker names the cause"));
    }
    let effect = if is_open { "at the next start" } else { "now" };
    context.output.fields(vec![
        ("segments", json!(old(&before))),
        ("effect", json!(effect)),
    ])?;
    if is_open {
        context.output.note(
            "no running broker has removed them yet: it waits while a change is under way, and a stopped one does it at its start",
        );
    }
    Ok(())
}

fn resolve(directory: Option<&PathBuf>, context: &Context) -> Result<PathBuf, Failure> {
    if let Some(directory) = directory {
        return Ok(directory.clone());
    }
    let audit = context.config()?.audit;
    Ok(audit.directory.join(audit.instance))
}
