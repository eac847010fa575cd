//! The number of calls under way, over all APIs.

use crate::metrics::CALLS_IN_PROGRESS;

/// One call, counted until this is dropped, also when it panics.
#[derive(Debug)]
pub struct CallInProgress(());

impl CallInProgress {
    /// A call that begins now.
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
