//! Reads the last lines of a log from its end. The cost of reading the last lines does not depend on the length of the
//! log.

use std::{
    collections::VecDeque,
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::Path,
};

use super::{
    Error, Recorded, line,
    segment::{self, LINE_BYTES_MAX},
    state::Durable,
};

const BLOCK_BYTES: u64 = 64 * 1024;

/// Returns the last lines of the log in a directory, oldest first, without their LF. A line that the writer has not
/// completed is omitted.
pub fn tail(directory: &Path, limit: usize) -> Result<Vec<String>, Error> {
    last_lines(directory, limit, None)
}

/// Returns the last lines that pass a test, oldest first, without their LF. Reads the segments backwards, beginning
/// with the newest segment, until enough lines are found.
pub fn tail_matching(
    directory: &Path,
    limit: usize,
    wanted: impl Fn(&str) -> bool,
) -> Result<Vec<String>, Error> {
    let mut lines = VecDeque::new();
    for number in segment::segments(directory)?.into_iter().rev() {
        let room = limit.saturating_sub(lines.len());
        if room == 0 {
            break;
        }
        let path = segment::segment_path(directory, number);
        let mut found = VecDeque::new();
        segment::texts(&path, |text| {
            if wanted(&text) {
                found.push_back(text);
            }
            if found.len() > room {
                found.pop_front();
            }
        })?;
        found.append(&mut lines);
        lines = found;
    }
    Ok(lines.into())
}

/// Returns the newest entry of an action among the last `bytes_max` bytes of the log.
pub(super) fn newest(
    directory: &Path,
    action: &str,
    bytes_max: u64,
) -> Result<Option<Recorded>, Error> {
    // The action is the first field of a line.
    let start = format!("{{\"action\":\"{action}\",");
    let mut left = bytes_max;
    for number in segment::segments(directory)?.into_iter().rev() {
        if left == 0 {
            break;
        }
        let path = segment::segment_path(directory, number);
        let length = fs::metadata(&path)
            .map_err(|error| Error::new(format!("cannot read {}: {error}", path.display())))?
            .len();
        let mut newest = None;
        segment::texts_from(&path, length.saturating_sub(left), |text| {
            if text.starts_with(&start) {
                newest = Some(text);
            }
        })?;
        if let Some(found) = newest.and_then(|text| line::parse(text.as_bytes())) {
            return Ok(Some(found.recorded()));
        }
        left = left.saturating_sub(length);
    }
    Ok(None)
}

/// Returns the last lines up to the position `durable`. The bytes after this position may still be removed.
pub(super) fn last_lines(
    directory: &Path,
    limit: usize,
    durable: Option<Durable>,
) -> Result<Vec<String>, Error> {
    let mut lines = Vec::new();
    for number in segment::segments(directory)?.into_iter().rev() {
        if lines.len() >= limit {
            break;
        }
        let end = match durable {
            Some(durable) if number > durable.segment => continue,
            Some(durable) if number == durable.segment => Some(durable.bytes),
            _ => None,
        };
        let path = segment::segment_path(directory, number);
        let mut earlier = of_segment(&path, limit - lines.len(), end)
            .map_err(|error| Error::new(format!("cannot read {}: {error}", path.display())))?;
        earlier.append(&mut lines);
        lines = earlier;
    }
    Ok(lines)
}

fn of_segment(path: &Path, limit: usize, end: Option<u64>) -> std::io::Result<Vec<String>> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    let end = end.map_or(length, |end| end.min(length));
    // The search has a limit, because a damaged file may contain no LF at all.
    let wanted = u64::try_from(limit).unwrap_or(u64::MAX);
    let least = end.saturating_sub(LINE_BYTES_MAX.saturating_mul(wanted.saturating_add(1)));
    let (mut blocks, mut start, mut found) = (Vec::new(), end, 0);
    // To read N lines, the loop needs N + 1 LFs, because an LF also ends the line before the first line.
    while start > least && found <= limit {
        let bytes = BLOCK_BYTES.min(start);
        start -= bytes;
        let mut block = vec![0; usize::try_from(bytes).expect("a block fits in memory")];
        file.read_exact_at(&mut block, start)?;
        found += block.split(|byte| *byte == b'\n').count() - 1;
        blocks.push(block);
    }
    blocks.reverse();
    let bytes = blocks.concat();
    let Some(last) = bytes.iter().rposition(|byte| *byte == b'\n') else {
        return Ok(Vec::new());
    };
    let lines: Vec<&[u8]> = bytes[..last].split(|byte| *byte == b'\n').collect();
    let cut_off = usize::from(start > 0);
    let first = lines.len().saturating_sub(limit).max(cut_off);
    Ok(lines[first.min(lines.len())..]
        .iter()
        .map(|line| String::from_utf8_lossy(line).into_owned())
        .collect())
}
