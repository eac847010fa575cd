//! `keybroker store`: manages the database.

use clap::Subcommand;
use serde_json::json;

use keybroker_audit::Entry;
use keybroker_broker::acknowledged::{Acceptance, accept_restored as accept};
use keybroker_core::state::StateDirectory;
use keybroker_store as store;
use keybroker_store::{KnownLog, StoreLock};

use crate::config::Config;

use super::{
    Context, block_on, change,
    exit::{Exit, Failure},
    pin::UserPin,
};

mod check;
mod copy;
mod purge;
mod row_check;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Migrate the database to the schema of this release; a missing SQLite database is created
    Migrate {
        /// Show the pending migrations without running them
        #[arg(long)]
        dry_run: bool,
    },
    /// Show the schema version of the database and the schema version of this release
    Status,
    /// Check every row of the database, and verify the row MACs with the token
    ///
    /// The command changes nothing and can run while a broker serves. The command fails with exit code 12 if a row is damaged.
    Check(UserPin),
    /// Copy all rows to another database, which may use another engine, and verify the copy
    ///
    /// Before you run this command, stop every broker that uses either database. If the copy is interrupted, run the command
    /// again.
    Copy(Box<copy::Arguments>),
    /// Accept the current state of the database, for example after you restored a backup
    ///
    /// The broker remembers the changes that it confirmed to callers, and does not use a database
    /// without these changes. Run this command only if you intended the restore.
    AcceptRestored,
    /// Permanently remove records and revisions that were deleted or superseded more than `store.retention_days` ago
    Purge(purge::Arguments),
}

pub(super) fn run(command: &Command, context: &Context) -> Result<(), Failure> {
    match command {
        Command::Migrate { dry_run } => migrate(*dry_run, context),
        Command::Status => status(context),
        Command::Check(pin) => check::run(pin, context),
        Command::Copy(arguments) => copy::run(arguments, context),
        Command::AcceptRestored => accept_restored(context),
        Command::Purge(arguments) => purge::run(arguments, context),
    }
}

fn migrate(dry_run: bool, context: &Context) -> Result<(), Failure> {
    let config = context.config()?;
    let migrate =
        || -> Result<_, Failure> { Ok(block_on(store::migrate(&config.store, dry_run))??) };
    let report = if dry_run {
        migrate()?
    } else {
        require_own_log(&config)?;
        let nothing_more = |_: &mut Entry| {};
        change::audited(context, &config, "store.migrate", nothing_more, migrate)?
    };
    let (schema, list) = if dry_run {
        (report.before, "pending")
    } else {
        (report.newest, "applied")
    };
    context.output.fields(vec![
        ("schema_before", json!(report.before)),
        ("schema", json!(schema)),
        (list, json!(report.pending.join(", "))),
    ])
}

/// Rejects a database that was used with another audit log of this instance, as a broker does at
/// its start. A database that was used with another audit log may belong to another broker, and a
/// migration cannot be undone.
fn require_own_log(config: &Config) -> Result<(), Failure> {
    let log = config.audit.examine_instance()?;
    let id = log.id().unwrap_or_default();
    let known = block_on(store::known_audit_log(
        &config.store,
        &config.audit.instance,
        id,
    ))??;
    if known == KnownLog::Another && log.is_binding_required() {
        return Err(log.refuse_unknown().into());
    }
    Ok(())
}

fn status(context: &Context) -> Result<(), Failure> {
    let status = block_on(store::status(&context.config()?.store))??;
    context.output.fields(vec![
        ("schema", json!(status.current)),
        ("schema_of_this_release", json!(status.newest)),
        ("ready", json!(status.is_usable)),
    ])
}

/// Accepts the database in its current state. A running broker that rejected the database accepts
/// it within a second.
fn accept_restored(context: &Context) -> Result<(), Failure> {
    let config = context.config()?;
    let state = StateDirectory::below(&config.audit.directory);
    let nothing_more = |_: &mut Entry| {};
    let accept = async {
        let store = store::open(&config.store).await?;
        let accepted = accept(&state, &config.audit.instance, &*store).await;
        store.close().await;
        Ok::<_, Failure>(accepted?)
    };
    let acceptance = change::audited(
        context,
        &config,
        "store.accept_restored",
        nothing_more,
        || block_on(accept)?,
    )?;
    let is_registry = acceptance == Acceptance::Registry;
    let (accepted, forgotten) = match acceptance {
        Acceptance::AlreadyKnown => (false, None),
        Acceptance::Registry => (true, None),
        Acceptance::Accepted { forgotten } => (true, forgotten),
    };
    context.output.fields(vec![
        ("accepted", json!(accepted)),
        ("forgotten_call", json!(forgotten)),
    ])?;
    if !accepted {
        context
            .output
            .note("the broker already accepts this database; nothing was changed");
    }
    if is_registry {
        context.output.note(
            "the record of later rows of the wrapping-key registry was removed from the state directory; restart a running \
             broker, so that it accepts the current rows",
        );
    }
    Ok(())
}

/// Locks the database for this process, if the database is a file. If another process holds the
/// lock, returns a failure with the given hint.
fn lock(settings: &store::Settings, hint: &str) -> Result<StoreLock, Failure> {
    store::lock(settings).map_err(|error| {
        let failure = Failure::from(error);
        match failure.exit {
            Exit::InUse => failure.hint(hint),
            _ => failure,
        }
    })
}
