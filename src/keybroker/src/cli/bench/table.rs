//! The results of a document as tables, for the terminal and for a page.

use std::fmt::Write as _;

use serde_json::Value;

use crate::cli::output::text_table;

use super::{
    Scenario,
    document::{Document, Object},
};

/// Measurements of fewer seconds are marked as short, because a few seconds of other load can
/// change their results.
const SHORT_S: u64 = 30;

/// A table with its rows as text.
struct Table {
    /// The title; empty if the document has only one table.
    title: &'static str,
    headings: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

/// A column: its heading, and a function that returns the cell for a row.
type Column = (&'static str, fn(&Object) -> String);

/// The tables of a document.
fn tables(document: &Document) -> Vec<Table> {
    let all = |columns: &[Column]| vec![table("", columns, document.rows.iter())];
    match document.scenario {
        Scenario::Steady => all(STEADY),
        Scenario::Open => all(OPEN),
        Scenario::Overload => all(OVERLOAD),
        Scenario::Fairness => all(FAIRNESS),
        Scenario::Storm => all(STORM),
        Scenario::Restart => all(RESTART),
        Scenario::Connections => {
            let of = |kind: &'static str| {
                let rows = document.rows.iter();
                rows.filter(move |row| row.get("kind").and_then(Value::as_str) == Some(kind))
            };
            vec![
                table("Active connections", ACTIVE, of("active")),
                table("Idle connections", IDLE, of("idle")),
            ]
        }
    }
}

fn table<'a>(
    title: &'static str,
    columns: &[Column],
    rows: impl Iterator<Item = &'a Object>,
) -> Table {
    Table {
        title,
        headings: columns.iter().map(|(heading, _)| *heading).collect(),
        rows: rows
            .map(|row| columns.iter().map(|(_, cell)| cell(row)).collect())
            .collect(),
    }
}

/// The tables for a person at a terminal.
pub(super) fn text(document: &Document) -> String {
    let tables: Vec<String> = tables(document)
        .iter()
        .map(|table| match table.title {
            "" => text_table(&table.headings, &table.rows),
            title => format!("{title}\n{}", text_table(&table.headings, &table.rows)),
        })
        .collect();
    tables.join("\n\n")
}

/// The tables in Markdown, with a line about the conditions of the measurement.
pub(in crate::cli) fn markdown(document: &Document) -> String {
    let mut text = String::new();
    for table in tables(document) {
        if !table.title.is_empty() {
            let _infallible = writeln!(text, "{}:\n", table.title);
        }
        let _infallible = writeln!(
            text,
            "| {} |\n|{}",
            table.headings.join(" | "),
            "---|".repeat(table.headings.len())
        );
        for row in table.rows {
            let _infallible = writeln!(text, "| {} |", row.join(" | "));
        }
        text.push('\n');
    }
    text + &conditions(document)
}

fn conditions(document: &Document) -> String {
    let seconds = document.arguments.get("seconds").and_then(Value::as_u64);
    let seconds = seconds.unwrap_or_default();
    let machine = &document.machine;
    let mut parts = vec![
        format!(
            "token {}, RSA-{}",
            document.token.model, document.token.rsa_bits
        ),
        format!(
            "{}, {} processors, Linux {}",
            machine.cpu, machine.cores, machine.kernel
        ),
        format!("load average at the end: {:.1}", machine.load_average),
        format!("{seconds} s for each measurement"),
    ];
    if seconds < SHORT_S {
        parts.push("**a short run**".to_owned());
    }
    let commit = document.commit.as_deref().unwrap_or("not recorded");
    parts.push(format!(
        "version {}, commit {commit}, started {}",
        document.version, document.started
    ));
    if let Some(note) = &document.note {
        parts.insert(1, note.clone());
    }
    format!("Conditions: {}.\n", parts.join("; "))
}

const STEADY: &[Column] = &[
    ("broker/s", |row| decimal(row, "broker_ops_per_s", 0)),
    ("token/s", |row| decimal(row, "token_ops_per_s", 0)),
    ("share", |row| decimal(row, "share", 2)),
    ("p50 ms", |row| decimal(row, "p50_ms", 1)),
    ("p99 ms", |row| decimal(row, "p99_ms", 1)),
    ("p99.9 ms", |row| decimal(row, "p999_ms", 1)),
    ("front CPU ms", |row| decimal(row, "front_cpu_ms_per_op", 2)),
    ("worker CPU ms", |row| {
        decimal(row, "worker_cpu_ms_per_op", 2)
    }),
    ("beyond token ms", |row| {
        decimal(row, "broker_cpu_ms_per_op_beyond_token", 2)
    }),
    ("errors", |row| decimal(row, "errors", 0)),
];

const OPEN: &[Column] = &[
    ("offered/s", |row| decimal(row, "offered_per_s", 0)),
    ("load", |row| decimal(row, "load", 2)),
    ("in time/s", |row| decimal(row, "in_time_per_s", 0)),
    ("p50 ms", |row| decimal(row, "p50_ms", 1)),
    ("p99 ms", |row| decimal(row, "p99_ms", 1)),
    ("p99.9 ms", |row| decimal(row, "p999_ms", 1)),
    ("late", |row| decimal(row, "late", 0)),
    ("refused", |row| decimal(row, "refused", 0)),
    ("failed", |row| decimal(row, "failed", 0)),
    ("sent late p99 ms", |row| decimal(row, "dispatch_p99_ms", 1)),
];

const OVERLOAD: &[Column] = &[
    ("times", |row| decimal(row, "times", 0)),
    ("deadline ms", |row| decimal(row, "deadline_ms", 0)),
    ("capacity/s", |row| decimal(row, "capacity_per_s", 0)),
    ("goodput", |row| decimal(row, "goodput", 2)),
    ("in time", |row| decimal(row, "in_time", 0)),
    ("late", |row| decimal(row, "late", 0)),
    ("refused", |row| decimal(row, "refused", 0)),
    ("failed", failed_and_unsent),
    ("refusal p50/p99 ms", |row| {
        let [p50, p99] = ["refusal_p50_ms", "refusal_p99_ms"].map(|name| decimal(row, name, 1));
        format!("{p50} / {p99}")
    }),
    ("front MiB", front_memory),
    ("sent late p99 ms", |row| decimal(row, "dispatch_p99_ms", 1)),
];

const FAIRNESS: &[Column] = &[
    ("callers", |row| decimal(row, "callers", 0)),
    ("callers/s", |row| decimal(row, "callers_in_time_per_s", 0)),
    ("callers refused", |row| decimal(row, "callers_refused", 0)),
    ("p50 ms", |row| decimal(row, "p50_ms", 1)),
    ("p99 ms", |row| decimal(row, "p99_ms", 1)),
    ("max ms", |row| decimal(row, "max_ms", 1)),
    ("in time", |row| decimal(row, "in_time", 0)),
    ("late", |row| decimal(row, "late", 0)),
    ("refused", |row| decimal(row, "refused", 0)),
    ("failed", failed_and_unsent),
    ("sent late p99 ms", |row| decimal(row, "dispatch_p99_ms", 1)),
];

const ACTIVE: &[Column] = &[
    ("connections", |row| decimal(row, "connections", 0)),
    ("in time/s", |row| decimal(row, "in_time_per_s", 0)),
    ("relative to 64", |row| decimal(row, "relative_to_64", 2)),
    ("p50 ms", |row| decimal(row, "p50_ms", 1)),
    ("p99 ms", |row| decimal(row, "p99_ms", 1)),
    ("late", |row| decimal(row, "late", 0)),
    ("refused", |row| decimal(row, "refused", 0)),
    ("failed", |row| decimal(row, "failed", 0)),
];

const IDLE: &[Column] = &[
    ("API", |row| word(row, "api")),
    ("connections", |row| decimal(row, "connections", 0)),
    ("KiB per connection", |row| {
        decimal(row, "kib_per_connection", 1)
    }),
    ("front MiB", front_memory),
    ("counted as", |row| word(row, "memory")),
];

const STORM: &[Column] = &[
    ("members", |row| decimal(row, "members", 0)),
    ("within s", |row| decimal(row, "arrival_seconds", 0)),
    ("with key", |row| decimal(row, "with_key", 0)),
    ("within 10 s", |row| decimal(row, "within_10_s", 0)),
    ("late", |row| decimal(row, "late", 0)),
    ("refused", |row| decimal(row, "refused", 0)),
    ("failed", failed_and_unsent),
    ("p50 ms", |row| decimal(row, "p50_ms", 1)),
    ("p99 ms", |row| decimal(row, "p99_ms", 1)),
    ("max ms", |row| decimal(row, "max_ms", 1)),
    ("front CPU ms", |row| {
        decimal(row, "front_cpu_ms_per_member", 2)
    }),
];

const RESTART: &[Column] = &[
    ("restarts", |row| decimal(row, "restarts", 0)),
    ("calls/s", |row| decimal(row, "offered_per_s", 0)),
    ("in time", |row| decimal(row, "in_time", 0)),
    ("late", |row| decimal(row, "late", 0)),
    ("refused", |row| decimal(row, "refused", 0)),
    ("failed", failed_and_unsent),
    ("stop ms", |row| decimal(row, "stop_ms", 0)),
    ("start ms", |row| decimal(row, "start_ms", 0)),
    ("gap ms", |row| decimal(row, "gap_ms", 0)),
    ("p99 ms", |row| decimal(row, "p99_ms", 1)),
    ("max ms", |row| decimal(row, "max_ms", 0)),
    ("sent late p99 ms", |row| decimal(row, "dispatch_p99_ms", 1)),
];

/// Returns a field of a row as a number; `None` if the field is missing or not a number.
pub(in crate::cli) fn number(row: &Object, name: &str) -> Option<f64> {
    row.get(name)?.as_f64()
}

fn decimal(row: &Object, name: &str, places: usize) -> String {
    number(row, name).map_or_else(|| "-".to_owned(), |value| format!("{value:.places$}"))
}

fn word(row: &Object, name: &str) -> String {
    let text = row.get(name).and_then(Value::as_str);
    text.unwrap_or("-").to_owned()
}

/// The number of calls that failed, and the number of calls that the load generator could not send.
fn failed_and_unsent(row: &Object) -> String {
    let failed = decimal(row, "failed", 0);
    match number(row, "unsent") {
        Some(unsent) if unsent > 0.0 => format!("{failed} (and {unsent:.0} not sent)"),
        _ => failed,
    }
}

fn front_memory(row: &Object) -> String {
    let mib = |name| number(row, name).unwrap_or_default() / 1_024.0;
    format!(
        "{:.0} -> {:.0}",
        mib("front_kib_before"),
        mib("front_kib_after")
    )
}
