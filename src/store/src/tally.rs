//! Counts the rows that a long job has changed. If the job fails, the report contains this number.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Counts the changes of a job, even if the job fails.
#[derive(Debug, Default)]
pub struct Tally {
    begun: AtomicBool,
    rows: AtomicU64,
}

impl Tally {
    /// Records that rows may have been changed. Call this function before the first attempt to
    /// change rows.
    pub fn begin(&self) {
        self.begun.store(true, Ordering::Relaxed);
    }

    /// Call this function after rows were changed.
    pub fn add(&self, rows: usize) {
        let rows = u64::try_from(rows).unwrap_or(u64::MAX);
        self.rows.fetch_add(rows, Ordering::Relaxed);
    }

    /// The number of rows that were certainly changed.
    pub fn rows(&self) -> u64 {
        self.rows.load(Ordering::Relaxed)
    }

    /// The number of rows that were certainly changed; `None` before the first attempt to change
    /// rows.
    pub fn rows_if_begun(&self) -> Option<u64> {
        self.begun.load(Ordering::Relaxed).then(|| self.rows())
    }
}
