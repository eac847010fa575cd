//! Measures the speed of the token, and whether the token computes in this process.

use std::{
    fs,
    time::{Duration, Instant},
};

use cryptoki::mechanism::Mechanism;

use keybroker_pkcs11_ffi::Session;
use keybroker_worker_protocol::{
    Settings,
    report::{Rate, Report},
};
use rustix::time::{ClockId, clock_gettime};

use super::{Probe, sealed::Working};
use crate::{calling, classify::Fault, negative::Subject, open::OpenToken};

/// Duration of each loop.
const LOOP: Duration = Duration::from_millis(300);
const NEGATIVE_TESTS: &str = "the negative tests of a worker's start";
const MESSAGE: [u8; 64] = [0x3c; 64];
/// Index of the byte that is changed to damage a ciphertext.
const DAMAGED_AT: usize = 40;
/// If a thread waits at least this often per operation on average, the token does not compute in this process.
const WAITS_PER_OPERATION_MAX: f64 = 0.5;

/// The number of operations in a measurement, and how often threads waited during the operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counted {
    /// Number of operations.
    pub(crate) operations: u64,
    /// Number of times that a thread waited for something other than the CPU.
    pub(crate) waits: u64,
}

impl Counted {
    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            operations: self.operations + other.operations,
            waits: self.waits + other.waits,
        }
    }

    /// Whether the token computes in this process. A thread waits for each answer of a device, of a server or of
    /// another process. The load of this machine does not increase the number of waits. Returns `None` if no operation
    /// was counted.
    pub(crate) fn is_local(self) -> Option<bool> {
        let operations = u32::try_from(self.operations).ok()?;
        let waits = u32::try_from(self.waits).ok()?;
        (operations > 0).then(|| f64::from(waits) / f64::from(operations) < WAITS_PER_OPERATION_MAX)
    }
}

/// Returns the number of times that this thread has waited (`voluntary_ctxt_switches`, proc(5)).
pub(crate) fn waits_of_this_thread() -> u64 {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))
        .and_then(|number| number.trim().parse().ok())
        .unwrap_or(0)
}

pub(super) fn measure(
    token: &OpenToken,
    probe: &Probe,
    sealed: Option<&Working>,
    settings: &Settings,
    report: &mut Report,
) -> Result<(), Fault> {
    let decrypt = |session: &Session| probe.self_test.decrypt(session, &probe.pair);
    for sessions in [1, 2, 4] {
        let (decrypted, seconds) = run(token, sessions, "C_Decrypt", decrypt)?;
        if sessions == 1 {
            report.token_cpu_is_local = decrypted.is_local();
        }
        report
            .rates
            .push(per_second("RSA-2048 OAEP", sessions, decrypted, seconds));
        if let Some(sealed) = sealed {
            let release = |session: &Session| sealed.release(session).map(drop);
            let (released, seconds) = run(token, sessions, "C_UnwrapKey", release)?;
            let what = "sealed release from RSA-2048 to RSA-2048";
            report
                .rates
                .push(per_second(what, sessions, released, seconds));
        }
        let Some(integrity_key) = probe.pair.integrity_key.object() else {
            continue;
        };
        let mac = |session: &Session| {
            let made = session.sign(&Mechanism::Sha256Hmac, integrity_key, &MESSAGE);
            made.map(drop).map_err(Fault::from)
        };
        let (signed, seconds) = run(token, sessions, "C_Sign", mac)?;
        report
            .rates
            .push(per_second("HMAC of 64 bytes", sessions, signed, seconds));
    }
    spread(token, probe, report)?;
    let began = Instant::now();
    let opened = token.session(&[])?;
    report.rates.push(milliseconds("opening a session", began));
    let began = Instant::now();
    calling::next("C_FindObjects");
    opened.session.find_objects(&[])?;
    report
        .rates
        .push(milliseconds("a search for all objects", began));
    let (began, cpu) = (Instant::now(), cpu_time());
    // The negative tests are also run when a worker starts. If the token fails a test, the token is not used and the
    // duration of the tests is irrelevant.
    let tried = token.try_what_must_fail(
        settings,
        &probe.pair,
        &probe.public,
        &probe.self_test,
        Subject::InUse,
    );
    if tried.is_ok() {
        let spent = cpu_time().saturating_sub(cpu);
        report.rates.push(milliseconds(NEGATIVE_TESTS, began));
        report.rates.push(Rate {
            name: format!("{NEGATIVE_TESTS}, milliseconds of CPU time"),
            value: rounded(spent),
        });
    }
    Ok(())
}

/// Measures how much the times of single operations differ, with a valid ciphertext and with a damaged ciphertext. Each
/// measurement has a separate session.
fn spread(token: &OpenToken, probe: &Probe, report: &mut Report) -> Result<(), Fault> {
    let mut damaged = probe.self_test.wrapped().to_vec();
    damaged[DAMAGED_AT] ^= 1;
    for (what, ciphertext) in [
        ("one unwrap (RSA-2048 OAEP)", probe.self_test.wrapped()),
        ("a damaged ciphertext", &damaged),
    ] {
        let opened = token.session(&[])?;
        let (began, mut times) = (Instant::now(), Vec::new());
        calling::next("C_Decrypt");
        while began.elapsed() < LOOP {
            let started = Instant::now();
            let mechanism = probe.self_test.mechanism();
            // The token's answers are in another section of the report.
            let _answered = opened
                .session
                .decrypt(&mechanism, probe.pair.private, ciphertext);
            times.push(started.elapsed());
        }
        times.sort_unstable();
        for (name, part) in [("shortest", 0), ("median", 50), ("99th percentile", 99)] {
            if let Some(time) = times.get(times.len() * part / 100) {
                report.rates.push(Rate {
                    name: format!("{what}, milliseconds, {name}"),
                    value: rounded(*time),
                });
            }
        }
    }
    Ok(())
}

/// Returns the durations of the calls that open a token. The durations were measured when the token was opened, because
/// the report cannot repeat the calls.
pub(super) fn of_opening(token: &OpenToken) -> impl Iterator<Item = Rate> {
    let times = token.times;
    let named = [
        ("C_Initialize", Some(times.initialize)),
        ("C_Login", times.login),
    ];
    named.into_iter().filter_map(|(name, time)| {
        Some(Rate {
            name: format!("{name}, milliseconds"),
            value: rounded(time?),
        })
    })
}

fn run(
    token: &OpenToken,
    sessions: u32,
    function: &'static str,
    work: impl Fn(&Session) -> Result<(), Fault> + Sync,
) -> Result<(Counted, f64), Fault> {
    calling::next(function);
    let sessions: Vec<_> = (0..sessions)
        .map(|_| token.session(&[]))
        .collect::<Result<_, _>>()?;
    let began = Instant::now();
    let counted = std::thread::scope(|scope| {
        let running: Vec<_> = sessions
            .into_iter()
            .map(|session| {
                let work = &work;
                scope.spawn(move || -> Result<Counted, Fault> {
                    let before = waits_of_this_thread();
                    let mut operations = 0;
                    while began.elapsed() < LOOP {
                        work(&session.session)?;
                        operations += 1;
                    }
                    Ok(Counted {
                        operations,
                        waits: waits_of_this_thread().saturating_sub(before),
                    })
                })
            })
            .collect();
        running
            .into_iter()
            .map(|thread| thread.join().expect("the loop does not panic"))
            .try_fold(Counted::default(), |sum, one| Ok::<_, Fault>(sum.and(one?)))
    })?;
    Ok((counted, began.elapsed().as_secs_f64()))
}

fn per_second(what: &str, sessions: u32, counted: Counted, seconds: f64) -> Rate {
    let operations = f64::from(u32::try_from(counted.operations).unwrap_or(u32::MAX));
    Rate {
        name: format!("{what} per second, sessions: {sessions}"),
        value: (operations / seconds).round(),
    }
}

fn milliseconds(what: &str, began: Instant) -> Rate {
    Rate {
        name: format!("{what}, milliseconds"),
        value: rounded(began.elapsed()),
    }
}

/// Converts a duration to milliseconds with two decimals.
fn rounded(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e5).round() / 100.0
}

/// Returns the CPU time that this process has used.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}
