//! Counters that all processes with the same script share: a file in the state directory, mapped into each of them. An
//! increment costs no system call and survives a crash of the process.

use std::{
    fs::OpenOptions,
    io,
    os::fd::AsRawFd as _,
    path::Path,
    ptr, slice,
    sync::atomic::{AtomicU64, Ordering},
};

use cryptoki_sys::{CK_RV, CKR_OK};

use crate::functions::Function;

const FILE: &str = "shared";
const FUNCTIONS: usize = Function::ALL.len();
/// Rules that may ever have counted in one state directory.
pub(crate) const RULES_MAX: usize = 4096;
/// Calls and successes per function, a key and a counter per rule, and the single values.
const CELLS: usize = FUNCTIONS * 2 + RULES_MAX * 2 + VALUES;
const VALUES: usize = 4;
const BYTES: usize = CELLS * size_of::<AtomicU64>();

/// A single value that the processes share.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Value {
    /// Wrong PINs of the user since the last right one.
    UserTries,
    /// Wrong PINs of the security officer since the last right one.
    OfficerTries,
    /// When the next operation may begin, in nanoseconds of the monotonic clock.
    NextOperation,
    /// Times that the information of the token was read.
    InfoReads,
}

/// The counters.
#[derive(Debug)]
pub(crate) struct Shared {
    cells: &'static [AtomicU64],
}

/// How often a function was called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Count {
    /// The name of the function.
    pub function: &'static str,
    /// Calls that began.
    pub calls: u64,
    /// Calls that returned `CKR_OK`.
    pub succeeded: u64,
}

/// How often each function was called by all processes whose script has this state directory.
pub fn counts(state: &Path) -> io::Result<Vec<Count>> {
    Shared::open(state).map(|shared| shared.counts())
}

impl Shared {
    /// The counters in this state directory, which are 0 at first.
    pub(crate) fn open(state: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(state.join(FILE))?;
        let length = u64::try_from(BYTES).map_err(io::Error::other)?;
        // Extends with zeros, and changes nothing when another process was first.
        file.set_len(length)?;
        // SAFETY: a new mapping of a file that has this length; nothing else is at the address that the kernel chooses.
        let address = unsafe {
            libc::mmap(
                ptr::null_mut(),
                BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the mapping is aligned to a page, has this length and is never unmapped. It is only used as atomics.
        let cells = unsafe { slice::from_raw_parts(address.cast::<AtomicU64>(), CELLS) };
        Ok(Self { cells })
    }

    /// Counters of this process alone, for a module without a state directory.
    pub(crate) fn private() -> Self {
        let cells: Vec<AtomicU64> = (0..CELLS).map(|_| AtomicU64::new(0)).collect();
        Self {
            cells: Vec::leak(cells),
        }
    }

    pub(crate) fn begin(&self, function: Function) {
        self.of_function(function)[0].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn end(&self, function: Function, code: CK_RV) {
        if code == CKR_OK {
            self.of_function(function)[1].fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn counts(&self) -> Vec<Count> {
        let all = Function::ALL.iter();
        all.map(|(name, function)| {
            let [calls, succeeded] = self.of_function(*function);
            Count {
                function: name,
                calls: calls.load(Ordering::Relaxed),
                succeeded: succeeded.load(Ordering::Relaxed),
            }
        })
        .collect()
    }

    /// The number of this call among those that the rule looked at, from 0. `None` when the table of rules is full.
    pub(crate) fn next_of_rule(&self, key: u64) -> Option<u64> {
        let table = &self.cells[FUNCTIONS * 2..][..RULES_MAX * 2];
        let start = usize::try_from(key % u64::try_from(RULES_MAX).ok()?).ok()?;
        (0..RULES_MAX).find_map(|step| {
            let at = (start + step) % RULES_MAX * 2;
            let found =
                match table[at].compare_exchange(0, key, Ordering::Relaxed, Ordering::Relaxed) {
                    Ok(_) => key,
                    Err(taken) => taken,
                };
            (found == key).then(|| table[at + 1].fetch_add(1, Ordering::Relaxed))
        })
    }

    pub(crate) fn value(&self, value: Value) -> &AtomicU64 {
        let first = CELLS - VALUES;
        let at = match value {
            Value::UserTries => 0,
            Value::OfficerTries => 1,
            Value::NextOperation => 2,
            Value::InfoReads => 3,
        };
        &self.cells[first + at]
    }

    fn of_function(&self, function: Function) -> [&AtomicU64; 2] {
        let at = Function::ALL
            .iter()
            .position(|(_, known)| *known == function)
            .unwrap_or_default();
        [&self.cells[at * 2], &self.cells[at * 2 + 1]]
    }
}
