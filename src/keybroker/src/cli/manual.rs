//! `keybroker completions` and `keybroker man`: write completion scripts and manual pages that are
//! generated from the command definitions.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use clap::{Args, Command, CommandFactory as _};
use clap_complete::Shell;

use super::{
    Cli, Context,
    exit::{Exit, Failure},
};

const NAME: &str = "keybroker";

#[derive(Args, Debug)]
pub(super) struct Completions {
    /// Shell for which to print the script
    shell: Shell,
}

#[derive(Args, Debug)]
pub(super) struct Manual {
    /// Directory for the manual pages, one page for each command; created if missing
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Writes the completion script to standard output.
pub(super) fn completions(arguments: &Completions, context: &Context) -> Result<(), Failure> {
    context.output.bytes(&script(arguments.shell))
}

/// Returns the completion script for a shell.
pub(super) fn script(shell: Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut visible(&Cli::command()), NAME, &mut script);
    script
}

/// Returns the command without its hidden subcommands, because the generators of completion scripts
/// would include them.
fn visible(command: &Command) -> Command {
    Command::new(command.get_name().to_owned())
        .about(command.get_about().cloned().unwrap_or_default())
        .args(command.get_arguments().filter(|a| !a.is_hide_set()))
        .subcommands(
            command
                .get_subcommands()
                .filter(|inner| !inner.is_hide_set())
                .map(visible),
        )
}

/// Writes the manual pages: `keybroker.1`, and one page for each visible command.
pub(super) fn manual(arguments: &Manual, context: &Context) -> Result<(), Failure> {
    let folder = &arguments.out;
    write_pages(folder).map_err(|error| {
        let what = format!(
            "cannot write the manual pages to {}: {error}",
            folder.display()
        );
        Failure::new(Exit::Usage, what)
    })?;
    let first = folder.join("keybroker.1");
    context
        .output
        .note(&format!("read the pages with `man -l {}`", first.display()));
    Ok(())
}

pub(super) fn write_pages(folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    clap_mangen::generate_to(Cli::command(), folder)
}
