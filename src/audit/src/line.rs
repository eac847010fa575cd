//! The encoding of one entry as one line of RFC 8785 canonical JSON. Field names are ASCII and sorted, numbers are
//! integers, and the escapes of `serde_json` are the canonical escapes.

use std::io::Write as _;

use serde_json::Value;

use keybroker_core::{
    call::{CallId, RequestId, Timestamp},
    error::Reason,
    key::{
        AccessRequestId, ApprovalId, ClientId, DeviceId, Fingerprint, KeyName, RecordId, Revision,
        Tenant, UserId, WrappingKeyId,
    },
    organization::Guid,
};

use super::{
    BitwardenRequest, DeviceFacts, Entry, EntryKind, OpenIntent, Outcome, Persons, Recorded,
};

/// The values that the log adds to each entry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place<'a> {
    pub(super) log_id: &'a str,
    pub(super) sequence: u64,
    pub(super) at: Timestamp,
}

/// Appends the line of an entry and an LF to `line`. Fields are written in the order of their names, which is the
/// canonical order.
pub(super) fn encode(entry: &Entry, place: Place<'_>, line: &mut Vec<u8>) {
    let mut object = Object::begin(line);
    let device = entry.device.as_deref();
    let request = device.and_then(|device| device.request.as_ref());
    object.shown("access_request", request);
    object.text("action", Some(&entry.action));
    let persons = entry.persons.as_deref();
    let approval = persons.and_then(|persons| persons.approval.as_ref());
    object.shown("approval", approval);
    let (approved_by, approver) = both(persons.and_then(|persons| persons.approved_by.as_ref()));
    object.text("approved_by", approved_by);
    object.text("approved_by_person", approver);
    let asked_by = device.and_then(|device| device.asked_by.as_deref());
    object.text("asked_by", asked_by);
    let asked = entry.bitwarden.as_deref();
    object.text("bitwarden_device", asked.map(|it| &*it.device));
    object.shown("bitwarden_member", asked.map(|it| &it.member));
    let organization = asked.map(|it| &it.organization);
    object.shown("bitwarden_organization", organization);
    object.shown("bitwarden_public_key", asked.map(|it| &it.public_key));
    object.shown("bitwarden_request", asked.map(|it| &it.request));
    object.number("bytes", entry.bytes);
    object.shown("call_id", entry.call_id.as_ref());
    object.text("cause", entry.cause.as_deref());
    object.shown("client", entry.client.as_ref());
    object.number("count", entry.count);
    let device_id = device.and_then(|device| device.device.as_ref());
    object.shown("device", device_id);
    object.text("digest", entry.digest.as_deref());
    object.text("grant", entry.grant.as_deref());
    object.text("key_name", entry.key_name.as_ref().map(KeyName::as_str));
    object.text("kind", Some(kind_name(entry.kind)));
    object.text("log_id", Some(place.log_id));
    object.text("mapping", entry.mapping.as_deref());
    object.text("outcome", Some(outcome_name(entry.outcome)));
    object.text("peer", entry.peer.as_deref());
    let person = persons.and_then(|persons| persons.person.as_deref());
    object.text("person", person);
    let network = device.and_then(|device| device.place.as_deref());
    object.text("place", network);
    object.text("policy", entry.policy.as_deref());
    object.text("principal", entry.principal.as_deref());
    let public_key = device.and_then(|device| device.public_key.as_deref());
    object.text("public_key", public_key);
    object.text("reason", entry.reason.map(Reason::as_str));
    object.shown("recipient", entry.recipient.as_ref());
    object.shown("record_id", entry.record_id.as_ref());
    object.text("registry", entry.registry.as_deref());
    object.shown("request_id", entry.request_id.as_ref());
    let (requested_by, requester) = both(persons.and_then(|persons| persons.requested_by.as_ref()));
    object.text("requested_by", requested_by);
    object.text("requested_by_person", requester);
    object.number("revision", entry.revision.map(Revision::get));
    object.text("risks", entry.risks.as_deref());
    object.number("sequence", Some(place.sequence));
    object.text("store", entry.store.as_deref());
    object.text("tenant", entry.tenant.as_ref().map(Tenant::as_str));
    object.number("time_us", u64::try_from(place.at.micros()).ok());
    object.text("token", entry.token.as_deref());
    object.text("user", entry.user.as_ref().map(UserId::as_str));
    object.shown("wrapping_key", entry.wrapping_key.as_ref());
    object.end();
}

/// The request of a device in a line that was read; `None` if a field is missing.
fn bitwarden<'a>(text: &impl Fn(&str) -> Option<&'a str>) -> Option<Box<BitwardenRequest>> {
    let guid = |name: &str| Guid::parse(text(name)?);
    let mut public_key = [0; 32];
    hex::decode_to_slice(text("bitwarden_public_key")?, &mut public_key).ok()?;
    Some(Box::new(BitwardenRequest {
        organization: guid("bitwarden_organization")?,
        member: guid("bitwarden_member")?,
        device: text("bitwarden_device")?.to_owned(),
        request: guid("bitwarden_request")?,
        public_key: Fingerprint(public_key),
    }))
}

/// A principal and its person.
fn both(known: Option<&(String, String)>) -> (Option<&str>, Option<&str>) {
    known
        .map(|(principal, person)| (principal.as_str(), person.as_str()))
        .unzip()
}

/// A JSON object that is being written. Field names are ASCII words and need no escape.
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

    /// Writes a string whose content a caller may have chosen. The escapes of `serde_json` are the escapes that RFC
    /// 8785 requires.
    fn text(&mut self, name: &str, value: Option<&str>) {
        if let Some(value) = value {
            self.name(name);
            serde_json::to_writer(&mut *self.line, value).expect("a vector takes every byte");
        }
    }

    /// Writes an id, which consists of hexadecimal digits and hyphens and needs no escape.
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

/// Largest integer that all JSON parsers read in the same way (RFC 8785 section 3.2.2.3).
const INTEGER_MAX: u64 = (1 << 53) - 1;

/// A line that was read from the log, to verify the log or to find open intents.
#[derive(Clone, Debug)]
pub(super) struct Parsed {
    pub(super) log_id: String,
    pub(super) sequence: u64,
    pub(super) kind: String,
    pub(super) action: String,
    pub(super) call_id: Option<CallId>,
    pub(super) count: Option<u64>,
    time_us: i64,
    fields: Value,
}

/// Parses a line without its LF. Returns `None` if any byte of the line is not canonical.
pub(super) fn parse(line: &[u8]) -> Option<Parsed> {
    let fields: Value = serde_json::from_slice(line).ok()?;
    // The parser also accepts duplicate names, spaces and unnecessary escapes, which the serialiser never writes.
    // Therefore the comparison detects a line that is not canonical.
    if fields.to_string().as_bytes() != line {
        return None;
    }
    let text = |name: &str| fields.get(name)?.as_str().map(str::to_owned);
    let number = |name: &str| fields.get(name)?.as_u64().filter(|n| *n <= INTEGER_MAX);
    Some(Parsed {
        log_id: text("log_id")?,
        sequence: number("sequence")?,
        kind: text("kind")?,
        action: text("action")?,
        call_id: text("call_id").and_then(|id| CallId::parse(&id)),
        count: number("count"),
        time_us: i64::try_from(number("time_us")?).ok()?,
        fields,
    })
}

impl Parsed {
    /// Returns the intent in this line, or `None` if the line contains an entry of another kind.
    pub(super) fn intent(&self) -> Option<OpenIntent> {
        if self.kind != kind_name(EntryKind::Intent) {
            return None;
        }
        let text = |name: &str| self.fields.get(name).and_then(Value::as_str);
        let mut intent = Entry::new(EntryKind::Intent, self.action.clone(), Outcome::Ok);
        intent.principal = text("principal").map(str::to_owned);
        intent.mapping = text("mapping").map(str::to_owned);
        intent.tenant = text("tenant").and_then(|text| Tenant::parse(text).ok());
        intent.user = text("user").and_then(|text| UserId::parse(text).ok());
        intent.key_name = text("key_name").and_then(|text| KeyName::parse(text).ok());
        intent.record_id = text("record_id").and_then(RecordId::from_hex);
        let revision = self.fields.get("revision").and_then(Value::as_u64);
        intent.revision = revision.and_then(Revision::new);
        intent.wrapping_key = text("wrapping_key").and_then(WrappingKeyId::from_hex);
        intent.recipient = text("recipient").and_then(Fingerprint::from_hex);
        intent.policy = text("policy").map(|policy| policy.to_owned().into());
        intent.request_id =
            text("request_id").and_then(|text| RequestId::parse(text).ok().flatten());
        intent.client = text("client").and_then(ClientId::from_hex);
        intent.grant = text("grant").map(str::to_owned);
        intent.peer = text("peer").map(str::to_owned);
        intent.digest = text("digest").map(str::to_owned);
        let both = |principal, person| {
            let (principal, person) = (text(principal)?, text(person)?);
            Some((principal.to_owned(), person.to_owned()))
        };
        let persons = Persons {
            approval: text("approval").and_then(ApprovalId::from_hex),
            person: text("person").map(str::to_owned),
            requested_by: both("requested_by", "requested_by_person"),
            approved_by: both("approved_by", "approved_by_person"),
        };
        intent.persons = (persons != Persons::default()).then(|| Box::new(persons));
        intent.bitwarden = bitwarden(&text);
        let device = DeviceFacts {
            device: text("device").and_then(DeviceId::from_hex),
            request: text("access_request").and_then(AccessRequestId::from_hex),
            asked_by: text("asked_by").map(str::to_owned),
            place: text("place").map(str::to_owned),
            public_key: text("public_key").map(str::to_owned),
        };
        intent.device = (device != DeviceFacts::default()).then(|| Box::new(device));
        intent.token = text("token").map(str::to_owned);
        intent.call_id = self.call_id;
        Some(OpenIntent {
            call: self.call_id?,
            at: Timestamp::from_micros(self.time_us),
            intent,
        })
    }

    /// The registry that this line records.
    pub(super) fn recorded(&self) -> Recorded {
        let text = |name: &str| self.fields.get(name).and_then(Value::as_str);
        Recorded {
            at: self.at(),
            registry: text("registry").map(str::to_owned),
        }
    }

    /// Whether this line records that the intended change was made.
    pub(super) fn is_done(&self) -> bool {
        let outcome = self.fields.get("outcome").and_then(Value::as_str);
        self.closes_intent() && outcome == Some(outcome_name(Outcome::Ok))
    }

    /// When the line was written.
    pub(super) fn at(&self) -> Timestamp {
        Timestamp::from_micros(self.time_us)
    }

    /// Whether this line closes the intent with its call id.
    pub(super) fn closes_intent(&self) -> bool {
        [EntryKind::Outcome, EntryKind::Recovered]
            .map(kind_name)
            .contains(&self.kind.as_str())
    }
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

    /// A broker that is killed between intent and outcome writes the recovered entry with the names of both persons, with the mapping
    /// of the principal, and with the device.
    #[test]
    fn the_persons_and_the_mapping_of_an_intent_are_read_back() {
        let mut entry = Entry::new(EntryKind::Intent, "wrapping_key.destroy", Outcome::Ok);
        let both = |principal: &str, person: &str| Some((principal.to_owned(), person.to_owned()));
        entry.call_id = Some(CallId::fresh());
        entry.mapping = Some("administrators".to_owned());
        entry.persons = Some(Box::new(Persons {
            approval: Some(ApprovalId::from_bytes([7; 16])),
            person: Some("Ada".to_owned()),
            requested_by: both("URI:ada", "Ada"),
            approved_by: both("URI:bob", "Bob"),
        }));
        entry.device = Some(Box::new(DeviceFacts {
            device: Some(DeviceId::from_bytes([8; 16])),
            request: Some(AccessRequestId::from_bytes([9; 16])),
            asked_by: Some("token:home:ada".to_owned()),
            place: Some("office".to_owned()),
            public_key: Some("ab".repeat(32)),
        }));
        let mut line = Vec::new();
        encode(&entry, place(), &mut line);
        let parsed = parse(&line[..line.len() - 1]).unwrap();
        assert_eq!(parsed.intent().unwrap().intent, entry);
    }

    proptest! {
        /// The entry is one canonical line that can be read back, even if the name of a caller contains unusual
        /// characters.
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
