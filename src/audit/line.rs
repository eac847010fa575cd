//! One entry as one line: RFC 8785 canonical JSON. Names are ASCII and in order, numbers are integers, escapes are those of
//! `serde_json`, which are the canonical ones.

use std::io::Write as _;

use serde_json::Value;

use crate::{
    call::Timestamp,
    error::Reason,
    key::{KeyName, Revision, Tenant, UserId},
};

use super::{Entry, EntryKind, Outcome};

/// What the log adds to an entry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place<'a> {
    pub(super) log_id: &'a str,
    pub(super) sequence: u64,
    pub(super) at: Timestamp,
}

/// Appends the line, LF-ended. Fields are written in the order of their names, which is the canonical one.
pub(super) fn encode(entry: &Entry, place: Place<'_>, line: &mut Vec<u8>) {
    let mut object = Object::begin(line);
    object.text("action", Some(entry.action));
    object.shown("call_id", entry.call_id.as_ref());
    object.number("count", entry.count);
    object.text("key_name", entry.key_name.as_ref().map(KeyName::as_str));
    object.text("kind", Some(kind_name(entry.kind)));
    object.text("log_id", Some(place.log_id));
    object.text("outcome", Some(outcome_name(entry.outcome)));
    object.text("peer", entry.peer.as_deref());
    object.text("policy", entry.policy);
    object.text("principal", entry.principal.as_deref());
    object.text("reason", entry.reason.map(Reason::as_str));
    object.shown("record_id", entry.record_id.as_ref());
    object.shown("request_id", entry.request_id.as_ref());
    object.number("revision", entry.revision.map(Revision::get));
    object.number("sequence", Some(place.sequence));
    object.text("tenant", entry.tenant.as_ref().map(Tenant::as_str));
    object.number("time_us", u64::try_from(place.at.micros()).ok());
    object.text("user", entry.user.as_ref().map(UserId::as_str));
    object.shown("wrapping_key", entry.wrapping_key.as_ref());
    object.end();
}

/// A JSON object under construction. Names are ASCII words and need no escape.
struct Object<'a> {
    line: &'a mut Vec<u8>,
    separator: u8,
}

impl<'a> Object<'a> {
    fn begin(line: &'a mut Vec<u8>) -> Self {
        Self {
            line,
            separator: b'{',
        }
    }

    fn name(&mut self, name: &str) {
        self.line.push(self.separator);
        self.separator = b',';
        self.line.push(b'"');
        self.line.extend(name.as_bytes());
        self.line.extend(b"\":");
    }

    /// A text from outside: the escapes of `serde_json` are those of RFC 8785.
    fn text(&mut self, name: &str, value: Option<&str>) {
        if let Some(value) = value {
            self.name(name);
            serde_json::to_writer(&mut *self.line, value).expect("a vector takes every byte");
        }
    }

    /// An id: hexadecimal digits and hyphens, which need no escape.
    fn shown(&mut self, name: &str, value: Option<&impl std::fmt::Display>) {
        if let Some(value) = value {
            self.name(name);
            write!(self.line, "\"{value}\"").expect("a vector takes every byte");
        }
    }

    fn number(&mut self, name: &str, value: Option<u64>) {
        if let Some(value) = value {
            self.name(name);
            write!(self.line, "{value}").expect("a vector takes every byte");
        }
    }

    fn end(self) {
        self.line.extend(b"}\n");
    }
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
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn place() -> Place<'static> {
        Place {
            log_id: "00112233445566778899aabbccddeeff",
            sequence: 7,
            at: Timestamp::from_micros(1_700_000_000_000_000),
        }
    }

    #[test]
    fn a_line_is_written_to_the_letter() {
        let mut entry = Entry::new(EntryKind::Decision, "user_key.unwrap", Outcome::Failed);
        entry.reason = Some(Reason::KeyNotFound);
        entry.user = Some(UserId::parse("Zoë \"x\"").unwrap());
        entry.revision = Revision::new(3);
        let mut line = Vec::new();
        encode(&entry, place(), &mut line);
        let expected = concat!(
            r#"{"action":"user_key.unwrap","kind":"decision","#,
            r#""log_id":"00112233445566778899aabbccddeeff","outcome":"failed","#,
            r#""reason":"KEY_NOT_FOUND","revision":3,"sequence":7,"#,
            r#""time_us":1700000000000000,"user":"Zoë \"x\""}"#,
            "\n"
        );
        assert_eq!(String::from_utf8(line).unwrap(), expected);
    }

    proptest! {
        /// Whatever a caller calls itself, the entry is one canonical line that reads back.
        #[test]
        fn any_text_gives_one_canonical_line(peer in any::<String>(), principal in any::<String>()) {
            let mut entry = Entry::new(EntryKind::Intent, "user_key.create", Outcome::Ok);
            entry.peer = Some(peer);
            entry.principal = Some(principal);
            let mut line = Vec::new();
            encode(&entry, place(), &mut line);
            prop_assert_eq!(line.split(|byte| *byte == b'\n').count(), 2);
            let parsed = parse(&line[..line.len() - 1]).unwrap();
            prop_assert_eq!((parsed.sequence, parsed.kind.as_str()), (7, "intent"));
        }
    }
}
