//! CPU time of processes, from `/proc`.

use std::fs;

/// `USER_HZ`, the unit of `/proc/<pid>/stat`: 100 on every Linux that Debian runs on.
const TICKS_PER_SECOND: u64 = 100;
/// Fields after the command's name in brackets: state is 0, parent 1, user time 11, system time 12 (proc(5)).
const PARENT: usize = 1;
const USER: usize = 11;
const SYSTEM: usize = 12;

/// User and system time that processes have used so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct CpuTime {
    ticks: u64,
}

impl CpuTime {
    pub(super) fn of(pid: u32) -> Self {
        let field = |fields: &[String], index: usize| {
            fields
                .get(index)
                .and_then(|text| text.parse().ok())
                .unwrap_or(0)
        };
        let ticks = stat(pid).map_or(0, |fields| field(&fields, USER) + field(&fields, SYSTEM));
        Self { ticks }
    }

    /// Of all children of a process that are alive.
    pub(super) fn of_children(parent: u32) -> Self {
        let ticks = children(parent)
            .into_iter()
            .map(|pid| Self::of(pid).ticks)
            .sum();
        Self { ticks }
    }

    pub(super) fn since_ms(self, before: Self) -> f64 {
        let ticks = self.ticks.saturating_sub(before.ticks);
        f64::from(u32::try_from(ticks * 1_000 / TICKS_PER_SECOND).unwrap_or(u32::MAX))
    }
}

fn children(parent: u32) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(Result::ok)
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| {
            let fields = stat(*pid).unwrap_or_default();
            fields
                .get(PARENT)
                .is_some_and(|text| *text == parent.to_string())
        })
        .collect()
}

fn stat(pid: u32) -> Option<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = text.rsplit_once(") ")?;
    Some(rest.split(' ').map(str::to_owned).collect())
}
