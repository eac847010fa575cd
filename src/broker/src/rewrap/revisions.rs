//! Moves revisions of records. The token re-wraps one page of rows while the store swaps the previous page.

use std::collections::BTreeSet;

use futures_util::{
    FutureExt as _,
    future::BoxFuture,
    stream::{self, StreamExt as _},
};

use tokio_util::sync::CancellationToken;

use keybroker_core::{
    call::CallId,
    envelope::{Context, Envelope, Kind},
    error::{Error, Reason},
    key::{KeyUse, Revision, WrappingKeyId},
};
use keybroker_hsm as hsm;
use keybroker_store::{RevisionMove, RevisionPlace, RevisionUnder, RowUnder};

use crate::Broker;

use super::{
    batch::{RowId, Swapped, background},
    pace::Pace,
    progress::FailedRow,
    run::{Run, Stop},
};

/// The result of re-wrapping one row on the token.
enum Moved {
    Ready(RevisionMove),
    Failed(FailedRow),
}

/// A page that the token has re-wrapped.
#[derive(Default)]
pub(super) struct Page {
    moves: Vec<RevisionMove>,
    failed: Vec<FailedRow>,
}

impl Run<'_> {
    /// Moves every revision under a wrapping key. Returns the number of rows that this run moved or
    /// that another change altered in the meantime.
    pub(super) async fn move_revisions(
        &mut self,
        from: WrappingKeyId,
        to: WrappingKeyId,
    ) -> Result<u64, Stop> {
        let mut place = RevisionPlace::START;
        let mut ready = Page::default();
        let mut touched = 0;
        loop {
            let limit = self.rows_at_once();
            let rows = self
                .broker
                .store
                .revisions_under(from, &place, limit)
                .await?;
            let is_end = rows.is_empty();
            if let Some(last) = rows.last() {
                place = last.place.clone();
            }
            let (rows, unlisted) = self.split(rows);
            let (swapped, next) = tokio::join!(
                self.broker.swap_page(to, self.source_use(), ready),
                self.broker
                    .rewrap_page(self.stop, &self.pace, from, to, rows)
            );
            // The previous page is counted even if the token failed on the next page.
            touched += self.count(swapped?);
            ready = next?;
            ready.failed.extend(unlisted);
            self.keep_up().await?;
            if is_end {
                return Ok(touched);
            }
        }
    }

    /// Separates the rows that may be moved from those that no list contains.
    fn split(&self, rows: Vec<RowUnder>) -> (Vec<RowUnder>, Vec<FailedRow>) {
        let Some(listed) = &self.listed else {
            return (rows, Vec::new());
        };
        // A row that cannot be decoded fails later, with its problem.
        let may_move = |row: &RowUnder| match &row.row {
            Ok(found) => listed.has(&found.envelope),
            Err(_) => true,
        };
        let (moved, others): (Vec<_>, Vec<_>) = rows.into_iter().partition(may_move);
        let failed = others.iter().map(|row| failed_revision(row, "not-listed"));
        (moved, failed.collect())
    }

    fn count(&mut self, swapped: Swapped) -> u64 {
        let progress = &mut self.progress;
        progress.count_revisions(swapped.moved);
        if swapped.moved > 0 {
            progress.blocked_by.clear();
        }
        progress.note_changed(swapped.changed_meanwhile);
        for row in swapped.failed {
            progress.fail(row);
        }
        swapped.moved + swapped.changed_meanwhile
    }
}

impl Broker {
    /// Lets the token re-wrap the rows of a page. Returns an error if the token cannot work at present. A damaged row
    /// is not an error.
    async fn rewrap_page(
        &self,
        stop: &CancellationToken,
        pace: &Pace,
        from: WrappingKeyId,
        to: WrappingKeyId,
        rows: Vec<RowUnder>,
    ) -> Result<Page, Stop> {
        let jobs: Vec<BoxFuture<'_, _>> = rows
            .into_iter()
            .map(|row| self.rewrap_row(pace, from, to, row).boxed())
            .collect();
        let mut done = stream::iter(jobs).buffered(Pace::in_flight(&*self.token));
        let mut page = Page::default();
        while let Some(moved) = done.next().await {
            match moved? {
                Moved::Ready(one) => page.moves.push(one),
                Moved::Failed(row) => page.failed.push(row),
            }
            if stop.is_cancelled() {
                return Err(Stop::Lost);
            }
        }
        Ok(page)
    }

    async fn rewrap_row(
        &self,
        pace: &Pace,
        from: WrappingKeyId,
        to: WrappingKeyId,
        row: RowUnder,
    ) -> Result<Moved, Stop> {
        let failed = |problem: &str| Ok(Moved::Failed(failed_revision(&row, problem)));
        let Ok(found) = &row.row else {
            return failed("revision-unreadable");
        };
        let envelope = match envelope_of(found, from) {
            Ok(envelope) => envelope,
            Err(problem) => return failed(problem),
        };
        // The time limit starts with the job, not when the row starts to wait.
        let job = async {
            let caller = background();
            let context = context_of(found);
            self.token.rewrap(&envelope, context, to, &caller).await
        };
        match pace.run(&*self.token, job).await {
            Ok(new) => Ok(Moved::Ready(RevisionMove {
                record: found.record,
                revision: found.revision,
                from,
                old: found.envelope.clone(),
                to,
                new: new.to_bytes(),
            })),
            Err(hsm::Error::MacRefused) => failed("mac-refused"),
            Err(hsm::Error::Damaged(_)) => failed("unwrap-failed"),
            // No token tries an envelope with an algorithm that no token with the key supports, but the row may be altered.
            Err(other) => match self.verify_envelope(&envelope, found).await {
                Err(hsm::Error::MacRefused) => failed("mac-refused"),
                _ => Err(Stop::Failed(other.into())),
            },
        }
    }

    /// Verifies the MAC of an envelope with the integrity key of its wrapping key.
    pub(super) async fn verify_envelope(
        &self,
        envelope: &Envelope,
        found: &RevisionUnder,
    ) -> Result<(), hsm::Error> {
        let (key, message) = (
            envelope.wrapping_key(),
            envelope.mac_message(&context_of(found)),
        );
        let caller = background();
        let verified = self
            .token
            .verify_mac(key, &message, envelope.mac(), &caller);
        verified.await
    }

    /// Checks that rows may still be moved from one wrapping key to the other. The states of both wrapping keys can
    /// change during a pass.
    pub(super) fn check_move(
        &self,
        mut from: impl Iterator<Item = WrappingKeyId>,
        to: WrappingKeyId,
        source: KeyUse,
    ) -> Result<(), Stop> {
        let registry = self.registry()?;
        let is_target = registry.wrapping_key().is_ok_and(|target| target == to);
        if is_target && from.all(|id| registry.check(id, source).is_ok()) {
            Ok(())
        } else {
            Err(Stop::KeysChanged)
        }
    }

    /// Why the store refused a swap. The store refuses it if the state of a key was changed after [`Self::check_move`].
    pub(super) async fn why_not_swapped(
        &self,
        error: Error,
        from: BTreeSet<WrappingKeyId>,
        to: WrappingKeyId,
        source: KeyUse,
    ) -> Stop {
        if error.reason() != Reason::KeyState {
            return Stop::Failed(error);
        }
        if let Err(unreadable) = self.refresh_registry().await {
            return Stop::Failed(unreadable);
        }
        // A row of the registry that was edited changes nothing in the verified registry.
        let checked = self.check_move(from.into_iter(), to, source);
        checked.err().unwrap_or(Stop::Failed(error))
    }

    /// Swaps the envelopes of a page.
    async fn swap_page(
        &self,
        to: WrappingKeyId,
        source: KeyUse,
        page: Page,
    ) -> Result<Swapped, Stop> {
        let from: BTreeSet<WrappingKeyId> = page.moves.iter().map(|one| one.from).collect();
        let ids: Vec<RowId> = page
            .moves
            .iter()
            .map(|one| (*one.record.as_bytes(), one.revision.get()))
            .collect();
        let call = CallId::fresh();
        let swap = self.store.move_revisions(page.moves, source, call);
        let swapped = self.swap_rows((from, to), source, &ids, call, swap).await?;
        Ok(Swapped {
            failed: page.failed,
            ..swapped
        })
    }
}

/// Returns the envelope of a row, or the problem that `store check` would report.
pub(crate) fn envelope_of(
    row: &RevisionUnder,
    key: WrappingKeyId,
) -> Result<Envelope, &'static str> {
    let envelope = Envelope::parse(&row.envelope).map_err(|_| "envelope-unreadable")?;
    if envelope.kind() != Kind::Record {
        return Err("envelope-of-another-kind");
    }
    if envelope.wrapping_key() != key {
        return Err("wrapping-key-differs");
    }
    Ok(envelope)
}

pub(crate) fn context_of(row: &RevisionUnder) -> Context<'_> {
    Context::Record {
        address: &row.address,
        record_id: row.record,
        revision: row.revision,
    }
}

pub(super) fn failed_revision(row: &RowUnder, problem: &str) -> FailedRow {
    let id = row.place.record().map(|id| id.to_string());
    let revision = row.place.revision().map_or(0, Revision::get);
    tracing::warn!(
        record = id.as_deref().unwrap_or_default(),
        revision,
        problem,
        "a row cannot be re-wrapped; the row is unchanged"
    );
    FailedRow {
        id: id.unwrap_or_default(),
        revision,
        problem: problem.to_owned(),
    }
}
