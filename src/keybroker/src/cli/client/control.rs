//! Calls of the admin API and of the health service.

use clap::Subcommand;
use keybroker_client::{Service, ServiceHealth, WrappingKeyId, proto};
use serde_json::{Value, json};

use crate::cli::{
    exit::{Exit, Failure},
    output::Field,
};

use super::{Caller, arguments, refusal, show};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List the wrapping keys
    WrappingKeys,
    /// Show one wrapping key with its public key
    WrappingKey {
        /// Id of the wrapping key, 32 hexadecimal digits
        #[arg(value_parser = arguments::wrapping_key_id)]
        id: WrappingKeyId,
    },
    /// Show the state of the token and of its workers
    TokenState,
    /// Show the last entries of the broker's audit log
    AuditTail {
        /// Number of entries to show, 1 to 1000
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1_000))]
        limit: u32,
    },
    /// Show the health of the broker's services; the exit code is 10 unless every service is
    /// healthy
    Health,
}

impl Caller {
    pub(super) async fn control(&self, command: Command) -> Result<(), Failure> {
        let (client, failure) = (&self.client, |error| refusal::failure(&error));
        match command {
            Command::WrappingKeys => {
                let listed = client.list_wrapping_keys().await.map_err(failure)?;
                let rows = listed.iter().map(show::wrapping_key).collect();
                self.output.list(rows, "no wrapping key")
            }
            Command::WrappingKey { id } => {
                let key = client.get_wrapping_key(id).await.map_err(failure)?;
                let mut fields = show::wrapping_key(&key);
                fields.push(("public_key", json!(key.public_key_pem)));
                self.output.fields(fields)
            }
            Command::TokenState => {
                let state = client.get_token_state().await.map_err(failure)?;
                self.output
                    .fields(token_state(&state, self.output.is_json()))
            }
            Command::AuditTail { limit } => {
                let entries = client.tail_audit_log(limit).await.map_err(failure)?;
                self.output.entries(&entries)
            }
            Command::Health => self.health().await,
        }
    }

    async fn health(&self) -> Result<(), Failure> {
        let mut rows = Vec::new();
        let mut all_serve = true;
        for service in Service::ALL {
            let health = self.client.check_health(service).await;
            let health = health.map_err(|error| refusal::failure(&error))?;
            all_serve &= health == ServiceHealth::Serving;
            rows.push(vec![
                ("service", json!(service.name())),
                ("status", json!(health.name())),
            ]);
        }
        self.output.list(rows, "no services")?;
        if all_serve {
            return Ok(());
        }
        let failure = Failure::new(Exit::Refused, "not every service is healthy");
        Err(failure.hint("`client token-state` and the broker's log show the cause"))
    }
}

const fn serving(serving: proto::TokenServing) -> &'static str {
    match serving {
        proto::TokenServing::Up => "up",
        proto::TokenServing::Down => "down",
        proto::TokenServing::Untrusted => "untrusted",
        proto::TokenServing::Unspecified => "unknown",
    }
}

fn token_state(state: &proto::GetTokenStateResponse, json: bool) -> Vec<Field> {
    let mut fields = vec![
        ("serving", json!(serving(state.serving()))),
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
    ];
    // Brokers of earlier releases do not send the state of each token.
    if !state.tokens.is_empty() {
        fields.push(("tokens", tokens(&state.tokens, json)));
    }
    fields
}

/// The state of each token. The text output shows the details of the tokens only in the field
/// `detail`.
fn tokens(tokens: &[proto::TokenState], json: bool) -> Value {
    if !json {
        let texts: Vec<String> = tokens
            .iter()
            .map(|token| match token.assurance.as_str() {
                "" => format!("{} is {}", token.name, serving(token.serving())),
                word => format!("{} is {} ({word})", token.name, serving(token.serving())),
            })
            .collect();
        return json!(texts.join(", "));
    }
    let object = |token: &proto::TokenState| {
        json!({
            "name": token.name,
            "priority": token.priority,
            "serving": serving(token.serving()),
            "detail": token.detail,
            "label": token.label,
            "serial": token.serial,
            "model": token.model,
            "assurance": token.assurance,
            "workers": workers(&token.workers, json),
            "queue_length": token.queue_length,
            "last_self_test": show::time(token.last_self_test_time.as_ref()),
            "wrapping_keys": token.wrapping_key_ids.iter().map(hex::encode).collect::<Vec<_>>(),
        })
    };
    tokens.iter().map(object).collect()
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
