//! `keybroker ceremony combine` and `keybroker ceremony unlock-pin`: what shares of the security officer's PIN are for.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use keybroker_audit::Entry;
use keybroker_ceremony::{
    transcript::{Token, Transcript},
    verify::VerifyError,
};
use keybroker_hsm::admin;
use keybroker_store as store;
use keybroker_worker_protocol::{Pin, PinSource};

use crate::cli::{
    Context, OWN_PROGRAM, change, environment,
    exit::{Exit, Failure},
    pin::{self, UserPin},
};

use super::{internal, read_transcript, shares, usage};

/// What a person must know who combines shares without a transcript.
const WITHOUT_TRANSCRIPT: &str = "warning: without the transcript, a wrong share cannot be named: a share that was changed on purpose \
     gives a wrong PIN. A token counts a wrong PIN of the security officer, and may lock itself. Pass the transcript if there is a \
     copy of it";

#[derive(Args, Debug)]
pub(in crate::cli) struct Combine {
    /// Transcript of the ceremony that made the shares
    ///
    /// Without the transcript, the command combines the shares all the same, but it can neither name the custodian of a wrong share
    /// nor detect a share that was changed on purpose.
    transcript: Option<PathBuf>,
    /// Write the security officer's PIN to standard output
    ///
    /// From then on, the PIN is known to everyone who sees the output. Use the PIN for one operation of the vendor's tool, and hold
    /// a new ceremony afterwards.
    #[arg(long)]
    print: bool,
}

#[derive(Args, Debug)]
pub(in crate::cli) struct UnlockPin {
    /// Transcript of the ceremony that made the shares
    transcript: PathBuf,
    /// Serial number of the token, if the transcript does not have it because the ceremony failed
    #[arg(long, value_name = "SERIAL")]
    serial: Option<String>,
    #[command(flatten)]
    pin: UserPin,
}

pub(super) fn combine(arguments: &Combine, context: &Context) -> Result<(), Failure> {
    let transcript = arguments
        .transcript
        .as_deref()
        .map(read_parsed)
        .transpose()?;
    if transcript.is_none() {
        context.output.note(WITHOUT_TRANSCRIPT);
    }
    let token = match &transcript {
        Some(transcript) => Some(token(transcript, context)?),
        None => None,
    };
    let pin = shares::combine(token)?;
    if arguments.print {
        return context.output.fields(vec![("so_pin", json!(pin.as_str()))]);
    }
    let serial = token.and_then(|token| token.identity.as_ref().map(|one| &one.serial));
    context.output.fields(vec![
        ("token", json!(token.map(|token| &token.name))),
        ("serial", json!(serial)),
        ("shares", json!("fit")),
    ])
}

pub(super) fn unlock_pin(arguments: &UnlockPin, context: &Context) -> Result<(), Failure> {
    let transcript = read_parsed(&arguments.transcript)?;
    let token = token(&transcript, context)?;
    let serial = serial(token, arguments.serial.as_deref())?;
    let mut config = context.config_for_tokens()?;
    config.select_token(Some(&token.name))?;
    let _lock = store::lock(&config.store)?;
    let user_pin = arguments.pin.get(config.token())?;
    let so_pin = shares::combine(Some(token))?;
    let so_pin = Pin::from_text(so_pin.to_string()).map_err(|error| internal(&error))?;
    let so_pin = PinSource::Text(so_pin);
    let nothing_more = |_: &mut Entry| {};
    let info = change::audited(context, &config, "token.set_user_pin", nothing_more, || {
        let (info, note) = admin::set_user_pin(
            Path::new(OWN_PROGRAM),
            config.token(),
            &pin::state(&config),
            serial,
            &so_pin,
            &user_pin,
        )
        .map_err(|error| environment::explain(error, &config))?;
        if let Some(note) = note {
            context.output.note(&format!("note: {note}"));
        }
        Ok(info)
    })?;
    context.output.fields(vec![
        ("label", json!(info.label)),
        ("serial", json!(info.serial)),
        ("user_pin", json!("set")),
    ])
}

/// The serial number in the transcript, or the given one if the transcript has none.
fn serial<'a>(token: &'a Token, given: Option<&'a str>) -> Result<&'a str, Failure> {
    let identity = token.identity.as_ref().map(|one| one.serial.as_str());
    match (identity.or(token.initialised_serial.as_deref()), given) {
        (Some(known), Some(given)) if known != given => Err(usage(format!(
            "the transcript has the serial number {known:?} of token {:?}, not {given:?}",
            token.name
        ))),
        (Some(serial), _) | (None, Some(serial)) => Ok(serial),
        (None, None) => Err(usage(format!(
            "the transcript has no serial number of token {:?}, so it is not known which token the PIN is for",
            token.name
        ))
        .hint("pass the serial number that the failed step of the transcript names with --serial")),
    }
}

fn read_parsed(path: &Path) -> Result<Transcript, Failure> {
    let bytes = read_transcript(path)?;
    Ok(Transcript::parse(&bytes).map_err(VerifyError::from)?)
}

/// The token whose PIN was split: the only one, or the one that `--token` names.
fn token<'a>(transcript: &'a Transcript, context: &Context) -> Result<&'a Token, Failure> {
    let split: Vec<&Token> = transcript
        .tokens
        .iter()
        .filter(|one| one.so_pin.is_some())
        .collect();
    let names: Vec<&str> = split.iter().map(|one| one.name.as_str()).collect();
    let names = names.join(", ");
    let found = match (&context.token, &split[..]) {
        (_, []) => {
            return Err(usage(
                "the ceremony split no PIN, so there are no shares".to_owned(),
            ));
        }
        (None, [only]) => Some(*only),
        (None, _) => {
            return Err(usage(format!(
                "the ceremony split the PINs of several tokens: pass `--token` with one of {names}"
            )));
        }
        (Some(name), _) => split.iter().find(|one| one.name == *name).copied(),
    };
    found.ok_or_else(|| {
        Failure::new(
            Exit::Usage,
            format!("the ceremony split the PINs of the tokens {names}, and of no other token"),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The PIN of the security officer is presented to one token only.
    #[test]
    fn the_serial_number_of_the_transcript_comes_first() {
        let failed = Token::default();
        assert_eq!(serial(&failed, Some("1")).unwrap(), "1");
        let refused = serial(&failed, None).unwrap_err();
        assert!(refused.hint.unwrap().contains("--serial"));
        let initialised = Token {
            initialised_serial: Some("2".to_owned()),
            ..Token::default()
        };
        assert_eq!(serial(&initialised, None).unwrap(), "2");
        assert!(serial(&initialised, Some("1")).is_err());
    }
}
