//! The registry of wrapping keys. The token verifies each row before the broker uses it. Each key is checked alone: a key
//! that is missing from the token, or whose row was altered, does not affect the other keys.
//!
//! Mitigation: M11 of `THREAT_MODEL.md`.

use std::{
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
use keybroker_hsm as hsm;
use keybroker_hsm::{
    ExpectedKey, KeyProblem, MISSING_KEY_RETRY, Serving, TokenKey, TokenState, leave,
};
use keybroker_store::{PlaceRow, RegistryRow};

use super::{Broker, START_RETRY};

mod destroyed;
pub(super) mod memory;

/// Time limit for the verification of a few rows with the token, which happens once a second.
const REFRESH_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest time for which a call waits until the workers have checked a key that was just registered.
const PROOF_WAIT: Duration = Duration::from_secs(10);
/// How often such a call looks whether the key can be used now. The look reads only memory.
const PROOF_PAUSE: Duration = Duration::from_millis(20);

/// The problems of the registry at its last check, as they were logged.
#[derive(Debug, Default)]
pub(super) struct LoggedProblems {
    altered: String,
    lost: String,
}

/// The registered wrapping keys, with the result of the last check of each.
#[derive(Debug, Default)]
pub(super) struct Registry {
    entries: Vec<Entry>,
    /// Changes of stored rows that were not taken over, because they do not verify or would undo a later change.
    refused_changes: Vec<RefusedChange>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    row: RegistryRow,
    standing: Standing,
}

/// The result of the last check of a registered key.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Standing {
    /// The token has verified the row, and the state of the row decides about the use of the key.
    Verified,
    /// The workers have not checked the key yet, because it was registered a moment ago.
    Unproved,
    /// The token does not show the key.
    Missing(String),
    /// The key on the token is not as it must be.
    Untrusted(String),
    /// The row does not match the token, or its MAC does not verify.
    Altered(String),
}

/// Why a change of a stored row was not taken over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
enum RefusedChange {
    /// The row would undo a later change. The MAC of an older row is valid, too.
    #[error(
        "registry row of wrapping key {id}: the row has number {} ({}), but the last verified row had number {} ({})",
        row.0, row.1, verified.0, verified.1
    )]
    SetBack {
        id: WrappingKeyId,
        /// Number and state of the row.
        row: (u64, WrappingKeyState),
        /// Number and state of the row that was verified last.
        verified: (u64, WrappingKeyState),
    },
    /// The row does not match the token, or does not verify.
    #[error("{0}")]
    Standing(String),
    /// The token cannot verify the row at present.
    #[error("registry row of wrapping key {0}: the token cannot verify the changed row")]
    Unverified(WrappingKeyId),
    /// The row does not exist any more.
    #[error("the row of wrapping key {0} was deleted from the registry")]
    Deleted(WrappingKeyId),
}

/// Why a key cannot be used for a call.
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
                    "wrapping key {id} was registered a moment ago, and the token workers have not checked it yet"
                );
                Self::new(Reason::TokenDown, detail).retry_after(START_RETRY)
            }
        }
    }
}

impl Entry {
    /// Checks that the key may be used in this way. The state of an altered row cannot be trusted, so the key of such a row
    /// is refused in every state. The same applies to a key that is not as it must be on the token.
    fn check(&self, key_use: KeyUse) -> Result<(), Refusal> {
        let id = self.row.id;
        let refused = |reason, detail: String| Err(Refusal::Refused(Error::new(reason, detail)));
        match &self.standing {
            Standing::Untrusted(cause) | Standing::Altered(cause) => {
                refused(Reason::TokenUntrusted, cause.clone())
            }
            _ if !self.row.state.allows(key_use) => refused(
                Reason::KeyState,
                format!("wrapping key {id} is {}", self.row.state),
            ),
            Standing::Verified => Ok(()),
            Standing::Unproved => Err(Refusal::Unproved(id)),
            Standing::Missing(cause) => {
                let detail = format!("wrapping key {id} is missing: {cause}");
                let error = Error::new(Reason::TokenDown, detail);
                Err(Refusal::Refused(error.retry_after(MISSING_KEY_RETRY)))
            }
        }
    }

    /// Whether the key is destroyed, so that another key authenticates its row.
    fn is_tombstone(&self) -> bool {
        self.row.state == WrappingKeyState::Destroyed
    }

    /// A problem that prevents the use of the key in any state.
    fn problem(&self) -> Option<&str> {
        match &self.standing {
            Standing::Verified => None,
            Standing::Unproved => Some("the token workers have not checked the key yet"),
            Standing::Missing(cause) | Standing::Untrusted(cause) | Standing::Altered(cause) => {
                Some(cause)
            }
        }
    }
}

impl Registry {
    /// Returns the wrapping key for new envelopes: of the active wrapping keys that can be used, the one that was
    /// activated last.
    pub(super) fn wrapping_key(&self) -> Result<WrappingKeyId, Refusal> {
        let candidates = self
            .entries
            .iter()
            .filter(|entry| entry.row.purpose == Purpose::Plain);
        best(candidates, KeyUse::Wrap).unwrap_or_else(|| {
            let error = Error::new(Reason::KeyState, "no wrapping key is active");
            Err(Refusal::Refused(error))
        })
    }

    /// Returns the wrapping key whose integrity key authenticates request ids and API clients: the active wrapping key
    /// or, if no wrapping key is active, the newest wrapping key that may still make MACs.
    pub(super) fn integrity_key(&self) -> Result<WrappingKeyId, Refusal> {
        best(self.entries.iter(), KeyUse::MakeMac).unwrap_or_else(|| {
            let error = Error::new(Reason::KeyState, "no wrapping key may be used");
            Err(Refusal::Refused(error))
        })
    }

    /// Checks that a wrapping key may be used in this way for a stored row.
    pub(super) fn check(&self, id: WrappingKeyId, key_use: KeyUse) -> Result<(), Refusal> {
        let entry = self.entry(id).ok_or_else(|| {
            let detail = format!("wrapping key {id} of the envelope is not registered");
            Refusal::Refused(Error::new(Reason::RecordDamaged, detail))
        })?;
        entry.check(key_use)
    }

    /// Checks that the workers have checked a key. The result of their check may be a problem.
    pub(super) fn check_examined(&self, id: WrappingKeyId) -> Result<(), Refusal> {
        match self.entry(id).map(|entry| &entry.standing) {
            Some(Standing::Unproved) => Err(Refusal::Unproved(id)),
            _ => Ok(()),
        }
    }

    /// The row of a key, if the token has verified the row. An administrator who asks for a change learns why not.
    pub(super) fn verified(&self, id: WrappingKeyId) -> Result<&RegistryRow, Error> {
        let unknown = || Error::new(Reason::KeyNotFound, format!("wrapping key {id}"));
        let entry = self.entry(id).ok_or_else(unknown)?;
        let reason = match entry.standing {
            Standing::Verified => return Ok(&entry.row),
            Standing::Unproved | Standing::Missing(_) => Reason::TokenDown,
            Standing::Untrusted(_) | Standing::Altered(_) => Reason::TokenUntrusted,
        };
        let what = format!(
            "the state of key {id} cannot be changed, because its registry row cannot be authenticated: {}",
            entry.problem().unwrap_or_default()
        );
        Err(Error::new(reason, what.clone()).explained("id", &what))
    }

    /// The row of a key that the token does not show. An administrator who asks to record its loss learns why not.
    pub(super) fn missing(&self, id: WrappingKeyId) -> Result<&RegistryRow, Error> {
        let unknown = || Error::new(Reason::KeyNotFound, format!("wrapping key {id}"));
        let entry = self.entry(id).ok_or_else(unknown)?;
        let what = match entry.standing {
            Standing::Missing(_) => return Ok(&entry.row),
            _ if entry.is_tombstone() => format!("key {id} is destroyed already"),
            _ => format!(
                "key {id} is not missing: the token shows it, so its loss cannot be recorded"
            ),
        };
        Err(Error::new(Reason::KeyState, what.clone()).explained("id", &what))
    }

    /// Whether the wrapping key is registered, even if it is not verified yet.
    pub(super) fn knows(&self, id: WrappingKeyId) -> bool {
        self.entry(id).is_some()
    }

    /// Checks that user keys can be released or stored, because at least one key works. A key that the workers are checking
    /// counts as a key that works, because calls wait for it.
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

    /// The problems of single keys, for the log and for administrators.
    pub(super) fn problems(&self) -> Vec<String> {
        let entries = self.entries.iter();
        let of_keys = entries.filter_map(|entry| {
            let problem = entry.problem()?;
            Some(format!("wrapping key {}: {problem}", entry.row.id))
        });
        of_keys
            .chain(self.refused_changes.iter().map(RefusedChange::to_string))
            .collect()
    }

    pub(super) fn row(&self, id: WrappingKeyId) -> Option<&RegistryRow> {
        self.entry(id).map(|entry| &entry.row)
    }

    /// The rows, each with the reason why its key cannot be used.
    pub(super) fn rows(&self) -> impl Iterator<Item = (&RegistryRow, Option<&str>)> {
        self.entries
            .iter()
            .map(|entry| (&entry.row, entry.problem()))
    }

    fn entry(&self, id: WrappingKeyId) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.row.id == id)
    }

    fn has_unproved(&self) -> bool {
        self.entries
            .iter()
            .any(|entry| entry.standing == Standing::Unproved)
    }

    /// The causes for the alert about the stored registry.
    fn altered_rows(&self) -> Vec<String> {
        let entries = self.entries.iter();
        let altered = entries.filter_map(|entry| match &entry.standing {
            Standing::Altered(cause) => Some(cause.clone()),
            _ => None,
        });
        let refused = self.refused_changes.iter().map(RefusedChange::to_string);
        altered.chain(refused).collect()
    }

    /// The causes for the alert about keys on the token. A destroyed key is no cause, because it needs no key on the token.
    fn lost_keys(&self) -> Vec<&str> {
        let entries = self.entries.iter();
        entries
            .filter_map(|entry| match &entry.standing {
                Standing::Missing(cause) | Standing::Untrusted(cause) => Some(cause.as_str()),
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
        // The state does not matter here: no use of an unverified key is permitted.
        Some(match &first.standing {
            Standing::Unproved => Refusal::Unproved(first.row.id).into(),
            Standing::Missing(cause) => Error::new(Reason::TokenUntrusted, cause.clone()),
            Standing::Untrusted(cause) | Standing::Altered(cause) => {
                Error::new(Reason::TokenUntrusted, cause.clone())
            }
            Standing::Verified => return None,
        })
    }
}

/// Returns the key that was activated last among the keys that may be used in this way. If none can be used, returns the
/// reason of the key that the call could use soonest; `None` if the states of all keys forbid the use.
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

/// Computes the keys that must be on each token, by the configured name of the token, from the rows of the registry.
type Compute =
    dyn Fn(Vec<RegistryRow>, Vec<PlaceRow>) -> Vec<(String, Vec<ExpectedKey>)> + Send + Sync;

/// The rule that says which keys must be on each token. The rule depends on the configuration of the tokens.
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

    /// The keys of each token, by the configured name of the token.
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
    /// the fingerprint of every key. A difference between the registry and the token is reported and never repaired. A
    /// key with such a difference is refused, and the other keys are used. If no key can be used, returns an error.
    /// Until this function succeeds, the broker wraps and unwraps nothing.
    pub async fn load_registry(&self, deadline: Deadline) -> Result<(), Error> {
        let _turn = self.registry_refresh.lock().await;
        let rows = self.store.registry().await?;
        if rows.is_empty() {
            tracing::warn!("no wrapping key is registered; run `keybroker key generate`");
        }
        let mut registry = self.examine(rows, &Registry::default(), deadline).await?;
        self.compare_with_memory(&mut registry)?;
        if let Some(error) = registry.first_failure() {
            return Err(error);
        }
        for (row, _) in registry.rows() {
            if row.backup_confirmed.is_none() && row.state != WrappingKeyState::Destroyed {
                tracing::warn!(
                    wrapping_key = %row.id,
                    "no backup of the token is confirmed for this wrapping key: if the token is lost, every user key that is \
                     wrapped under this wrapping key is lost; back the token up, test the restore, then run `keybroker token \
                     backup-confirmed`"
                );
            }
        }
        self.use_registry(registry);
        self.remember_registry().await;
        Ok(())
    }

    /// Loads the changes that another process made to the registry, after the token has verified them. For a row that
    /// does not verify, or that would undo a later change, the row that was verified last stays in use.
    pub(super) async fn refresh_registry(&self) -> Result<(), Error> {
        // Refreshes run one at a time, so that older rows never replace newer ones.
        let _turn = self.registry_refresh.lock().await;
        let Some(known) = self.registry.load_full() else {
            return Ok(());
        };
        let found = self.store.registry().await?;
        let deadline = Deadline::after(REFRESH_TIMEOUT);
        let mut fresh = self.examine(found, &known, deadline).await?;
        self.registry_memory.compare(&mut fresh);
        if fresh.entries != known.entries || fresh.refused_changes != known.refused_changes {
            tracing::info!("the registry of wrapping keys changed");
            self.use_registry(fresh);
        }
        Ok(())
    }

    /// Examines the rows of the registry. `known` is the registry that was examined before.
    async fn examine(
        &self,
        rows: Vec<RegistryRow>,
        known: &Registry,
        deadline: Deadline,
    ) -> Result<Registry, Error> {
        let places = self.store.places().await?;
        let state = self.token.state();
        let mut fresh = Registry::default();
        for row in rows {
            let entry = match known.entry(row.id) {
                Some(before) if before.row != row => {
                    let successor = if row.state == WrappingKeyState::Destroyed {
                        self.destroyed_row(before, row, known, deadline).await?
                    } else {
                        self.successor(before, row, &state, deadline).await?
                    };
                    match successor {
                        Ok(entry) => entry,
                        Err(why) => {
                            fresh.refused_changes.push(why);
                            self.again(before, &state, deadline).await?
                        }
                    }
                }
                Some(before) => self.again(before, &state, deadline).await?,
                None => Entry {
                    standing: self.standing(&row, &state, deadline).await?,
                    row,
                },
            };
            fresh.entries.push(entry);
        }
        for before in &known.entries {
            if !fresh.knows(before.row.id) && before.standing != Standing::Unproved {
                let deleted = RefusedChange::Deleted(before.row.id);
                fresh.refused_changes.push(deleted);
                fresh
                    .entries
                    .push(self.again(before, &state, deadline).await?);
            }
        }
        self.check_tombstones(&mut fresh, known, deadline).await?;
        let mut rows: Vec<RegistryRow> = fresh
            .entries
            .iter()
            .map(|entry| entry.row.clone())
            .collect();
        if let Some(awaited) = self.key_changes.awaited()
            && !fresh.knows(awaited.id)
        {
            rows.push(awaited);
        }
        self.token.expect_keys(self.expect.of(rows, places));
        Ok(fresh)
    }

    /// Verifies the new rows of destroyed keys, which the integrity key of any other key authenticates. Without this check, a
    /// person who can write to the database could mark a key as destroyed that is only missing.
    async fn check_tombstones(
        &self,
        fresh: &mut Registry,
        known: &Registry,
        deadline: Deadline,
    ) -> Result<(), Error> {
        let signers: Vec<WrappingKeyId> = fresh
            .entries
            .iter()
            .rev()
            .filter(|entry| entry.standing == Standing::Verified && !entry.is_tombstone())
            .map(|entry| entry.row.id)
            .collect();
        for entry in &mut fresh.entries {
            let is_new = known.entry(entry.row.id) != Some(&*entry);
            if entry.is_tombstone()
                && entry.standing == Standing::Verified
                && is_new
                && !self.is_authentic(&entry.row, &signers, deadline).await?
            {
                entry.standing = altered(
                    &entry.row,
                    "the key is marked as destroyed, but no key authenticates that",
                );
            }
        }
        Ok(())
    }

    pub(super) async fn is_authentic(
        &self,
        tombstone: &RegistryRow,
        signers: &[WrappingKeyId],
        deadline: Deadline,
    ) -> Result<bool, Error> {
        let message = tombstone.tombstone_message();
        for signer in signers {
            let caller = hsm::Caller::background(deadline);
            let job = self
                .token
                .verify_mac(*signer, &message, &tombstone.mac, &caller);
            match job.await {
                Ok(()) => return Ok(true),
                Err(hsm::Error::MacRefused | hsm::Error::KeyMissing { .. }) => {}
                Err(other) => return Err(other.into()),
            }
        }
        Ok(false)
    }

    /// Examines an unchanged row. A row that the token has verified is not verified again while the token has its key.
    async fn again(
        &self,
        before: &Entry,
        state: &TokenState,
        deadline: Deadline,
    ) -> Result<Entry, Error> {
        let is_verified = before.standing == Standing::Verified;
        let standing = match compare(&before.row, state) {
            None if is_verified => Standing::Verified,
            // A worker that is being replaced may not have the keys that were registered last.
            Some(Standing::Unproved) if is_verified => Standing::Verified,
            _ => self.standing(&before.row, state, deadline).await?,
        };
        Ok(Entry {
            row: before.row.clone(),
            standing,
        })
    }

    /// Examines a changed row. Returns the reason why the row before it stays in use, if the new row does not verify.
    async fn successor(
        &self,
        before: &Entry,
        row: RegistryRow,
        state: &TokenState,
        deadline: Deadline,
    ) -> Result<Result<Entry, RefusedChange>, Error> {
        let was_verified = before.standing == Standing::Verified;
        if was_verified && let Err(why) = check_successor(&before.row, &row) {
            return Ok(Err(why));
        }
        let standing = self.standing(&row, state, deadline).await?;
        if !was_verified || standing == Standing::Verified {
            return Ok(Ok(Entry { row, standing }));
        }
        Ok(Err(match standing {
            Standing::Missing(why) | Standing::Untrusted(why) | Standing::Altered(why) => {
                RefusedChange::Standing(why)
            }
            Standing::Unproved | Standing::Verified => RefusedChange::Unverified(row.id),
        }))
    }

    /// Examines a row: compares it with the token, then verifies its MAC.
    async fn standing(
        &self,
        row: &RegistryRow,
        state: &TokenState,
        deadline: Deadline,
    ) -> Result<Standing, Error> {
        if let Some(standing) = compare(row, state) {
            return Ok(standing);
        }
        if token_key(&state.keys, row.id).is_none() {
            // Only the row of a destroyed key needs no key on the token.
            return Ok(Standing::Verified);
        }
        let caller = hsm::Caller::background(deadline);
        let message = row.mac_message();
        let job = self.token.verify_mac(row.id, &message, &row.mac, &caller);
        match job.await {
            Ok(()) => Ok(Standing::Verified),
            Err(hsm::Error::MacRefused) => {
                Ok(altered(row, "its MAC does not verify: the row was altered"))
            }
            Err(hsm::Error::KeyMissing { cause, .. }) => Ok(Standing::Missing(cause)),
            Err(other) => Err(other.into()),
        }
    }

    /// Puts an examined registry into use, and raises alerts about new problems.
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
                    "rows of the wrapping-key registry do not verify; a row that was verified before stays in use, and a key \
                     without a verified row is refused"
                );
            }
            if told.lost != lost && !lost.is_empty() {
                keybroker_core::alert!(
                    WrappingKey, cause = %lost,
                    "registered wrapping keys cannot be used; user keys under these wrapping keys are not released, and the \
                     other wrapping keys are used"
                );
            }
            told.altered = altered;
            told.lost = lost;
        }
        self.registry.store(Some(Arc::new(registry)));
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

    /// Whether a registered key waits for its check by the workers.
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

    /// Asks the registry about a key for a call. If the key was registered a moment ago, waits until the workers have
    /// checked it, because the call may come from a client of another broker that already uses the key.
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

    /// Checks that a wrapping key may be used in this way. A key that is not known is looked up in the database, because
    /// another broker may have registered it after this broker last read the registry.
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

/// Compares a row with the keys that the workers found. Returns `None` if the row matches and its MAC can be verified.
fn compare(row: &RegistryRow, state: &TokenState) -> Option<Standing> {
    let Some(key) = token_key(&state.keys, row.id) else {
        if row.state == WrappingKeyState::Destroyed {
            // The integrity key of a destroyed wrapping key is destroyed too, so nothing can verify the row, and a
            // destroyed key is never used.
            return None;
        }
        let unusable = state.unusable.iter().find(|key| key.id == row.id);
        return Some(match unusable.map(|key| &key.problem) {
            Some(KeyProblem::Missing(cause)) => Standing::Missing(cause.clone()),
            Some(KeyProblem::Untrusted(cause)) => Standing::Untrusted(cause.clone()),
            // With several tokens, the token with the key may be absent for long, so no call waits for it.
            None if !state.tokens.is_empty() => {
                Standing::Missing("no token has shown the key yet".to_owned())
            }
            None => Standing::Unproved,
        });
    };
    let serial = state.info.as_ref().map_or("", |info| info.serial.as_str());
    // Of several tokens, each compares the serial number when its workers start.
    if state.tokens.is_empty() && serial != hsm::unpadded(&row.token_serial) {
        return Some(altered(
            row,
            &format!(
                "registered for the token with serial {:?}, but this token has serial {serial:?}",
                row.token_serial
            ),
        ));
    }
    if key.fingerprint != row.fingerprint {
        return Some(altered(
            row,
            &format!(
                "the public key is {} on the token, but {} in the registry",
                key.fingerprint, row.fingerprint
            ),
        ));
    }
    None
}

fn altered(row: &RegistryRow, what: &str) -> Standing {
    Standing::Altered(format!("registry row of wrapping key {}: {what}", row.id))
}

/// Rejects a row of the registry that replaces a newer row of its key. The MAC of an older row is valid too, so the MAC
/// alone would allow an attacker to restore a former state of the key.
fn check_successor(before: &RegistryRow, after: &RegistryRow) -> Result<(), RefusedChange> {
    let went_back = after.sequence < before.sequence;
    let without_a_number = after.sequence == before.sequence && after.state != before.state;
    if !went_back && !without_a_number {
        return Ok(());
    }
    Err(RefusedChange::SetBack {
        id: after.id,
        row: (after.sequence, after.state),
        verified: (before.sequence, before.state),
    })
}

pub(super) fn token_key(keys: &[TokenKey], id: WrappingKeyId) -> Option<&TokenKey> {
    keys.iter().find(|key| key.id == id)
}
