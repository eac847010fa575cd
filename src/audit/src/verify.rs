//! Verifies a log without a broker: every line must be canonical, all entries must have the same log id, and the
//! sequence must have no gaps.
//!
//! The log of an instance is also compared with the last entry that the instance recorded as
//! durable. The comparison detects lines that were removed from the end of the log, except lines
//! from the last second before the broker stopped.
//!
//! Verification does not detect a value that was replaced by another valid value. An attacker who
//! can write to the log's files and the state directory can also rewrite the complete log
//! undetected. Signed checkpoints would detect a replaced value and a rewritten log, but are not
//! implemented yet.

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use keybroker_core::{call::CallId, remedy::with_remedy};

use super::{
    Error, extent,
    line::Parsed,
    memory::Mark,
    segment::{self, Line},
    writer::SEGMENTS_REMOVED,
};

/// The result of a verification.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Number of segments.
    pub segments: u64,
    /// Number of valid entries.
    pub entries: u64,
    /// Sequence number of the last entry.
    pub last_sequence: u64,
    /// Number of intents without an outcome: changes that are running, or that were interrupted and not resolved yet.
    pub open_intents: u64,
    /// Number of torn tails (incomplete last entries) that the broker moved to separate files after
    /// a crash.
    pub torn_tails: u64,
    /// All problems; empty for a valid log.
    pub problems: Vec<String>,
}

/// Largest number of problems in a report. For a log with more problems, a longer list would not be useful.
const PROBLEMS_MAX: usize = 100;

/// Verifies all segments of a log.
pub fn verify(directory: &Path) -> Result<Report, Error> {
    verify_to(directory, None)
}

/// Verifies all segments of a log, and checks that the log contains the last durable entry, which
/// `mark` identifies.
pub(super) fn verify_to(directory: &Path, mark: Option<Mark>) -> Result<Report, Error> {
    let path = directory.join(segment::LOG_ID);
    let log_id = fs::read_to_string(&path).map_err(|error| {
        let shown = directory.display();
        Error::new(match (error.kind(), &mark) {
            (ErrorKind::NotFound, None) => format!(
                "there is no audit log in {shown}; {}", segment::BEGINS
            ),
            (ErrorKind::NotFound, Some(_)) => format!(
                "the audit log of {shown} is missing: there is no file {}, although this instance has written entries",
                path.display()
            ),
            _ => format!("cannot read {}: {}", path.display(), with_remedy(&path, &error)),
        })
    })?;
    let mut check = Check {
        log_id: log_id.trim(),
        path: PathBuf::new(),
        number: 0,
        open: HashSet::new(),
        removed_through: 0,
        begins_at: None,
        report: Report::default(),
    };
    let numbers = segment::segments(directory)?;
    let mut lengths = BTreeMap::new();
    for number in &numbers {
        let number = *number;
        let path = segment::segment_path(directory, number);
        check.path.clone_from(&path);
        check.number = number;
        check.report.segments += 1;
        lengths.insert(number, segment::length(&path)?);
        let mut readable = true;
        segment::lines(&path, |line: Line| match &line.entry {
            Some(entry) => {
                readable = true;
                check.entry(entry);
            }
            // All bytes up to the next valid line are reported as one problem.
            None if readable => {
                readable = false;
                let what = format!(
                    "no audit entry in canonical form begins at byte {}",
                    line.at
                );
                check.problem(&what);
            }
            None => {}
        })?;
    }
    check.beginning(directory, numbers.first().copied());
    if let Some(mark) = mark {
        check.end(&mark, &lengths);
    }
    check.report.open_intents = u64::try_from(check.open.len()).expect("a count fits in 64 bits");
    Ok(check.report)
}

struct Check<'a> {
    log_id: &'a str,
    path: PathBuf,
    /// Number of the current segment.
    number: u64,
    open: HashSet<CallId>,
    /// Number of the last segment whose removal by an operator is recorded in an entry.
    removed_through: u64,
    /// Sequence number of the first entry.
    begins_at: Option<u64>,
    report: Report,
}

impl Check<'_> {
    fn entry(&mut self, line: &Parsed) {
        let Parsed { sequence, .. } = line;
        if line.log_id != self.log_id {
            self.problem(&format!("entry {sequence} belongs to another log"));
        }
        // Sequence numbers of canonical lines are limited, so the addition cannot overflow.
        let expected = self.report.last_sequence + 1;
        let may_begin_here = self.begins_at.is_none() && self.number > 1;
        self.begins_at.get_or_insert(*sequence);
        if *sequence != expected && !may_begin_here {
            self.problem(&format!(
                "the sequence number is {sequence} instead of {expected}"
            ));
        }
        self.report.entries += 1;
        self.report.last_sequence = *sequence;
        if line.action == "log.torn_tail_set_aside" {
            self.report.torn_tails += 1;
        }
        if line.action == SEGMENTS_REMOVED
            && let Some(through) = line.count
        {
            self.removed_through = self.removed_through.max(through);
        }
        if let Some(intent) = line.intent() {
            self.open.insert(intent.call);
        } else if line.closes_intent()
            && let Some(call) = &line.call_id
        {
            self.open.remove(call);
        }
    }

    /// Checks the beginning of a log: the log must begin with the first entry, or after segments whose removal by an
    /// operator is recorded.
    fn beginning(&mut self, directory: &Path, first: Option<u64>) {
        let (Some(number), Some(sequence)) = (first, self.begins_at) else {
            return;
        };
        if number == 1 || sequence == 1 || number.checked_sub(1) == Some(self.removed_through) {
            return;
        }
        self.path = segment::segment_path(directory, number);
        self.problem(&format!("the sequence number is {sequence} instead of 1"));
    }

    fn end(&mut self, mark: &Mark, lengths: &BTreeMap<u64, u64>) {
        if mark.log_id != self.log_id {
            let what = format!("this instance wrote entries to the log {}", mark.log_id);
            self.problem(&what);
        } else if self.report.last_sequence < mark.sequence {
            let what = format!(
                "the log ends with entry {}, but entry {} was already durable",
                self.report.last_sequence, mark.sequence
            );
            self.problem(&what);
        }
        let missing = mark
            .segments
            .iter()
            .filter(|_| mark.log_id == self.log_id)
            .filter_map(|extent| extent::missing(extent, lengths));
        self.report.problems.extend(missing);
    }

    fn problem(&mut self, what: &str) {
        if self.report.problems.len() < PROBLEMS_MAX {
            let problem = format!("{}: {what}", self.path.display());
            self.report.problems.push(problem);
        }
    }
}
