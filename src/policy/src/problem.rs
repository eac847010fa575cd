//! Problems of policies, each with its position in a file.

use std::fmt;

use cedar_policy::ffi::DetailedError;

/// A policy file.
#[derive(Clone, Debug)]
pub(super) struct Source {
    pub(super) name: String,
    pub(super) text: String,
}

/// A problem of one policy file, or of all files together.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// Name of the file.
    pub file: Option<String>,
    /// Line and column, both counted from 1.
    pub place: Option<(usize, usize)>,
    /// The description of the problem.
    pub message: String,
}

impl Problem {
    pub(super) fn of(message: impl Into<String>) -> Self {
        Self {
            file: None,
            place: None,
            message: message.into(),
        }
    }

    pub(super) fn in_file(file: &str, message: impl Into<String>) -> Self {
        Self {
            file: Some(file.to_owned()),
            ..Self::of(message)
        }
    }

    /// Converts an error that Cedar reports about a file.
    pub(super) fn from_cedar(source: &Source, error: &DetailedError) -> Self {
        let help = error.help.as_ref();
        let help = help.map_or_else(String::new, |help| format!("; {help}"));
        let ends_early = error.message.contains("unexpected end of input");
        let semicolon = if ends_early {
            "; a policy ends with a semicolon"
        } else {
            ""
        };
        let message = format!("{}{help}{semicolon}", error.message).replace('\n', " ");
        let start = error.source_locations.first().map(|label| label.loc.start);
        Self {
            place: start.map(|offset| place(&source.text, offset)),
            ..Self::in_file(&source.name, message)
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.file, self.place) {
            (Some(file), Some((line, column))) => {
                write!(f, "{file}, line {line}, column {column}: {}", self.message)
            }
            (Some(file), None) => write!(f, "{file}: {}", self.message),
            (None, _) => f.write_str(&self.message),
        }
    }
}

/// All problems that were found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problems(pub Vec<Problem>);

impl From<Problem> for Problems {
    fn from(problem: Problem) -> Self {
        Self(vec![problem])
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<String> = self.0.iter().map(ToString::to_string).collect();
        f.write_str(&all.join("; "))
    }
}

impl std::error::Error for Problems {}

/// Converts a byte offset to line and column, both counted from 1.
pub(super) fn place(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
    (line, column)
}
