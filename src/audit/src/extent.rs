//! The extents of a log: the numbers of its segments and their total size, in a form that is short enough for a state
//! file.
//!
//! When the broker starts, it compares the stored extents with the log's directory. The comparison detects a segment
//! that was removed or truncated while the broker was stopped.
//!
//! Mitigation: M14 of `THREAT_MODEL.md`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Maximum number of extents in a mark. A log has more than one extent only after an operator
/// acknowledged that segments are missing.
const EXTENTS_MAX: usize = 256;

/// A range of segments without a gap in their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Extent {
    /// Number of the first segment.
    pub(super) first: u64,
    /// Number of the last segment.
    pub(super) last: u64,
    /// Total number of durable bytes in the segments.
    pub(super) bytes: u64,
}

/// Computes the extents of a log from the durable bytes of each segment. A segment without durable bytes is ignored,
/// because the writer may create it again. If a log has too many gaps, only the newest extents are kept.
pub(super) fn extents(segments: impl Iterator<Item = (u64, u64)>) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::new();
    for (number, bytes) in segments.filter(|(_, bytes)| *bytes > 0) {
        match extents.last_mut() {
            Some(extent) if extent.last + 1 == number => {
                extent.last = number;
                extent.bytes = extent.bytes.saturating_add(bytes);
            }
            _ => extents.push(Extent {
                first: number,
                last: number,
                bytes,
            }),
        }
    }
    let surplus = extents.len().saturating_sub(EXTENTS_MAX);
    extents.split_off(surplus)
}

/// Returns a description of the segments and bytes that are in a stored extent but no longer in the log. Since the
/// extent was stored, segments may have been added, and the last segment may have grown.
pub(super) fn missing(extent: &Extent, segments: &BTreeMap<u64, u64>) -> Option<String> {
    let mut bytes = 0_u64;
    let mut next = extent.first;
    for (number, length) in segments.range(extent.first..=extent.last) {
        if *number != next {
            break;
        }
        bytes = bytes.saturating_add(*length);
        next = number + 1;
    }
    if next <= extent.last {
        return Some(format!("segment {next:08}.jsonl is missing"));
    }
    (bytes < extent.bytes).then(|| {
        format!(
            "segments {:08}.jsonl to {:08}.jsonl have {bytes} bytes, but {} bytes were written",
            extent.first, extent.last, extent.bytes
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segments(lengths: &[(u64, u64)]) -> BTreeMap<u64, u64> {
        lengths.iter().copied().collect()
    }

    #[test]
    fn a_log_without_gaps_is_one_extent() {
        let log = segments(&[(3, 10), (4, 20), (5, 0)]);
        let extents = extents(log.iter().map(|(number, bytes)| (*number, *bytes)));
        let [extent] = extents[..] else {
            panic!("{extents:?}")
        };
        assert_eq!((extent.first, extent.last, extent.bytes), (3, 4, 30));
        assert_eq!(missing(&extent, &log), None);
    }

    #[test]
    fn a_removed_or_shortened_segment_is_missed() {
        let extent = Extent {
            first: 3,
            last: 5,
            bytes: 30,
        };
        let whole = [(2, 10), (3, 10), (4, 10), (5, 15), (6, 1)];
        assert_eq!(missing(&extent, &segments(&whole)), None);
        for (position, name) in [(1, "00000003"), (2, "00000004"), (3, "00000005")] {
            let mut log = whole.to_vec();
            log.remove(position);
            let problem = missing(&extent, &segments(&log)).unwrap();
            assert!(problem.contains(name), "{problem}");
        }
        let short = segments(&[(3, 10), (4, 9), (5, 10)]);
        assert!(missing(&extent, &short).unwrap().contains("29 bytes"));
        assert!(missing(&extent, &BTreeMap::new()).is_some());
    }

    #[test]
    fn a_log_with_many_gaps_still_fits_into_a_state_file() {
        let extents = extents((0..100_000).map(|number| (number * 2 + 1, u64::MAX)));
        assert_eq!(extents.len(), EXTENTS_MAX);
        assert_eq!(extents.last().unwrap().last, 199_999);
        assert!(serde_json::to_vec(&extents).unwrap().len() < 32 * 1024);
    }
}
