//! Formats audit entries for people, with one block for each entry. A block is not wider than a
//! terminal. Programs use the JSON output.

use clap::Args;
use serde_json::Value;

use keybroker_core::call::Timestamp;

/// Maximum width of the output, in columns.
pub(super) const WIDTH_MAX: usize = 100;

/// Width of the column with the action, so that the outcomes are aligned.
const ACTION_WIDTH: usize = 26;
/// Fields that a block does not repeat below its first line. The first line of a block shows the
/// listed fields except `log_id`, which is the same in every entry.
const SHOWN_FIRST: [&str; 5] = ["time_us", "action", "outcome", "reason", "log_id"];

/// Filters for entries of an audit log.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct Filter {
    /// Show only entries with this action, such as `user_key.unwrap`
    #[arg(long, value_name = "ACTION")]
    action: Option<String>,
    /// Show only entries with this outcome: `ok`, `denied`, `failed` or `unknown`
    #[arg(long, value_name = "OUTCOME")]
    outcome: Option<String>,
    /// Show only entries with this reason, such as `POLICY`
    #[arg(long, value_name = "REASON")]
    reason: Option<String>,
    /// Show only entries of this principal
    #[arg(long, value_name = "NAME")]
    principal: Option<String>,
    /// Show only entries about keys of this user
    #[arg(long, value_name = "USER")]
    user: Option<String>,
    /// Show only entries about this record
    #[arg(long, value_name = "ID")]
    record_id: Option<String>,
    /// Show only entries of this call
    #[arg(long, value_name = "ID")]
    call_id: Option<String>,
}

impl Filter {
    /// Returns true if no filter is set, so that every entry passes.
    pub(super) fn is_empty(&self) -> bool {
        self.wanted().next().is_none()
    }

    fn wanted(&self) -> impl Iterator<Item = (&'static str, &str)> {
        [
            ("action", &self.action),
            ("outcome", &self.outcome),
            ("reason", &self.reason),
            ("principal", &self.principal),
            ("user", &self.user),
            ("record_id", &self.record_id),
            ("call_id", &self.call_id),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name, value.as_deref()?)))
    }

    /// Whether a line passes all filters. A line that is not JSON never passes a filter.
    pub(super) fn passes(&self, line: &str) -> bool {
        let Ok(entry) = serde_json::from_str::<Value>(line) else {
            return false;
        };
        self.wanted()
            .all(|(name, value)| entry.get(name).and_then(Value::as_str) == Some(value))
    }
}

/// Formats lines of an audit log for people. A line that is not JSON is shown unchanged.
pub(super) fn text(lines: &[String]) -> String {
    let blocks: Vec<String> = lines.iter().map(|line| block(line)).collect();
    blocks.join("\n")
}

fn block(line: &str) -> String {
    let Ok(Value::Object(entry)) = serde_json::from_str::<Value>(line) else {
        return line.to_owned();
    };
    let text = |name: &str| entry.get(name).and_then(Value::as_str).unwrap_or_default();
    let at = entry.get("time_us").and_then(Value::as_i64);
    let at = at.map_or_else(|| "-".to_owned(), time);
    let (action, outcome, reason) = (text("action"), text("outcome"), text("reason"));
    let mut block = format!("{at}  {action:ACTION_WIDTH$}  {outcome} {reason}")
        .trim_end()
        .to_owned();
    let mut width = WIDTH_MAX;
    for (name, value) in &entry {
        if SHOWN_FIRST.contains(&name.as_str()) || (name == "kind" && value == "decision") {
            continue;
        }
        let value = match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        let field = format!("{name}={value}");
        if width + 2 + field.chars().count() > WIDTH_MAX {
            block.push_str("\n ");
            width = 1;
        }
        block.push(' ');
        block.push_str(&field);
        width += 1 + field.chars().count();
    }
    block
}

/// Formats a time with a precision of milliseconds.
fn time(micros: i64) -> String {
    let text = Timestamp::from_micros(micros.div_euclid(1_000) * 1_000).to_string();
    match text.strip_suffix('Z').map(|text| text.split_once('.')) {
        Some(Some((seconds, fraction))) => format!("{seconds}.{fraction:0<3}Z"),
        Some(None) => format!("{}.000Z", text.trim_end_matches('Z')),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = r#"{"action":"user_key.unwrap","call_id":"0192f0c1-2345-7000-8000-000000000001","key_name":"vault","kind":"decision","log_id":"00112233445566778899aabbccddeeff","outcome":"denied","peer":"192.0.2.7:4711","policy":"default-deny","principal":"URI:spiffe://example.org/a-service-with-a-long-name","reason":"POLICY","sequence":7,"tenant":"acme","time_us":1700000000500000,"user":"ada"}"#;

    #[test]
    fn an_entry_is_readable_and_fits_a_terminal() {
        let shown = text(&[LINE.to_owned()]);
        assert!(
            shown.starts_with(
                "2023-11-14T22:13:20.500Z  user_key.unwrap             denied POLICY\n"
            ),
            "{shown}"
        );
        for field in [
            "user=ada",
            "key_name=vault",
            "sequence=7",
            "peer=192.0.2.7:4711",
        ] {
            assert!(shown.contains(field), "{shown}");
        }
        assert!(
            !shown.contains("log_id") && !shown.contains("decision"),
            "{shown}"
        );
        assert!(
            shown.lines().all(|line| line.chars().count() <= WIDTH_MAX),
            "{shown}"
        );
        assert_eq!(text(&["not JSON".to_owned()]), "not JSON");
        assert_eq!(time(1_700_000_000_000_000), "2023-11-14T22:13:20.000Z");
    }

    #[test]
    fn a_filter_compares_whole_values() {
        let filter = |set: fn(&mut Filter)| {
            let mut filter = Filter::default();
            set(&mut filter);
            filter
        };
        assert!(Filter::default().is_empty() && Filter::default().passes(LINE));
        let users = filter(|filter| filter.user = Some("ada".to_owned()));
        assert!(users.passes(LINE) && !users.is_empty() && !users.passes("{"));
        let other = filter(|filter| filter.user = Some("ad".to_owned()));
        assert!(!other.passes(LINE));
        let both = filter(|filter| {
            filter.user = Some("ada".to_owned());
            filter.outcome = Some("ok".to_owned());
        });
        assert!(!both.passes(LINE));
    }
}
