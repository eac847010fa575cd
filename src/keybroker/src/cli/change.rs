//! Changes made by a command: audited like those of the broker, in a log of the command's own.

use std::fs;

use crate::config::Config;
use keybroker_audit as audit;
use keybroker_audit::{AuditLog, Entry, EntryKind, OpenIntent, Outcome};
use keybroker_core::call::CallId;

use super::{Context, exit::Failure, interrupt};

/// The log of one command is named after its call.
const LOG_PREFIX: &str = "cli-";

/// Writes an intent, does the work, writes its outcome. Without a durable intent nothing is done. Of work that may have changed
/// rows before it failed `describe` gives the entry a count.
pub(super) fn audited<T>(
    context: &Context,
    config: &Config,
    action: &'static str,
    describe: impl Fn(&mut Entry),
    work: impl FnOnce() -> Result<T, Failure>,
) -> Result<T, Failure> {
    audited_in_parts(context, config, action, describe, |_| work())
}

/// The same for work whose parts have their own entries.
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
            // At least that many: the part in progress may have been done or not.
            Some(_) => Outcome::Unknown,
            None => Outcome::Failed,
        };
    }
    let recorded = append(&log, last);
    log.close();
    let value = result?;
    recorded.map(|()| value)
}

/// Closes the intents of commands that were killed before their outcome: no other command opens their logs again.
/// Whether they were done only token and registry tell.
fn close_what_was_cut_short(context: &Context, settings: &audit::Settings) {
    for name in logs_of_commands(settings) {
        match cut_short(settings, &name) {
            Ok(closed) => {
                for intent in closed {
                    let action = intent.intent.action;
                    // One of many parts of a purge.
                    if ["user_key.purge", "user_key.purge_revision"].contains(&&*action) {
                        continue;
                    }
                    let next = next_after(&action);
                    context.output.note(&format!(
                        "note: an earlier `{action}` was cut short (audit log {name}); {next}"
                    ));
                }
            }
            Err(error) => context.output.note(&format!("warning: {error}")),
        }
    }
}

/// What to do after a command was killed or interrupted during an action.
fn next_after(action: &str) -> &'static str {
    match action {
        "store.copy" => "run the same command again: it continues the copy",
        "store.migrate" => "run the same command again",
        "bench.seed" => "what it wrote stays; run it again for the rest",
        "store.purge" => "what it removed stays removed; run it again for the rest",
        _ => "`keybroker token check` shows what it left",
    }
}

fn logs_of_commands(settings: &audit::Settings) -> Vec<String> {
    // An instance may have a name like one.
    let ours = |name: &String| {
        let call = name.strip_prefix(LOG_PREFIX).and_then(CallId::parse);
        call.is_some() && *name != settings.instance
    };
    // Before the first command there is no directory.
    let entries = fs::read_dir(&settings.directory).into_iter().flatten();
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter(ours).collect()
}

fn cut_short(settings: &audit::Settings, name: &str) -> Result<Vec<OpenIntent>, audit::Error> {
    // First without a lock: opening leaves its own entries.
    if audit::open_intents(&settings.directory.join(name))?.is_empty() {
        return Ok(Vec::new());
    }
    let (log, open) = match settings.open(name) {
        Ok(opened) => opened,
        // It is running.
        Err(error) if error.in_use() => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    for intent in &open {
        log.append_blocking(intent.recovered(Outcome::Unknown))?;
    }
    log.close();
    Ok(open)
}

/// An entry about an action of the person who runs the command.
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

/// The person who runs the command, as the operating system knows them.
pub(super) fn local_operator() -> String {
    format!("local-uid:{}", rustix::process::getuid().as_raw())
}
