//! Finds the copies of a wrapping key on the configured tokens, so that another token can do the work of a token that fails.
//!
//! An administrator copies a key to further tokens with the vendor's tool. On each token, an admin worker proves that the copy is the
//! registered key: the public keys must be equal, the checks of a new key must pass, and the integrity key of the copy must verify
//! the MAC of the registry row. Then the token workers prove the same, and only then the copy is registered.
//!
//! Mitigation: M11 of `THREAT_MODEL.md`.

use std::time::Duration;

use futures_util::future::join_all;

use keybroker_core::{
    call::{Deadline, Timestamp},
    error::{Error, Reason},
    key::{WrappingKeyId, WrappingKeyState},
};
use keybroker_hsm as hsm;
use keybroker_hsm::{
    Serving, TokenState,
    admin::{AdminError, KeyAdmin},
};
use keybroker_store::{PlaceChange, PlaceRow, RegistryChange, RegistryRow, RegistryUpdate};

use crate::{Broker, registry::Registry};

use super::{
    MAC_TIMEOUT, Planner,
    making::{Awaited, blocking_on, refuses},
};

/// Longest time for the workers to check the copies of a key.
const COPY_TIMEOUT: Duration = Duration::from_mins(1);

/// What the search for a copy found on one token.
#[derive(Debug)]
enum Found {
    /// The token has the key. The row is complete except for its MAC.
    Copy(PlaceRow),
    /// The token has no key with this `CKA_ID`.
    Absent,
    /// The token has another key under the same `CKA_ID`, or a key that must not be used.
    Differs(String),
    /// The token is not a token of the previous key, so it needs no copy.
    NotNeeded,
}

/// A token without a usable copy, and the reason as the end of a sentence.
#[derive(Debug)]
struct Lacking {
    token: String,
    why: String,
}

/// The copies that were found and that the workers have proved.
#[derive(Debug, Default)]
pub(super) struct Copies(Vec<PlaceRow>);

/// The search for a copy of a key on one token.
#[derive(Clone, Debug)]
struct Search {
    key: RegistryRow,
    /// The key whose tokens need a copy; `None` if the token needs a copy in any case.
    previous: Option<RegistryRow>,
    serials: Vec<String>,
}

impl Search {
    fn run(&self, token: &KeyAdmin) -> Result<Found, AdminError> {
        let serials: Vec<&str> = self.serials.iter().map(String::as_str).collect();
        let admin = token.open_read_only(&serials)?;
        let serial = &admin.info().serial;
        let is_home = |row: &RegistryRow| hsm::unpadded(&row.token_serial) == serial;
        if self.previous.as_ref().is_some_and(|row| !is_home(row)) {
            return Ok(Found::NotNeeded);
        }
        let (id, row) = (self.key.id, &self.key);
        admin.know([(id, &row.objects)])?;
        if !admin.key_ids()?.contains(&row.private_object()) {
            return Ok(Found::Absent);
        }
        let checked = match admin.check(id) {
            Ok(checked) => checked,
            Err(AdminError::Untrusted(why)) => return Ok(Found::Differs(why)),
            Err(other) => return Err(other),
        };
        if checked.fingerprint != row.fingerprint {
            return Ok(Found::Differs(format!(
                "the token has another key under the same CKA_ID: its public key is {}, but the registered public key is {}",
                checked.fingerprint, row.fingerprint
            )));
        }
        if let Some(problem) = checked.problem {
            return Ok(Found::Differs(problem));
        }
        if !admin.verify(id, &row.mac_message(), &row.mac)? {
            return Ok(Found::Differs(
                "the integrity key of the copy does not verify the MAC of the registry row: the token has another integrity key \
                 under the same CKA_ID"
                    .to_owned(),
            ));
        }
        Ok(Found::Copy(PlaceRow {
            key: id,
            token: token.name().to_owned(),
            token_serial: serial.clone(),
            objects: checked.objects,
            registered: Timestamp::now(),
            backup_confirmed: None,
            mac: [0; 32],
        }))
    }
}

impl Broker {
    /// Returns the rows to add or to replace for these copies. `backup` is the time at which an administrator confirmed a backup of
    /// each token with the key; `None` if no administrator did. The broker signs no row that is not authentic: a person who can write to
    /// the database may have made it.
    pub(super) async fn place_changes(
        &self,
        copies: Copies,
        registry: &Registry,
        key: &RegistryRow,
        backup: Option<Timestamp>,
    ) -> Result<Vec<PlaceChange>, Error> {
        let mut changes: Vec<PlaceChange> = Vec::new();
        for place in copies.0 {
            let mut known = registry.places_of(key.id);
            let before = known.find(|known| known.token == place.token);
            // A backup of another device does not contain this copy.
            let same_device = before.filter(|before| before.token_serial == place.token_serial);
            let confirmed = match same_device {
                Some(before) if self.is_authentic(before).await? => before.backup_confirmed,
                _ => None,
            };
            changes.push(PlaceChange {
                expected: before.map(|before| before.mac),
                row: PlaceRow {
                    backup_confirmed: backup.or(confirmed),
                    ..place
                },
            });
        }
        if backup.is_none() {
            return Ok(changes);
        }
        for place in registry.places_of(key.id) {
            let is_changed = changes.iter().any(|one| one.row.token == place.token);
            if place.backup_confirmed.is_some() || is_changed {
                continue;
            }
            if !self.is_authentic(place).await? {
                let what = format!(
                    "the registry row that names token {} for key {} is not authentic: its MAC does not verify. Find out who changed \
                     the database, and restore the row from a backup of the database; nothing was changed",
                    place.token, key.id
                );
                return Err(refused(Reason::TokenUntrusted, &what));
            }
            changes.push(PlaceChange {
                expected: Some(place.mac),
                row: PlaceRow {
                    backup_confirmed: backup,
                    ..place.clone()
                },
            });
        }
        Ok(changes)
    }

    /// Whether the integrity key of a key made the MAC of a row that names a token of this key. Raises an alert if it did not.
    async fn is_authentic(&self, place: &PlaceRow) -> Result<bool, Error> {
        let caller = hsm::Caller::background(Deadline::after(MAC_TIMEOUT));
        let message = place.mac_message();
        let job = self
            .token
            .verify_mac(place.key, &message, &place.mac, &caller);
        match job.await {
            Ok(()) => Ok(true),
            Err(hsm::Error::MacRefused) => {
                keybroker_core::alert!(
                    Registry, wrapping_key = %place.key, token = %place.token,
                    "a row that names a token of a wrapping key is not authentic; the broker does not sign it again"
                );
                Ok(false)
            }
            Err(other) => Err(other.into()),
        }
    }

    /// Plans the registration of the copies of a key. The state of the key does not change.
    pub(super) async fn plan_copies(
        &self,
        registry: &Registry,
        id: WrappingKeyId,
    ) -> Result<RegistryChange, Error> {
        let row = registry.verified(id)?;
        if row.state == WrappingKeyState::Destroyed {
            return Err(refused(Reason::KeyState, &format!("key {id} is destroyed")));
        }
        let configured = self.configured.all();
        let state = self.token.state();
        let without = configured
            .iter()
            .filter(|token| !state.serves_on(token.name(), id));
        let searched: Vec<_> = without.map(|token| (token.clone(), None)).collect();
        if searched.is_empty() {
            let what =
                format!("every token of the configuration has key {id}, and this is registered");
            return Err(refused(Reason::KeyState, &what));
        }
        let (found, lacking) = self.search(registry, row, searched).await?;
        if found.is_empty() {
            let what = format!("no copy of key {id} was found: {}", listed(&lacking));
            return Err(refused(Reason::KeyState, &what));
        }
        let unproved = self.prove_copies(row, &found).await?;
        if !unproved.is_empty() {
            let what = format!(
                "the token workers cannot use the copy of key {id}: {}",
                listed(&unproved)
            );
            return Err(refused(Reason::KeyState, &what));
        }
        for Lacking { token, why } in lacking {
            tracing::warn!(wrapping_key = %id, token, why, "no copy of the wrapping key was registered for this token");
        }
        // The unchanged row makes the change fail if another change of the key was committed meanwhile.
        let unchanged = RegistryUpdate {
            row: row.clone(),
            expected: row.mac,
        };
        let mut planner = Planner::new(registry);
        planner.change.updates.push(unchanged);
        planner.change.places = self
            .place_changes(Copies(found), registry, row, None)
            .await?;
        self.with_macs(planner, id).await
    }

    /// Checks that each token that has the key in use also has the key that is to become active. Searches for copies that are not
    /// registered yet. If `single` is true, a missing copy is accepted.
    pub(super) async fn copies_for_activation(
        &self,
        registry: &Registry,
        row: &RegistryRow,
        single: bool,
    ) -> Result<Copies, Error> {
        let state = self.token.state();
        let Some(previous) = previous_of(registry, row) else {
            return Ok(Copies::default());
        };
        let searched = self.tokens_of(registry, previous, &state);
        let searched: Vec<_> = searched
            .into_iter()
            .filter(|(token, _)| !state.serves_on(token.name(), row.id))
            .collect();
        let (mut found, mut lacking) = self.search(registry, row, searched).await?;
        lacking.extend(self.unconfigured(registry, previous, row));
        let unproved = self.prove_copies(row, &found).await?;
        let state = self.token.state();
        if let Some(wrong) = unproved
            .iter()
            .find(|one| refuses(&state, &one.token, row.id))
        {
            return Err(wrong_copy(&wrong.token, row.id, &wrong.why));
        }
        found.retain(|place| !unproved.iter().any(|lacking| lacking.token == place.token));
        lacking.extend(unproved);
        if lacking.is_empty() || single {
            for Lacking { token, why } in lacking {
                tracing::warn!(
                    wrapping_key = %row.id, token, why,
                    "a wrapping key is activated although this token has no copy of it: calls for its user keys cannot fail over to \
                     this token"
                );
            }
            return Ok(Copies(found));
        }
        let what = format!(
            "key {} is not on every token that has the key in use: {}. Without a copy, no user key under this key can be released \
             while the other tokens are unavailable. Copy the key pair and its integrity key to each of these tokens with the vendor's \
             tool and repeat the command; or accept the missing copies with `--single`",
            row.id,
            listed(&lacking)
        );
        Err(refused(Reason::KeyState, &what))
    }

    /// Returns the tokens of the previous key that are not in the configuration of this broker and are not registered for the new key.
    /// Another broker on the same database may use them.
    fn unconfigured(
        &self,
        registry: &Registry,
        previous: &RegistryRow,
        key: &RegistryRow,
    ) -> Vec<Lacking> {
        let configured = self.configured.all();
        let is_known = |token: &str| {
            let mut of_key = registry.places_of(key.id);
            configured.iter().any(|one| one.name() == token)
                || of_key.any(|place| place.token == token)
        };
        let others = registry.places_of(previous.id);
        let others = others.filter(|place| !is_known(&place.token));
        let lacking = others.map(|place| Lacking {
            token: place.token.clone(),
            why: "the token is not in the configuration of this broker".to_owned(),
        });
        lacking.collect()
    }

    /// Warns if a token that serves the key in use does not serve a key that becomes active again. The copies of such a key are not
    /// required, because a return to an earlier key must be possible at once.
    pub(super) fn warn_of_missing_copies(&self, registry: &Registry, row: &RegistryRow) {
        let Some(previous) = previous_of(registry, row) else {
            return;
        };
        let state = self.token.state();
        let lacking = state.tokens.iter().filter(|token| {
            state.serves_on(&token.name, previous.id) && !state.serves_on(&token.name, row.id)
        });
        for token in lacking {
            tracing::warn!(
                wrapping_key = %row.id, token = token.name,
                "a wrapping key is activated again although this token does not serve it: calls for its user keys cannot fail over to \
                 this token"
            );
        }
    }

    /// Returns the configured tokens that have or may have a key. With a token that may have the key comes the row by which the search
    /// decides whether the token has it. The only token of a configuration needs no search.
    fn tokens_of(
        &self,
        registry: &Registry,
        key: &RegistryRow,
        state: &TokenState,
    ) -> Vec<(KeyAdmin, Option<RegistryRow>)> {
        let configured = self.configured.all();
        if configured.len() < 2 {
            return Vec::new();
        }
        let home = hsm::unpadded(&key.token_serial);
        let of_token = |token: &KeyAdmin| {
            let is_named = registry
                .places_of(key.id)
                .any(|place| place.token == token.name());
            if is_named || state.serves_on(token.name(), key.id) {
                return Some((token.clone(), None));
            }
            // Only a row with the name of the copy shows that a declared copy has a key.
            if token.is_copy() {
                return None;
            }
            let mut known = state.tokens.iter().filter_map(|one| {
                let info = one.info.as_ref().filter(|_| one.name == token.name())?;
                Some(info.serial == home)
            });
            match known.next() {
                Some(is_home) => is_home.then(|| (token.clone(), None)),
                None => Some((token.clone(), Some(key.clone()))),
            }
        };
        configured.iter().filter_map(of_token).collect()
    }

    /// Searches tokens for a copy of a key, all at the same time. An error means that a token has another key in place of the copy.
    async fn search(
        &self,
        registry: &Registry,
        key: &RegistryRow,
        tokens: Vec<(KeyAdmin, Option<RegistryRow>)>,
    ) -> Result<(Vec<PlaceRow>, Vec<Lacking>), Error> {
        let searches = tokens.into_iter().map(async |(token, previous)| {
            let search = Search {
                key: key.clone(),
                previous,
                serials: serials_on(registry, token.name()),
            };
            let name = token.name().to_owned();
            let run = move |token: &KeyAdmin| search.run(token);
            let found = blocking_on(token, "searching for a copy of a wrapping key", run).await;
            (name, found)
        });
        let (mut copies, mut lacking) = (Vec::new(), Vec::new());
        for (token, found) in join_all(searches).await {
            let why = match found {
                Ok(Found::Copy(place)) => {
                    copies.push(place);
                    continue;
                }
                Ok(Found::NotNeeded) => continue,
                Ok(Found::Absent) => "the token does not have the key".to_owned(),
                Ok(Found::Differs(why)) => {
                    return Err(wrong_copy(&token, key.id, &why));
                }
                Err(error) => format!("the token could not be searched ({})", error.detail()),
            };
            lacking.push(Lacking { token, why });
        }
        Ok((copies, lacking))
    }

    /// Waits until the workers of each token have proved the copy on their token. Returns the tokens whose workers did not.
    async fn prove_copies(
        &self,
        key: &RegistryRow,
        copies: &[PlaceRow],
    ) -> Result<Vec<Lacking>, Error> {
        if copies.is_empty() {
            return Ok(Vec::new());
        }
        let mut places = copies.to_vec();
        for place in &mut places {
            place.mac = self.mac_of_place(place).await?;
        }
        let tokens: Vec<String> = copies.iter().map(|place| place.token.clone()).collect();
        let unproved = self
            .await_workers(
                Awaited {
                    row: key.clone(),
                    places,
                },
                &tokens,
                COPY_TIMEOUT,
            )
            .await?;
        let state = self.token.state();
        let lacking = unproved.into_iter().map(|token| {
            let why = why_unproved(&state, &token, key.id);
            Lacking { token, why }
        });
        Ok(lacking.collect())
    }
}

/// The key that another key replaces: the key in use or, if no key can be used now, the key that was activated last.
fn previous_of<'a>(registry: &'a Registry, row: &RegistryRow) -> Option<&'a RegistryRow> {
    let in_use = registry.wrapping_key().ok().and_then(|id| registry.row(id));
    let active = || {
        let rows = registry.rows().map(|(row, _)| row);
        rows.filter(|row| row.state.may_wrap())
            .max_by_key(|row| row.sequence)
    };
    in_use
        .or_else(active)
        .filter(|previous| previous.id != row.id)
}

/// The error for a copy that must not be used. No option accepts such a copy.
fn wrong_copy(token: &str, key: WrappingKeyId, why: &str) -> Error {
    let what = format!(
        "token {token}: the copy of key {key} must not be used: {why}. Nothing was changed. Remove these objects from token {token} with \
         the vendor's tool, and copy the key again"
    );
    refused(Reason::TokenUntrusted, &what)
}

/// The serial numbers by which a token is chosen if several tokens match its settings.
pub(super) fn serials_on(registry: &Registry, token: &str) -> Vec<String> {
    let places = registry.places().filter(|place| place.token == token);
    let named: Vec<String> = places.map(|place| place.token_serial.clone()).collect();
    if named.is_empty() {
        let serials = registry.serials().into_iter();
        return serials.map(str::to_owned).collect();
    }
    named
}

fn why_unproved(state: &TokenState, token: &str, key: WrappingKeyId) -> String {
    let Some(state) = state.tokens.iter().find(|one| one.name == token) else {
        return "no worker of the token was started".to_owned();
    };
    match &state.serving {
        Serving::Down(cause) => format!("the token is unavailable: {cause}"),
        Serving::Untrusted(cause) => format!("the token is not trusted: {cause}"),
        Serving::Up => {
            let unusable = state.unusable.iter().find(|unusable| unusable.id == key);
            unusable.map_or_else(
                || "the workers of the token did not check the key in time".to_owned(),
                |unusable| unusable.problem.cause().to_owned(),
            )
        }
    }
}

fn listed(lacking: &[Lacking]) -> String {
    let each = lacking
        .iter()
        .map(|Lacking { token, why }| format!("token {token}: {why}"));
    each.collect::<Vec<_>>().join("; ")
}

fn refused(reason: Reason, what: &str) -> Error {
    Error::new(reason, what.to_owned()).explained("id", what)
}
