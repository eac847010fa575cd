//! `keybroker config`.

use clap::Subcommand;

use super::{
    Context,
    exit::{Exit, Failure},
};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Report everything that is wrong with the configuration, and with the files it names
    Check,
    /// Show the configuration with every default filled in; it names files, and holds no secret
    Show,
}

pub(super) fn run(command: &Command, context: &Context) -> Result<(), Failure> {
    let config = context.config_as_written()?;
    match command {
        Command::Check => {
            let mut problems = config.problems();
            let files = config.examine_files();
            problems.extend(files.problems);
            for note in &files.notes {
                context.output.note(note);
            }
            if problems.is_empty() {
                let good = "the configuration is good";
                return context.output.sentence("verdict", good);
            }
            Err(context.bad_config(&problems))
        }
        Command::Show if context.output.is_json() => {
            let value = serde_json::to_value(&config)
                .map_err(|error| Failure::new(Exit::Internal, error.to_string()))?;
            context.output.json(&value)
        }
        Command::Show => {
            let text = toml::to_string(&config)
                .map_err(|error| Failure::new(Exit::Internal, error.to_string()))?;
            context.output.text(text.trim_end())
        }
    }
}
