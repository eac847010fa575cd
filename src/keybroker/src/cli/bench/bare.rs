//! The bare loop: RSA-OAEP decryptions through the vendor's module, without the broker's code. The
//! bare loop runs in a separate process, so that its threads and its CPU time are counted
//! separately.

use std::{
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use serde::{Deserialize, Serialize};

use crate::{
    cli::{
        Context, block_on,
        exit::{Exit, Failure},
        pin::log_in,
    },
    config::Config,
    places::Registry,
};
use keybroker_hsm::{Settings, admin::Admin};
use keybroker_store as store;
use keybroker_worker_protocol::{ExpectedKey, PinSource};

use super::cpu::CpuTime;

/// The result of the bare loop.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Bare {
    operations: u32,
    seconds: f64,
    cpu_ms: f64,
    /// Number of voluntary context switches: a thread gave up the CPU to wait.
    waits: u32,
}

impl Bare {
    #[cfg(test)]
    pub(super) fn new(operations: u32, seconds: f64, cpu_ms: f64) -> Self {
        Self {
            operations,
            seconds,
            cpu_ms,
            waits: 0,
        }
    }

    #[cfg(test)]
    pub(super) fn waiting(self, waits: u32) -> Self {
        Self { waits, ..self }
    }

    /// Adds two measurements together.
    pub(super) fn and(self, other: Self) -> Self {
        Self {
            operations: self.operations.saturating_add(other.operations),
            seconds: self.seconds + other.seconds,
            cpu_ms: self.cpu_ms + other.cpu_ms,
            waits: self.waits.saturating_add(other.waits),
        }
    }

    pub(super) fn ops_per_s(&self) -> f64 {
        f64::from(self.operations) / self.seconds
    }

    /// Whether the token's work takes CPU time on this machine. If the token is a separate device
    /// or server, the threads of the module mostly wait for answers.
    pub(super) fn is_local(&self) -> bool {
        self.waits < self.operations.div_ceil(2)
    }

    pub(super) fn cpu_ms_per_op(&self) -> f64 {
        self.cpu_ms / f64::from(self.operations.max(1))
    }
}

/// Runs the bare loop in an admin worker, and counts the CPU time of this worker.
pub(super) fn measure(
    context: &Context,
    key: &ExpectedKey,
    threads: u32,
    seconds: u64,
) -> Result<Bare, Failure> {
    let admin = open(&context.config_for_token()?, key)?;
    let seconds = u32::try_from(seconds).unwrap_or(u32::MAX);
    let (began, before) = (Instant::now(), CpuTime::of(admin.pid())?);
    let count = admin.decrypt_loop(key.id, threads, seconds)?;
    Ok(Bare {
        operations: u32::try_from(count.operations).unwrap_or(u32::MAX),
        waits: u32::try_from(count.waits).unwrap_or(u32::MAX),
        seconds: began.elapsed().as_secs_f64(),
        cpu_ms: CpuTime::of(admin.pid())?.since_ms(&before),
    })
}

/// A command that runs this program with a configuration and an empty standard input.
pub(super) fn ourselves(configuration: &Path) -> Result<Command, Failure> {
    let program =
        std::env::current_exe().map_err(|error| Failure::new(Exit::Internal, error.to_string()))?;
    let mut command = Command::new(program);
    command
        .arg("--config")
        .arg(configuration)
        .stdin(Stdio::null());
    Ok(command)
}

/// The token and its active wrapping key.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    pub(super) key: ExpectedKey,
    /// Length of the modulus in bits, read from the token.
    pub(super) rsa_bits: usize,
    /// Manufacturer and model of the token.
    pub(super) model: String,
}

/// Reads the properties of the active wrapping key from the registry and the token.
pub(super) fn facts(config: &Config) -> Result<Facts, Failure> {
    let registry = block_on(async {
        let store = store::open(&config.store).await?;
        let registry = Registry::read(&*store).await;
        store.close().await;
        registry
    })??;
    let key = active(&registry, config.token())?;
    let admin = open(config, &key)?;
    Ok(Facts {
        rsa_bits: admin.check(key.id)?.modulus_bits,
        model: admin.info().model.clone(),
        key,
    })
}

/// The active wrapping key with the properties that the registry expects on this token.
pub(super) fn active(registry: &Registry, token: &Settings) -> Result<ExpectedKey, Failure> {
    let row = registry
        .rows
        .iter()
        .filter(|row| row.state.may_wrap())
        .max_by_key(|row| row.sequence)
        .ok_or_else(|| {
            Failure::new(Exit::Untrusted, "no wrapping key is active")
                .hint("create a wrapping key with `keybroker key generate`")
        })?;
    let keys = registry.expected(token, false);
    keys.into_iter()
        .find(|key| key.id == row.id)
        .ok_or_else(|| {
            let (id, name) = (row.id, &token.name);
            let what = format!("the active wrapping key {id} is not registered for token {name}");
            Failure::new(Exit::Untrusted, what)
                .hint("pass `--token` with the name of a token that has this wrapping key")
        })
}

/// Logs in to the token that has the key.
pub(super) fn open(config: &Config, key: &ExpectedKey) -> Result<Admin, Failure> {
    let source = match &config.token().pin_file {
        Some(path) => PinSource::File(path.clone()),
        None if config.token().is_without_login() => PinSource::NotNeeded,
        None => {
            return Err(Failure::new(
                Exit::Pin,
                "bench reads the PIN from `token.pin_file`, which is not set",
            ));
        }
    };
    let admin = log_in(config, &source, false, &[&key.token_serial])?;
    admin.know([(key.id, &key.objects)])?;
    Ok(admin)
}
