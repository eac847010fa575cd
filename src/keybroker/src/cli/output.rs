//! Writes results to standard output, as a table or as JSON, and failures to standard error.

use std::io::{self, Write as _};

use clap::ValueEnum;
use comfy_table::{ContentArrangement, Table, presets};
use serde_json::{Map, Value, json};

use super::{
    entries::{self, WIDTH_MAX},
    exit::{Exit, Failure},
};

/// The format of results.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// A table for people
    Table,
    /// JSON for programs; the field names are stable
    Json,
}

/// Writes the results of a command in the selected format.
#[derive(Clone, Copy, Debug)]
pub(super) struct Output {
    format: Format,
}

/// The name and the value of one field of a result.
pub(super) type Field = (&'static str, Value);

impl Output {
    pub(super) fn new(format: Format) -> Self {
        Self { format }
    }

    pub(super) fn is_json(self) -> bool {
        self.format == Format::Json
    }

    /// Writes an object, with one line for each field.
    pub(super) fn fields(self, fields: Vec<Field>) -> Result<(), Failure> {
        if self.is_json() {
            let object: Map<_, _> = fields.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
            return self.json(&Value::Object(object));
        }
        self.text(&block(&fields))
    }

    /// Writes a list of objects that have the same fields.
    pub(super) fn list(self, rows: Vec<Vec<Field>>, when_empty: &str) -> Result<(), Failure> {
        if self.is_json() {
            let objects = rows
                .into_iter()
                .map(|row| Value::Object(row.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()))
                .collect();
            return self.json(&Value::Array(objects));
        }
        if rows.is_empty() {
            return self.text(when_empty);
        }
        self.text(&list(&rows))
    }

    /// Writes a list of objects in groups. In a table, each value of the first field becomes a
    /// heading, and the other fields are below this heading. JSON output contains the list without
    /// groups.
    pub(super) fn groups(self, rows: Vec<Vec<Field>>, when_empty: &str) -> Result<(), Failure> {
        if self.is_json() || rows.is_empty() {
            return self.list(rows, when_empty);
        }
        let groups: Vec<String> = rows
            .chunk_by(|one, other| one.first() == other.first())
            .map(|group| {
                let heading = group[0].first().map_or_else(String::new, |(name, value)| {
                    format!("{name} {}", plain(value))
                });
                let rest: Vec<Vec<Field>> = group.iter().map(|row| row[1..].to_vec()).collect();
                format!("{heading}\n{}", list(&rest))
            })
            .collect();
        self.text(&groups.join("\n\n"))
    }

    /// Writes a JSON value, regardless of the selected format.
    pub(super) fn json(self, value: &Value) -> Result<(), Failure> {
        let text = serde_json::to_string_pretty(value).unwrap_or_default();
        self.text(&text)
    }

    /// Writes lines of an audit log, either formatted for people or as one JSON array.
    pub(super) fn entries(self, lines: &[String]) -> Result<(), Failure> {
        if !self.is_json() {
            return match lines {
                [] => self.text("no entries"),
                lines => self.text(&entries::text(lines)),
            };
        }
        let parsed: Result<Vec<Value>, _> = lines
            .iter()
            .map(|line| serde_json::from_str(line))
            .collect();
        let parsed = parsed.map_err(|error| {
            let what = format!("a line of the log is not JSON: {error}");
            Failure::new(Exit::Verification, what)
                .hint("`keybroker audit show --raw` shows the unchanged lines")
        })?;
        self.json(&Value::Array(parsed))
    }

    /// Writes one sentence. In JSON output, the sentence is the value of the field `name`.
    pub(super) fn sentence(self, name: &'static str, text: &str) -> Result<(), Failure> {
        if self.is_json() {
            return self.fields(vec![(name, json!(text))]);
        }
        self.text(text)
    }

    /// Writes a string and a line end.
    pub(super) fn text(self, text: &str) -> Result<(), Failure> {
        self.bytes(format!("{text}\n").as_bytes())
    }

    /// Writes bytes unchanged, regardless of the selected format. A closed pipe is not an error.
    #[expect(clippy::unused_self, reason = "all output goes through an `Output`")]
    pub(super) fn bytes(self, bytes: &[u8]) -> Result<(), Failure> {
        let mut stdout = io::stdout().lock();
        match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                let what = format!("cannot write to standard output: {error}");
                Err(Failure::new(Exit::Internal, what))
            }
            _ => Ok(()),
        }
    }

    /// Writes a note to standard error, except with `-o json`.
    pub(super) fn note(self, text: &str) {
        if !self.is_json() {
            complain(text);
        }
    }

    /// Writes a failure with its message and hint to standard error.
    pub(super) fn failure(self, failure: &Failure) {
        if self.is_json() {
            let object = json!({
                "error": failure.message,
                "hint": failure.hint,
                "exit_code": failure.exit.code(),
                "reason": failure.reason,
            });
            complain(&object.to_string());
        } else {
            complain(&format!("error: {}", failure.message));
            if let Some(hint) = &failure.hint {
                complain(&format!("hint: {hint}"));
            }
        }
    }
}

/// Writes a line to standard error. A failed write is ignored, because there is no other place to
/// report it.
fn complain(text: &str) {
    let mut stderr = io::stderr().lock();
    if writeln!(stderr, "{text}").is_err() {
        tracing::debug!("standard error is closed");
    }
}

/// Text of another person for a terminal. Characters that cannot be printed are escaped, for example those that move the cursor or
/// change the direction of the text.
pub(super) fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    // `escape_debug` would also escape quotation marks and the backslashes of an earlier escape.
    for part in text.split_inclusive(['"', '\'', '\\']) {
        let words = part.trim_end_matches(['"', '\'', '\\']);
        shown.extend(words.escape_debug());
        shown.push_str(&part[words.len()..]);
    }
    shown
}

/// Formats rows as a table, or as one block for each row if the table would be too wide.
fn list(rows: &[Vec<Field>]) -> String {
    let table = table(rows);
    if table.lines().all(|line| line.chars().count() <= WIDTH_MAX) {
        return table;
    }
    // A terminal would break the lines of a wide table, and users could not copy shortened values.
    let blocks: Vec<String> = rows.iter().map(|row| block(row)).collect();
    blocks.join("\n\n")
}

/// Formats rows as a table. The table does not show columns without values.
fn table(rows: &[Vec<Field>]) -> String {
    let is_filled = |column: &usize| {
        rows.iter()
            .any(|row| row.get(*column).is_some_and(|(_, value)| !value.is_null()))
    };
    let columns: Vec<usize> = (0..rows.first().map_or(0, Vec::len))
        .filter(is_filled)
        .collect();
    let cells = |row: &[Field], cell: fn(&Field) -> String| -> Vec<String> {
        columns
            .iter()
            .filter_map(|column| row.get(*column))
            .map(cell)
            .collect()
    };
    let headings = rows
        .first()
        .map(|row| cells(row, |(name, _)| (*name).to_owned()));
    let rows: Vec<Vec<String>> = rows
        .iter()
        .map(|row| cells(row, |(_, value)| plain(value)))
        .collect();
    aligned(headings, &rows)
}

/// Formats strings as a table with the given headings.
pub(super) fn text_table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let headings = headings.iter().map(ToString::to_string).collect();
    aligned(Some(headings), rows)
}

fn aligned(headings: Option<Vec<String>>, rows: &[Vec<String>]) -> String {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled);
    if let Some(headings) = headings {
        table.set_header(headings);
    }
    for row in rows {
        table.add_row(row);
    }
    let text = table.to_string();
    let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    lines.join("\n")
}

/// Formats an object, with one line for each field.
fn block(fields: &[Field]) -> String {
    let width = fields.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let lines: Vec<String> = fields
        .iter()
        .map(|(name, value)| format!("{name:width$}  {}", plain(value)))
        .collect();
    lines.join("\n")
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_another_person_cannot_control_the_terminal() {
        for (text, expected) in [
            ("Renée O'Brien \"x\" \\u{7}", "Renée O'Brien \"x\" \\u{7}"),
            ("a\u{1b}[2J\r\nb", "a\\u{1b}[2J\\r\\nb"),
            (
                "\"\u{202e}'\u{2066}\u{200b}\u{9b}",
                "\"\\u{202e}'\\u{2066}\\u{200b}\\u{9b}",
            ),
            ("", ""),
        ] {
            assert_eq!(printable(text), expected);
        }
    }

    #[test]
    fn a_column_without_values_is_left_out() {
        let row = |user: &str, deleted: Value| vec![("user", json!(user)), ("deleted", deleted)];
        let shown = table(&[row("ada", Value::Null), row("bob", Value::Null)]);
        assert!(!shown.contains("deleted"), "{shown}");
        let shown = table(&[row("ada", Value::Null), row("bob", json!("today"))]);
        assert!(
            shown.contains("deleted") && shown.contains("today"),
            "{shown}"
        );
    }
}
