//! Rotation: makes a new wrapping key, which wraps new user keys from then on.

use std::{sync::Arc, time::Duration};

use keybroker_audit::OpenIntent;
use keybroker_core::{
    call::{Call, Timestamp},
    error::{Error, Reason},
    key::{Purpose, WrappingKeyId, WrappingKeyState},
    principal::{Action, Principal},
};
use keybroker_hsm::{Serving, admin::KeyAdmin};
use keybroker_store as store;
use keybroker_store::{PlaceChange, RegistryChange, RegistryRow};

use crate::{Broker, WrappingKeyView, commit::Settled, journal::Draft, registry::Registry};

use super::{Planner, copies::serials_on, from_commit, making::MadeKey};

/// An administrator's request for a rotation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rotation {
    /// Length of the new RSA modulus in bits: 2048, 3072 or 4096.
    pub modulus_bits: u32,
    /// Do nothing if the wrapping key that is in use is younger than this duration.
    pub if_older_than: Option<Duration>,
    /// Activate the new key immediately, although no backup contains it. If `false`, the new key stays pre-active.
    pub single: bool,
    /// Return to the previous key instead of making a new key.
    pub back: bool,
    /// The purpose of the new key; `None` for the purpose of the key in use.
    pub purpose: Option<Purpose>,
    /// Name of the token on which the key is made; `None` for the token with the highest priority that serves and has the key in use.
    pub token: Option<String>,
}

/// The result of a rotation.
#[derive(Clone, Debug)]
pub struct Rotated {
    /// The new key or, if nothing was done, the key that is in use.
    pub key: WrappingKeyView,
    /// The key that was in use before the rotation.
    pub previous: Option<WrappingKeyId>,
    /// Whether anything was changed.
    pub is_changed: bool,
}

/// The decision about a rotation.
#[derive(Debug)]
enum Decision {
    /// Keep the key in use, because it is younger than the requested age.
    Keep(WrappingKeyId),
    /// Return to this key.
    Back(Box<RegistryChange>, WrappingKeyId),
    /// Make a key on this token.
    Make(Box<KeyAdmin>),
}

impl Broker {
    /// Makes a new wrapping key, or returns to the previous key. With [`Rotation::single`], the new
    /// key is active before the caller gets the answer. No other call fails or waits during the
    /// rotation. Without [`Rotation::single`], the new key stays pre-active until an administrator
    /// activates it. When the new key becomes active, the previous key is deactivated and still
    /// unwraps.
    pub async fn rotate_key(
        self: &Arc<Self>,
        principal: &Principal,
        call: &Call,
        rotation: Rotation,
    ) -> Result<Rotated, Error> {
        let (broker, principal, owned) = (Arc::clone(self), principal.clone(), call.clone());
        self.run_change(Action::RotateKey, call.clone(), async move {
            broker.run_rotation(&principal, &owned, rotation).await
        })
        .await
    }

    async fn run_rotation(
        &self,
        principal: &Principal,
        call: &Call,
        rotation: Rotation,
    ) -> Result<Rotated, Error> {
        let action = Action::RotateKey;
        let mut draft = self.begin_control_change(principal, call, action).await?;
        let turn = self.or_record(&draft, self.key_changes.begin()).await?;
        let decision = self.decide_rotation(call, &rotation).await;
        let decision = self.or_record(&draft, decision).await?;
        let previous = self.registry()?.wrapping_key().ok();
        let (id, is_changed) = match decision {
            Decision::Keep(id) => {
                draft.wrapping_key(id);
                self.conclude(draft, Ok(())).await?;
                (id, false)
            }
            Decision::Back(change, id) => {
                draft.wrapping_key(id);
                self.commit_key_change(call, &draft, *change).await?;
                (id, true)
            }
            Decision::Make(token) => {
                let made = self.rotate_to_new(call, draft, *token, &rotation, previous);
                let id = made.await?;
                (id, true)
            }
        };
        drop(turn);
        Ok(Rotated {
            key: self.view_of(id)?,
            previous: previous.filter(|previous| is_changed && *previous != id),
            is_changed,
        })
    }

    async fn decide_rotation(&self, call: &Call, rotation: &Rotation) -> Result<Decision, Error> {
        call.deadline.check()?;
        self.check_acknowledged()?;
        self.refresh_registry().await?;
        let registry = self.registry()?;
        if rotation.back {
            return self.plan_return(&registry).await;
        }
        if let (Some(limit), Ok(id)) = (rotation.if_older_than, registry.wrapping_key())
            && let Some(row) = registry.row(id)
            && age(row) < limit
            && rotation.purpose.is_none_or(|wanted| wanted == row.purpose)
        {
            return Ok(Decision::Keep(id));
        }
        let mut rows = registry.rows();
        let waiting = rows.find(|(row, _)| row.state == WrappingKeyState::PreActive);
        if let Some((row, _)) = waiting {
            let what = format!(
                "key {} is already pre-active: confirm the backup of the token and activate the key with `keybroker key \
                 activate {}`",
                row.id, row.id
            );
            return Err(Error::new(Reason::KeyState, what.clone()).explained("id", &what));
        }
        let token = self.token_for_new_key(&registry, rotation.token.as_deref())?;
        if let Some(why) = token.cannot_make_keys() {
            return Err(Error::new(Reason::KeyState, why).explained("token", why));
        }
        Ok(Decision::Make(Box::new(token)))
    }

    /// Chooses the token on which a key is made.
    fn token_for_new_key(
        &self,
        registry: &Registry,
        wanted: Option<&str>,
    ) -> Result<KeyAdmin, Error> {
        let configured = self.configured.all();
        let named = |name: &str| {
            configured
                .iter()
                .find(|token| token.name() == name)
                .cloned()
        };
        if let Some(name) = wanted {
            return named(name).ok_or_else(|| {
                let names: Vec<&str> = configured.iter().map(KeyAdmin::name).collect();
                Error::violation(
                    "token",
                    format!("a token of the configuration: {}", names.join(", ")),
                )
            });
        }
        if let [only] = configured.as_slice() {
            return Ok(only.clone());
        }
        let in_use = registry.wrapping_key().ok();
        let state = self.token.state();
        // The tokens are in the order of their priorities.
        let mut serving = state.tokens.iter().filter(|token| match in_use {
            Some(key) => state.serves_on(&token.name, key),
            None => token.serving == Serving::Up,
        });
        serving.find_map(|token| named(&token.name)).ok_or_else(|| {
            let what = "no token that has the key in use serves; name another token with `--token`";
            Error::new(Reason::TokenDown, what).explained("token", what)
        })
    }

    /// Plans the return to the key that was deactivated last.
    async fn plan_return(&self, registry: &Registry) -> Result<Decision, Error> {
        let ending = self.keys_to_destroy(registry).await?;
        let deactivated = registry
            .rows()
            .filter(|(row, _)| row.state == WrappingKeyState::Deactivated)
            .filter(|(row, _)| !ending.contains(&row.id));
        let Some((row, _)) = deactivated.max_by_key(|(row, _)| row.sequence) else {
            let what = "there is no previous key: none of the registered keys is in the state `deactivated`";
            return Err(Error::new(Reason::KeyState, what).explained("id", what));
        };
        let row = registry.verified(row.id)?;
        self.warn_of_missing_copies(registry, row);
        let mut planner = Planner::new(registry);
        planner.deactivate_others(registry, row.id, &self.token.state());
        planner.sign_tombstones(registry, row.id);
        let active = RegistryRow {
            state: WrappingKeyState::Active,
            ..row.clone()
        };
        planner.change(row, active);
        let change = self.with_macs(planner, row.id).await?;
        Ok(Decision::Back(Box::new(change), row.id))
    }

    /// Makes a key and registers it. If a step fails, the key is removed from the token again.
    async fn rotate_to_new(
        &self,
        call: &Call,
        mut draft: Draft,
        token: KeyAdmin,
        rotation: &Rotation,
        previous: Option<WrappingKeyId>,
    ) -> Result<WrappingKeyId, Error> {
        draft.tokens(&[token.name()]);
        let purpose = self.purpose_of_new(rotation, previous)?;
        // The intent is written before the key is made, because making a key changes the token.
        let at = Timestamp::now();
        let intent = self.record_intent(&draft, at).await?;
        let serials = serials_on(&*self.registry()?, token.name());
        let made = match MadeKey::make(token, purpose, rotation.modulus_bits, serials).await {
            Ok(made) => made,
            Err(error) => return self.close_intent(intent, &draft, Err(error)).await,
        };
        let id = made.id();
        draft.wrapping_key(id);
        let planned = self.plan_new(&made, rotation, previous).await;
        let registered = self.register_new(call, &draft, at, intent, planned).await;
        self.forget_new_key();
        match &registered {
            Ok(()) => made.close().await,
            // The row may have been committed, so the key must stay on the token.
            Err(error) if error.is_outcome_unknown() => made.close().await,
            Err(_) => made.discard().await,
        }
        self.apply_key_change().await;
        registered.map(|()| id)
    }

    /// The purpose of a new key. With `release.sealed_only`, a new key without a named purpose is sealed.
    fn purpose_of_new(
        &self,
        rotation: &Rotation,
        previous: Option<WrappingKeyId>,
    ) -> Result<Purpose, Error> {
        if let Some(named) = rotation.purpose {
            return Ok(named);
        }
        if self.sealed_only {
            return Ok(Purpose::Sealed);
        }
        let registry = self.registry()?;
        let row = previous.and_then(|id| registry.row(id));
        Ok(row.map_or_else(Purpose::default, |row| row.purpose))
    }

    async fn register_new(
        &self,
        call: &Call,
        draft: &Draft,
        at: Timestamp,
        intent: OpenIntent,
        planned: Result<RegistryChange, Error>,
    ) -> Result<(), Error> {
        let planned = match planned {
            Ok(planned) => planned,
            Err(error) => return self.close_intent(intent, draft, Err(error)).await,
        };
        let commit = async { self.store.change_registry(&planned, call.id, at).await };
        let settled = self.settle(intent, draft, at, commit).await;
        // Without a definite answer of the store, the row may have been committed.
        let Settled { intent, result } = settled.map_err(Error::outcome_unknown)?;
        let is_committed = result.is_ok();
        let result = result.map_err(from_commit);
        let closed = self.close_intent(intent, draft, result).await;
        if is_committed {
            closed.map_err(Error::outcome_unknown)
        } else {
            closed
        }
    }

    /// Plans the rows for a new key. Fails if `previous` is no longer the key in use. Every plan also changes the row
    /// of the key in use. Therefore only one of two concurrent rotations succeeds.
    async fn plan_new(
        &self,
        made: &MadeKey,
        rotation: &Rotation,
        previous: Option<WrappingKeyId>,
    ) -> Result<RegistryChange, Error> {
        // The workers need the row to test the key before the key is registered.
        let unregistered = made.row(WrappingKeyState::PreActive, 0).await?;
        // With one token, the registry row describes the token.
        let place = if self.configured.all().len() > 1 {
            Some(made.place().await?)
        } else {
            None
        };
        self.prove_new_key(unregistered, place.clone()).await?;
        let registry = self.registry()?;
        let mut rows = registry.rows();
        let has_waiting = rows.any(|(row, _)| row.state == WrappingKeyState::PreActive);
        if has_waiting || registry.wrapping_key().ok() != previous {
            return Err(from_commit(store::Error::Conflict));
        }
        let mut planner = Planner::new(&registry);
        let state = if rotation.single {
            planner.deactivate_others(&registry, made.id(), &self.token.state());
            planner.sign_tombstones(&registry, made.id());
            WrappingKeyState::Active
        } else {
            if let Some(row) = registry.wrapping_key().ok().and_then(|id| registry.row(id)) {
                planner.change(row, row.clone());
            }
            WrappingKeyState::PreActive
        };
        let sequence = planner.next_sequence();
        planner.change.places.extend(place.map(|row| PlaceChange {
            row,
            expected: None,
        }));
        let mut change = self.with_macs(planner, made.id()).await?;
        change.insert = Some(made.row(state, sequence).await?);
        Ok(change)
    }
}

/// Returns the time since a key was registered, or zero if the registration is in the future by the local clock.
pub(super) fn age(row: &RegistryRow) -> Duration {
    let micros = Timestamp::now().micros() - row.registered.micros();
    Duration::from_micros(u64::try_from(micros).unwrap_or(0))
}
