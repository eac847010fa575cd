//! Messages as fields to show.

use prost_types::Timestamp as WireTimestamp;
use serde_json::{Value, json};

use crate::cli::output::{Field, Output};
use keybroker_core::call::Timestamp;
use keybroker_proto as proto;

pub(super) fn record(record: &proto::UserKey) -> Vec<Field> {
    let state = match record.state() {
        proto::UserKeyState::Active => "active",
        proto::UserKeyState::Deleted => "deleted",
        proto::UserKeyState::Unspecified => "unknown",
    };
    vec![
        ("user", json!(record.user)),
        ("key_name", json!(record.key_name)),
        ("state", json!(state)),
        ("revision", json!(record.revision)),
        ("record_id", json!(hex::encode(&record.record_id))),
        ("wrapping_key", json!(hex::encode(&record.wrapping_key_id))),
        ("created", time(record.create_time.as_ref())),
        ("updated", time(record.update_time.as_ref())),
        ("deleted", time(record.delete_time.as_ref())),
        ("last_used", time(record.last_use_time.as_ref())),
        ("problem", Value::Null),
    ]
}

/// The same columns, of a record that the broker could not read or verify.
pub(super) fn damaged_record(record: &proto::DamagedUserKey) -> Vec<Field> {
    let known = |text: &str| {
        if text.is_empty() {
            Value::Null
        } else {
            json!(text)
        }
    };
    vec![
        ("user", known(&record.user)),
        ("key_name", known(&record.key_name)),
        ("state", json!("damaged")),
        ("revision", Value::Null),
        ("record_id", known(&hex::encode(&record.record_id))),
        ("wrapping_key", Value::Null),
        ("created", Value::Null),
        ("updated", Value::Null),
        ("deleted", Value::Null),
        ("last_used", Value::Null),
        ("problem", json!(record.problem)),
    ]
}

/// Points an administrator to the command that says more.
pub(super) fn note_damaged(output: Output, count: usize) {
    if count > 0 {
        output.note(&format!(
            "{count} damaged rows: run `keybroker store check` on the broker's host, and compare them with a backup"
        ));
    }
}

pub(super) fn wrapping_key(key: &proto::WrappingKey) -> Vec<Field> {
    let state = match key.state() {
        proto::WrappingKeyState::Active => "active",
        proto::WrappingKeyState::Suspended => "suspended",
        proto::WrappingKeyState::Deactivated => "deactivated",
        proto::WrappingKeyState::Compromised => "compromised",
        proto::WrappingKeyState::Destroyed => "destroyed",
        proto::WrappingKeyState::Unspecified => "unknown",
    };
    vec![
        ("id", json!(hex::encode(&key.id))),
        ("state", json!(state)),
        ("modulus_bits", json!(key.modulus_bits)),
        ("algorithm", json!(key.algorithm)),
        ("fingerprint", json!(hex::encode(&key.fingerprint))),
        ("registered", time(key.register_time.as_ref())),
        ("backup_confirmed", json!(key.backup_confirmed)),
    ]
}

pub(super) fn time(at: Option<&WireTimestamp>) -> Value {
    at.map_or(Value::Null, |at| {
        // A hostile server may say any number.
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
