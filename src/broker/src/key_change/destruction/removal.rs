//! Removes the objects of a destroyed key from every token.

use std::time::Duration;

use keybroker_audit::{Entry, EntryKind, Outcome};
use keybroker_core::{
    error::{Error, Reason},
    key::WrappingKeyState,
};
use keybroker_hsm as hsm;
use keybroker_hsm::{
    ExpectedKey,
    admin::{AdminError, KeyAdmin},
};
use keybroker_store::{DestructionRow, RegistryRow};

use crate::{Broker, registry::Registry};

use super::super::making::blocking;

impl Broker {
    /// Removes the objects from every token that may hold them, in a separate read-write worker for each token. The schedule stays
    /// until the last token is done, so the removal goes on after an interruption.
    pub(super) async fn remove_objects(
        &self,
        registry: &Registry,
        row: &DestructionRow,
    ) -> Result<(), Error> {
        if !self.hold_lease(row).await? {
            return Ok(());
        }
        let key = registry
            .row(row.key)
            .ok_or_else(|| Error::new(Reason::KeyNotFound, format!("wrapping key {}", row.key)))?;
        let (mut removed, mut tokens) = (0, 0);
        for (name, expected) in self.places_of(key).await? {
            let admins = &self.scheduled.rules.tokens;
            let Some((_, admin)) = admins.iter().find(|(known, _)| *known == name) else {
                continue;
            };
            let admin = admin.clone();
            let count = blocking("removing a wrapping key", move || remove(&admin, &expected));
            if let Some(count) = count.await? {
                tracing::info!(wrapping_key = %row.key, token = name, count, "the objects of a destroyed key were removed");
                tokens += 1;
                removed += u64::from(count);
            }
        }
        if tokens == 0 {
            let what = "the token of the key is not in the configuration of this broker";
            return Err(Error::new(Reason::TokenDown, what));
        }
        let mut entry = Entry::new(
            EntryKind::Decision,
            "wrapping_key.objects_removed",
            Outcome::Ok,
        );
        entry.wrapping_key = Some(row.key);
        entry.count = Some(removed);
        self.audit.append(entry).await?;
        if !self.store.end_destruction(row).await? {
            self.scheduled.delay(row.key, "", Duration::ZERO);
            return Ok(());
        }
        self.scheduled.forget(row.key);
        self.read_destructions().await
    }

    /// The tokens that may hold a key, by their configured names. A destroyed key is expected on no token, so the question is asked as
    /// if the key were not destroyed.
    async fn places_of(&self, key: &RegistryRow) -> Result<Vec<(String, ExpectedKey)>, Error> {
        let places = self.store.places().await?;
        let before = RegistryRow {
            state: WrappingKeyState::Deactivated,
            ..key.clone()
        };
        let tokens = self.expect.of(vec![before], places).into_iter();
        Ok(tokens
            .filter_map(|(name, mut keys)| Some((name, keys.pop()?)))
            .collect())
    }
}

/// Removes the objects of a key from one token. Returns the number of removed objects; `None` if the key is on another token.
fn remove(admin: &KeyAdmin, key: &ExpectedKey) -> Result<Option<u32>, AdminError> {
    let serial = hsm::unpadded(&key.token_serial);
    let token = admin.open(&[serial])?;
    let found = hsm::unpadded(&token.info().serial);
    if found != serial {
        if key.may_be_elsewhere {
            return Ok(None);
        }
        return Err(AdminError::Token(format!(
            "the objects of key {} are on the token with serial number {serial}, but the token has {found}",
            key.id
        )));
    }
    token.know([(key.id, &key.objects)])?;
    token.remove_key(key.id).map(Some)
}
