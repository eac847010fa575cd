//! `keybroker serve`.

use std::path::PathBuf;

use clap::Args;

use crate::server;

use super::{
    Context, block_on,
    exit::{Exit, Failure},
};

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
    let program = std::env::current_exe()
        .map_err(|error| Failure::new(Exit::Internal, format!("no path of our own: {error}")))?;
    block_on(server::run(config, program, arguments.ready_file))?
}
