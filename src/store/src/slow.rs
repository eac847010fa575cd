//! Logs slow statements. A log line contains the name of a statement instead of its text. Each
//! statement is logged at most once a minute.

use std::{
    collections::HashMap,
    sync::{LazyLock, Mutex, PoisonError},
    time::{Duration, Instant},
};

use keybroker_core::metrics;

/// A statement is slow if it took longer than this time, including the time for which it waited for
/// locks.
const SLOW: Duration = Duration::from_secs(1);
/// Shortest interval between two log lines about one statement. Each log line contains the number of lines that were
/// omitted since the previous log line.
const INTERVAL: Duration = Duration::from_mins(1);

static SEEN: LazyLock<Mutex<Seen>> = LazyLock::new(Mutex::default);

/// Records the duration of a statement, even if the statement failed.
pub(super) fn note(statement: &'static str, took: Duration) {
    if took < SLOW {
        return;
    }
    let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
    let name = seen.name(statement);
    let line = seen.line(name, Instant::now());
    drop(seen);
    metrics::STORE_SLOW_STATEMENTS.with([name]).increment(1);
    if let Some(unlogged) = line {
        tracing::warn!(
            statement = name,
            took_ms = took.as_millis(),
            unlogged,
            "slow database statement"
        );
    }
}

/// Registers the names of an engine's statements.
pub(super) fn learn(names: Vec<(&'static str, String)>) {
    let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
    for (statement, name) in names {
        // The amount of leaked memory is bounded, because the program has only a few hundred
        // statements.
        seen.names
            .entry(statement)
            .or_insert_with(|| Box::leak(name.into_boxed_str()));
    }
}

#[derive(Debug, Default)]
struct Seen {
    /// The names, by statement.
    names: HashMap<&'static str, &'static str>,
    /// For each name, the time of the last log line and the number of lines that were omitted since then.
    lines: HashMap<&'static str, (Instant, u64)>,
}

impl Seen {
    fn name(&self, statement: &'static str) -> &'static str {
        match self.names.get(statement) {
            Some(name) => name,
            // `COMMIT` and similar statements have no registered name.
            None if statement.bytes().all(|byte| byte.is_ascii_uppercase()) => statement,
            None => "other",
        }
    }

    /// Returns the number of omitted lines if a log line has to be written now.
    fn line(&mut self, name: &'static str, now: Instant) -> Option<u64> {
        match self.lines.get_mut(name) {
            Some((last, unlogged)) if now.saturating_duration_since(*last) < INTERVAL => {
                *unlogged += 1;
                None
            }
            entry => {
                let unlogged = entry.map_or(0, |(_, unlogged)| *unlogged);
                self.lines.insert(name, (now, 0));
                Some(unlogged)
            }
        }
    }
}

/// A statement, or a struct of statements. The name of each statement is the name of its field.
pub(super) trait Named {
    fn names_below(&self, name: &str, names: &mut Vec<(&'static str, String)>);
}

impl Named for &'static str {
    fn names_below(&self, name: &str, names: &mut Vec<(&'static str, String)>) {
        names.push((self, name.to_owned()));
    }
}

impl<T: Named> Named for Option<T> {
    fn names_below(&self, name: &str, names: &mut Vec<(&'static str, String)>) {
        if let Some(statement) = self {
            statement.names_below(name, names);
        }
    }
}

/// Defines a struct of statements, and implements [`Named`] for the struct.
macro_rules! named {
    ($(#[$attribute:meta])* $sees:vis struct $name:ident {
        $($(#[$of_field:meta])* $field_sees:vis $field:ident: $type:ty,)*
    }) => {
        $(#[$attribute])* $sees struct $name {
            $($(#[$of_field])* $field_sees $field: $type,)*
        }

        impl $crate::slow::Named for $name {
            fn names_below(&self, name: &str, names: &mut Vec<(&'static str, String)>) {
                let prefix = if name.is_empty() { String::new() } else { format!("{name}.") };
                $($crate::slow::Named::names_below(
                    &self.$field, &format!("{prefix}{}", stringify!($field)), names,
                );)*
            }
        }
    };
}
pub(super) use named;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_statement_is_in_the_log_once_a_minute_with_the_number_of_those_that_are_not() {
        let mut seen = Seen::default();
        let begun = Instant::now();
        assert_eq!(seen.line("record", begun), Some(0));
        for second in 1..60 {
            assert_eq!(
                seen.line("record", begun + Duration::from_secs(second)),
                None
            );
        }
        assert_eq!(seen.line("page", begun), Some(0));
        assert_eq!(seen.line("record", begun + INTERVAL), Some(59));
    }

    #[test]
    fn no_name_is_a_statement() {
        let mut seen = Seen::default();
        seen.names.insert("SELECT secret FROM x", "record");
        assert_eq!(seen.name("SELECT secret FROM x"), "record");
        assert_eq!(seen.name("COMMIT"), "COMMIT");
        assert_eq!(seen.name("SELECT 1"), "other");
    }
}
