//! `keybroker bitwarden`: what a Bitwarden client does with its keys and with a Key Connector, step by step, so that a
//! migration can be rehearsed and supported.

use clap::Subcommand;

use super::{Context, block_on, exit::Failure, output::Field};

mod account;
mod connector;
mod derive;
mod holder;
mod keys;
mod refusal;
mod secrets;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Derive the master key of an account from its password
    Derive(derive::Derive),
    /// Store a user's master key at the broker, as a client does when it migrates
    Enrol(keys::Enrol),
    /// Fetch the key of the token's user from the broker
    Fetch(keys::Fetch),
    /// Open a protected user key, and optionally an item, with the key that the broker keeps
    Unlock(keys::Unlock),
    /// Protect a user key with the master key of another KDF; the user key stays the same
    ChangeKdf(derive::ChangeKdf),
}

pub(super) fn run(command: Command, context: &Context) -> Result<(), Failure> {
    let output = context.output;
    match command {
        Command::Derive(derive) => derive.run(output),
        Command::ChangeKdf(change) => change.run(output),
        Command::Enrol(enrol) => block_on(enrol.run(output))?,
        Command::Fetch(fetch) => block_on(fetch.run(output))?,
        Command::Unlock(unlock) => block_on(unlock.run(output))?,
    }
}

fn field(name: &'static str, value: impl Into<serde_json::Value>) -> Field {
    (name, value.into())
}
