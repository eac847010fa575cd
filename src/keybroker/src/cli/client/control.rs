//! Calls of the control plane and of the health service.

use clap::Subcommand;
use serde_json::{Value, json};
use tonic::{Code, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::cli::{
    exit::{Exit, Failure},
    output::Field,
};
use keybroker_api::rpc;
use keybroker_proto as proto;
use keybroker_proto::control_service_client::ControlServiceClient;

use super::{Caller, refusal, show};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List the wrapping keys
    WrappingKeys,
    /// Show one wrapping key with its public key
    WrappingKey {
        /// `CKA_ID` of the key, 32 hexadecimal digits
        id: String,
    },
    /// Show the token and its workers
    TokenState,
    /// Show the last entries of the broker's audit log
    AuditTail {
        /// Number of entries, 1 to 1000
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1_000))]
        limit: u32,
    },
    /// Show the health of the services; fails unless all of them serve
    Health,
}

impl Caller {
    pub(super) async fn control(&self, command: Command) -> Result<(), Failure> {
        let mut service = ControlServiceClient::new(self.channel.clone());
        match command {
            Command::WrappingKeys => {
                let message = proto::ListWrappingKeysRequest {};
                let listed = self
                    .retried(message, async |request| {
                        service.list_wrapping_keys(request).await
                    })
                    .await?;
                let rows = listed
                    .wrapping_keys
                    .iter()
                    .map(show::wrapping_key)
                    .collect();
                self.output.list(rows, "no wrapping key")
            }
            Command::WrappingKey { id } => {
                let id = hex::decode(&id).map_err(|error| {
                    Failure::new(Exit::Usage, format!("{id:?} is not hexadecimal: {error}"))
                })?;
                let message = proto::GetWrappingKeyRequest { id };
                let got = self
                    .retried(message, async |request| {
                        service.get_wrapping_key(request).await
                    })
                    .await?;
                let key = got.wrapping_key.unwrap_or_default();
                let mut fields = show::wrapping_key(&key);
                fields.push(("public_key", json!(key.public_key_pem)));
                self.output.fields(fields)
            }
            Command::TokenState => {
                let message = proto::GetTokenStateRequest {};
                let state = self
                    .retried(message, async |request| {
                        service.get_token_state(request).await
                    })
                    .await?;
                self.output
                    .fields(token_state(&state, self.output.is_json()))
            }
            Command::AuditTail { limit } => {
                let message = proto::TailAuditLogRequest { limit };
                let tail = self
                    .retried(message, async |request| {
                        service.tail_audit_log(request).await
                    })
                    .await?;
                self.output.entries(&tail.entries)
            }
            Command::Health => self.health().await,
        }
    }

    async fn health(&self) -> Result<(), Failure> {
        let mut rows = Vec::new();
        let mut all_serve = true;
        for service in [rpc::USER_KEY_SERVICE, rpc::CONTROL_SERVICE] {
            let status = self.health_of(self.channel.clone(), service).await?;
            all_serve &= status == "SERVING";
            rows.push(vec![("service", json!(service)), ("status", json!(status))]);
        }
        self.output.list(rows, "no services")?;
        if all_serve {
            return Ok(());
        }
        let failure = Failure::new(Exit::Refused, "not every service serves");
        Err(failure.hint("`client token-state` and the broker's log show the cause"))
    }

    async fn health_of(&self, channel: Channel, service: &str) -> Result<String, Failure> {
        let message = HealthCheckRequest {
            service: service.to_owned(),
        };
        match HealthClient::new(channel)
            .check(self.request(message))
            .await
        {
            Ok(answer) => Ok(answer.get_ref().status().as_str_name().to_owned()),
            // Health answers for the services that the broker has told it of.
            Err(status) if status.code() == Code::NotFound => Ok("SERVICE_UNKNOWN".to_owned()),
            Err(status) => Err(refusal::failure(&status)),
        }
    }
}

fn token_state(state: &proto::GetTokenStateResponse, json: bool) -> Vec<Field> {
    let serving = match state.serving() {
        proto::TokenServing::Up => "up",
        proto::TokenServing::Down => "down",
        proto::TokenServing::Untrusted => "untrusted",
        proto::TokenServing::Unspecified => "unknown",
    };
    vec![
        ("serving", json!(serving)),
        ("detail", json!(state.detail)),
        ("label", json!(state.label)),
        ("serial", json!(state.serial)),
        ("model", json!(state.model)),
        ("workers", workers(&state.workers, json)),
        ("queue_length", json!(state.queue_length)),
        (
            "last_self_test",
            show::time(state.last_canary_time.as_ref()),
        ),
    ]
}

fn workers(workers: &[proto::WorkerState], json: bool) -> Value {
    if json {
        let object = |worker: &proto::WorkerState| {
            json!({
                "pid": worker.pid,
                "sessions": worker.sessions,
                "jobs_in_flight": worker.jobs_in_flight,
                "generation": worker.generation,
            })
        };
        return workers.iter().map(object).collect();
    }
    let texts: Vec<String> = workers
        .iter()
        .map(|worker| format!("pid {} with {} sessions", worker.pid, worker.sessions))
        .collect();
    json!(texts.join(", "))
}
