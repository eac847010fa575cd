//! Time that a call spends away from the broker: in the token's queue and in its module. Whoever measures a call takes it
//! off, and what is left is what the broker adds.

use std::{cell::Cell, time::Duration};

tokio::task_local! {
    static AWAY: Cell<Duration>;
}

/// Runs work, and says how long it was away by the notes made in its own task.
pub async fn measured<T>(work: impl Future<Output = T>) -> (T, Duration) {
    let work = async {
        let result = work.await;
        (result, AWAY.with(Cell::get))
    };
    AWAY.scope(Cell::default(), work).await
}

/// Notes that the work of this task was away so long. Where nobody measures, nothing is noted.
pub fn note(away: Duration) {
    AWAY.try_with(|total| total.set(total.get() + away)).ok();
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
        let (result, away) = measured(work).await;
        assert_eq!((result, away), ("done", Duration::from_secs(3)));
    }
}
