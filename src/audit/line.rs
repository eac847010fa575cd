//! One entry as one line: RFC 8785 canonical JSON. Keys are ASCII and sorted, numbers are integers, so that sorted maps and
//! the escapes of `serde_json` are canonical.

use serde_json::{Map, Value};

use crate::call::Timestamp;

use super::{Entry, EntryKind, Outcome};

/// What the log adds to an entry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place<'a> {
    pub(super) log_id: &'a str,
    pub(super) sequence: u64,
    pub(super) at: Timestamp,
}

/// The line, LF-ended.
pub(super) fn encode(entry: &Entry, place: Place<'_>) -> Vec<u8> {
    let mut object = Map::new();
    let mut put = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            object.insert(name.to_owned(), value);
        }
    };
    put("action", Some(entry.action.into()));
    put("call_id", entry.call_id.map(|id| id.to_string().into()));
    put("count", entry.count.map(Value::from));
    put(
        "key_name",
        entry.key_name.as_ref().map(|v| v.as_str().into()),
    );
    put("kind", Some(kind_name(entry.kind).into()));
    put("log_id", Some(place.log_id.into()));
    put("outcome", Some(outcome_name(entry.outcome).into()));
    put("peer", entry.peer.as_deref().map(Value::from));
    put("policy", entry.policy.map(Value::from));
    put("principal", entry.principal.as_deref().map(Value::from));
    put("reason", entry.reason.map(|reason| reason.as_str().into()));
    put("record_id", entry.record_id.map(|id| id.to_string().into()));
    put(
        "request_id",
        entry.request_id.map(|id| id.to_string().into()),
    );
    put(
        "revision",
        entry.revision.map(|revision| revision.get().into()),
    );
    put("sequence", Some(place.sequence.into()));
    put("tenant", entry.tenant.as_ref().map(|v| v.as_str().into()));
    put("time_us", Some(place.at.micros().into()));
    put("user", entry.user.as_ref().map(|v| v.as_str().into()));
    put(
        "wrapping_key",
        entry.wrapping_key.map(|id| id.to_string().into()),
    );
    let mut line = Value::Object(object).to_string().into_bytes();
    line.push(b'\n');
    line
}

/// What is read back of a line: enough to check the log and to find open intents.
#[derive(Clone, Debug)]
pub(super) struct Parsed {
    pub(super) log_id: String,
    pub(super) sequence: u64,
    pub(super) kind: String,
    pub(super) action: String,
    pub(super) call_id: Option<String>,
    pub(super) count: Option<u64>,
    pub(super) time_us: i64,
}

/// Reads a line without its LF. `None` unless it is canonical, byte for byte.
pub(super) fn parse(line: &[u8]) -> Option<Parsed> {
    let value: Value = serde_json::from_slice(line).ok()?;
    // A duplicate key, a space or another escape would survive parsing, but not writing again.
    if value.to_string().as_bytes() != line {
        return None;
    }
    let text = |name: &str| value.get(name)?.as_str().map(str::to_owned);
    Some(Parsed {
        log_id: text("log_id")?,
        sequence: value.get("sequence")?.as_u64()?,
        kind: text("kind")?,
        action: text("action")?,
        call_id: text("call_id"),
        count: value.get("count").and_then(Value::as_u64),
        time_us: value.get("time_us")?.as_i64()?,
    })
}

pub(super) const fn kind_name(kind: EntryKind) -> &'static str {
    match kind {
        EntryKind::Decision => "decision",
        EntryKind::Intent => "intent",
        EntryKind::Outcome => "outcome",
        EntryKind::Recovered => "recovered",
        EntryKind::System => "system",
    }
}

const fn outcome_name(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Ok => "ok",
        Outcome::Denied => "denied",
        Outcome::Failed => "failed",
        Outcome::Unknown => "unknown",
    }
}
