//! Logs and metrics of this process.

use std::io::IsTerminal as _;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::EnvFilter;

/// Environment variable with the log filter, such as `info` or `keybroker=debug`.
pub const FILTER_VARIABLE: &str = "KEYBROKER_LOG";

/// Seconds: from far below one token operation to the longest deadline.
const SECONDS: [f64; 16] = [
    0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    10.0, 30.0,
];
const ENTRIES: [f64; 11] = [
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1_024.0,
];

/// Sends log lines to standard error: JSON for a service, text for a person at a terminal.
pub fn init_logs(json: bool, default_filter: &str) {
    let filter =
        EnvFilter::try_from_env(FILTER_VARIABLE).unwrap_or_else(|_| EnvFilter::new(default_filter));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        // A log that cannot be written (disk full, pipe closed) must not end a call: by default the failure is printed
        // to standard error, which panics when that is where the log goes.
        .log_internal_errors(false)
        .with_writer(std::io::stderr);
    let set = if json {
        builder.json().flatten_event(true).try_init()
    } else {
        builder
            .without_time()
            .with_target(false)
            .with_ansi(std::io::stderr().is_terminal())
            .try_init()
    };
    if let Err(error) = set {
        tracing::debug!(%error, "logs were set up already");
    }
}

/// Logs panics by their place and never by their message, which may hold what a caller has sent.
pub fn install_panic_hook() {
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string);
        let thread = std::thread::current();
        tracing::error!(
            alarm = "bug",
            place = place.as_deref().unwrap_or("unknown"),
            thread = thread.name().unwrap_or("unnamed"),
            "panic"
        );
    }));
}

/// Installs the recorder that `/metrics` renders.
pub fn init_metrics() -> Result<PrometheusHandle, String> {
    PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)
        .and_then(|builder| {
            builder.set_buckets_for_metric(Matcher::Suffix("_entries".to_owned()), &ENTRIES)
        })
        .map_err(|error| error.to_string())?
        .install_recorder()
        .map_err(|error| error.to_string())
}
