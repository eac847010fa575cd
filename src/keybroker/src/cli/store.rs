//! `keybroker store`.

use clap::Subcommand;
use serde_json::json;

use keybroker_audit::Entry;
use keybroker_broker::acknowledged::accept_restored as accept;
use keybroker_core::{error::chain, state::StateDirectory};
use keybroker_store as store;
use keybroker_store::StoreLock;

use super::{
    Context, block_on, change,
    exit::{Exit, Failure},
    pin::UserPin,
};

mod check;
mod copy;
mod judge;
mod purge;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Bring the database to the schema of this release, making it if need be
    Migrate {
        /// Say what would be done, and do nothing
        #[arg(long)]
        dry_run: bool,
    },
    /// Show the schema of the database
    Status,
    /// Look at every record and revision, and let the token verify each
    Check(UserPin),
    /// Copy everything into another database, of whichever engine, and verify the copy
    Copy(copy::Arguments),
    /// Accept the database as it is, for example after the restore of a backup
    AcceptRestored,
    /// Remove for good what was deleted or superseded longer ago than `store.retention_days`
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

fn status(context: &Context) -> Result<(), Failure> {
    let status = block_on(store::status(&context.config()?.store))??;
    context.output.fields(vec![
        ("schema", json!(status.current)),
        ("schema_of_this_release", json!(status.newest)),
        ("ready", json!(status.current == status.newest)),
    ])
}

/// A broker that runs goes on within a second.
fn accept_restored(context: &Context) -> Result<(), Failure> {
    let config = context.config()?;
    let state = StateDirectory::below(&config.audit.directory);
    let nothing_more = |_: &mut Entry| {};
    let forgotten = change::audited(
        context,
        &config,
        "store.accept_restored",
        nothing_more,
        || {
            accept(&state, &config.audit.instance)
                .map_err(|error| Failure::new(Exit::Store, chain(&error)))
        },
    )?;
    context
        .output
        .fields(vec![("forgotten_call", json!(forgotten))])
}

/// The database for this process alone, where it is a file. The hint is for when another has it.
fn lock(settings: &store::Settings, hint: &str) -> Result<StoreLock, Failure> {
    store::lock(settings).map_err(|error| {
        let failure = Failure::from(error);
        match failure.exit {
            Exit::InUse => failure.hint(hint),
            _ => failure,
        }
    })
}
