//! `keybroker bitwarden`: performs the key operations of a Bitwarden client, including those with a
//! Key Connector, to rehearse and support a migration.

use clap::Subcommand;

use super::{Context, block_on, exit::Failure, output::Field};

mod account;
mod approvals;
mod connector;
mod derive;
mod holder;
mod http;
mod keys;
mod refusal;
mod secrets;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Derive the master key of an account from its password
    Derive(derive::Derive),
    /// Store a user's master key in the broker, as a Bitwarden client does during a migration
    Enrol(keys::Enrol),
    /// Fetch a user's master key from the broker; the access token identifies the user
    Fetch(keys::Fetch),
    /// Decrypt a protected user key, and optionally an item, with the master key from the broker
    Unlock(keys::Unlock),
    /// Protect a user key with the master key that another KDF derives; the user key itself does
    /// not change
    ChangeKdf(derive::ChangeKdf),
    /// Approve the new devices of an organisation whose members sign in without a master password
    #[command(subcommand)]
    Approvals(approvals::Command),
}

pub(super) fn run(command: Command, context: &Context) -> Result<(), Failure> {
    let output = context.output;
    match command {
        Command::Derive(derive) => derive.run(output),
        Command::ChangeKdf(change) => change.run(output),
        Command::Enrol(enrol) => block_on(enrol.run(output))?,
        Command::Fetch(fetch) => block_on(fetch.run(output))?,
        Command::Unlock(unlock) => block_on(unlock.run(output))?,
        Command::Approvals(command) => approvals::run(command, context),
    }
}

fn field(name: &'static str, value: impl Into<serde_json::Value>) -> Field {
    (name, value.into())
}
