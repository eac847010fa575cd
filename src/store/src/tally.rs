//! How many rows a long piece of work has changed so far: what is told of it when it fails in the middle.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Counts what is done, however the whole ends.
#[derive(Debug, Default)]
pub struct Tally {
    begun: AtomicBool,
    rows: AtomicU64,
}

impl Tally {
    /// Before a change is tried: from here on it is not certain that nothing was changed.
    pub fn begin(&self) {
        self.begun.store(true, Ordering::Relaxed);
    }

    /// After one was made.
    pub fn add(&self, rows: usize) {
        let rows = u64::try_from(rows).unwrap_or(u64::MAX);
        self.rows.fetch_add(rows, Ordering::Relaxed);
    }

    /// Rows that were changed, of which we know.
    pub fn rows(&self) -> u64 {
        self.rows.load(Ordering::Relaxed)
    }

    /// The same; nothing before a change was tried.
    pub fn rows_if_begun(&self) -> Option<u64> {
        self.begun.load(Ordering::Relaxed).then(|| self.rows())
    }
}
