//! Makes a wrapping key on the token in a short-lived admin worker.

use std::{sync::Arc, time::Duration};

use keybroker_core::{
    call::{Deadline, Timestamp},
    error::{Error, Reason},
    key::{Purpose, WrappingKeyId, WrappingKeyState},
};
use keybroker_hsm::admin::{Admin, AdminError, CheckedKey, KeyAdmin};
use keybroker_store::RegistryRow;

use crate::{Broker, TaskFailed, registry::token_key};

/// Longest time for the workers to check a new key.
const CHECK_TIMEOUT: Duration = Duration::from_mins(2);
const CHECK_PAUSE: Duration = Duration::from_millis(50);

/// A key that was just made, with the admin worker that made it. The key is not registered yet.
#[derive(Debug)]
pub(super) struct MadeKey {
    admin: Arc<Admin>,
    key: CheckedKey,
}

impl MadeKey {
    /// Makes a wrapping key and its integrity key, checks the attributes, and runs the self-test and the negative tests.
    pub(super) async fn make(
        admin: KeyAdmin,
        modulus_bits: u32,
        serials: Vec<String>,
    ) -> Result<Self, Error> {
        blocking("making a wrapping key", move || {
            let serials: Vec<&str> = serials.iter().map(String::as_str).collect();
            let admin = Arc::new(admin.open(&serials)?);
            let key = admin.generate_key(modulus_bits)?;
            tracing::info!(wrapping_key = %key.id, modulus_bits, "a wrapping key was made on the token");
            Ok(Self { admin, key })
        })
        .await
    }

    /// The id of the key.
    pub(super) fn id(&self) -> WrappingKeyId {
        self.key.id
    }

    /// Makes the registry row of the key, with a MAC that the integrity key of the key makes.
    pub(super) async fn row(
        &self,
        state: WrappingKeyState,
        sequence: u64,
    ) -> Result<RegistryRow, Error> {
        let mut row = RegistryRow {
            id: self.key.id,
            objects: self.key.objects.clone(),
            fingerprint: self.key.fingerprint,
            purpose: Purpose::Plain,
            state,
            token_serial: self.admin.info().serial.clone(),
            sequence,
            registered: Timestamp::now(),
            backup_confirmed: None,
            mac: [0; 32],
        };
        let admin = Arc::clone(&self.admin);
        blocking("computing the MAC of a registry row", move || {
            row.mac = admin.mac(row.id, &row.mac_message())?;
            Ok(row)
        })
        .await
    }

    /// Removes the key from the token, because it was not registered. A key that cannot be removed is reported, and an
    /// administrator can register or remove it.
    pub(super) async fn discard(self) {
        let id = self.key.id;
        let removed = blocking("removing a wrapping key", move || self.admin.remove_key(id));
        match removed.await {
            Ok(_) => {
                tracing::info!(wrapping_key = %id, "the new wrapping key was removed from the token");
            }
            Err(error) => {
                tracing::error!(
                    wrapping_key = %id, %error,
                    "a new wrapping key is on the token but not registered, and could not be removed; `keybroker \
                     token check` shows the key, and `keybroker key register` or `keybroker key remove` completes the \
                     change"
                );
            }
        }
    }

    /// Ends the admin worker on a blocking thread.
    pub(super) async fn close(self) {
        let ended = tokio::task::spawn_blocking(move || drop(self));
        if ended.await.is_err() {
            tracing::error!("the admin worker could not be ended");
        }
    }
}

impl Broker {
    /// Waits until the workers have checked a key that is not registered yet. Therefore the first call that uses the
    /// key does not wait.
    pub(super) async fn prove_new_key(&self, row: RegistryRow) -> Result<(), Error> {
        let id = row.id;
        *self.key_changes.lock_awaited() = Some(row);
        let until = Deadline::after(CHECK_TIMEOUT);
        loop {
            self.refresh_registry().await?;
            let state = self.token.state();
            if token_key(&state.keys, id).is_some() {
                return Ok(());
            }
            if until.remaining().is_zero() {
                let what =
                    "the token workers did not check the new key in time; the log shows the cause";
                return Err(Error::new(Reason::TokenDown, what).explained("token", what));
            }
            tokio::time::sleep(CHECK_PAUSE).await;
        }
    }

    /// Ends the check of a new key by the workers, after the key was registered or discarded.
    pub(super) fn forget_new_key(&self) {
        *self.key_changes.lock_awaited() = None;
    }
}

/// Runs work with an admin worker on a blocking thread.
pub(super) async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> Result<T, AdminError> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(from_admin),
        Err(source) => Err(TaskFailed::of(what, source)),
    }
}

/// Converts the error of an admin worker. The error tells the administrator the cause.
fn from_admin(error: AdminError) -> Error {
    let reason = match &error {
        AdminError::Token(_) | AdminError::NoToken(_) | AdminError::Start(_) => Reason::TokenDown,
        AdminError::Pin(_)
        | AdminError::Untrusted(_)
        | AdminError::PinSource(_)
        | AdminError::Environment(_)
        | AdminError::PublicKey(_) => Reason::TokenUntrusted,
    };
    let text = error.to_string();
    Error::caused(reason, error).explained("token", &text)
}
