//! The charts of each scenario.

use serde_json::Value;

use crate::cli::bench::{
    Scenario,
    document::{Document, Object},
    table::number,
};

use super::svg::{Axis, Chart, Mark, Series};

/// A chart with the suffix of its file name.
pub(super) struct Named {
    /// The suffix; empty if the document has only one chart.
    pub(super) suffix: &'static str,
    pub(super) svg: Chart,
}

/// The charts of a document. A document of the scenario `steady` has only one row and no chart.
pub(super) fn charts(document: &Document) -> Vec<Named> {
    let one = |svg| vec![Named { suffix: "", svg }];
    match document.scenario {
        Scenario::Steady => Vec::new(),
        Scenario::Open => one(latency(document)),
        Scenario::Overload => one(goodput(document)),
        Scenario::Fairness => one(fairness(document)),
        Scenario::Storm => one(storm(document)),
        Scenario::Restart => one(restart(document)),
        Scenario::Connections => vec![
            Named {
                suffix: "-throughput",
                svg: throughput(document),
            },
            Named {
                suffix: "-memory",
                svg: memory(document),
            },
        ],
    }
}

/// A series of one field's values over the values of another field.
fn series<'a>(
    name: impl Into<String>,
    rows: impl IntoIterator<Item = &'a Object>,
    x: &str,
    y: &str,
) -> Series {
    let points = rows
        .into_iter()
        .filter_map(|row| Some((number(row, x)?, number(row, y)?)));
    Series {
        name: name.into(),
        points: points.collect(),
    }
}

fn latency(document: &Document) -> Chart {
    let fields = [("p50", "p50_ms"), ("p99", "p99_ms"), ("p99.9", "p999_ms")];
    let rows = &document.rows;
    Chart {
        title: "Latency over offered load",
        subtitle: subtitle(document),
        x: Axis::linear("calls per second, offered"),
        y: Axis::logarithmic("milliseconds"),
        mark: Mark::Lines,
        series: fields
            .map(|(name, field)| series(name, rows, "offered_per_s", field))
            .to_vec(),
    }
}

fn goodput(document: &Document) -> Chart {
    let mut deadlines: Vec<u64> = document
        .rows
        .iter()
        .filter_map(|row| row.get("deadline_ms")?.as_u64())
        .collect();
    deadlines.sort_unstable();
    deadlines.dedup();
    let with = |deadline: u64| {
        let rows = document.rows.iter();
        rows.filter(move |row| row.get("deadline_ms").and_then(Value::as_u64) == Some(deadline))
    };
    Chart {
        title: "Goodput over load",
        subtitle: subtitle(document),
        x: Axis::linear("calls, in multiples of the capacity"),
        y: Axis::linear("answers in time, divided by the capacity"),
        mark: Mark::Lines,
        series: deadlines
            .into_iter()
            .map(|deadline| {
                series(
                    format!("deadline {deadline} ms"),
                    with(deadline),
                    "times",
                    "goodput",
                )
            })
            .collect(),
    }
}

fn fairness(document: &Document) -> Chart {
    let names = document
        .rows
        .iter()
        .map(|row| number(row, "callers").map_or_else(String::new, |count| format!("{count:.0}")));
    let bars = |name: &str, field: &str| {
        let values = document
            .rows
            .iter()
            .map(|row| number(row, field).unwrap_or_default());
        Series::of_categories(name, values)
    };
    Chart {
        title: "Latency of a principal with few calls while another principal makes many calls",
        subtitle: subtitle(document),
        x: Axis::categories("callers of the other principal", names),
        y: Axis::linear("milliseconds"),
        mark: Mark::Bars,
        series: vec![bars("p50", "p50_ms"), bars("p99", "p99_ms")],
    }
}

fn of_kind<'a>(document: &'a Document, kind: &'static str) -> impl Iterator<Item = &'a Object> {
    let rows = document.rows.iter();
    rows.filter(move |row| row.get("kind").and_then(Value::as_str) == Some(kind))
}

fn throughput(document: &Document) -> Chart {
    Chart {
        title: "Throughput over active connections",
        subtitle: subtitle(document),
        x: Axis::logarithmic("connections"),
        y: Axis::linear("unwraps per second"),
        mark: Mark::Lines,
        series: vec![series(
            "unwraps per second",
            of_kind(document, "active"),
            "connections",
            "in_time_per_s",
        )],
    }
}

fn memory(document: &Document) -> Chart {
    let names = of_kind(document, "idle").map(|row| {
        row.get("api")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    });
    let values =
        of_kind(document, "idle").map(|row| number(row, "kib_per_connection").unwrap_or_default());
    Chart {
        title: "Memory of the front for each idle connection",
        subtitle: subtitle(document),
        x: Axis::categories("API", names),
        y: Axis::linear("KiB per connection"),
        mark: Mark::Bars,
        series: vec![Series::of_categories("KiB per connection", values)],
    }
}

fn storm(document: &Document) -> Chart {
    let sum = |name: &str, field: &str| {
        let mut total = 0.0;
        let points = document.timeline.iter().filter_map(|row| {
            total += number(row, field)?;
            Some((number(row, "second")? + 1.0, total))
        });
        Series {
            name: name.to_owned(),
            points: std::iter::once((0.0, 0.0)).chain(points).collect(),
        }
    };
    Chart {
        title: "Members who fetch their keys",
        subtitle: subtitle(document),
        x: Axis::linear("seconds"),
        y: Axis::linear("members"),
        mark: Mark::Lines,
        series: vec![
            sum("arrived", "arrived"),
            sum("have their key", "with_key"),
            sum("got no key", "without_key"),
        ],
    }
}

fn restart(document: &Document) -> Chart {
    let rate = |name: &str, field: &str| {
        let points = document.timeline.iter().filter_map(|row| {
            // The count of an interval of 0.1 s becomes a rate per second.
            Some((number(row, "ms")? / 1_000.0, number(row, field)? * 10.0))
        });
        Series {
            name: name.to_owned(),
            points: points.collect(),
        }
    };
    Chart {
        title: "Calls of a client that retries, during restarts",
        subtitle: subtitle(document),
        x: Axis::linear("seconds"),
        y: Axis::linear("calls per second"),
        mark: Mark::Lines,
        series: vec![
            rate("answered in time", "in_time"),
            rate("not answered in time", "not_in_time"),
        ],
    }
}

/// The token, and the note of the run, if there is a note.
fn subtitle(document: &Document) -> String {
    let token = &document.token;
    let note = document.note.as_ref();
    let note = note.map_or_else(String::new, |note| format!(", {note}"));
    format!("{}, RSA-{}{note}", token.model, token.rsa_bits)
}
