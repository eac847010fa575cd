//! Converts protocol messages to output fields.

use std::fmt::Display;

use keybroker_client::{DamagedUserKey, Timestamp, UserKey, UserKeyState, proto};
use prost_types::Timestamp as WireTimestamp;
use serde_json::{Value, json};

use crate::cli::output::{Field, Output};

pub(super) fn record(record: &UserKey) -> Vec<Field> {
    let state = match record.state {
        UserKeyState::Active => "active",
        UserKeyState::Deleted => "deleted",
        _ => "unknown",
    };
    vec![
        ("user", text(&record.key.user)),
        ("key_name", text(&record.key.key_name)),
        ("state", json!(state)),
        ("revision", json!(record.revision.get())),
        ("record_id", text(&record.record_id)),
        ("wrapping_key", text(&record.wrapping_key_id)),
        ("created", text(&record.create_time)),
        ("updated", text(&record.update_time)),
        ("deleted", known(record.delete_time.as_ref())),
        ("last_used", known(record.last_use_time.as_ref())),
        ("problem", Value::Null),
    ]
}

/// Returns the same columns as [`record`] for a record that the broker could not read or verify.
pub(super) fn damaged_record(record: &DamagedUserKey) -> Vec<Field> {
    vec![
        ("user", known(record.user.as_ref())),
        ("key_name", known(record.key_name.as_ref())),
        ("state", json!("damaged")),
        ("revision", Value::Null),
        ("record_id", known(record.record_id.as_ref())),
        ("wrapping_key", Value::Null),
        ("created", Value::Null),
        ("updated", Value::Null),
        ("deleted", Value::Null),
        ("last_used", Value::Null),
        ("problem", json!(record.problem)),
    ]
}

fn text(value: &impl Display) -> Value {
    json!(value.to_string())
}

fn known(value: Option<&impl Display>) -> Value {
    value.map_or(Value::Null, text)
}

/// Prints a note that explains how to show the remaining pages.
pub(super) fn note_more(output: Output, has_more: bool) {
    if has_more {
        output.note("there are more pages; pass --all to show all pages");
    }
}

/// Prints a note with the command that shows the details of damaged rows.
pub(super) fn note_damaged(output: Output, count: usize) {
    if count > 0 {
        output.note(&format!(
            "{count} rows are damaged: run `keybroker store check` on the broker's host, and compare the damaged rows \
             with a backup"
        ));
    }
}

pub(in crate::cli) fn wrapping_key(key: &proto::WrappingKey) -> Vec<Field> {
    let state = match key.state() {
        proto::WrappingKeyState::PreActive => "pre-active",
        proto::WrappingKeyState::Active => "active",
        proto::WrappingKeyState::Suspended => "suspended",
        proto::WrappingKeyState::Deactivated => "deactivated",
        proto::WrappingKeyState::Compromised => "compromised",
        proto::WrappingKeyState::Destroyed => "destroyed",
        proto::WrappingKeyState::Unspecified => "unknown",
    };
    let purpose = match key.purpose() {
        proto::WrappingKeyPurpose::Plain => "plain",
        proto::WrappingKeyPurpose::Sealed => "sealed",
        proto::WrappingKeyPurpose::Unspecified => "unknown",
    };
    let sealing = match key.sealing() {
        proto::Sealing::Enforced => json!("enforced"),
        proto::Sealing::Worker => json!("worker"),
        proto::Sealing::Unspecified => Value::Null,
    };
    let tokens = key.tokens.iter().zip(&key.token_assurances);
    let assurances: Vec<String> = tokens
        .map(|(name, word)| format!("{name}={word}"))
        .collect();
    vec![
        ("id", json!(hex::encode(&key.id))),
        ("purpose", json!(purpose)),
        ("sealing", sealing),
        ("state", json!(state)),
        ("modulus_bits", json!(key.modulus_bits)),
        ("algorithm", json!(key.algorithm)),
        ("fingerprint", json!(hex::encode(&key.fingerprint))),
        ("registered", time(key.register_time.as_ref())),
        ("backup_confirmed", json!(key.backup_confirmed)),
        ("tokens", json!(key.tokens.join(", "))),
        ("missing_tokens", json!(key.missing_tokens.join(", "))),
        ("assurance", json!(assurances.join(", "))),
        ("destroy_at", time(key.destroy_time.as_ref())),
        (
            "problem",
            json!(Some(&key.problem).filter(|problem| !problem.is_empty())),
        ),
    ]
}

pub(super) fn time(at: Option<&WireTimestamp>) -> Value {
    at.map_or(Value::Null, |at| {
        // A malicious server may send any number, so the arithmetic must not overflow.
        let micros = at.seconds.saturating_mul(1_000_000);
        let micros = micros.saturating_add(i64::from(at.nanos) / 1_000);
        json!(Timestamp::from_micros(micros).to_string())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_time_of_a_server_is_too_much() {
        let shown = |seconds, nanos| time(Some(&WireTimestamp { seconds, nanos }));
        assert_eq!(shown(1, 500_000_000), "1970-01-01T00:00:01.5Z");
        assert_eq!(shown(i64::MAX, i32::MAX), format!("{} us", i64::MAX));
        assert_eq!(shown(i64::MIN, i32::MIN), format!("{} us", i64::MIN));
    }
}
