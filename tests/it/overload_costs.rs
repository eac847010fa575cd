//! Goodput, refusals and fairness under more load than the token can serve. `docs/reliability.md` has the figures of the release
//! build, which `KEYBROKER_TEST_PROGRAM` names. Every figure depends on the machine and its load, so the suite leaves these
//! measurements out; `overload` tests the behaviour.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use keybroker_proto::UnwrapUserKeyRequest;
use tokio::task::JoinSet;
use tonic::{Code, Request, Status};

use crate::{
    client::{Caller, NAME},
    faulty::{Fault, code},
    faulty_token::site,
    listeners::floods::resident_kib,
    process::Broker,
    site::Options,
};

const MATERIAL: &[u8] = b"material of this user";
const CONNECTIONS: usize = 16;
/// Callers of the measurement of capacity: more than the token has sessions.
const CALLERS: usize = 32;
/// Part of the capacity within the deadline that must be left under overload.
const GOODPUT: f64 = 0.95;

/// Of one measurement.
fn duration() -> Duration {
    let seconds = std::env::var("KEYBROKER_TEST_OVERLOAD_SECONDS").ok();
    Duration::from_secs(seconds.map_or(10, |text| text.parse().unwrap()))
}

/// A broker on a token of which each unwrap takes this time longer, with four sessions.
async fn broker_on(extra: Duration) -> Broker {
    let (site, faulty) = site(Options {
        workers: 2,
        sessions_per_worker: 2,
        ..Options::default()
    });
    let broker = Broker::start_on(site);
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("ada", MATERIAL).await.unwrap();
    if !extra.is_zero() {
        let fault = Fault {
            milliseconds: u32::try_from(extra.as_millis()).unwrap(),
            ..Fault::always(code::LATE)
        };
        faulty.set("C_Decrypt", &fault);
    }
    broker
}

fn callers(broker: &Broker, name: &str) -> Vec<Caller> {
    (0..CONNECTIONS).map(|_| Caller::of(broker, name)).collect()
}

async fn unwrap(caller: Caller, deadline: Duration) -> Result<(), Status> {
    let mut request = Request::new(UnwrapUserKeyRequest {
        user: "ada".to_owned(),
        key_name: NAME.to_owned(),
        recipient: None,
    });
    request.set_timeout(deadline);
    let mut keys = caller.keys;
    let answer = keys.unwrap_user_key(request).await?;
    assert_eq!(answer.into_inner().key_material, MATERIAL);
    Ok(())
}

/// Calls a second in a closed loop with long deadlines.
async fn capacity(callers: &[Caller]) -> f64 {
    let until = Instant::now() + duration();
    let loops = (0..CALLERS).map(|number| {
        let caller = callers[number % callers.len()].clone();
        async move {
            let mut served = 0_u32;
            while Instant::now() < until {
                unwrap(caller.clone(), Duration::from_mins(1))
                    .await
                    .unwrap();
                served += 1;
            }
            served
        }
    });
    let begun = Instant::now();
    let served: u32 = join_all(loops).await.into_iter().sum();
    f64::from(served) / begun.elapsed().as_secs_f64()
}

/// What became of the calls of one measurement.
struct Outcome {
    /// Answers within the deadline, a second.
    goodput: f64,
    refused: usize,
    /// Calls that ended at their deadline, or with their connection.
    late: usize,
    refusal_p99: Duration,
}

/// The time that so many of a thousand calls do not exceed.
fn percentile(mut times: Vec<Duration>, per_mille: usize) -> Duration {
    times.sort();
    let last = times.len().saturating_sub(1);
    let at = (last * per_mille).div_ceil(1_000);
    times.get(at).copied().unwrap_or_default()
}

/// Starts calls at a fixed rate, whatever becomes of those before (an open loop).
async fn open_loop(callers: &[Caller], rate: f64, deadline: Duration) -> Outcome {
    let begun = Instant::now();
    let mut calls = JoinSet::new();
    let mut started = 0_u32;
    let mut next = callers.iter().cycle().cloned();
    while begun.elapsed() < duration() {
        let due = begun.elapsed().as_secs_f64() * rate;
        while f64::from(started) < due {
            let caller = next.next().unwrap();
            calls.spawn(async move {
                let started = Instant::now();
                let result = unwrap(caller, deadline).await;
                (result, started.elapsed())
            });
            started += 1;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    // Those that came in the last moments are answered after the end: counted over the whole time that the token worked.
    let outcomes = calls.join_all().await;
    let elapsed = begun.elapsed().as_secs_f64();
    let (mut served, mut late, mut refusals) = (0_u32, 0, Vec::new());
    for (result, took) in outcomes {
        match result {
            Ok(()) if took <= deadline => served += 1,
            Ok(()) => late += 1,
            Err(status) if status.code() == Code::ResourceExhausted => refusals.push(took),
            Err(_) => late += 1,
        }
    }
    Outcome {
        goodput: f64::from(served) / elapsed,
        refused: refusals.len(),
        late,
        refusal_p99: percentile(refusals, 990),
    }
}

/// An open loop of three and ten times the token's capacity: the token works for callers that get their answer in time.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "measures for minutes"]
async fn goodput_under_overload() {
    let devices = [("20 ms for each unwrap", 20), ("SoftHSM", 0)];
    for (device, extra) in devices {
        let broker = broker_on(Duration::from_millis(extra)).await;
        let callers = callers(&broker, "releaser");
        capacity(&callers).await;
        for times in [3.0, 10.0] {
            for deadline in [200, 1_000, 5_000] {
                let capacity = capacity(&callers).await;
                let before = resident_kib(&broker);
                let outcome =
                    open_loop(&callers, capacity * times, Duration::from_millis(deadline)).await;
                let share = outcome.goodput / capacity;
                eprintln!(
                    "{device}, {capacity:.0}/s, {times} times as many calls, {deadline} ms: goodput {share:.2}, {} refused with \
                     p99 {:?}, {} late, memory {before} -> {} KiB",
                    outcome.refused,
                    outcome.refusal_p99,
                    outcome.late,
                    resident_kib(&broker)
                );
                // On SoftHSM the callers of this test take the processors from the token.
                if extra > 0 {
                    assert!(share >= GOODPUT && outcome.refused > 0, "{share}");
                }
            }
        }
    }
}

/// One caller with five calls a second, alone and beside callers of another principal that call as fast as they can.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "measures for minutes"]
async fn fairness_under_overload() {
    let broker = broker_on(Duration::from_millis(20)).await;
    let saturating = callers(&broker, "releaser");
    let polite = Caller::of(&broker, "other-releaser");
    for count in [0, 16, 250, 1_000] {
        let mut calls = JoinSet::new();
        for number in 0..count {
            let caller = saturating[number % saturating.len()].clone();
            calls.spawn(async move {
                loop {
                    unwrap(caller.clone(), Duration::from_secs(10)).await.ok();
                }
            });
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
        let until = Instant::now() + duration();
        let mut times = Vec::new();
        let mut refused = 0;
        while Instant::now() < until {
            let begun = Instant::now();
            match unwrap(polite.clone(), Duration::from_secs(10)).await {
                Ok(()) => times.push(begun.elapsed()),
                Err(_) => refused += 1,
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        calls.abort_all();
        while calls.join_next().await.is_some() {}
        eprintln!(
            "beside {count} callers: {} calls, p50 {:?}, p99 {:?}, {refused} refused",
            times.len(),
            percentile(times.clone(), 500),
            percentile(times.clone(), 990)
        );
        assert_eq!(refused, 0);
        assert!(!times.is_empty());
    }
}
