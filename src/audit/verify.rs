//! Checks a log offline: every line canonical, one log id, a sequence without gaps.
//!
//! What this does not find: lines cut off the end of the newest segment, and a log rewritten as a whole by somebody who
//! can write its files. The tree and its signed checkpoints, which would show both, are not there yet.

use std::path::Path;

use super::{Error, segment};

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Segments read.
    pub segments: u64,
    /// Good entries.
    pub entries: u64,
    /// Sequence number of the last entry.
    pub last_sequence: u64,
    /// What is wrong; empty for a good log.
    pub problems: Vec<String>,
}

/// Problems listed at most: a log that is damaged everywhere needs no longer list.
const PROBLEMS_MAX: usize = 100;

/// Reads all segments of a log.
pub fn verify(directory: &Path) -> Result<Report, Error> {
    let log_id = std::fs::read_to_string(directory.join("log-id")).map_err(|error| {
        Error::new(format!(
            "cannot read log-id in {}: {error}",
            directory.display()
        ))
    })?;
    let mut report = Report::default();
    let mut problem = |text: String| {
        if report.problems.len() < PROBLEMS_MAX {
            report.problems.push(text);
        }
    };
    let mut expected = 1;
    for number in segment::segments(directory)? {
        let path = segment::segment_path(directory, number);
        let read = segment::read(&path)?;
        report.segments += 1;
        for line in &read.lines {
            if line.log_id != log_id.trim() {
                problem(format!(
                    "{}: entry {} is of another log",
                    path.display(),
                    line.sequence
                ));
            }
            if line.sequence != expected {
                problem(format!(
                    "{}: sequence {} where {expected} is due",
                    path.display(),
                    line.sequence
                ));
            }
            expected = line.sequence + 1;
            report.entries += 1;
            report.last_sequence = line.sequence;
        }
        if !read.tail.is_empty() {
            problem(format!(
                "{}: byte {} begins a line that is not a canonical entry",
                path.display(),
                read.good_bytes
            ));
        }
    }
    Ok(report)
}
