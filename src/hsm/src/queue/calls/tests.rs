//! Tests with few places, on a runtime with one thread, so that waiting calls queue in the order in which they start.

use tokio::task::{JoinHandle, yield_now};

use keybroker_core::call::abandoned::StopsWaiting;

use super::*;

const LONG: Duration = Duration::from_mins(1);

fn calls(places: usize) -> Calls {
    Calls::with_places(BTreeMap::new(), places)
}

fn caller(name: &str, given: Duration) -> Caller {
    Caller::principal(name, Deadline::after(given))
}

async fn enter(calls: &Calls, name: &str) -> Entered {
    calls.enter(&caller(name, LONG)).await.unwrap()
}

/// Starts a call and returns once it waits.
async fn waiting(calls: &Calls, name: &'static str) -> JoinHandle<Result<Entered, Error>> {
    waiting_until(calls, name, |entered| entered).await
}

/// Starts a call that passes its place to `then`, and returns once the call waits.
async fn waiting_until<T: Send + 'static>(
    calls: &Calls,
    name: &'static str,
    then: impl FnOnce(Result<Entered, Error>) -> T + Send + 'static,
) -> JoinHandle<T> {
    let before = calls.state().waiting.len();
    let task = {
        let calls = calls.clone();
        tokio::spawn(async move { then(calls.enter(&caller(name, LONG)).await) })
    };
    while calls.state().waiting.len() == before {
        yield_now().await;
    }
    task
}

#[tokio::test]
async fn a_principal_with_many_calls_delays_another_one_by_one_call() {
    let calls = calls(1);
    let first = enter(&calls, "saturating").await;
    let order = Arc::new(Mutex::new(Vec::new()));
    let names = [vec!["saturating"; 100], vec!["polite"]].concat();
    let mut all = Vec::new();
    for name in names {
        let order = Arc::clone(&order);
        let served = move |entered: Result<Entered, Error>| {
            lock(&order).push(name);
            drop(entered.unwrap());
        };
        all.push(waiting_until(&calls, name, served).await);
    }
    drop(first);
    for call in all {
        call.await.unwrap();
    }
    let at = lock(&order).iter().position(|name| *name == "polite");
    assert!(at.unwrap() <= 2, "{at:?}");
}

#[tokio::test]
async fn a_call_that_cannot_be_in_time_is_refused_without_waiting() {
    let calls = calls(1);
    let _first = enter(&calls, "a").await;
    let mut others = Vec::new();
    for _ in 0..1_000 {
        others.push(waiting(&calls, "a").await);
    }
    // A thousand calls of 200 us come first.
    let refused = calls.enter(&caller("a", Duration::from_millis(100))).await;
    let Err(Error::QueueFull { retry_after }) = refused else {
        panic!("{refused:?}");
    };
    assert!(retry_after >= Duration::from_millis(200), "{retry_after:?}");
    assert_eq!(calls.state().waiting.len(), 1_000);
}

#[tokio::test]
async fn a_full_queue_refuses_the_principal_with_the_most_calls() {
    let calls = calls(1);
    let _first = enter(&calls, "saturating").await;
    let mut saturating = Vec::new();
    for _ in 0..WAITING_MAX {
        saturating.push(waiting(&calls, "saturating").await);
    }
    let refused = calls.enter(&caller("saturating", LONG)).await;
    assert!(
        matches!(refused, Err(Error::QueueFull { .. })),
        "{refused:?}"
    );
    let polite = {
        let calls = calls.clone();
        tokio::spawn(async move { calls.enter(&caller("polite", LONG)).await })
    };
    let newest = saturating.pop().unwrap().await.unwrap();
    assert!(matches!(newest, Err(Error::QueueFull { .. })), "{newest:?}");
    assert!(!polite.is_finished());
    assert_eq!(calls.state().waiting.len(), WAITING_MAX);
}

#[tokio::test]
async fn a_place_that_its_call_does_not_take_goes_to_the_next() {
    let calls = calls(1);
    let first = enter(&calls, "a").await;
    let gone = waiting(&calls, "a").await;
    let next = waiting(&calls, "a").await;
    // The place is granted to a call that is cancelled before it takes the place.
    drop(first);
    gone.abort();
    assert!(gone.await.unwrap_err().is_cancelled());
    drop(next.await.unwrap().unwrap());
    assert_eq!(calls.state().taken, 0);
}

#[tokio::test]
async fn an_abandoned_call_gets_no_place() {
    let calls = calls(1);
    let first = enter(&calls, "a").await;
    let abandoned = Abandoned::default();
    let call = {
        let (calls, abandoned) = (calls.clone(), abandoned.clone());
        tokio::spawn(abandoned.scope(async move { calls.enter(&caller("a", LONG)).await }))
    };
    while calls.state().waiting.is_empty() {
        yield_now().await;
    }
    drop(StopsWaiting(abandoned));
    drop(first);
    assert!(matches!(call.await.unwrap(), Err(Error::Deadline)));
    assert_eq!(calls.state().taken, 0);
}

#[tokio::test]
async fn a_call_that_waits_for_the_token_or_the_database_has_no_place() {
    let calls = calls(1);
    let call = enter(&calls, "a").await;
    call.run(async {
        leave();
        assert_eq!(calls.state().taken, 0);
        drop(enter(&calls, "b").await);
    })
    .await;
    let call = enter(&calls, "a").await;
    let (finish, finished) = oneshot::channel::<()>();
    let slow = call.run(leave_if_slow(finished));
    let other = async {
        // The second call gets the place before the database has answered the first call.
        drop(enter(&calls, "b").await);
        finish.send(()).unwrap();
    };
    let (answer, ()) = tokio::join!(slow, other);
    answer.unwrap();
    assert_eq!(calls.state().taken, 0);
}

#[tokio::test]
async fn the_time_for_the_answer_is_taken_from_the_deadline_of_the_job() {
    let calls = calls(1);
    let call = Deadline::after(LONG);
    assert_eq!(calls.job_deadline(call), call);
    for _ in 0..100 {
        calls.note_answer(Duration::from_secs(1));
    }
    let reserved = call.instant() - calls.job_deadline(call).instant();
    assert!(
        reserved >= Duration::from_secs(1) && reserved < Duration::from_secs(2),
        "{reserved:?}"
    );
    // The reserved time is at most a part of the remaining time.
    let short = Deadline::after(Duration::from_secs(2));
    let reserved = short.instant() - calls.job_deadline(short).instant();
    assert!(reserved <= Duration::from_millis(500), "{reserved:?}");
}
