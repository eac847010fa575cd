//! Tests sealed wrapping keys on a token, and the job of a sealed release inside the worker.

use std::time::Duration;

use aws_lc_rs::rsa::KeySize;
use keybroker_core::{
    envelope::{Algorithm, MAC_BYTES},
    key::{Purpose, Sealing},
};
use keybroker_worker_protocol::wire::{
    self, FailureClass,
    request::Job,
    rewrap::{OwnKey, Target},
};

use super::{
    Admin, USER_PIN, faulty,
    faulty::{Fault, code},
    init, pin, record,
    session::{Bench, LONG},
    settings, with_softhsm,
};
use crate::sealed::RecipientPair;

/// A sealed release of a row of the first key to this public key.
fn release(bench: &Bench, wrapped: &[u8], is_forged: bool, recipient: &[u8]) -> Job {
    let Job::Unwrap(envelope) = bench.unwrap_job(wrapped, is_forged) else {
        unreachable!("it is an unwrap")
    };
    Job::Release(wire::Release {
        envelope: Some(envelope),
        recipient: recipient.to_vec(),
        algorithm: Algorithm::RsaOaepSha1.number().into(),
    })
}

fn opened(pair: &RecipientPair, sealed: &[u8]) -> Vec<u8> {
    pair.open(sealed, Algorithm::RsaOaepSha1).unwrap().to_vec()
}

#[test]
fn a_sealed_key_is_made_and_proved_by_its_behaviour() {
    with_softhsm(
        "release::a_sealed_key_is_made_and_proved_by_its_behaviour",
        |folder| {
            init();
            let (settings, faulty) = faulty(folder);
            let open = || Admin::open(&settings, &record(), &pin(USER_PIN), true).unwrap();
            let key = open()
                .generate_key_for(Purpose::Sealed, 2_048, None)
                .unwrap();
            assert_eq!(
                (key.problem, key.purpose, key.sealing),
                (None, Purpose::Sealed, Some(Sealing::Enforced))
            );
            assert!(
                key.private
                    .iter()
                    .any(|found| found.to_string() == "CKA_DECRYPT is false")
            );
            // The unwrap template is kept on the token.
            let checked = open().check(key.id).unwrap();
            assert_eq!(checked.sealing, Some(Sealing::Enforced));

            // Without the template, only the worker prevents a readable object.
            let refused = "[[attribute]]\nname = 0x40000212\n\
                           in_template.refuse = \"CKR_ATTRIBUTE_TYPE_INVALID\"\n";
            faulty.behave(refused);
            let weaker = open()
                .generate_key_for(Purpose::Sealed, 2_048, None)
                .unwrap();
            assert_eq!(weaker.sealing, Some(Sealing::Worker));

            for (behaviour, words) in [
                (
                    "[[attribute]]\nname = \"CKA_VALUE\"\nparts = [\"secret\"]\non_read.value = \"hex:00112233\"\n",
                    "CKA_VALUE can be read",
                ),
                (
                    "[[attribute]]\nname = \"CKA_DECRYPT\"\nparts = [\"private\"]\nin_template.replace = true\n",
                    "decrypt",
                ),
                (
                    "[[rule]]\nfunction = \"C_WrapKey\"\ndo = { corrupt = true }\n",
                    "the recipient cannot decrypt the answer",
                ),
            ] {
                faulty.behave(behaviour);
                let error = open().generate_key_for(Purpose::Sealed, 2_048, None);
                let error = error.unwrap_err().to_string();
                assert!(error.contains(words), "{words}: {error}");
            }
        },
    );
}

/// A key with the attributes of one purpose is not used for the other.
#[test]
fn a_key_of_the_other_purpose_is_refused() {
    with_softhsm("release::a_key_of_the_other_purpose_is_refused", |_| {
        init();
        let token = super::open();
        for purpose in [Purpose::Plain, Purpose::Sealed] {
            let pair = super::generated_for(&token.anchor, purpose);
            let public = crate::keys::public_side(&token.anchor, &pair).unwrap();
            let other = match purpose {
                Purpose::Plain => Purpose::Sealed,
                Purpose::Sealed => Purpose::Plain,
            };
            let place = crate::keys::Place {
                purpose: other,
                ..pair.place()
            };
            let fault = token
                .prove(&settings(), &place, public.fingerprint)
                .unwrap_err();
            assert_eq!(fault.class, crate::classify::Class::Untrusted, "{fault}");
        }
    });
}

#[test]
fn only_authentic_rows_are_released_and_only_to_good_recipients() {
    with_softhsm(
        "release::only_authentic_rows_are_released_and_only_to_good_recipients",
        |folder| {
            let mut bench = Bench::with_keys_for(folder, &[Purpose::Sealed, Purpose::Plain]);
            let wrapped = bench.wrapped();
            let pair = RecipientPair::generate(KeySize::Rsa3072).unwrap();
            let spki = pair.public.spki();
            let decryptions = bench.faulty.count("C_Decrypt begins");
            for _ in 0..2 {
                let sealed = bench
                    .run(release(&bench, &wrapped, false, spki), LONG)
                    .unwrap();
                assert_eq!(opened(&pair, &sealed), b"material");
            }
            assert_eq!(bench.faulty.count("C_Decrypt begins"), decryptions);
            let forged = bench.run(release(&bench, &wrapped, true, spki), LONG);
            assert_eq!(forged, Err(FailureClass::MacRefused));
            let mut damaged = wrapped.clone();
            damaged[40] ^= 1;
            let failed = bench.run(release(&bench, &damaged, false, spki), LONG);
            assert_eq!(failed, Err(FailureClass::Damaged));
            // The front refuses such keys; the worker does not rely on this.
            let failed = bench.run(release(&bench, &wrapped, false, b"no key"), LONG);
            assert_eq!(failed, Err(FailureClass::Recipient));
            let plain = bench.unwrap_job(&wrapped, false);
            assert_eq!(bench.run(plain, LONG), Err(FailureClass::UnknownKey));

            // A token that refuses one recipient's key still makes other releases.
            bench
                .faulty
                .set("C_CreateObject", &Fault::times(code::FUNCTION_FAILED, 40));
            let other = RecipientPair::generate(KeySize::Rsa2048).unwrap();
            let refused = bench.run(release(&bench, &wrapped, false, other.public.spki()), LONG);
            assert!(refused.is_err(), "{refused:?}");
            bench.faulty.clear("C_CreateObject");
            let sealed = bench
                .run(release(&bench, &wrapped, false, spki), LONG)
                .unwrap();
            assert_eq!(opened(&pair, &sealed), b"material");
        },
    );
}

/// An object that is not protected makes the token untrusted, also if the token began to lie after its start.
#[test]
fn a_readable_object_makes_the_token_untrusted() {
    with_softhsm(
        "release::a_readable_object_makes_the_token_untrusted",
        |folder| {
            let mut bench = Bench::with_keys_for(folder, &[Purpose::Sealed]);
            let wrapped = bench.wrapped();
            let pair = RecipientPair::generate(KeySize::Rsa2048).unwrap();
            bench.faulty.behave(
                "[[attribute]]\nname = \"CKA_VALUE\"\nparts = [\"secret\"]\non_read.value = \"hex:00112233\"\n",
            );
            let job = release(&bench, &wrapped, false, pair.public.spki());
            assert_eq!(bench.run(job, LONG), Err(FailureClass::Untrusted));
            let tested = bench.run(Job::SelfTest(wire::SelfTest {}), LONG);
            assert_eq!(tested, Err(FailureClass::Untrusted));
        },
    );
}

/// A token that returns a wrong length for one recipient still makes other releases, unless the length is that of the recipient in
/// the self-tests.
#[test]
fn a_wrong_length_for_one_recipient_does_not_make_the_token_untrusted() {
    with_softhsm(
        "release::a_wrong_length_for_one_recipient_does_not_make_the_token_untrusted",
        |folder| {
            let mut bench = Bench::with_keys_for(folder, &[Purpose::Sealed]);
            let wrapped = bench.wrapped();
            let truncate = |name: &str, on: &str| {
                format!(
                    "[[rule]]\nname = \"{name}\"\nfunction = \"C_WrapKey\"\non = {{ {on} }}\n\
                     do = {{ truncate = 1 }}\n"
                )
            };
            let longer = RecipientPair::generate(KeySize::Rsa3072).unwrap();
            let spki = longer.public.spki();
            bench.faulty.behave(&truncate("once", "times = 1"));
            let sealed = bench
                .run(release(&bench, &wrapped, false, spki), LONG)
                .unwrap();
            assert_eq!(opened(&longer, &sealed), b"material");

            // After a first self-test, the rule applies to each attempt of the job, and to none of the self-tests between them.
            bench.faulty.behave(&truncate("alternating", "every = 2"));
            let self_test = Job::SelfTest(wire::SelfTest {});
            assert_eq!(bench.run(self_test, LONG), Ok(Vec::new()));
            let refused = bench.run(release(&bench, &wrapped, false, spki), LONG);
            assert_eq!(refused, Err(FailureClass::Recipient));
            bench.faulty.behave("");
            let sealed = bench
                .run(release(&bench, &wrapped, false, spki), LONG)
                .unwrap();
            assert_eq!(opened(&longer, &sealed), b"material");

            let usual = RecipientPair::generate(KeySize::Rsa2048).unwrap();
            bench.faulty.behave(&truncate("usual length", "times = 1"));
            let job = release(&bench, &wrapped, false, usual.public.spki());
            assert_eq!(bench.run(job, LONG), Err(FailureClass::Untrusted));
        },
    );
}

/// The front must not take the time of such a job for the speed of the token.
#[test]
fn a_deadline_after_a_refused_recipient_is_told_apart() {
    with_softhsm(
        "release::a_deadline_after_a_refused_recipient_is_told_apart",
        |folder| {
            let mut bench = Bench::with_keys_for(folder, &[Purpose::Sealed]);
            let wrapped = bench.wrapped();
            let pair = RecipientPair::generate(KeySize::Rsa3072).unwrap();
            let spki = pair.public.spki();
            // After a first self-test, the rule applies to each attempt of the job, and to none of the self-tests between them.
            // The deadline passes in the second attempt.
            bench.faulty.behave(
                "[[rule]]\nname = \"alternating\"\nfunction = \"C_WrapKey\"\non = { every = 2 }\n\
                 do = { delay_ms = 1000, truncate = 1 }\n",
            );
            let self_test = Job::SelfTest(wire::SelfTest {});
            assert_eq!(bench.run(self_test, LONG), Ok(Vec::new()));
            let deadline = Duration::from_millis(1_900);
            let late = bench.run(release(&bench, &wrapped, false, spki), deadline);
            assert_eq!(late, Err(FailureClass::RecipientDeadline));

            bench.faulty.behave(
                "[[rule]]\nname = \"slow\"\nfunction = \"C_Verify\"\ndo = { delay_ms = 400 }\n",
            );
            let deadline = Duration::from_millis(200);
            let late = bench.run(release(&bench, &wrapped, false, spki), deadline);
            assert_eq!(late, Err(FailureClass::Deadline));
        },
    );
}

/// Moves a row from one key to another.
fn moved(bench: &mut Bench, from: usize, to: usize) -> Result<Vec<u8>, FailureClass> {
    let wrapped = bench.wrapped_under(from);
    let Job::Unwrap(envelope) = bench.unwrap_job_of(from, &wrapped, false) else {
        unreachable!("it is an unwrap")
    };
    let key = bench.shared.keys[to].place.id;
    let job = Job::Rewrap(wire::Rewrap {
        envelope: Some(envelope),
        new_algorithm: Algorithm::RsaOaepSha1.number().into(),
        target: Some(Target::OwnKey(OwnKey {
            key_id: key.as_bytes().to_vec(),
            message_before: b"before".to_vec(),
            message_after: b"after".to_vec(),
        })),
    });
    bench.run(job, LONG)
}

#[test]
fn rows_move_to_a_sealed_key_and_never_back() {
    with_softhsm(
        "release::rows_move_to_a_sealed_key_and_never_back",
        |folder| {
            let purposes = [Purpose::Plain, Purpose::Sealed, Purpose::Sealed];
            let mut bench = Bench::with_keys_for(folder, &purposes);
            assert_eq!(moved(&mut bench, 1, 0), Err(FailureClass::UnknownKey));
            for (from, to) in [(0, 1), (1, 2)] {
                let output = moved(&mut bench, from, to).unwrap();
                let (wrapped, mac) = output.split_at(output.len() - MAC_BYTES);
                let pair = RecipientPair::generate(KeySize::Rsa2048).unwrap();
                let job = Job::Release(wire::Release {
                    envelope: Some(wire::Unwrap {
                        key_id: bench.shared.keys[to].place.id.as_bytes().to_vec(),
                        message: [&b"before"[..], wrapped, b"after"].concat(),
                        mac: mac.to_vec(),
                        algorithm: Algorithm::RsaOaepSha1.number().into(),
                        wrapped: wrapped.to_vec(),
                    }),
                    recipient: pair.public.spki().to_vec(),
                    algorithm: Algorithm::RsaOaepSha1.number().into(),
                });
                let sealed = bench.run(job, LONG).unwrap();
                assert_eq!(opened(&pair, &sealed), b"material", "{from} to {to}");
            }
        },
    );
}
