//! Commands of `keybroker key` that change the wrapping keys of a running broker through the admin
//! API.

use std::time::Duration;

use clap::Args;
use serde_json::json;

use crate::cli::{
    Context,
    client::{Who, refusal, show},
    exit::{Exit, Failure},
};
use keybroker_client::{Error, Reason, proto};
use keybroker_core::key::Purpose;

use super::{parse_id, removal::confirm};

/// Minimum timeout for the generation of a key, and for a search of the tokens. Some devices need minutes to generate a key, but
/// the broker ends the call after the broker's own limit.
const ROTATION_TIMEOUT: Duration = Duration::from_mins(2);

#[derive(Args, Debug)]
pub(in crate::cli) struct Rotate {
    /// Length of the RSA modulus in bits [default: 3072]
    #[arg(long, value_parser = ["2048", "3072", "4096"], conflicts_with = "back")]
    bits: Option<String>,
    /// Minimum age of the active key in days, 1 to 36500; if the active key is younger, the command
    /// does nothing
    #[arg(
        long, value_name = "DAYS", conflicts_with = "back",
        value_parser = clap::value_parser!(u32).range(1..=36_500)
    )]
    if_older_than: Option<u32>,
    /// Activate the new key immediately, although no backup and no other token contains it yet
    ///
    /// If the token is lost before the next backup, every user key that was wrapped under the new
    /// key is lost.
    #[arg(long, conflicts_with = "back")]
    single: bool,
    /// Form in which user keys under the new key are released: `plain` or, only encrypted to a recipient, `sealed`
    /// [default: the purpose of the active key]
    #[arg(long, conflicts_with = "back", value_parser = super::purpose)]
    purpose: Option<Purpose>,
    /// Activate the previous key again, and deactivate the current active key
    #[arg(long)]
    back: bool,
    #[command(flatten)]
    who: Who,
}

#[derive(Args, Debug)]
pub(in crate::cli) struct Activate {
    #[command(flatten)]
    key: OneKey,
    /// Confirm that a backup of each token with the key contains the key, and that you tested a restore of these backups
    #[arg(long, conflicts_with = "single")]
    backup_confirmed: bool,
    /// Activate the key although no backup contains the key, and although other tokens have no copy of the key
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
        purpose: match arguments.purpose {
            None => proto::WrappingKeyPurpose::Unspecified,
            Some(Purpose::Plain) => proto::WrappingKeyPurpose::Plain,
            Some(Purpose::Sealed) => proto::WrappingKeyPurpose::Sealed,
        }
        .into(),
        token: context.token.clone().unwrap_or_default(),
    };
    let is_single = arguments.single;
    let who = arguments.who.at_least(ROTATION_TIMEOUT);
    who.call(context.output, async |caller| {
        let rotated = caller.client.rotate_wrapping_key(request).await;
        let rotated = rotated.map_err(|error| failure(&error))?;
        let key = rotated.wrapping_key.clone().unwrap_or_default();
        note_next_step(context, &rotated, &key, is_single);
        let mut fields = show::wrapping_key(&key);
        let previous = hex::encode(&rotated.previous_id);
        let previous = Some(previous).filter(|previous| !previous.is_empty());
        fields.push(("previous", json!(previous)));
        fields.push(("changed", json!(rotated.changed)));
        caller.output.fields(fields)
    })
}

/// Prints a note about the steps that remain after a rotation.
fn note_next_step(
    context: &Context,
    rotated: &proto::RotateWrappingKeyResponse,
    key: &proto::WrappingKey,
    is_single: bool,
) {
    let id = hex::encode(&key.id);
    let note = if !rotated.changed {
        "the active key is younger than --if-older-than; nothing was changed".to_owned()
    } else if key.state() == proto::WrappingKeyState::PreActive {
        let copy = copy_first(key);
        format!(
            "key {id} is registered, but not used yet. {copy}Back up the token and test the restore, then run `keybroker key \
             activate {id} --backup-confirmed`"
        )
    } else if is_single {
        note_missing_copies(context, key);
        format!(
            "warning: key {id} is in use, but no backup contains this key: back up the token now. If the token is \
             lost before the backup, every user key that was wrapped under key {id} is lost"
        )
    } else {
        return;
    };
    context.output.note(&note);
}

/// The sentence about the tokens to which a new key must be copied, with a blank at its end; empty if there is no such token.
fn copy_first(key: &proto::WrappingKey) -> String {
    if key.missing_tokens.is_empty() {
        return String::new();
    }
    format!(
        "Copy the key pair and its integrity key with the vendor's tool to each token that has the active key (other tokens: {}). ",
        key.missing_tokens.join(", ")
    )
}

/// Prints a warning if some tokens have no copy of an active key.
fn note_missing_copies(context: &Context, key: &proto::WrappingKey) {
    if key.missing_tokens.is_empty() {
        return;
    }
    let (id, with, without) = (
        hex::encode(&key.id),
        key.tokens.join(", "),
        key.missing_tokens.join(", "),
    );
    context.output.note(&format!(
        "warning: key {id} is in use, but only on these tokens: {with}. While they are unavailable, no user key under key {id} can be \
         released, because these tokens have no copy: {without}. Copy the key to them with the vendor's tool, then run `keybroker key \
         find-copies {id}`"
    ));
}

/// Searches the configured tokens for copies of a key.
pub(super) fn find_copies(arguments: OneKey, context: &Context) -> Result<(), Failure> {
    change(arguments, proto::WrappingKeyChange::FindCopies, context)
}

pub(super) fn activate(arguments: Activate, context: &Context) -> Result<(), Failure> {
    let request = proto::ChangeWrappingKeyStateRequest {
        change: proto::WrappingKeyChange::Activate.into(),
        backup_confirmed: arguments.backup_confirmed,
        without_backup: arguments.single,
        ..proto::ChangeWrappingKeyStateRequest::default()
    };
    send(arguments.key, request, context)
}

#[derive(Args, Debug)]
pub(in crate::cli) struct Lost {
    #[command(flatten)]
    key: OneKey,
    /// Record the loss without a prompt for the id of the key
    #[arg(long)]
    yes: bool,
}

pub(super) fn lost(arguments: Lost, context: &Context) -> Result<(), Failure> {
    let id = parse_id(&arguments.key.id)?;
    let warning = "User keys that are wrapped under a lost key can never be released again, even if the token is found again";
    confirm(context, arguments.yes, id, warning)?;
    change(arguments.key, proto::WrappingKeyChange::Lose, context)
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
    /// Let this broker instance carry out a destruction that another instance accepted
    ///
    /// A broker destroys a key only if it accepted the request itself, because a restored copy of the database contains the schedule,
    /// too. Confirm the schedule if the instance that accepted it does not exist any more. The scheduled time stays.
    #[arg(long, conflicts_with_all = ["after_days", "now", "cancel"])]
    confirm_schedule: bool,
    /// Cancel the scheduled destruction
    #[arg(long)]
    cancel: bool,
    /// Schedule the destruction without asking for the id again
    #[arg(long)]
    yes: bool,
}

pub(super) fn destroy(arguments: Destroy, context: &Context) -> Result<(), Failure> {
    if arguments.cancel {
        return change(arguments.key, proto::WrappingKeyChange::Keep, context);
    }
    let id = parse_id(&arguments.key.id)?;
    let warning = "Nothing brings a destroyed key back, and a backup of the database that needs the key is worth nothing without it";
    confirm(context, arguments.yes, id, warning)?;
    let request = proto::ChangeWrappingKeyStateRequest {
        change: proto::WrappingKeyChange::Destroy.into(),
        destroy_after_days: arguments.after_days.unwrap_or(0),
        destroy_now: arguments.now.clone().unwrap_or_default(),
        confirm_schedule: arguments.confirm_schedule,
        ..proto::ChangeWrappingKeyStateRequest::default()
    };
    send(arguments.key, request, context)
}

pub(super) fn change(
    arguments: OneKey,
    change: proto::WrappingKeyChange,
    context: &Context,
) -> Result<(), Failure> {
    let request = proto::ChangeWrappingKeyStateRequest {
        change: change.into(),
        ..proto::ChangeWrappingKeyStateRequest::default()
    };
    send(arguments, request, context)
}

fn send(
    key: OneKey,
    request: proto::ChangeWrappingKeyStateRequest,
    context: &Context,
) -> Result<(), Failure> {
    let request = proto::ChangeWrappingKeyStateRequest {
        id: parse_id(&key.id)?.as_bytes().to_vec(),
        ..request
    };
    let searches_tokens = matches!(
        request.change(),
        proto::WrappingKeyChange::Activate | proto::WrappingKeyChange::FindCopies
    );
    let who = if searches_tokens {
        key.who.at_least(ROTATION_TIMEOUT)
    } else {
        key.who
    };
    who.call(context.output, async |caller| {
        let changed = caller.client.change_wrapping_key_state(request).await;
        let changed = changed.map_err(|error| failure(&error))?;
        if changed.state() == proto::WrappingKeyState::Active {
            note_missing_copies(context, &changed);
        }
        caller.output.fields(show::wrapping_key(&changed))
    })
}

/// The failure of a change of a wrapping key. A hint about wrapping keys replaces the general hint,
/// which is about user keys.
fn failure(error: &Error) -> Failure {
    let failure = refusal::failure(error);
    if error.outcome_unknown() {
        return failure.hint(
            "the change may still take effect: `keybroker client wrapping-keys` shows the keys; check the keys before \
             you repeat a rotation",
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
