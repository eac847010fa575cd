//! The scenarios of `keybroker bench`, with real parts and for about a second each. The tests assert shapes, counts that add up
//! and exit codes; how fast the broker is, is left to `scripts/performance.sh`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::{
    bench::site,
    faulty::{Fault, code},
    faulty_token::put_before,
    pki,
    site::{Finished, Site},
};

/// A run of a scenario that wrote its document.
struct Run {
    finished: Finished,
    document: Value,
    /// The directory with the document, `NAME.json`, and what `bench-report` made of it.
    folder: PathBuf,
    name: String,
}

/// Runs a scenario with `--json`, and asserts what is common to all documents.
fn run(site: &Site, scenario: &str, arguments: &[&str]) -> Run {
    let folder = site.folder().join("documents");
    fs::create_dir_all(&folder).unwrap();
    let file = folder.join(format!("{scenario}.json"));
    // The directory for temporary files shows what is left behind.
    let temporary = site.folder().join("temporary");
    fs::create_dir_all(&temporary).unwrap();
    let configuration = fs::read_to_string(site.configuration_file()).unwrap();
    let mut command = site.command(&["bench", "--scenario", scenario, "--users", "5", "--json"]);
    command
        .arg(&file)
        .arg("--ca")
        .arg(site.pki.ca_file())
        .arg("--cert")
        .arg(site.pki.certificate_file("releaser"))
        .arg("--key")
        .arg(site.pki.key_file("releaser"))
        .args(["--warm-up", "0", "--commit", "abc1234", "--note", "a test"])
        .args(arguments)
        .env("TMPDIR", &temporary);
    if !["connections", "storm"].contains(&scenario) {
        command.args(["--connections", "3"]);
    }
    let finished = Finished::from(command.output().unwrap());
    let text = fs::read_to_string(&file).unwrap_or_else(|error| panic!("{error}: {finished:#?}"));
    let document: Value = serde_json::from_str(&text).unwrap();
    for (name, value) in [
        ("format", Value::from(1)),
        ("scenario", scenario.into()),
        ("version", env!("CARGO_PKG_VERSION").into()),
        ("commit", "abc1234".into()),
        ("note", "a test".into()),
    ] {
        assert_eq!(document[name], value, "{name}");
    }
    assert!(document["started"].as_str().unwrap().ends_with('Z'));
    assert!(document["duration_s"].as_f64().unwrap() > 0.0);
    assert!(document["machine"]["cores"].as_u64().unwrap() > 0);
    for name in ["cpu", "kernel"] {
        let fact = document["machine"][name].as_str().unwrap();
        assert!(!fact.is_empty(), "{name}");
    }
    assert!(
        document["token"]["model"]
            .as_str()
            .unwrap()
            .contains("SoftHSM")
    );
    assert_eq!(document["token"]["rsa_bits"], 2048);
    assert!(document["arguments"]["seconds"].as_u64().unwrap() > 0);
    assert_eq!(fs::read_dir(&temporary).unwrap().count(), 0);
    let after = fs::read_to_string(site.configuration_file()).unwrap();
    assert_eq!(after, configuration);
    Run {
        finished,
        document,
        folder,
        name: scenario.to_owned(),
    }
}

impl Run {
    fn rows(&self) -> &Vec<Value> {
        self.document["rows"].as_array().unwrap()
    }

    /// The exit code says whether a call failed for another reason than load.
    #[track_caller]
    fn expect_exit_code(&self, failed: u64) {
        let expected = if failed == 0 { 0 } else { 12 };
        assert_eq!(self.finished.code, Some(expected), "{:#?}", self.finished);
    }

    /// Runs `bench-report`, and returns the number of series of each chart.
    fn charts(&self, site: &Site) -> Vec<(String, usize)> {
        let file = self.folder.join(format!("{}.json", self.name));
        let (file, folder) = (file.to_str().unwrap(), self.folder.to_str().unwrap());
        let listed = site.expect_ok(&["-o", "json", "bench-report", file, "--out", folder]);
        let listed: Value = serde_json::from_str(&listed).unwrap();
        let files = listed.as_array().unwrap().iter();
        let mut charts = Vec::new();
        for path in files.map(|row| Path::new(row["file"].as_str().unwrap()).to_owned()) {
            let text = fs::read_to_string(&path).unwrap();
            if path.extension().is_some_and(|extension| extension == "md") {
                assert!(text.contains("**a short run**"), "{text}");
                assert!(text.contains("commit abc1234"), "{text}");
                let rows = text.lines().filter(|line| line.starts_with("| "));
                assert!(rows.count() > self.rows().len(), "{text}");
                continue;
            }
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            charts.push((name, series_of(&text)));
        }
        charts
    }
}

/// The number of series of a chart, which must be valid XML with a title for each axis.
fn series_of(text: &str) -> usize {
    let xml = roxmltree::Document::parse(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    let root = xml.root_element();
    assert_eq!(root.tag_name().name(), "svg");
    assert!(!text.contains("NaN"), "{text}");
    let texts = xml
        .descendants()
        .filter(|node| node.has_tag_name(("http://www.w3.org/2000/svg", "text")));
    // Title and conditions, two titles of axes, and at least one tick of each axis.
    assert!(texts.count() >= 6, "{text}");
    let series = xml
        .descendants()
        .filter(|node| node.attribute("class") == Some("series"));
    series.count()
}

#[track_caller]
fn count(row: &Value, name: &str) -> u64 {
    row[name]
        .as_u64()
        .unwrap_or_else(|| panic!("{name}: {row:#}"))
}

#[track_caller]
fn sum(row: &Value, names: &[&str]) -> u64 {
    names.iter().map(|name| count(row, name)).sum()
}

/// Every call of an open loop has one outcome.
#[track_caller]
fn assert_counts_add_up(row: &Value) {
    let outcomes = ["in_time", "late", "refused", "failed", "unsent"];
    assert_eq!(count(row, "due"), sum(row, &outcomes), "{row:#}");
    assert!(count(row, "due") > 0, "{row:#}");
    if count(row, "in_time") > 0 {
        for name in ["p50_ms", "p99_ms", "p999_ms", "max_ms"] {
            assert!(row[name].as_f64().unwrap() > 0.0, "{name}: {row:#}");
        }
    }
}

fn failed(rows: &[Value]) -> u64 {
    rows.iter().map(|row| count(row, "failed")).sum()
}

#[test]
fn an_open_loop_has_a_row_for_each_rate() {
    let site = site();
    let run = run(&site, "open", &["--seconds", "2", "--rate", "20,60"]);
    let rows = run.rows();
    let offered: Vec<f64> = rows
        .iter()
        .map(|row| row["offered_per_s"].as_f64().unwrap())
        .collect();
    assert_eq!(offered, [20.0, 60.0]);
    for row in rows {
        assert_counts_add_up(row);
        assert!(row["load"].as_f64().unwrap() > 0.0, "{row:#}");
    }
    // The same schedule at three times the rate.
    assert!(count(&rows[1], "due") > count(&rows[0], "due"));
    run.expect_exit_code(failed(rows));
    assert!(
        run.finished.stdout.contains("offered/s"),
        "{:#?}",
        run.finished
    );
    assert_eq!(run.charts(&site), [("open.svg".to_owned(), 3)]);
}

#[test]
fn overload_has_a_row_for_each_multiple_and_deadline() {
    let site = site();
    let faulty = put_before(&site);
    // That has written the configuration again.
    let releaser = format!("san = \"URI:{}\"\nroles = [", pki::uri("releaser"));
    let text = fs::read_to_string(site.configuration_file()).unwrap();
    let text = text.replace(&releaser, &format!("{releaser}\"enrol\", "));
    fs::write(site.configuration_file(), text).unwrap();
    let late = Fault {
        milliseconds: 20,
        ..Fault::always(code::LATE)
    };
    faulty.set("C_Decrypt", &late);
    let arguments = [
        "--seconds",
        "1",
        "--times",
        "3,10",
        "--deadlines-ms",
        "200,1000",
    ];
    let run = run(&site, "overload", &arguments);
    let rows = run.rows();
    let keys: Vec<(u64, u64)> = rows
        .iter()
        .map(|row| (count(row, "times"), count(row, "deadline_ms")))
        .collect();
    assert_eq!(keys, [(3, 200), (3, 1_000), (10, 200), (10, 1_000)]);
    for row in rows {
        assert_counts_add_up(row);
        assert!(row["goodput"].as_f64().unwrap() >= 0.0);
        assert!(count(row, "front_kib_before") > 0 && count(row, "front_kib_after") > 0);
        assert!(["PSS", "RSS"].contains(&row["memory"].as_str().unwrap()));
    }
    run.expect_exit_code(failed(rows));
    assert_eq!(run.charts(&site), [("overload.svg".to_owned(), 2)]);
}

#[test]
fn fairness_measures_one_principal_beside_another() {
    let site = site();
    let pki = &site.pki;
    let [cert, key] = [
        pki.certificate_file("other-releaser"),
        pki.key_file("other-releaser"),
    ];
    let arguments = [
        "--seconds",
        "1",
        "--rate",
        "20",
        "--callers",
        "0,4",
        "--light-cert",
        cert.to_str().unwrap(),
        "--light-key",
        key.to_str().unwrap(),
    ];
    let run = run(&site, "fairness", &arguments);
    let rows = run.rows();
    assert_eq!(count(&rows[0], "callers"), 0);
    assert_eq!(count(&rows[1], "callers"), 4);
    for row in rows {
        assert_counts_add_up(row);
    }
    assert_eq!(rows[0]["callers_in_time_per_s"], 0.0);
    assert!(rows[1]["callers_in_time_per_s"].as_f64().unwrap() > 0.0);
    let failures: u64 = rows.iter().map(|row| count(row, "callers_failed")).sum();
    run.expect_exit_code(failed(rows) + failures);
    let audit = site.audit();
    for name in ["/releaser", "/other-releaser"] {
        assert!(audit.contains(name), "{name}");
    }
    assert_eq!(run.charts(&site), [("fairness.svg".to_owned(), 2)]);
}

#[test]
fn connections_are_measured_while_they_are_active_and_idle() {
    let site = site();
    let run = run(
        &site,
        "connections",
        &["--seconds", "1", "--connections", "1,64", "--idle", "10"],
    );
    let of = |kind: &str| -> Vec<&Value> {
        let rows = run.rows().iter();
        rows.filter(|row| row["kind"] == kind).collect()
    };
    let idle: Vec<&str> = of("idle")
        .iter()
        .map(|row| row["api"].as_str().unwrap())
        .collect();
    assert_eq!(
        idle,
        ["gRPC, client certificate", "REST, HTTP/1.1", "REST, HTTP/2"]
    );
    for row in of("idle") {
        assert_eq!(count(row, "connections"), 10);
        assert!(row["kib_per_connection"].as_f64().unwrap() >= 0.0);
    }
    let active = of("active");
    assert_eq!(count(active[0], "connections"), 1);
    assert_eq!(active[1]["relative_to_64"], 1.0);
    let mut failed = 0;
    for row in active {
        let outcomes = ["in_time", "late", "refused", "failed"];
        assert_eq!(count(row, "calls"), sum(row, &outcomes), "{row:#}");
        failed += count(row, "failed");
    }
    run.expect_exit_code(failed);
    let charts = [
        ("connections-throughput.svg".to_owned(), 1),
        ("connections-memory.svg".to_owned(), 1),
    ];
    assert_eq!(run.charts(&site), charts);
}

/// Each member has a signed access token of an issuer that exists only for the run.
#[test]
fn every_member_of_a_storm_is_counted() {
    let site = site();
    let run = run(&site, "storm", &["--seconds", "1", "--members", "40"]);
    let [row] = &run.rows()[..] else {
        panic!("{:#}", run.document)
    };
    let outcomes = ["with_key", "late", "refused", "failed", "unsent"];
    assert_eq!(sum(row, &outcomes), 40, "{row:#}");
    assert!(
        count(row, "within_10_s") <= count(row, "with_key"),
        "{row:#}"
    );
    let causes = row["causes"].as_object().unwrap().values();
    let causes: u64 = causes.map(|count| count.as_u64().unwrap()).sum();
    assert_eq!(causes, sum(row, &["late", "refused", "failed"]), "{row:#}");
    let timeline = run.document["timeline"].as_array().unwrap();
    let total = |name| {
        timeline
            .iter()
            .map(|second| count(second, name))
            .sum::<u64>()
    };
    assert_eq!(total("arrived") + count(row, "unsent"), 40);
    assert_eq!(total("with_key"), count(row, "with_key"));
    run.expect_exit_code(count(row, "failed"));
    assert_eq!(count(row, "failed"), 0, "{row:#}");
    assert_eq!(run.charts(&site), [("storm.svg".to_owned(), 3)]);
    // The members fetched their keys as principals of that issuer, in a separate tenant.
    let audit = site.audit();
    assert!(
        audit.contains("token:keybroker-bench:bench-0000000"),
        "{audit}"
    );
    let shown = site.expect_ok(&["config", "show"]);
    assert!(!shown.contains("keybroker-bench"), "{shown}");
}

#[test]
fn a_restart_is_seen_by_a_client_that_retries() {
    let site = site();
    let run = run(
        &site,
        "restart",
        &["--seconds", "2", "--rate", "20", "--timeout-ms", "60000"],
    );
    let [row] = &run.rows()[..] else {
        panic!("{:#}", run.document)
    };
    assert_counts_add_up(row);
    assert!(count(row, "in_time") > 0, "{row:#}");
    for name in ["stop_ms", "start_ms", "gap_ms"] {
        assert!(row[name].as_f64().unwrap() > 0.0, "{name}: {row:#}");
    }
    let timeline = run.document["timeline"].as_array().unwrap();
    let ended: u64 = timeline
        .iter()
        .map(|interval| sum(interval, &["in_time", "not_in_time"]))
        .sum();
    assert_eq!(ended + count(row, "unsent"), count(row, "due"));
    run.expect_exit_code(count(row, "failed"));
    assert_eq!(run.charts(&site), [("restart.svg".to_owned(), 2)]);
}

/// The document of `steady` has its figures where earlier releases had them, too.
#[test]
fn the_document_of_the_steady_scenario_has_its_figures_twice() {
    let site = site();
    let run = run(&site, "steady", &["--seconds", "1"]);
    let [row] = &run.rows()[..] else {
        panic!("{:#}", run.document)
    };
    for (name, value) in row.as_object().unwrap() {
        assert_eq!(&run.document[name], value, "{name}");
    }
    assert_eq!(run.charts(&site), []);
}

/// Arguments, the exit code and a part of the message. `CERT` and `KEY` are the files of the principal with many calls.
const REFUSED: [(&str, i32, &str); 10] = [
    ("sprint", 2, "steady, open, overload, fairness"),
    ("steady --times 3", 2, "does not use --times"),
    ("steady --rate 1,2", 2, "one value for --rate"),
    ("open --connections 1,2", 2, "one value for --connections"),
    (
        "storm --attach 1 --endpoint https://localhost:1",
        2,
        "does not use --attach",
    ),
    ("overload --deadlines-ms 0", 2, "--deadlines-ms"),
    ("fairness", 2, "--light-cert and --light-key"),
    ("fairness --light-cert CERT", 2, "--light-key"),
    (
        "fairness --light-cert CERT --light-key KEY",
        2,
        "the same principal",
    ),
    (
        "connections --idle 5000",
        3,
        "connections_per_principal_max",
    ),
];

#[test]
fn arguments_that_do_not_fit_are_refused_before_anything_is_started() {
    let site = site();
    let files = [
        site.pki.certificate_file("releaser"),
        site.pki.key_file("releaser"),
    ];
    let [cert, key] = files.map(|path| path.to_str().unwrap().to_owned());
    for (arguments, code, expected) in REFUSED {
        let mut command =
            site.command(&["bench", "--seconds", "1", "--cert", &cert, "--key", &key]);
        command
            .arg("--ca")
            .arg(site.pki.ca_file())
            .arg("--scenario");
        command.args(arguments.split(' ').map(|word| match word {
            "CERT" => cert.as_str(),
            "KEY" => key.as_str(),
            word => word,
        }));
        let finished = Finished::from(command.output().unwrap());
        assert_eq!(finished.code, Some(code), "{arguments}: {finished:#?}");
        assert!(
            finished.stderr.contains(expected),
            "{arguments}: {finished:#?}"
        );
        assert_eq!(finished.stdout, "", "{arguments}");
    }
    assert!(!site.audit().contains("user_key."));
}

#[test]
fn files_that_are_no_documents_are_refused_by_name() {
    let site = site();
    let folder = site.folder().join("documents");
    fs::create_dir(&folder).unwrap();
    let file = folder.join("odd.json");
    for (text, expected) in [
        ("no JSON", "expected"),
        ("{}", "no field `format`"),
        (
            "{\"format\": 2}",
            "format 2, and this release reads format 1",
        ),
        ("{\"format\": 1}", "missing field"),
    ] {
        fs::write(&file, text).unwrap();
        let finished = site.run(&[
            "bench-report",
            file.to_str().unwrap(),
            "--out",
            folder.to_str().unwrap(),
        ]);
        assert_eq!(finished.code, Some(2), "{finished:#?}");
        assert!(finished.stderr.contains("odd.json"), "{finished:#?}");
        assert!(finished.stderr.contains(expected), "{finished:#?}");
    }
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
}
