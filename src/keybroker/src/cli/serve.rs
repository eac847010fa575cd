//! `keybroker serve`.

use std::path::PathBuf;

use clap::Args;

use crate::{allocator, server};

use super::{Context, block_on, exit::Failure};

/// The file that this process runs, for a child that it starts. Not the path it had: after an upgrade another version lies
/// there, and workers must be of the same.
const OURSELVES: &str = "/proc/self/exe";

#[derive(Args, Debug)]
pub(super) struct Arguments {
    /// Write the addresses that were bound, as JSON, to this file once the listeners accept connections
    #[arg(long, value_name = "FILE")]
    ready_file: Option<PathBuf>,
}

pub(super) fn run(arguments: Arguments, context: &Context) -> Result<(), Failure> {
    if let Err(error) = allocator::apply() {
        tracing::warn!(%error, "the allocator keeps its default settings; memory is returned later than it could be");
    }
    let config = context.config_as_written()?;
    let problems = config.problems();
    if !problems.is_empty() {
        return Err(context.bad_config(&problems));
    }
    // A set that cannot be loaded stops the start below.
    for remark in config.unknown_principals().into_iter().flatten() {
        tracing::warn!(%remark, "a policy names a principal that the configuration does not know");
    }
    block_on(server::run(config, OURSELVES.into(), arguments.ready_file))?
}
