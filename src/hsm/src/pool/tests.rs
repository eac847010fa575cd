//! Tests the choice of the token for a job, and the effects of a failed token on callers.

use std::collections::BTreeSet;

use keybroker_core::envelope::mac::MacMessage;

use crate::{Planned, link::Link, queue::Operation, supervisor::testing::idle};

use super::*;

const KEY: WrappingKeyId = WrappingKeyId::from_bytes([1; 16]);
const OTHER: WrappingKeyId = WrappingKeyId::from_bytes([2; 16]);
const SHA256: Algorithm = Algorithm::RsaOaepSha256;
const SHA1: Algorithm = Algorithm::RsaOaepSha1;

/// Returns a pool of tokens `a`, `b`, … with these priorities. Each token contains `KEY` and has one worker with one
/// session.
fn pool(priorities: &[u8]) -> (Arc<Pool>, Vec<Arc<Link>>) {
    let mut members = Vec::new();
    let mut links = Vec::new();
    for (name, priority) in ["a", "b", "c"].into_iter().zip(priorities) {
        let supervisor = idle(name, &[KEY]);
        links.push(supervisor.worker_for_test(1, 1, SHA256));
        members.push(Arc::new(Member::new(supervisor, *priority)));
    }
    let pool = of(members, &[]);
    // No token is due for a probe.
    for member in &pool.members().opened {
        member.last_job_ms.store(u64::MAX, Ordering::Relaxed);
    }
    (Arc::new(pool), links)
}

fn settings(name: &str) -> Settings {
    toml::from_str(&format!("name = \"{name}\"\nmodule = \"/none.so\"")).unwrap()
}

/// Returns a pool of these tokens, which starts no processes, and of tokens that are not used.
fn of(members: Vec<Arc<Member>>, unused: &[&str]) -> Pool {
    let unused = unused.iter().map(|name| settings(name)).collect();
    let members = Members::new(members, unused);
    let state = StateDirectory::below(std::path::Path::new("/none"));
    Pool::of(members, PathBuf::from("/none"), state)
}

fn caller(within: Duration) -> Caller {
    Caller::principal("somebody", Deadline::after(within))
}

fn message() -> MacMessage {
    MacMessage::request(&[b"a message"])
}

type Call = tokio::task::JoinHandle<Result<[u8; 32], Error>>;

/// From now on, each job of a token is expected to take this time.
fn takes(pool: &Pool, time: Duration) {
    for member in &pool.members().opened {
        let kind = Kind::new(KEY, Operation::Mac);
        member.supervisor.queue().measured_for_test(kind, time);
    }
}

/// Starts a call and lets it reach a token.
async fn call_within(pool: &Arc<Pool>, within: Duration) -> Call {
    let pool = Arc::clone(pool);
    let call = tokio::spawn(async move { pool.mac(KEY, &message(), &caller(within)).await });
    settle().await;
    call
}

async fn call(pool: &Arc<Pool>) -> Call {
    call_within(pool, Duration::from_secs(5)).await
}

/// Lets the spawned tasks run until they wait.
async fn settle() {
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
}

fn in_flight(links: &[Arc<Link>]) -> Vec<usize> {
    links.iter().map(|link| link.in_flight()).collect()
}

/// The token answers its jobs with a MAC of these bytes.
fn answer(pool: &Pool, member: usize, link: &Link, byte: u8) {
    for job in link.take_jobs() {
        let members = pool.members();
        let supervisor = &members.opened[member].supervisor;
        supervisor.served_for_test(job, Ok(vec![byte; 32].into()));
    }
}

#[tokio::test]
async fn the_highest_priority_gets_the_jobs_while_it_meets_the_deadline() {
    let (pool, links) = pool(&[50, 100]);
    // Members are in the order of their priorities.
    assert_eq!(pool.members().opened[0].supervisor.name(), "b");
    takes(&pool, Duration::from_millis(200));
    let mut calls = Vec::new();
    for _ in 0..20 {
        calls.push(call_within(&pool, Duration::from_mins(1)).await);
    }
    assert_eq!(in_flight(&links), [0, 1], "the other token was not needed");
    // This call would be late behind the other calls.
    let urgent = call_within(&pool, Duration::from_secs(2)).await;
    assert_eq!(in_flight(&links), [1, 1]);
    answer(&pool, 1, &links[0], 7);
    assert_eq!(urgent.await.unwrap().unwrap(), [7; 32]);
    for call in calls {
        call.abort();
    }
}

#[tokio::test]
async fn equal_priorities_share_by_the_expected_wait() {
    let (pool, links) = pool(&[100, 100]);
    let mut calls = Vec::new();
    for _ in 0..20 {
        calls.push(call(&pool).await);
    }
    assert_eq!(in_flight(&links), [1, 1]);
    let members = pool.members();
    let lengths = members
        .opened
        .iter()
        .map(|member| member.supervisor.state().queue_length);
    assert_eq!(lengths.collect::<Vec<_>>(), [9, 9]);
    for call in calls {
        call.abort();
    }
}

#[tokio::test]
async fn jobs_of_a_lost_worker_and_waiting_jobs_go_to_another_token() {
    let (pool, links) = pool(&[100, 50]);
    let calls = [call(&pool).await, call(&pool).await, call(&pool).await];
    assert_eq!(in_flight(&links), [1, 0]);
    pool.members().opened[0].supervisor.lose_for_test(&links[0]);
    settle().await;
    assert_eq!(in_flight(&links), [0, 1]);
    while !calls.iter().all(Call::is_finished) {
        answer(&pool, 1, &links[1], 9);
        settle().await;
    }
    for call in calls {
        assert_eq!(call.await.unwrap().unwrap(), [9; 32]);
    }
    // The token is used again as soon as it has a worker.
    let back = pool.members().opened[0]
        .supervisor
        .worker_for_test(2, 1, SHA256);
    let again = call(&pool).await;
    assert_eq!(back.in_flight(), 1);
    again.abort();
}

/// Without a second token for its key, a job waits for the replacement worker, as with one token.
#[tokio::test]
async fn the_last_token_is_waited_for() {
    let (pool, links) = pool(&[100, 50]);
    for (member, link) in pool.members().opened.iter().zip(&links) {
        member.supervisor.lose_for_test(link);
    }
    let waiting = call(&pool).await;
    assert!(!waiting.is_finished());
    // The token that gets a worker first does the job, even if the job waits for the other token.
    let back = pool.members().opened[1]
        .supervisor
        .worker_for_test(2, 1, SHA256);
    tokio::time::sleep(attempts::AGAIN * 3).await;
    answer(&pool, 1, &back, 5);
    assert_eq!(waiting.await.unwrap().unwrap(), [5; 32]);
}

#[tokio::test]
async fn a_job_that_is_answered_late_is_given_to_another_token_too() {
    let (pool, links) = pool(&[100, 50]);
    let began = Instant::now();
    let late = call(&pool).await;
    while links[1].in_flight() == 0 {
        assert!(
            began.elapsed() < Duration::from_secs(3),
            "no other token got the job"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(
        began.elapsed() >= Duration::from_millis(200),
        "{:?}",
        began.elapsed()
    );
    answer(&pool, 1, &links[1], 3);
    assert_eq!(late.await.unwrap().unwrap(), [3; 32]);
    // The token that did not answer gets no further jobs during `SUSPECTED`.
    let next = call(&pool).await;
    assert_eq!(links[1].in_flight(), 1);
    next.abort();
}

/// The caller gets the first answer, even if a late token sends it.
#[tokio::test]
async fn a_late_answer_still_counts() {
    let (pool, links) = pool(&[100, 50]);
    let late = call(&pool).await;
    while links[1].in_flight() == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    answer(&pool, 0, &links[0], 4);
    assert_eq!(late.await.unwrap().unwrap(), [4; 32]);
}

#[tokio::test]
async fn a_refused_mac_is_no_failure_of_the_token() {
    let (pool, links) = pool(&[100, 50]);
    let refused = call(&pool).await;
    for job in links[0].take_jobs() {
        pool.members().opened[0]
            .supervisor
            .served_for_test(job, Err(Error::MacRefused));
    }
    assert!(matches!(refused.await.unwrap(), Err(Error::MacRefused)));
    assert_eq!(in_flight(&links), [0, 0]);
}

#[tokio::test]
async fn a_token_without_the_key_or_the_algorithm_gets_no_job() {
    let (first, second) = (idle("a", &[KEY]), idle("b", &[KEY, OTHER]));
    first.worker_for_test(1, 1, SHA1);
    second.worker_for_test(1, 1, SHA256);
    let pool = of(
        vec![
            Arc::new(Member::new(first, 100)),
            Arc::new(Member::new(second, 50)),
        ],
        &[],
    );
    let members = pool.members();
    let chosen = |key, algorithm| {
        let need = Need {
            kind: Kind::new(key, Operation::Unwrap),
            algorithm,
            second: None,
        };
        let choice = members.choose(need, &caller(Duration::from_secs(5)), &[]);
        choice.map(|choice| members.opened[choice.member].supervisor.name().to_owned())
    };
    assert_eq!(chosen(KEY, Some(SHA1)).as_deref(), Some("a"));
    assert_eq!(chosen(KEY, Some(SHA256)).as_deref(), Some("b"));
    assert_eq!(chosen(OTHER, Some(SHA1)).as_deref(), Some("b"));
    assert_eq!(chosen(WrappingKeyId::from_bytes([3; 16]), None), None);
}

#[tokio::test]
async fn admission_is_refused_only_if_no_token_does_the_job_in_time() {
    let (pool, _links) = pool(&[100, 100]);
    takes(&pool, Duration::from_millis(200));
    let mut calls = Vec::new();
    for _ in 0..20 {
        calls.push(call_within(&pool, Duration::from_mins(1)).await);
    }
    let short = caller(Duration::from_secs(1));
    assert!(matches!(
        pool.check_admission(&short, Planned::Any),
        Err(Error::QueueFull { .. })
    ));
    let spare = idle("c", &[KEY]);
    spare.worker_for_test(1, 1, SHA256);
    let mut members: Vec<Arc<Member>> = pool.members().opened.clone();
    members.push(Arc::new(Member::new(spare, 1)));
    let with_spare = of(members, &[]);
    with_spare.check_admission(&short, Planned::Any).unwrap();
    for call in calls {
        call.abort();
    }
}

#[tokio::test]
async fn the_pool_serves_while_every_key_has_a_token() {
    let (first, second) = (idle("a", &[KEY]), idle("b", &[KEY, OTHER]));
    let pool = of(
        vec![
            Arc::new(Member::new(Arc::clone(&first), 100)),
            Arc::new(Member::new(Arc::clone(&second), 100)),
        ],
        &["c"],
    );
    assert!(matches!(pool.state().serving, Serving::Down(_)));
    let link = first.worker_for_test(1, 1, SHA256);
    let Serving::Down(cause) = pool.state().serving else {
        panic!("{:?}", pool.state())
    };
    assert!(
        cause.contains(&OTHER.to_string()) && cause.contains("token b"),
        "{cause}"
    );
    assert!(pool.state().serves_a_key());
    second.worker_for_test(1, 1, SHA256);
    assert_eq!(pool.state().serving, Serving::Up);
    first.lose_for_test(&link);
    let state = pool.state();
    assert_eq!(state.serving, Serving::Up);
    let note = state.note.unwrap();
    assert!(
        note.contains("token a") && note.contains("token c is not used"),
        "{note}"
    );
    assert_eq!(state.tokens.len(), 2);
    assert_eq!(state.keys.len(), 2);
}

/// The jobs of a removed token end on this token or on another token, and new jobs do not reach the removed token.
#[tokio::test]
async fn no_call_fails_because_its_token_is_removed() {
    let (pool, links) = pool(&[100, 50]);
    let calls = [call(&pool).await, call(&pool).await];
    assert_eq!(in_flight(&links), [1, 0]);
    assert_eq!(pool.keys_without(&[settings("b")]), BTreeSet::new());
    pool.reconfigure(vec![settings("b")]);
    settle().await;
    assert!(pool.state().tokens.is_empty(), "one token is left");
    assert_eq!(pool.state().name, "b");
    // The running job ends on the removed token.
    for job in links[0].take_jobs() {
        job.answer(Ok(vec![4; 32].into()), Duration::ZERO);
    }
    let late = call(&pool).await;
    while !calls.iter().all(Call::is_finished) || !late.is_finished() {
        for job in links[1].take_jobs() {
            pool.members().opened[0]
                .supervisor
                .served_for_test(job, Ok(vec![5; 32].into()));
        }
        settle().await;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let [first, second] = calls;
    assert_eq!(first.await.unwrap().unwrap(), [4; 32]);
    assert_eq!(second.await.unwrap().unwrap(), [5; 32]);
    assert_eq!(late.await.unwrap().unwrap(), [5; 32]);
}

#[tokio::test]
async fn a_token_with_the_only_copy_of_a_key_is_named_and_a_priority_changes_at_once() {
    let (first, second) = (idle("a", &[KEY]), idle("b", &[KEY, OTHER]));
    let link = second.worker_for_test(1, 1, SHA256);
    first.worker_for_test(1, 1, SHA256);
    let members = [(first, 100), (Arc::clone(&second), 50)];
    let members = members.map(|(one, priority)| Arc::new(Member::new(one, priority)));
    let pool = of(members.to_vec(), &[]);
    let without_b = [settings("a")];
    assert_eq!(pool.keys_without(&without_b), BTreeSet::from([OTHER]));
    assert_eq!(pool.keys_without(&[settings("a"), settings("b")]).len(), 0);
    let names = || {
        let state = pool.state();
        let each = state.tokens.iter();
        each.map(|token| (token.name.clone(), token.priority))
            .collect::<Vec<_>>()
    };
    assert_eq!(names(), [("a".to_owned(), 100), ("b".to_owned(), 50)]);
    let mut raised = [settings("a"), settings("b")];
    raised[1].priority = 200;
    pool.reconfigure(raised.to_vec());
    assert_eq!(names(), [("b".to_owned(), 200), ("a".to_owned(), 100)]);
    // A token that does not serve may be removed with its keys.
    second.lose_for_test(&link);
    second.stop_serving_for_test();
    assert_eq!(pool.keys_without(&without_b), BTreeSet::new());
}

/// A new token is opened only for a key that is registered for it, or that no other token has.
#[tokio::test]
async fn a_new_token_is_opened_for_its_own_keys_only() {
    let (pool, _links) = pool(&[100]);
    pool.reconfigure(vec![settings("a"), settings("b")]);
    let key = |id, may_be_elsewhere| ExpectedKey {
        id,
        may_be_elsewhere,
        ..pool.members().opened[0].supervisor.expected()[0].clone()
    };
    let opened = || pool.members().opened.len();
    assert_eq!(pool.state().tokens.len(), 1);
    assert!(pool.state().note.unwrap().contains("token b is not used"));
    for keys in [vec![], vec![key(KEY, true)]] {
        pool.expect_keys(vec![("b".to_owned(), keys)]);
        assert_eq!(opened(), 1);
    }
    pool.expect_keys(vec![("b".to_owned(), vec![key(KEY, false)])]);
    assert_eq!(opened(), 2);
    assert_eq!(pool.state().tokens.len(), 2);
    // The original of the key may be on a token that is added again, although another token shows a copy.
    pool.reconfigure(vec![settings("a"), settings("b"), settings("c")]);
    let original = ExpectedKey {
        token_serial: "c".to_owned(),
        ..key(KEY, true)
    };
    pool.expect_keys(vec![("c".to_owned(), vec![original])]);
    assert_eq!(opened(), 3);
}
