//! All metrics of the broker, each with name, unit, help and labels. `docs/metrics.md` has a list of all metrics, and a test
//! compares the list with this module.
//!
//! Names follow the rules of Prometheus: base units (seconds, bytes), `_total` at the end of a counter, and no unit in a label. A
//! counter starts at 0 for each label value that is known in advance, so that a rate includes the first event.

pub use metrics::{Counter as CounterHandle, Gauge as GaugeHandle, Histogram as HistogramHandle};
use metrics::{Key, Label as Pair, Level, Metadata, SharedString, Unit, with_recorder};

use crate::{alert::Alert, error::Reason, principal::Action};

/// Buckets for times, from far below one token operation to the longest deadline.
const SECONDS: &[f64] = &[
    0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    10.0, 30.0,
];
/// Buckets for the number of audit entries that one sync makes durable.
const ENTRIES: &[f64] = &[
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1_024.0,
];
const METADATA: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, None);

/// A label, with its values if they are known in advance.
#[derive(Debug)]
pub struct Label {
    name: &'static str,
    values: fn() -> Vec<&'static str>,
}

impl Label {
    const fn fixed(name: &'static str, values: fn() -> Vec<&'static str>) -> Self {
        Self { name, values }
    }

    /// A label whose values come from the configuration or the operator.
    const fn open(name: &'static str) -> Self {
        Self {
            name,
            values: Vec::new,
        }
    }
}

static ALERT: Label = Label::fixed("alert", || Alert::ALL.map(Alert::name).to_vec());
static ACTION: Label = Label::fixed("action", || Action::ALL.map(Action::as_str).to_vec());
static REASON: Label = Label::fixed("reason", reasons);
/// The outcome of a call: a reason, or `OK`.
static OUTCOME: Label = Label::fixed("reason", || [vec!["OK"], reasons()].concat());
static CONNECTION_CAUSE: Label = Label::fixed("cause", || {
    vec!["unauthenticated", "principal", "resets", "status"]
});
static HANDSHAKE_CAUSE: Label = Label::fixed("cause", || HANDSHAKE_CAUSES.to_vec());
static TOKEN_CAUSE: Label = Label::fixed("cause", || TOKEN_CAUSES.to_vec());
static EFFECT: Label = Label::fixed("effect", || vec!["permit", "forbid"]);
static METHOD: Label = Label::fixed("method", || vec!["GET", "POST", "PUT"]);
static REWRAP_RESULT: Label =
    Label::fixed("result", || vec!["moved", "changed-meanwhile", "failed"]);
static NOTICE_RESULT: Label = Label::fixed("result", || vec!["delivered", "failed", "dropped"]);
static ASSURANCE: Label = Label::open("assurance");
static STATUS: Label = Label::open("status");
static ISSUER: Label = Label::open("issuer");
static POLICY: Label = Label::open("policy");
static STATEMENT: Label = Label::open("statement");
static FILE: Label = Label::open("file");
static WRAPPING_KEY: Label = Label::open("wrapping_key");
static VERSION: Label = Label::open("version");
/// The configured name of a token.
static TOKEN: Label = Label::open("token");

/// Why a connection ended before its first call.
pub const HANDSHAKE_CAUSES: [&str; 16] = [
    "alert",
    "bad_certificate",
    "closed",
    "displaced",
    "expired",
    "incompatible",
    "misbehaved",
    "no_certificate",
    "not_http2",
    "not_tls",
    "not_yet_valid",
    "revocation_list_ended",
    "revocation_unknown",
    "revoked",
    "timeout",
    "unknown_ca",
];

/// Why an access token was refused.
pub const TOKEN_CAUSES: [&str; 18] = [
    "algorithm",
    "audience",
    "claim",
    "expired",
    "header",
    "issuer",
    "kid",
    "lifetime",
    "malformed",
    "mapping",
    "no-keys",
    "not-yet-valid",
    "overage",
    "oversized",
    "scope",
    "signature",
    "subject",
    "type",
];

fn reasons() -> Vec<&'static str> {
    Reason::ALL.map(Reason::as_str).to_vec()
}

/// The properties that all metrics have in common.
#[derive(Debug)]
struct Declared<const N: usize> {
    name: &'static str,
    help: &'static str,
    labels: [&'static Label; N],
}

impl<const N: usize> Declared<N> {
    fn declaration(&self) -> Declaration<'_> {
        let Self { name, help, labels } = self;
        Declaration { name, help, labels }
    }

    fn key<V: Into<SharedString>>(&self, values: [V; N]) -> Key {
        let pairs = self.labels.iter().zip(values);
        let pairs = pairs.map(|(label, value)| Pair::new(label.name, value));
        Key::from_parts(self.name, pairs.collect::<Vec<_>>())
    }

    fn unit(&self) -> Option<Unit> {
        self.name.ends_with("_seconds").then_some(Unit::Seconds)
    }

    /// All combinations of label values that are known in advance.
    fn known(&self) -> Vec<[&'static str; N]> {
        let mut known = vec![[""; N]];
        for (at, label) in self.labels.iter().enumerate() {
            let values = (label.values)();
            known = known
                .into_iter()
                .flat_map(|row| {
                    values.iter().map(move |value| {
                        let mut row = row;
                        row[at] = value;
                        row
                    })
                })
                .collect();
        }
        known
    }
}

/// The number of events since the start of the process.
#[derive(Debug)]
pub struct Counter<const N: usize>(Declared<N>);

impl<const N: usize> Counter<N> {
    /// The series with these label values, which are in the order of the declared labels.
    pub fn with<V: Into<SharedString>>(&self, values: [V; N]) -> CounterHandle {
        let key = self.0.key(values);
        with_recorder(|recorder| recorder.register_counter(&key, &METADATA))
    }
}

impl Counter<0> {
    /// Counts one event.
    pub fn increment(&self) {
        self.with::<&str>([]).increment(1);
    }
}

/// A value that can rise and fall.
#[derive(Debug)]
pub struct Gauge<const N: usize>(Declared<N>);

impl<const N: usize> Gauge<N> {
    /// The series with these label values, which are in the order of the declared labels.
    pub fn with<V: Into<SharedString>>(&self, values: [V; N]) -> GaugeHandle {
        let key = self.0.key(values);
        with_recorder(|recorder| recorder.register_gauge(&key, &METADATA))
    }
}

impl Gauge<0> {
    /// The series of a metric without labels.
    pub fn handle(&self) -> GaugeHandle {
        self.with::<&str>([])
    }

    /// Sets the gauge to 1 or 0.
    pub fn set_flag(&self, is_set: bool) {
        self.handle().set(f64::from(u8::from(is_set)));
    }

    /// Sets the gauge to a count.
    pub fn set_count(&self, count: usize) {
        self.handle().set(to_float(count));
    }
}

/// Converts a count to the value of a metric.
pub fn to_float(count: usize) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}

/// A distribution of values.
#[derive(Debug)]
pub struct Histogram<const N: usize> {
    declared: Declared<N>,
    buckets: &'static [f64],
}

impl<const N: usize> Histogram<N> {
    /// The series with these label values, which are in the order of the declared labels.
    pub fn with<V: Into<SharedString>>(&self, values: [V; N]) -> HistogramHandle {
        let key = self.declared.key(values);
        with_recorder(|recorder| recorder.register_histogram(&key, &METADATA))
    }
}

impl Histogram<0> {
    /// The series of a metric without labels.
    pub fn handle(&self) -> HistogramHandle {
        self.with::<&str>([])
    }
}

/// The properties that all metrics have in common, for metrics with and without labels.
#[derive(Clone, Copy, Debug)]
pub struct Declaration<'a> {
    name: &'static str,
    help: &'static str,
    labels: &'a [&'static Label],
}

/// Any declared metric.
pub trait Metric: Sync {
    /// `counter`, `gauge` or `histogram`.
    fn kind(&self) -> &'static str;
    /// Name, help and labels.
    fn declaration(&self) -> Declaration<'_>;
    /// Describes the metric to the recorder. For a counter, the function also creates the series whose label values are known in
    /// advance.
    fn register(&self);

    /// Upper bounds of the buckets of a histogram.
    fn buckets(&self) -> Option<&'static [f64]> {
        None
    }

    /// The name that a metrics collector sees.
    fn name(&self) -> &'static str {
        self.declaration().name
    }

    /// The help text, one sentence.
    fn help(&self) -> &'static str {
        self.declaration().help
    }

    /// The names of the labels.
    fn labels(&self) -> Vec<&'static str> {
        let labels = self.declaration().labels.iter();
        labels.map(|label| label.name).collect()
    }
}

impl<const N: usize> Metric for Counter<N> {
    fn kind(&self) -> &'static str {
        "counter"
    }

    fn declaration(&self) -> Declaration<'_> {
        self.0.declaration()
    }

    fn register(&self) {
        let Declared { name, help, .. } = self.0;
        with_recorder(|recorder| {
            recorder.describe_counter(name.into(), self.0.unit(), help.into());
        });
        for values in self.0.known() {
            self.with(values).increment(0);
        }
    }
}

impl<const N: usize> Metric for Gauge<N> {
    fn kind(&self) -> &'static str {
        "gauge"
    }

    fn declaration(&self) -> Declaration<'_> {
        self.0.declaration()
    }

    fn register(&self) {
        let Declared { name, help, .. } = self.0;
        with_recorder(|recorder| {
            recorder.describe_gauge(name.into(), self.0.unit(), help.into());
        });
    }
}

impl<const N: usize> Metric for Histogram<N> {
    fn kind(&self) -> &'static str {
        "histogram"
    }

    fn declaration(&self) -> Declaration<'_> {
        self.declared.declaration()
    }

    fn buckets(&self) -> Option<&'static [f64]> {
        Some(self.buckets)
    }

    fn register(&self) {
        let Declared { name, help, .. } = self.declared;
        with_recorder(|recorder| {
            recorder.describe_histogram(name.into(), self.declared.unit(), help.into());
        });
    }
}

/// Counts an alert. If the alert has a separate counter, this counter is incremented, too.
pub fn count_alert(alert: Alert) {
    ALERTS.with([alert.name()]).increment(1);
    match alert {
        Alert::BulkRelease => BULK_RELEASES.increment(),
        Alert::AuditTampered => AUDIT_TAMPERING.increment(),
        Alert::TlsReload => TLS_RELOAD_FAILURES.increment(),
        Alert::PolicyReload => POLICY_RELOAD_FAILURES.increment(),
        _ => {}
    }
}

/// Registers every metric with the recorder of this process.
pub fn register_all() {
    for metric in ALL {
        metric.register();
    }
}

macro_rules! declare {
    (
        counters { $($counter:ident = $counter_name:literal [$($counter_label:ident),*] $counter_help:literal;)* }
        gauges { $($gauge:ident = $gauge_name:literal [$($gauge_label:ident),*] $gauge_help:literal;)* }
        histograms { $($histogram:ident = $histogram_name:literal [$($histogram_label:ident),*] $buckets:ident $histogram_help:literal;)* }
    ) => {
        $(
            #[doc = $counter_help]
            pub static $counter: Counter<{ <[&Label]>::len(&[$(&$counter_label),*]) }> = Counter(Declared {
                name: $counter_name,
                help: $counter_help,
                labels: [$(&$counter_label),*],
            });
        )*
        $(
            #[doc = $gauge_help]
            pub static $gauge: Gauge<{ <[&Label]>::len(&[$(&$gauge_label),*]) }> = Gauge(Declared {
                name: $gauge_name,
                help: $gauge_help,
                labels: [$(&$gauge_label),*],
            });
        )*
        $(
            #[doc = $histogram_help]
            pub static $histogram: Histogram<{ <[&Label]>::len(&[$(&$histogram_label),*]) }> = Histogram {
                declared: Declared {
                    name: $histogram_name,
                    help: $histogram_help,
                    labels: [$(&$histogram_label),*],
                },
                buckets: $buckets,
            };
        )*
        /// Every metric, in the order of the documentation.
        pub static ALL: &[&dyn Metric] = &[$(&$counter,)* $(&$gauge,)* $(&$histogram,)*];
    };
}

declare! {
    counters {
        ALERTS = "keybroker_alerts_total" [ALERT] "Alerts that were logged, by name.";
        CALLS = "keybroker_calls_total" [ACTION, OUTCOME] "Calls of authenticated principals, by action and outcome.";
        REFUSALS = "keybroker_refusals_total" [REASON] "Calls and connections that were refused before a principal was authenticated.";
        BULK_RELEASES = "keybroker_bulk_releases_total" [] "Number of times that a service released keys of unusually \
            many users.";
        RECORDS_DAMAGED = "keybroker_records_damaged_total" [] "Damaged rows that calls found in the database.";
        REST_CALLS = "keybroker_rest_calls_total" [METHOD, STATUS] "Requests to /user-keys, by HTTP status.";
        REST_RETRIES = "keybroker_rest_retries_total" [REASON] "Number of times that a REST request waited for the \
            end of a short fault instead of failing.";
        REST_RETRIES_REFUSED = "keybroker_rest_retries_refused_total" [] "REST requests that failed immediately \
            because too many requests (in total or of one principal) were waiting for their next attempt.";
        MESSAGES_REFUSED = "keybroker_messages_refused_total" [] "gRPC messages that were refused because the messages in progress, in total or of one principal, had too many bytes.";
        CLIENT_SECRETS_REFUSED =
            "keybroker_client_secrets_refused_total" [] "Client secrets that were not verified because too many other client secrets were being verified.";
        ACCESS_TOKEN_REFUSALS = "keybroker_access_token_refusals_total" [ISSUER, TOKEN_CAUSE] "Access tokens that were refused.";
        ISSUER_FETCH_FAILURES = "keybroker_issuer_fetch_failures_total" [ISSUER] "Failed attempts to renew the key set of an issuer.";
        POLICY_ERRORS = "keybroker_policy_errors_total" [POLICY] "Policies that could not be evaluated for a call.";
        POLICY_RELOAD_FAILURES = "keybroker_policy_reload_failures_total" [] "Changed policies that were refused.";
        AUDIT_TAMPERING =
            "keybroker_audit_tampering_total" [] "Number of times that the broker found that another process had \
             changed the files of the audit log.";
        LAST_USES_DROPPED =
            "keybroker_last_uses_dropped_total" [] "Last-use times that were dropped because too many last-use times were \
             waiting to be stored.";
        LOG_LINES_SUPPRESSED = "keybroker_log_lines_suppressed_total" [] "Suppressed log lines about unauthenticated callers.";
        CONNECTIONS_REFUSED = "keybroker_connections_refused_total" [CONNECTION_CAUSE] "Connections that were closed because a limit was reached.";
        CONNECTIONS_FULL = "keybroker_connections_full_total" [] "Number of times that a new connection had to wait \
            because the limit of connections was reached.";
        ACCEPT_FAILURES = "keybroker_accept_failures_total" [] "Failed attempts to accept a connection.";
        HANDSHAKES_FAILED = "keybroker_handshakes_failed_total" [HANDSHAKE_CAUSE] "Connections that ended before their first call.";
        TLS_RELOAD_FAILURES = "keybroker_tls_reload_failures_total" [] "Changed TLS files that were refused.";
        STORE_RETRIES = "keybroker_store_retries_total" [] "Database transactions that were tried again because of contention.";
        STORE_RECONNECTS = "keybroker_store_reconnects_total" [] "Database statements that were tried again on another connection.";
        STORE_SLOW_STATEMENTS = "keybroker_store_slow_statements_total" [STATEMENT] "Database statements that took longer than a second.";
        TOKEN_WORKER_RESTARTS = "keybroker_token_worker_restarts_total" [TOKEN] "Token workers that ended and were replaced.";
        TOKEN_FAILOVERS = "keybroker_token_failovers_total" [TOKEN] "Jobs that another token did because this token failed or answered late.";
        NOTICES = "keybroker_notices_total" [NOTICE_RESULT] "Notices to members, by result: delivered, failed (given up), dropped (too many were waiting).";
        NOTICE_RETRIES = "keybroker_notice_retries_total" [] "Number of times that a notice to a member is sent again.";
        REWRAP_ROWS = "keybroker_rewrap_rows_total" [REWRAP_RESULT] "Rows that a re-wrap handled, by result.";
    }
    gauges {
        BUILD_INFO = "keybroker_build_info" [VERSION] "Always 1; the label is the version of the program.";
        CALLS_IN_PROGRESS = "keybroker_calls_in_progress" [] "Calls in progress.";
        REST_RETRIES_WAITING = "keybroker_rest_retries_waiting" [] "REST requests that wait for their next attempt.";
        CALLS_WAITING = "keybroker_calls_waiting" [] "Releases that wait until the front can work on them.";
        CONNECTIONS = "keybroker_connections" [] "Open connections of all listeners.";
        CERTIFICATE_EXPIRY = "keybroker_certificate_expiry_timestamp_seconds" [FILE] "Time when a listener's \
            certificate expires, in seconds since 1970.";
        CLIENT_CRL_EXPIRY =
            "keybroker_client_crl_expiry_timestamp_seconds" [FILE] "Time when the first of a listener's revocation \
             lists expires, in seconds since 1970.";
        CLIENT_CRL_PROBLEMS =
            "keybroker_client_crl_problems" [FILE] "Revocation lists of a listener that are refused or missing; the lists that were accepted before stay in use until they expire.";
        ISSUER_KEYS_AGE = "keybroker_issuer_keys_age_seconds" [ISSUER] "Time since the key set of an issuer was fetched.";
        ISSUER_REFUSED_KEYS = "keybroker_issuer_refused_keys" [ISSUER] "Weak or malformed keys in the key set of an issuer.";
        POLICIES = "keybroker_policies" [EFFECT] "Policies in force.";
        AUDIT_WRITABLE = "keybroker_audit_writable" [] "1 while audit entries become durable, else 0.";
        STORE_UP = "keybroker_store_up" [] "1 while the database answers, else 0.";
        REGISTRY_ALTERED = "keybroker_registry_altered" [] "1 when the stored registry of wrapping keys fails verification, else 0.";
        REWRAP_RUNNING = "keybroker_rewrap_running" [] "1 while this broker works on a re-wrap, else 0.";
        REWRAP_ROWS_LEFT = "keybroker_rewrap_rows_left" [] "Revisions and API clients that this broker's re-wrap \
            still had to move to the new wrapping key at the last count.";
        WRAPPING_KEY_USABLE =
            "keybroker_wrapping_key_usable" [WRAPPING_KEY] "1 while a registered wrapping key (in any state) is on the token and verified, else 0.";
        WRAPPING_KEY_AGE = "keybroker_wrapping_key_age_seconds" [] "Time since the wrapping key that wraps new user \
            keys was registered; 0 if no key wraps new user keys.";
        KEY_DESTRUCTIONS_SCHEDULED = "keybroker_key_destructions_scheduled" [] "Wrapping keys whose destruction is scheduled.";
        KEY_DESTRUCTIONS_DUE = "keybroker_key_destructions_due" [] "Wrapping keys whose scheduled destruction is due and not done yet.";
        NOTICES_WAITING = "keybroker_notices_waiting" [] "Notices to members that wait for their delivery or are being delivered.";
        TOKEN_SERVING = "keybroker_token_serving" [TOKEN] "1 while calls can use the token, else 0; NaN after the token was removed from the configuration.";
        TOKEN_ASSURANCE = "keybroker_token_assurance" [TOKEN, ASSURANCE] "1 for the word that describes the protection of the token's keys, 0 for the other words.";
        TOKEN_WORKERS = "keybroker_token_workers" [TOKEN] "Token workers that are ready.";
        TOKEN_QUEUE_LENGTH = "keybroker_token_queue_length" [TOKEN] "Jobs that wait for a session of the token.";
        TOKEN_SELF_TEST_AGE = "keybroker_token_self_test_age_seconds" [TOKEN] "Time since the last successful self-test of the token.";
        TOKEN_PIN_LATCHED = "keybroker_token_pin_latched" [TOKEN] "1 when the token rejected the PIN and no login is tried, else 0.";
    }
    histograms {
        CALL_DURATION = "keybroker_call_duration_seconds" [ACTION] SECONDS "Time from the start of a call to its outcome.";
        CALL_OVERHEAD =
            "keybroker_call_overhead_seconds" [] SECONDS "Time that the broker needs for an unwrap, without the time \
             in the queue and on the token.";
        TOKEN_QUEUE_WAIT = "keybroker_token_queue_wait_seconds" [TOKEN] SECONDS "Time that jobs waited for a session of the token.";
        TOKEN_OPERATION = "keybroker_token_operation_duration_seconds" [TOKEN] SECONDS "Time that the token needs for a job.";
        AUDIT_GROUP_ENTRIES = "keybroker_audit_group_entries" [] ENTRIES "Audit entries that became durable together.";
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// The rules of `promtool check metrics`.
    #[test]
    fn names_follow_the_rules_of_prometheus() {
        const OTHER_UNITS: [&str; 14] = [
            "s",
            "ms",
            "us",
            "ns",
            "sec",
            "milliseconds",
            "minutes",
            "hours",
            "days",
            "weeks",
            "b",
            "kb",
            "mb",
            "kilobytes",
        ];
        let mut names = BTreeSet::new();
        for metric in ALL {
            let (name, kind) = (metric.name(), metric.kind());
            assert!(names.insert(name), "{name} is declared twice");
            assert!(name.starts_with("keybroker_"), "{name}");
            let is_plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
            assert!(name.chars().all(is_plain), "{name}");
            assert_eq!(name.ends_with("_total"), kind == "counter", "{name}");
            for suffix in ["_count", "_sum", "_bucket", "_info"] {
                let is_info = suffix == "_info" && name == BUILD_INFO.name();
                assert!(is_info || !name.ends_with(suffix), "{name}");
            }
            for word in name.split('_') {
                assert!(!OTHER_UNITS.contains(&word), "{name}: {word}");
                assert!(
                    !["counter", "gauge", "histogram", "summary"].contains(&word),
                    "{name}"
                );
            }
            if name.contains("_seconds") {
                assert!(name.ends_with("_seconds"), "{name}");
            }
            assert!(metric.help().ends_with('.'), "{name}");
            for label in metric.labels() {
                assert!(
                    !["le", "quantile", "job", "instance"].contains(&label),
                    "{name}"
                );
            }
            assert_eq!(metric.buckets().is_some(), kind == "histogram");
        }
        assert!(names.len() > 40);
    }

    #[test]
    fn known_label_values_are_combined() {
        let calls = CALLS.0.known();
        assert_eq!(calls.len(), Action::ALL.len() * (Reason::ALL.len() + 1));
        assert!(calls.contains(&["user_key.unwrap", "OK"]));
        // A metric without labels starts with one series. A metric with a label whose values are not known in advance
        // starts without series.
        assert_eq!(BULK_RELEASES.0.known(), [[""; 0]]);
        assert!(POLICY_ERRORS.0.known().is_empty());
    }
}
