//! Changes of wrapping keys by administrators: rotation and changes of states.
//!
//! A change is planned from the verified registry. One transaction checks that each row still has
//! the MAC that was read before, and commits the change. If two brokers change the same key
//! concurrently, one of them succeeds and the other gets an error. Each new row is authenticated by
//! the integrity key of the wrapping key that the row describes.
//!
//! Mitigation: M11 of `THREAT_MODEL.md`.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use keybroker_core::{
    call::{Call, Deadline, Timestamp},
    envelope::Mac,
    error::{Error, Reason},
    key::{KeyUse, WrappingKeyId, WrappingKeyState},
    principal::{Action, Principal},
};
use keybroker_hsm::{Caller, Serving, TokenState};
use keybroker_store as store;
use keybroker_store::{DestructionChange, PlaceRow, RegistryChange, RegistryRow, RegistryUpdate};

use super::{
    Broker, WrappingKeyView, commit::Settled, control::view, journal::Draft, registry::Registry,
};

mod age;
mod configured;
mod copies;
mod destruction;
mod making;
mod rotation;

pub(super) use age::KeyAge;
pub use configured::ConfiguredTokens;
pub use destruction::Wait;
pub(super) use destruction::{Scheduled, forget_accepted};
pub use rotation::{Rotated, Rotation};

use making::Awaited;

/// Time limit for the MAC of one row.
const MAC_TIMEOUT: Duration = Duration::from_secs(10);

/// A change of the state of a wrapping key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyChange {
    /// The key wraps new user keys from now on, and the keys that were active are deactivated. A key that was never active
    /// needs a confirmed backup, or `without_backup`.
    Activate {
        /// The administrator confirms that there is a tested backup of the token with this key.
        backup_confirmed: bool,
        /// The administrator accepts that there is no backup.
        without_backup: bool,
    },
    /// The key is not used until it is resumed.
    Suspend,
    /// A suspended key is used again: the key becomes active if no other key is active, and
    /// deactivated otherwise.
    Resume,
    /// The key unwraps, but no longer wraps.
    Deactivate,
    /// The key is never used again.
    Compromise,
    /// The key is permanently missing from the token, and counts as destroyed from now on.
    Lose,
    /// The key is destroyed after a waiting time. Its state does not change before.
    Destroy(Wait),
    /// The broker instance that gets the request may carry out the scheduled destruction of the key, although another instance
    /// accepted it.
    ConfirmDestruction,
    /// The scheduled destruction of the key is cancelled.
    Keep,
    /// The tokens are searched for copies of the key, and the copies are registered. The state of the key does not change.
    FindCopies,
}

impl KeyChange {
    /// Returns the action that the policy evaluates.
    pub const fn action(self) -> Action {
        match self {
            Self::Activate { .. } => Action::ActivateKey,
            Self::Suspend => Action::SuspendKey,
            Self::Resume => Action::ResumeKey,
            Self::Deactivate => Action::DeactivateKey,
            Self::Compromise => Action::CompromiseKey,
            Self::Lose => Action::LoseKey,
            Self::Destroy(Wait::None) => Action::DestroyKeyNow,
            Self::Destroy(_) | Self::ConfirmDestruction => Action::DestroyKey,
            Self::Keep => Action::KeepKey,
            Self::FindCopies => Action::FindKeyCopies,
        }
    }
}

/// The changes of wrapping keys that this broker makes.
#[derive(Debug, Default)]
pub(super) struct KeyChanges {
    /// Lock that is held during a change, so that this broker makes one change at a time.
    turn: tokio::sync::Mutex<()>,
    /// A key that the workers must check before its registration, or before the registration of its copies.
    awaited: Mutex<Option<Awaited>>,
}

impl KeyChanges {
    /// Returns the key that the workers must check before its registration, or before the registration of its copies.
    pub(super) fn awaited(&self) -> Option<Awaited> {
        self.lock_awaited().clone()
    }

    fn lock_awaited(&self) -> MutexGuard<'_, Option<Awaited>> {
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a change. Returns an error if another change is in progress.
    fn begin(&self) -> Result<tokio::sync::MutexGuard<'_, ()>, Error> {
        self.turn.try_lock().map_err(|_| {
            let what =
                "another change of a wrapping key is in progress; try again when the other change has ended";
            Error::new(Reason::Revision, what).explained("id", what)
        })
    }

    /// Begins a change that must not fail because of another change, after the changes in progress. Returns an error if the deadline
    /// of the call passes before.
    async fn begin_after_others(
        &self,
        call: &Call,
    ) -> Result<tokio::sync::MutexGuard<'_, ()>, Error> {
        let turn = tokio::time::timeout_at(call.deadline.instant().into(), self.turn.lock());
        turn.await.map_err(|_| {
            let what = "another change of a wrapping key was in progress until the deadline of the call; run the command again";
            Error::new(Reason::Deadline, what).explained("id", what)
        })
    }
}

impl Broker {
    /// Changes the state of a wrapping key. This broker applies the change before the answer. The other brokers on the
    /// same database apply the change within about a second.
    pub async fn change_key_state(
        self: &Arc<Self>,
        principal: &Principal,
        call: &Call,
        id: WrappingKeyId,
        change: KeyChange,
    ) -> Result<WrappingKeyView, Error> {
        let (broker, principal, owned) = (Arc::clone(self), principal.clone(), call.clone());
        self.run_change(change.action(), call.clone(), async move {
            broker
                .run_state_change(&principal, &owned, id, change)
                .await
        })
        .await
    }

    async fn run_state_change(
        &self,
        principal: &Principal,
        call: &Call,
        id: WrappingKeyId,
        change: KeyChange,
    ) -> Result<WrappingKeyView, Error> {
        let mut draft = self
            .begin_control_change(principal, call, change.action())
            .await?;
        draft.wrapping_key(id);
        let begun = match change {
            // To stop the use of a key does not fail because another administrator changes keys, perhaps on purpose, all the time.
            KeyChange::Compromise => self.key_changes.begin_after_others(call).await,
            _ => self.key_changes.begin(),
        };
        let turn = self.or_record(&draft, begun).await?;
        let planned = self.plan_state_change(principal, call, id, change).await;
        let committed = match self.or_record(&draft, planned).await {
            Ok(planned) => {
                self.commit_approved(principal, call, &mut draft, change, planned, id)
                    .await
            }
            Err(error) => Err(error),
        };
        self.forget_new_key();
        committed?;
        drop(turn);
        self.view_of(id)
    }

    /// Commits a change. If the change needs an approval, the transaction also uses the approval. If the change schedules a
    /// destruction, this instance remembers that it accepted the schedule.
    async fn commit_approved(
        &self,
        principal: &Principal,
        call: &Call,
        draft: &mut Draft,
        change: KeyChange,
        mut planned: RegistryChange,
        id: WrappingKeyId,
    ) -> Result<(), Error> {
        let approved = match change {
            KeyChange::Destroy(wait) => {
                self.approved_destruction(principal, call, id, wait, draft)
                    .await
            }
            KeyChange::Lose => self.approved_loss(principal, call, id, draft).await,
            _ => Ok(None),
        };
        planned.approval = self.or_record(draft, approved).await?;
        let tokens = planned.places.iter().map(|place| place.row.token.as_str());
        draft.tokens(&tokens.collect::<Vec<_>>());
        let schedule = match &planned.destruction {
            Some(DestructionChange::Schedule(row)) => Some(row.clone()),
            _ => None,
        };
        self.commit_key_change(call, draft, planned).await?;
        if let Some(row) = schedule {
            self.accept_schedule(&row).await;
        }
        Ok(())
    }

    /// Reads the registry for a change. Waits until the workers have examined the keys that decide about the change.
    async fn read_for_change(
        &self,
        call: &Call,
        id: WrappingKeyId,
        change: KeyChange,
    ) -> Result<(), Error> {
        call.deadline.check()?;
        self.check_acknowledged()?;
        self.refresh_registry().await?;
        // Another broker may have just registered the key.
        self.ask_registry(call.deadline, |registry| registry.check_examined(id))
            .await?;
        if matches!(change, KeyChange::Activate { .. }) {
            // The tokens of the key in use decide which copies are necessary.
            self.ask_registry(call.deadline, Registry::check_active_examined)
                .await?;
        }
        Ok(())
    }

    async fn plan_state_change(
        &self,
        principal: &Principal,
        call: &Call,
        id: WrappingKeyId,
        change: KeyChange,
    ) -> Result<RegistryChange, Error> {
        self.read_for_change(call, id, change).await?;
        let registry = self.registry()?;
        match change {
            KeyChange::Lose => return self.plan_loss(&registry, id).await,
            KeyChange::Destroy(wait) => {
                return self.plan_destruction(&registry, id, wait, principal).await;
            }
            KeyChange::Keep => return self.plan_keeping(&registry, id).await,
            KeyChange::FindCopies => return self.plan_copies(&registry, id).await,
            KeyChange::ConfirmDestruction => {
                return self.plan_confirmation(&registry, id, principal).await;
            }
            _ => {}
        }
        let state = self.token.state();
        let row = registry.verified(id)?;
        let to = next_state(&registry, row, change)?;
        if change != KeyChange::Compromise {
            self.check_not_scheduled(&registry, row).await?;
        }
        let mut new = RegistryRow {
            state: to,
            ..row.clone()
        };
        let mut places = Vec::new();
        if let KeyChange::Activate {
            backup_confirmed,
            without_backup,
        } = change
        {
            let now = Timestamp::now();
            if backup_confirmed && row.backup_confirmed.is_none() {
                new.backup_confirmed = Some(now);
            }
            check_backup(row, new.backup_confirmed.is_some() || without_backup)?;
            if row.state == WrappingKeyState::PreActive {
                let copies = self.copies_for_activation(&registry, row, without_backup);
                let copies = copies.await?;
                let backup = backup_confirmed.then_some(now);
                places = self.place_changes(copies, &registry, row, backup).await?;
            }
        }
        let mut planner = Planner::new(&registry);
        planner.change.places = places;
        let mut signer = id;
        if to == WrappingKeyState::Active {
            if row.state != WrappingKeyState::PreActive {
                self.warn_of_missing_copies(&registry, row);
            }
            planner.deactivate_others(&registry, id, &state);
            planner.sign_tombstones(&registry, id);
        } else if !to.allows(KeyUse::VerifyMac)
            && let Some(other) = registry.integrity_key_without(id)
        {
            // The changed key must not authenticate the rows of the destroyed keys any more.
            signer = other;
            planner.sign_tombstones(&registry, id);
        }
        planner.change(row, new);
        let mut planned = self.with_macs(planner, signer).await?;
        // A schedule is bound to the number of the registry row, which has changed.
        planned.destruction = Some(DestructionChange::Remove(id));
        Ok(planned)
    }

    /// Plans the registry row that marks a missing key as destroyed. The integrity key that is in use authenticates
    /// this row.
    async fn plan_loss(
        &self,
        registry: &Registry,
        id: WrappingKeyId,
    ) -> Result<RegistryChange, Error> {
        if self.is_being_removed(registry, id).await? {
            return self.plan_end_of_removal(registry, id).await;
        }
        let row = registry.missing(id, &self.token.state())?;
        self.check_no_token_is_away(id)?;
        let signer = registry.integrity_key()?;
        let tombstone = RegistryRow {
            state: WrappingKeyState::Destroyed,
            ..row.clone()
        };
        let mut planner = Planner::new(registry);
        planner.change(row, tombstone);
        planner.sign_tombstones(registry, id);
        let mut planned = self.with_macs(planner, signer).await?;
        planned.destruction = Some(DestructionChange::Remove(id));
        Ok(planned)
    }

    /// Checks that every configured token is available. An unavailable token may contain the key, and recording a loss
    /// cannot be undone.
    fn check_no_token_is_away(&self, id: WrappingKeyId) -> Result<(), Error> {
        let state = self.token.state();
        let away = state
            .tokens
            .iter()
            .find(|token| token.serving != Serving::Up);
        let Some(away) = away else {
            return Ok(());
        };
        let what = format!(
            "key {id} may be on token {}, which is not available; repair the token, or remove it from the configuration",
            away.name
        );
        Err(Error::new(Reason::KeyState, what.clone()).explained("id", &what))
    }

    /// Computes the MACs of the changed rows and places. The integrity key of each wrapping key authenticates the row of this wrapping
    /// key. The integrity key of `tombstone_signer` authenticates the rows of destroyed keys.
    async fn with_macs(
        &self,
        planner: Planner,
        tombstone_signer: WrappingKeyId,
    ) -> Result<RegistryChange, Error> {
        let mut change = planner.change;
        for place in &mut change.places {
            place.row.mac = self.mac_of_place(&place.row).await?;
        }
        for update in &mut change.updates {
            let row = &update.row;
            let (signer, message) = match row.state {
                WrappingKeyState::Destroyed if planner.unremoved.contains(&row.id) => {
                    (tombstone_signer, row.unremoved_message())
                }
                WrappingKeyState::Destroyed => (tombstone_signer, row.tombstone_message()),
                _ => (row.id, row.mac_message()),
            };
            let caller = Caller::background(Deadline::after(MAC_TIMEOUT));
            update.row.mac = self.token.mac(signer, &message, &caller).await?;
        }
        Ok(change)
    }

    /// Computes the MAC of a row that names a token of a key, with the integrity key of this key.
    async fn mac_of_place(&self, place: &PlaceRow) -> Result<Mac, Error> {
        let caller = Caller::background(Deadline::after(MAC_TIMEOUT));
        let message = place.mac_message();
        Ok(self.token.mac(place.key, &message, &caller).await?)
    }

    async fn commit_key_change(
        &self,
        call: &Call,
        draft: &Draft,
        change: RegistryChange,
    ) -> Result<(), Error> {
        let at = Timestamp::now();
        let commit = async { self.store.change_registry(&change, call.id, at).await };
        let Settled { intent, result } = self.commit_with_intent(draft, at, commit).await?;
        let result = result.map_err(from_commit);
        self.close_intent(intent, draft, result).await?;
        self.apply_key_change().await;
        Ok(())
    }

    /// Applies a committed change in this broker.
    async fn apply_key_change(&self) {
        let read = self.refresh_registry().await;
        if let Err(error) = read.and(self.read_schedules().await) {
            tracing::warn!(%error, "cannot read the changed registry yet; the broker tries again within a second");
        }
        self.remember_registry().await;
    }

    fn view_of(&self, id: WrappingKeyId) -> Result<WrappingKeyView, Error> {
        let registry = self.registry()?;
        let state = self.token.state();
        let mut rows = registry.rows();
        let found = rows.find(|(row, _)| row.id == id);
        let found = found.ok_or_else(|| Error::new(Reason::KeyNotFound, format!("key {id}")))?;
        Ok(WrappingKeyView {
            destroyed_at: self.scheduled.due(found.0),
            ..view(found, &state, &self.configured.all())
        })
    }
}

/// Returns the state of a key after a change.
fn next_state(
    registry: &Registry,
    row: &RegistryRow,
    change: KeyChange,
) -> Result<WrappingKeyState, Error> {
    let to = match change {
        KeyChange::Activate { .. } => WrappingKeyState::Active,
        KeyChange::Suspend => WrappingKeyState::Suspended,
        KeyChange::Deactivate => WrappingKeyState::Deactivated,
        KeyChange::Compromise => WrappingKeyState::Compromised,
        KeyChange::Lose | KeyChange::Destroy(_) => WrappingKeyState::Destroyed,
        KeyChange::Keep | KeyChange::FindCopies | KeyChange::ConfirmDestruction => row.state,
        KeyChange::Resume if row.state != WrappingKeyState::Suspended => {
            let what = format!(
                "only a suspended key can be resumed, but this key is {}",
                row.state
            );
            return Err(Error::new(Reason::KeyState, what.clone()).explained("id", &what));
        }
        KeyChange::Resume => {
            let mut others = registry.rows().filter(|(other, _)| other.id != row.id);
            if others.any(|(other, _)| other.state.may_wrap()) {
                WrappingKeyState::Deactivated
            } else {
                WrappingKeyState::Active
            }
        }
    };
    legal(row.state, to)?;
    Ok(to)
}

/// Refuses a change of a state that is not legal, and says which are.
fn legal(from: WrappingKeyState, to: WrappingKeyState) -> Result<(), Error> {
    from.check_change(to).map_err(|illegal| {
        let text = illegal.to_string();
        Error::caused(Reason::KeyState, illegal).explained("id", &text)
    })
}

/// Refuses to activate a key without a backup: if the token were lost, every user key that this key wraps would be
/// lost, too.
fn check_backup(row: &RegistryRow, is_accepted: bool) -> Result<(), Error> {
    if is_accepted || row.state != WrappingKeyState::PreActive || row.backup_confirmed.is_some() {
        return Ok(());
    }
    let what = "no backup of the token with this key is confirmed. Back up the token, test the restore, and repeat the \
                command with `--backup-confirmed`; or accept with `--single` that every user key under this key is lost \
                if the token is lost";
    Err(Error::new(Reason::KeyState, what).explained("id", what))
}

/// Collects the changed rows of one transaction, with the numbers that order the changes of the registry.
#[derive(Debug)]
struct Planner {
    change: RegistryChange,
    sequence: u64,
    /// The destroyed keys whose new rows say that the objects must still be removed from the tokens.
    unremoved: Vec<WrappingKeyId>,
}

impl Planner {
    fn new(registry: &Registry) -> Self {
        // A row that is not verified may have any number. A verified row always counts, because its next number must be higher.
        let counted = registry
            .rows()
            .filter(|(row, problem)| problem.is_none() || row.sequence < store::SEQUENCE_LIMIT);
        let sequences = counted.map(|(row, _)| row.sequence);
        Self {
            change: RegistryChange::default(),
            sequence: sequences.max().unwrap_or(0),
            unremoved: Vec::new(),
        }
    }

    /// Returns the number of the next changed row.
    fn next_sequence(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }

    /// Adds the change of a row to the transaction. The MAC of the new row is computed later. The number
    /// of the row always grows. Otherwise, an earlier row or an earlier schedule of the key would be valid again.
    fn change(&mut self, before: &RegistryRow, after: RegistryRow) {
        self.sequence = self.sequence.max(before.sequence);
        let row = RegistryRow {
            sequence: self.next_sequence(),
            ..after
        };
        self.change.updates.push(RegistryUpdate {
            row,
            expected: before.mac,
        });
    }

    /// Adds the rows of the destroyed keys, so that the integrity key in use authenticates these rows again. Otherwise the
    /// rows could not be verified after the destruction of the key that authenticated them before. The transaction already
    /// changes the row of the key `id`.
    fn sign_tombstones(&mut self, registry: &Registry, id: WrappingKeyId) {
        let tombstones = registry.rows().filter(|(row, problem)| {
            row.state == WrappingKeyState::Destroyed
                && row.id != id
                && problem.is_none()
                && !registry.has_refused_change(row.id)
        });
        for (row, _) in tombstones {
            self.change(row, row.clone());
            if registry.is_unremoved(row.id) {
                self.unremoved.push(row.id);
            }
        }
    }

    /// Deactivates every other active key. If no token serves an active key at present, this key remains active,
    /// because only its own integrity key could authenticate the change. The broker wraps with the usable active key
    /// that has the highest number.
    fn deactivate_others(&mut self, registry: &Registry, id: WrappingKeyId, state: &TokenState) {
        let active = registry
            .rows()
            .filter(|(row, _)| row.id != id && row.state == WrappingKeyState::Active);
        for (row, problem) in active {
            let is_unserved = !state.tokens.is_empty() && !state.serves(row.id);
            let problem = problem.or(is_unserved.then_some("no available token has the key"));
            if let Some(problem) = problem {
                tracing::warn!(
                    wrapping_key = %row.id, problem,
                    "a wrapping key that cannot be used was not deactivated and remains active"
                );
                continue;
            }
            let after = RegistryRow {
                state: WrappingKeyState::Deactivated,
                ..row.clone()
            };
            self.change(row, after);
        }
    }
}

/// Converts the error of a commit to the error for the caller. A conflict means that another broker
/// or a command changed the registry first.
fn from_commit(error: store::Error) -> Error {
    match error {
        store::Error::Conflict | store::Error::Exists => {
            let what = "another broker or a command changed the registry at the same time; this command changed nothing. Check the states of the keys before you repeat the command";
            Error::new(Reason::Revision, what).explained("id", what)
        }
        other => other.into(),
    }
}
