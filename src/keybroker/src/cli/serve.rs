//! `keybroker serve`.

use std::path::PathBuf;

use clap::Args;

use crate::server;

use super::{Context, OWN_PROGRAM, block_on, exit::Failure};

#[derive(Args, Debug)]
pub(super) struct Arguments {
    /// Write the addresses that were bound, as JSON, to this file once the doors are open
    #[arg(long, value_name = "FILE")]
    ready_file: Option<PathBuf>,
}

pub(super) fn run(arguments: Arguments, context: &Context) -> Result<(), Failure> {
    let config = context.config_as_written()?;
    let problems = config.problems();
    if !problems.is_empty() {
        return Err(context.bad_config(&problems));
    }
    block_on(server::run(
        config,
        OWN_PROGRAM.into(),
        arguments.ready_file,
    ))?
}
