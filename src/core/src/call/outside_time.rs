//! The time that a call spends outside the broker: in the queue for the token and in the vendor's module. The rest of
//! the call's duration is the time that the broker adds.

use std::{cell::Cell, time::Duration};

tokio::task_local! {
    static OUTSIDE: Cell<Duration>;
}

/// Runs the work, and returns its result with the time outside the broker that [`note`] recorded during the work.
pub async fn measured<T>(work: impl Future<Output = T>) -> (T, Duration) {
    let work = async {
        let result = work.await;
        (result, OUTSIDE.with(Cell::get))
    };
    OUTSIDE.scope(Cell::default(), work).await
}

/// Records that the current task spent this time outside the broker. The function does nothing
/// unless the task's work runs in [`measured`].
pub fn note(outside: Duration) {
    OUTSIDE
        .try_with(|total| total.set(total.get() + outside))
        .ok();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_noted_inside_counts_and_what_is_noted_outside_does_not() {
        note(Duration::from_secs(7));
        let work = async {
            note(Duration::from_secs(1));
            tokio::task::yield_now().await;
            note(Duration::from_secs(2));
            "done"
        };
        let (result, outside) = measured(work).await;
        assert_eq!((result, outside), ("done", Duration::from_secs(3)));
    }
}
