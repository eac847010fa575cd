use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _,
};
use proptest::prelude::*;

use super::*;
use crate::key::{DeviceId, Tenant, UserId};

fn at(micros: i64) -> Timestamp {
    Timestamp::from_micros(micros)
}

/// The tables of the documentation have each state with its successors, and no other state.
#[test]
fn the_documentation_has_every_transition() {
    let page = include_str!("../../../../docs/devices.md");
    let documented = |heading: &str| -> Vec<(String, String)> {
        let (_, table) = page.split_once(heading).unwrap();
        let (table, _) = table.split_once("\n\n").unwrap();
        let rows = table.lines().skip(2).map(|line| {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            (cells[1].to_owned(), cells[2].to_owned())
        });
        rows.collect()
    };
    let names = |states: Vec<String>| states.join(", ");
    let devices = DeviceState::ALL.map(|state| {
        let next = state.next().iter().map(ToString::to_string).collect();
        (state.to_string(), names(next))
    });
    assert_eq!(documented("| State of a device | Next states |"), devices);
    let requests = AccessState::ALL.map(|state| {
        let next = state.next().iter().map(ToString::to_string).collect();
        (state.to_string(), names(next))
    });
    assert_eq!(documented("| State of a request | Next states |"), requests);
}

#[test]
fn each_state_has_a_name_that_is_read_back() {
    for state in DeviceState::ALL {
        assert_eq!(DeviceState::parse(state.as_str()), Some(state));
    }
    for state in AccessState::ALL {
        assert_eq!(AccessState::parse(state.as_str()), Some(state));
    }
    for approver in [AccessApprover::Device, AccessApprover::Administrator] {
        assert_eq!(AccessApprover::parse(approver.as_str()), Some(approver));
    }
    assert_eq!(DeviceState::parse("Trusted"), None);
    assert_eq!(AccessState::parse(""), None);
    assert_eq!(AccessApprover::parse("admin"), None);
}

fn any_state() -> impl Strategy<Value = AccessState> {
    prop::sample::select(AccessState::ALL.to_vec())
}

proptest! {
    /// After any sequence of attempts, a request was decided at most once, and is consumed only after an approval that was not revoked.
    /// The end of an approval is final.
    #[test]
    fn no_sequence_of_changes_decides_twice(attempts in prop::collection::vec(any_state(), 0..40)) {
        let mut passed = vec![AccessState::Pending];
        for to in attempts {
            let state = *passed.last().unwrap();
            if state.may_become(to) {
                prop_assert!(state.is_open() || (state, to) == (AccessState::Consumed, AccessState::Revoked));
                passed.push(to);
            }
        }
        prop_assert!(passed.len() <= 4, "{passed:?}");
        let decisions = [AccessState::Approved, AccessState::Denied];
        let decided = passed.iter().filter(|state| decisions.contains(state)).count();
        prop_assert!(decided <= 1, "{passed:?}");
        for after in [AccessState::Consumed, AccessState::Revoked] {
            if passed.contains(&after) {
                prop_assert_eq!(&passed[..2], &[AccessState::Pending, AccessState::Approved][..]);
            }
        }
        if let Some(end) = passed.iter().position(|state| *state == AccessState::Revoked) {
            prop_assert_eq!(end, passed.len() - 1);
        }
    }

    /// Time changes only open requests, exactly at its moment, and never to a state that is not a successor.
    #[test]
    fn time_changes_only_open_requests(
        state in any_state(), expires in any::<i64>(), fetched in any::<Option<i64>>(), now in any::<i64>()
    ) {
        let shown = state.at(at(expires), fetched.map(at), at(now));
        prop_assert!(shown == state || state.may_become(shown));
        let is_read = fetched.is_some_and(|read| now >= read.saturating_add(ANSWER_KEPT_US));
        let expected = match state {
            AccessState::Approved if is_read => AccessState::Consumed,
            AccessState::Pending | AccessState::Approved if now >= expires => AccessState::Expired,
            other => other,
        };
        prop_assert_eq!(shown, expected);
    }

    /// No two lists of fields have the same signed bytes.
    #[test]
    fn signed_bytes_are_unambiguous(
        one in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..4), 0..4),
        two in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..4), 0..4)
    ) {
        let bytes = |fields: &Vec<Vec<u8>>| {
            let fields: Vec<&[u8]> = fields.iter().map(Vec::as_slice).collect();
            statement(&fields)
        };
        prop_assert_eq!(bytes(&one).as_bytes() == bytes(&two).as_bytes(), one == two);
    }
}

fn statement(fields: &[&[u8]]) -> Statement {
    let user = UserId::parse("ada").unwrap();
    let device = DeviceId::from_bytes([7; 16]);
    Statement::new(
        StatementKind::Untrust,
        &Tenant::default(),
        &user,
        device,
        at(5),
        fields,
    )
}

#[test]
fn the_signed_bytes_are_as_documented() {
    let mut expected = b"\0\0\0\x1dkeybroker/device-signature/v1".to_vec();
    expected.extend(b"\0\0\0\x07untrust\0\0\0\x07default\0\0\0\x03ada\0\0\0\x10");
    expected.extend([7; 16]);
    expected.extend(b"\0\0\0\x08\0\0\0\0\0\0\0\x05\0\0\0\x02id");
    assert_eq!(statement(&[b"id"]).as_bytes(), expected);
}

#[test]
fn a_signature_counts_once_and_only_in_its_time() {
    let pair = Ed25519KeyPair::generate().unwrap();
    let key = VerificationKey::from_slice(pair.public_key().as_ref()).unwrap();
    let statement = statement(&[b"id"]);
    let signature = |bytes: &[u8]| DeviceSignature {
        device: DeviceId::from_bytes([7; 16]),
        at: at(5),
        bytes: pair.sign(bytes).as_ref().try_into().unwrap(),
    };
    let good = signature(statement.as_bytes());
    assert_eq!(statement.verify(&key, &good, None, at(5)), Ok(()));
    assert_eq!(statement.verify(&key, &good, Some(at(4)), at(5)), Ok(()));
    for last in [5, 6] {
        let refused = statement.verify(&key, &good, Some(at(last)), at(5));
        assert_eq!(refused, Err(SignatureRefused::Replayed));
    }
    for now in [5 + SIGNATURE_SKEW_US, 5 - SIGNATURE_SKEW_US] {
        assert_eq!(statement.verify(&key, &good, None, at(now)), Ok(()));
    }
    for now in [6 + SIGNATURE_SKEW_US, 4 - SIGNATURE_SKEW_US] {
        let refused = statement.verify(&key, &good, None, at(now));
        assert_eq!(refused, Err(SignatureRefused::Time));
    }
    let other = signature(b"other");
    let refused = statement.verify(&key, &other, None, at(5));
    assert_eq!(refused, Err(SignatureRefused::Wrong));
}

#[test]
fn keys_of_both_algorithms_verify_and_others_are_refused() {
    let rng = aws_lc_rs::rand::SystemRandom::new();
    let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &rng).unwrap();
    let pair =
        EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, document.as_ref()).unwrap();
    let key = VerificationKey::from_slice(pair.public_key().as_ref()).unwrap();
    let statement = statement(&[]);
    let signed = pair.sign(&rng, statement.as_bytes()).unwrap();
    let signature = DeviceSignature {
        device: DeviceId::from_bytes([7; 16]),
        at: at(5),
        bytes: signed.as_ref().try_into().unwrap(),
    };
    assert_eq!(statement.verify(&key, &signature, None, at(5)), Ok(()));
    let ed25519 = VerificationKey::from_slice(&[9; 32]).unwrap();
    let refused = statement.verify(&ed25519, &signature, None, at(5));
    assert_eq!(refused, Err(SignatureRefused::Wrong));
    for length in [0, 31, 33, 64, 66] {
        assert_eq!(VerificationKey::from_slice(&vec![4; length]), None);
    }
    assert_eq!(VerificationKey::from_slice(&[2; 65]), None);
}
