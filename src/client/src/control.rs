//! Calls of the admin API, for administrators and auditors. The calls are about wrapping keys, the re-wrap, the token,
//! the audit log, API clients and approvals.
//!
//! The calls return protobuf messages. Only `create_client_credential` and `add_client_secret` return a secret, in a
//! [`ClientSecret`].

use keybroker_core::key::{ApprovalId, ClientId, WrappingKeyId};
use keybroker_proto::{self as proto, control_service_client::ControlServiceClient};
use tonic::transport::Channel;

use crate::{
    Client,
    call::{Attempt, NonIdempotent, Read},
    credential::ClientSecret,
    error::AttemptError,
};

/// A new secret of an API client. The broker never shows the secret again.
#[derive(Debug)]
#[non_exhaustive]
pub struct IssuedSecret {
    /// The API client after the change.
    pub client_credential: proto::ClientCredential,
    /// The number of the secret, which identifies the secret when it is revoked.
    pub secret_number: u32,
    /// The secret.
    pub secret: ClientSecret,
}

/// Calls of the admin API. A failed call returns an [`Error`](crate::Error).
impl Client {
    /// Lists the registered wrapping keys, ordered by the time of their last change, which is the registration or a
    /// change of state.
    pub fn list_wrapping_keys(&self) -> Read<'_, Vec<proto::WrappingKey>> {
        Read::new(self.shared(), |attempt| async move {
            let request = attempt.request(proto::ListWrappingKeysRequest {});
            let answer = service(&attempt).list_wrapping_keys(request).await?;
            Ok(answer.into_inner().wrapping_keys)
        })
    }

    /// Returns one wrapping key with its public key.
    pub fn get_wrapping_key(&self, id: WrappingKeyId) -> Read<'_, proto::WrappingKey> {
        Read::new(self.shared(), move |attempt| async move {
            let id = id.as_bytes().to_vec();
            let request = attempt.request(proto::GetWrappingKeyRequest { id });
            let answer = service(&attempt).get_wrapping_key(request).await?;
            let key = answer.into_inner().wrapping_key;
            key.ok_or(AttemptError::Invalid("wrapping_key is absent"))
        })
    }

    /// Returns the state of the token and of the workers that use it.
    pub fn get_token_state(&self) -> Read<'_, proto::GetTokenStateResponse> {
        Read::new(self.shared(), |attempt| async move {
            let request = attempt.request(proto::GetTokenStateRequest {});
            Ok(service(&attempt)
                .get_token_state(request)
                .await?
                .into_inner())
        })
    }

    /// Returns the last entries of this broker's audit log as canonical JSON (RFC 8785), oldest first. `limit` is the
    /// number of entries: 1 to 1,000; 0 means 100.
    pub fn tail_audit_log(&self, limit: u32) -> Read<'_, Vec<String>> {
        Read::new(self.shared(), move |attempt| async move {
            let request = attempt.request(proto::TailAuditLogRequest { limit });
            let answer = service(&attempt).tail_audit_log(request).await?;
            Ok(answer.into_inner().entries)
        })
    }

    /// Lists the API clients of the caller's tenant, including revoked API clients.
    pub fn list_client_credentials(
        &self,
        list: proto::ListClientCredentialsRequest,
    ) -> Read<'_, proto::ListClientCredentialsResponse> {
        Read::new(self.shared(), move |attempt| {
            let request = attempt.request(list.clone());
            async move {
                let answer = service(&attempt).list_client_credentials(request).await?;
                Ok(answer.into_inner())
            }
        })
    }

    /// Returns the re-wrap that was requested last, and the number of rows under each wrapping key.
    pub fn get_rewrap(&self) -> Read<'_, proto::GetRewrapResponse> {
        Read::new(self.shared(), |attempt| async move {
            let request = attempt.request(proto::GetRewrapRequest {});
            Ok(service(&attempt).get_rewrap(request).await?.into_inner())
        })
    }

    /// Requests a re-wrap: the brokers move all rows to the wrapping key that wraps new user keys. A repeated call
    /// starts no second re-wrap, so the call is retried like a read.
    pub fn start_rewrap(
        &self,
        start: proto::StartRewrapRequest,
    ) -> Read<'_, proto::StartRewrapResponse> {
        Read::new(self.shared(), move |attempt| {
            let request = attempt.request(start.clone());
            async move { Ok(service(&attempt).start_rewrap(request).await?.into_inner()) }
        })
    }

    /// Pauses the re-wrap. The call is retried like a read, because a repeated call changes nothing.
    pub fn pause_rewrap(&self) -> Read<'_, proto::PauseRewrapResponse> {
        Read::new(self.shared(), |attempt| async move {
            let request = attempt.request(proto::PauseRewrapRequest {});
            Ok(service(&attempt).pause_rewrap(request).await?.into_inner())
        })
    }

    /// Resumes a paused re-wrap. If present, `rows_per_second_max` replaces the limit of rows per second; 0 means no
    /// limit. The call is retried like a read, because a repeated call changes nothing.
    pub fn resume_rewrap(
        &self,
        rows_per_second_max: Option<u32>,
    ) -> Read<'_, proto::ResumeRewrapResponse> {
        Read::new(self.shared(), move |attempt| async move {
            let request = attempt.request(proto::ResumeRewrapRequest {
                rows_per_second_max,
            });
            Ok(service(&attempt).resume_rewrap(request).await?.into_inner())
        })
    }

    /// Creates an API client with its first secret.
    pub fn create_client_credential(
        &self,
        grant: proto::CreateClientCredentialRequest,
    ) -> NonIdempotent<'_, IssuedSecret> {
        NonIdempotent::new(self.shared(), move |attempt| {
            let request = attempt.request(grant.clone());
            async move {
                let answer = service(&attempt).create_client_credential(request).await?;
                let made = answer.into_inner();
                issued(made.client_credential, made.secret_number, made.secret)
            }
        })
    }

    /// Creates a further secret of an API client; the existing secrets stay valid. If `expire_time` is set, the new
    /// secret expires at that time.
    pub fn add_client_secret(
        &self,
        id: ClientId,
        expire_time: Option<prost_types::Timestamp>,
    ) -> NonIdempotent<'_, IssuedSecret> {
        NonIdempotent::new(self.shared(), move |attempt| async move {
            let request = attempt.request(proto::AddClientSecretRequest {
                id: id.to_string(),
                expire_time,
            });
            let made = service(&attempt)
                .add_client_secret(request)
                .await?
                .into_inner();
            issued(made.client_credential, made.secret_number, made.secret)
        })
    }

    /// Revokes an API client permanently, or one of its secrets.
    pub fn revoke_client_credential(
        &self,
        id: ClientId,
        secret_number: Option<u32>,
    ) -> NonIdempotent<'_, proto::ClientCredential> {
        NonIdempotent::new(self.shared(), move |attempt| async move {
            let request = attempt.request(proto::RevokeClientCredentialRequest {
                id: id.to_string(),
                secret_number,
            });
            let answer = service(&attempt).revoke_client_credential(request).await?;
            let revoked = answer.into_inner().client_credential;
            revoked.ok_or(AttemptError::Invalid("client_credential is absent"))
        })
    }
}

/// Changes of wrapping keys. A failed call returns an [`Error`](crate::Error).
impl Client {
    /// Makes a new wrapping key, or activates the wrapping key that was deactivated last. The broker completes a change
    /// even if the call's deadline passes.
    pub fn rotate_wrapping_key(
        &self,
        rotation: proto::RotateWrappingKeyRequest,
    ) -> NonIdempotent<'_, proto::RotateWrappingKeyResponse> {
        NonIdempotent::new(self.shared(), move |attempt| {
            let request = attempt.request(rotation.clone());
            async move {
                let answer = service(&attempt).rotate_wrapping_key(request).await?;
                let rotated = answer.into_inner();
                if rotated.wrapping_key.is_none() {
                    return Err(AttemptError::Invalid("wrapping_key is absent"));
                }
                Ok(rotated)
            }
        })
    }

    /// Changes the state of a wrapping key, and returns the key after the change.
    pub fn change_wrapping_key_state(
        &self,
        change: proto::ChangeWrappingKeyStateRequest,
    ) -> NonIdempotent<'_, proto::WrappingKey> {
        NonIdempotent::new(self.shared(), move |attempt| {
            let request = attempt.request(change.clone());
            async move {
                let answer = service(&attempt).change_wrapping_key_state(request).await?;
                let key = answer.into_inner().wrapping_key;
                key.ok_or(AttemptError::Invalid("wrapping_key is absent"))
            }
        })
    }
}

/// Changes that a second person must approve. A failed call returns an [`Error`](crate::Error).
impl Client {
    /// Lists the requests for approval, newest first: those that are open or, with `show_all`, also those that are over.
    pub fn list_approvals(&self, show_all: bool) -> Read<'_, proto::ListApprovalsResponse> {
        Read::new(self.shared(), move |attempt| async move {
            let request = attempt.request(proto::ListApprovalsRequest {
                show_all,
                id: Vec::new(),
            });
            Ok(service(&attempt)
                .list_approvals(request)
                .await?
                .into_inner())
        })
    }

    /// Returns the request for approval with this id, in any state. `None` if there is none, or if its row cannot be read.
    pub fn get_approval(&self, id: ApprovalId) -> Read<'_, Option<proto::Approval>> {
        Read::new(self.shared(), move |attempt| async move {
            let request = attempt.request(proto::ListApprovalsRequest {
                show_all: true,
                id: id.as_bytes().to_vec(),
            });
            let listed = service(&attempt).list_approvals(request).await?;
            let mut approvals = listed.into_inner().approvals.into_iter();
            Ok(approvals.find(|approval| approval.id == id.as_bytes()))
        })
    }

    /// Approves the change that another person requested. `digest` is the digest of the request that the person has read.
    pub fn approve_change(
        &self,
        id: ApprovalId,
        digest: [u8; 32],
    ) -> NonIdempotent<'_, proto::Approval> {
        NonIdempotent::new(self.shared(), move |attempt| async move {
            let request = attempt.request(proto::ApproveChangeRequest {
                id: id.as_bytes().to_vec(),
                digest: digest.to_vec(),
            });
            let answer = service(&attempt).approve_change(request).await?;
            let approved = answer.into_inner().approval;
            approved.ok_or(AttemptError::Invalid("approval is absent"))
        })
    }

    /// Rejects a requested change. The answer has the request or, if its row was removed, the cause.
    pub fn reject_change(&self, id: ApprovalId) -> NonIdempotent<'_, proto::RejectChangeResponse> {
        NonIdempotent::new(self.shared(), move |attempt| async move {
            let request = attempt.request(proto::RejectChangeRequest {
                id: id.as_bytes().to_vec(),
            });
            let answer = service(&attempt).reject_change(request).await?;
            Ok(answer.into_inner())
        })
    }
}

fn service(attempt: &Attempt) -> ControlServiceClient<Channel> {
    ControlServiceClient::new(attempt.channel.clone())
}

fn issued(
    client_credential: Option<proto::ClientCredential>,
    secret_number: u32,
    secret: String,
) -> Result<IssuedSecret, AttemptError> {
    // The secret is moved out of the answer first, so that the secret is overwritten even if the rest of the answer is
    // invalid.
    let secret = ClientSecret::new(secret);
    Ok(IssuedSecret {
        client_credential: client_credential
            .ok_or(AttemptError::Invalid("client_credential is absent"))?,
        secret_number,
        secret,
    })
}
