//! Measures the speed of a run, and what callers notice of it.

use std::{
    fs,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use keybroker_proto::{PauseRewrapRequest, ResumeRewrapRequest, RewrapPhase, RewrapState};
use serde_json::Value;

use super::{done, enrol, names, number, on_sqlite, start, status, two_keys_and_rows};
use crate::{client::Caller, process::Broker, site::Site};

/// CPU time of processes in seconds.
fn cpu_seconds(pids: &[u32]) -> f64 {
    let ticks: u64 = pids
        .iter()
        .map(|pid| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let rest = stat
                .rsplit_once(") ")
                .map(|(_, rest)| rest)
                .unwrap_or_default();
            let field = |at: usize| -> u64 {
                let mut fields = rest.split(' ');
                fields
                    .nth(at)
                    .and_then(|text| text.parse().ok())
                    .unwrap_or(0)
            };
            field(11) + field(12)
        })
        .sum();
    let ticks = u32::try_from(ticks).unwrap();
    f64::from(ticks) / 100.0
}

fn percentile(times: &mut [Duration], per_mille: usize) -> Duration {
    times.sort_unstable();
    let last = times.len().saturating_sub(1);
    times[last * per_mille / 1_000]
}

/// The times of unwraps in an open loop of this many calls a second.
async fn unwraps(
    broker: &Broker,
    users: &[String],
    per_second: u32,
    seconds: u64,
) -> Vec<Duration> {
    let callers: Vec<_> = (0..8).map(|_| Caller::of(broker, "releaser")).collect();
    let gap = Duration::from_secs(1) / per_second;
    let begun = tokio::time::Instant::now();
    let mut calls = Vec::new();
    let count = u32::try_from(seconds).unwrap() * per_second;
    for number in 0..count {
        tokio::time::sleep_until(begun + gap * number).await;
        let at = usize::try_from(number).unwrap();
        let (caller, user) = (
            callers[at % callers.len()].clone(),
            users[at % users.len()].clone(),
        );
        calls.push(tokio::spawn(async move {
            let asked = Instant::now();
            caller.unwrap(&user).await.unwrap();
            asked.elapsed()
        }));
    }
    join_all(calls)
        .await
        .into_iter()
        .map(Result::unwrap)
        .collect()
}

/// Rows per CPU second against the bare token, and the foreground p99 with and without. `docs/reliability.md` has the command.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "measures for minutes"]
async fn the_speed_and_the_price_of_a_run() {
    let rows = number("KEYBROKER_TEST_REWRAP_ROWS", 20_000);
    let seconds = u64::try_from(number("KEYBROKER_TEST_REWRAP_SECONDS", 15)).unwrap();
    let per_second = u32::try_from(number("KEYBROKER_TEST_REWRAP_CALLS", 200)).unwrap();
    let site = two_keys_and_rows(on_sqlite(), rows, &[], true).await;
    let bare = bare_decryptions(&site);
    let broker = Broker::start_on(site);
    let users = names(50);
    enrol(&broker, &users).await;

    // Beside calls: paused, running, paused, running.
    unwraps(&broker, &users, per_second, 3).await;
    let mut times = [Vec::new(), Vec::new()];
    let mut admin = Caller::of(&broker, "admin").control;
    for round in 0..4 {
        let is_running = round % 2 == 1;
        let mut moved = 0;
        if is_running {
            if round == 1 {
                start(&broker, 0).await.unwrap();
            } else {
                admin
                    .resume_rewrap(ResumeRewrapRequest::default())
                    .await
                    .unwrap();
            }
            moved = status(&broker).await.rewrap.unwrap().revisions_moved;
        }
        times[usize::from(is_running)].extend(unwraps(&broker, &users, per_second, seconds).await);
        if is_running {
            let now = status(&broker).await.rewrap.unwrap();
            assert_eq!(now.state(), RewrapState::Running, "too few rows: {now:?}");
            admin.pause_rewrap(PauseRewrapRequest {}).await.unwrap();
            eprintln!(
                "beside {per_second} calls/s: {} rows in {seconds} s",
                now.revisions_moved - moved
            );
        }
    }
    let [without, with] = &mut times;
    let (alone, beside) = (percentile(without, 990), percentile(with, 990));
    eprintln!(
        "unwrap p50 {:?} -> {:?}, p99 {alone:?} -> {beside:?}, ratio {:.2}",
        percentile(without, 500),
        percentile(with, 500),
        beside.as_secs_f64() / alone.as_secs_f64()
    );

    // On an idle broker.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let pids = [vec![broker.pid()], broker.workers()].concat();
    let before = status(&broker).await.rewrap.unwrap().revisions_moved;
    let (cpu, begun) = (cpu_seconds(&pids), Instant::now());
    admin
        .resume_rewrap(ResumeRewrapRequest::default())
        .await
        .unwrap();
    let (moved, spent) = loop {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let rewrap = status(&broker).await.rewrap.unwrap();
        let spent = cpu_seconds(&pids) - cpu;
        // The verification is measured apart.
        if rewrap.phase() != RewrapPhase::Moving || rewrap.left < 2_000 {
            break (rewrap.revisions_moved - before, spent);
        }
    };
    let moved = f64::from(u32::try_from(moved).unwrap());
    let per_cpu_second = moved / spent;
    eprintln!(
        "idle: {moved} rows in {:.1} s, {:.0} rows/s, {per_cpu_second:.0} rows per CPU second; bare token {bare:.0}: {:.0} %",
        begun.elapsed().as_secs_f64(),
        moved / begun.elapsed().as_secs_f64(),
        per_cpu_second / bare * 100.0
    );
    done(&broker).await;
}

/// Decryptions of the bare token per CPU second, as `bench` measures them.
fn bare_decryptions(site: &Site) -> f64 {
    let file = site.folder().join("bench.json");
    let pki = &site.pki;
    site.expect_ok(&[
        "bench",
        "--ca",
        pki.ca_file().to_str().unwrap(),
        "--cert",
        pki.certificate_file("releaser").to_str().unwrap(),
        "--key",
        pki.key_file("releaser").to_str().unwrap(),
        "--seed",
        "100",
        "--seconds",
        "8",
        "--warm-up",
        "0",
        "--connections",
        "4",
        "--json",
        file.to_str().unwrap(),
    ]);
    let document: Value = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    1_000.0 / document["token_cpu_ms_per_op"].as_f64().unwrap()
}
