//! The result of a measurement as one JSON document. `docs/performance.md` describes this document.

use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::cli::{
    exit::{Exit, Failure},
    output::Field,
};

use super::{Bench, Scenario, machine::Machine};

/// The version of the document's format. `keybroker bench-report` rejects documents of other
/// versions.
pub(in crate::cli) const FORMAT: u32 = 1;

/// A JSON object in the document.
pub(in crate::cli) type Object = Map<String, Value>;

/// One run of `keybroker bench`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::cli) struct Document {
    /// The version of the document's format: [`FORMAT`].
    pub(in crate::cli) format: u32,
    pub(in crate::cli) scenario: Scenario,
    /// The version of the program.
    pub(in crate::cli) version: String,
    /// The commit of the program, from `--commit`.
    pub(in crate::cli) commit: Option<String>,
    /// The start of the run, in UTC (RFC 3339).
    pub(in crate::cli) started: String,
    /// Duration of the complete run in seconds, including preparations.
    pub(in crate::cli) duration_s: f64,
    pub(in crate::cli) machine: Machine,
    pub(in crate::cli) token: Token,
    pub(in crate::cli) note: Option<String>,
    /// The arguments of the scenario, with defaults.
    pub(in crate::cli) arguments: Object,
    /// The results. The fields depend on the scenario.
    pub(in crate::cli) rows: Vec<Object>,
    /// Counts for short intervals of time; empty in scenarios without a timeline.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(in crate::cli) timeline: Vec<Object>,
    /// For `steady`: a copy of the row's fields at the top level, as in earlier releases.
    #[serde(flatten)]
    figures: Object,
}

/// The token and its active wrapping key.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::cli) struct Token {
    /// Manufacturer and model.
    pub(in crate::cli) model: String,
    pub(in crate::cli) rsa_bits: usize,
}

/// The results of a scenario.
#[derive(Clone, Debug, Default)]
pub(super) struct Results {
    pub(super) arguments: Vec<Field>,
    pub(super) rows: Vec<Vec<Field>>,
    pub(super) timeline: Vec<Vec<Field>>,
    /// The error message of a run that has results but failed.
    pub(super) failure: Option<String>,
}

/// The start of a run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    started: OffsetDateTime,
    began: Instant,
}

impl Clock {
    pub(super) fn start() -> Self {
        Self {
            started: OffsetDateTime::now_utc(),
            began: Instant::now(),
        }
    }
}

impl Document {
    pub(super) fn new(bench: &Bench<'_>, clock: &Clock, results: Results) -> Self {
        let arguments = bench.arguments;
        let rows: Vec<Object> = results.rows.into_iter().map(object).collect();
        let figures = match (arguments.scenario, rows.first()) {
            (Scenario::Steady, Some(row)) => row.clone(),
            _ => Object::new(),
        };
        let started = clock.started.replace_nanosecond(0).unwrap_or(clock.started);
        let common = [
            ("seconds", json!(arguments.seconds)),
            ("users", json!(arguments.users().count())),
        ];
        Self {
            format: FORMAT,
            scenario: arguments.scenario,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            commit: arguments.commit.clone(),
            started: started.format(&Rfc3339).unwrap_or_default(),
            duration_s: round(clock.began.elapsed().as_secs_f64()),
            machine: Machine::this(),
            token: Token {
                model: bench.token.model.clone(),
                rsa_bits: bench.token.rsa_bits,
            },
            note: arguments.note.clone(),
            arguments: object(common.into_iter().chain(results.arguments)),
            rows,
            timeline: results.timeline.into_iter().map(object).collect(),
            figures,
        }
    }

    /// Reads a document.
    pub(in crate::cli) fn parse(text: &str) -> Result<Self, ParseError> {
        let value: Value = serde_json::from_str(text).map_err(ParseError::Json)?;
        match value.get("format").and_then(Value::as_u64) {
            None => return Err(ParseError::OtherFile),
            Some(format) if format != u64::from(FORMAT) => return Err(ParseError::Format(format)),
            Some(_) => {}
        }
        serde_json::from_value(value).map_err(ParseError::Json)
    }

    pub(super) fn to_value(&self) -> Value {
        serde_json::to_value(self).unwrap_or_default()
    }
}

/// An error while a document is read from a file.
#[derive(Debug, thiserror::Error)]
pub(in crate::cli) enum ParseError {
    /// The file is not JSON, or a field is missing or has another type.
    #[error("{0}")]
    Json(#[source] serde_json::Error),
    /// The file has no field `format`.
    #[error("no field `format`: `keybroker bench --json` of this release did not write this file")]
    OtherFile,
    /// The file was written by another release.
    #[error("the file has format {0}, and this release reads format {FORMAT}")]
    Format(u64),
}

fn object(fields: impl IntoIterator<Item = Field>) -> Object {
    let fields = fields.into_iter();
    fields
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

/// Rounds to four decimal places, because the measurement is not more accurate.
pub(super) fn round(value: f64) -> f64 {
    (value * 10_000.0).round() / 10_000.0
}

/// A rounded number, or null if the value is `None` or not finite.
pub(super) fn figure(value: impl Into<Option<f64>>) -> Value {
    json!(value.into().map(round))
}

/// A count as a floating-point number. Counts above `u32::MAX`, which no run reaches, become
/// `u32::MAX`.
pub(super) fn real(count: u64) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}

/// Returns the first failure, if there is one.
pub(super) fn first_failure(failures: impl IntoIterator<Item = Option<String>>) -> Option<String> {
    failures.into_iter().flatten().next()
}

/// Returns the failure of a scenario without results.
pub(super) fn nothing(what: &str) -> Failure {
    Failure::new(Exit::Verification, what)
}
