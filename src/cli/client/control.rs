//! Calls of the control plane and of the health service.

use serde_json::json;
use tonic::transport::Channel;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::{
    cli::{
        connect,
        exit::{Exit, Failure},
    },
    proto::{self, control_service_client::ControlServiceClient},
    rpc,
};

use super::{Call, Command, show};

impl Call<'_> {
    pub(super) async fn run_control(
        &self,
        command: Command,
        channel: Channel,
    ) -> Result<(), Failure> {
        let mut control = ControlServiceClient::new(channel.clone());
        let refused = |status: tonic::Status| connect::failure(&status);
        let output = self.context.output;
        match command {
            Command::WrappingKeys => {
                let message = proto::ListWrappingKeysRequest {};
                let answer = control.list_wrapping_keys(self.request(message)).await;
                let keys = answer.map_err(refused)?.into_inner().wrapping_keys;
                output.list(
                    keys.iter().map(show::wrapping_key).collect(),
                    "no wrapping key",
                )
            }
            Command::WrappingKey { id } => {
                let id = hex::decode(&id).map_err(|error| {
                    Failure::new(Exit::Usage, format!("{id:?} is not hexadecimal: {error}"))
                })?;
                let message = proto::GetWrappingKeyRequest { id };
                let answer = control.get_wrapping_key(self.request(message)).await;
                let key = answer.map_err(refused)?.into_inner().wrapping_key;
                let key = key.unwrap_or_default();
                let mut fields = show::wrapping_key(&key);
                fields.push(("public_key", json!(key.public_key_pem)));
                output.fields(fields)
            }
            Command::TokenState => {
                let message = proto::GetTokenStateRequest {};
                let answer = control.get_token_state(self.request(message)).await;
                output.fields(token_state(&answer.map_err(refused)?.into_inner()))
            }
            Command::AuditTail { limit } => {
                let message = proto::TailAuditLogRequest { limit };
                let answer = control.tail_audit_log(self.request(message)).await;
                output.text(&answer.map_err(refused)?.into_inner().entries.join("\n"))
            }
            _ => self.health(channel).await,
        }
    }

    async fn health(&self, channel: Channel) -> Result<(), Failure> {
        let mut health = HealthClient::new(channel);
        let mut rows = Vec::new();
        for service in [rpc::USER_KEY_SERVICE, rpc::CONTROL_SERVICE] {
            let message = HealthCheckRequest {
                service: service.to_owned(),
            };
            let answer = health.check(self.request(message)).await;
            let answer = answer
                .map_err(|status| connect::failure(&status))?
                .into_inner();
            rows.push(vec![
                ("service", json!(service)),
                ("status", json!(answer.status().as_str_name())),
            ]);
        }
        self.context.output.list(rows, "no services")
    }
}

fn token_state(state: &proto::GetTokenStateResponse) -> Vec<crate::cli::output::Field> {
    let serving = match state.serving() {
        proto::TokenServing::Up => "up",
        proto::TokenServing::Down => "down",
        proto::TokenServing::Untrusted => "untrusted",
        proto::TokenServing::Unspecified => "unknown",
    };
    let workers: Vec<String> = state
        .workers
        .iter()
        .map(|worker| format!("pid {} with {} sessions", worker.pid, worker.sessions))
        .collect();
    vec![
        ("serving", json!(serving)),
        ("detail", json!(state.detail)),
        ("label", json!(state.label)),
        ("serial", json!(state.serial)),
        ("model", json!(state.model)),
        ("workers", json!(workers.join(", "))),
        ("queue_length", json!(state.queue_length)),
        ("last_canary", show::time(state.last_canary_time.as_ref())),
    ]
}
