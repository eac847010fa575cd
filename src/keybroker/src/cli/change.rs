//! Writes audit entries for changes that commands make. Each run of a command writes to a separate
//! audit log.

use std::fs;

use crate::config::Config;
use keybroker_audit as audit;
use keybroker_audit::{AuditLog, Entry, EntryKind, OpenIntent, Outcome};
use keybroker_core::call::CallId;

use super::{Context, exit::Failure, interrupt};

/// Prefix of the name of a command's audit log. The call id of the command follows the prefix.
const LOG_PREFIX: &str = "cli-";

/// Writes an intent, calls `work`, and writes the outcome. If the intent cannot be written to disk,
/// `work` is not called. If `work` may have changed rows before a failure, `describe` sets the
/// count of the entry.
pub(super) fn audited<T>(
    context: &Context,
    config: &Config,
    action: &'static str,
    describe: impl Fn(&mut Entry),
    work: impl FnOnce() -> Result<T, Failure>,
) -> Result<T, Failure> {
    audited_in_parts(context, config, action, describe, |_| work())
}

/// Like [`audited`], for work that also writes an audit entry for each of its steps.
pub(super) fn audited_in_parts<T>(
    context: &Context,
    config: &Config,
    action: &'static str,
    describe: impl Fn(&mut Entry),
    work: impl FnOnce(&AuditLog) -> Result<T, Failure>,
) -> Result<T, Failure> {
    close_what_was_cut_short(context, &config.audit);
    let call = CallId::fresh();
    let (log, _) = config.audit.open(&format!("{LOG_PREFIX}{call}"))?;
    let entry = |kind, outcome| {
        let mut entry = local_entry(kind, action, outcome, call);
        describe(&mut entry);
        entry
    };
    append(&log, entry(EntryKind::Intent, Outcome::Ok))?;
    let under_way = interrupt::begin(action, next_after(action));
    let result = work(&log);
    drop(under_way);
    let mut last = entry(EntryKind::Outcome, Outcome::Ok);
    if result.is_err() {
        last.outcome = match last.count {
            // The count is a lower bound, because the outcome of the step in progress is unknown.
            Some(_) => Outcome::Unknown,
            None => Outcome::Failed,
        };
    }
    let recorded = append(&log, last);
    log.close();
    let value = result?;
    recorded.map(|()| value)
}

/// Writes the missing outcomes of commands that were killed, because no other code opens the logs
/// of these commands again. Only the token and the registry show whether the change of a killed
/// command was made.
fn close_what_was_cut_short(context: &Context, settings: &audit::Settings) {
    for name in logs_of_commands(settings) {
        match cut_short(settings, &name) {
            Ok(closed) => {
                for intent in closed {
                    let action = intent.intent.action;
                    // A purge writes a separate intent for each record or revision that it removes. A purge has too
                    // many intents to show all of them.
                    if ["user_key.purge", "user_key.purge_revision"].contains(&&*action) {
                        continue;
                    }
                    let next = next_after(&action);
                    context.output.note(&format!(
                        "note: an earlier `{action}` was interrupted (audit log {name}); {next}"
                    ));
                }
            }
            Err(error) => context.output.note(&format!("warning: {error}")),
        }
    }
}

/// The hint after a command was killed or interrupted during an action.
fn next_after(action: &str) -> &'static str {
    match action {
        "store.copy" => "run the same command again to continue the copy",
        "store.migrate" => "run the same command again",
        "bench.seed" => {
            "the records that the command wrote remain; run the command again to write the rest"
        }
        "store.purge" => {
            "the purged records cannot be restored; run the command again to purge the rest"
        }
        _ => "`keybroker token check` shows the state of the token and its keys",
    }
}

fn logs_of_commands(settings: &audit::Settings) -> Vec<String> {
    // The audit log of an instance may have a name like the log of a command.
    let ours = |name: &String| {
        let call = name.strip_prefix(LOG_PREFIX).and_then(CallId::parse);
        call.is_some() && *name != settings.instance
    };
    // The audit directory may not exist yet.
    let entries = fs::read_dir(&settings.directory).into_iter().flatten();
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter(ours).collect()
}

fn cut_short(settings: &audit::Settings, name: &str) -> Result<Vec<OpenIntent>, audit::Error> {
    // Read the log without a lock first, because opening the log writes entries.
    if audit::open_intents(&settings.directory.join(name))?.is_empty() {
        return Ok(Vec::new());
    }
    let (log, open) = match settings.open(name) {
        Ok(opened) => opened,
        // The command that writes this log is still running.
        Err(error) if error.in_use() => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    for intent in &open {
        log.append_blocking(intent.recovered(Outcome::Unknown))?;
    }
    log.close();
    Ok(open)
}

/// An audit entry about an action of the person who runs the command.
pub(super) fn local_entry(
    kind: EntryKind,
    action: &'static str,
    outcome: Outcome,
    call: CallId,
) -> Entry {
    let mut entry = Entry::new(kind, action, outcome);
    entry.principal = Some(local_operator());
    entry.peer = Some("local".to_owned());
    entry.call_id = Some(call);
    entry
}

fn append(log: &AuditLog, entry: Entry) -> Result<(), Failure> {
    log.append_blocking(entry)?;
    Ok(())
}

/// The principal for the person who runs the command, with the user id of the process.
pub(super) fn local_operator() -> String {
    format!("local-uid:{}", rustix::process::getuid().as_raw())
}
