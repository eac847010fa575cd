//! The bare loop: the vendor's module and nothing else of ours between decrypts, in a process of its own, so that its
//! threads and its CPU time are counted apart.

use std::{
    process::{Command, Stdio},
    time::Instant,
};

use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    cli::{
        Context, block_on,
        exit::{Exit, Failure},
        pin::log_in,
    },
    config::Config,
};
use keybroker_core::{call::Timestamp, key::WrappingKeyId};
use keybroker_pkcs11::admin::Admin;
use keybroker_store as store;
use keybroker_store::RegistryRow;
use keybroker_worker_protocol::{ExpectedKey, Pin};

use super::cpu::CpuTime;

/// Arguments of the child that runs the bare loop.
#[derive(Args, Debug)]
pub(in crate::cli) struct Arguments {
    #[arg(long)]
    key: String,
    #[arg(long)]
    threads: u32,
    #[arg(long)]
    seconds: u64,
}

/// What the bare loop did.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Bare {
    operations: u32,
    seconds: f64,
    cpu_ms: f64,
}

impl Bare {
    #[cfg(test)]
    pub(super) fn new(operations: u32, seconds: f64, cpu_ms: f64) -> Self {
        Self {
            operations,
            seconds,
            cpu_ms,
        }
    }

    /// Both measurements as one.
    pub(super) fn and(self, other: Self) -> Self {
        Self {
            operations: self.operations.saturating_add(other.operations),
            seconds: self.seconds + other.seconds,
            cpu_ms: self.cpu_ms + other.cpu_ms,
        }
    }

    pub(super) fn ops_per_s(&self) -> f64 {
        f64::from(self.operations) / self.seconds
    }

    pub(super) fn cpu_ms_per_op(&self) -> f64 {
        self.cpu_ms / f64::from(self.operations.max(1))
    }
}

/// Body of the child: runs the loop and prints what it did.
pub(in crate::cli) fn run(arguments: &Arguments, context: &Context) -> Result<(), Failure> {
    let config = context.config_for_token()?;
    let id = WrappingKeyId::from_hex(&arguments.key)
        .ok_or_else(|| Failure::new(Exit::Usage, "--key is not a CKA_ID"))?;
    let admin = open(&config)?;
    let threads = usize::try_from(arguments.threads).unwrap_or(1);
    let duration = i64::try_from(arguments.seconds.saturating_mul(1_000_000)).unwrap_or(i64::MAX);
    let ourselves = std::process::id();
    let (began, before) = (Instant::now(), CpuTime::of(ourselves)?);
    let until = Timestamp::from_micros(Timestamp::now().micros().saturating_add(duration));
    let operations = admin.decrypt_loop(id, threads, until)?;
    let done = Bare {
        operations: u32::try_from(operations).unwrap_or(u32::MAX),
        seconds: began.elapsed().as_secs_f64(),
        cpu_ms: CpuTime::of(ourselves)?.since_ms(&before),
    };
    context.output.json(&json!(done))
}

/// Runs the child.
pub(super) fn measure(
    context: &Context,
    key: WrappingKeyId,
    threads: u32,
    seconds: u64,
) -> Result<Bare, Failure> {
    let output = ourselves(context)?
        .args(["-o", "json", "token-bench", "--key", &key.to_string()])
        .args(["--threads", &threads.to_string()])
        .args(["--seconds", &seconds.to_string()])
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| Failure::new(Exit::Internal, error.to_string()))?;
    serde_json::from_slice(&output.stdout).map_err(|_| {
        Failure::new(
            Exit::Token,
            format!("the bare loop failed: {}", output.status),
        )
        .hint("its own message stands above; `keybroker token check` looks at the token")
    })
}

/// This program, with this configuration, and nothing to read.
pub(super) fn ourselves(context: &Context) -> Result<Command, Failure> {
    let program =
        std::env::current_exe().map_err(|error| Failure::new(Exit::Internal, error.to_string()))?;
    let mut command = Command::new(program);
    command
        .arg("--config")
        .arg(context.config_file())
        .stdin(Stdio::null());
    Ok(command)
}

/// The key that wraps now, and the length of its modulus, read from the token.
pub(super) fn wrapping_key(config: &Config) -> Result<(WrappingKeyId, usize), Failure> {
    let rows = block_on(async {
        let store = store::open(&config.store).await?;
        let rows = store.registry().await;
        store.close().await;
        rows
    })??;
    let id = active(&rows)?.id;
    Ok((id, open(config)?.check(id)?.modulus_bits))
}

/// The key that wraps now.
pub(super) fn active(rows: &[RegistryRow]) -> Result<ExpectedKey, Failure> {
    let row = rows
        .iter()
        .filter(|row| row.state.may_wrap())
        .max_by_key(|row| row.sequence)
        .ok_or_else(|| {
            Failure::new(Exit::Untrusted, "no wrapping key is active")
                .hint("make one with `keybroker key generate`")
        })?;
    Ok(ExpectedKey {
        id: row.id,
        fingerprint: row.fingerprint,
    })
}

pub(super) fn open(config: &Config) -> Result<Admin, Failure> {
    let path = config.token.pin_file.as_deref().ok_or_else(|| {
        Failure::new(
            Exit::Pin,
            "bench reads the PIN from `token.pin_file`, which is not set",
        )
    })?;
    let pin = Pin::from_file(path).map_err(|what| Failure::new(Exit::Pin, what))?;
    log_in(config, &pin, false)
}
