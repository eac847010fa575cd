//! `keybroker store purge`: permanently removes old deleted records and superseded revisions.

use std::{collections::HashSet, sync::Arc};

use clap::Args;
use futures_util::future::try_join_all;
use serde_json::json;

use crate::{
    cli::{
        Context, block_on, change,
        exit::{Exit, Failure},
        progress::Progress,
    },
    config::Config,
};
use keybroker_audit::{AuditLog, Entry, EntryKind, Outcome};
use keybroker_core::{
    call::{CallId, Timestamp},
    key::{KeyAddress, RecordId, Revision},
};
use keybroker_store as store;
use keybroker_store::{
    purge::{self, Portion, Purge},
    scan::Superseded,
    tables::{Head, Table, Tables},
    tally::Tally,
};

/// Maximum accepted difference between the local time and the database's time, in microseconds: one
/// minute.
const CLOCKS_APART_US: u64 = 60 * 1_000_000;
const DAY_US: i64 = 24 * 3_600 * 1_000_000;

#[derive(Args, Debug)]
pub(in crate::cli) struct Arguments {
    /// Count the records and revisions without removing them
    #[arg(long)]
    dry_run: bool,
    /// Minimum number of days since the deletion of a record or the replacement of a revision; at
    /// least `store.retention_days` [default: `store.retention_days`]
    #[arg(long, value_name = "DAYS", value_parser = clap::value_parser!(u32).range(1..=36_500))]
    older_than: Option<u32>,
}

/// The numbers of rows that were purged, or that a dry run would purge.
#[derive(Clone, Copy, Debug, Default)]
struct Totals {
    records: u64,
    revisions: u64,
    changes: u64,
    approvals: u64,
    devices: u64,
    access_requests: u64,
}

pub(super) fn run(arguments: &Arguments, context: &Context) -> Result<(), Failure> {
    let config = &context.config()?;
    let days = days(arguments, &config.store)?;
    let before = Timestamp::from_micros(Timestamp::now().micros() - i64::from(days) * DAY_US);
    let totals = if arguments.dry_run {
        block_on(purge(context, config, before, None))??
    } else {
        let _lock = super::lock(
            &config.store,
            "only one process can use a SQLite file: stop the broker, run this command again, then start the broker. \
             With PostgreSQL and MySQL the command can run while brokers serve",
        )?;
        let gone = Tally::default();
        let describe = |entry: &mut Entry| entry.count = gone.rows_if_begun();
        change::audited_in_parts(context, config, "store.purge", describe, |log| {
            block_on(purge(context, config, before, Some((log, &gone))))?
        })?
    };
    context.output.fields(vec![
        ("before", json!(before.to_string())),
        ("records", json!(totals.records)),
        ("revisions", json!(totals.revisions)),
        ("changes", json!(totals.changes)),
        ("approvals", json!(totals.approvals)),
        ("devices", json!(totals.devices)),
        ("access_requests", json!(totals.access_requests)),
        ("dry_run", json!(arguments.dry_run)),
    ])
}

/// The retention time in days. The option cannot make the retention time shorter than the
/// configured time, because users rely on the configured time.
fn days(arguments: &Arguments, settings: &store::Settings) -> Result<u32, Failure> {
    let promised = settings.retention_days;
    match arguments.older_than {
        Some(days) if days < promised => Err(Failure::new(
            Exit::Usage,
            format!(
                "--older-than {days} is less than `store.retention_days`, which is {promised}: younger records must \
                 stay restorable; nothing was removed"
            ),
        )
        .hint("for a shorter retention time, change `store.retention_days` first")),
        Some(days) => Ok(days),
        None => Ok(promised),
    }
}

/// Scans the database for old rows. Removes the old rows if an audit log is given, and otherwise
/// only counts the old rows.
async fn purge(
    context: &Context,
    config: &Config,
    before: Timestamp,
    log: Option<(&AuditLog, &Tally)>,
) -> Result<Totals, Failure> {
    let store = store::open_tables(&config.store).await?;
    let result = match compare_clocks(&store).await {
        Ok(()) => purge_in(context, &store, before, log).await,
        Err(failure) => Err(failure),
    };
    store.close().await;
    result
}

/// Refuses to purge if the clocks of this machine and of the database differ. With a clock that is
/// ahead, rows look older than they are, and purged records cannot be restored.
async fn compare_clocks(store: &Arc<dyn Tables>) -> Result<(), Failure> {
    let Some(theirs) = store.clock().await? else {
        return Ok(());
    };
    let ours = Timestamp::now();
    if ours.micros().abs_diff(theirs.micros()) <= CLOCKS_APART_US {
        return Ok(());
    }
    let what = format!(
        "the local time is {ours} and the database's time is {theirs}, so it is uncertain which rows are old; nothing \
         was removed"
    );
    Err(Failure::new(Exit::Store, what)
        .hint("correct the wrong clock, then run this command again"))
}

async fn purge_in(
    context: &Context,
    store: &Arc<dyn Tables>,
    before: Timestamp,
    log: Option<(&AuditLog, &Tally)>,
) -> Result<Totals, Failure> {
    let rows = store.count(Table::Revisions).await?;
    let progress = Progress::new(context.output, "looking through revisions", rows);
    let mut work = Purge::new(Arc::clone(store), before);
    let mut totals = Totals::default();
    while let Some(portion) = work.next().await? {
        let (records, revisions) = match log {
            None => (portion.records.len(), portion.revisions.len()),
            Some((log, gone)) => carry_out(&work, &portion, log, gone).await?,
        };
        totals.records += count(records);
        totals.revisions += count(revisions);
        progress.advance(portion.seen);
    }
    if let Some((_, gone)) = log {
        gone.begin();
    }
    totals.changes = purge::forget_changes(&**store, before, log.is_none()).await?;
    totals.approvals = match log {
        None => store.old_approvals(before).await?,
        Some(_) => store.forget_approvals(before).await?,
    };
    (totals.devices, totals.access_requests) = match log {
        None => (
            store.old_devices(before).await?,
            store.old_access_requests(before).await?,
        ),
        Some(_) => (
            store.forget_devices(before).await?,
            store.forget_access_requests(before).await?,
        ),
    };
    Ok(totals)
}

/// Removes the revisions and records of a portion, and returns the numbers of removed revisions and records.
async fn carry_out(
    work: &Purge,
    portion: &Portion,
    log: &AuditLog,
    gone: &Tally,
) -> Result<(usize, usize), Failure> {
    let revisions = portion.revisions.iter().map(Part::of_revision).collect();
    let purged = async { work.revisions(portion).await };
    let revisions = recorded(log, revisions, gone, purged).await?;
    let records = portion.records.iter().map(Part::of_record).collect();
    let purged = async {
        let ids = work.records(portion).await?;
        let heads = portion.records.iter();
        let purged = heads.filter(|head| ids.contains(&head.id));
        Ok(purged.map(|head| (head.id, head.revision)).collect())
    };
    let records = recorded(log, records, gone, purged).await?;
    Ok((records, revisions))
}

/// A record or a revision to remove.
struct Part<'a> {
    call: CallId,
    action: &'static str,
    record: RecordId,
    address: &'a KeyAddress,
    revision: Revision,
}

impl<'a> Part<'a> {
    fn of_record(head: &'a Head) -> Self {
        Self {
            call: CallId::fresh(),
            action: "user_key.purge",
            record: head.id,
            address: &head.address,
            revision: head.revision,
        }
    }

    fn of_revision(old: &'a Superseded) -> Self {
        Self {
            call: CallId::fresh(),
            action: "user_key.purge_revision",
            record: old.record,
            address: &old.address,
            revision: old.revision,
        }
    }

    fn entry(&self, kind: EntryKind, outcome: Outcome) -> Entry {
        let mut entry = change::local_entry(kind, self.action, outcome, self.call);
        entry.tenant = Some(self.address.tenant.clone());
        entry.user = Some(self.address.user.clone());
        entry.key_name = Some(self.address.name.clone());
        entry.record_id = Some(self.record);
        entry.revision = Some(self.revision);
        entry
    }
}

/// Runs `work` with an intent and an outcome for each record or revision to remove, because purged
/// records cannot be restored. If the database fails after the intents were written, no outcomes
/// are written, because it is unknown which records and revisions were removed. Returns the number
/// of removed records and revisions.
async fn recorded(
    log: &AuditLog,
    parts: Vec<Part<'_>>,
    gone: &Tally,
    work: impl Future<Output = Result<HashSet<(RecordId, Revision)>, store::Error>>,
) -> Result<usize, Failure> {
    if parts.is_empty() {
        return Ok(0);
    }
    let intents = parts.iter();
    let intents = intents.map(|part| log.append(part.entry(EntryKind::Intent, Outcome::Ok)));
    try_join_all(intents).await?;
    gone.begin();
    let purged = work.await?;
    gone.add(purged.len());
    let outcomes = parts.iter().map(|part| {
        let outcome = if purged.contains(&(part.record, part.revision)) {
            Outcome::Ok
        } else {
            Outcome::Failed
        };
        log.append(part.entry(EntryKind::Outcome, outcome))
    });
    try_join_all(outcomes).await?;
    Ok(purged.len())
}

fn count(rows: usize) -> u64 {
    u64::try_from(rows).unwrap_or(u64::MAX)
}
