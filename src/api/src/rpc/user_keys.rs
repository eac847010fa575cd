//! Implements `keybroker.v1.UserKeyService`.

use std::sync::Arc;

use futures_util::future;
use tonic::{Request, Response, Status, async_trait};

use keybroker_broker::{
    Broker, ListRequest, Recipient, ReleaseForm, Released, SealedUserKey, UserKeyRef,
};
use keybroker_core::{
    call::RequestId, error::Error, key::UserId, principal::Action, secret::KeyMaterial,
};
use keybroker_proto as proto;
use keybroker_proto::{batch_unwrap_result, user_key_service_server::UserKeyService};

use super::{AuthenticatedCall, MESSAGE_BYTES_MAX, convert, page, status};

/// Maximum number of items in a batch.
const BATCH_MAX: usize = 64;
const PAGE_SIZE_DEFAULT: u32 = 100;

#[derive(Debug)]
pub(super) struct UserKeys {
    broker: Arc<Broker>,
}

impl UserKeys {
    pub(super) fn new(broker: Arc<Broker>) -> Self {
        Self { broker }
    }

    async fn unwrap_one(
        &self,
        entered: &AuthenticatedCall,
        item: &proto::UnwrapUserKeyRequest,
    ) -> Result<proto::UnwrapUserKeyResponse, Error> {
        let (principal, call) = (&entered.principal, &entered.call);
        let (key, recipient) = match parse_item(item) {
            Ok(parsed) => parsed,
            Err(error) => {
                let action = Action::Unwrap;
                return Err(self.broker.unserved(principal, call, action, error).await);
            }
        };
        let Some(recipient) = recipient else {
            let released = self.broker.unwrap(principal, call, &key).await?;
            return Ok(released_message(&released));
        };
        let sealed = self
            .broker
            .unwrap_sealed(principal, call, &key, &recipient)
            .await?;
        Ok(sealed_message(&sealed))
    }
}

/// Copies the key for the answer. The transport copies the key to buffers that this code cannot
/// overwrite.
fn released_message(released: &Released) -> proto::UnwrapUserKeyResponse {
    proto::UnwrapUserKeyResponse {
        key_material: released.material().expose().to_vec(),
        revision: released.revision().get(),
        sealed: None,
    }
}

fn sealed_message(sealed: &SealedUserKey) -> proto::UnwrapUserKeyResponse {
    proto::UnwrapUserKeyResponse {
        key_material: Vec::new(),
        revision: sealed.revision().get(),
        sealed: Some(proto::SealedUserKey {
            ciphertext: sealed.ciphertext().to_vec(),
            algorithm: sealed.algorithm().as_str().to_owned(),
            recipient_fingerprint: sealed.recipient().0.to_vec(),
            sealing: convert::sealing(Some(sealed.sealing())).into(),
        }),
    }
}

fn parse_item(
    item: &proto::UnwrapUserKeyRequest,
) -> Result<(UserKeyRef, Option<Recipient>), Error> {
    let key = convert::key_ref(&item.user, &item.key_name)?;
    let recipient = item.recipient.as_ref().map(convert::recipient);
    Ok((key, recipient.transpose()?))
}

/// Returns the key and the form of the release of an item of a batch, or `None` for a malformed item.
fn planned(item: &proto::UnwrapUserKeyRequest) -> Option<(UserKeyRef, ReleaseForm)> {
    let (key, recipient) = parse_item(item).ok()?;
    let form = recipient.map_or(ReleaseForm::Plain, |recipient| {
        ReleaseForm::Sealed(recipient.key.fingerprint())
    });
    Some((key, form))
}

fn check_batch(
    request: proto::BatchUnwrapUserKeysRequest,
) -> Result<Vec<proto::UnwrapUserKeyRequest>, Error> {
    if (1..=BATCH_MAX).contains(&request.items.len()) {
        Ok(request.items)
    } else {
        Err(Error::violation("items", "1 to 64 items"))
    }
}

fn parse_list(request: &proto::ListUserKeysRequest) -> Result<ListRequest, Error> {
    let user = (!request.user.is_empty()).then(|| UserId::parse(&request.user));
    Ok(ListRequest {
        user: user.transpose()?,
        deleted: request.show_deleted,
        from: page::decode(&request.page_token)?,
        limit: match request.page_size {
            0 => PAGE_SIZE_DEFAULT,
            size => size,
        },
    })
}

#[async_trait]
impl UserKeyService for UserKeys {
    async fn create_user_key(
        &self,
        request: Request<proto::CreateUserKeyRequest>,
    ) -> Result<Response<proto::CreateUserKeyResponse>, Status> {
        let parse = |r: proto::CreateUserKeyRequest| {
            let material = KeyMaterial::new(r.key_material);
            let key = convert::key_ref(&r.user, &r.key_name)?;
            Ok((key, material?, RequestId::parse(&r.request_id)?))
        };
        let (entered, (key, material, id)) =
            AuthenticatedCall::enter(&self.broker, request, Action::Create, parse).await?;
        let created = self
            .broker
            .create(&entered.principal, &entered.call, &key, material, id)
            .await
            .map_err(|error| entered.status(&error))?;
        Ok(Response::new(proto::CreateUserKeyResponse {
            user_key: Some(convert::user_key(&created)),
        }))
    }

    async fn unwrap_user_key(
        &self,
        request: Request<proto::UnwrapUserKeyRequest>,
    ) -> Result<Response<proto::UnwrapUserKeyResponse>, Status> {
        let entered = AuthenticatedCall::of(&request)?;
        let item = request.into_inner();
        let released = self.unwrap_one(&entered, &item).await;
        released
            .map(Response::new)
            .map_err(|error| entered.status(&error))
    }

    async fn batch_unwrap_user_keys(
        &self,
        request: Request<proto::BatchUnwrapUserKeysRequest>,
    ) -> Result<Response<proto::BatchUnwrapUserKeysResponse>, Status> {
        let (entered, items) =
            AuthenticatedCall::enter(&self.broker, request, Action::Unwrap, check_batch).await?;
        let keys: Vec<_> = items.iter().filter_map(planned).collect();
        // If the caller may unwrap none of the keys, the broker refuses the complete batch and
        // writes a single audit entry.
        self.broker
            .admit(&entered.principal, &entered.call, items.len(), &keys)
            .await
            .map_err(|error| entered.status(&error))?;
        let one = async |item: &proto::UnwrapUserKeyRequest| {
            let result = match self.unwrap_one(&entered, item).await {
                Ok(released) => batch_unwrap_result::Result::Released(released),
                Err(error) => batch_unwrap_result::Result::Error(proto::BatchItemError {
                    code: status::code(error.reason()).into(),
                    reason: error.reason().as_str().to_owned(),
                    message: error.reason().text().to_owned(),
                }),
            };
            proto::BatchUnwrapResult {
                result: Some(result),
            }
        };
        let results = future::join_all(items.iter().map(one)).await;
        Ok(Response::new(proto::BatchUnwrapUserKeysResponse {
            results,
        }))
    }

    async fn replace_user_key(
        &self,
        request: Request<proto::ReplaceUserKeyRequest>,
    ) -> Result<Response<proto::ReplaceUserKeyResponse>, Status> {
        let parse = |r: proto::ReplaceUserKeyRequest| {
            let material = KeyMaterial::new(r.key_material);
            let key = convert::key_ref(&r.user, &r.key_name)?;
            let expected = convert::revision(r.expected_revision, "expected_revision")?;
            Ok((key, material?, expected, RequestId::parse(&r.request_id)?))
        };
        let (entered, (key, material, expected, id)) =
            AuthenticatedCall::enter(&self.broker, request, Action::Replace, parse).await?;
        let replaced = self
            .broker
            .replace(
                &entered.principal,
                &entered.call,
                &key,
                material,
                expected,
                id,
            )
            .await
            .map_err(|error| entered.status(&error))?;
        Ok(Response::new(proto::ReplaceUserKeyResponse {
            user_key: Some(convert::user_key(&replaced)),
        }))
    }

    async fn get_user_key(
        &self,
        request: Request<proto::GetUserKeyRequest>,
    ) -> Result<Response<proto::GetUserKeyResponse>, Status> {
        let parse = |r: proto::GetUserKeyRequest| convert::key_ref(&r.user, &r.key_name);
        let (entered, key) =
            AuthenticatedCall::enter(&self.broker, request, Action::Get, parse).await?;
        let found = self
            .broker
            .get(&entered.principal, &entered.call, &key)
            .await
            .map_err(|error| entered.status(&error))?;
        Ok(Response::new(proto::GetUserKeyResponse {
            user_key: Some(convert::user_key_view(&found)),
        }))
    }

    async fn list_user_keys(
        &self,
        request: Request<proto::ListUserKeysRequest>,
    ) -> Result<Response<proto::ListUserKeysResponse>, Status> {
        let parse = |r: proto::ListUserKeysRequest| parse_list(&r);
        let (entered, list) =
            AuthenticatedCall::enter(&self.broker, request, Action::List, parse).await?;
        let listed = self.broker.list(&entered.principal, &entered.call, list);
        let page = Box::pin(listed)
            .await
            .map_err(|error| entered.status(&error))?;
        Ok(Response::new(page::message(page, MESSAGE_BYTES_MAX)))
    }

    async fn delete_user_key(
        &self,
        request: Request<proto::DeleteUserKeyRequest>,
    ) -> Result<Response<proto::DeleteUserKeyResponse>, Status> {
        let parse = |r: proto::DeleteUserKeyRequest| {
            let key = convert::key_ref(&r.user, &r.key_name)?;
            let expected = convert::revision(r.expected_revision, "expected_revision")?;
            Ok((key, expected, RequestId::parse(&r.request_id)?))
        };
        let (entered, (key, expected, id)) =
            AuthenticatedCall::enter(&self.broker, request, Action::Delete, parse).await?;
        let deleted = self
            .broker
            .delete(&entered.principal, &entered.call, &key, expected, id)
            .await
            .map_err(|error| entered.status(&error))?;
        Ok(Response::new(proto::DeleteUserKeyResponse {
            user_key: Some(convert::user_key(&deleted)),
        }))
    }

    async fn undelete_user_key(
        &self,
        request: Request<proto::UndeleteUserKeyRequest>,
    ) -> Result<Response<proto::UndeleteUserKeyResponse>, Status> {
        let parse = |r: proto::UndeleteUserKeyRequest| {
            let key = convert::key_ref(&r.user, &r.key_name)?;
            Ok((key, RequestId::parse(&r.request_id)?))
        };
        let (entered, (key, id)) =
            AuthenticatedCall::enter(&self.broker, request, Action::Undelete, parse).await?;
        let undeleted = self
            .broker
            .undelete(&entered.principal, &entered.call, &key, id)
            .await
            .map_err(|error| entered.status(&error))?;
        Ok(Response::new(proto::UndeleteUserKeyResponse {
            user_key: Some(convert::user_key(&undeleted)),
        }))
    }

    async fn restore_user_key_revision(
        &self,
        request: Request<proto::RestoreUserKeyRevisionRequest>,
    ) -> Result<Response<proto::RestoreUserKeyRevisionResponse>, Status> {
        let parse = |r: proto::RestoreUserKeyRevisionRequest| {
            let key = convert::key_ref(&r.user, &r.key_name)?;
            let revision = convert::revision(r.revision, "revision")?;
            let expected = convert::revision(r.expected_revision, "expected_revision")?;
            Ok((key, revision, expected, RequestId::parse(&r.request_id)?))
        };
        let (entered, (key, revision, expected, id)) =
            AuthenticatedCall::enter(&self.broker, request, Action::Restore, parse).await?;
        let restored = self
            .broker
            .restore(
                &entered.principal,
                &entered.call,
                &key,
                revision,
                expected,
                id,
            )
            .await
            .map_err(|error| entered.status(&error))?;
        Ok(Response::new(proto::RestoreUserKeyRevisionResponse {
            user_key: Some(convert::user_key(&restored)),
        }))
    }
}
