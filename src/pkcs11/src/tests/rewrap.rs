//! Tests a re-wrap inside the worker.

use keybroker_core::envelope::{Algorithm, MAC_BYTES};
use keybroker_worker_protocol::{
    oaep::WrapKey,
    wire::{
        self, FailureClass,
        request::Job,
        rewrap::{OwnKey, Target},
    },
};

use super::{
    faulty::{Fault, code},
    session::{Bench, LONG},
    with_softhsm,
};

const BEFORE: &[u8] = b"new record with ";
const AFTER: &[u8] = b" at its place";

/// A re-wrap of a row of the first key.
fn rewrap(bench: &Bench, wrapped: &[u8], is_forged: bool, target: Target) -> Job {
    let Job::Unwrap(envelope) = bench.unwrap_job(wrapped, is_forged) else {
        unreachable!("it is an unwrap")
    };
    Job::Rewrap(wire::Rewrap {
        envelope: Some(envelope),
        new_algorithm: Algorithm::RsaOaepSha1.number().into(),
        target: Some(target),
    })
}

/// The second key of the same worker.
fn own(bench: &Bench) -> Target {
    let id = bench.shared.keys[1].place.id;
    Target::OwnKey(OwnKey {
        key_id: id.as_bytes().to_vec(),
        message_before: BEFORE.to_vec(),
        message_after: AFTER.to_vec(),
    })
}

#[test]
fn material_moves_to_another_key_with_a_new_mac() {
    with_softhsm(
        "rewrap::material_moves_to_another_key_with_a_new_mac",
        |folder| {
            let mut bench = Bench::with_keys(folder, 2);
            let wrapped = bench.wrapped();
            let job = rewrap(&bench, &wrapped, false, own(&bench));
            let output = bench.run(job, LONG).unwrap();
            assert!(!contains(&output, b"material"), "it is in plain");
            let (moved, mac) = output.split_at(output.len() - MAC_BYTES);
            let id = bench.shared.keys[1].place.id;
            let unwrap = |message: Vec<u8>| {
                Job::Unwrap(wire::Unwrap {
                    key_id: id.as_bytes().to_vec(),
                    message,
                    mac: mac.to_vec(),
                    algorithm: Algorithm::RsaOaepSha1.number().into(),
                    wrapped: moved.to_vec(),
                })
            };
            let message = [BEFORE, moved, AFTER].concat();
            let material = bench.run(unwrap(message), LONG);
            assert_eq!(material, Ok(b"material".to_vec()));
            let other = [BEFORE, AFTER].concat();
            let refused = bench.run(unwrap(other), LONG);
            assert_eq!(refused, Err(FailureClass::MacRefused));
        },
    );
}

/// The worker treats a public key from the front like the key of another token, and computes no MAC.
#[test]
fn material_is_wrapped_for_a_key_of_another_token() {
    with_softhsm(
        "rewrap::material_is_wrapped_for_a_key_of_another_token",
        |folder| {
            let mut bench = Bench::with_keys(folder, 2);
            let wrapped = bench.wrapped();
            let spki = |number: usize| bench.shared.keys[number].public.spki.clone();
            let (own, other) = (spki(0), spki(1));
            // The target and the algorithm change from one job to the next.
            for algorithm in [Algorithm::RsaOaepSha256, Algorithm::RsaOaepSha1] {
                for spki in [&own, &other, &own] {
                    let is_own = *spki == own;
                    let target = Target::Spki(spki.clone());
                    let Job::Rewrap(mut job) = rewrap(&bench, &wrapped, false, target) else {
                        unreachable!("it is a re-wrap")
                    };
                    job.new_algorithm = algorithm.number().into();
                    let output = bench.run(Job::Rewrap(job), LONG).unwrap();
                    assert_eq!(output.len(), 256, "no MAC follows");
                    if algorithm == Algorithm::RsaOaepSha1 {
                        let opened = bench.unwrap(&output, LONG).ok();
                        let expected = is_own.then(|| b"material".to_vec());
                        assert_eq!(opened, expected);
                    }
                }
            }
        },
    );
}

#[test]
fn a_forged_row_never_reaches_the_rsa_key() {
    with_softhsm("rewrap::a_forged_row_never_reaches_the_rsa_key", |folder| {
        let mut bench = Bench::with_keys(folder, 2);
        let wrapped = bench.wrapped();
        let before = bench.faulty.count("C_DecryptInit begins");
        let job = rewrap(&bench, &wrapped, true, own(&bench));
        assert_eq!(bench.run(job, LONG), Err(FailureClass::MacRefused));
        assert_eq!(bench.faulty.count("C_DecryptInit begins"), before);

        // A good MAC over bytes that cannot be decrypted: the self-test decides.
        let damaged = vec![7; wrapped.len()];
        let job = rewrap(&bench, &damaged, false, own(&bench));
        assert_eq!(bench.run(job, LONG), Err(FailureClass::Damaged));
        let job = rewrap(&bench, &wrapped, false, own(&bench));
        bench
            .faulty
            .set("C_Decrypt", &Fault::always(code::GENERAL_ERROR));
        assert_eq!(bench.run(job, LONG), Err(FailureClass::TokenLost));
        bench.faulty.clear("C_Decrypt");
        let job = rewrap(&bench, &wrapped, false, own(&bench));
        bench
            .faulty
            .set("C_Sign", &Fault::times(code::FUNCTION_FAILED, 1));
        assert!(bench.run(job, LONG).is_ok(), "a short failure is repeated");
    });
}

/// Key material with an impossible length was not wrapped by a broker.
#[test]
fn material_of_a_wrong_length_and_unknown_targets_are_refused() {
    with_softhsm(
        "rewrap::material_of_a_wrong_length_and_unknown_targets_are_refused",
        |folder| {
            let mut bench = Bench::with_keys(folder, 2);
            let spki = &bench.shared.keys[0].public.spki;
            let key = WrapKey::new(spki, Algorithm::RsaOaepSha1).unwrap();
            for length in [0, 191] {
                let wrapped = key.wrap(&vec![1; length]).unwrap();
                let job = rewrap(&bench, &wrapped, false, own(&bench));
                assert_eq!(bench.run(job, LONG), Err(FailureClass::Damaged), "{length}");
            }
            let wrapped = key.wrap(b"material").unwrap();
            let unknown = Target::OwnKey(OwnKey {
                key_id: vec![9; 16],
                ..OwnKey::default()
            });
            for target in [unknown, Target::Spki(b"no key".to_vec())] {
                let job = rewrap(&bench, &wrapped, false, target);
                assert_eq!(bench.run(job, LONG), Err(FailureClass::UnknownKey));
            }
        },
    );
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}
