//! Reads and stores the key of the caller's subject for `/user-keys`.

use std::sync::Arc;

use axum::{
    body::Body,
    http::{Response, StatusCode},
};
use base64ct::{Base64, Encoding as _};
use serde_json::json;

use keybroker_broker::{Broker, RecordState, UserKeyRef};
use keybroker_core::{
    call::{Call, CallId, RequestId},
    error::{Error, Reason},
    key::Revision,
    principal::{Action, Principal},
    secret::KeyMaterial,
};

use super::{answer, body::KEY_BYTES, retry::Retry};

/// Maximum number of attempts of a PUT to read and write a record. An attempt fails if another caller changes the
/// record in the meantime.
const ROUNDS_MAX: usize = 4;

/// An authenticated request for the caller's own key.
pub(super) struct UserRequest {
    pub(super) broker: Arc<Broker>,
    pub(super) principal: Arc<Principal>,
    pub(super) call: Call,
    pub(super) key: UserKeyRef,
}

impl UserRequest {
    /// Releases the caller's key, encoded in base64.
    pub(super) async fn get(&self, retry: &mut Retry<'_>) -> Result<Response<Body>, Error> {
        let released = retry
            .ask(|call| async move { self.broker.unwrap(&self.principal, &call, &self.key).await })
            .await?;
        let key = released.material().expose();
        if key.len() != KEY_BYTES {
            // The gRPC API accepts keys of other lengths, but Bitwarden clients would refuse them.
            let detail = format!(
                "the stored key {} has {} bytes, and a Key Connector returns only keys of 32 bytes",
                self.key.name,
                key.len()
            );
            return Err(Error::new(Reason::KeyState, detail));
        }
        // The transport copies the bytes to buffers that this code cannot overwrite.
        let body = json!({ "key": Base64::encode_string(key) });
        Ok(answer::json(StatusCode::OK, &body))
    }

    /// Stores the key of a user who has no key.
    pub(super) async fn post(
        &self,
        retry: &mut Retry<'_>,
        material: &KeyMaterial,
    ) -> Result<Response<Body>, Error> {
        self.create(retry, material).await?;
        Ok(answer::empty(StatusCode::OK))
    }

    /// Stores a key and replaces an existing key. A deleted key is not replaced, because only an
    /// operator may undelete it.
    pub(super) async fn put(
        &self,
        retry: &mut Retry<'_>,
        material: &KeyMaterial,
    ) -> Result<Response<Body>, Error> {
        let mut result = Ok(());
        for _ in 0..ROUNDS_MAX {
            result = match self.current(retry).await? {
                Current::None => self.create(retry, material).await,
                Current::Active(revision) => self.replace(retry, material, revision).await,
                Current::Deleted => {
                    let detail = "the user's key is deleted, and only an operator can undelete it";
                    return Err(Error::new(Reason::KeyExists, detail));
                }
            };
            match &result {
                Ok(()) => return Ok(answer::empty(StatusCode::OK)),
                // Another caller may have changed the record between reading and writing.
                Err(error) if is_race(error.reason()) => {}
                Err(_) => break,
            }
        }
        result.map_err(|error| match error.reason() {
            // The record is deleted. The reason in the answer is `KeyExists`, because a client
            // would treat the user as new after status 404.
            Reason::KeyNotFound => Error::new(Reason::KeyExists, error.detail()),
            _ => error,
        })?;
        Ok(answer::empty(StatusCode::OK))
    }

    async fn current(&self, retry: &mut Retry<'_>) -> Result<Current, Error> {
        let found = retry
            .ask(|call| async move { self.broker.get(&self.principal, &call, &self.key).await });
        match found.await {
            Ok(view) => Ok(match view.info.state {
                RecordState::Active => Current::Active(view.info.revision),
                RecordState::Deleted => Current::Deleted,
            }),
            Err(error) if error.reason() == Reason::KeyNotFound => Ok(Current::None),
            Err(error) => Err(error),
        }
    }

    async fn create(&self, retry: &mut Retry<'_>, material: &KeyMaterial) -> Result<(), Error> {
        let request = request_id()?;
        retry
            .ask(|call| async move {
                let material = copy(material)?;
                self.require_plain(&call, Action::Create).await?;
                self.broker
                    .create(&self.principal, &call, &self.key, material, request)
                    .await
            })
            .await
            .map(drop)
    }

    async fn replace(
        &self,
        retry: &mut Retry<'_>,
        material: &KeyMaterial,
        expected: Revision,
    ) -> Result<(), Error> {
        let request = request_id()?;
        retry
            .ask(|call| async move {
                let material = copy(material)?;
                self.require_plain(&call, Action::Replace).await?;
                let (principal, key) = (&self.principal, &self.key);
                self.broker
                    .replace(principal, &call, key, material, expected, request)
                    .await
            })
            .await
            .map(drop)
    }

    /// Refuses to store a key that `/user-keys` could not release: its owner could not open the vault again.
    async fn require_plain(&self, call: &Call, action: Action) -> Result<(), Error> {
        let checked = self.broker.check_plain_release();
        match checked {
            Ok(()) => Ok(()),
            Err(error) => Err(self
                .broker
                .unserved(&self.principal, call, action, error)
                .await),
        }
    }
}

/// The state of a user's key when PUT reads it.
enum Current {
    None,
    Deleted,
    Active(Revision),
}

fn is_race(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::Revision | Reason::KeyExists | Reason::KeyNotFound
    )
}

/// A request id for all attempts of a change, so that a change with an unknown result is not made twice.
fn request_id() -> Result<Option<RequestId>, Error> {
    RequestId::parse(&CallId::fresh().to_string())
}

/// Copies the material, because each attempt consumes it.
fn copy(material: &KeyMaterial) -> Result<KeyMaterial, Error> {
    KeyMaterial::new(material.expose().to_vec())
}
