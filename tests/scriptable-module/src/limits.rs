//! Limits of a device, which hold over all processes: a place is a locked file, and the kernel unlocks it when the process
//! that holds it ends, however it ends.

use std::{
    fs::{File, OpenOptions},
    path::Path,
    sync::atomic::Ordering,
    thread,
    time::Duration,
};

use cryptoki_sys::CK_RV;

use crate::{functions::Function, process::Process, script::Limits, shared::Value};

/// How often an operation that waits for its place looks for one.
const LOOK: Duration = Duration::from_millis(1);
const NANOSECONDS: u64 = 1_000_000_000;

/// One of a limited number of places, free again when this is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    /// Its lock is the place.
    _file: File,
}

impl Place {
    /// A free place of this kind, if there is one.
    pub(crate) fn take(state: Option<&Path>, kind: &str, number: usize) -> Option<Self> {
        let state = state?;
        (0..number).find_map(|index| {
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .open(state.join(format!("{kind}-{index}")))
                .ok()?;
            file.try_lock().ok()?;
            Some(Self { _file: file })
        })
    }
}

/// Whether a function makes the device work with a key.
fn is_operation(function: Function) -> bool {
    use Function as F;
    matches!(
        function,
        F::C_Encrypt
            | F::C_Decrypt
            | F::C_Sign
            | F::C_Verify
            | F::C_SignFinal
            | F::C_VerifyFinal
            | F::C_EncryptFinal
            | F::C_DecryptFinal
            | F::C_GenerateKey
            | F::C_GenerateKeyPair
            | F::C_WrapKey
            | F::C_UnwrapKey
            | F::C_DeriveKey
    )
}

/// Waits until the device takes the operation. What is returned is held while the operation runs.
pub(crate) fn wait(
    process: &Process,
    limits: &Limits,
    function: Function,
) -> Result<Option<Place>, CK_RV> {
    if !is_operation(function) {
        return Ok(None);
    }
    if let Some(rate) = limits.operations_per_second.filter(|rate| *rate > 0) {
        wait_for_turn(process, NANOSECONDS / u64::from(rate), limits)?;
    }
    let place = match limits.parallel_calls {
        Some(number) => Some(wait_for_place(process, number, limits)?),
        None => None,
    };
    if limits.latency_ms > 0 {
        thread::sleep(Duration::from_millis(limits.latency_ms));
    }
    Ok(place)
}

fn wait_for_place(process: &Process, number: usize, limits: &Limits) -> Result<Place, CK_RV> {
    loop {
        if let Some(place) = Place::take(process.state.as_deref(), "operation", number) {
            return Ok(place);
        }
        if let Some(code) = limits.refuse {
            return Err(code.0);
        }
        thread::sleep(LOOK);
    }
}

/// Operations begin one interval after each other.
fn wait_for_turn(process: &Process, interval: u64, limits: &Limits) -> Result<(), CK_RV> {
    let now = monotonic();
    let next = process.shared.value(Value::NextOperation);
    let turn = next
        .fetch_update(Ordering::AcqRel, Ordering::Acquire, |next| {
            let refused = next > now && limits.refuse.is_some();
            (!refused).then_some(next.max(now) + interval)
        })
        .map_err(|_| limits.refuse.map_or(0, |code| code.0))?;
    thread::sleep(Duration::from_nanos(turn.saturating_sub(now)));
    Ok(())
}

/// Nanoseconds of the clock that all processes share and that is never set.
fn monotonic() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the call only writes to `time`.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    let nanoseconds = u64::try_from(time.tv_nsec).unwrap_or_default();
    seconds * NANOSECONDS + nanoseconds
}
