//! `keybroker client`: a gRPC client like any other.

use clap::{Args, Subcommand};
use tonic::{
    Request, Response, Status,
    metadata::{Ascii, MetadataValue},
    transport::Channel,
};

use super::{Context, block_on, exit::Failure, output::Output};

pub(super) mod connect;
mod control;
mod credential;
mod keys;
pub(super) mod material;
pub(super) mod refusal;
mod release;
mod show;

pub(super) use credential::Credential;

use connect::Connection;

#[derive(Args, Debug)]
pub(super) struct Arguments {
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    credential: Credential,
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

pub(super) fn run(arguments: Arguments, context: &Context) -> Result<(), Failure> {
    let connection = arguments.connection;
    let endpoint = connection.endpoint(&connection.named_endpoint()?)?;
    if let Command::Keys(command) = &arguments.command {
        command.check()?;
    }
    let authorization = arguments.credential.authorization()?;
    let timeout = connection.timeout();
    block_on(async {
        let caller = Caller {
            channel: connect::connect(&endpoint, timeout).await?,
            authorization,
            timeout,
            output: context.output,
        };
        match arguments.command {
            Command::Keys(command) => caller.keys(command).await,
            Command::Control(command) => caller.control(command).await,
        }
    })?
}

/// What a call shows instead of the certificate of its connection.
type Authorization = MetadataValue<Ascii>;

/// How calls are made and their answers shown.
struct Caller {
    channel: Channel,
    authorization: Option<Authorization>,
    timeout: std::time::Duration,
    output: Output,
}

impl Caller {
    /// A request with the deadline and the credential that the person set.
    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.timeout);
        if let Some(authorization) = &self.authorization {
            let metadata = request.metadata_mut();
            metadata.insert("authorization", authorization.clone());
        }
        request
    }
}

/// The message of an answer, or what its absence means.
async fn answer<T>(call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, Failure> {
    call.await
        .map(Response::into_inner)
        .map_err(|status| refusal::failure(&status))
}
