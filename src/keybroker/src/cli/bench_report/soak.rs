//! The table and the charts of a long run with faults, from the JSON document of `scripts/soak.sh`.

use std::{collections::BTreeMap, fmt::Write as _};

use serde::Deserialize;

use super::{
    chart::Named,
    svg::{Axis, Chart, Mark, Series},
};

const SECONDS_PER_HOUR: f64 = 3_600.0;
const KIB_PER_MIB: f64 = 1_024.0;

/// The results of one long run with faults.
#[derive(Debug, Deserialize)]
pub(super) struct Soak {
    commit: Option<String>,
    machine: Machine,
    note: Option<String>,
    seed: u64,
    seconds: u32,
    calls: u64,
    attempts: u64,
    failed: u64,
    memory_growth: f64,
    descriptor_growth: f64,
    thread_growth: f64,
    samples: Vec<Sample>,
    faults: Vec<Fault>,
}

#[derive(Debug, Deserialize)]
struct Machine {
    cpu: String,
    cores: u32,
    kernel: String,
}

/// The state of the broker before a fault, and the calls since the previous sample.
#[derive(Debug, Deserialize)]
struct Sample {
    at_s: f64,
    p50_ms: f64,
    p99_ms: f64,
    front: Process,
    workers: Vec<Process>,
}

#[derive(Debug, Deserialize)]
struct Process {
    resident_kib: u32,
    descriptors: u32,
    threads: u32,
}

/// One fault, and the time from the end of the fault until a call of each kind succeeded.
#[derive(Debug, Deserialize)]
struct Fault {
    fault: String,
    recovery_s: f64,
}

impl Soak {
    /// Reads a document of a long run with faults. Returns `None` for a document of
    /// `keybroker bench`.
    pub(super) fn parse(text: &str) -> Option<Result<Self, serde_json::Error>> {
        #[derive(Deserialize)]
        struct Kind {
            scenario: String,
        }
        let kind: Kind = serde_json::from_str(text).ok()?;
        (kind.scenario == "soak").then(|| serde_json::from_str(text))
    }

    /// Charts of memory, latency, descriptors and threads over time.
    pub(super) fn charts(&self) -> Vec<Named> {
        let mib = |kib: u32| f64::from(kib) / KIB_PER_MIB;
        let front_memory = self.series("front", |sample| mib(sample.front.resident_kib));
        let worker_memory = self.series("all workers", |sample| {
            let workers = sample.workers.iter();
            mib(workers.map(|worker| worker.resident_kib).sum())
        });
        let p50 = self.series("p50", |sample| sample.p50_ms);
        let p99 = self.series("p99", |sample| sample.p99_ms);
        let descriptors = self.series("descriptors", |sample| sample.front.descriptors.into());
        let threads = self.series("threads", |sample| sample.front.threads.into());
        vec![
            self.chart(
                "-memory",
                "Resident memory during faults",
                Axis::linear("MiB"),
                vec![front_memory, worker_memory],
            ),
            self.chart(
                "-latency",
                "Latency of calls that follow the retry rule, during faults",
                Axis::logarithmic("milliseconds"),
                vec![p50, p99],
            ),
            self.chart(
                "-resources",
                "Descriptors and threads of the front during faults",
                Axis::linear("count"),
                vec![descriptors, threads],
            ),
        ]
    }

    fn chart(
        &self,
        suffix: &'static str,
        title: &'static str,
        y: Axis,
        series: Vec<Series>,
    ) -> Named {
        let subtitle = format!(
            "{} faults in {} s, seed {}",
            self.faults.len(),
            self.seconds,
            self.seed
        );
        let svg = Chart {
            title,
            subtitle,
            x: Axis::linear("hours"),
            y,
            mark: Mark::Lines,
            series,
        };
        Named { suffix, svg }
    }

    /// A series with one value for each sample over time.
    fn series(&self, name: &str, value: impl Fn(&Sample) -> f64) -> Series {
        let samples = self.samples.iter();
        let points = samples.map(|sample| (sample.at_s / SECONDS_PER_HOUR, value(sample)));
        Series {
            name: name.to_owned(),
            points: points.collect(),
        }
    }

    /// The totals, and each kind of fault with its slowest recovery, in Markdown.
    pub(super) fn markdown(&self) -> String {
        let mut text = String::from(
            "| hours | faults | calls | attempts | failed | memory | descriptors | threads |\n\
             |---|---|---|---|---|---|---|---|\n",
        );
        let hours = f64::from(self.seconds) / SECONDS_PER_HOUR;
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "| {hours:.1} | {} | {} | {} | {} | {:.2} | {:.2} | {:.2} |\n",
            self.faults.len(),
            self.calls,
            self.attempts,
            self.failed,
            self.memory_growth,
            self.descriptor_growth,
            self.thread_growth
        );
        text.push_str("| fault | times | slowest recovery s |\n|---|---|---|\n");
        for (fault, (times, slowest)) in self.by_fault() {
            let _ = writeln!(text, "| {fault} | {times} | {slowest:.1} |");
        }
        let note = self
            .note
            .as_ref()
            .map_or_else(String::new, |note| format!("{note}; "));
        let _ = writeln!(
            text,
            "\nConditions: {note}{}, {} processors, Linux {}; commit {}, seed {}.",
            self.machine.cpu,
            self.machine.cores,
            self.machine.kernel,
            self.commit.as_deref().unwrap_or("unknown"),
            self.seed
        );
        text
    }

    /// For each kind of fault, the number of faults and the slowest recovery in seconds.
    fn by_fault(&self) -> BTreeMap<&str, (u32, f64)> {
        let mut faults = BTreeMap::new();
        for fault in &self.faults {
            let (times, slowest) = faults.entry(fault.fault.as_str()).or_insert((0, 0.0));
            *times += 1;
            *slowest = f64::max(*slowest, fault.recovery_s);
        }
        faults
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUN: &str = r#"{
        "scenario": "soak", "commit": "abc", "seed": 7, "seconds": 7200,
        "machine": {"cpu": "a processor", "cores": 2, "kernel": "6.1"}, "note": null,
        "calls": 1000, "attempts": 1100, "failed": 1, "failures": {}, "refused_attempts": {},
        "success": 0.999, "memory_growth": 1.02, "descriptor_growth": 1.0, "thread_growth": 1.0,
        "samples": [
            {"at_s": 0.0, "calls": 10, "p50_ms": 2.0, "p99_ms": 20.0, "max_ms": 30.0, "database_connections": 3,
             "front": {"resident_kib": 51200, "descriptors": 60, "threads": 9},
             "workers": [{"resident_kib": 10240, "descriptors": 9, "threads": 4}]},
            {"at_s": 3600.0, "calls": 10, "p50_ms": 3.0, "p99_ms": 40.0, "max_ms": 50.0, "database_connections": 3,
             "front": {"resident_kib": 53248, "descriptors": 61, "threads": 9}, "workers": []}
        ],
        "faults": [
            {"at_s": 1.0, "fault": "WorkerKilled", "recovery_s": 0.2},
            {"at_s": 31.0, "fault": "WorkerKilled", "recovery_s": 0.7},
            {"at_s": 61.0, "fault": "DiskFull", "recovery_s": 0.1}
        ]
    }"#;

    #[test]
    fn a_run_has_totals_and_the_slowest_recovery_of_each_fault() {
        let text = Soak::parse(RUN).unwrap().unwrap().markdown();
        for line in [
            "| 2.0 | 3 | 1000 | 1100 | 1 | 1.02 | 1.00 | 1.00 |",
            "| DiskFull | 1 | 0.1 |",
            "| WorkerKilled | 2 | 0.7 |",
            "commit abc, seed 7",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }

    #[test]
    fn a_run_has_charts_over_hours() {
        let charts = Soak::parse(RUN).unwrap().unwrap().charts();
        let memory = &charts[0].svg.series;
        assert_eq!(memory[0].points, [(0.0, 50.0), (1.0, 52.0)]);
        assert_eq!(memory[1].points, [(0.0, 10.0), (1.0, 0.0)]);
        assert!(charts[1].svg.to_string().contains("hours"));
    }

    #[test]
    fn documents_of_other_scenarios_are_not_runs_with_faults() {
        assert!(Soak::parse(r#"{"scenario": "steady"}"#).is_none());
        assert!(Soak::parse("not JSON").is_none());
        assert!(Soak::parse(r#"{"scenario": "soak"}"#).unwrap().is_err());
    }
}
