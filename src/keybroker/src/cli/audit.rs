//! `keybroker audit`: reads and maintains the files of the audit log. The command works with or
//! without a running broker.

use std::{
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use clap::Subcommand;
use serde_json::json;

use keybroker_audit as audit;

mod envelopes;

use super::{
    Context,
    change::local_operator,
    entries::Filter,
    exit::{Exit, Failure},
};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Check every line of a log: canonical form, log id and consecutive sequence numbers
    ///
    /// For the log of this instance, the command also detects whether lines were removed from the
    /// end. The command does not detect that a value was replaced with another valid value.
    Verify {
        /// Directory of the log [default: the log directory of this instance]
        directory: Option<PathBuf>,
    },
    /// Acknowledge that the files of the audit log were tampered with, and let the broker continue
    ///
    /// Before you run this command, find the cause and copy the log directory for the auditors. The
    /// command prints the broker's finding, and records who acknowledged the finding. A running
    /// broker writes the acknowledgement into the audit log and continues within a second. A
    /// stopped broker writes the acknowledgement at its next start. Missing entries stay visible as
    /// a gap in the sequence numbers.
    Acknowledge,
    /// Remove the oldest segments of this instance's log; copy them to another machine first
    ///
    /// A running broker removes the segments within a second. A stopped broker removes the segments at its next start. An audit
    /// entry records who requested the removal of the segments. The newest segment is never removed. Do not delete segment files
    /// by hand: the broker would report tampering.
    RemoveSegments {
        /// Number of the last segment to remove: 12 removes 00000012.jsonl and all earlier segments
        #[arg(long, value_name = "NUMBER")]
        through: u64,
    },
    /// List the revisions under a compromised wrapping key that a re-wrap may move
    ///
    /// The command verifies the logs, and takes the digests of the envelopes that the broker stored from their entries. With
    /// `--backup`, it also takes the revisions in a backup of the database from before the compromise. The list replaces an earlier
    /// list. Then run `keybroker rewrap start --from-compromised ID` on a broker on this host.
    Envelopes(envelopes::Arguments),
    /// Show the last entries of a log
    Show {
        /// Directory of the log [default: the log directory of this instance]
        directory: Option<PathBuf>,
        /// Number of entries to show, counted back from the newest entry
        #[arg(long, default_value_t = 20, value_name = "NUMBER")]
        last: usize,
        #[command(flatten)]
        filter: Filter,
        /// Print the lines exactly as the log contains them
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
                "the log was changed after it was written; keep the files and find out what changed them:\n  {}",
                report.problems.join("\n  ")
            );
            Err(Failure::new(Exit::Verification, what))
        }
        Command::Envelopes(arguments) => envelopes::list(arguments, context),
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

/// Maximum wait until a running broker has carried out a request.
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
            .hint("`keybroker probe ready` shows the problem that a running broker reports"));
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
            "no running broker has applied the acknowledgement; if a broker is running, its log shows why the audit \
             log cannot continue",
        );
    }
    Ok(())
}

/// Waits for a running broker to carry out a request. Returns true if the request is still pending
/// after the timeout.
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
                "--through {through}: the log of instance {} has the segments {first} to {last}, and the newest \
                 segment is never removed",
                settings.instance
            ),
            _ => format!("the log of instance {} has no segments", settings.instance),
        };
        return Err(Failure::new(Exit::Usage, what));
    }
    if let Some(tampering) = settings.tampering()? {
        let what = format!("the log was tampered with: {}", tampering.finding);
        return Err(Failure::new(Exit::Audit, what).hint(
            "find the cause, then run `keybroker audit acknowledge`, then repeat this command",
        ));
    }
    settings.request_removal(through, &local_operator())?;
    let is_open = is_still(|| settings.is_removal_pending())?;
    let left = old(&settings.segments()?);
    if !is_open && left > 0 {
        let what = format!("{left} of {} segments could not be removed", old(&before));
        return Err(Failure::new(Exit::Audit, what).hint("the broker's log shows the cause"));
    }
    let effect = if is_open { "at the next start" } else { "now" };
    context.output.fields(vec![
        ("segments", json!(old(&before))),
        ("effect", json!(effect)),
    ])?;
    if is_open {
        context.output.note(
            "the segments are not removed yet: a running broker waits until no change is in progress, and a stopped \
             broker removes them at its next start",
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
