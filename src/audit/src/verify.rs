//! Checks a log offline: every line canonical, one log id, a sequence without gaps.
//!
//! The log of an instance is also held against the last entry that the instance remembers as durable, so lines cut off its
//! end are found up to the last second before the broker stopped.
//!
//! What this does not find: a value that was replaced by another valid one, and a log rewritten as a whole by an attacker who can
//! write its files and the state directory. Signed checkpoints, which would show both, are not implemented yet.

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

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Segments read.
    pub segments: u64,
    /// Good entries.
    pub entries: u64,
    /// Sequence number of the last entry.
    pub last_sequence: u64,
    /// Intents without an outcome: changes under way, or cut short and not resolved yet.
    pub open_intents: u64,
    /// How often a tail was set aside that a crash had torn.
    pub torn_tails: u64,
    /// What is wrong; empty for a good log.
    pub problems: Vec<String>,
}

/// Problems listed at most: a log that is damaged everywhere needs no longer list.
const PROBLEMS_MAX: usize = 100;

/// Reads all segments of a log.
pub fn verify(directory: &Path) -> Result<Report, Error> {
    verify_to(directory, None)
}

/// The same, up to an entry that must be there.
pub(super) fn verify_to(directory: &Path, mark: Option<Mark>) -> Result<Report, Error> {
    let path = directory.join(segment::LOG_ID);
    let log_id = fs::read_to_string(&path).map_err(|error| {
        let shown = directory.display();
        Error::new(match (error.kind(), &mark) {
            (ErrorKind::NotFound, None) => format!(
                "there is no audit log in {shown}; {}", segment::BEGINS
            ),
            (ErrorKind::NotFound, Some(_)) => format!(
                "the audit log of {shown} is gone: there is no file {}, although this instance has written entries",
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
            // One problem for all that follows, until there is a line again.
            None if readable => {
                readable = false;
                let what = format!("no canonical entry begins at byte {}", line.at);
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
    /// Number of the segment that is read.
    number: u64,
    open: HashSet<CallId>,
    /// Number of the last segment of which an entry says that an operator removed it.
    removed_through: u64,
    /// Sequence number of the first entry.
    begins_at: Option<u64>,
    report: Report,
}

impl Check<'_> {
    fn entry(&mut self, line: &Parsed) {
        let Parsed { sequence, .. } = line;
        if line.log_id != self.log_id {
            self.problem(&format!("entry {sequence} is of another log"));
        }
        // No canonical line has a number that cannot be followed by another.
        let expected = self.report.last_sequence + 1;
        let may_begin_here = self.begins_at.is_none() && self.number > 1;
        self.begins_at.get_or_insert(*sequence);
        if *sequence != expected && !may_begin_here {
            self.problem(&format!("sequence {sequence} where {expected} is due"));
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

    /// A log begins with its first entry, or after the segments of which an entry says that an operator removed them.
    fn beginning(&mut self, directory: &Path, first: Option<u64>) {
        let (Some(number), Some(sequence)) = (first, self.begins_at) else {
            return;
        };
        if number == 1 || sequence == 1 || number.checked_sub(1) == Some(self.removed_through) {
            return;
        }
        self.path = segment::segment_path(directory, number);
        self.problem(&format!("sequence {sequence} where 1 is due"));
    }

    fn end(&mut self, mark: &Mark, lengths: &BTreeMap<u64, u64>) {
        if mark.log_id != self.log_id {
            let what = format!("the log of this instance was {}", mark.log_id);
            self.problem(&what);
        } else if self.report.last_sequence < mark.sequence {
            let what = format!(
                "the log ends with entry {}, and entry {} was durable",
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
