//! Calls of the user-key service, which enrol, release, replace, look up, list and delete user keys.

use std::fmt;

use keybroker_core::{
    call::Timestamp,
    key::{KeyName, RecordId, Revision, UserId, WrappingKeyId},
    secret::KeyMaterial,
};
use keybroker_proto::{
    self as proto, batch_unwrap_result::Result as ItemResult,
    user_key_service_client::UserKeyServiceClient,
};
use prost_types::Timestamp as WireTimestamp;
use tonic::{Request, transport::Channel};

use crate::{
    Client,
    call::{Attempt, Change, Read},
    error::{AttemptError, InvalidField, Refusal},
    sealed::SealedKey,
    sensitive::{self, Sensitive},
};

const CREATE: &str = "/keybroker.v1.UserKeyService/CreateUserKey";
const REPLACE: &str = "/keybroker.v1.UserKeyService/ReplaceUserKey";

/// Identifies a key by user and key name. The caller's credential determines the tenant.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UserKeyRef {
    /// The user that the key belongs to: 1 to 255 bytes of UTF-8 without control characters, compared bytewise.
    pub user: UserId,
    /// The name that distinguishes several keys of one user: 1 to 64 bytes of `[a-z0-9._-]`.
    pub key_name: KeyName,
}

impl UserKeyRef {
    /// Parses a user and a key name.
    ///
    /// # Errors
    /// Returns an error if the user or the key name is not valid.
    pub fn parse(user: &str, key_name: &str) -> Result<Self, InvalidField> {
        Ok(Self {
            user: UserId::parse(user)?,
            key_name: KeyName::parse(key_name)?,
        })
    }
}

impl fmt::Display for UserKeyRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.user, self.key_name)
    }
}

/// Whether a record can be unwrapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum UserKeyState {
    /// The record can be unwrapped.
    Active,
    /// The record keeps its name and can be undeleted, but cannot be unwrapped.
    Deleted,
    /// A state that a later release of the broker has added.
    Unknown,
}

/// The metadata of a record, which never contains key material.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct UserKey {
    /// User and key name.
    pub key: UserKeyRef,
    /// Id of the record. Every record that is created gets a new id.
    pub record_id: RecordId,
    /// Whether the record can be unwrapped.
    pub state: UserKeyState,
    /// The current revision.
    pub revision: Revision,
    /// The wrapping key of the current revision.
    pub wrapping_key_id: WrappingKeyId,
    /// When the record was created.
    pub create_time: Timestamp,
    /// When the record last changed.
    pub update_time: Timestamp,
    /// When the record was deleted; `None` while it is active.
    pub delete_time: Option<Timestamp>,
    /// When the key was last released. The broker stores the time of a release with a delay of a few seconds, and may
    /// lose this time. Only [`get_user_key`](Client::get_user_key) and [`list_user_keys`](Client::list_user_keys)
    /// return the time of the last release.
    pub last_use_time: Option<Timestamp>,
}

/// A released key.
#[derive(Debug)]
#[non_exhaustive]
pub struct ReleasedKey {
    /// The unwrapped user key, 1 to 190 bytes. The memory of the key is overwritten when the value is dropped, and
    /// `Debug` output is redacted.
    pub key_material: KeyMaterial,
    /// The revision that was released.
    pub revision: Revision,
}

/// The filter and the page size of a list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListUserKeys {
    /// Lists only this user's records; `None` lists the records of all users.
    pub user: Option<UserId>,
    /// Whether the list contains deleted records in addition to active records.
    pub show_deleted: bool,
    /// Records per page, 1 to 1,000; 0 means 100.
    pub page_size: u32,
    /// [`UserKeyPage::next_page_token`] of the previous page; empty for the first page.
    pub page_token: String,
}

/// A stored record that is damaged. A damaged record cannot be unwrapped or changed until an operator has repaired it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DamagedUserKey {
    /// The user that the key belongs to; `None` if the user cannot be read.
    pub user: Option<UserId>,
    /// The key name; `None` if the key name cannot be read.
    pub key_name: Option<KeyName>,
    /// Id of the record; `None` if the id cannot be read.
    pub record_id: Option<RecordId>,
    /// The name of the problem in the API: `unreadable` or `set-back`.
    pub problem: String,
}

/// One page of a list of records, which is ordered by user and then by key name, both compared bytewise.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct UserKeyPage {
    /// The records.
    pub user_keys: Vec<UserKey>,
    /// Damaged records of this page, which are not in `user_keys`.
    pub damaged: Vec<DamagedUserKey>,
    /// The page token that requests the next page; `None` on the last page.
    pub next_page_token: Option<String>,
}

/// Calls of the user-key service. A failed call returns an [`Error`](crate::Error).
impl Client {
    /// Releases a user key. The broker's token unwraps the key.
    pub fn unwrap_user_key<'a>(&'a self, key: &'a UserKeyRef) -> Read<'a, ReleasedKey> {
        Read::new(self.shared(), move |attempt| async move {
            let request = attempt.request(item(key, None));
            released(
                service(&attempt)
                    .unwrap_user_key(request)
                    .await?
                    .into_inner(),
            )
        })
    }

    /// Releases up to 64 keys, each with its own result, in the order of `keys`.
    ///
    /// The library repeats the call only if the complete call fails. The library does not repeat single items of a
    /// batch. Request a refused item again if its refusal [is transient](Refusal::is_transient).
    pub fn batch_unwrap_user_keys<'a>(
        &'a self,
        keys: &'a [UserKeyRef],
    ) -> Read<'a, Vec<Result<ReleasedKey, Refusal>>> {
        Read::new(self.shared(), move |attempt| async move {
            let request = attempt.request(batch_of(keys, None));
            batch(service(&attempt), request, keys.len())
                .await?
                .into_iter()
                .map(|result| item_result(result, released))
                .collect()
        })
    }

    /// Releases a user key to a recipient: the broker's token encrypts the user key to `public_key`, the DER
    /// SubjectPublicKeyInfo of an RSA key of 2048, 3072 or 4096 bits. The key must be under a sealed wrapping key.
    pub fn unwrap_user_key_for<'a>(
        &'a self,
        key: &'a UserKeyRef,
        public_key: &'a [u8],
    ) -> Read<'a, SealedKey> {
        Read::new(self.shared(), move |attempt| async move {
            let request = attempt.request(item(key, Some(public_key)));
            let answer = service(&attempt).unwrap_user_key(request).await?;
            SealedKey::of(answer.into_inner(), public_key)
        })
    }

    /// Releases up to 64 keys to one recipient, each with its own result, in the order of `keys`.
    pub fn batch_unwrap_user_keys_for<'a>(
        &'a self,
        keys: &'a [UserKeyRef],
        public_key: &'a [u8],
    ) -> Read<'a, Vec<Result<SealedKey, Refusal>>> {
        Read::new(self.shared(), move |attempt| async move {
            let request = attempt.request(batch_of(keys, Some(public_key)));
            let results = batch(service(&attempt), request, keys.len()).await?;
            let sealed = |answer| SealedKey::of(answer, public_key);
            results
                .into_iter()
                .map(|result| item_result(result, sealed))
                .collect()
        })
    }

    /// Enrols a key: the broker wraps and stores the key. The call never overwrites a record. If the user has an active
    /// or deleted record with this key name, the call fails with the reason
    /// [`KeyExists`](keybroker_core::error::Reason::KeyExists).
    pub fn create_user_key<'a>(
        &'a self,
        key: &'a UserKeyRef,
        key_material: &'a KeyMaterial,
    ) -> Change<'a, UserKey> {
        Change::new(self.shared(), move |attempt| async move {
            let message = Sensitive(proto::CreateUserKeyRequest {
                user: key.user.to_string(),
                key_name: key.key_name.to_string(),
                key_material: key_material.expose().to_vec(),
                request_id: attempt.request_id.clone(),
            });
            let request = attempt.request(message);
            let answer = sensitive::unary(attempt.channel, request, CREATE).await?;
            let created: proto::CreateUserKeyResponse = answer.into_inner();
            record(created.user_key)
        })
    }

    /// Stores new key material as the next revision. If `expected_revision` is not the current revision, the call fails
    /// with the reason [`Revision`](keybroker_core::error::Reason::Revision).
    pub fn replace_user_key<'a>(
        &'a self,
        key: &'a UserKeyRef,
        key_material: &'a KeyMaterial,
        expected_revision: Revision,
    ) -> Change<'a, UserKey> {
        Change::new(self.shared(), move |attempt| async move {
            let message = Sensitive(proto::ReplaceUserKeyRequest {
                user: key.user.to_string(),
                key_name: key.key_name.to_string(),
                key_material: key_material.expose().to_vec(),
                expected_revision: expected_revision.get(),
                request_id: attempt.request_id.clone(),
            });
            let request = attempt.request(message);
            let answer = sensitive::unary(attempt.channel, request, REPLACE).await?;
            let replaced: proto::ReplaceUserKeyResponse = answer.into_inner();
            record(replaced.user_key)
        })
    }

    /// Returns the metadata of an active or deleted record. The broker does not unwrap the key.
    pub fn get_user_key<'a>(&'a self, key: &'a UserKeyRef) -> Read<'a, UserKey> {
        Read::new(self.shared(), move |attempt| async move {
            let request = attempt.request(proto::GetUserKeyRequest {
                user: key.user.to_string(),
                key_name: key.key_name.to_string(),
            });
            let answer = service(&attempt).get_user_key(request).await?;
            record(answer.into_inner().user_key)
        })
    }

    /// Returns one page of records. To request the next page, set [`ListUserKeys::page_token`] to the
    /// [`next_page_token`](UserKeyPage::next_page_token) of this page.
    pub fn list_user_keys<'a>(&'a self, list: &'a ListUserKeys) -> Read<'a, UserKeyPage> {
        Read::new(self.shared(), move |attempt| async move {
            let request = attempt.request(proto::ListUserKeysRequest {
                page_size: list.page_size,
                page_token: list.page_token.clone(),
                user: list
                    .user
                    .as_ref()
                    .map(ToString::to_string)
                    .unwrap_or_default(),
                show_deleted: list.show_deleted,
            });
            let page = service(&attempt)
                .list_user_keys(request)
                .await?
                .into_inner();
            let records = page.user_keys.into_iter().map(|key| record(Some(key)));
            let token = page.next_page_token;
            let damaged = page.damaged.into_iter().map(|row| DamagedUserKey {
                user: UserId::parse(&row.user).ok(),
                key_name: KeyName::parse(&row.key_name).ok(),
                record_id: RecordId::from_slice(&row.record_id),
                problem: row.problem,
            });
            Ok(UserKeyPage {
                damaged: damaged.collect(),
                user_keys: records.collect::<Result<_, _>>()?,
                next_page_token: (!token.is_empty()).then_some(token),
            })
        })
    }

    /// Marks a record as deleted. The record keeps its name and can be undeleted.
    pub fn delete_user_key<'a>(
        &'a self,
        key: &'a UserKeyRef,
        expected_revision: Revision,
    ) -> Change<'a, UserKey> {
        Change::new(self.shared(), move |attempt| async move {
            let request = attempt.request(proto::DeleteUserKeyRequest {
                user: key.user.to_string(),
                key_name: key.key_name.to_string(),
                expected_revision: expected_revision.get(),
                request_id: attempt.request_id.clone(),
            });
            let answer = service(&attempt).delete_user_key(request).await?;
            record(answer.into_inner().user_key)
        })
    }

    /// Makes a deleted record active again.
    pub fn undelete_user_key<'a>(&'a self, key: &'a UserKeyRef) -> Change<'a, UserKey> {
        Change::new(self.shared(), move |attempt| async move {
            let request = attempt.request(proto::UndeleteUserKeyRequest {
                user: key.user.to_string(),
                key_name: key.key_name.to_string(),
                request_id: attempt.request_id.clone(),
            });
            let answer = service(&attempt).undelete_user_key(request).await?;
            record(answer.into_inner().user_key)
        })
    }

    /// Makes the material of an earlier revision current again, as a new revision.
    pub fn restore_user_key_revision<'a>(
        &'a self,
        key: &'a UserKeyRef,
        revision: Revision,
        expected_revision: Revision,
    ) -> Change<'a, UserKey> {
        Change::new(self.shared(), move |attempt| async move {
            let request = attempt.request(proto::RestoreUserKeyRevisionRequest {
                user: key.user.to_string(),
                key_name: key.key_name.to_string(),
                revision: revision.get(),
                expected_revision: expected_revision.get(),
                request_id: attempt.request_id.clone(),
            });
            let answer = service(&attempt).restore_user_key_revision(request).await?;
            record(answer.into_inner().user_key)
        })
    }
}

fn service(attempt: &Attempt) -> UserKeyServiceClient<Channel> {
    UserKeyServiceClient::new(attempt.channel.clone())
}

fn batch_of(keys: &[UserKeyRef], recipient: Option<&[u8]>) -> proto::BatchUnwrapUserKeysRequest {
    proto::BatchUnwrapUserKeysRequest {
        items: keys.iter().map(|key| item(key, recipient)).collect(),
    }
}

/// Sends a batch, and returns one result for each of its `count` items.
async fn batch(
    mut service: UserKeyServiceClient<Channel>,
    request: Request<proto::BatchUnwrapUserKeysRequest>,
    count: usize,
) -> Result<Vec<proto::BatchUnwrapResult>, AttemptError> {
    let answer = service.batch_unwrap_user_keys(request).await?;
    let results = answer.into_inner().results;
    if results.len() != count {
        return Err(AttemptError::Invalid(
            "the number of results differs from the number of items",
        ));
    }
    Ok(results)
}

fn item(key: &UserKeyRef, recipient: Option<&[u8]>) -> proto::UnwrapUserKeyRequest {
    proto::UnwrapUserKeyRequest {
        user: key.user.to_string(),
        key_name: key.key_name.to_string(),
        recipient: recipient.map(|public_key| proto::Recipient {
            public_key: public_key.to_vec(),
            hash: proto::OaepHash::Unspecified.into(),
        }),
    }
}

fn released(answer: proto::UnwrapUserKeyResponse) -> Result<ReleasedKey, AttemptError> {
    // The key material is moved out of the answer first, so that it is overwritten even if the rest of the answer is
    // invalid.
    let key_material = KeyMaterial::new(answer.key_material);
    Ok(ReleasedKey {
        key_material: key_material
            .map_err(|_| AttemptError::Invalid("key_material does not have 1 to 190 bytes"))?,
        revision: revision(answer.revision)?,
    })
}

fn item_result<T>(
    result: proto::BatchUnwrapResult,
    read: impl FnOnce(proto::UnwrapUserKeyResponse) -> Result<T, AttemptError>,
) -> Result<Result<T, Refusal>, AttemptError> {
    match result.result {
        Some(ItemResult::Released(answer)) => read(answer).map(Ok),
        Some(ItemResult::Error(error)) => Ok(Err(Refusal::of_item(error.reason, error.message))),
        None => Err(AttemptError::Invalid("an item has no result")),
    }
}

fn record(record: Option<proto::UserKey>) -> Result<UserKey, AttemptError> {
    let record = record.ok_or(AttemptError::Invalid("user_key is absent"))?;
    let state = match record.state() {
        proto::UserKeyState::Active => UserKeyState::Active,
        proto::UserKeyState::Deleted => UserKeyState::Deleted,
        proto::UserKeyState::Unspecified => UserKeyState::Unknown,
    };
    Ok(UserKey {
        key: UserKeyRef::parse(&record.user, &record.key_name)
            .map_err(|_| AttemptError::Invalid("user or key_name is empty or too long"))?,
        record_id: RecordId::from_slice(&record.record_id)
            .ok_or(AttemptError::Invalid("record_id does not have 16 bytes"))?,
        state,
        revision: revision(record.revision)?,
        wrapping_key_id: WrappingKeyId::from_slice(&record.wrapping_key_id).ok_or(
            AttemptError::Invalid("wrapping_key_id does not have 16 bytes"),
        )?,
        create_time: timestamp(record.create_time)
            .ok_or(AttemptError::Invalid("create_time is absent"))?,
        update_time: timestamp(record.update_time)
            .ok_or(AttemptError::Invalid("update_time is absent"))?,
        delete_time: timestamp(record.delete_time),
        last_use_time: timestamp(record.last_use_time),
    })
}

fn revision(number: u64) -> Result<Revision, AttemptError> {
    Revision::new(number).ok_or(AttemptError::Invalid("revision is out of range"))
}

/// Converts a time. A server may send any value; a value outside the range becomes the earliest or latest possible
/// time.
fn timestamp(at: Option<WireTimestamp>) -> Option<Timestamp> {
    let at = at?;
    let micros = at.seconds.saturating_mul(1_000_000);
    let micros = micros.saturating_add(i64::from(at.nanos) / 1_000);
    Some(Timestamp::from_micros(micros))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire() -> proto::UserKey {
        proto::UserKey {
            user: "ada".to_owned(),
            key_name: "vault".to_owned(),
            record_id: vec![1; 16],
            state: proto::UserKeyState::Active.into(),
            revision: 1,
            wrapping_key_id: vec![2; 16],
            create_time: Some(WireTimestamp {
                seconds: 1,
                nanos: 500_000_000,
            }),
            update_time: Some(WireTimestamp {
                seconds: i64::MAX,
                nanos: i32::MAX,
            }),
            delete_time: None,
            last_use_time: None,
        }
    }

    #[test]
    fn a_record_is_read() {
        let read = record(Some(wire())).unwrap();
        assert_eq!(read.key, UserKeyRef::parse("ada", "vault").unwrap());
        assert_eq!(read.create_time, Timestamp::from_micros(1_500_000));
        assert_eq!(read.update_time, Timestamp::from_micros(i64::MAX));
        assert_eq!(read.state, UserKeyState::Active);
        let later = proto::UserKey {
            state: 77,
            ..wire()
        };
        assert_eq!(record(Some(later)).unwrap().state, UserKeyState::Unknown);
    }

    #[test]
    fn an_answer_that_lacks_something_is_refused() {
        let bad = [
            proto::UserKey {
                user: String::new(),
                ..wire()
            },
            proto::UserKey {
                key_name: "A".to_owned(),
                ..wire()
            },
            proto::UserKey {
                record_id: vec![1; 15],
                ..wire()
            },
            proto::UserKey {
                wrapping_key_id: vec![],
                ..wire()
            },
            proto::UserKey {
                revision: 0,
                ..wire()
            },
            proto::UserKey {
                revision: u64::MAX,
                ..wire()
            },
            proto::UserKey {
                create_time: None,
                ..wire()
            },
            proto::UserKey {
                update_time: None,
                ..wire()
            },
        ];
        for wire in bad {
            assert!(record(Some(wire.clone())).is_err(), "{wire:?}");
        }
        assert!(record(None).is_err());
        for key_material in [vec![], vec![0; 191]] {
            let answer = proto::UnwrapUserKeyResponse {
                key_material,
                revision: 1,
                sealed: None,
            };
            assert!(released(answer).is_err());
        }
        assert!(item_result(proto::BatchUnwrapResult { result: None }, released).is_err());
    }

    #[test]
    fn names_that_break_their_limits_say_which_and_how() {
        let error = UserKeyRef::parse("ada", "Vault").unwrap_err();
        assert_eq!(
            (error.field(), error.to_string().as_str()),
            ("key_name", "key_name must be 1 to 64 bytes of [a-z0-9._-]")
        );
    }
}
