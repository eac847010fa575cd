//! `keybroker store`.

use clap::Subcommand;
use serde_json::json;

use crate::{
    audit::Entry,
    store::{self, StoreLock},
};

use super::{
    Context, block_on, change,
    exit::{Exit, Failure},
};

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
    /// Remove for good what was deleted or superseded longer ago than `store.retention_days`
    Purge(purge::Arguments),
}

pub(super) fn run(command: &Command, context: &Context) -> Result<(), Failure> {
    let config = context.config()?;
    match command {
        Command::Migrate { dry_run } => {
            let migrate = || -> Result<_, Failure> {
                Ok(block_on(store::migrate(&config.store, *dry_run))??)
            };
            let report = if *dry_run {
                migrate()?
            } else {
                change::audited(
                    context,
                    &config,
                    "store.migrate",
                    |_: &mut Entry| {},
                    migrate,
                )?
            };
            context.output.fields(vec![
                ("schema_before", json!(report.before)),
                (
                    "schema",
                    json!(if *dry_run {
                        report.before
                    } else {
                        report.newest
                    }),
                ),
                (
                    if *dry_run { "pending" } else { "applied" },
                    json!(report.pending.join(", ")),
                ),
            ])
        }
        Command::Purge(arguments) => purge::run(arguments, context, &config),
        Command::Status => {
            let status = block_on(store::status(&config.store))??;
            context.output.fields(vec![
                ("schema", json!(status.current)),
                ("schema_of_this_release", json!(status.newest)),
                ("ready", json!(status.current == status.newest)),
            ])
        }
    }
}

/// The database for this process alone, where it is a file.
fn lock(settings: &store::Settings) -> Result<StoreLock, Failure> {
    store::lock(settings).map_err(|error| {
        let failure = Failure::from(error);
        if failure.exit != Exit::InUse {
            return failure;
        }
        failure.hint(
            "a SQLite file belongs to one process: stop the broker, run this again, start the broker; on PostgreSQL \
             and MySQL this command runs beside brokers",
        )
    })
}
