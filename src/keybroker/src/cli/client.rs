//! `keybroker client`: a gRPC client like any other.

use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use tonic::{
    Request, Response, Status,
    metadata::{Ascii, MetadataValue},
    transport::Channel,
};

use super::{Context, block_on, exit::Failure, output::Output};

mod api_clients;
pub(super) mod connect;
mod control;
mod credential;
mod keys;
pub(super) mod material;
pub(super) mod refusal;
mod release;
mod retry;
mod show;

use connect::Connection;
use credential::Credential;
use retry::Retry;

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

/// The broker to call and the credential to use.
#[derive(Args, Debug)]
struct Who {
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    credential: Credential,
}

/// `keybroker client`.
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

/// `keybroker client-credential`.
pub(super) fn run_credentials(
    arguments: CredentialArguments,
    context: &Context,
) -> Result<(), Failure> {
    arguments.command.check()?;
    arguments.who.call(context.output, async |caller| {
        caller.api_clients(arguments.command).await
    })
}

impl Who {
    /// Connects, and calls.
    fn call(
        &self,
        output: Output,
        calls: impl AsyncFnOnce(Caller) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let connection = &self.connection;
        let endpoint = connection.endpoint(&connection.named_endpoint()?)?;
        let authorization = self.credential.authorization()?;
        let timeout = connection.timeout();
        block_on(async {
            calls(Caller {
                channel: connect::connect(&endpoint, timeout).await?,
                authorization,
                timeout,
                output,
            })
            .await
        })?
        .map_err(|failure| refusal::explain_closed(failure, connection.has_certificate()))
    }
}

/// What a call shows instead of the certificate of its connection.
type Authorization = MetadataValue<Ascii>;

/// How calls are made and their answers shown.
struct Caller {
    channel: Channel,
    authorization: Option<Authorization>,
    timeout: Duration,
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

    /// Calls by the retry rule, for calls that may be repeated: those that change nothing, and changes with a request id. The
    /// time that the person set is for all attempts.
    async fn retried<M: Clone, T>(
        &self,
        message: M,
        mut call: impl AsyncFnMut(Request<M>) -> Result<Response<T>, Status>,
    ) -> Result<T, Failure> {
        let begun = Instant::now();
        let mut retry = Retry::begin(self.timeout);
        loop {
            let mut request = self.request(message.clone());
            request.set_timeout(self.timeout.saturating_sub(begun.elapsed()));
            let status = match call(request).await {
                Ok(answer) => return Ok(answer.into_inner()),
                Err(status) => status,
            };
            match retry.pause(&status) {
                Some(pause) => tokio::time::sleep(pause).await,
                None => return Err(refusal::failure(&status)),
            }
        }
    }
}

/// The message of an answer, or the failure that its status stands for.
async fn answer<T>(call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, Failure> {
    call.await
        .map(Response::into_inner)
        .map_err(|status| refusal::failure(&status))
}
