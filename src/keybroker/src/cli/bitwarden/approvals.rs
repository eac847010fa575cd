//! `keybroker bitwarden approvals`: lists, approves and denies the requests of new devices of a Bitwarden organisation whose
//! members sign in without a master password. The token re-encrypts the member's user key for the device.
//!
//! ```text
//! server --request, member's wrapped key--> checks, pin, policy or person --> token: unwrap, wrap for the device --> server
//! ```
//!
//! Mitigation: M28 of `THREAT_MODEL.md`.

use clap::{Args, Subcommand};

use crate::{
    cli::{
        Context,
        exit::{Exit, Failure},
        pin::UserPin,
    },
    config::{Config, bitwarden::Settings},
};
use keybroker_core::{key::Fingerprint, organization::Guid};

mod api;
mod attempts;
mod commands;
mod decision;
mod inventory;
mod key;
mod outage;
mod pending;
mod pins;
mod rate;
mod refusal;
mod review;
mod rules;
mod service;
mod turns;

#[derive(Debug, Subcommand)]
pub(in crate::cli) enum Command {
    /// List the pending requests with their fingerprint phrases
    List(List),
    /// Approve requests: the token re-encrypts the user key of each member for the new device
    ///
    /// Compare the fingerprint phrase with the member before you approve, for example by telephone. Without `--phrase` and `--yes`,
    /// the command prompts for the five words of each phrase.
    Approve(Approve),
    /// Deny requests
    Deny(Deny),
    /// Approve the requests that the policy permits, and leave the others to a person, until a signal arrives
    Run(Run),
}

/// The organisation of a command.
#[derive(Args, Clone, Debug)]
struct Choice {
    /// GUID of the organisation; required if the configuration has several
    #[arg(long, value_name = "GUID")]
    organization: Option<String>,
}

#[derive(Args, Debug)]
pub(in crate::cli) struct List {
    #[command(flatten)]
    choice: Choice,
    #[command(flatten)]
    pin: UserPin,
}

#[derive(Args, Debug)]
pub(in crate::cli) struct Approve {
    /// Ids of the requests
    #[arg(required = true, num_args = 1..=100, value_name = "REQUEST")]
    requests: Vec<String>,
    /// The fingerprint phrase as the member read it out, for one request
    #[arg(long, value_name = "WORDS")]
    phrase: Option<String>,
    /// Do not prompt for the words of the phrases
    #[arg(long, conflicts_with = "phrase")]
    yes: bool,
    /// Use the member's wrapped key with this SHA-256 although its key pin does not match, for one request
    #[arg(long, value_name = "SHA256")]
    accept_key: Option<String>,
    #[command(flatten)]
    choice: Choice,
    #[command(flatten)]
    pin: UserPin,
}

#[derive(Args, Debug)]
pub(in crate::cli) struct Deny {
    /// Ids of the requests
    #[arg(required = true, num_args = 1..=100, value_name = "REQUEST")]
    requests: Vec<String>,
    #[command(flatten)]
    choice: Choice,
}

#[derive(Args, Debug)]
pub(in crate::cli) struct Run {
    /// End after one pass over the requests, instead of when a signal arrives
    #[arg(long)]
    once: bool,
    #[command(flatten)]
    choice: Choice,
    #[command(flatten)]
    pin: UserPin,
}

pub(super) fn run(command: Command, context: &Context) -> Result<(), Failure> {
    match command {
        Command::List(list) => commands::list(&list, context),
        Command::Approve(approve) => commands::approve(&approve, context),
        Command::Deny(deny) => commands::deny(&deny, context),
        Command::Run(run) => service::run(&run, context),
    }
}

/// The organisation that a command uses, with its settings.
#[derive(Clone, Copy, Debug)]
struct Organization<'a> {
    id: Guid,
    fingerprint: Fingerprint,
    settings: &'a Settings,
}

impl<'a> Organization<'a> {
    fn of(config: &'a Config, choice: &Choice) -> Result<Self, Failure> {
        let all = &config.bitwarden_organizations;
        let settings = match (&choice.organization, &all[..]) {
            (_, []) => {
                let what = "the configuration has no [[bitwarden_organization]]";
                return Err(Failure::new(Exit::Configuration, what)
                    .hint("keybroker.example.toml explains the section"));
            }
            (None, [only]) => only,
            (None, _) => {
                let what = "the configuration has several organisations";
                return Err(Failure::new(Exit::Usage, what)
                    .hint("pass the id of one of them with `--organization`"));
            }
            (Some(id), _) => {
                let wanted = guid("--organization", id)?;
                let found = all.iter().find(|one| one.organization() == Some(wanted));
                found.ok_or_else(|| {
                    let what = format!("no [[bitwarden_organization]] has the id {wanted}");
                    Failure::new(Exit::Usage, what)
                })?
            }
        };
        let (Some(id), Some(fingerprint)) = (settings.organization(), settings.fingerprint())
        else {
            let what = "the [[bitwarden_organization]] was not checked";
            return Err(Failure::new(Exit::Internal, what));
        };
        Ok(Self {
            id,
            fingerprint,
            settings,
        })
    }
}

/// Parses a GUID of the command line.
fn guid(what: &str, text: &str) -> Result<Guid, Failure> {
    Guid::parse(text)
        .ok_or_else(|| Failure::new(Exit::Usage, format!("{what} {text:?} is not a GUID")))
}

/// Parses the ids of requests. A request that is named twice is used once.
fn requests(texts: &[String]) -> Result<Vec<Guid>, Failure> {
    let mut requests = Vec::new();
    for text in texts {
        let request = guid("the request", text)?;
        if !requests.contains(&request) {
            requests.push(request);
        }
    }
    Ok(requests)
}
