//! The work of the holder of a run: passes over the rows until all rows are moved, then the verification and the
//! report.

use std::{
    panic::AssertUnwindSafe,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::FutureExt as _;
use tokio_util::sync::CancellationToken;

use keybroker_audit::{Entry, EntryKind, Outcome};
use keybroker_core::{
    call::Timestamp,
    error::{Error, Reason},
    key::{KeyUse, WrappingKeyId},
    metrics,
};
use keybroker_hsm::Serving;
use keybroker_store as store;
use keybroker_store::{RunRow, RunState};

use crate::{Broker, ticks::Ticks};

use super::{listed::Listed, pace::Pace, progress::Progress, sources};

const TICK: Duration = Duration::from_secs(1);
/// Time for the current batch and its audit entry to finish when the broker stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// Duration of the lease of a run, in microseconds.
const LEASE_US: i64 = 15_000_000;
/// Interval at which the holder renews its lease, stores its progress, and checks whether the run was paused.
const KEEP_UP_INTERVAL: Duration = Duration::from_secs(1);
/// Interval between two counts of the remaining rows. A count is cheap, because the database reads
/// only an index.
const COUNT_INTERVAL: Duration = Duration::from_secs(10);
/// Largest number of rows per page.
const PAGE_ROWS_MAX: u64 = 100;
/// Number of rows per page before the speed is known.
const PAGE_ROWS_FIRST: u64 = 16;
/// A page has as many rows as the run moves in half a second, so that a pause and a stop take effect soon.
const PAGE_PARTS: u64 = 2;
/// Weight of the newest value in the average speed.
const SPEED_PARTS: u64 = 3;

/// Reason why a holder stops its work before the run is done.
pub(super) enum Stop {
    /// The run was paused, another instance has the lease, or this broker stops.
    Lost,
    /// Another wrapping key now wraps new user keys, or rows may no longer be moved from a wrapping key.
    KeysChanged,
    /// The token, the store or the audit log does not work at present.
    Failed(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<store::Error> for Stop {
    fn from(error: store::Error) -> Self {
        Self::Failed(error.into())
    }
}

/// From which wrapping keys rows are moved, and to which.
#[derive(PartialEq, Eq)]
struct Moves {
    sources: Vec<WrappingKeyId>,
    target: WrappingKeyId,
}

/// A run for which this broker has the lease.
pub(super) struct Run<'b> {
    pub(super) broker: &'b Broker,
    pub(super) stop: &'b CancellationToken,
    row: RunRow,
    pub(super) progress: Progress,
    pub(super) pace: Pace,
    /// The rows that may be moved from a compromised wrapping key; `None` for a run that moves all rows.
    pub(super) listed: Option<Listed>,
    kept: Instant,
    counted: Option<Instant>,
    /// Number of rows that were moved or verified when the speed was last measured.
    measured: u64,
    speed: u64,
}

impl Broker {
    /// Works on requested runs until `stop` is cancelled.
    pub(crate) async fn rewrap_regularly(self: &Arc<Self>, stop: &CancellationToken) {
        let mut ticks = Ticks::every(TICK, stop);
        while ticks.next().await {
            let time_is_up = async {
                stop.cancelled().await;
                tokio::time::sleep(STOP_TIMEOUT).await;
            };
            tokio::select! {
                () = time_is_up => {}
                () = self.rewrap_without_panic(stop) => {}
            }
        }
        metrics::REWRAP_RUNNING.set_flag(false);
    }

    /// A panic in the re-wrap must not end the other regular work of the broker in the same task.
    async fn rewrap_without_panic(&self, stop: &CancellationToken) {
        let work = AssertUnwindSafe(self.rewrap_if_wanted(stop)).catch_unwind();
        if work.await.is_err() {
            metrics::REWRAP_RUNNING.set_flag(false);
            tracing::error!("the re-wrap panicked; the broker tries the re-wrap again");
        }
    }

    pub(crate) async fn rewrap_if_wanted(&self, stop: &CancellationToken) {
        let can_work = self.store_is_up()
            && self.registry.load().is_some()
            && self.token.state().serving == Serving::Up;
        if !can_work {
            return;
        }
        let row = match self.store.rewrap_run().await {
            Ok(Some(row)) if row.state == RunState::Running => row,
            Ok(_) => return,
            Err(error) => {
                return tracing::debug!(%error, "cannot find out whether a re-wrap was requested");
            }
        };
        let mut run = Run::new(self, row, stop);
        if let Err(error) = run.take_list() {
            // Another broker may have the list. Without it, no row is moved.
            return tracing::debug!(%error, "this broker cannot work on the re-wrap");
        }
        match run.hold().await {
            Ok(()) => {}
            // Another instance has the lease.
            Err(Stop::Lost | Stop::KeysChanged) => return,
            Err(Stop::Failed(error)) => {
                return tracing::debug!(%error, "cannot hold the re-wrap");
            }
        }
        metrics::REWRAP_RUNNING.set_flag(true);
        let ended = run.work().await;
        metrics::REWRAP_RUNNING.set_flag(false);
        run.leave(ended).await;
    }
}

impl<'b> Run<'b> {
    fn new(broker: &'b Broker, row: RunRow, stop: &'b CancellationToken) -> Self {
        Self {
            pace: Pace::new(row.rate, &*broker.token),
            progress: Progress::read(&row.document),
            broker,
            stop,
            row,
            listed: None,
            kept: Instant::now(),
            counted: None,
            measured: 0,
            speed: 0,
        }
    }

    /// Reads the list of rows that may be moved, if the source is a compromised wrapping key.
    fn take_list(&mut self) -> Result<(), Error> {
        if let Some(source) = self.row.source.filter(|_| self.progress.from_compromised) {
            self.listed = Some(self.broker.listed(source)?);
        }
        Ok(())
    }

    /// How the run uses the wrapping keys from which it moves rows.
    pub(super) fn source_use(&self) -> KeyUse {
        match self.listed {
            Some(_) => KeyUse::RewrapListed,
            None => KeyUse::RewrapFrom,
        }
    }

    /// Works until all rows that can be moved are moved.
    async fn work(&mut self) -> Result<(), Stop> {
        self.measured = self.progress.moved();
        tracing::info!(
            moved = self.progress.moved(),
            "this broker works on the re-wrap"
        );
        let mut moves = self.moves().await?;
        loop {
            match self.pass(&moves).await {
                Ok(0) => {}
                // Another pass is necessary: a pass that moved a row may have missed rows that were written in the
                // meantime.
                Ok(_) => {
                    moves = self.moves().await?;
                    continue;
                }
                Err(Stop::KeysChanged) => {
                    tracing::info!("the wrapping keys changed; the re-wrap begins another pass");
                    self.keep_up().await?;
                    moves = self.moves().await?;
                    continue;
                }
                Err(other) => return Err(other),
            }
            self.verify(moves.target).await?;
            // The run has ended only if no wrapping key was activated or resumed meanwhile.
            let now = self.moves().await?;
            if now == moves {
                return self.report(moves.target).await;
            }
            moves = now;
        }
    }

    /// Reads the registry, and returns which rows are moved. Another broker may have activated a wrapping key that this broker does
    /// not know yet, or that its workers have not checked yet.
    async fn moves(&self) -> Result<Moves, Error> {
        self.broker.refresh_registry().await?;
        let registry = self.broker.registry()?;
        registry.check_active_examined()?;
        let target = registry.wrapping_key()?;
        Ok(Moves {
            sources: sources(&registry, target, self.row.source, self.source_use()),
            target,
        })
    }

    /// Tries every row once. Returns the number of rows that were moved or that another change altered meanwhile.
    async fn pass(&mut self, moves: &Moves) -> Result<u64, Stop> {
        let Moves { sources, target } = moves;
        self.progress.begin_pass();
        let mut touched = 0;
        for source in sources {
            touched += self.move_revisions(*source, *target).await?;
        }
        if self.listed.is_some() {
            // No list contains API clients or devices.
            return Ok(touched);
        }
        touched += self.move_clients(sources, *target).await?;
        Ok(touched + self.move_devices(sources, *target).await?)
    }

    /// Returns the number of rows for the next page.
    pub(super) fn rows_at_once(&self) -> u32 {
        let speed = match (self.speed, self.pace.rate()) {
            (0, 0) => PAGE_ROWS_FIRST * PAGE_PARTS,
            (0, rate) => u64::from(rate).min(PAGE_ROWS_FIRST * PAGE_PARTS),
            (speed, _) => speed,
        };
        let rows = (speed / PAGE_PARTS).clamp(1, PAGE_ROWS_MAX);
        u32::try_from(rows).unwrap_or(1)
    }

    /// Renews the lease. Returns an error if the run is paused or another instance has the lease.
    async fn hold(&mut self) -> Result<(), Stop> {
        let now = Timestamp::now();
        let until = Timestamp::from_micros(now.micros() + LEASE_US);
        let store = &self.broker.store;
        let instance = &self.broker.instance;
        if store.hold_rewrap(self.row.id, instance, now, until).await? {
            Ok(())
        } else {
            Err(Stop::Lost)
        }
    }

    /// Ends the work if the broker stops. Once a second, renews the lease, reads a changed rate and stores the
    /// progress.
    pub(super) async fn keep_up(&mut self) -> Result<(), Stop> {
        if self.stop.is_cancelled() {
            return Err(Stop::Lost);
        }
        let passed = self.kept.elapsed();
        if passed < KEEP_UP_INTERVAL {
            return Ok(());
        }
        self.kept = Instant::now();
        self.measure(passed);
        self.hold().await?;
        match self.broker.store.rewrap_run().await? {
            Some(row) if row.id == self.row.id => self.pace.set_rate(row.rate),
            _ => return Err(Stop::Lost),
        }
        self.count_left().await?;
        self.store_progress(false).await
    }

    fn measure(&mut self, passed: Duration) {
        let done = self.progress.moved().saturating_add(self.progress.verified);
        let rows = done.saturating_sub(self.measured);
        self.measured = done;
        let millis = u64::try_from(passed.as_millis()).unwrap_or(u64::MAX).max(1);
        let now = rows.saturating_mul(1_000) / millis;
        self.speed = match self.speed {
            0 => now,
            before => (before * (SPEED_PARTS - 1) + now) / SPEED_PARTS,
        };
        self.progress.rows_per_second = self.speed;
    }

    async fn count_left(&mut self) -> Result<(), Stop> {
        if self.counted.is_some_and(|at| at.elapsed() < COUNT_INTERVAL) {
            return Ok(());
        }
        self.counted = Some(Instant::now());
        let registry = self.broker.registry()?;
        let target = registry.wrapping_key().map_err(Error::from)?;
        let mut left = 0;
        for source in sources(&registry, target, self.row.source, self.source_use()) {
            let uses = self.broker.store.key_uses(source).await?;
            left = uses
                .revisions
                .saturating_add(uses.clients)
                .saturating_add(uses.devices)
                .saturating_add(left);
        }
        metrics::REWRAP_ROWS_LEFT.set_count(usize::try_from(left).unwrap_or(usize::MAX));
        Ok(())
    }

    async fn store_progress(&self, is_done: bool) -> Result<(), Stop> {
        let document = self.progress.to_bytes();
        let store = &self.broker.store;
        let instance = &self.broker.instance;
        if store
            .note_rewrap(self.row.id, instance, &document, is_done)
            .await?
        {
            Ok(())
        } else {
            Err(Stop::Lost)
        }
    }

    /// Writes the last audit entry of the run and ends the run.
    async fn report(&mut self, target: WrappingKeyId) -> Result<(), Stop> {
        self.counted = None;
        self.count_left().await?;
        let failed = self.progress.failed;
        let outcome = if failed == 0 {
            Outcome::Ok
        } else {
            Outcome::Failed
        };
        let mut entry = Entry::new(EntryKind::Decision, "wrapping_key.rewrap_end", outcome);
        entry.reason = (failed > 0).then_some(Reason::RecordDamaged);
        entry.wrapping_key = Some(target);
        entry.count = Some(self.progress.moved());
        self.broker.audit.append(entry).await.map_err(Error::from)?;
        self.progress.blocked_by.clear();
        self.progress.ended_us = Timestamp::now().micros();
        self.store_progress(true).await?;
        if failed > 0 {
            keybroker_core::alert!(
                RecordDamaged,
                failed,
                "some rows could not be re-wrapped, or failed verification afterwards; `keybroker rewrap status` lists these rows"
            );
        }
        if self.listed.is_some() {
            tracing::warn!(
                source = self.row.source.map(|id| id.to_string()),
                "user keys under a compromised wrapping key count as disclosed, also those that were moved: enrol them again"
            );
        }
        tracing::info!(
            moved = self.progress.moved(),
            failed,
            verified = self.progress.verified,
            "the re-wrap has ended"
        );
        Ok(())
    }

    /// Stores the progress after the work, and the cause if the run cannot continue at present.
    async fn leave(&mut self, ended: Result<(), Stop>) {
        match ended {
            Ok(()) => return,
            Err(Stop::Lost | Stop::KeysChanged) => {
                tracing::info!(
                    moved = self.progress.moved(),
                    "this broker no longer works on the re-wrap"
                );
            }
            Err(Stop::Failed(error)) => {
                let blocked_by = error.reason().as_str();
                // The cause is logged once, and not every second.
                if self.progress.blocked_by != blocked_by {
                    tracing::warn!(
                        %error,
                        "the re-wrap cannot continue at present; the broker tries again every second, and `blocked_by` in \
                         `keybroker rewrap status` shows the reason"
                    );
                }
                blocked_by.clone_into(&mut self.progress.blocked_by);
            }
        }
        // A failure to store the progress is harmless, because the rows themselves show which rows were moved.
        if let Err(Stop::Failed(error)) = self.store_progress(false).await {
            tracing::debug!(%error, "the progress of the re-wrap was not stored");
        }
    }
}
