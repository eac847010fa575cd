//! Tests one session thread of a worker, and its reactions to a token's answers.

use std::{
    env,
    path::Path,
    sync::{Arc, atomic::AtomicUsize},
    thread,
    time::{Duration, Instant},
};

use super::{
    Faulty, USER_PIN, faulty,
    faulty::{Fault, code},
    generated_for, init, pin, record, with_softhsm,
};
use keybroker_core::{envelope::Algorithm, key::Purpose};
use keybroker_worker_protocol::{
    Work, frame,
    oaep::WrapKey,
    wire::{self, FailureClass, request::Job},
};

use crate::{
    busy::LastAnswer,
    keys,
    open::{OpenToken, ProvedKey},
    operation,
    session::{SessionThread, Shared},
};

const MESSAGE: &[u8] = b"a record at its place";

/// A session thread on a token that simulates failures.
pub(super) struct Bench {
    pub(super) faulty: Faulty,
    token: OpenToken,
    pub(super) shared: Arc<Shared>,
    session: SessionThread,
}

impl Bench {
    /// Creates a session thread with this number of keys.
    pub(super) fn with_keys(folder: &Path, count: usize) -> Self {
        Self::with_keys_for(folder, &vec![Purpose::Plain; count])
    }

    /// Creates a session thread with a key for each purpose.
    pub(super) fn with_keys_for(folder: &Path, purposes: &[Purpose]) -> Self {
        init();
        let (settings, faulty) = faulty(folder);
        let token = OpenToken::login(&settings, &record(), &pin(USER_PIN), true).unwrap();
        let keys: Vec<ProvedKey> = purposes
            .iter()
            .map(|purpose| {
                let pair = generated_for(&token.anchor, *purpose);
                let public = keys::public_side(&token.anchor, &pair).unwrap();
                let place = pair.place();
                token.prove(&settings, &place, public.fingerprint).unwrap()
            })
            .collect();
        let ids: Vec<_> = keys.iter().map(|key| key.place.clone()).collect();
        let shared = Arc::new(Shared {
            module: token.module.clone(),
            slot: token.slot,
            keys,
            turn: AtomicUsize::new(0),
            last_answer: LastAnswer::default(),
        });
        let session = SessionThread::new(Arc::clone(&shared), token.session(&ids).unwrap());
        Self {
            faulty,
            token,
            shared,
            session,
        }
    }

    pub(super) fn run(&mut self, job: Job, timeout: Duration) -> Result<Vec<u8>, FailureClass> {
        run_on(&mut self.session, job, timeout)
    }

    /// Unwraps a row of the first key with a valid MAC.
    pub(super) fn unwrap(
        &mut self,
        wrapped: &[u8],
        timeout: Duration,
    ) -> Result<Vec<u8>, FailureClass> {
        let job = self.unwrap_job(wrapped, false);
        self.run(job, timeout)
    }

    /// Unwraps a row with a valid or a forged MAC, and returns the duration.
    fn unwrap_as(
        &mut self,
        wrapped: &[u8],
        is_forged: bool,
    ) -> (Result<Vec<u8>, FailureClass>, Duration) {
        let job = self.unwrap_job(wrapped, is_forged);
        let began = Instant::now();
        (self.run(job, LONG), began.elapsed())
    }

    pub(super) fn unwrap_job(&self, wrapped: &[u8], is_forged: bool) -> Job {
        self.unwrap_job_of(0, wrapped, is_forged)
    }

    /// Unwraps a row of the key with this number.
    pub(super) fn unwrap_job_of(&self, number: usize, wrapped: &[u8], is_forged: bool) -> Job {
        let place = &self.shared.keys[number].place;
        let pair = keys::find(&self.token.anchor, place).unwrap();
        let mut mac = operation::mac(&self.token.anchor, &pair, MESSAGE).unwrap();
        mac[0] ^= u8::from(is_forged);
        Job::Unwrap(wire::Unwrap {
            key_id: place.id.as_bytes().to_vec(),
            message: MESSAGE.to_vec(),
            mac: mac.to_vec(),
            algorithm: Algorithm::RsaOaepSha1.number().into(),
            wrapped: wrapped.to_vec(),
        })
    }

    pub(super) fn wrapped(&self) -> Vec<u8> {
        self.wrapped_under(0)
    }

    /// Wraps under the key with this number.
    pub(super) fn wrapped_under(&self, number: usize) -> Vec<u8> {
        let spki = &self.shared.keys[number].public.spki;
        let key = WrapKey::new(spki, Algorithm::RsaOaepSha1).unwrap();
        key.wrap(b"material").unwrap()
    }
}

pub(super) const LONG: Duration = Duration::from_mins(1);

/// Repeats a job while the token is busy, as the front does.
fn until_done(session: &mut SessionThread, job: &Job) -> Result<Vec<u8>, FailureClass> {
    for _ in 0..100 {
        match run_on(session, job.clone(), LONG) {
            Err(FailureClass::BackOff) => thread::sleep(Duration::from_millis(5)),
            other => return other,
        }
    }
    Err(FailureClass::BackOff)
}

fn run_on(
    session: &mut SessionThread,
    job: Job,
    timeout: Duration,
) -> Result<Vec<u8>, FailureClass> {
    let timeout = u64::try_from(timeout.as_nanos()).unwrap();
    let mut work = Work::new(job);
    work.stamped(1, frame::monotonic_ns() + timeout);
    let outcome = session.run(&work).0;
    outcome
        .map(|bytes| bytes.to_vec())
        .map_err(|failure| failure.class())
}

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

/// An ambiguous code has no influence on the result. A good record is released, and a damaged record is reported as
/// damaged, whichever ambiguous code the token returns.
///
/// `KEYBROKER_TEST_AMBIGUOUS_CODES=1000` sets the number of decisions for good and for damaged records each. The
/// default is 24.
#[test]
fn ambiguous_codes_are_decided_by_the_self_test() {
    /// The codes in the table of `classify` that modules really return.
    const CODES: [i64; 4] = [
        code::FUNCTION_FAILED,
        code::GENERAL_ERROR,
        code::DEVICE_ERROR,
        code::VENDOR_DEFINED,
    ];
    const OF_GOOD_RECORDS: [&str; 4] = ["C_VerifyInit", "C_Verify", "C_DecryptInit", "C_Decrypt"];
    let count = env::var("KEYBROKER_TEST_AMBIGUOUS_CODES");
    let count: usize = count.map_or(24, |text| text.parse().unwrap());
    with_softhsm(
        "session::ambiguous_codes_are_decided_by_the_self_test",
        |folder| {
            let mut bench = Bench::with_keys(folder, 1);
            let wrapped = bench.wrapped();
            let damaged = vec![7; wrapped.len()];
            let mut times = [const { Vec::new() }; 2];
            for number in 0..count {
                let code = CODES[number % CODES.len()];
                let function = OF_GOOD_RECORDS[number / CODES.len() % OF_GOOD_RECORDS.len()];
                bench.faulty.set(function, &Fault::times(code, 1));
                let (ended, spent) = bench.unwrap_as(&wrapped, false);
                assert_eq!(ended, Ok(b"material".to_vec()), "{code:#x} from {function}");
                bench.faulty.clear(function);
                times[0].push(spent);

                // Either a wrong MAC over the stored ciphertext, or a good MAC over a ciphertext that cannot be
                // decrypted.
                let is_forged = number % 2 == 0;
                let (function, is_called, stored) = if is_forged {
                    ("C_Verify", FailureClass::MacRefused, &wrapped)
                } else {
                    ("C_Decrypt", FailureClass::Damaged, &damaged)
                };
                bench
                    .faulty
                    .set(function, &Fault::always(code::instead(code)));
                let (ended, spent) = bench.unwrap_as(stored, is_forged);
                assert_eq!(ended, Err(is_called), "{code:#x} from {function}");
                bench.faulty.clear(function);
                times[1].push(spent);
            }
            for (what, times) in ["good", "damaged"].into_iter().zip(&mut times) {
                times.sort();
                println!(
                    "{count} {what} records behind an ambiguous code: all decided right; whole job: median {:?}, p99 {:?}, longest {:?}",
                    times[count / 2],
                    times[count * 99 / 100],
                    times[count - 1],
                );
            }
        },
    );
}

/// An overloaded device refuses operations with a code that also means damage. No good record is reported as damaged,
/// the token does not count as lost, and damage is still found.
#[test]
fn a_busy_token_is_neither_lost_nor_are_its_records_damaged() {
    const THREADS: usize = 6;
    const JOBS: usize = 40;
    with_softhsm(
        "session::a_busy_token_is_neither_lost_nor_are_its_records_damaged",
        |folder| {
            let mut bench = Bench::with_keys(folder, 1);
            let wrapped = bench.wrapped();
            let job = bench.unwrap_job(&wrapped, false);
            let damaged = bench.unwrap_job(&vec![7; wrapped.len()], false);
            let places = [bench.shared.keys[0].place.clone()];
            let sessions: Vec<SessionThread> = (0..THREADS)
                .map(|_| {
                    let session = bench.token.session(&places).unwrap();
                    SessionThread::new(Arc::clone(&bench.shared), session)
                })
                .collect();
            bench.faulty.behave(
                "[limits]\nparallel_calls = 4\nlatency_ms = 3\nrefuse = \"CKR_FUNCTION_FAILED\"\n",
            );
            let refusals = || {
                let count = |function| {
                    let code = code::FUNCTION_FAILED;
                    bench.faulty.count(&format!("{function} ends {code}"))
                };
                count("C_Verify") + count("C_Decrypt")
            };
            let outcomes: Vec<Result<Vec<u8>, FailureClass>> = thread::scope(|scope| {
                let threads: Vec<_> = sessions
                    .into_iter()
                    .map(|mut session| {
                        let job = &job;
                        scope.spawn(move || {
                            let jobs = (0..JOBS).map(|_| until_done(&mut session, job));
                            jobs.collect::<Vec<_>>()
                        })
                    })
                    .collect();
                let ended = threads
                    .into_iter()
                    .flat_map(|thread| thread.join().unwrap());
                ended.collect()
            });
            assert!(refusals() > JOBS, "the token was not busy");
            for outcome in outcomes {
                assert_eq!(outcome, Ok(b"material".to_vec()));
            }
            assert_eq!(bench.run(damaged, LONG), Err(FailureClass::Damaged));
            assert_eq!(bench.run(job, LONG), Ok(b"material".to_vec()));
        },
    );
}

/// Each call is a round trip to a device on the network, so no call is made only to get a length.
#[test]
fn an_operation_is_one_call_after_its_initialisation() {
    with_softhsm(
        "session::an_operation_is_one_call_after_its_initialisation",
        |folder| {
            let mut bench = Bench::with_keys(folder, 1);
            let job = bench.unwrap_job(&bench.wrapped(), false);
            let mac = Job::Mac(wire::Mac {
                key_id: bench.shared.keys[0].place.id.as_bytes().to_vec(),
                message: MESSAGE.to_vec(),
            });
            let functions = ["C_Verify", "C_Decrypt", "C_Sign"];
            let counts =
                |bench: &Bench| functions.map(|name| bench.faulty.count(&format!("{name} begins")));
            let before = counts(&bench);
            assert_eq!(bench.run(job, LONG), Ok(b"material".to_vec()));
            bench.run(mac, LONG).unwrap();
            assert_eq!(counts(&bench), before.map(|count| count + 1));
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
            // The job fails at its deadline, so no time is left for a self-test.
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
