//! Records the time at which each key was last released. A release notes the time in memory, under a short lock. A
//! background task writes the times to the database. If a noted time is lost, only the displayed last use is out of
//! date.

use std::{
    collections::HashMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio_util::sync::CancellationToken;

use keybroker_core::{call::Timestamp, key::RecordId, metrics};

use super::{Broker, ticks::Ticks};

/// Largest number of records whose last release is noted in memory. While the database is unavailable or slow, the
/// times of further records are lost.
const NOTED_MAX: usize = 65_536;
/// Largest number of noted times per transaction.
const WRITTEN_AT_ONCE: usize = 500;
/// Largest number of transactions per write, so that the writes do not delay the requests of clients.
const TRANSACTIONS_MAX: usize = 5;
const INTERVAL: Duration = Duration::from_secs(5);

#[derive(Debug, Default)]
pub(super) struct Uses {
    noted: Mutex<HashMap<RecordId, Timestamp>>,
    /// Whether the last attempt to write failed.
    failing: AtomicBool,
}

impl Uses {
    /// Notes the current time as the last release of a record.
    pub(super) fn note(&self, record: RecordId) {
        self.put(record, Timestamp::now());
    }

    fn put(&self, record: RecordId, at: Timestamp) {
        let mut noted = self.noted.lock().unwrap_or_else(PoisonError::into_inner);
        if noted.len() >= NOTED_MAX && !noted.contains_key(&record) {
            drop(noted);
            metrics::LAST_USES_DROPPED.increment();
            return;
        }
        let latest = noted.entry(record).or_insert(at);
        *latest = at.max(*latest);
    }

    /// Removes all noted times from memory and returns them sorted. All brokers write in this order, so that their
    /// transactions cannot deadlock.
    fn take(&self) -> Vec<(RecordId, Timestamp)> {
        let mut noted = self.noted.lock().unwrap_or_else(PoisonError::into_inner);
        let noted = std::mem::take(&mut *noted);
        let mut uses: Vec<_> = noted.into_iter().collect();
        uses.sort_unstable();
        uses
    }
}

impl Broker {
    /// Writes the noted times every few seconds, until `stop` is cancelled.
    pub(super) async fn write_uses(&self, stop: &CancellationToken) {
        let mut ticks = Ticks::every(INTERVAL, stop);
        while ticks.next().await {
            if self.store_is_up() {
                self.flush_uses(TRANSACTIONS_MAX).await;
                self.flush_client_uses().await;
            }
        }
    }

    /// Writes the noted times in at most `transactions_max` transactions. The remaining times are kept for the next
    /// call.
    pub(super) async fn flush_uses(&self, transactions_max: usize) {
        let uses = self.uses.take();
        let mut portions = uses.chunks(WRITTEN_AT_ONCE);
        let mut written = 0;
        for portion in portions.by_ref().take(transactions_max) {
            if let Err(error) = self.store.note_uses(portion).await {
                // A failure is logged once, and not every few seconds.
                if !self.uses.failing.swap(true, Ordering::Relaxed) {
                    tracing::warn!(%error, "cannot write the times of last use; trying again");
                }
                break;
            }
            written += portion.len();
            if self.uses.failing.swap(false, Ordering::Relaxed) {
                tracing::info!("the broker can write the times of last use again");
            }
        }
        for (record, at) in uses.into_iter().skip(written) {
            self.uses.put(record, at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(number: usize) -> RecordId {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&number.to_be_bytes());
        RecordId::from_bytes(bytes)
    }

    #[test]
    fn the_latest_use_counts_and_memory_is_bounded() {
        let uses = Uses::default();
        let at = Timestamp::from_micros;
        for (number, time) in [(1, 5), (2, 6), (1, 9), (2, 3)] {
            uses.put(record(number), at(time));
        }
        assert_eq!(uses.take(), [(record(1), at(9)), (record(2), at(6))]);
        assert_eq!(uses.take(), []);
        for number in 0..NOTED_MAX + 10 {
            uses.put(record(number), at(1));
        }
        // A release of an already noted record still updates its time.
        uses.put(record(0), at(2));
        let taken = uses.take();
        assert_eq!((taken.len(), taken[0]), (NOTED_MAX, (record(0), at(2))));
    }
}
