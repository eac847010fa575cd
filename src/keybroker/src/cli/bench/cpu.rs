//! Reads the CPU time of processes from `/proc`.

use std::fs;

use crate::cli::exit::{Exit, Failure};

/// `USER_HZ`, the number of clock ticks per second in `/proc/<pid>/stat`. The value is 100 on every Linux
/// architecture that Debian supports.
const TICKS_PER_SECOND: u64 = 100;
/// Indexes of fields in `/proc/PID/stat`, counted from the first field after the command's name. Index 0 is the state of the
/// process. See proc(5).
const PARENT: usize = 1;
const USER: usize = 11;
const SYSTEM: usize = 12;

/// User and system CPU time that processes have used so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct CpuTime {
    pids: Vec<u32>,
    ticks: u64,
}

impl CpuTime {
    /// The CPU time of one process.
    pub(super) fn of(pid: u32) -> Result<Self, Failure> {
        let gone = || Failure::new(Exit::Verification, format!("there is no process {pid}"));
        let ticks = stat(pid).and_then(|fields| {
            let field = |index: usize| fields.get(index)?.parse::<u64>().ok();
            Some(field(USER)? + field(SYSTEM)?)
        });
        Ok(Self {
            pids: vec![pid],
            ticks: ticks.ok_or_else(gone)?,
        })
    }

    /// The CPU time of all live children of a process.
    pub(super) fn of_children(parent: u32) -> Result<Self, Failure> {
        let mut all = Self::default();
        for pid in children(parent) {
            let one = Self::of(pid)?;
            all.pids.push(pid);
            all.ticks += one.ticks;
        }
        all.pids.sort_unstable();
        Ok(all)
    }

    /// Whether both values are CPU times of the same processes. The CPU time of a process that has
    /// ended is lost.
    pub(super) fn is_of_the_same(&self, other: &Self) -> bool {
        self.pids == other.pids
    }

    /// The CPU time used since an earlier reading, in milliseconds.
    pub(super) fn since_ms(&self, before: &Self) -> f64 {
        let ticks = self.ticks.saturating_sub(before.ticks);
        f64::from(u32::try_from(ticks * 1_000 / TICKS_PER_SECOND).unwrap_or(u32::MAX))
    }
}

fn children(parent: u32) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let parent = parent.to_string();
    entries
        .filter_map(Result::ok)
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| {
            let fields = stat(*pid).unwrap_or_default();
            fields.get(PARENT).is_some_and(|text| *text == parent)
        })
        .collect()
}

fn stat(pid: u32) -> Option<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = text.rsplit_once(") ")?;
    Some(rest.split(' ').map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use std::{
        hint::black_box,
        process::{Command, Stdio},
        time::{Duration, Instant},
    };

    use super::*;

    #[test]
    fn time_spent_is_seen() {
        let ourselves = std::process::id();
        let before = CpuTime::of(ourselves).unwrap();
        let began = Instant::now();
        while CpuTime::of(ourselves).unwrap().since_ms(&before) < 30.0 {
            assert!(
                began.elapsed() < Duration::from_secs(30),
                "no CPU time is seen"
            );
            black_box((0..100_000_u64).sum::<u64>());
        }
    }

    #[test]
    fn a_process_that_is_not_there_is_no_zero() {
        assert!(CpuTime::of(u32::MAX).is_err());
    }

    #[test]
    fn children_are_found() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let seen = CpuTime::of_children(std::process::id()).unwrap();
        assert!(seen.pids.contains(&child.id()));
        drop(child.stdin.take());
        child.wait().unwrap();
    }
}
