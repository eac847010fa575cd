//! Reads the memory use of a process.

use std::fs;

use crate::cli::exit::{Exit, Failure};

use super::machine::kib;

/// The kernel's counter from which the memory was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Measure {
    /// Proportional set size: the size of each shared page is divided by the number of processes
    /// that share the page.
    Pss,
    /// Resident set size. The kernel shows only this value if this process is not permitted to
    /// trace the broker.
    Rss,
}

impl Measure {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Pss => "PSS",
            Self::Rss => "RSS",
        }
    }
}

/// The memory of a process at one point in time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Memory {
    pub(super) kib: u64,
    pub(super) measure: Measure,
}

impl Memory {
    pub(super) fn of(pid: u32) -> Result<Self, Failure> {
        let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).ok();
        let pss = read("smaps_rollup").and_then(|text| kib(&text, "Pss"));
        let measured = pss.map(|kib| (kib, Measure::Pss)).or_else(|| {
            let text = read("status")?;
            Some((kib(&text, "VmRSS")?, Measure::Rss))
        });
        let gone = || Failure::new(Exit::Verification, format!("there is no process {pid}"));
        let (kib, measure) = measured.ok_or_else(gone)?;
        Ok(Self { kib, measure })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_this_process_is_counted_and_that_of_none_is_an_error() {
        let memory = Memory::of(std::process::id()).unwrap();
        assert!(memory.kib > 1_000, "{memory:?}");
        assert!(Memory::of(u32::MAX).is_err());
    }
}
