//! The registry of wrapping keys. The token verifies each row before the broker uses it. Each key is checked
//! separately: a key that is missing from the token, or an altered row, does not affect the other keys.
//!
//! Mitigation: M11 of `THREAT_MODEL.md`.

use std::{
    collections::BTreeSet,
    fmt,
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use keybroker_core::{
    call::Deadline,
    error::{Error, Reason},
    key::{KeyUse, Purpose, WrappingKeyId, WrappingKeyState},
    metrics,
};
use keybroker_hsm::{ExpectedKey, Serving, TokenKey, TokenState, leave};
use keybroker_store::{PlaceRow, RegistryRow};

use super::{Broker, START_RETRY};

use entry::{Entry, RefusedChange, Standing};
use examine::{altered, is_absent};

mod entry;
mod examine;

pub(super) mod memory;

/// Time limit for one verification of rows with the token. The broker verifies changed rows once a
/// second.
const REFRESH_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest time for which a call waits until the workers have checked a key that was just registered.
const PROOF_WAIT: Duration = Duration::from_secs(10);
/// Interval at which a waiting call checks whether the new key can be used. The check reads only memory.
const PROOF_PAUSE: Duration = Duration::from_millis(20);

/// The problems of the registry that were logged after its last check.
#[derive(Debug, Default)]
pub(super) struct LoggedProblems {
    altered: String,
    lost: String,
}

/// The registered wrapping keys, with the result of the last check of each key.
#[derive(Debug, Default)]
pub(super) struct Registry {
    entries: Vec<Entry>,
    /// Changes of stored rows that the broker rejected, because their verification failed or they would undo a later
    /// change.
    refused_changes: Vec<RefusedChange>,
    /// The tokens that have each key, as far as the rows can be read.
    places: Vec<PlaceRow>,
    /// Whether only sealed wrapping keys wrap new user keys.
    sealed_only: bool,
}

/// Reason why a key cannot be used for a call.
#[derive(Debug)]
pub(super) enum Refusal {
    /// The workers have not checked the key yet. The call may wait.
    Unproved(WrappingKeyId),
    /// The call is refused.
    Refused(Error),
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Refused(error) => error,
            Refusal::Unproved(id) => {
                let detail = format!(
                    "wrapping key {id} is new, and the token workers have not checked this key yet"
                );
                Self::new(Reason::TokenDown, detail).retry_after(START_RETRY)
            }
        }
    }
}

impl Registry {
    /// Returns the wrapping key for new envelopes: of the active wrapping keys that can be used, the key that was activated
    /// last. If a token is unavailable for a moment, the result stays the same. Otherwise, user keys could be wrapped
    /// under a key that an administrator is about to retire.
    pub(super) fn wrapping_key(&self) -> Result<WrappingKeyId, Refusal> {
        let candidates = self
            .entries
            .iter()
            .filter(|entry| !self.sealed_only || entry.row.purpose == Purpose::Sealed);
        best(candidates, KeyUse::Wrap).unwrap_or_else(|| {
            let what = if self.sealed_only {
                "no sealed wrapping key is active, and `release.sealed_only` is set"
            } else {
                "no wrapping key is active"
            };
            Err(Refusal::Refused(Error::new(Reason::KeyState, what)))
        })
    }

    /// Returns the wrapping key whose integrity key authenticates request ids and API clients. If no wrapping key is
    /// active, returns the newest wrapping key whose integrity key may still compute MACs.
    pub(super) fn integrity_key(&self) -> Result<WrappingKeyId, Refusal> {
        best(self.entries.iter(), KeyUse::MakeMac).unwrap_or_else(|| {
            let error = Error::new(
                Reason::KeyState,
                "no registered wrapping key can authenticate rows",
            );
            Err(Refusal::Refused(error))
        })
    }

    /// Checks that a wrapping key may be used for a stored row. `key_use` is the intended use of
    /// the key.
    pub(super) fn check(&self, id: WrappingKeyId, key_use: KeyUse) -> Result<(), Refusal> {
        let entry = self.entry(id).ok_or_else(|| {
            let detail = format!("wrapping key {id} of the envelope is not registered");
            Refusal::Refused(Error::new(Reason::RecordDamaged, detail))
        })?;
        entry.check(key_use)
    }

    /// Returns an error if the workers have not finished their check of a key. The function ignores
    /// the result of the check.
    pub(super) fn check_examined(&self, id: WrappingKeyId) -> Result<(), Refusal> {
        match self.entry(id).map(|entry| &entry.standing) {
            Some(Standing::Unproved) => Err(Refusal::Unproved(id)),
            _ => Ok(()),
        }
    }

    /// Returns an error if the workers have not finished their check of an active key, which may be the key in use.
    pub(super) fn check_active_examined(&self) -> Result<(), Refusal> {
        let mut active = self
            .entries
            .iter()
            .filter(|entry| entry.row.state.may_wrap());
        match active.find(|entry| entry.standing == Standing::Unproved) {
            Some(unproved) => Err(Refusal::Unproved(unproved.row.id)),
            None => Ok(()),
        }
    }

    /// Returns the row of a key, if the token has verified the row. The error tells the administrator why a change is
    /// not possible.
    pub(super) fn verified(&self, id: WrappingKeyId) -> Result<&RegistryRow, Error> {
        let unknown = || Error::new(Reason::KeyNotFound, format!("wrapping key {id}"));
        let entry = self.entry(id).ok_or_else(unknown)?;
        let reason = match entry.standing {
            Standing::Verified => return Ok(&entry.row),
            Standing::Unproved | Standing::Missing(_) | Standing::Unverified(_) => {
                Reason::TokenDown
            }
            Standing::Untrusted(_) | Standing::Altered(_) => Reason::TokenUntrusted,
        };
        let what = format!(
            "the state of key {id} cannot be changed, because its registry row cannot be authenticated: {}",
            entry.problem().unwrap_or_default()
        );
        Err(Error::new(reason, what.clone()).explained("id", &what))
    }

    /// Returns the row of a key that is missing from the token. Otherwise, returns an error that explains why the loss of the
    /// key cannot be recorded. The loss of a key can be recorded again if no key authenticates its row any more and no token
    /// has the key.
    pub(super) fn missing(
        &self,
        id: WrappingKeyId,
        state: &TokenState,
    ) -> Result<&RegistryRow, Error> {
        let unknown = || Error::new(Reason::KeyNotFound, format!("wrapping key {id}"));
        let entry = self.entry(id).ok_or_else(unknown)?;
        let what = match entry.standing {
            Standing::Missing(_) => return Ok(&entry.row),
            Standing::Altered(_) if entry.is_tombstone() && is_absent(id, state) => {
                return Ok(&entry.row);
            }
            Standing::Verified if entry.is_tombstone() => {
                format!("key {id} is already destroyed")
            }
            Standing::Unverified(_) => format!(
                "the token that can verify the registry row of key {id} does not answer; repeat the command when the token \
                 answers again"
            ),
            _ => format!(
                "key {id} is not missing: the key is on the token, so its loss cannot be recorded"
            ),
        };
        Err(Error::new(Reason::KeyState, what.clone()).explained("id", &what))
    }

    /// Whether the wrapping key is registered, even if it is not verified yet.
    pub(super) fn knows(&self, id: WrappingKeyId) -> bool {
        self.entry(id).is_some()
    }

    /// Checks that user keys can be released or stored, because at least one wrapping key works. A
    /// key that the workers are checking counts as working, because calls wait for the result.
    pub(super) fn check_service(&self) -> Result<(), Error> {
        let error = match self.wrapping_key() {
            Ok(_) | Err(Refusal::Unproved(_)) => return Ok(()),
            Err(Refusal::Refused(error)) => error,
        };
        let is_read_only = error.reason() == Reason::KeyState
            && self
                .entries
                .iter()
                .any(|entry| entry.check(KeyUse::Unwrap).is_ok());
        if is_read_only { Ok(()) } else { Err(error) }
    }

    /// Returns the problems of individual keys, for the log and for administrators.
    pub(super) fn problems(&self) -> Vec<String> {
        let entries = self.entries.iter();
        let of_keys = entries.filter_map(|entry| {
            let problem = entry.problem()?;
            Some(format!("wrapping key {}: {problem}", entry.row.id))
        });
        of_keys
            .chain(self.refused_changes.iter().map(RefusedChange::to_string))
            .chain(self.left_active())
            .collect()
    }

    /// The keys that stayed active although another key was activated later, because no token could authenticate their change.
    fn left_active(&self) -> impl Iterator<Item = String> {
        let newest = self.wrapping_key().ok();
        let active = self.entries.iter().filter(move |entry| {
            entry.standing == Standing::Verified
                && entry.row.state == WrappingKeyState::Active
                && newest.is_some_and(|newest| newest != entry.row.id)
        });
        active.map(|entry| {
            format!(
                "wrapping key {} is still active, although another key was activated later: run `keybroker key deactivate {}`",
                entry.row.id, entry.row.id
            )
        })
    }

    /// Whether a change of a key's row was refused, so that the row in the database is not the row in use.
    pub(super) fn has_refused_change(&self, id: WrappingKeyId) -> bool {
        self.refused_changes
            .iter()
            .any(|refused| refused.key() == Some(id))
    }

    /// The destroyed keys whose objects must still be removed from the tokens, according to their authentic rows.
    pub(super) fn unremoved(&self) -> impl Iterator<Item = WrappingKeyId> {
        let entries = self.entries.iter();
        let unremoved =
            entries.filter(|entry| entry.is_unremoved && entry.standing == Standing::Verified);
        unremoved.map(|entry| entry.row.id)
    }

    /// Whether the objects of a destroyed key must still be removed from the tokens, according to the authentic row of the key.
    pub(super) fn is_unremoved(&self, id: WrappingKeyId) -> bool {
        self.unremoved().any(|unremoved| unremoved == id)
    }

    /// Returns the wrapping key whose integrity key authenticates rows, if the key `without` may no longer be used.
    pub(super) fn integrity_key_without(&self, without: WrappingKeyId) -> Option<WrappingKeyId> {
        let others = self.entries.iter().filter(|entry| entry.row.id != without);
        best(others, KeyUse::MakeMac)?.ok()
    }

    pub(super) fn row(&self, id: WrappingKeyId) -> Option<&RegistryRow> {
        self.entry(id).map(|entry| &entry.row)
    }

    /// Returns each row and, if its key cannot be used, the reason.
    pub(super) fn rows(&self) -> impl Iterator<Item = (&RegistryRow, Option<&str>)> {
        self.entries
            .iter()
            .map(|entry| (&entry.row, entry.problem()))
    }

    /// Returns the rows that name the tokens of keys.
    pub(super) fn places(&self) -> impl Iterator<Item = &PlaceRow> {
        self.places.iter()
    }

    /// Returns the rows that name the tokens of a key.
    pub(super) fn places_of(&self, id: WrappingKeyId) -> impl Iterator<Item = &PlaceRow> {
        self.places.iter().filter(move |place| place.key == id)
    }

    /// Returns the distinct serial numbers in the rows of the keys that are not destroyed.
    pub(super) fn serials(&self) -> BTreeSet<&str> {
        let rows = self.entries.iter().map(|entry| &entry.row);
        let rows = rows.filter(|row| row.state != WrappingKeyState::Destroyed);
        rows.map(|row| row.token_serial.as_str()).collect()
    }

    fn entry(&self, id: WrappingKeyId) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.row.id == id)
    }

    fn has_unproved(&self) -> bool {
        self.entries
            .iter()
            .any(|entry| entry.standing == Standing::Unproved)
    }

    /// Returns the causes for the alert about altered rows of the registry.
    fn altered_rows(&self) -> Vec<String> {
        let entries = self.entries.iter();
        let altered = entries.filter_map(|entry| match &entry.standing {
            Standing::Altered(cause) => Some(cause.clone()),
            _ => None,
        });
        let refused = self.refused_changes.iter().map(RefusedChange::to_string);
        altered.chain(refused).collect()
    }

    /// Returns the causes for the alert about missing or untrusted keys on the token. A destroyed
    /// key causes no alert, because the token need not contain the key.
    fn lost_keys(&self) -> Vec<&str> {
        let entries = self.entries.iter();
        entries
            .filter_map(|entry| match &entry.standing {
                _ if entry.is_tombstone() => None,
                Standing::Missing(cause)
                | Standing::Unverified(cause)
                | Standing::Untrusted(cause) => Some(cause.as_str()),
                _ => None,
            })
            .collect()
    }

    fn first_failure(&self) -> Option<Error> {
        let has_usable = self
            .entries
            .iter()
            .any(|entry| entry.standing == Standing::Verified);
        let first = self.entries.iter().find(|entry| entry.problem().is_some());
        let first = first.filter(|_| !has_usable)?;
        // The state is irrelevant here: no use of an unverified key is permitted.
        Some(match &first.standing {
            Standing::Unproved => Refusal::Unproved(first.row.id).into(),
            Standing::Unverified(cause) => {
                Error::new(Reason::TokenDown, cause.clone()).retry_after(START_RETRY)
            }
            Standing::Missing(cause) | Standing::Untrusted(cause) | Standing::Altered(cause) => {
                Error::new(Reason::TokenUntrusted, cause.clone())
            }
            Standing::Verified => return None,
        })
    }
}

/// Returns the key that was activated last among the keys that may be used for `key_use`. If no key can be used,
/// returns the reason why the key that will probably be usable first cannot be used yet. Returns `None` if the states
/// of all keys forbid the use.
fn best<'a>(
    candidates: impl Iterator<Item = &'a Entry>,
    key_use: KeyUse,
) -> Option<Result<WrappingKeyId, Refusal>> {
    let allowed = candidates.filter(|entry| entry.row.state.allows(key_use));
    let best = allowed.max_by_key(|entry| {
        let is_verified = entry.standing == Standing::Verified;
        let is_unproved = entry.standing == Standing::Unproved;
        (
            is_verified,
            is_unproved,
            entry.row.state.may_wrap(),
            entry.row.sequence,
        )
    })?;
    Some(best.check(key_use).map(|()| best.row.id))
}

/// Function that computes, from the rows of the registry, the keys that must be on each token. Each
/// result has the configured name of the token.
type Compute =
    dyn Fn(Vec<RegistryRow>, Vec<PlaceRow>) -> Vec<(String, Vec<ExpectedKey>)> + Send + Sync;

/// The rule that determines which keys must be on each token. The rule depends on the configuration of the tokens.
#[derive(Clone)]
pub struct Expect(Arc<Compute>);

impl Expect {
    /// `compute` returns the keys of each token, by the configured name of the token.
    pub fn new(
        compute: impl Fn(Vec<RegistryRow>, Vec<PlaceRow>) -> Vec<(String, Vec<ExpectedKey>)>
        + Send
        + Sync
        + 'static,
    ) -> Self {
        Self(Arc::new(compute))
    }

    /// Returns the keys of each token, by the configured name of the token.
    pub(super) fn of(
        &self,
        rows: Vec<RegistryRow>,
        places: Vec<PlaceRow>,
    ) -> Vec<(String, Vec<ExpectedKey>)> {
        (self.0)(rows, places)
    }
}

impl fmt::Debug for Expect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Expect").finish_non_exhaustive()
    }
}

impl Broker {
    /// Reads the registry and verifies it against the token: the MAC of every row, the serial number of the token, and
    /// the fingerprint of every key. A difference between the registry and the token is reported
    /// and never repaired. The broker refuses a key that differs from its registry row, and uses
    /// the other keys. If no key can be used, returns an error. Until this function succeeds, the
    /// broker wraps and unwraps nothing.
    pub async fn load_registry(&self, deadline: Deadline) -> Result<(), Error> {
        let _turn = self.registry_refresh.lock().await;
        let rows = self.store.registry().await?;
        if rows.is_empty() {
            tracing::warn!("no wrapping key is registered; run `keybroker key generate`");
        }
        self.take_over_memory().await?;
        let registry = self.examine(rows, &Registry::default(), deadline).await?;
        if let Some(error) = registry.first_failure() {
            return Err(error);
        }
        for (row, _) in registry.rows() {
            if row.backup_confirmed.is_none() && row.state != WrappingKeyState::Destroyed {
                tracing::warn!(
                    wrapping_key = %row.id,
                    "no backup of the token is confirmed for this wrapping key: if the token is lost, every user key that is \
                     wrapped under this wrapping key is lost; back up the token, test the restore, then run `keybroker token \
                     backup-confirmed`"
                );
            }
        }
        self.use_registry(registry);
        self.remember_registry().await;
        Ok(())
    }

    /// Loads the changes that another process made to the registry, after the token has verified them. If the
    /// verification of a row fails, or the row would undo a later change, the last verified row stays in use.
    pub(super) async fn refresh_registry(&self) -> Result<(), Error> {
        // Only one refresh runs at a time, so that older rows never replace newer rows.
        let _turn = self.registry_refresh.lock().await;
        let Some(known) = self.registry.load_full() else {
            return Ok(());
        };
        let found = self.store.registry().await?;
        let deadline = Deadline::after(REFRESH_TIMEOUT);
        let fresh = self.examine(found, &known, deadline).await?;
        let is_changed =
            fresh.entries != known.entries || fresh.refused_changes != known.refused_changes;
        if is_changed {
            tracing::info!("the registry of wrapping keys changed");
        }
        if is_changed || fresh.places != known.places || self.is_logged_as_unreadable(&fresh) {
            self.use_registry(fresh);
        }
        Ok(())
    }

    /// Starts to use an examined registry, and raises alerts about new problems.
    fn use_registry(&self, registry: Registry) {
        for entry in &registry.entries {
            let usable = entry.standing == Standing::Verified;
            let gauge = metrics::WRAPPING_KEY_USABLE.with([entry.row.id.to_string()]);
            gauge.set(f64::from(u8::from(usable)));
        }
        let altered = registry.altered_rows().join("; ");
        metrics::REGISTRY_ALTERED.set_flag(!altered.is_empty());
        let lost = registry.lost_keys().join("; ");
        {
            let mut told = self
                .logged_problems
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            // Logs a new problem once, and not every second.
            if told.altered != altered && !altered.is_empty() {
                keybroker_core::alert!(
                    Registry, cause = %altered,
                    "rows of the wrapping-key registry failed verification; the broker uses the last verified row of each wrapping key, and refuses wrapping keys without a verified row"
                );
            }
            if told.lost != lost && !lost.is_empty() {
                keybroker_core::alert!(
                    WrappingKey, cause = %lost,
                    "some registered wrapping keys cannot be used; user keys under these wrapping keys are not \
                     released, and the other wrapping keys stay in use"
                );
            }
            told.altered = altered;
            told.lost = lost;
        }
        self.registry.store(Some(Arc::new(registry)));
    }

    /// Whether the problems of the registry that was just read differ from the problems that were
    /// logged last.
    fn is_logged_as_unreadable(&self, fresh: &Registry) -> bool {
        let logged = self.logged_problems.lock();
        let logged = logged.unwrap_or_else(PoisonError::into_inner);
        logged.altered != fresh.altered_rows().join("; ")
    }

    /// Logs that the registry cannot be read. The rows that were verified last stay in use.
    pub(super) fn note_unreadable_registry(&self, error: &Error) {
        if error.reason() != Reason::RecordDamaged {
            return tracing::warn!(%error, "cannot read the registry");
        }
        metrics::REGISTRY_ALTERED.set_flag(true);
        let mut told = self
            .logged_problems
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let cause = error.to_string();
        if told.altered != cause {
            keybroker_core::alert!(
                Registry, %cause,
                "a row of the wrapping-key registry cannot be read; the rows that were verified before stay in use"
            );
        }
        told.altered = cause;
    }

    /// Whether the workers have not checked a registered key yet.
    pub(super) fn has_unproved_key(&self) -> bool {
        let registry = self.registry.load();
        registry.as_ref().is_some_and(|known| known.has_unproved())
    }

    /// Returns the verified registry, or the reason why the registry is not verified yet.
    pub(super) fn registry(&self) -> Result<Arc<Registry>, Error> {
        if let Some(registry) = self.registry.load_full() {
            return Ok(registry);
        }
        let down = |cause: String| Error::new(Reason::TokenDown, cause).retry_after(START_RETRY);
        Err(match self.token.state().serving {
            Serving::Untrusted(cause) => Error::new(Reason::TokenUntrusted, cause),
            Serving::Down(cause) => down(cause),
            Serving::Up => down("the registry is not verified yet".to_owned()),
        })
    }

    /// Looks up a key in the registry for a call. If the key was just registered, waits until the
    /// workers have checked it. Another broker may already use the key for the same client.
    pub(super) async fn ask_registry<T>(
        &self,
        deadline: Deadline,
        ask: impl Fn(&Registry) -> Result<T, Refusal>,
    ) -> Result<T, Error> {
        let until = deadline.instant().min(Instant::now() + PROOF_WAIT);
        loop {
            let refusal = match ask(&*self.registry()?) {
                Ok(answer) => return Ok(answer),
                Err(refusal) => refusal,
            };
            if matches!(refusal, Refusal::Refused(_)) || Instant::now() >= until {
                return Err(refusal.into());
            }
            leave();
            tokio::time::sleep(PROOF_PAUSE).await;
        }
    }

    /// Checks that a wrapping key may be used for `key_use`. An unknown key is looked up in the database, because
    /// another broker may have just registered it.
    pub(super) async fn check_key(
        &self,
        deadline: Deadline,
        id: WrappingKeyId,
        key_use: KeyUse,
    ) -> Result<(), Error> {
        if !self.registry()?.knows(id) {
            leave();
            self.refresh_registry().await?;
        }
        self.ask_registry(deadline, |registry| registry.check(id, key_use))
            .await
    }
}

pub(super) fn token_key(keys: &[TokenKey], id: WrappingKeyId) -> Option<&TokenKey> {
    keys.iter().find(|key| key.id == id)
}
