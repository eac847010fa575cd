//! The sources of a PIN for a command: a file, a descriptor or a prompt. A PIN is never a command-line argument.

use std::{
    collections::BTreeSet,
    io::IsTerminal as _,
    path::{Path, PathBuf},
};

use clap::Args;

use crate::config::Config;
use keybroker_core::{key::WrappingKeyState, state::StateDirectory};
use keybroker_hsm::admin::Admin;
use keybroker_store::RegistryRow;
use keybroker_worker_protocol::{Pin, PinSource, Settings};

use super::{
    OWN_PROGRAM, environment,
    exit::{Exit, Failure},
};

/// Options that select another source of the user PIN than `token.pin_file`.
#[derive(Args, Clone, Debug)]
#[expect(clippy::struct_field_names, reason = "the fields name the options")]
pub(super) struct UserPin {
    /// File with the user PIN, readable only by its owner [default: `token.pin_file`]
    #[arg(long, value_name = "FILE", conflicts_with = "pin_fd")]
    pin_file: Option<PathBuf>,
    /// Number of an open file descriptor to read the user PIN from
    #[arg(long, value_name = "N")]
    pin_fd: Option<u32>,
    /// Prompt for the user PIN at the terminal
    #[arg(long, conflicts_with_all = ["pin_fd", "pin_file"])]
    pin_prompt: bool,
}

impl UserPin {
    /// Whether an option selects a source of the PIN.
    pub(super) fn is_given(&self) -> bool {
        self.pin_file.is_some() || self.pin_fd.is_some() || self.pin_prompt
    }

    pub(super) fn get(&self, settings: &Settings) -> Result<PinSource, Failure> {
        let file = if self.pin_prompt {
            None
        } else {
            check_option("--pin-file", self.pin_file.as_deref())?;
            self.pin_file.as_ref().or(settings.pin_file.as_ref())
        };
        let is_given = file.is_some() || self.pin_fd.is_some() || self.pin_prompt;
        if !is_given && settings.is_without_login() {
            return Ok(PinSource::NotNeeded);
        }
        read(file, self.pin_fd, "User PIN: ")
    }
}

/// Options that select the source of the security officer's PIN.
#[derive(Args, Clone, Debug)]
pub(super) struct SoPin {
    /// File with the security officer's PIN, readable only by its owner
    #[arg(long, value_name = "FILE", conflicts_with = "so_pin_fd")]
    so_pin_file: Option<PathBuf>,
    /// Number of an open file descriptor to read the security officer's PIN from
    #[arg(long, value_name = "N")]
    so_pin_fd: Option<u32>,
}

impl SoPin {
    pub(super) fn get(&self) -> Result<PinSource, Failure> {
        check_option("--so-pin-file", self.so_pin_file.as_deref())?;
        let prompt = "Security officer PIN: ";
        read(self.so_pin_file.as_ref(), self.so_pin_fd, prompt)
    }
}

/// The state directory of this instance. Commands and the workers of `serve` share the record of
/// PINs in the state directory.
pub(super) fn state(config: &Config) -> StateDirectory {
    StateDirectory::below(&config.audit.directory)
}

/// Logs in to the configured token in an admin worker, if the record of PINs permits the login. If
/// several tokens match the settings, the command uses the token whose serial number is in the
/// registry, as `serve` does.
pub(super) fn log_in(
    config: &Config,
    pin: &PinSource,
    write: bool,
    serials: &[&str],
) -> Result<Admin, Failure> {
    let program = Path::new(OWN_PROGRAM);
    Admin::open(program, config.token(), &state(config), pin, write, serials)
        .map_err(|error| environment::explain(error, config))
}

/// The different serial numbers of the tokens that have the registered keys.
pub(super) fn serials(registry: &[RegistryRow]) -> Vec<&str> {
    let held = registry
        .iter()
        .filter(|row| row.state != WrappingKeyState::Destroyed)
        .map(|row| row.token_serial.as_str());
    held.collect::<BTreeSet<_>>().into_iter().collect()
}

/// Checks a PIN file that an option names. The error message contains the option, to distinguish
/// this file from the PIN file in the configuration.
fn check_option(option: &str, file: Option<&Path>) -> Result<(), Failure> {
    let checked = file.map_or(Ok(()), Pin::check_file);
    checked.map_err(|error| Failure::new(Exit::Pin, format!("{option}: {error}")))
}

fn read(
    file: Option<&PathBuf>,
    descriptor: Option<u32>,
    prompt: &str,
) -> Result<PinSource, Failure> {
    let no_pin = |what: String| Failure::new(Exit::Pin, what);
    let pin = match (descriptor, file) {
        (Some(number), _) => Pin::from_descriptor(number),
        (None, Some(path)) => return Ok(PinSource::File(path.clone())),
        (None, None) if std::io::stdin().is_terminal() => {
            let typed = rpassword::prompt_password(prompt)
                .map_err(|error| no_pin(format!("cannot read the PIN: {error}")))?;
            Pin::from_text(typed)
        }
        (None, None) => {
            return Err(no_pin(
                "no PIN specified: pass a file or a descriptor, or run the command at a terminal for a prompt"
                    .to_owned(),
            ));
        }
    };
    pin.map(PinSource::Text)
        .map_err(|error| no_pin(error.to_string()))
}
