//! The examination of the rows: each row is compared with the token, and the token verifies its MAC.

use futures_util::future::join_all;

use keybroker_core::{
    call::Deadline,
    error::Error,
    key::{KeyUse, WrappingKeyId, WrappingKeyState},
};
use keybroker_hsm as hsm;
use keybroker_hsm::{KeyProblem, TokenState};
use keybroker_store::{PlaceRow, RegistryRow};

use crate::Broker;

use super::{
    REFRESH_TIMEOUT, Registry,
    entry::{Entry, RefusedChange, Standing},
    token_key,
};

/// What the tokens show, and the rows that name the tokens of keys.
#[derive(Clone, Copy)]
struct Shown<'a> {
    state: &'a TokenState,
    places: &'a [PlaceRow],
}

impl<'a> Shown<'a> {
    /// The serial number of the token on which a key is registered, if there is only one token. A row with the name of this token is
    /// relevant if other tokens were removed from the configuration.
    fn serial(self, row: &'a RegistryRow) -> &'a str {
        let mut named = self.places.iter();
        let named = named.find(|place| place.key == row.id && place.token == self.state.name);
        named.map_or(&row.token_serial, |place| &place.token_serial)
    }
}

/// The keys whose integrity keys may authenticate the rows of destroyed keys.
#[derive(Debug)]
struct Signers {
    ids: Vec<WrappingKeyId>,
    /// The reason why a row may be authentic although no key in `ids` authenticates it: another key cannot be used at
    /// present.
    undecided: Option<String>,
}

impl Signers {
    /// A suspended or compromised key must not authenticate the row of a destroyed key, because its integrity key may
    /// be known to others.
    fn of<'a>(examined: impl Iterator<Item = &'a Entry> + Clone) -> Self {
        let keys = examined.filter(|entry| !entry.is_tombstone());
        let able = keys.clone().filter(|entry| {
            entry.standing == Standing::Verified && entry.row.state.allows(KeyUse::VerifyMac)
        });
        let ids: Vec<WrappingKeyId> = able.map(|entry| entry.row.id).collect();
        let waiting = keys.clone().find(|entry| {
            matches!(
                entry.standing,
                Standing::Unproved | Standing::Missing(_) | Standing::Unverified(_)
            )
        });
        let waiting = waiting.map(|entry| {
            format!(
                "wrapping key {}, which may authenticate the row, cannot be used now",
                entry.row.id
            )
        });
        let none =
            || "none of the wrapping keys that may authenticate the row can be used".to_owned();
        let undecided = waiting.or_else(|| ids.is_empty().then(none));
        Self { ids, undecided }
    }
}

impl Broker {
    /// Examines the rows of the registry. `known` is the registry that was examined before. A row that no token can verify
    /// now does not delay the changes of the other rows.
    pub(super) async fn examine(
        &self,
        rows: Vec<RegistryRow>,
        known: &Registry,
        deadline: Deadline,
    ) -> Result<Registry, Error> {
        let mut fresh = Registry {
            sealed_only: self.sealed_only,
            ..Registry::default()
        };
        let (places, unreadable) = self.store.readable_places().await?;
        fresh.places = places;
        let refused = unreadable.into_iter().map(RefusedChange::UnreadablePlace);
        fresh.refused_changes.extend(refused);
        let (state, places) = (self.token.state(), fresh.places.clone());
        let state = Shown {
            state: &state,
            places: &places,
        };
        // The rows are examined concurrently, because all rows share the deadline, and a token that does not answer
        // must not delay the rows of another token.
        let examined = rows.iter().map(async |row| match known.entry(row.id) {
            before if is_unverified_tombstone(row, before) => None,
            before => Some(
                self.examine_row(row.clone(), before, known, state, deadline)
                    .await,
            ),
        });
        let mut examined = join_all(examined).await;
        // A row that was put back must not authenticate the row of a destroyed key.
        for (entry, _) in examined.iter_mut().flatten() {
            self.registry_memory.compare_entry(entry);
        }
        let signers = Signers::of(examined.iter().flatten().map(|(entry, _)| entry));
        let checked = rows.into_iter().zip(examined).map(async |(row, examined)| {
            if let Some(examined) = examined {
                return examined;
            }
            let before = known.entry(row.id);
            self.examine_tombstone(row, before, &signers, state).await
        });
        for (entry, refused) in join_all(checked).await {
            fresh.entries.push(entry);
            fresh.refused_changes.extend(refused);
        }
        for before in &known.entries {
            if !fresh.knows(before.row.id) && before.standing != Standing::Unproved {
                let deleted = RefusedChange::Deleted(before.row.id);
                fresh.refused_changes.push(deleted);
                let kept = self.again(before, state, deadline).await;
                fresh.entries.push(kept);
            }
        }
        self.registry_memory.compare(&mut fresh);
        let mut rows: Vec<RegistryRow> = fresh.entries.iter().map(Entry::searched_row).collect();
        let mut places = fresh.places.clone();
        if let Some(awaited) = self.key_changes.awaited() {
            awaited.add_to(&mut rows, &mut places);
        }
        self.token.expect_keys(self.expect.of(rows, places));
        Ok(fresh)
    }

    /// Examines one row. If its change is refused, the previous row stays in use.
    async fn examine_row(
        &self,
        row: RegistryRow,
        before: Option<&Entry>,
        known: &Registry,
        state: Shown<'_>,
        deadline: Deadline,
    ) -> (Entry, Option<RefusedChange>) {
        match before {
            Some(before) if before.row != row => {
                match self.successor(before, row, state, deadline).await {
                    Ok(entry) => (entry, None),
                    Err(why) => (self.again(before, state, deadline).await, Some(why)),
                }
            }
            Some(before) => (self.again(before, state, deadline).await, None),
            None => {
                let standing = match self.standing(&row, state, deadline).await {
                    // The workers get the list with the new key after this examination.
                    Standing::Missing(_)
                        if !known.entries.is_empty() && is_unexamined(&row, state.state) =>
                    {
                        Standing::Unproved
                    }
                    standing => standing,
                };
                (Entry::first(row, standing), None)
            }
        }
    }

    /// Examines the row of a destroyed key that is not verified yet. The integrity key of another key must authenticate the
    /// row. Otherwise, a person who can write to the database could mark an existing key as destroyed. If the row is
    /// not authentic, a verified previous row stays in use.
    async fn examine_tombstone(
        &self,
        row: RegistryRow,
        before: Option<&Entry>,
        signers: &Signers,
        state: Shown<'_>,
    ) -> (Entry, Option<RefusedChange>) {
        let deadline = Deadline::after(REFRESH_TIMEOUT);
        let Some(before) = before else {
            let (standing, is_unremoved) = self.tombstone_standing(&row, signers, deadline).await;
            let entry = Entry::first(row, standing).with_removal(is_unremoved);
            return (entry, None);
        };
        let refused = if let Err(why) = before.floor.check(&row) {
            why
        } else {
            let (standing, is_unremoved) = self.tombstone_standing(&row, signers, deadline).await;
            if standing == Standing::Verified || before.standing != Standing::Verified {
                let entry = before.followed_by(row, standing);
                return (entry.with_removal(is_unremoved), None);
            }
            RefusedChange::of(row.id, standing)
        };
        (self.again(before, state, deadline).await, Some(refused))
    }

    /// Verifies the row of a destroyed key with the integrity keys of the keys that may verify rows. Also returns whether the MAC
    /// says that the objects of the key must still be removed from the tokens.
    async fn tombstone_standing(
        &self,
        tombstone: &RegistryRow,
        signers: &Signers,
        deadline: Deadline,
    ) -> (Standing, bool) {
        let caller = hsm::Caller::background(deadline);
        let mut unverified = signers.undecided.clone();
        for (message, is_unremoved) in [
            (tombstone.tombstone_message(), false),
            (tombstone.unremoved_message(), true),
        ] {
            let verified = signers.ids.iter().map(|signer| {
                self.token
                    .verify_mac(*signer, &message, &tombstone.mac, &caller)
            });
            for result in join_all(verified).await {
                match result {
                    Ok(()) => return (Standing::Verified, is_unremoved),
                    Err(hsm::Error::MacRefused | hsm::Error::KeyMissing { .. }) => {}
                    Err(other) => unverified = Some(other.to_string()),
                }
            }
        }
        let standing = match unverified {
            Some(cause) => Standing::Unverified(cause),
            None => altered(
                tombstone,
                "the key is marked as destroyed, but no integrity key authenticates this state. If no administrator recorded \
                 the loss of the key, restore the row from a backup of the database",
            ),
        };
        (standing, false)
    }

    /// Examines an unchanged row. A row that the token has verified is not verified again while the
    /// token has the key of the row.
    async fn again(&self, before: &Entry, state: Shown<'_>, deadline: Deadline) -> Entry {
        let is_verified = before.standing == Standing::Verified;
        let standing = match compare(&before.row, state) {
            None if is_verified => Standing::Verified,
            None if before.is_tombstone() => before.standing.clone(),
            // A worker that is being replaced may lack the newest keys.
            Some(Standing::Unproved) if is_verified => Standing::Verified,
            // The front also replaces workers when it searches for missing keys at regular
            // intervals.
            Some(Standing::Unproved) if matches!(before.standing, Standing::Missing(_)) => {
                before.standing.clone()
            }
            _ => self.standing(&before.row, state, deadline).await,
        };
        before.followed_by(before.row.clone(), standing)
    }

    /// Examines a changed row. If the verification of the new row fails, returns the reason why the previous row stays
    /// in use.
    async fn successor(
        &self,
        before: &Entry,
        row: RegistryRow,
        state: Shown<'_>,
        deadline: Deadline,
    ) -> Result<Entry, RefusedChange> {
        before.floor.check(&row)?;
        let standing = self.standing(&row, state, deadline).await;
        if before.standing != Standing::Verified || standing == Standing::Verified {
            return Ok(before.followed_by(row, standing));
        }
        Err(RefusedChange::of(row.id, standing))
    }

    /// Examines a row: compares it with the token, then verifies its MAC.
    async fn standing(&self, row: &RegistryRow, state: Shown<'_>, deadline: Deadline) -> Standing {
        if let Some(standing) = compare(row, state) {
            return standing;
        }
        let caller = hsm::Caller::background(deadline);
        let message = row.mac_message();
        let job = self.token.verify_mac(row.id, &message, &row.mac, &caller);
        match job.await {
            Ok(()) => Standing::Verified,
            Err(hsm::Error::MacRefused) => altered(
                row,
                "the MAC of the row does not verify: the row was altered",
            ),
            Err(hsm::Error::KeyMissing { cause, .. }) => Standing::Missing(cause),
            Err(other) => Standing::Unverified(other.to_string()),
        }
    }
}

/// Compares a row with the keys that the workers found. Returns `None` if the row matches and its MAC can be verified. The
/// row of a destroyed key matches even while a token still contains the key: another key
/// authenticates the row, and a destroyed key is never used.
fn compare(row: &RegistryRow, shown: Shown<'_>) -> Option<Standing> {
    let state = shown.state;
    if row.state == WrappingKeyState::Destroyed {
        return None;
    }
    let Some(key) = token_key(&state.keys, row.id) else {
        let unusable = state.unusable.iter().find(|key| key.id == row.id);
        return Some(match unusable.map(|key| &key.problem) {
            Some(KeyProblem::Missing(cause)) => Standing::Missing(cause.clone()),
            Some(KeyProblem::Untrusted(cause)) => Standing::Untrusted(cause.clone()),
            // With several tokens, the token with the key may be absent for a long time, so no call
            // waits for this token.
            None if !state.tokens.is_empty() && !state.is_checking_keys => {
                Standing::Missing("no token with the key has been found yet".to_owned())
            }
            None => Standing::Unproved,
        });
    };
    let serial = state.info.as_ref().map_or("", |info| info.serial.as_str());
    let registered = shown.serial(row);
    // With several tokens, the workers of each token compare the serial number when they start.
    if state.tokens.is_empty() && serial != hsm::unpadded(registered) {
        return Some(altered(
            row,
            &format!(
                "the key is registered for the token with serial {registered:?}, but this token has serial {serial:?}"
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

/// Whether the workers have searched for a key, and no token shows it.
pub(super) fn is_absent(id: WrappingKeyId, state: &TokenState) -> bool {
    if token_key(&state.keys, id).is_some() || state.is_checking_keys {
        return false;
    }
    let unusable = state.unusable.iter().find(|key| key.id == id);
    match unusable.map(|key| &key.problem) {
        Some(KeyProblem::Missing(_)) => true,
        Some(KeyProblem::Untrusted(_)) => false,
        // Of several tokens, only the token with the registered serial number is searched.
        None => !state.tokens.is_empty(),
    }
}

/// Whether the row marks a key as destroyed, and this state is not verified yet.
fn is_unverified_tombstone(row: &RegistryRow, before: Option<&Entry>) -> bool {
    let is_verified =
        before.is_some_and(|before| before.standing == Standing::Verified && before.row == *row);
    row.state == WrappingKeyState::Destroyed && !is_verified
}

/// Whether no token has reported a result for a key yet.
fn is_unexamined(row: &RegistryRow, state: &TokenState) -> bool {
    !state.tokens.is_empty() && !state.unusable.iter().any(|key| key.id == row.id)
}

pub(super) fn altered(row: &RegistryRow, what: &str) -> Standing {
    Standing::Altered(format!("registry row of wrapping key {}: {what}", row.id))
}
