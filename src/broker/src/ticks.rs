//! A timer for regular work until the broker stops.

use std::time::Duration;

use tokio::time::{Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

/// Ticks at a fixed interval, beginning immediately. A missed tick is skipped.
pub(super) struct Ticks<'s> {
    interval: Interval,
    stop: &'s CancellationToken,
}

impl<'s> Ticks<'s> {
    pub(super) fn every(period: Duration, stop: &'s CancellationToken) -> Self {
        let mut interval = tokio::time::interval(period);
        interval.set_missed_tick_behavior(MissedTickBehavior::Skip);
        Self { interval, stop }
    }

    /// Waits for the next tick. Returns `false` when the broker stops.
    pub(super) async fn next(&mut self) -> bool {
        tokio::select! {
            () = self.stop.cancelled() => false,
            _ = self.interval.tick() => true,
        }
    }
}
