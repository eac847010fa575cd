//! The number of calls in progress, over all APIs.

use crate::metrics::CALLS_IN_PROGRESS;

/// Counts one call as in progress until this value is dropped, even if the call panics.
#[derive(Debug)]
pub struct CallInProgress(());

impl CallInProgress {
    /// Counts one more call as in progress.
    #[expect(
        clippy::new_without_default,
        reason = "a default that counts would surprise"
    )]
    pub fn new() -> Self {
        CALLS_IN_PROGRESS.handle().increment(1.0);
        Self(())
    }
}

impl Drop for CallInProgress {
    fn drop(&mut self) {
        CALLS_IN_PROGRESS.handle().decrement(1.0);
    }
}
