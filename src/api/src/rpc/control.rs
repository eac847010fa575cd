//! Implements `keybroker.v1.ControlService`, the service of the admin API.

use std::sync::Arc;

use base64ct::{Base64, Encoding as _};
use tonic::{Request, Response, Status, async_trait};

use keybroker_broker::{Broker, Serving, TokenState};
use keybroker_core::{error::Error, key::WrappingKeyId, principal::Action};
use keybroker_proto as proto;
use keybroker_proto::control_service_server::ControlService;

use super::{
    AuthenticatedCall, MESSAGE_BYTES_MAX, approvals, clients, convert, key_changes, rewrap,
};

const TAIL_DEFAULT: u32 = 100;
const TAIL_MAX: u32 = 1_000;
/// Width of a line of PEM (RFC 7468 section 2).
const PEM_LINE: usize = 64;

#[derive(Debug)]
pub(super) struct Control {
    broker: Arc<Broker>,
}

impl Control {
    pub(super) fn new(broker: Arc<Broker>) -> Self {
        Self { broker }
    }
}

#[async_trait]
impl ControlService for Control {
    async fn list_wrapping_keys(
        &self,
        request: Request<proto::ListWrappingKeysRequest>,
    ) -> Result<Response<proto::ListWrappingKeysResponse>, Status> {
        let entered = AuthenticatedCall::of(&request)?;
        let keys = self
            .broker
            .wrapping_keys(&entered.principal, &entered.call)
            .await
            .map_err(|error| entered.status(&error))?;
        Ok(Response::new(proto::ListWrappingKeysResponse {
            wrapping_keys: keys.iter().map(convert::wrapping_key).collect(),
        }))
    }

    async fn get_wrapping_key(
        &self,
        request: Request<proto::GetWrappingKeyRequest>,
    ) -> Result<Response<proto::GetWrappingKeyResponse>, Status> {
        let entered = AuthenticatedCall::of(&request)?;
        let id = WrappingKeyId::from_slice(&request.get_ref().id)
            .ok_or_else(|| Error::violation("id", "16 bytes"));
        let id = entered
            .parsed(&self.broker, Action::ReadWrappingKeys, id)
            .await?;
        let view = self
            .broker
            .wrapping_key(&entered.principal, &entered.call, id)
            .await
            .map_err(|error| entered.status(&error))?;
        let mut key = convert::wrapping_key(&view);
        if let Some(on_token) = &view.on_token {
            key.public_key_pem = pem(&on_token.spki);
        }
        Ok(Response::new(proto::GetWrappingKeyResponse {
            wrapping_key: Some(key),
        }))
    }

    async fn get_token_state(
        &self,
        request: Request<proto::GetTokenStateRequest>,
    ) -> Result<Response<proto::GetTokenStateResponse>, Status> {
        let entered = AuthenticatedCall::of(&request)?;
        let state = self
            .broker
            .token_state(&entered.principal, &entered.call)
            .await
            .map_err(|error| entered.status(&error))?;
        Ok(Response::new(token_state(&state)))
    }

    async fn tail_audit_log(
        &self,
        request: Request<proto::TailAuditLogRequest>,
    ) -> Result<Response<proto::TailAuditLogResponse>, Status> {
        let entered = AuthenticatedCall::of(&request)?;
        let limit = match request.get_ref().limit {
            0 => Ok(TAIL_DEFAULT),
            limit if limit <= TAIL_MAX => Ok(limit),
            _ => Err(Error::violation("limit", "at most 1,000")),
        };
        let limit = entered
            .parsed(&self.broker, Action::ReadAudit, limit)
            .await?;
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let entries = self
            .broker
            .audit_tail(&entered.principal, &entered.call, limit)
            .await
            .map_err(|error| entered.status(&error))?;
        Ok(Response::new(proto::TailAuditLogResponse {
            entries: newest_that_fit(entries),
        }))
    }

    async fn create_client_credential(
        &self,
        request: Request<proto::CreateClientCredentialRequest>,
    ) -> Result<Response<proto::CreateClientCredentialResponse>, Status> {
        clients::create(&self.broker, request).await
    }

    async fn add_client_secret(
        &self,
        request: Request<proto::AddClientSecretRequest>,
    ) -> Result<Response<proto::AddClientSecretResponse>, Status> {
        clients::add_secret(&self.broker, request).await
    }

    async fn list_client_credentials(
        &self,
        request: Request<proto::ListClientCredentialsRequest>,
    ) -> Result<Response<proto::ListClientCredentialsResponse>, Status> {
        clients::list(&self.broker, request).await
    }

    async fn revoke_client_credential(
        &self,
        request: Request<proto::RevokeClientCredentialRequest>,
    ) -> Result<Response<proto::RevokeClientCredentialResponse>, Status> {
        clients::revoke(&self.broker, request).await
    }

    async fn start_rewrap(
        &self,
        request: Request<proto::StartRewrapRequest>,
    ) -> Result<Response<proto::StartRewrapResponse>, Status> {
        rewrap::start(&self.broker, request).await
    }

    async fn get_rewrap(
        &self,
        request: Request<proto::GetRewrapRequest>,
    ) -> Result<Response<proto::GetRewrapResponse>, Status> {
        rewrap::get(&self.broker, request).await
    }

    async fn pause_rewrap(
        &self,
        request: Request<proto::PauseRewrapRequest>,
    ) -> Result<Response<proto::PauseRewrapResponse>, Status> {
        rewrap::pause(&self.broker, request).await
    }

    async fn resume_rewrap(
        &self,
        request: Request<proto::ResumeRewrapRequest>,
    ) -> Result<Response<proto::ResumeRewrapResponse>, Status> {
        rewrap::resume(&self.broker, request).await
    }

    async fn rotate_wrapping_key(
        &self,
        request: Request<proto::RotateWrappingKeyRequest>,
    ) -> Result<Response<proto::RotateWrappingKeyResponse>, Status> {
        key_changes::rotate(&self.broker, request).await
    }

    async fn change_wrapping_key_state(
        &self,
        request: Request<proto::ChangeWrappingKeyStateRequest>,
    ) -> Result<Response<proto::ChangeWrappingKeyStateResponse>, Status> {
        key_changes::change(&self.broker, request).await
    }

    async fn list_approvals(
        &self,
        request: Request<proto::ListApprovalsRequest>,
    ) -> Result<Response<proto::ListApprovalsResponse>, Status> {
        approvals::list(&self.broker, request).await
    }

    async fn approve_change(
        &self,
        request: Request<proto::ApproveChangeRequest>,
    ) -> Result<Response<proto::ApproveChangeResponse>, Status> {
        approvals::approve(&self.broker, request).await
    }

    async fn reject_change(
        &self,
        request: Request<proto::RejectChangeRequest>,
    ) -> Result<Response<proto::RejectChangeResponse>, Status> {
        approvals::reject(&self.broker, request).await
    }
}

/// Returns as many of the newest entries as fit into a message.
fn newest_that_fit(mut entries: Vec<String>) -> Vec<String> {
    // In the message, a tag and a length precede each entry.
    const OVERHEAD: usize = 6;
    let mut room = MESSAGE_BYTES_MAX;
    let fitting = entries
        .iter()
        .rev()
        .take_while(|entry| {
            let fits = entry.len() + OVERHEAD <= room;
            room = room.saturating_sub(entry.len() + OVERHEAD);
            fits
        })
        .count();
    entries.split_off(entries.len() - fitting)
}

fn token_state(state: &TokenState) -> proto::GetTokenStateResponse {
    let tokens = if state.tokens.is_empty() {
        vec![one_token(state)]
    } else {
        state.tokens.iter().map(one_token).collect()
    };
    let together = one_token(state);
    proto::GetTokenStateResponse {
        serving: together.serving,
        detail: together.detail,
        label: together.label,
        serial: together.serial,
        model: together.model,
        workers: together.workers,
        queue_length: together.queue_length,
        last_canary_time: together.last_self_test_time,
        tokens,
    }
}

fn one_token(state: &TokenState) -> proto::TokenState {
    let (serving, detail) = match &state.serving {
        Serving::Up => (
            proto::TokenServing::Up,
            state.note.clone().unwrap_or_default(),
        ),
        Serving::Down(cause) => (proto::TokenServing::Down, cause.clone()),
        Serving::Untrusted(cause) => (proto::TokenServing::Untrusted, cause.clone()),
    };
    let info = state.info.as_ref();
    let text = |pick: fn(&keybroker_broker::TokenInfo) -> &String| {
        info.map(pick).cloned().unwrap_or_default()
    };
    let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    proto::TokenState {
        name: state.name.clone(),
        priority: state.priority.into(),
        serving: serving.into(),
        detail,
        label: text(|info| &info.label),
        serial: text(|info| &info.serial),
        model: text(|info| &info.model),
        assurance: state
            .assurance
            .map_or_else(String::new, |assurance| assurance.as_str().to_owned()),
        workers: state
            .workers
            .iter()
            .map(|worker| proto::WorkerState {
                pid: worker.pid,
                sessions: count(worker.sessions),
                jobs_in_flight: count(worker.jobs_in_flight),
                generation: worker.generation,
            })
            .collect(),
        queue_length: count(state.queue_length),
        last_self_test_time: state.last_self_test.map(convert::timestamp),
        wrapping_key_ids: state
            .keys
            .iter()
            .map(|key| key.id.as_bytes().to_vec())
            .collect(),
    }
}

/// Returns a SubjectPublicKeyInfo as PEM (RFC 7468 section 13).
fn pem(spki: &[u8]) -> String {
    let text = Base64::encode_string(spki);
    let mut pem = String::from("-----BEGIN PUBLIC KEY-----\n");
    for line in text.as_bytes().chunks(PEM_LINE) {
        pem.push_str(&String::from_utf8_lossy(line));
        pem.push('\n');
    }
    pem.push_str("-----END PUBLIC KEY-----\n");
    pem
}
