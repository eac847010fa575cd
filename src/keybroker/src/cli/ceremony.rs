//! `keybroker ceremony`: makes tokens and keys in front of custodians, and writes a transcript that they sign.
//!
//! The crate `keybroker-ceremony` has the plan, the transcript and the shares. The modules here do the work on the token.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use clap::Subcommand;

use keybroker_ceremony::{signatures, transcript};
use keybroker_core::trusted_file::{self, Purpose};

use super::{
    Context,
    exit::{Exit, Failure},
};

mod checks;
mod combine;
mod rehearse;
mod run;
mod shares;
mod sign;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Do every step of a plan, and write the transcript
    ///
    /// The command refuses to start if anything exists already that the plan makes. If a step fails, the transcript says what was
    /// done, and is marked as incomplete. A split PIN is shown at the terminal, to one custodian at a time. Stop the broker before
    /// you run this command.
    Run(run::Run),
    /// Print the script of a plan for auditors, and do every step on a temporary SoftHSM
    ///
    /// The rehearsal needs no configuration, and changes no token, database or audit log.
    Rehearse(rehearse::Rehearse),
    /// Check a complete transcript and print it as a page; needs no token and no configuration
    ///
    /// Each custodian runs this command on a machine of their own before they sign.
    Show(sign::Show),
    /// Add the signatures of custodians to a transcript
    ///
    /// Each custodian signs with `ssh-keygen -Y sign -n keybroker-ceremony -f KEY <TRANSCRIPT >NAME.sig`.
    Sign(sign::Sign),
    /// Verify a transcript and its signatures; needs no token and no configuration
    Verify(sign::Verify),
    /// Check that shares belong to a ceremony and give the security officer's PIN
    ///
    /// The command reads the shares from the terminal without showing them, or one per line from standard input.
    Combine(combine::Combine),
    /// Set a new user PIN with the security officer's PIN that shares give; this also unlocks the user PIN
    ///
    /// The command reads the shares like `ceremony combine`. Stop the broker before you run this command.
    UnlockPin(combine::UnlockPin),
}

pub(super) fn run(command: Command, context: &Context) -> Result<(), Failure> {
    match command {
        Command::Run(arguments) => run::run(&arguments, context),
        Command::Rehearse(arguments) => rehearse::run(&arguments, context),
        Command::Show(arguments) => sign::show(&arguments, context),
        Command::Sign(arguments) => sign::sign(&arguments, context),
        Command::Verify(arguments) => sign::verify(&arguments, context),
        Command::Combine(arguments) => combine::combine(&arguments, context),
        Command::UnlockPin(arguments) => combine::unlock_pin(&arguments, context),
    }
}

/// The purpose of a plan, for the check that no other user can change it.
const PLAN: Purpose = Purpose::trust(
    "other users could change the plan, which decides who receives shares of the PIN",
);

/// The files of a ceremony.
#[derive(Clone, Debug)]
struct Files {
    transcript: PathBuf,
    /// The signatures, beside the transcript.
    signatures: PathBuf,
    /// The page to print, beside the transcript.
    page: PathBuf,
}

impl Files {
    fn beside(transcript: &Path) -> Self {
        let with = |end: &str| {
            let mut name = OsString::from(transcript);
            name.push(end);
            PathBuf::from(name)
        };
        Self {
            transcript: transcript.to_owned(),
            signatures: with(".signatures"),
            page: with(".txt"),
        }
    }

    fn all(&self) -> [&Path; 3] {
        [&self.transcript, &self.signatures, &self.page]
    }
}

/// Reads a plan that no other user can change.
fn read_plan(path: &Path) -> Result<String, Failure> {
    let bytes = trusted_file::read(path, keybroker_ceremony::plan::BYTES_MAX, PLAN)
        .map_err(|error| usage(format!("the plan: {error}")))?;
    String::from_utf8(bytes.to_vec())
        .map_err(|_| usage(format!("the plan {} is not UTF-8", path.display())))
}

/// Reads a file that may come from anywhere.
fn read(path: &Path, bytes_max: u64) -> Result<Vec<u8>, Failure> {
    let failed = |error: io::Error| usage(format!("cannot read {}: {error}", path.display()));
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(failed)?;
    file.take(bytes_max + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length > bytes_max) {
        return Err(usage(format!(
            "{} has more than {bytes_max} bytes",
            path.display()
        )));
    }
    Ok(bytes)
}

fn read_text(path: &Path, bytes_max: u64) -> Result<String, Failure> {
    String::from_utf8(read(path, bytes_max)?)
        .map_err(|_| usage(format!("{} is not UTF-8", path.display())))
}

fn read_transcript(path: &Path) -> Result<Vec<u8>, Failure> {
    read(path, transcript::BYTES_MAX)
}

fn read_signatures(path: &Path) -> Result<String, Failure> {
    read_text(path, signatures::BYTES_MAX)
}

fn usage(what: String) -> Failure {
    Failure::new(Exit::Usage, what)
}

fn internal(error: &impl ToString) -> Failure {
    Failure::new(Exit::Internal, error.to_string())
}
