//! `keybroker bench` measures, compares and cleans up. How fast it is, is nobody's business here.

use std::{fs, process::Command};

use rustix::process::Signal;
use serde_json::Value;

use crate::{
    pki,
    process::{children_of, is_alive, send, until},
    servers::{Kind, Server, section},
    site::{Finished, Options, Site},
};

/// A site whose releaser may enrol as well.
pub(crate) fn site() -> Site {
    site_with(Options::default())
}

fn site_with(options: Options) -> Site {
    let site = Site::fresh(options);
    let releaser = format!("san = \"URI:{}\"\nroles = [", pki::uri("releaser"));
    site.write_configuration(|text| {
        assert!(text.contains(&releaser));
        *text = text.replace(&releaser, &format!("{releaser}\"enrol\", "));
    });
    site
}

fn bench(site: &Site, name: &str, arguments: &[&str]) -> Command {
    let mut command = site.command(&["bench", "--connections", "3"]);
    if !arguments.contains(&"--seed") {
        command.args(["--users", "5"]);
    }
    command
        .arg("--ca")
        .arg(site.pki.ca_file())
        .arg("--cert")
        .arg(site.pki.certificate_file(name))
        .arg("--key")
        .arg(site.pki.key_file(name))
        .args(arguments);
    command
}

#[test]
fn both_measurements_are_made_and_put_side_by_side() {
    let site = site();
    let file = site.folder().join("figures.json");
    let measure = [
        "--seconds",
        "1",
        "--warm-up",
        "0",
        "--json",
        file.to_str().unwrap(),
    ];
    // Twice: the second run finds the users of the first.
    for _ in 0..2 {
        let finished = Finished::from(bench(&site, "releaser", &measure).output().unwrap());
        assert_eq!(finished.code, Some(0), "{finished:#?}");
        assert!(
            finished.stdout.contains("broker_ops_per_s"),
            "{finished:#?}"
        );
    }
    let figures: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    let positive = [
        "token_ops_per_s",
        "token_ops_per_s_one_thread",
        "broker_ops_per_s",
        "share",
        "p50_ms",
        "p99_ms",
        "p999_ms",
        "added_mean_ms",
        "added_p50_ms",
        "front_cpu_ms_per_op",
        "worker_cpu_ms_per_op",
        "load_cpu_ms_per_op",
        "token_cpu_ms_per_op",
    ];
    for name in positive {
        let value = figures[name].as_f64();
        assert!(
            value.is_some_and(|value| value > 0.0),
            "{name}: {figures:#}"
        );
    }
    for (name, value) in [("errors", 0), ("rsa_bits", 2048), ("connections", 3)] {
        assert_eq!(figures[name], value, "{name}");
    }
    assert!(site.audit().contains("\"user\":\"bench-0000004\""));
}

#[test]
fn callers_can_be_held_back() {
    let site = site();
    let slowly = [
        "--seconds",
        "2",
        "--warm-up",
        "0",
        "--rate",
        "10",
        "-o",
        "json",
    ];
    let finished = Finished::from(bench(&site, "releaser", &slowly).output().unwrap());
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    let figures: Value = serde_json::from_str(&finished.stdout).unwrap();
    let operations = figures["operations"].as_u64().unwrap();
    assert!((1..=25).contains(&operations), "{figures:#}");
    assert_eq!(figures["rate"], 10);
}

#[test]
fn a_certificate_that_may_not_enrol_is_an_answer_not_a_figure() {
    let site = site();
    let measure = ["--seconds", "1", "--warm-up", "0"];
    let finished = Finished::from(bench(&site, "lifecycle", &measure).output().unwrap());
    assert_eq!(finished.code, Some(10), "{finished:#?}");
    assert!(finished.stderr.contains("POLICY"), "{finished:#?}");
    assert_eq!(finished.stdout, "");
}

#[test]
fn an_interrupted_measurement_leaves_no_broker_behind() {
    let site = site();
    let mut child = bench(&site, "releaser", &["--seconds", "1", "--warm-up", "60"])
        .spawn()
        .unwrap();
    let is_broker = |pid: &u32| {
        fs::read_to_string(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| line.contains("\0serve\0"))
    };
    let (broker, worker) = until("the broker and its worker", || {
        let broker = children_of(child.id()).into_iter().find(is_broker)?;
        Some((broker, *children_of(broker).first()?))
    });
    send(child.id(), Signal::TERM);
    let status = until("the end of bench", || child.try_wait().unwrap());
    assert_eq!(status.code(), Some(130));
    assert!(!is_alive(broker));
    until("the end of the worker", || {
        (!is_alive(worker)).then_some(())
    });
}

/// A person at a terminal sees how far it is; a file gets the remarks alone.
#[test]
fn enrolling_shows_its_progress_on_a_terminal_and_nowhere_else() {
    let site = site();
    let plain = bench(&site, "releaser", &["--seconds", "1", "--warm-up", "0"]);
    let line: Vec<String> = [plain.get_program()]
        .into_iter()
        .chain(plain.get_args())
        .map(|word| format!("'{}'", word.to_str().unwrap()))
        .collect();
    let mut terminal = Command::new("script");
    terminal.args(["-qec", &line.join(" "), "/dev/null"]);
    for (name, value) in plain.get_envs() {
        terminal.env(name, value.unwrap_or_default());
    }
    let shown = Finished::from(terminal.env("TERM", "xterm").output().unwrap());
    assert_eq!(shown.code, Some(0), "{shown:#?}");
    assert!(shown.stdout.contains("enrolling users"), "{shown:#?}");
    assert!(shown.stdout.contains("/5, "), "{shown:#?}");

    let finished = Finished::from(
        bench(&site, "releaser", &["--seconds", "1", "--warm-up", "0"])
            .output()
            .unwrap(),
    );
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    assert!(!finished.stderr.contains("enrolling"), "{finished:#?}");
}

/// Records that are written past the broker unwrap like any other, and are written once.
fn records_are_seeded(site: &Site, sql: impl Fn(&str) -> String) {
    // Neither is a multiple of a transaction's records; the second run has a part of them already.
    for count in ["700", "1234", "1234"] {
        let seed = ["--seed", count, "--seconds", "1", "--warm-up", "0"];
        let mut command = bench(site, "releaser", &seed);
        let finished = Finished::from(command.args(["-o", "json"]).output().unwrap());
        assert_eq!(finished.code, Some(0), "{finished:#?}");
        let figures: Value = serde_json::from_str(&finished.stdout).unwrap();
        assert_eq!(figures["users"].to_string(), count);
        assert_eq!(figures["errors"], 0);
        assert!(figures["operations"].as_u64().unwrap() > 0, "{figures:#}");
        for table in ["records", "revisions"] {
            let rows = sql(&format!("SELECT count(*) FROM {table};"));
            assert_eq!(rows.trim(), count, "{table}");
        }
    }
    let audit = site.audit();
    assert!(audit.contains("bench.seed"));
    assert!(!audit.contains("user_key.create"));
}

fn records_are_seeded_on(kind: Kind) {
    let server = Server::start(kind);
    let database = server.database();
    let site = site_with(Options {
        store: Some(section(&server.settings(&database))),
        ..Options::default()
    });
    records_are_seeded(&site, |query| server.sql(&database, query));
}

#[test]
fn records_are_seeded_on_sqlite() {
    let site = site();
    records_are_seeded(&site, |query| site.sql(query));
}

#[test]
fn records_are_seeded_on_postgresql() {
    records_are_seeded_on(Kind::PostgreSql);
}

#[test]
fn records_are_seeded_on_mariadb() {
    records_are_seeded_on(Kind::MariaDb);
}
