//! Changes of wrapping keys by administrators: rotation and changes of states.
//!
//! A change is decided on the verified registry, and committed in one transaction that compares the MAC of each row that
//! it replaces. Of two brokers that change the same key at the same time, one makes its change and the other gets an
//! error. Every new row has a MAC by its own integrity key.
//!
//! Mitigation: M11 of `THREAT_MODEL.md`.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use keybroker_core::{
    call::{Call, Deadline, Timestamp},
    envelope::mac::MacMessage,
    error::{Error, Reason},
    key::{WrappingKeyId, WrappingKeyState},
    principal::{Action, Principal},
};
use keybroker_hsm::{Caller, Serving, admin::KeyAdmin};
use keybroker_store as store;
use keybroker_store::{DestructionChange, RegistryChange, RegistryRow, RegistryUpdate};

use super::{
    Broker, WrappingKeyView, commit::Settled, control::view, journal::Draft, registry::Registry,
};

mod age;
mod destruction;
mod making;
mod rotation;

pub(super) use age::KeyAge;
pub(super) use destruction::Scheduled;
pub use destruction::{DestructionRules, Wait};
pub use rotation::{Rotated, Rotation};

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
    /// A suspended key is used again: it is active if no other key is active, and deactivated otherwise.
    Resume,
    /// The key unwraps, but no longer wraps.
    Deactivate,
    /// The key is never used again.
    Compromise,
    /// The key is missing from the token and will not return: it counts as destroyed from now on.
    Lose,
    /// The key is destroyed after a waiting time. Its state does not change before.
    Destroy(Wait),
    /// The scheduled destruction of the key is cancelled.
    Keep,
}

impl KeyChange {
    /// The action that policies decide about.
    pub const fn action(self) -> Action {
        match self {
            Self::Activate { .. } => Action::ActivateKey,
            Self::Suspend => Action::SuspendKey,
            Self::Resume => Action::ResumeKey,
            Self::Deactivate => Action::DeactivateKey,
            Self::Compromise => Action::CompromiseKey,
            Self::Lose => Action::LoseKey,
            Self::Destroy(Wait::None) => Action::DestroyKeyNow,
            Self::Destroy(_) => Action::DestroyKey,
            Self::Keep => Action::KeepKey,
        }
    }
}

/// The changes of wrapping keys that this broker makes.
#[derive(Debug)]
pub(super) struct KeyChanges {
    admin: KeyAdmin,
    /// Held during a change, so that this broker makes one change at a time.
    turn: tokio::sync::Mutex<()>,
    /// A key that was made and is not registered yet, which the workers already have to check.
    awaited: Mutex<Option<RegistryRow>>,
}

impl KeyChanges {
    pub(super) fn new(admin: KeyAdmin) -> Self {
        Self {
            admin,
            turn: tokio::sync::Mutex::default(),
            awaited: Mutex::default(),
        }
    }

    /// The row of the key that is not registered yet, but that the workers have to check.
    pub(super) fn awaited(&self) -> Option<RegistryRow> {
        self.lock_awaited().clone()
    }

    fn lock_awaited(&self) -> MutexGuard<'_, Option<RegistryRow>> {
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a change. Refuses a second change at the same time.
    fn begin(&self) -> Result<tokio::sync::MutexGuard<'_, ()>, Error> {
        self.turn.try_lock().map_err(|_| {
            let what =
                "another change of a wrapping key is in progress; try again when it has ended";
            Error::new(Reason::Revision, what).explained("id", what)
        })
    }
}

impl Broker {
    /// Changes the state of a wrapping key. This broker applies the change before the answer, and each other broker on
    /// the same database within about a second.
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
        let turn = self.or_record(&draft, self.key_changes.begin()).await?;
        let planned = self.plan_state_change(principal, call, id, change).await;
        let planned = self.or_record(&draft, planned).await?;
        self.commit_key_change(call, &draft, planned).await?;
        drop(turn);
        self.view_of(id)
    }

    async fn plan_state_change(
        &self,
        principal: &Principal,
        call: &Call,
        id: WrappingKeyId,
        change: KeyChange,
    ) -> Result<RegistryChange, Error> {
        call.deadline.check()?;
        self.check_acknowledged()?;
        self.refresh_registry().await?;
        // Another broker may have registered the key a moment ago.
        self.ask_registry(call.deadline, |registry| registry.check_examined(id))
            .await?;
        let registry = self.registry()?;
        match change {
            KeyChange::Lose => return self.plan_loss(&registry, id).await,
            KeyChange::Destroy(wait) => {
                return self.plan_destruction(&registry, id, wait, principal).await;
            }
            KeyChange::Keep => return self.plan_keeping(&registry, id).await,
            _ => {}
        }
        let row = registry.verified(id)?;
        let to = next_state(&registry, row, change)?;
        if change != KeyChange::Compromise {
            self.check_not_scheduled(row).await?;
        }
        let mut new = RegistryRow {
            state: to,
            ..row.clone()
        };
        if let KeyChange::Activate {
            backup_confirmed,
            without_backup,
        } = change
        {
            if backup_confirmed && row.backup_confirmed.is_none() {
                new.backup_confirmed = Some(Timestamp::now());
            }
            check_backup(row, new.backup_confirmed.is_some() || without_backup)?;
        }
        let mut planner = Planner::new(&registry);
        if to == WrappingKeyState::Active {
            planner.deactivate_others(&registry, id);
        }
        planner.change(row, new);
        let mut planned = self.with_macs(planner).await?;
        // A schedule is bound to the number of the registry row, which has changed.
        planned.destruction = Some(DestructionChange::Remove(id));
        Ok(planned)
    }

    /// Plans the tombstone of a missing key. The integrity key that is in use authenticates it.
    async fn plan_loss(
        &self,
        registry: &Registry,
        id: WrappingKeyId,
    ) -> Result<RegistryChange, Error> {
        let row = registry.missing(id)?;
        self.check_no_token_is_away(id)?;
        let signer = registry.integrity_key()?;
        let tombstone = RegistryRow {
            state: WrappingKeyState::Destroyed,
            ..row.clone()
        };
        let mut planner = Planner::new(registry);
        planner.change(row, tombstone);
        let content = |row: &RegistryRow| (signer, row.tombstone_message());
        let mut planned = self.authenticated(planner, content).await?;
        planned.destruction = Some(DestructionChange::Remove(id));
        Ok(planned)
    }

    /// Checks that every configured token serves. A token that does not serve may hold the key, and the loss of a key cannot be
    /// undone.
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
            "key {id} may be on token {}, which does not serve; repair the token, or remove it from the configuration and restart \
             the broker",
            away.name
        );
        Err(Error::new(Reason::KeyState, what.clone()).explained("id", &what))
    }

    /// Makes the MACs of the changed rows, each with its own integrity key.
    async fn with_macs(&self, planner: Planner) -> Result<RegistryChange, Error> {
        let content = |row: &RegistryRow| (row.id, row.mac_message());
        self.authenticated(planner, content).await
    }

    /// Makes the MACs of the changed rows. `content` returns the key whose integrity key makes the MAC of a row, and the message.
    async fn authenticated(
        &self,
        planner: Planner,
        content: impl Fn(&RegistryRow) -> (WrappingKeyId, MacMessage),
    ) -> Result<RegistryChange, Error> {
        let mut change = planner.change;
        for update in &mut change.updates {
            let caller = Caller::background(Deadline::after(MAC_TIMEOUT));
            let (signer, message) = content(&update.row);
            update.row.mac = self.token.mac(signer, &message, &caller).await?;
        }
        Ok(change)
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
        if let Err(error) = read.and(self.read_destructions().await) {
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
            ..view(found, &state)
        })
    }
}

/// The state into which a change brings a key.
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
        KeyChange::Keep => row.state,
        KeyChange::Resume if row.state != WrappingKeyState::Suspended => {
            let what = format!(
                "only a suspended key can be resumed, and this key is {}",
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

/// Refuses to activate a key that is in no backup: the first user key that it wraps would be lost together with the token.
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
}

impl Planner {
    fn new(registry: &Registry) -> Self {
        let sequences = registry.rows().map(|(row, _)| row.sequence);
        Self {
            change: RegistryChange::default(),
            sequence: sequences.max().unwrap_or(0),
        }
    }

    /// Returns the number of the next changed row.
    fn next_sequence(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }

    /// Adds a change of a row. Its MAC is made later.
    fn change(&mut self, before: &RegistryRow, after: RegistryRow) {
        let row = RegistryRow {
            sequence: self.next_sequence(),
            ..after
        };
        self.change.updates.push(RegistryUpdate {
            row,
            expected: before.mac,
        });
    }

    /// Deactivates every other active key. A key that is missing from the token stays as it is, because only its own
    /// integrity key could authenticate the change; a key with a higher number that can be used comes before it.
    fn deactivate_others(&mut self, registry: &Registry, id: WrappingKeyId) {
        let active = registry
            .rows()
            .filter(|(row, _)| row.id != id && row.state == WrappingKeyState::Active);
        for (row, problem) in active {
            if let Some(problem) = problem {
                tracing::warn!(
                    wrapping_key = %row.id, problem,
                    "an active wrapping key was not deactivated, because it cannot be used"
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

/// Converts the error of a commit. A conflict means that another broker or a command changed the registry first.
fn from_commit(error: store::Error) -> Error {
    match error {
        store::Error::Conflict | store::Error::Exists => {
            let what = "another broker or a command changed the registry at the same time; nothing was changed here. Look at \
                        the keys again before you repeat the command";
            Error::new(Reason::Revision, what).explained("id", what)
        }
        other => other.into(),
    }
}
