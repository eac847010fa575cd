//! `keybroker serve`: runs the broker.

use std::path::PathBuf;

use clap::Args;

use crate::server;

use super::{Context, OWN_PROGRAM, block_on, exit::Failure};

#[derive(Args, Debug)]
pub(super) struct Arguments {
    /// File to which the addresses of the listeners are written as JSON, once the listeners accept
    /// connections
    #[arg(long, value_name = "FILE")]
    ready_file: Option<PathBuf>,
}

pub(super) fn run(arguments: Arguments, context: &Context) -> Result<(), Failure> {
    let config = context.config_as_written()?;
    let problems = config.problems();
    if !problems.is_empty() {
        return Err(context.bad_config(&problems));
    }
    // If loading the policies fails here, `server::run` reports the error later.
    for remark in config.unknown_principals().into_iter().flatten() {
        tracing::warn!(%remark, "a policy refers to a principal that the configuration does not define");
    }
    for remark in config.policy.ignored_files() {
        tracing::warn!(%remark, "a file in the policy directory is ignored");
    }
    block_on(server::run(
        config,
        context.config_file().to_owned(),
        OWN_PROGRAM.into(),
        arguments.ready_file,
    ))?
}
