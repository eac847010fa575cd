//! More calls than the token can serve: which are refused, which are served, and how it is recorded. The token is the real one,
//! and takes longer for each unwrap.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use keybroker_proto::UnwrapUserKeyRequest;
use serde_json::Value;
use tokio::task::JoinSet;
use tonic::{Request, Status};
use tonic_types::StatusExt as _;

use crate::{
    client::{Caller, NAME, refused},
    faulty::{Fault, Faulty, code},
    faulty_token::site,
    process::{Broker, until},
    site::Options,
    wire::get,
};

const MATERIAL: &[u8] = b"material of this user";
/// Time of an unwrap on this token: far above what scheduling on a busy machine adds.
const UNWRAP: Duration = Duration::from_millis(100);
/// Sessions of the site: one worker with two.
const SESSIONS: usize = 2;

async fn slow_token() -> (Broker, Faulty) {
    let (site, faulty) = site(Options {
        sessions_per_worker: SESSIONS,
        ..Options::default()
    });
    let broker = Broker::start_on(site);
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("ada", MATERIAL).await.unwrap();
    faulty.set(
        "C_Decrypt",
        &Fault {
            milliseconds: u32::try_from(UNWRAP.as_millis()).unwrap(),
            ..Fault::always(code::LATE)
        },
    );
    // The broker has to know how long an unwrap takes now.
    let releaser = Caller::of(&broker, "releaser");
    for _ in 0..16 {
        releaser.unwrap("ada").await.unwrap();
    }
    (broker, faulty)
}

async fn unwrap_within(caller: &Caller, deadline: Duration) -> Result<(), Status> {
    let mut request = Request::new(UnwrapUserKeyRequest {
        user: "ada".to_owned(),
        key_name: NAME.to_owned(),
        recipient: None,
    });
    request.set_timeout(deadline);
    let answer = caller.keys.clone().unwrap_user_key(request).await?;
    assert_eq!(answer.into_inner().key_material, MATERIAL);
    Ok(())
}

/// So many calls of one principal at once, each of which waits for a long time. Returns once all of them wait; their number
/// that was answered is counted.
fn saturate(broker: &Broker, count: usize) -> Arc<AtomicUsize> {
    let answered = Arc::new(AtomicUsize::new(0));
    let releaser = Caller::of(broker, "releaser");
    for _ in 0..count {
        let (releaser, answered) = (releaser.clone(), Arc::clone(&answered));
        tokio::spawn(async move {
            unwrap_within(&releaser, Duration::from_mins(1))
                .await
                .unwrap();
            answered.fetch_add(1, Ordering::Relaxed);
        });
    }
    until("the calls to wait", || {
        let length = get(broker.status, "/metrics");
        let length = length
            .lines()
            .find_map(|line| line.strip_prefix("keybroker_token_queue_length{token=\"default\"} "));
        let waiting: usize = length.unwrap().parse().unwrap();
        (waiting > count / 2).then_some(())
    });
    answered
}

/// Calls of one principal that would wait longer than their deadline are refused when they come, without any work on the
/// token; those with enough time are served, and so is another principal with the same short deadline.
#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_cannot_be_in_time_is_refused_on_arrival() {
    let (broker, faulty) = slow_token().await;
    let waiting = 100;
    let answered = saturate(&broker, waiting);
    let begun = faulty.count("C_Decrypt begins");
    let short = Duration::from_millis(1_500);
    let releaser = Caller::of(&broker, "releaser");
    for _ in 0..20 {
        let status = unwrap_within(&releaser, short).await.unwrap_err();
        // At least what the calls before it need, at random up to twice as much.
        let retry = status
            .get_details_retry_info()
            .unwrap()
            .retry_delay
            .unwrap();
        assert!(retry > short && retry < Duration::from_mins(2), "{retry:?}");
        refused(Err::<(), _>(status), "QUEUE_FULL");
    }
    // Refused at once: those calls would have taken the token a second, in which it serves twenty others.
    let meanwhile = faulty.count("C_Decrypt begins") - begun;
    assert!(
        meanwhile < 20,
        "{meanwhile} calls were served before 20 were refused"
    );
    let other = Caller::of(&broker, "other-releaser");
    unwrap_within(&other, short).await.unwrap();
    assert!(
        answered.load(Ordering::Relaxed) < waiting,
        "nothing waited any more"
    );
}

/// A principal with few calls is served after one or two of another's, however many of those wait.
#[tokio::test(flavor = "multi_thread")]
async fn principals_are_served_in_turn() {
    let (broker, _faulty) = slow_token().await;
    let waiting = 100;
    let answered = saturate(&broker, waiting);
    let polite = Caller::of(&broker, "other-releaser");
    for _ in 0..5 {
        let before = answered.load(Ordering::Relaxed);
        polite.unwrap("ada").await.unwrap();
        let served = answered.load(Ordering::Relaxed) - before;
        // Those in the sessions, and one of each session's next turn.
        assert!(
            served <= 4 * SESSIONS,
            "{served} calls of the other principal came first"
        );
    }
    assert!(
        answered.load(Ordering::Relaxed) < waiting,
        "nothing waited any more"
    );
}

/// Refusals for overload are one entry for each principal and second, and one line in the log.
#[tokio::test(flavor = "multi_thread")]
async fn refusals_for_overload_are_counted() {
    const REFUSED: u64 = 50;
    let (broker, _faulty) = slow_token().await;
    let _answered = saturate(&broker, 60);
    let releaser = Caller::of(&broker, "releaser");
    for _ in 0..REFUSED {
        let answer = unwrap_within(&releaser, Duration::from_millis(500)).await;
        refused(answer, "QUEUE_FULL");
    }
    let entries = || -> Vec<Value> {
        let audit = broker.site.audit();
        let lines = audit.lines().filter(|line| line.contains("QUEUE_FULL"));
        lines
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    };
    let entries = until("the entries", || {
        let entries = entries();
        let counted: u64 = entries
            .iter()
            .map(|entry| entry["count"].as_u64().unwrap())
            .sum();
        (counted == REFUSED).then_some(entries)
    });
    assert!(entries.len() < 30, "{} entries", entries.len());
    for entry in entries {
        assert_eq!(entry["action"], "user_key.unwrap", "{entry}");
        assert_eq!(entry["outcome"], "failed", "{entry}");
        assert!(
            entry["principal"].as_str().unwrap().ends_with("/releaser"),
            "{entry}"
        );
        assert!(entry.get("call_id").is_none(), "{entry}");
    }
    let log = broker.site.log();
    let lines = log
        .lines()
        .filter(|line| line.contains("calls were refused"));
    assert!((1..30).contains(&lines.count()), "{log}");
}

/// The jobs of cancelled calls leave the queue before the token works on them. Each call still has its audit entry.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_call_costs_the_token_nothing() {
    const CALLS: usize = 60;
    let (broker, faulty) = slow_token().await;
    let releaser = Caller::of(&broker, "releaser");
    let mut calls = JoinSet::new();
    for _ in 0..CALLS {
        let releaser = releaser.clone();
        calls.spawn(async move { unwrap_within(&releaser, Duration::from_mins(1)).await });
    }
    let length = || {
        let page = get(broker.status, "/metrics");
        let length = page
            .lines()
            .find_map(|line| line.strip_prefix("keybroker_token_queue_length{token=\"default\"} "));
        length.unwrap().parse::<usize>().unwrap()
    };
    until("the calls to wait", || (length() > CALLS / 2).then_some(()));
    let begun = faulty.count("C_Decrypt begins");
    calls.shutdown().await;
    until("the queue to be empty", || (length() == 0).then_some(()));
    // The waiting calls would have taken the token more than a second.
    let meanwhile = faulty.count("C_Decrypt begins") - begun;
    assert!(meanwhile < CALLS / 3, "{meanwhile} jobs were done");
    until("the audit entries", || {
        let audit = broker.site.audit();
        let entries = audit.lines().filter(|line| line.contains("DEADLINE"));
        (entries.count() > CALLS / 3).then_some(())
    });
}
