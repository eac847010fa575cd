//! Describes the machine on which a measurement runs.

use std::fs;

use serde::{Deserialize, Serialize};

use super::processors;

/// Facts about the machine that help to compare results of different machines.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::cli) struct Machine {
    /// Model of the processor.
    pub(in crate::cli) cpu: String,
    /// Processors that this program may use.
    pub(in crate::cli) cores: u32,
    pub(in crate::cli) kernel: String,
    pub(in crate::cli) memory_mib: u64,
    /// The load average of the last minute of the run: the mean number of processes that were
    /// running or ready to run. The load of the run itself is included.
    pub(in crate::cli) load_average: f64,
}

impl Machine {
    /// Returns the facts about this machine.
    pub(super) fn this() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let cpus = read("/proc/cpuinfo");
        Self {
            cpu: cpu_model(&cpus).unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            cores: processors(),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            memory_mib: kib(&read("/proc/meminfo"), "MemTotal").unwrap_or_default() / 1_024,
            load_average: first_number(&read("/proc/loadavg")).unwrap_or_default(),
        }
    }
}

/// The model name of an x86 processor. For most ARM processors, the kernel does not show a model
/// name.
fn cpu_model(text: &str) -> Option<String> {
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn first_number(text: &str) -> Option<f64> {
    text.split(' ').next()?.parse().ok()
}

/// The value of a line `NAME: NUMBER kB`, which several files in `/proc` contain.
pub(super) fn kib(text: &str, name: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_described() {
        let machine = Machine::this();
        assert!(machine.cores > 0 && machine.memory_mib > 0, "{machine:?}");
        assert!(!machine.cpu.is_empty() && !machine.kernel.is_empty());
    }

    #[test]
    fn values_in_kib_are_read() {
        let text = "Rss:      100 kB\nPss:       42 kB\nPss_Anon:   7 kB\n";
        assert_eq!(kib(text, "Pss"), Some(42));
        assert_eq!(kib(text, "Swap"), None);
    }
}
