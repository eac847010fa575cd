//! `keybroker config`.

use std::path::Path;

use clap::Subcommand;

use crate::config::Config;

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
    let config = context.config()?;
    match command {
        Command::Check => {
            let mut problems = config.problems();
            problems.extend(missing_files(&config));
            if problems.is_empty() {
                return context.output.text("the configuration is good");
            }
            let what = format!(
                "{}:\n  {}",
                context.config_file().display(),
                problems.join("\n  ")
            );
            Err(Failure::new(Exit::Configuration, what))
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

fn missing_files(config: &Config) -> Vec<String> {
    let mut problems = Vec::new();
    let mut need = |name: &str, path: &Path| {
        if !path.is_file() {
            problems.push(format!("{name}: there is no file {}", path.display()));
        }
    };
    need("[token] `module`", &config.token.module);
    for listener in &config.listeners {
        let name = format!("[[listener]] {}", listener.address);
        need(&name, &listener.tls.certificate_file);
        need(&name, &listener.tls.key_file);
        if let Some(path) = &listener.tls.client_ca_file {
            need(&name, path);
        }
    }
    if let Some(path) = &config.token.pin_file
        && let Err(what) = crate::hsm::Pin::from_file(path)
    {
        problems.push(what);
    }
    problems
}
