//! Changes made by a command: audited like those of the broker, in a log of the command's own.

use crate::{
    audit::{AuditLog, Entry, EntryKind, Outcome},
    call::CallId,
    config::Config,
};

use super::exit::Failure;

/// Writes an intent, does the work, writes its outcome. Without a durable intent nothing is done.
pub(super) fn audited<T>(
    config: &Config,
    action: &'static str,
    describe: impl Fn(&mut Entry),
    work: impl FnOnce() -> Result<T, Failure>,
) -> Result<T, Failure> {
    let call = CallId::fresh();
    let (log, _) = config.audit.open(&format!("cli-{call}"))?;
    let entry = |kind, outcome| {
        let mut entry = Entry::new(kind, action, outcome);
        entry.principal = Some(local_operator());
        entry.peer = Some("local".to_owned());
        entry.call_id = Some(call);
        describe(&mut entry);
        entry
    };
    append(&log, entry(EntryKind::Intent, Outcome::Ok))?;
    let result = work();
    let outcome = if result.is_ok() {
        Outcome::Ok
    } else {
        Outcome::Failed
    };
    let recorded = append(&log, entry(EntryKind::Outcome, outcome));
    log.close();
    let value = result?;
    recorded.map(|()| value)
}

fn append(log: &AuditLog, entry: Entry) -> Result<(), Failure> {
    log.append_blocking(entry)?;
    Ok(())
}

/// Whoever runs the command, as the operating system knows them.
fn local_operator() -> String {
    format!("local-uid:{}", rustix::process::getuid().as_raw())
}
