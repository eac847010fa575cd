//! Sets up the logs and metrics of this process.

use std::io::IsTerminal as _;

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::EnvFilter;

use keybroker_core::metrics;

/// Environment variable with the log filter, such as `info` or `keybroker=debug`.
pub const FILTER_VARIABLE: &str = "KEYBROKER_LOG";

/// Sends log lines to standard error: JSON for a service, text for a person at a terminal.
pub fn init_logs(json: bool, default_filter: &str) {
    let filter =
        EnvFilter::try_from_env(FILTER_VARIABLE).unwrap_or_else(|_| EnvFilter::new(default_filter));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        // A failure to write the log (disk full, pipe closed) must not end a call. By default, the
        // tracing library panics if writing the log to standard error fails.
        .log_internal_errors(false)
        .with_writer(std::io::stderr);
    let set = if json {
        // The current span already contains the call id; the list of all spans would repeat the
        // call id.
        builder
            .json()
            .flatten_event(true)
            .with_current_span(true)
            .with_span_list(false)
            .try_init()
    } else {
        builder
            .without_time()
            .with_target(false)
            .with_ansi(std::io::stderr().is_terminal())
            .try_init()
    };
    if let Err(error) = set {
        tracing::debug!(%error, "logging is already initialised");
    }
}

/// Logs the source location of a panic without the panic message, because the message may contain
/// data of a caller.
pub fn install_panic_hook() {
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string);
        let thread = std::thread::current();
        keybroker_core::alert!(
            Bug,
            place = place.as_deref().unwrap_or("unknown"),
            thread = thread.name().unwrap_or("unnamed"),
            "panic"
        );
    }));
}

/// Installs the metrics recorder for `/metrics`, and registers every metric of the broker.
pub fn init_metrics() -> Result<PrometheusHandle, BuildError> {
    let mut builder = PrometheusBuilder::new();
    for metric in metrics::ALL {
        if let Some(buckets) = metric.buckets() {
            let name = Matcher::Full(metric.name().to_owned());
            builder = builder.set_buckets_for_metric(name, buckets)?;
        }
    }
    let handle = builder.install_recorder()?;
    metrics::register_all();
    metrics_process::Collector::default().describe();
    metrics::BUILD_INFO
        .with([env!("CARGO_PKG_VERSION")])
        .set(1.0);
    Ok(handle)
}
