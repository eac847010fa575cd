//! Tests with vectors from files, which a second implementation made, and with properties that hold for any input.

use std::{
    fs,
    path::{Path, PathBuf},
};

use aws_lc_rs::hmac;
use proptest::prelude::*;
use serde::Deserialize;

use super::mac::{ApprovalFields, DestructionFields, MacMessage, RegistryFields};
use super::*;
use crate::key::{
    ApprovalId, Fingerprint, IntegrityPlace, KeyName, ObjectId, ObjectIds, Purpose, UserId,
    WrappingKeyId, WrappingKeyState,
};
use crate::{approval::ApprovalState, principal::NAME_BYTES_MAX};

#[derive(Deserialize)]
struct Vector {
    binding_key: String,
    kind: String,
    context: VectorContext,
    envelope: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum VectorContext {
    Record {
        tenant: String,
        record_id: String,
        user: String,
        key_name: String,
        revision: u64,
    },
    Client {
        tenant: String,
        context: String,
    },
}

/// The result for a vector's envelope: it is parsed, then authenticated for the vector's context.
#[derive(Debug, PartialEq)]
enum Verdict {
    Accepted,
    MacRefused,
    Malformed(ParseError),
}

impl Vector {
    fn verdict(&self) -> Verdict {
        let bytes = hex::decode(&self.envelope).unwrap();
        let envelope = match Envelope::parse(&bytes) {
            Ok(envelope) => envelope,
            Err(error) => return Verdict::Malformed(error),
        };
        assert_eq!(envelope.to_bytes(), bytes, "what is read is written alike");
        let message = match &self.context {
            VectorContext::Record {
                tenant,
                record_id,
                user,
                key_name,
                revision,
            } => {
                assert_eq!(self.kind, "record");
                envelope.mac_message(&Context::Record {
                    address: &address(tenant, user, key_name),
                    record_id: RecordId::from_hex(record_id).unwrap(),
                    revision: Revision::new(*revision).unwrap(),
                })
            }
            VectorContext::Client { tenant, context } => {
                assert_eq!(self.kind, "client");
                envelope.mac_message(&Context::Client {
                    tenant: &Tenant::parse(tenant).unwrap(),
                    context: &ClientContext::new(hex::decode(context).unwrap()).unwrap(),
                })
            }
        };
        let key = hmac::Key::new(hmac::HMAC_SHA256, &hex::decode(&self.binding_key).unwrap());
        match hmac::verify(&key, message.as_bytes(), envelope.mac()) {
            Ok(()) => Verdict::Accepted,
            Err(_) => Verdict::MacRefused,
        }
    }
}

fn address(tenant: &str, user: &str, name: &str) -> KeyAddress {
    KeyAddress {
        tenant: Tenant::parse(tenant).unwrap(),
        user: UserId::parse(user).unwrap(),
        name: KeyName::parse(name).unwrap(),
    }
}

fn vectors(folder: &str) -> Vec<(PathBuf, Vector)> {
    let root =
        Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join("tests/vectors/envelope/v1");
    let found: Vec<_> = fs::read_dir(root.join(folder))
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let vector = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
            (path, vector)
        })
        .collect();
    assert!(!found.is_empty(), "no vectors in {folder}");
    found
}

#[test]
fn vectors_of_format_1_are_accepted() {
    for (path, vector) in vectors("accept") {
        assert_eq!(vector.verdict(), Verdict::Accepted, "{}", path.display());
    }
}

#[test]
fn negative_vectors_fail_in_their_class() {
    let class = |folder: &str, verdict: &Verdict| {
        matches!(
            (folder, verdict),
            ("truncated", Verdict::Malformed(ParseError::Truncated))
                | ("version", Verdict::Malformed(ParseError::Version(_)))
                | ("kind", Verdict::Malformed(ParseError::Kind(_)))
                | ("algorithm", Verdict::Malformed(ParseError::Algorithm(_)))
                | (
                    "wrapped-length",
                    Verdict::Malformed(ParseError::WrappedLength(_))
                )
                | ("trailing", Verdict::Malformed(ParseError::Trailing(_)))
                | ("mac" | "context", Verdict::MacRefused)
        )
    };
    for folder in [
        "truncated",
        "version",
        "kind",
        "algorithm",
        "wrapped-length",
        "trailing",
        "mac",
        "context",
    ] {
        for (path, vector) in vectors(&format!("reject/{folder}")) {
            let verdict = vector.verdict();
            assert!(class(folder, &verdict), "{}: {verdict:?}", path.display());
        }
    }
}

type RecordFields = (String, [u8; ID_BYTES], String, String, u64);

fn record_fields() -> impl Strategy<Value = RecordFields> {
    (
        "[a-c]{1,3}",
        prop::array::uniform16(0_u8..2),
        "[a-c]{1,3}",
        "[a-c]{1,3}",
        1_u64..3,
    )
}

fn record_message(fields: &RecordFields) -> MacMessage {
    let (tenant, record_id, user, name, revision) = fields;
    some_envelope().mac_message(&Context::Record {
        address: &address(tenant, user, name),
        record_id: RecordId::from_bytes(*record_id),
        revision: Revision::new(*revision).unwrap(),
    })
}

fn some_envelope() -> Unsealed {
    let key = WrappingKeyId::from_bytes([7; ID_BYTES]);
    Unsealed::new(Algorithm::RsaOaepSha256, key, vec![9; WRAPPED_BYTES_MIN]).unwrap()
}

proptest! {
    /// Uses short fields from a small alphabet, so that a collision such as `("ab", "c")` and `("a", "bc")` would be
    /// found.
    #[test]
    fn the_mac_context_is_injective(one in record_fields(), other in record_fields()) {
        prop_assert_eq!(record_message(&one) == record_message(&other), one == other);
    }

    #[test]
    fn a_client_context_never_reads_as_a_record(
        fields in record_fields(),
        context in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let tenant = Tenant::parse(&fields.0).unwrap();
        let client = ClientContext::new(context).unwrap();
        let message = some_envelope().mac_message(&Context::Client { tenant: &tenant, context: &client });
        prop_assert_ne!(message, record_message(&fields));
    }

    #[test]
    fn no_input_panics(bytes in prop::collection::vec(any::<u8>(), 0..ENVELOPE_BYTES_MAX + 8)) {
        if let Ok(envelope) = Envelope::parse(&bytes) {
            prop_assert_eq!(envelope.to_bytes(), bytes);
        }
    }

    /// Random bytes rarely pass the header, so this test damages a valid envelope.
    #[test]
    fn no_damage_panics(
        length in WRAPPED_BYTES_MIN..=WRAPPED_BYTES_MAX,
        cut in 0..ENVELOPE_BYTES_MAX,
        offset in 0..ENVELOPE_BYTES_MAX,
        flip in any::<u8>(),
    ) {
        let tenant = Tenant::default();
        let client = ClientContext::new(vec![]).unwrap();
        let context = Context::Client { tenant: &tenant, context: &client };
        let key = WrappingKeyId::from_bytes([7; ID_BYTES]);
        let unsealed = Unsealed::new(Algorithm::RsaOaepSha1, key, vec![9; length]).unwrap();
        let good = unsealed.seal(&context, [3; MAC_BYTES]).to_bytes();
        prop_assert_eq!(Envelope::parse(&good).unwrap().to_bytes(), good.clone());
        let mut bad = good.clone();
        bad.truncate(cut);
        if let Some(byte) = bad.get_mut(offset) {
            *byte ^= flip;
        }
        if let Ok(envelope) = Envelope::parse(&bad) {
            prop_assert_eq!(envelope.to_bytes(), bad);
        } else {
            prop_assert_ne!(bad, good);
        }
    }
}

/// The MAC of a row that an earlier release wrote must be valid for this row, and invalid for a row with other object
/// ids.
#[test]
fn a_registry_row_names_its_objects_only_where_they_have_ids_of_their_own() {
    let message = |objects: &ObjectIds| {
        let fields = RegistryFields {
            id: WrappingKeyId::from_bytes([1; 16]),
            objects,
            fingerprint: Fingerprint([2; 32]),
            purpose: Purpose::Plain,
            state: WrappingKeyState::Active,
            token_serial: "serial",
            sequence: 3,
            registered_us: 4,
            backup_confirmed_us: None,
        };
        MacMessage::registry(&fields).as_bytes().to_vec()
    };
    let fields = RegistryFields {
        id: WrappingKeyId::from_bytes([1; 16]),
        objects: &ObjectIds::default(),
        fingerprint: Fingerprint([2; 32]),
        purpose: Purpose::Plain,
        state: WrappingKeyState::Destroyed,
        token_serial: "serial",
        sequence: 3,
        registered_us: 4,
        backup_confirmed_us: None,
    };
    let tombstone = MacMessage::tombstone(&fields);
    assert!(
        tombstone
            .as_bytes()
            .starts_with(b"\x00\x1fkeybroker/registry-tombstone/v1")
    );
    // Whether the objects of a destroyed key were removed is in the domain alone.
    let unremoved = MacMessage::unremoved_tombstone(&fields);
    let rest = unremoved
        .as_bytes()
        .strip_prefix(b"\x00\x29keybroker/registry-tombstone-unremoved/v1");
    assert_eq!(rest, Some(&tombstone.as_bytes()[33..]));
    let same = message(&ObjectIds::default());
    let mut first_format = b"\x00\x15keybroker/registry/v1".to_vec();
    first_format.extend([1; 16]);
    first_format.extend([2; 32]);
    first_format.extend(b"\x00\x05plain\x00\x06active\x00\x06serial");
    for number in [3_u64, 4, 0] {
        first_format.extend(number.to_be_bytes());
    }
    assert_eq!(same, first_format);
    let ids =
        |private: &[u8], integrity: &[u8]| ObjectIds::from_slices(private, integrity).unwrap();
    let longest = [7; ObjectId::BYTES_MAX];
    let others = [
        message(&ids(&[1], &[])),
        message(&ids(&[], &[1])),
        message(&ids(&[1], &[1])),
        message(&ids(&[1, 1], &[])),
        message(&ids(&longest, &longest)),
        message(&ObjectIds {
            private: None,
            integrity: IntegrityPlace::Worker,
        }),
    ];
    for (number, other) in others.iter().enumerate() {
        assert!(other.starts_with(b"\x00\x15keybroker/registry/v2"));
        assert!(!others[..number].contains(other));
    }
}

#[test]
fn each_field_of_a_scheduled_destruction_is_in_its_message() {
    let fields = DestructionFields {
        key: WrappingKeyId::from_bytes([1; 16]),
        signer: WrappingKeyId::from_bytes([2; 16]),
        sequence: 3,
        requested_us: 4,
        due_us: 5,
        requested_by: "URI:admin",
    };
    let message =
        |fields: &DestructionFields<'_>| MacMessage::destruction(fields).as_bytes().to_vec();
    let mut expected = b"\x00\x1ckeybroker/key-destruction/v1".to_vec();
    expected.extend([1; 16]);
    expected.extend([2; 16]);
    for number in [3_u64, 4, 5] {
        expected.extend(number.to_be_bytes());
    }
    expected.extend(b"\x00\x09URI:admin");
    assert_eq!(message(&fields), expected);
    // The mark of a destroyed key is in another domain.
    let removal = MacMessage::removal(&fields);
    let rest = expected
        .strip_prefix(b"\x00\x1ckeybroker/key-destruction/v1")
        .unwrap();
    let removal = removal
        .as_bytes()
        .strip_prefix(b"\x00\x18keybroker/key-removal/v1");
    assert_eq!(removal, Some(rest));
    let other = WrappingKeyId::from_bytes([9; 16]);
    let changed = [
        DestructionFields {
            key: other,
            ..fields
        },
        DestructionFields {
            signer: other,
            ..fields
        },
        DestructionFields {
            sequence: 9,
            ..fields
        },
        DestructionFields {
            requested_us: 9,
            ..fields
        },
        DestructionFields {
            due_us: 9,
            ..fields
        },
        DestructionFields {
            requested_by: "URI:other",
            ..fields
        },
    ];
    for (number, one) in changed.iter().enumerate() {
        assert_ne!(message(one), expected, "{number}");
    }
}

/// An edit of any field of a request for approval changes the message, also if bytes move from one field to the next.
#[test]
fn each_field_of_a_request_for_approval_is_in_its_message() {
    let long = "x".repeat(NAME_BYTES_MAX);
    let fields = ApprovalFields {
        id: ApprovalId::from_bytes([1; 16]),
        signer: WrappingKeyId::from_bytes([2; 16]),
        state: ApprovalState::Pending,
        action: "wrapping_key.destroy",
        document: b"{}",
        digest: &[3; 32],
        requested_by: &long,
        requested_person: "Ada",
        requested_us: 4,
        expires_us: 5,
        decided_by: "",
        decided_person: "",
        decided_us: None,
        used_us: None,
    };
    let message = |fields: &ApprovalFields<'_>| MacMessage::approval(fields).as_bytes().to_vec();
    let expected = message(&fields);
    let mut beginning = b"\x00\x15keybroker/approval/v1".to_vec();
    beginning.extend([1; 16]);
    beginning.extend([2; 16]);
    assert!(expected.starts_with(&beginning));
    assert_eq!(expected.len(), beginning.len() + 32);
    let other = [9; 32];
    let edits: [fn(&mut ApprovalFields<'_>); 14] = [
        |fields| fields.id = ApprovalId::from_bytes([9; 16]),
        |fields| fields.signer = WrappingKeyId::from_bytes([9; 16]),
        |fields| fields.state = ApprovalState::Approved,
        |fields| fields.action = "wrapping_key.destroy_now",
        |fields| fields.document = b"{\"a\":1}",
        |fields| fields.requested_by = "URI:other",
        |fields| fields.requested_person = "Bob",
        |fields| fields.requested_us = 9,
        |fields| fields.expires_us = 9,
        |fields| fields.decided_by = "URI:bob",
        |fields| fields.decided_person = "Bob",
        |fields| fields.decided_us = Some(9),
        |fields| fields.used_us = Some(9),
        |fields| (fields.decided_by, fields.decided_person) = ("URI:b", "ob"),
    ];
    let mut messages = vec![expected];
    for edit in edits {
        let mut edited = fields;
        edit(&mut edited);
        messages.push(message(&edited));
    }
    messages.push(message(&ApprovalFields {
        digest: &other,
        ..fields
    }));
    for (number, one) in messages.iter().enumerate() {
        assert!(!messages[..number].contains(one), "{number}");
    }
}

/// A worker that makes the wrapped bytes puts them between the two parts.
#[test]
fn the_parts_around_the_wrapped_bytes_make_up_the_message() {
    let address = KeyAddress {
        tenant: Tenant::default(),
        user: UserId::parse("ada").unwrap(),
        name: KeyName::parse("vault").unwrap(),
    };
    let context = Context::Record {
        address: &address,
        record_id: RecordId::from_bytes([3; 16]),
        revision: Revision::FIRST,
    };
    let key = WrappingKeyId::from_bytes([4; 16]);
    for length in [WRAPPED_BYTES_MIN, WRAPPED_BYTES_MAX] {
        let wrapped = vec![9; length];
        let algorithm = Algorithm::RsaOaepSha256;
        let parts = Unsealed::message_around(algorithm, key, length, &context).unwrap();
        let whole = Unsealed::new(algorithm, key, wrapped.clone()).unwrap();
        let [before, after] = parts;
        assert_eq!(
            [before, wrapped, after].concat(),
            whole.mac_message(&context).as_bytes()
        );
    }
    let short = Unsealed::message_around(Algorithm::RsaOaepSha256, key, 255, &context);
    assert_eq!(short, Err(ParseError::WrappedLength(255)));
}
