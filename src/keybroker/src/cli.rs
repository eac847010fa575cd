//! The command line.

use std::{
    num::NonZero,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::Duration,
};

use clap::{Parser, Subcommand};

use crate::{
    config::{Config, SelectionError},
    telemetry,
};
use keybroker_core::{error::chain, hardening};
use keybroker_pkcs11 as pkcs11;
use keybroker_worker_protocol::check_environment;
use tokio::runtime::Runtime;

mod admins;
mod audit;
mod bench;
mod bench_report;
mod bitwarden;
mod ceremony;
mod change;
mod client;
mod config;
mod confirm;
mod entries;
mod environment;
pub mod exit;
mod interrupt;
mod key;
mod manual;
mod output;
mod pin;
mod policy;
mod probe;
mod progress;
mod secrets;
mod serve;
mod signals;
mod store;
#[cfg(test)]
mod tests;
mod token;

use exit::{Exit, Failure};
use output::{Format, Output};

/// Log filter of commands. A command reports a failed connection itself, so the TLS libraries log nothing.
const COMMAND_LOG: &str = "error,rustls=off,rustls_platform_verifier=off";
const CONFIG_DEFAULT: &str = "/etc/keybroker/keybroker.toml";

/// The executable of this process, from which workers are started. The link refers to the running
/// executable even after an upgrade replaced the file, so workers always have the version of this
/// process.
const OWN_PROGRAM: &str = "/proc/self/exe";

/// Keep users' keys wrapped under a key in an HSM, and release them to authorised callers.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    /// Configuration file
    #[arg(long, global = true, env = "KEYBROKER_CONFIG", default_value = CONFIG_DEFAULT, value_name = "FILE")]
    config: PathBuf,
    /// Format of results
    #[arg(short, long, global = true, default_value = "table")]
    output: Format,
    /// Name of the token to use; required if the configuration has several tokens and the command
    /// uses only one
    #[arg(long, global = true, value_name = "NAME")]
    token: Option<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the broker
    Serve(serve::Arguments),
    /// List, initialise and check tokens
    #[command(subcommand)]
    Token(token::Command),
    /// Manage wrapping keys on the token and in the registry
    #[command(subcommand)]
    Key(key::Command),
    /// Manage the database
    #[command(subcommand)]
    Store(store::Command),
    /// Check and show the configuration
    #[command(subcommand)]
    Config(config::Command),
    /// Check and explain policies
    #[command(subcommand)]
    Policy(policy::Command),
    /// Verify, show and maintain the audit log, with or without a running broker
    #[command(subcommand)]
    Audit(audit::Command),
    /// Call a running broker
    Client(client::Arguments),
    /// Manage API clients (services with an id and a secret) through a running broker
    ClientCredential(client::CredentialArguments),
    /// Move rows to the active wrapping key, through a running broker
    Rewrap(client::RewrapArguments),
    /// List, approve and reject the changes that a second person must approve, through a running broker
    Approval(client::ApprovalArguments),
    /// List devices and requests for access, and decide about them, through a running broker
    Device(client::DeviceArguments),
    /// Run a key ceremony with custodians, and verify its transcript
    #[command(subcommand)]
    Ceremony(ceremony::Command),
    /// Perform the key operations of a Bitwarden client, to rehearse and support a migration
    #[command(subcommand)]
    Bitwarden(bitwarden::Command),
    /// Measure the broker's performance with the configured token, under one of several kinds of
    /// load
    Bench(Box<bench::Arguments>),
    /// Draw charts and write tables from the JSON files of `bench`
    BenchReport(bench_report::Arguments),
    /// Check the local broker's health (for container health checks)
    Probe(probe::Arguments),
    /// Print the completion script for a shell
    Completions(manual::Completions),
    /// Write the manual pages
    Man(manual::Manual),
    /// Run a token worker (started by `serve`)
    #[command(hide = true)]
    TokenWorker,
    /// Run an admin worker (started by other commands)
    #[command(hide = true)]
    TokenAdminWorker,
}

/// The global options, which every command receives.
#[derive(Debug)]
struct Context {
    config_file: PathBuf,
    output: Output,
    /// The value of `--token`.
    token: Option<String>,
}

impl Context {
    /// Reads and checks the configuration.
    fn config(&self) -> Result<Config, Failure> {
        let config = self.config_as_written()?;
        let problems = config.problems_for_commands();
        if problems.is_empty() {
            return Ok(config);
        }
        Err(self.bad_config(&problems))
    }

    /// Reads the configuration without checking it, for commands that report its problems themselves.
    fn config_as_written(&self) -> Result<Config, Failure> {
        Config::load(&self.config_file).map_err(|error| Failure {
            hint: error.hint(),
            ..Failure::new(Exit::Configuration, chain(&error))
        })
    }

    /// Reads and checks the configuration for a command that starts an admin worker. Selects the
    /// token of the command.
    fn config_for_token(&self) -> Result<Config, Failure> {
        let mut config = self.config()?;
        config.select_token(self.token.as_deref())?;
        check_environment(&config.token().environment)
            .map_err(|error| Failure::new(Exit::Configuration, error.to_string()))?;
        Ok(config)
    }

    /// Reads and checks the configuration for a command that starts admin workers for several
    /// tokens. Selects the token that `--token` names, if the option is set.
    fn config_for_tokens(&self) -> Result<Config, Failure> {
        let mut config = self.config()?;
        if self.token.is_some() {
            config.select_token(self.token.as_deref())?;
        }
        for token in config.tokens.all() {
            check_environment(&token.environment)
                .map_err(|error| Failure::new(Exit::Configuration, error.to_string()))?;
        }
        Ok(config)
    }

    /// A failure that lists all problems of the configuration.
    fn bad_config(&self, problems: &[String]) -> Failure {
        let (file, list) = (self.config_file.display(), problems.join("\n  "));
        Failure::new(Exit::Configuration, format!("{file}:\n  {list}")).hint(
            "keybroker.example.toml explains every setting; run `keybroker config check` after a correction",
        )
    }

    fn config_file(&self) -> &Path {
        &self.config_file
    }
}

impl From<SelectionError> for Failure {
    fn from(error: SelectionError) -> Self {
        Self::new(Exit::Usage, error.to_string())
    }
}

/// Runs the command that the arguments select and returns the exit code of the process.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let context = Context {
        config_file: cli.config,
        output: Output::new(cli.output),
        token: cli.token,
    };
    if let Err(error) = hardening::harden() {
        return finish(&context, Err(Failure::new(Exit::Internal, chain(&error))));
    }
    // If the process contains two crypto providers and none is installed as the default, rustls
    // panics at its first use.
    let _installed_before = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let is_service = matches!(cli.command, Command::TokenWorker | Command::Serve(_));
    telemetry::init_logs(is_service, if is_service { "info" } else { COMMAND_LOG });
    telemetry::install_panic_hook();
    match cli.command {
        Command::TokenWorker => return pkcs11::worker::run(),
        Command::TokenAdminWorker => return pkcs11::admin_worker::run(),
        _ => {}
    }
    // `serve` and `bench` handle signals themselves, because they have a broker to stop.
    if !matches!(cli.command, Command::Serve(_) | Command::Bench(_))
        && let Err(failure) = interrupt::watch(context.output)
    {
        return finish(&context, Err(failure));
    }
    let result = without_panic(|| run(cli.command, &context));
    finish(&context, result)
}

/// Turns a panic into a failure with the exit code for internal errors. The panic hook logs the
/// source location without the panic message.
fn without_panic(work: impl FnOnce() -> Result<(), Failure>) -> Result<(), Failure> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        let what = "internal error in keybroker; the line above shows the source location";
        Err(Failure::new(Exit::Internal, what)
            .hint("report the error with the line that shows the source location, and with the output of `keybroker --version`"))
    })
}

fn run(command: Command, context: &Context) -> Result<(), Failure> {
    match command {
        Command::Serve(arguments) => serve::run(arguments, context),
        Command::Token(command) => token::run(command, context),
        Command::Key(command) => key::run(command, context),
        Command::Store(command) => store::run(&command, context),
        Command::Config(command) => config::run(&command, context),
        Command::Policy(command) => policy::run(&command, context),
        Command::Audit(command) => audit::run(&command, context),
        Command::Client(arguments) => client::run(arguments, context),
        Command::ClientCredential(arguments) => client::run_credentials(arguments, context),
        Command::Rewrap(arguments) => client::run_rewrap(arguments, context),
        Command::Approval(arguments) => client::run_approval(arguments, context),
        Command::Device(arguments) => client::run_device(arguments, context),
        Command::Ceremony(command) => ceremony::run(command, context),
        Command::Bitwarden(command) => bitwarden::run(command, context),
        Command::Bench(arguments) => bench::run(&arguments, context),
        Command::BenchReport(arguments) => bench_report::run(&arguments, context),
        Command::Probe(arguments) => probe::run(&arguments, context),
        Command::Completions(arguments) => manual::completions(&arguments, context),
        Command::Man(arguments) => manual::manual(&arguments, context),
        Command::TokenWorker | Command::TokenAdminWorker => {
            Err(Failure::new(Exit::Usage, "handled before"))
        }
    }
}

fn finish(context: &Context, result: Result<(), Failure>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            context.output.failure(&failure);
            ExitCode::from(failure.exit.code())
        }
    }
}

/// How long a thread for blocking work waits for more work before it ends. The runtime gives work to these threads in turn, so with
/// the default of ten seconds, little regular work would keep all threads of a short peak.
const BLOCKING_THREAD_KEPT: Duration = Duration::from_secs(1);

/// Returns a new runtime with one thread for every two cores. The workers need the other cores, and fewer threads mean fewer wake-ups
/// for each call.
fn runtime() -> Result<Runtime, Failure> {
    let cores = thread::available_parallelism().map_or(1, NonZero::get);
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(cores.div_ceil(2))
        .thread_keep_alive(BLOCKING_THREAD_KEPT)
        .enable_all()
        .build()
        .map_err(|error| {
            Failure::new(
                Exit::Internal,
                format!("cannot start the async runtime: {error}"),
            )
        })
}

fn block_on<T>(work: impl Future<Output = T>) -> Result<T, Failure> {
    Ok(runtime()?.block_on(work))
}
