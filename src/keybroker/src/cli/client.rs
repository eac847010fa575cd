//! `keybroker client`: calls a running broker with the client library.

use std::time::Duration;

use clap::{Args, Subcommand};
use keybroker_client::{Client, RetryPolicy};

use super::{Context, block_on, exit::Failure, output::Output};

mod api_clients;
mod approvals;
mod arguments;
pub(super) mod connect;
mod control;
mod credential;
mod devices;
mod keys;
pub(super) mod material;
mod recipient;
pub(super) mod refusal;
mod release;
mod rewrap;
pub(super) mod show;

use connect::Connection;
use credential::Credential;

/// Number of connection attempts. If the broker rejects the client's certificate, further attempts
/// only delay the error.
const CONNECTION_ATTEMPTS: u32 = 3;

#[derive(Args, Debug)]
pub(super) struct Arguments {
    #[command(flatten)]
    who: Who,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[command(flatten)]
    Keys(keys::Command),
    #[command(flatten)]
    Control(control::Command),
}

#[derive(Args, Debug)]
pub(super) struct CredentialArguments {
    #[command(flatten)]
    who: Who,
    #[command(subcommand)]
    command: api_clients::Command,
}

#[derive(Args, Debug)]
pub(super) struct RewrapArguments {
    #[command(flatten)]
    who: Who,
    #[command(subcommand)]
    command: rewrap::Command,
}

#[derive(Args, Debug)]
pub(super) struct ApprovalArguments {
    #[command(flatten)]
    who: Who,
    #[command(subcommand)]
    command: approvals::Command,
}

#[derive(Args, Debug)]
pub(super) struct DeviceArguments {
    #[command(flatten)]
    who: Who,
    #[command(subcommand)]
    command: devices::Command,
}

/// The broker to call and the credential to use.
#[derive(Args, Debug)]
pub(super) struct Who {
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    credential: Credential,
}

/// Runs a command of `keybroker client`.
pub(super) fn run(arguments: Arguments, context: &Context) -> Result<(), Failure> {
    if let Command::Keys(command) = &arguments.command {
        command.check()?;
    }
    arguments
        .who
        .call(context.output, async |caller| match arguments.command {
            Command::Keys(command) => caller.keys(command).await,
            Command::Control(command) => caller.control(command).await,
        })
}

/// Runs a command of `keybroker client-credential`.
pub(super) fn run_credentials(
    arguments: CredentialArguments,
    context: &Context,
) -> Result<(), Failure> {
    arguments.command.check()?;
    arguments.who.call(context.output, async |caller| {
        caller.api_clients(arguments.command).await
    })
}

/// Runs a command of `keybroker rewrap`.
pub(super) fn run_rewrap(arguments: RewrapArguments, context: &Context) -> Result<(), Failure> {
    arguments.who.call(context.output, async |caller| {
        caller.rewrap(arguments.command).await
    })
}

/// Runs a command of `keybroker approval`.
pub(super) fn run_approval(arguments: ApprovalArguments, context: &Context) -> Result<(), Failure> {
    arguments.who.call(context.output, async |caller| {
        caller.approvals(arguments.command).await
    })
}

/// Runs a command of `keybroker device`.
pub(super) fn run_device(arguments: DeviceArguments, context: &Context) -> Result<(), Failure> {
    arguments.who.call(context.output, async |caller| {
        caller.devices(arguments.command).await
    })
}

impl Who {
    /// Raises the timeout to at least this value, for a call that takes a long time.
    pub(super) fn at_least(mut self, timeout: Duration) -> Self {
        self.connection.raise_timeout(timeout);
        self
    }

    /// Connects to the broker and makes the calls.
    pub(super) fn call(
        &self,
        output: Output,
        calls: impl AsyncFnOnce(Caller) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let connection = &self.connection;
        let endpoint = connection.named_endpoint()?;
        let retry = RetryPolicy {
            max_connection_attempts: CONNECTION_ATTEMPTS,
            ..RetryPolicy::default()
        };
        let builder = connection.client(&endpoint)?.retry(retry);
        let builder = self.credential.set(builder)?;
        block_on(async {
            let client = connect::build(builder)?;
            connect::connect(&client, &endpoint).await?;
            calls(Caller { client, output }).await
        })?
        .map_err(|failure| {
            let has_certificate = connection.has_certificate();
            refusal::explain(
                refusal::with_timeout(failure, connection.timeout()),
                has_certificate,
                has_certificate || self.credential.is_given(),
            )
        })
    }
}

/// A connected client, and the output for its answers.
pub(super) struct Caller {
    pub(super) client: Client,
    pub(super) output: Output,
}
