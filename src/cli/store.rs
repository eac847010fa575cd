//! `keybroker store`.

use clap::Subcommand;
use serde_json::json;

use crate::{audit::Entry, store};

use super::{Context, block_on, change, exit::Failure};

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
