//! Tests one session thread of a worker, and its reactions to a token's answers.

use std::{
    path::Path,
    sync::{Arc, atomic::AtomicUsize},
    time::Duration,
};

use super::{
    Faulty, USER_PIN, faulty,
    faulty::{Fault, code},
    generated, init, pin, record, with_softhsm,
};
use keybroker_core::envelope::Algorithm;
use keybroker_worker_protocol::{
    ExpectedKey, Work, frame,
    oaep::WrapKey,
    wire::{self, FailureClass, request::Job},
};

use crate::{
    keys,
    open::{OpenToken, ProvedKey},
    operation,
    session::{SessionThread, Shared},
};

const MESSAGE: &[u8] = b"a record at its place";

struct Bench {
    faulty: Faulty,
    token: OpenToken,
    shared: Arc<Shared>,
    session: SessionThread,
}

impl Bench {
    /// Creates a session thread with this number of keys.
    fn with_keys(folder: &Path, count: usize) -> Self {
        init();
        let (settings, faulty) = faulty(folder);
        let token = OpenToken::login(&settings, &record(), &pin(USER_PIN), true).unwrap();
        let keys: Vec<ProvedKey> = (0..count)
            .map(|_| {
                let pair = generated(&token.anchor);
                let expected = ExpectedKey {
                    id: pair.id,
                    objects: pair.objects.clone(),
                    token_serial: token.info.serial.clone(),
                    fingerprint: keys::public_side(&token.anchor, &pair).unwrap().fingerprint,
                };
                token.prove(&settings, &expected).unwrap()
            })
            .collect();
        let ids: Vec<_> = keys.iter().map(|key| key.place.clone()).collect();
        let shared = Arc::new(Shared {
            module: token.module.clone(),
            slot: token.slot,
            keys,
            turn: AtomicUsize::new(0),
        });
        let session = SessionThread::new(Arc::clone(&shared), token.session(&ids).unwrap());
        Self {
            faulty,
            token,
            shared,
            session,
        }
    }

    fn run(&mut self, job: Job, timeout: Duration) -> Result<Vec<u8>, FailureClass> {
        let timeout = u64::try_from(timeout.as_nanos()).unwrap();
        let mut work = Work::new(job);
        work.stamped(1, frame::monotonic_ns() + timeout);
        let outcome = self.session.run(&work).0;
        outcome
            .map(|bytes| bytes.to_vec())
            .map_err(|failure| failure.class())
    }

    /// Unwraps a row of the first key with a valid MAC.
    fn unwrap(&mut self, wrapped: &[u8], timeout: Duration) -> Result<Vec<u8>, FailureClass> {
        let place = &self.shared.keys[0].place;
        let pair = keys::find(&self.token.anchor, place).unwrap();
        let mac = operation::mac(&self.token.anchor, &pair, MESSAGE).unwrap();
        let job = Job::Unwrap(wire::Unwrap {
            key_id: place.id.as_bytes().to_vec(),
            message: MESSAGE.to_vec(),
            mac: mac.to_vec(),
            algorithm: Algorithm::RsaOaepSha1.number().into(),
            wrapped: wrapped.to_vec(),
        });
        self.run(job, timeout)
    }

    fn wrapped(&self) -> Vec<u8> {
        let spki = &self.shared.keys[0].public.spki;
        let key = WrapKey::new(spki, Algorithm::RsaOaepSha1).unwrap();
        key.wrap(b"material").unwrap()
    }
}

const LONG: Duration = Duration::from_mins(1);

#[test]
fn a_short_failure_is_not_taken_for_damage() {
    with_softhsm(
        "session::a_short_failure_is_not_taken_for_damage",
        |folder| {
            let mut bench = Bench::with_keys(folder, 1);
            let wrapped = bench.wrapped();
            for function in ["C_Verify", "C_Decrypt", "C_DecryptInit"] {
                for code in [code::FUNCTION_FAILED, code::GENERAL_ERROR] {
                    bench.faulty.set(function, &Fault::times(code, 1));
                    let material = bench.unwrap(&wrapped, LONG);
                    assert_eq!(material, Ok(b"material".to_vec()), "{function} {code}");
                }
            }
            // A token that continues to fail is faulty, and the row is not the cause.
            bench
                .faulty
                .set("C_Verify", &Fault::always(code::FUNCTION_FAILED));
            assert_eq!(bench.unwrap(&wrapped, LONG), Err(FailureClass::TokenLost));
            bench.faulty.clear("C_Verify");
            // Damage is reported as damage, whatever code the token returns.
            let damaged = vec![7; wrapped.len()];
            assert_eq!(bench.unwrap(&damaged, LONG), Err(FailureClass::Damaged));
            assert_eq!(bench.unwrap(&wrapped, LONG), Ok(b"material".to_vec()));
        },
    );
}

#[test]
fn no_token_call_starts_after_the_deadline() {
    with_softhsm(
        "session::no_token_call_starts_after_the_deadline",
        |folder| {
            let mut bench = Bench::with_keys(folder, 1);
            let wrapped = bench.wrapped();
            let opened = bench.faulty.count("C_OpenSession begins");
            // The job fails when its time is up, so no time is left for a self-test.
            let late = Fault {
                milliseconds: 300,
                ..Fault::times(code::FUNCTION_FAILED, 1)
            };
            bench.faulty.set("C_Verify", &late);
            let verified = bench.faulty.count("C_Verify begins");
            let ended = bench.unwrap(&wrapped, Duration::from_millis(200));
            assert_eq!(ended, Err(FailureClass::Deadline));
            assert_eq!(bench.faulty.count("C_OpenSession begins"), opened);
            assert_eq!(bench.faulty.count("C_Verify begins"), verified + 1);
            // The session is lost, and a job that is too late opens no other session.
            let ended = bench.unwrap(&wrapped, Duration::ZERO);
            assert_eq!(ended, Err(FailureClass::Deadline));
            assert_eq!(bench.faulty.count("C_OpenSession begins"), opened);
            assert_eq!(bench.unwrap(&wrapped, LONG), Ok(b"material".to_vec()));
        },
    );
}

/// A device drops the login, or its directory is moved: its private objects are not found.
#[test]
fn keys_that_are_gone_mean_that_the_token_is() {
    with_softhsm(
        "session::keys_that_are_gone_mean_that_the_token_is",
        |folder| {
            let mut bench = Bench::with_keys(folder, 1);
            let wrapped = bench.wrapped();
            bench.token.anchor.logout().unwrap();
            let id = bench.shared.keys[0].place.id;
            let job = Job::Mac(wire::Mac {
                key_id: id.as_bytes().to_vec(),
                message: MESSAGE.to_vec(),
            });
            assert_eq!(bench.run(job, LONG), Err(FailureClass::TokenLost));
            drop(wrapped);
        },
    );
}

/// A self-test costs no more with many keys than with one, and each key gets its turn.
#[test]
fn the_self_test_uses_one_key_at_a_time() {
    with_softhsm("session::the_self_test_uses_one_key_at_a_time", |folder| {
        let mut bench = Bench::with_keys(folder, 3);
        for _ in 0..3 {
            let before = bench.faulty.count("C_DecryptInit begins");
            let self_test = Job::SelfTest(wire::SelfTest {});
            assert_eq!(bench.run(self_test, LONG), Ok(Vec::new()));
            assert_eq!(bench.faulty.count("C_DecryptInit begins"), before + 1);
        }
        // One of the three keys is lost, and one of three consecutive self-tests detects it.
        let pair = keys::find(&bench.token.anchor, &bench.shared.keys[1].place).unwrap();
        bench.token.anchor.destroy_object(pair.private).unwrap();
        let noticed = (0..3).any(|_| bench.run(Job::SelfTest(wire::SelfTest {}), LONG).is_err());
        assert!(noticed);
    });
}
