//! Marks a key as destroyed when its time has come.

use std::{panic::AssertUnwindSafe, time::Duration};

use futures_util::FutureExt as _;
use tokio_util::sync::CancellationToken;

use keybroker_core::{
    call::{CallId, Deadline, Timestamp},
    envelope::mac::MacMessage,
    error::{Error, Reason},
    key::{KeyUse, WrappingKeyId, WrappingKeyState},
    metrics,
};
use keybroker_hsm as hsm;
use keybroker_hsm::{Caller, Serving};
use keybroker_store::{DestructionChange, DestructionRow, RegistryChange, RegistryRow};

use crate::{Broker, commit::Settled, journal::Draft, registry::Registry, ticks::Ticks};

use super::{
    super::{MAC_TIMEOUT, Planner, from_commit},
    after, check_signatures, needed, other_key, refused,
    schedules::{Origin, Schedule},
    verdict::{NOTICE, Verdict, verdict},
};

const TICK: Duration = Duration::from_secs(1);
/// How long the broker waits before it tries a delayed destruction again.
const PAUSE: Duration = Duration::from_secs(30);
/// How long a broker works alone without a sign of life. The removal from a slow token can take minutes.
const LEASE_US: i64 = 15 * 60 * 1_000_000;
/// How long the broker waits before it tries again if rows are damaged: a check of all rows is work for the token and the database.
const DAMAGED_PAUSE: Duration = Duration::from_mins(10);
/// How long a broker waits for the instance that accepted a schedule, before it asks for a confirmation.
const OTHER_INSTANCE: Duration = Duration::from_secs(30);
/// When the broker stops, a destruction that has begun gets this time to end with its audit entry.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

impl Broker {
    /// Destroys keys whose time has come, until `stop`.
    pub(crate) async fn destroy_regularly(&self, stop: &CancellationToken) {
        let mut ticks = Ticks::every(TICK, stop);
        while ticks.next().await {
            let time_is_up = async {
                stop.cancelled().await;
                tokio::time::sleep(STOP_TIMEOUT).await;
            };
            // A defect here must not end the other regular work of the broker, which shares its task.
            let work = AssertUnwindSafe(self.follow_destructions()).catch_unwind();
            tokio::select! {
                () = time_is_up => {}
                done = work => if done.is_err() {
                    tracing::error!("the destruction of wrapping keys panicked; it is tried again");
                }
            }
        }
    }

    /// Reads the schedules, and does what is due.
    pub(crate) async fn follow_destructions(&self) {
        let Some(known) = self.registry.load_full() else {
            return;
        };
        if !self.store_is_up() {
            return;
        }
        let found = match self.store.destructions().await {
            Ok(found) => found,
            Err(error) => {
                return tracing::debug!(%error, "cannot read the scheduled destructions of wrapping keys");
            }
        };
        // The registry must be read after the schedules, or a new schedule would look as if its key had been changed.
        if (!found.rows.is_empty() || known.unremoved().next().is_some())
            && let Err(error) = self.refresh_registry().await
        {
            return tracing::debug!(%error, "cannot read the registry for scheduled destructions");
        }
        let Ok(registry) = self.registry() else {
            return;
        };
        let schedules = self.check_origins(&registry, found).await;
        let now = Timestamp::now();
        let made = schedules
            .rows
            .iter()
            .filter(|schedule| schedule.origin != Origin::Forger);
        metrics::KEY_DESTRUCTIONS_SCHEDULED.set_count(made.clone().count());
        let due = made.filter(|schedule| schedule.row.due <= now).count();
        metrics::KEY_DESTRUCTIONS_DUE.set_count(due);
        self.tell_problems();
        for schedule in &schedules.rows {
            if !self.scheduled.is_delayed(schedule.row.key) {
                self.follow_destruction(schedule).await;
            }
        }
        for key in registry.unremoved() {
            let known_for = self.scheduled.unremoved_for(key);
            let has_row = schedules.rows.iter().any(|one| one.row.key == key);
            if has_row || self.scheduled.is_delayed(key) {
                continue;
            }
            if let Err(error) = self.schedule_removal(&registry, key, known_for).await {
                self.postpone(key, &error);
            }
        }
    }

    /// Raises an alert about each row that cannot be read or that no broker made, once.
    fn tell_problems(&self) {
        for cause in self.scheduled.untold_problems() {
            keybroker_core::alert!(
                KeyDestruction,
                cause,
                "a row of the scheduled destructions is not valid and destroys no key; other keys are not affected. Remove the row \
                 with `keybroker key destroy ID --cancel` or, if the key is destroyed already, with `keybroker key lost ID`; if the \
                 destruction is wanted, schedule it again"
            );
        }
    }

    /// Reads the schedules for the lists of keys.
    pub(in crate::key_change) async fn read_schedules(&self) -> Result<(), Error> {
        self.schedules(&*self.registry()?).await.map(drop)
    }

    async fn follow_destruction(&self, schedule: &Schedule) {
        let row = &schedule.row;
        let Ok(registry) = self.registry() else {
            return;
        };
        let key = registry.rows().find(|(key, _)| key.id == row.key);
        let is_forged = schedule.origin == Origin::Forger && !registry.is_unremoved(row.key);
        let done = match verdict(row, key, Timestamp::now()) {
            Verdict::Invalid(cause) => return self.drop_schedule(row, cause).await,
            _ if is_forged => return,
            Verdict::Wait => return,
            Verdict::Blocked(cause) => Err(refused(&cause)),
            Verdict::Mark => self.mark(&registry, row).await,
            Verdict::Remove => self.remove_objects(&registry, row).await,
        };
        if let Err(error) = done {
            self.postpone(row.key, &error);
            // Another broker may be able to do it.
            self.end_lease(row).await;
        }
    }

    /// Writes the row of a schedule again that a person removed after the mark. The registry row of the key says under its MAC that
    /// the objects must still be removed. After the notice, the removal follows at once, because the person may remove the row again.
    async fn schedule_removal(
        &self,
        registry: &Registry,
        id: WrappingKeyId,
        known_for: Duration,
    ) -> Result<(), Error> {
        let key = registry.verified(id)?;
        let signer = other_key(registry, id)?;
        let now = Timestamp::now();
        let row = DestructionRow {
            key: id,
            signer,
            sequence: key.sequence,
            requested: now,
            due: now,
            requested_by: String::new(),
            mac: [0; 32],
        };
        let row = self.marked(&row, signer).await?;
        let change = RegistryChange {
            destruction: Some(DestructionChange::Schedule(row.clone())),
            ..RegistryChange::default()
        };
        let written = self.store.change_registry(&change, CallId::fresh(), now);
        written.await?;
        keybroker_core::alert!(
            KeyDestruction, wrapping_key = %id, cause = "the row of the schedule was removed from the database",
            "a destroyed wrapping key is not removed from the tokens yet, but the row of its schedule was removed from the database; \
             the broker continues to remove the key from the tokens"
        );
        if known_for < NOTICE {
            return Ok(());
        }
        self.remove_objects(registry, &row).await
    }

    /// Removes a schedule that a later change of the key made invalid.
    async fn drop_schedule(&self, row: &DestructionRow, cause: &str) {
        match self.store.end_destruction(row).await {
            Ok(true) => keybroker_core::alert!(
                KeyDestruction, wrapping_key = %row.key, cause,
                "the scheduled destruction of a wrapping key is not valid and was removed; schedule it again if it is still wanted"
            ),
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "cannot remove an invalid schedule"),
        }
        self.scheduled.forget(row.key);
    }

    fn postpone(&self, key: WrappingKeyId, error: &Error) {
        let cause = error.detail();
        let pause = match error.reason() {
            Reason::RecordDamaged => DAMAGED_PAUSE,
            _ => PAUSE,
        };
        if self.scheduled.delay(key, cause, pause) {
            keybroker_core::alert!(
                KeyDestruction, wrapping_key = %key, cause, reason = error.reason().as_str(),
                "the destruction of a wrapping key is due, but cannot be done; the broker tries again, and the field `cause` \
                 shows the reason"
            );
        }
    }

    /// Becomes the only broker that works on a destruction. Returns `false` if another broker does.
    pub(super) async fn hold_lease(&self, row: &DestructionRow) -> Result<bool, Error> {
        let now = Timestamp::now();
        let until = Timestamp::from_micros(now.micros() + LEASE_US);
        let held = self.store.hold_destruction(row, &self.instance, now, until);
        Ok(held.await?)
    }

    /// Lets other brokers work on a destruction.
    async fn end_lease(&self, row: &DestructionRow) {
        let now = Timestamp::now();
        let released = self.store.hold_destruction(row, &self.instance, now, now);
        if let Err(error) = released.await {
            tracing::debug!(%error, "the lease of a destruction was not ended; it ends by itself");
        }
    }

    /// Marks a key as destroyed, after all checks.
    async fn mark(&self, registry: &Registry, row: &DestructionRow) -> Result<(), Error> {
        self.check_mac(registry, row, &row.mac_message()).await?;
        if !self.is_accepted(row).await? {
            return self.check_instance(row);
        }
        if !self.hold_lease(row).await? {
            return Ok(());
        }
        let key = registry.verified(row.key)?;
        self.check_tokens(key).await?;
        check_signatures(&*self.schedules(registry).await?, registry, row.key)?;
        let uses = self.store.key_uses(row.key).await?;
        if let Some(what) = needed(key, uses) {
            return Err(refused(&what));
        }
        self.check_rows(registry, row).await?;
        // The check of the rows may take hours, and another key may be in use now.
        self.refresh_registry().await?;
        let registry = &*self.registry()?;
        if registry.row(row.key) != Some(key) {
            return Err(refused("the key was changed while its rows were checked"));
        }
        let signer = other_key(registry, row.key)?;
        let mut change = self.plan_tombstones(registry, key, signer).await?;
        let marked = self.marked(row, signer).await?;
        change.destruction = Some(DestructionChange::Schedule(marked));
        let draft = Draft::of_broker(CallId::fresh(), "wrapping_key.destroyed", row.key);
        self.commit_by_broker(&draft, change).await?;
        tracing::info!(
            wrapping_key = %row.key, requested_by = row.requested_by,
            "the wrapping key is marked as destroyed; its objects are removed from the tokens"
        );
        self.scheduled.forget(row.key);
        self.apply_key_change().await;
        Ok(())
    }

    /// Asks for a confirmation of a schedule that another instance accepted, and that was not carried out in time.
    fn check_instance(&self, row: &DestructionRow) -> Result<(), Error> {
        if Timestamp::now() < after(row.due, OTHER_INSTANCE) {
            return Ok(());
        }
        Err(refused(&format!(
            "another broker instance than {:?} accepted the schedule, or the state directory of this instance was lost. If this \
             database is a copy, another database may need the key: cancel the destruction in the copy with `keybroker key destroy {1} \
             --cancel`. If this is the right database, and that instance does not exist any more, let this instance destroy the key \
             with `keybroker key destroy {1} --confirm-schedule`",
            self.instance, row.key
        )))
    }

    /// The row of a destruction after the mark. Its time is that of the removal, so that every broker waits until the other brokers
    /// have learnt that the key is destroyed.
    async fn marked(
        &self,
        row: &DestructionRow,
        signer: WrappingKeyId,
    ) -> Result<DestructionRow, Error> {
        let mut marked = DestructionRow {
            signer,
            due: after(Timestamp::now(), NOTICE),
            ..row.clone()
        };
        let caller = Caller::background(Deadline::after(MAC_TIMEOUT));
        let message = marked.removal_message();
        marked.mac = self.token.mac(signer, &message, &caller).await?;
        Ok(marked)
    }

    /// Checks that a broker marked the key as destroyed because of this row. A schedule alone does not permit the removal: the
    /// key may have been recorded as lost.
    pub(super) async fn check_marked(
        &self,
        registry: &Registry,
        row: &DestructionRow,
    ) -> Result<(), Error> {
        self.check_mac(registry, row, &row.removal_message()).await
    }

    /// Checks that a broker made the row. Without this check, a person who can write to the database could destroy a key.
    async fn check_mac(
        &self,
        registry: &Registry,
        row: &DestructionRow,
        message: &MacMessage,
    ) -> Result<(), Error> {
        registry.check(row.signer, KeyUse::VerifyMac)?;
        let caller = Caller::background(Deadline::after(MAC_TIMEOUT));
        let verified = self
            .token
            .verify_mac(row.signer, message, &row.mac, &caller);
        match verified.await {
            Ok(()) => Ok(()),
            Err(hsm::Error::MacRefused) => Err(Error::new(
                Reason::RecordDamaged,
                format!(
                    "the schedule was altered: its MAC does not verify. No object is removed; remove the schedule with `keybroker key \
                     destroy {0} --cancel` or, if the key is destroyed already, with `keybroker key lost {0}`",
                    row.key
                ),
            )),
            Err(other) => Err(other.into()),
        }
    }

    /// Checks that every token that may hold the key serves and is in the configuration of this broker.
    async fn check_tokens(&self, key: &RegistryRow) -> Result<(), Error> {
        self.check_configured(key, &self.store.places().await?)?;
        let state = self.token.state();
        if state.tokens.is_empty() {
            return match state.serving {
                Serving::Up => Ok(()),
                Serving::Down(cause) | Serving::Untrusted(cause) => Err(Error::new(
                    Reason::TokenDown,
                    format!("the token does not serve: {cause}"),
                )),
            };
        }
        self.check_no_token_is_away(key.id)?;
        let serial = hsm::unpadded(&key.token_serial);
        let mut tokens = state.tokens.iter().filter_map(|token| token.info.as_ref());
        if tokens.any(|info| info.serial == serial) {
            return Ok(());
        }
        Err(refused(&format!(
            "key {} is on the token with serial number {serial}, which is not in the configuration of this broker",
            key.id
        )))
    }

    /// Plans the tombstone of the key, which says that the objects must be removed. The transaction counts again the rows that need the
    /// key. The earlier tombstones get a new MAC, too, because the destroyed key may have authenticated
    /// them.
    async fn plan_tombstones(
        &self,
        registry: &Registry,
        key: &RegistryRow,
        signer: WrappingKeyId,
    ) -> Result<RegistryChange, Error> {
        let mut planner = Planner::new(registry);
        let tombstone = RegistryRow {
            state: WrappingKeyState::Destroyed,
            ..key.clone()
        };
        planner.change(key, tombstone);
        planner.unremoved.push(key.id);
        planner.sign_tombstones(registry, key.id);
        let mut change = self.with_macs(planner, signer).await?;
        change.unneeded = Some(key.id);
        Ok(change)
    }

    /// Commits a change of the registry that the broker itself makes.
    pub(super) async fn commit_by_broker(
        &self,
        draft: &Draft,
        change: RegistryChange,
    ) -> Result<(), Error> {
        let at = Timestamp::now();
        let commit = async { self.store.change_registry(&change, draft.call(), at).await };
        let Settled { intent, result } = self.commit_with_intent(draft, at, commit).await?;
        self.close_intent(intent, draft, result.map_err(from_commit))
            .await
    }
}
