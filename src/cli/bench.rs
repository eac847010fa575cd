//! `keybroker bench`: the bare token and the served broker, measured in one run on one machine, so that their ratio holds
//! whatever else the machine does.

use std::{
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use clap::Args;
use serde::Deserialize;
use serde_json::json;

use crate::{call::Timestamp, config::Config, hsm::admin::Admin, key::WrappingKeyId, store};

use super::{
    Context, block_on,
    connect::Connection,
    exit::{Exit, Failure},
    output::Field,
};

mod cpu;
mod load;

use cpu::CpuTime;

/// How long the broker may take to open its doors.
const START_TIMEOUT: Duration = Duration::from_mins(1);
const START_PAUSE: Duration = Duration::from_millis(50);

#[derive(Args, Debug)]
pub(super) struct Arguments {
    #[command(flatten)]
    connection: Connection,
    /// Process id of a running broker to measure, with --endpoint; without it one is started for the measurement
    #[arg(long, value_name = "PID", requires = "endpoint")]
    attach: Option<u32>,
    /// Connections, each with one call under way at a time
    #[arg(long, default_value_t = 64)]
    connections: usize,
    /// Seconds of each of the two measurements
    #[arg(long, default_value_t = 30)]
    seconds: u64,
    /// Seconds before the served broker is measured
    #[arg(long, default_value_t = 2)]
    warm_up: u64,
    /// Users to enrol and release keys of
    #[arg(long, default_value_t = 1_000)]
    users: usize,
    /// Threads of the bare loop [default: processors]
    #[arg(long)]
    token_threads: Option<usize>,
    /// Also write the figures to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Arguments of the child that runs the bare loop.
#[derive(Args, Debug)]
pub(super) struct BareArguments {
    #[arg(long)]
    key: String,
    #[arg(long)]
    threads: usize,
    #[arg(long)]
    seconds: u64,
}

/// Runs the bare loop and prints its count and CPU time.
pub(super) fn run_bare(arguments: &BareArguments, context: &Context) -> Result<(), Failure> {
    let config = context.config_for_token()?;
    let id = WrappingKeyId::from_hex(&arguments.key)
        .ok_or_else(|| Failure::new(Exit::Usage, "--key is not a CKA_ID"))?;
    let pin_file = config.token.pin_file.as_deref().ok_or_else(|| {
        Failure::new(
            Exit::Pin,
            "the bare loop reads the PIN from `token.pin_file`",
        )
    })?;
    let pin = crate::hsm::Pin::from_file(pin_file).map_err(|what| Failure::new(Exit::Pin, what))?;
    let admin = Admin::open(&config.token, &pin, false)?;
    let duration = i64::try_from(arguments.seconds * 1_000_000).unwrap_or(i64::MAX);
    let ourselves = std::process::id();
    let (began, before) = (Instant::now(), CpuTime::of(ourselves));
    let until = Timestamp::from_micros(Timestamp::now().micros().saturating_add(duration));
    let operations = admin.decrypt_loop(id, arguments.threads, until)?;
    let cpu_ms = CpuTime::of(ourselves).since_ms(before);
    let seconds = began.elapsed().as_secs_f64();
    context
        .output
        .json(&json!({"operations": operations, "seconds": seconds, "cpu_ms": cpu_ms}))
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct Bare {
    operations: f64,
    seconds: f64,
    cpu_ms: f64,
}

pub(super) fn run(arguments: &Arguments, context: &Context) -> Result<(), Failure> {
    let config = context.config_for_token()?;
    let (key, rsa_bits) = wrapping_key(&config)?;
    let threads = arguments
        .token_threads
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get));
    context.output.note("measuring the bare token");
    let single = bare(context, key, 1, arguments.seconds.div_ceil(3))?;
    let bare = bare(context, key, threads, arguments.seconds)?;
    context.output.note("measuring the served broker");
    let broker = Served::start(arguments, context)?;
    let load = block_on(load::run(&load::Plan {
        connection: arguments.connection.clone(),
        endpoint: broker.endpoint.clone(),
        connections: arguments.connections,
        users: arguments.users,
        warm_up: Duration::from_secs(arguments.warm_up),
        duration: Duration::from_secs(arguments.seconds),
        front: broker.pid,
    }))??;
    drop(broker);
    let mut fields = vec![
        ("rsa_bits", json!(rsa_bits)),
        ("connections", json!(arguments.connections)),
        ("token_threads", json!(threads)),
    ];
    fields.extend(figures(&single, &bare, &load));
    if let Some(path) = &arguments.json {
        let object: serde_json::Map<_, _> = fields
            .iter()
            .map(|(k, v)| ((*k).to_owned(), v.clone()))
            .collect();
        let text = serde_json::to_string_pretty(&object).unwrap_or_default();
        std::fs::write(path, text + "\n").map_err(|error| {
            Failure::new(
                Exit::Usage,
                format!("cannot write {}: {error}", path.display()),
            )
        })?;
    }
    context.output.fields(fields)?;
    if load.errors > 0 {
        let what = format!("{} calls failed: {}", load.errors, load.first_error);
        return Err(Failure::new(Exit::Verification, what));
    }
    Ok(())
}

/// The two measurements side by side.
fn figures(single: &Bare, bare: &Bare, load: &load::Measured) -> Vec<Field> {
    let token_cpu = bare.cpu_ms / bare.operations;
    let served_cpu = load.front_cpu_ms + load.worker_cpu_ms;
    let operations = load.operations_f64();
    let ms = |quantile: f64| {
        let micros = u32::try_from(load.latency_us.value_at_quantile(quantile)).unwrap_or(u32::MAX);
        f64::from(micros) / 1_000.0
    };
    vec![
        (
            "token_ops_per_s",
            json!(round(bare.operations / bare.seconds)),
        ),
        (
            "token_ops_per_s_one_thread",
            json!(round(single.operations / single.seconds)),
        ),
        ("broker_ops_per_s", json!(round(operations / load.seconds))),
        ("share", json!(round(token_cpu / (served_cpu / operations)))),
        ("p50_ms", json!(round(ms(0.5)))),
        ("p99_ms", json!(round(ms(0.99)))),
        ("p999_ms", json!(round(ms(0.999)))),
        ("errors", json!(load.errors)),
        ("token_cpu_ms_per_op", json!(round(token_cpu))),
        (
            "front_cpu_ms_per_op",
            json!(round(load.front_cpu_ms / operations)),
        ),
        (
            "worker_cpu_ms_per_op",
            json!(round(load.worker_cpu_ms / operations)),
        ),
        (
            "load_cpu_ms_per_op",
            json!(round(load.load_cpu_ms / operations)),
        ),
        ("operations", json!(load.operations)),
        ("seconds", json!(round(load.seconds))),
    ]
}

/// Four digits are more than such a measurement can promise.
fn round(value: f64) -> f64 {
    (value * 10_000.0).round() / 10_000.0
}

/// The key that wraps now, and the length of its modulus. The length comes from the envelope's size at run time.
fn wrapping_key(config: &Config) -> Result<(WrappingKeyId, usize), Failure> {
    let rows = block_on(async {
        let store = store::open(&config.store).await?;
        let rows = store.registry().await;
        store.close().await;
        rows
    })??;
    let row = rows
        .iter()
        .filter(|row| row.state.may_wrap())
        .max_by_key(|row| row.sequence)
        .ok_or_else(|| Failure::new(Exit::Untrusted, "no wrapping key is active"))?;
    let pin_file = config
        .token
        .pin_file
        .as_deref()
        .ok_or_else(|| Failure::new(Exit::Pin, "bench reads the PIN from `token.pin_file`"))?;
    let pin = crate::hsm::Pin::from_file(pin_file).map_err(|what| Failure::new(Exit::Pin, what))?;
    let admin = Admin::open(&config.token, &pin, false)?;
    Ok((row.id, admin.check(row.id)?.modulus_bits))
}

fn bare(
    context: &Context,
    key: WrappingKeyId,
    threads: usize,
    seconds: u64,
) -> Result<Bare, Failure> {
    // A process of its own, as in `serve`: the module's threads and CPU time are counted apart from ours.
    let output = ourselves(context)?
        .args(["-o", "json", "token-bench", "--key", &key.to_string()])
        .args([
            "--threads",
            &threads.to_string(),
            "--seconds",
            &seconds.to_string(),
        ])
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| Failure::new(Exit::Internal, error.to_string()))?;
    serde_json::from_slice(&output.stdout).map_err(|error| {
        Failure::new(
            Exit::Token,
            format!("the bare loop failed ({}): {error}", output.status),
        )
    })
}

fn ourselves(context: &Context) -> Result<Command, Failure> {
    let program =
        std::env::current_exe().map_err(|error| Failure::new(Exit::Internal, error.to_string()))?;
    let mut command = Command::new(program);
    command
        .arg("--config")
        .arg(context.config_file())
        .stdin(Stdio::null());
    Ok(command)
}

/// The broker under measurement, stopped when dropped if it was started for it.
struct Served {
    pid: u32,
    endpoint: String,
    child: Option<Child>,
}

#[derive(Deserialize)]
struct ReadyFile {
    listeners: Vec<String>,
}

impl Served {
    fn start(arguments: &Arguments, context: &Context) -> Result<Self, Failure> {
        if let (Some(pid), Some(endpoint)) = (arguments.attach, &arguments.connection.endpoint) {
            return Ok(Self {
                pid,
                endpoint: endpoint.clone(),
                child: None,
            });
        }
        let ready = std::env::temp_dir().join(format!("keybroker-bench-{}", std::process::id()));
        let child = ourselves(context)?
            .arg("serve")
            .arg("--ready-file")
            .arg(&ready)
            .env(crate::telemetry::FILTER_VARIABLE, "warn")
            .spawn()
            .map_err(|error| Failure::new(Exit::Internal, error.to_string()))?;
        let mut served = Self {
            pid: child.id(),
            endpoint: String::new(),
            child: Some(child),
        };
        let until = Instant::now() + START_TIMEOUT;
        while Instant::now() < until && served.is_running() {
            if let Ok(text) = std::fs::read_to_string(&ready) {
                let _left_over = std::fs::remove_file(&ready);
                let parsed: ReadyFile = serde_json::from_str(&text)
                    .map_err(|error| Failure::new(Exit::Internal, error.to_string()))?;
                let address = parsed.listeners.first().cloned().unwrap_or_default();
                served.endpoint = arguments
                    .connection
                    .endpoint
                    .clone()
                    .unwrap_or_else(|| format!("https://{address}"));
                return Ok(served);
            }
            std::thread::sleep(START_PAUSE);
        }
        Err(Failure::new(
            Exit::Unreachable,
            "the broker did not start; run `keybroker serve` to see why, or measure a running one with \
             --attach PID --endpoint URL",
        ))
    }

    fn is_running(&mut self) -> bool {
        self.child
            .as_mut()
            .is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let Some(child) = &mut self.child else { return };
        if let Some(pid) = i32::try_from(child.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw)
        {
            let _ended_already = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let _reaped = child.wait();
    }
}
