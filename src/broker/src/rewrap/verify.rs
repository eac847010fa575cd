//! Lets the token verify every row under the target key, after the last row was moved.

use futures_util::{
    FutureExt as _,
    future::BoxFuture,
    stream::{self, StreamExt as _},
};

use keybroker_core::{call::Timestamp, key::WrappingKeyId};
use keybroker_hsm as hsm;
use keybroker_store::{Position, RevisionPlace, RowUnder};

use crate::Broker;

use super::{
    batch::background,
    clients::failed_client,
    pace::Pace,
    progress::{FailedRow, Phase},
    revisions::{envelope_of, failed_revision},
    run::{Run, Stop},
};

/// Largest difference between the clocks of two brokers, in microseconds, for which a row of another broker counts as new.
const CLOCK_SKEW_US: i64 = 60_000_000;
/// API clients per page.
const PAGE_CLIENTS: u32 = 50;

impl Run<'_> {
    /// Verifies the MAC of every revision and of every API client under the target key. The rows whose verification
    /// fails are listed with the rows that could not be moved. A revision that a call writes during the verification is
    /// not verified, because the run did not move this revision. If the run also verified new revisions, the
    /// verification would never end when calls write revisions faster than the token verifies them.
    pub(super) async fn verify(&mut self, target: WrappingKeyId) -> Result<(), Stop> {
        self.progress.phase = Phase::Verifying;
        self.progress.verified = 0;
        self.verify_revisions(target).await?;
        self.verify_clients(target).await?;
        self.verify_devices(target).await
    }

    async fn verify_revisions(&mut self, target: WrappingKeyId) -> Result<(), Stop> {
        let mut place = RevisionPlace::START;
        let begun = Timestamp::now();
        let mut newer = 0;
        loop {
            // The lease is renewed after each page, so a page must not take long.
            let limit = self.rows_at_once();
            let rows = self
                .broker
                .store
                .revisions_under(target, &place, limit)
                .await?;
            let Some(last) = rows.last() else {
                tracing::info!(
                    newer,
                    "the verification did not include revisions that were written after the verification began"
                );
                return Ok(());
            };
            place = last.place.clone();
            let (skipped, older): (Vec<_>, Vec<_>) =
                rows.iter().partition(|row| is_newer(row, begun));
            newer += skipped.len();
            let jobs: Vec<BoxFuture<'_, _>> = older
                .into_iter()
                .map(|row| self.broker.verify_revision(&self.pace, target, row).boxed())
                .collect();
            let in_flight = Pace::in_flight(&*self.broker.token);
            let results: Vec<_> = stream::iter(jobs).buffered(in_flight).collect().await;
            for result in results {
                self.count_verified(result?);
            }
            self.keep_up().await?;
        }
    }

    async fn verify_clients(&mut self, target: WrappingKeyId) -> Result<(), Stop> {
        let mut position = Position::default();
        loop {
            let rows = self.broker.store.clients(&position, PAGE_CLIENTS).await?;
            if rows.is_empty() {
                return Ok(());
            }
            for row in rows {
                let Ok(row) = row else {
                    // A row that cannot be decoded was already listed as a failed row when the clients were moved.
                    position.advance(row.err().and_then(|damaged| damaged.id));
                    continue;
                };
                position.advance(Some(row.id));
                if row.key != target {
                    continue;
                }
                let (message, caller) = (row.mac_message(), background());
                let token = &*self.broker.token;
                let job = token.verify_mac(target, &message, &row.mac, &caller);
                let failed = || failed_client(row.id.to_string(), row.revision, "mac-refused");
                let verified = self.pace.give_way(token, job).await;
                self.count_verified(verdict(verified, failed)?);
            }
            self.keep_up().await?;
        }
    }

    pub(super) fn count_verified(&mut self, failed: Option<FailedRow>) {
        match failed {
            None => self.progress.count_verified(),
            Some(row) => self.progress.fail(row),
        }
    }
}

impl Broker {
    /// Returns a failed row if the token rejects the row's MAC.
    async fn verify_revision(
        &self,
        pace: &Pace,
        target: WrappingKeyId,
        row: &RowUnder,
    ) -> Result<Option<FailedRow>, Stop> {
        let Ok(found) = &row.row else {
            return Ok(Some(failed_revision(row, "revision-unreadable")));
        };
        let envelope = match envelope_of(found, target) {
            Ok(envelope) => envelope,
            Err(problem) => return Ok(Some(failed_revision(row, problem))),
        };
        let job = self.verify_envelope(&envelope, found);
        let verified = pace.give_way(&*self.token, job).await;
        verdict(verified, || failed_revision(row, "mac-refused"))
    }
}

/// Whether a revision was written after `begun`. A row whose time is far in the future counts as an old row, because nothing
/// authenticates the time.
fn is_newer(row: &RowUnder, begun: Timestamp) -> bool {
    let latest = Timestamp::now().micros().saturating_add(CLOCK_SKEW_US);
    row.row
        .as_ref()
        .is_ok_and(|found| found.created > begun && found.created.micros() <= latest)
}

fn verdict(
    verified: Result<(), hsm::Error>,
    failed: impl FnOnce() -> FailedRow,
) -> Result<Option<FailedRow>, Stop> {
    match verified {
        Ok(()) => Ok(None),
        Err(hsm::Error::MacRefused) => Ok(Some(failed())),
        Err(other) => Err(Stop::Failed(other.into())),
    }
}
