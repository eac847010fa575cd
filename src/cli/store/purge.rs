//! `keybroker store purge`.

use std::{cell::Cell, sync::Arc};

use clap::Args;
use futures_util::future::try_join_all;
use serde_json::json;

use crate::{
    audit::{AuditLog, Entry, EntryKind, Outcome},
    call::{CallId, Timestamp},
    cli::{
        Context, block_on, change,
        exit::{Exit, Failure},
        progress::Progress,
    },
    config::Config,
    store::{
        self,
        purge::{self, Portion, Purge},
        tables::{Head, Table, Tables},
    },
};

const DAY_US: i64 = 24 * 3_600 * 1_000_000;

#[derive(Args, Debug)]
pub(in crate::cli) struct Arguments {
    /// Say what would be removed, and remove nothing
    #[arg(long)]
    dry_run: bool,
    /// Only what was deleted or superseded so long ago, at least `store.retention_days` [default: `store.retention_days`]
    #[arg(long, value_name = "DAYS", value_parser = clap::value_parser!(u32).range(1..=36_500))]
    older_than: Option<u32>,
}

/// What was purged, or would be.
#[derive(Clone, Copy, Debug, Default)]
struct Totals {
    records: u64,
    revisions: u64,
    changes: u64,
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
            "a SQLite file belongs to one process: stop the broker, run this again, start the broker; on PostgreSQL \
             and MySQL this command runs beside brokers",
        )?;
        let purged = Cell::new(None);
        let describe = |entry: &mut Entry| entry.count = purged.get();
        change::audited_in_parts(context, config, "store.purge", describe, |log| {
            let totals = block_on(purge(context, config, before, Some(log)))??;
            purged.set(Some(totals.records + totals.revisions));
            Ok(totals)
        })?
    };
    context.output.fields(vec![
        ("before", json!(before.to_string())),
        ("records", json!(totals.records)),
        ("revisions", json!(totals.revisions)),
        ("changes", json!(totals.changes)),
        ("dry_run", json!(arguments.dry_run)),
    ])
}

/// The retention is a promise to users; a slip on the command line does not break it.
fn days(arguments: &Arguments, settings: &store::Settings) -> Result<u32, Failure> {
    let promised = settings.retention_days;
    match arguments.older_than {
        Some(days) if days < promised => Err(Failure::new(
            Exit::Usage,
            format!(
                "--older-than {days} is less than `store.retention_days`, which is {promised}: what is younger can \
                 still be wanted back; nothing was removed"
            ),
        )
        .hint("if it is to be kept for a shorter time, change the configuration first")),
        Some(days) => Ok(days),
        None => Ok(promised),
    }
}

/// Goes through the database, and with a log removes what is old.
async fn purge(
    context: &Context,
    config: &Config,
    before: Timestamp,
    log: Option<&AuditLog>,
) -> Result<Totals, Failure> {
    let store = store::open_tables(&config.store).await?;
    let result = purge_in(context, &store, before, log).await;
    store.close().await;
    result
}

async fn purge_in(
    context: &Context,
    store: &Arc<dyn Tables>,
    before: Timestamp,
    log: Option<&AuditLog>,
) -> Result<Totals, Failure> {
    let rows = store.count(Table::Revisions).await?;
    let progress = Progress::new(context.output, "looking through revisions", rows);
    let mut work = Purge::new(Arc::clone(store), before);
    let mut totals = Totals::default();
    while let Some(portion) = work.next().await? {
        let (records, revisions) = match log {
            None => (portion.records.len(), count(portion.revisions.len())),
            Some(log) => carry_out(&work, &portion, log).await?,
        };
        totals.records += count(records);
        totals.revisions += revisions;
        progress.advance(portion.seen);
    }
    totals.changes = purge::forget_changes(&**store, before, log.is_none()).await?;
    Ok(totals)
}

/// A record that is gone can never be had back, so each has its own intent and outcome. When the database fails between the
/// two, intents stay without an outcome: what became of them is not known.
async fn carry_out(
    work: &Purge,
    portion: &Portion,
    log: &AuditLog,
) -> Result<(usize, u64), Failure> {
    let calls: Vec<(CallId, &Head)> = portion
        .records
        .iter()
        .map(|head| (CallId::fresh(), head))
        .collect();
    let intents = calls
        .iter()
        .map(|(call, head)| log.append(entry(EntryKind::Intent, Outcome::Ok, *call, head)));
    try_join_all(intents).await?;
    let purged = work.carry_out(portion).await?;
    let outcomes = calls.iter().map(|(call, head)| {
        let outcome = if purged.records.contains(&head.id) {
            Outcome::Ok
        } else {
            Outcome::Failed
        };
        log.append(entry(EntryKind::Outcome, outcome, *call, head))
    });
    try_join_all(outcomes).await?;
    Ok((purged.records.len(), purged.revisions))
}

fn entry(kind: EntryKind, outcome: Outcome, call: CallId, head: &Head) -> Entry {
    let mut entry = change::local_entry(kind, "user_key.purge", outcome, call);
    entry.tenant = Some(head.address.tenant.clone());
    entry.user = Some(head.address.user.clone());
    entry.key_name = Some(head.address.name.clone());
    entry.record_id = Some(head.id);
    entry.revision = Some(head.revision);
    entry
}

fn count(rows: usize) -> u64 {
    u64::try_from(rows).unwrap_or(u64::MAX)
}
