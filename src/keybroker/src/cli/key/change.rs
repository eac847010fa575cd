//! The commands of `keybroker key` that change the keys of a running broker through its admin API.

use std::time::Duration;

use clap::Args;
use serde_json::json;

use crate::cli::{
    Context,
    client::{Who, refusal, show},
    exit::{Exit, Failure},
};
use keybroker_client::{Error, Reason, proto};

use super::{parse_id, removal::confirm};

/// Shortest timeout for the making of a key. Some devices take minutes, but a broker ends the call after its own limit.
const ROTATION_TIMEOUT: Duration = Duration::from_mins(2);

#[derive(Args, Debug)]
pub(in crate::cli) struct Rotate {
    /// Length of the RSA modulus in bits [default: 3072]
    #[arg(long, value_parser = ["2048", "3072", "4096"], conflicts_with = "back")]
    bits: Option<String>,
    /// Do nothing if the key that wraps new user keys was registered less than this number of days ago, 1 to 36500
    #[arg(
        long, value_name = "DAYS", conflicts_with = "back",
        value_parser = clap::value_parser!(u32).range(1..=36_500)
    )]
    if_older_than: Option<u32>,
    /// Activate the new key at once, although no backup contains it yet
    ///
    /// Until the next backup, the loss of the token is the loss of every user key that was wrapped under the new key.
    #[arg(long, conflicts_with = "back")]
    single: bool,
    /// Return to the key that was in use before, and deactivate the key that is in use
    #[arg(long)]
    back: bool,
    #[command(flatten)]
    who: Who,
}

#[derive(Args, Debug)]
pub(in crate::cli) struct Activate {
    #[command(flatten)]
    key: OneKey,
    /// Confirm that a backup of the token contains the key and that its restore was tested
    #[arg(long, conflicts_with = "single")]
    backup_confirmed: bool,
    /// Activate the key although no backup contains it
    #[arg(long)]
    single: bool,
}

#[derive(Args, Debug)]
pub(in crate::cli) struct OneKey {
    /// Id of the key, 32 hexadecimal digits
    id: String,
    #[command(flatten)]
    who: Who,
}

pub(super) fn rotate(arguments: Rotate, context: &Context) -> Result<(), Failure> {
    let bits = arguments.bits.as_deref().map_or(Ok(0), str::parse);
    let bits = bits.map_err(|_| Failure::new(Exit::Usage, "--bits is not a number"))?;
    let request = proto::RotateWrappingKeyRequest {
        modulus_bits: bits,
        if_older_than_days: arguments.if_older_than.unwrap_or(0),
        without_backup: arguments.single,
        back: arguments.back,
    };
    let who = arguments.who.at_least(ROTATION_TIMEOUT);
    who.call(context.output, async |caller| {
        let rotated = caller.client.rotate_wrapping_key(request).await;
        let rotated = rotated.map_err(|error| failure(&error))?;
        let key = rotated.wrapping_key.clone().unwrap_or_default();
        note_next_step(context, &rotated, &key, request.without_backup);
        let mut fields = show::wrapping_key(&key);
        let previous = hex::encode(&rotated.previous_id);
        let previous = Some(previous).filter(|previous| !previous.is_empty());
        fields.push(("previous", json!(previous)));
        fields.push(("changed", json!(rotated.changed)));
        caller.output.fields(fields)
    })
}

/// Tells the administrator what a rotation left to do.
fn note_next_step(
    context: &Context,
    rotated: &proto::RotateWrappingKeyResponse,
    key: &proto::WrappingKey,
    is_single: bool,
) {
    let id = hex::encode(&key.id);
    let note = if !rotated.changed {
        "the key in use is younger than --if-older-than; nothing was changed".to_owned()
    } else if key.state() == proto::WrappingKeyState::PreActive {
        format!(
            "key {id} is registered and not used yet. Back up the token and test the restore, then run `keybroker key \
             activate {id} --backup-confirmed`"
        )
    } else if is_single {
        format!(
            "warning: key {id} is used although no backup contains it: back up the token now. If the token is lost before, \
             every user key that was wrapped under key {id} is lost"
        )
    } else {
        return;
    };
    context.output.note(&note);
}

pub(super) fn activate(arguments: &Activate, context: &Context) -> Result<(), Failure> {
    let request = proto::ChangeWrappingKeyStateRequest {
        change: proto::WrappingKeyChange::Activate.into(),
        backup_confirmed: arguments.backup_confirmed,
        without_backup: arguments.single,
        ..proto::ChangeWrappingKeyStateRequest::default()
    };
    send(&arguments.key, &request, context)
}

#[derive(Args, Debug)]
pub(in crate::cli) struct Lost {
    #[command(flatten)]
    key: OneKey,
    /// Record the loss without asking for the id again
    #[arg(long)]
    yes: bool,
}

pub(super) fn lost(arguments: &Lost, context: &Context) -> Result<(), Failure> {
    let id = parse_id(&arguments.key.id)?;
    let warning =
        "The user keys under a lost key can never be released again, even if the token returns";
    confirm(context, arguments.yes, id, warning)?;
    change(&arguments.key, proto::WrappingKeyChange::Lose, context)
}

#[derive(Args, Debug)]
pub(in crate::cli) struct Destroy {
    #[command(flatten)]
    key: OneKey,
    /// Destroy the key after this number of days, up to 3650 [default: `wrapping_keys.destroy_after_days` of the broker]
    #[arg(
        long, value_name = "DAYS", conflicts_with_all = ["now", "cancel"],
        value_parser = clap::value_parser!(u32).range(1..=3_650)
    )]
    after_days: Option<u32>,
    /// Destroy the key without the waiting time; WORD must be "irreversibly", and a policy must permit it
    #[arg(long, value_name = "WORD", conflicts_with = "cancel")]
    now: Option<String>,
    /// Cancel the scheduled destruction
    #[arg(long)]
    cancel: bool,
    /// Schedule the destruction without asking for the id again
    #[arg(long)]
    yes: bool,
}

pub(super) fn destroy(arguments: &Destroy, context: &Context) -> Result<(), Failure> {
    if arguments.cancel {
        return change(&arguments.key, proto::WrappingKeyChange::Keep, context);
    }
    let id = parse_id(&arguments.key.id)?;
    let warning = "Nothing brings a destroyed key back, and a backup of the database that needs the key is worth nothing without it";
    confirm(context, arguments.yes, id, warning)?;
    let request = proto::ChangeWrappingKeyStateRequest {
        change: proto::WrappingKeyChange::Destroy.into(),
        destroy_after_days: arguments.after_days.unwrap_or(0),
        destroy_now: arguments.now.clone().unwrap_or_default(),
        ..proto::ChangeWrappingKeyStateRequest::default()
    };
    send(&arguments.key, &request, context)
}

pub(super) fn change(
    arguments: &OneKey,
    change: proto::WrappingKeyChange,
    context: &Context,
) -> Result<(), Failure> {
    let request = proto::ChangeWrappingKeyStateRequest {
        change: change.into(),
        ..proto::ChangeWrappingKeyStateRequest::default()
    };
    send(arguments, &request, context)
}

fn send(
    key: &OneKey,
    request: &proto::ChangeWrappingKeyStateRequest,
    context: &Context,
) -> Result<(), Failure> {
    let request = proto::ChangeWrappingKeyStateRequest {
        id: parse_id(&key.id)?.as_bytes().to_vec(),
        ..request.clone()
    };
    key.who.call(context.output, async |caller| {
        let changed = caller.client.change_wrapping_key_state(request).await;
        let changed = changed.map_err(|error| failure(&error))?;
        caller.output.fields(show::wrapping_key(&changed))
    })
}

/// The failure of a change of a wrapping key. The hints of the reasons are about user keys, so the hints about wrapping keys
/// replace them.
fn failure(error: &Error) -> Failure {
    let failure = refusal::failure(error);
    if error.outcome_unknown() {
        return failure.hint(
            "the change may still be made: `keybroker client wrapping-keys` shows the keys; do not repeat a rotation before \
             you have looked",
        );
    }
    match error.reason() {
        Some(Reason::KeyNotFound | Reason::KeyState | Reason::Revision) => {
            failure.hint("`keybroker client wrapping-keys` shows the wrapping keys and their states")
        }
        Some(Reason::TokenDown | Reason::TokenUntrusted) => {
            failure.hint("nothing was changed; `keybroker client token-state` and the broker's log show the cause")
        }
        _ => failure,
    }
}
