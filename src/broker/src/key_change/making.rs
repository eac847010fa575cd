//! Makes a wrapping key on the token in a short-lived admin worker.

use std::{sync::Arc, time::Duration};

use keybroker_core::{
    call::{Deadline, Timestamp},
    error::{Error, Reason},
    key::{Purpose, WrappingKeyId, WrappingKeyState},
};
use keybroker_hsm::{
    KeyProblem, TokenState,
    admin::{Admin, AdminError, CheckedKey, KeyAdmin},
};
use keybroker_store::{PlaceRow, RegistryRow};

use crate::{Broker, TaskFailed};

/// Longest time for the workers to check a new key.
const CHECK_TIMEOUT: Duration = Duration::from_mins(2);
const CHECK_PAUSE: Duration = Duration::from_millis(50);

/// A key that the workers must check, although the registry does not contain it or its copies yet.
#[derive(Clone, Debug)]
pub(crate) struct Awaited {
    /// The registry row of the key.
    pub(super) row: RegistryRow,
    /// The tokens on which the workers must find the key.
    pub(super) places: Vec<PlaceRow>,
}

impl Awaited {
    /// Adds the key and its tokens to the rows by which the workers search for keys.
    pub(crate) fn add_to(self, rows: &mut Vec<RegistryRow>, places: &mut Vec<PlaceRow>) {
        if !rows.iter().any(|row| row.id == self.row.id) {
            rows.push(self.row);
        }
        for place in self.places {
            places.retain(|known| known.key != place.key || known.token != place.token);
            places.push(place);
        }
    }
}

/// A key that was just made, with the admin worker that made it. The key is not registered yet.
#[derive(Debug)]
pub(super) struct MadeKey {
    admin: Arc<Admin>,
    key: CheckedKey,
    /// The configured name of the token.
    token: String,
}

impl MadeKey {
    /// Makes a wrapping key and its integrity key, checks the attributes, and runs the self-test and the negative tests.
    pub(super) async fn make(
        token: KeyAdmin,
        purpose: Purpose,
        modulus_bits: u32,
        serials: Vec<String>,
    ) -> Result<Self, Error> {
        blocking_on(token, "making a wrapping key", move |token| {
            let serials: Vec<&str> = serials.iter().map(String::as_str).collect();
            let admin = Arc::new(token.open(&serials)?);
            let key = admin.generate_key(purpose, modulus_bits)?;
            tracing::info!(
                wrapping_key = %key.id, token = token.name(), modulus_bits, purpose = purpose.as_str(),
                "a wrapping key was made on the token"
            );
            let token = token.name().to_owned();
            Ok(Self { admin, key, token })
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
            purpose: self.key.purpose,
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

    /// Makes the row that names the token of the key, with a MAC that the integrity key of the key makes.
    pub(super) async fn place(&self) -> Result<PlaceRow, Error> {
        let mut place = PlaceRow {
            key: self.key.id,
            token: self.token.clone(),
            token_serial: self.admin.info().serial.clone(),
            objects: self.key.objects.clone(),
            registered: Timestamp::now(),
            backup_confirmed: None,
            mac: [0; 32],
        };
        let admin = Arc::clone(&self.admin);
        blocking("computing the MAC of a registry row", move || {
            place.mac = admin.mac(place.key, &place.mac_message())?;
            Ok(place)
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

    /// Ends the admin worker. The key stays on the token.
    pub(super) async fn close(self) {
        end_worker(self.admin.pid(), self).await;
    }
}

impl Broker {
    /// Waits until the workers have checked a key that is not registered yet. Therefore the first call that uses the
    /// key does not wait. `place` names the token of the key; `None` if the configuration has one token.
    pub(super) async fn prove_new_key(
        &self,
        row: RegistryRow,
        place: Option<PlaceRow>,
    ) -> Result<(), Error> {
        let token = place.as_ref().map(|place| place.token.clone());
        // With one token, the state of the token has its name.
        let tokens = [token.unwrap_or_else(|| self.token.state().name)];
        let places = place.into_iter().collect();
        let unproved = self
            .await_workers(Awaited { row, places }, &tokens, CHECK_TIMEOUT)
            .await?;
        if unproved.is_empty() {
            return Ok(());
        }
        let what = "the token workers did not check the new key in time; the log shows the cause";
        Err(Error::new(Reason::TokenDown, what).explained("token", what))
    }

    /// Waits until the workers of each token have checked a key. Returns the tokens whose workers did not check it in time, or found
    /// that it must not be used. [`Broker::forget_new_key`] ends the check.
    pub(super) async fn await_workers(
        &self,
        awaited: Awaited,
        tokens: &[String],
        timeout: Duration,
    ) -> Result<Vec<String>, Error> {
        let id = awaited.row.id;
        *self.key_changes.lock_awaited() = Some(awaited);
        let until = Deadline::after(timeout);
        loop {
            self.refresh_registry().await?;
            let state = self.token.state();
            let mut left = tokens.to_vec();
            left.retain(|token| !state.serves_on(token, id));
            let is_refused = left.iter().any(|token| refuses(&state, token, id));
            if left.is_empty() || is_refused || until.remaining().is_zero() {
                return Ok(left);
            }
            tokio::time::sleep(CHECK_PAUSE).await;
        }
    }

    /// Ends the check of a new key by the workers, after the key was registered or discarded.
    pub(super) fn forget_new_key(&self) {
        *self.key_changes.lock_awaited() = None;
    }
}

/// Whether the workers of a token found that a key must not be used.
pub(super) fn refuses(state: &TokenState, token: &str, key: WrappingKeyId) -> bool {
    let mut of_token = state.tokens.iter().filter(|one| one.name == token);
    of_token.any(|one| {
        !one.is_checking_keys
            && one.unusable.iter().any(|unusable| {
                unusable.id == key && matches!(unusable.problem, KeyProblem::Untrusted(_))
            })
    })
}

/// Runs work with the admin worker of a token on a blocking thread. The text of an error names the token.
pub(super) async fn blocking_on<T: Send + 'static>(
    token: KeyAdmin,
    what: &'static str,
    work: impl FnOnce(&KeyAdmin) -> Result<T, AdminError> + Send + 'static,
) -> Result<T, Error> {
    let name = token.name().to_owned();
    match tokio::task::spawn_blocking(move || work(&token)).await {
        Ok(result) => result.map_err(|error| {
            let text = format!("token {name}: {error}");
            Error::caused(
                reason_of(&error),
                OnToken {
                    name,
                    source: error,
                },
            )
            .explained("token", &text)
        }),
        Err(source) => Err(TaskFailed::of(what, source)),
    }
}

/// The failure of an admin worker, with the name of its token.
#[derive(Debug, thiserror::Error)]
#[error("token {name}: {source}")]
struct OnToken {
    name: String,
    source: AdminError,
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

/// Ends an admin worker on a blocking thread, by dropping the value that owns it. The drop may wait for the process.
pub(super) async fn end_worker(pid: u32, worker: impl Send + 'static) {
    if let Err(source) = tokio::task::spawn_blocking(move || drop(worker)).await {
        let error = TaskFailed::of("ending an admin worker", source);
        tracing::error!(
            %error, pid,
            "cannot end the admin worker, which may still hold a session of the token; if the process still runs, end it by \
             its process id"
        );
    }
}

/// Converts the error of an admin worker. The error tells the administrator the cause.
fn from_admin(error: AdminError) -> Error {
    let text = error.to_string();
    Error::caused(reason_of(&error), error).explained("token", &text)
}

const fn reason_of(error: &AdminError) -> Reason {
    match error {
        AdminError::Token(_) | AdminError::NoToken(_) | AdminError::Start(_) => Reason::TokenDown,
        AdminError::Pin(_)
        | AdminError::Untrusted(_)
        | AdminError::PinSource(_)
        | AdminError::Environment(_)
        | AdminError::PublicKey(_) => Reason::TokenUntrusted,
    }
}
