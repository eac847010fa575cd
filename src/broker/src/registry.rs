//! The registry of wrapping keys. The token verifies each row before the broker uses it.
//!
//! Mitigation: M11 of `THREAT_MODEL.md`.

use std::{sync::Arc, time::Duration};

use keybroker_core::{
    call::Deadline,
    error::{Error, Reason},
    key::{Purpose, WrappingKeyId, WrappingKeyState},
};
use keybroker_hsm as hsm;
use keybroker_hsm::{Serving, TokenKey, TokenState};
use keybroker_store::RegistryRow;

use super::{Broker, START_RETRY};

/// Time limit for the verification of a few rows with the token, which happens once a second.
const REFRESH_TIMEOUT: Duration = Duration::from_secs(2);

/// The verified rows of the registry.
#[derive(Debug)]
pub(super) struct Registry {
    rows: Vec<RegistryRow>,
    /// Keys that the workers of this broker have not checked on a token: keys that were registered after this broker
    /// started, and keys of a token that is absent while other tokens serve.
    unproved: Vec<RegistryRow>,
}

impl Registry {
    /// Returns the wrapping key for new envelopes: the active wrapping key that was activated last.
    pub(super) fn wrapping_key(&self) -> Result<WrappingKeyId, Error> {
        self.rows
            .iter()
            .filter(|row| row.state.may_wrap() && row.purpose == Purpose::Plain)
            .max_by_key(|row| row.sequence)
            .map(|row| row.id)
            .ok_or_else(|| Error::new(Reason::KeyState, "no wrapping key is active"))
    }

    /// Returns the wrapping key whose integrity key authenticates request ids: the active wrapping key or, if no
    /// wrapping key is active, the newest wrapping key that may still unwrap.
    pub(super) fn integrity_key(&self) -> Result<WrappingKeyId, Error> {
        self.rows
            .iter()
            .filter(|row| row.state.may_unwrap())
            .max_by_key(|row| (row.state.may_wrap(), row.sequence))
            .map(|row| row.id)
            .ok_or_else(|| Error::new(Reason::KeyState, "no wrapping key may be used"))
    }

    /// Checks that envelopes under this wrapping key may be unwrapped, and may get a new MAC.
    pub(super) fn check_readable(&self, id: WrappingKeyId) -> Result<(), Error> {
        if self.unproved.iter().any(|row| row.id == id) {
            let detail = format!(
                "wrapping key {id} was registered after this broker started, or no token has shown it yet; if it was \
                 registered, restart the brokers one after another"
            );
            return Err(Error::new(Reason::TokenDown, detail).retry_after(START_RETRY));
        }
        let row = self.row(id).ok_or_else(|| {
            let detail = format!("wrapping key {id} of the envelope is not registered");
            Error::new(Reason::RecordDamaged, detail)
        })?;
        if row.state.may_unwrap() {
            Ok(())
        } else {
            let detail = format!("wrapping key {id} is {}", row.state.as_str());
            Err(Error::new(Reason::KeyState, detail))
        }
    }

    fn is_made_of(&self, rows: &[RegistryRow]) -> bool {
        let mine = self.rows.len() + self.unproved.len();
        let is_mine = |row| {
            self.rows
                .iter()
                .chain(&self.unproved)
                .any(|known| known == row)
        };
        mine == rows.len() && rows.iter().all(is_mine)
    }

    /// Whether the wrapping key is registered, even if it is not verified yet.
    pub(super) fn knows(&self, id: WrappingKeyId) -> bool {
        self.rows
            .iter()
            .chain(&self.unproved)
            .any(|row| row.id == id)
    }

    fn row(&self, id: WrappingKeyId) -> Option<&RegistryRow> {
        self.rows.iter().find(|row| row.id == id)
    }

    pub(super) fn rows(&self) -> &[RegistryRow] {
        &self.rows
    }
}

impl Broker {
    /// Reads the registry and verifies it against the token: the MAC of every row, the serial number of the token, and
    /// the fingerprint of every key. A difference between the registry and the token is reported and never repaired.
    /// Until this function succeeds, the broker wraps and unwraps nothing.
    pub async fn load_registry(&self, deadline: Deadline) -> Result<(), Error> {
        let rows = self.store.registry().await?;
        let state = self.token.state();
        let (mut checked, mut unproved) = (Vec::new(), Vec::new());
        for row in rows {
            if is_awaited(&row, &state) {
                unproved.push(row);
            } else {
                self.check_row(&row, &state, deadline).await?;
                checked.push(row);
            }
        }
        if checked.is_empty() && unproved.is_empty() {
            tracing::warn!("no wrapping key is registered; run `keybroker key generate`");
        }
        for row in checked.iter().filter(|row| row.backup_confirmed.is_none()) {
            tracing::warn!(
                wrapping_key = %row.id,
                "no backup of the token is confirmed for this wrapping key: if the token is lost, every user key that is \
                 wrapped under this wrapping key is lost; back the token up, test the restore, then run `keybroker token \
                 backup-confirmed`"
            );
        }
        self.registry.store(Some(Arc::new(Registry {
            rows: checked,
            unproved,
        })));
        Ok(())
    }

    /// Loads the changes that another process made to the registry, after the token has verified them. A row that does
    /// not verify, or that would undo a later change, is an error. After an error, the registry that was verified last
    /// stays in use.
    pub(super) async fn refresh_registry(&self) -> Result<(), Error> {
        // Refreshes run one at a time, so that older rows never replace newer ones.
        let _turn = self.registry_refresh.lock().await;
        let Some(known) = self.registry.load_full() else {
            return Ok(());
        };
        let found = self.store.registry().await?;
        let state = self.token.state();
        let is_shown = |row: &RegistryRow| token_key(&state.keys, row.id).is_some();
        if known.is_made_of(&found) && !known.unproved.iter().any(is_shown) {
            return Ok(());
        }
        let deadline = Deadline::after(REFRESH_TIMEOUT);
        let (mut rows, mut unproved) = (Vec::new(), Vec::new());
        let mut kept = 0;
        for row in found {
            kept += usize::from(known.row(row.id).is_some());
            match known.row(row.id) {
                Some(before) if *before == row => rows.push(row),
                Some(before) => {
                    check_successor(before, &row)?;
                    self.check_row(&row, &state, deadline).await?;
                    rows.push(row);
                }
                // One of several tokens that was absent shows the key now.
                None if is_shown(&row) => {
                    self.check_row(&row, &state, deadline).await?;
                    rows.push(row);
                }
                None => unproved.push(row),
            }
        }
        if kept != known.rows.len() {
            let detail = "a row of the registry was deleted";
            return Err(Error::new(Reason::TokenUntrusted, detail));
        }
        for row in unproved.iter().filter(|row| !known.unproved.contains(row)) {
            tracing::warn!(
                wrapping_key = %row.id,
                "a wrapping key was registered; restart this broker to use it"
            );
        }
        tracing::info!("loaded the changes that another process made to the registry");
        self.registry
            .store(Some(Arc::new(Registry { rows, unproved })));
        Ok(())
    }

    async fn check_row(
        &self,
        row: &RegistryRow,
        state: &TokenState,
        deadline: Deadline,
    ) -> Result<(), Error> {
        let found = token_key(&state.keys, row.id);
        if row.state == WrappingKeyState::Destroyed && found.is_none() {
            // The integrity key of a destroyed wrapping key is destroyed too, so nothing can verify the row, and a
            // destroyed key is never used. If a row becomes `destroyed` while the broker runs, the row is verified like any
            // other row, because the workers still have the key. After the next start, the row has the effect of a deleted
            // row: records under the key are refused.
            return Ok(());
        }
        let untrusted = |what: String| {
            let detail = format!("registry row of wrapping key {}: {what}", row.id);
            Error::new(Reason::TokenUntrusted, detail)
        };
        let serial = state.info.as_ref().map_or("", |info| info.serial.as_str());
        // Of several tokens, each compares the serial number when its workers start.
        if state.tokens.is_empty() && serial != hsm::unpadded(&row.token_serial) {
            return Err(untrusted(format!(
                "registered for the token with serial {:?}, but this token has serial {serial:?}",
                row.token_serial
            )));
        }
        let key = found.ok_or_else(|| untrusted("the key is not on the token".to_owned()))?;
        if key.fingerprint != row.fingerprint {
            return Err(untrusted(format!(
                "the public key is {} on the token, but {} in the registry",
                key.fingerprint, row.fingerprint
            )));
        }
        let message = row.mac_message();
        match self
            .token
            .verify_mac(
                row.id,
                &message,
                &row.mac,
                &hsm::Caller::background(deadline),
            )
            .await
        {
            Ok(()) => Ok(()),
            Err(hsm::Error::MacRefused) => Err(untrusted(
                "its MAC does not verify: the row was altered".to_owned(),
            )),
            Err(other) => Err(other.into()),
        }
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
}

/// Whether one of several tokens must still show a key. The other keys are used meanwhile.
fn is_awaited(row: &RegistryRow, state: &TokenState) -> bool {
    !state.tokens.is_empty()
        && row.state != WrappingKeyState::Destroyed
        && token_key(&state.keys, row.id).is_none()
}

/// Rejects a row of the registry that replaces a newer row of its key. The MAC of an older row is valid too, so the MAC
/// alone would allow an attacker to restore a former state of the key.
fn check_successor(before: &RegistryRow, after: &RegistryRow) -> Result<(), Error> {
    let went_back = after.sequence < before.sequence;
    let without_a_number = after.sequence == before.sequence && after.state != before.state;
    if !went_back && !without_a_number {
        return Ok(());
    }
    let detail = format!(
        "registry row of wrapping key {}: the row has number {} ({}), but the last verified row had number {} ({})",
        after.id,
        after.sequence,
        after.state.as_str(),
        before.sequence,
        before.state.as_str()
    );
    Err(Error::new(Reason::TokenUntrusted, detail))
}

pub(super) fn token_key(keys: &[TokenKey], id: WrappingKeyId) -> Option<&TokenKey> {
    keys.iter().find(|key| key.id == id)
}
