//! What is in the memory of the broker's processes during sealed releases, and during plain ones as a control. The processes make no
//! core dumps, so the test reads their memory through `/proc`, as root can.
//!
//! `KEYBROKER_TEST_SEALED_KEYS=10000` sets the number of keys; docs/sealed.md has the command and the result.

use std::{
    env,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, stream};

use crate::{
    client::Caller,
    memory::{Search, fresh_key},
    process::Broker,
    sealed::{self, Pair},
    site::{Options, Site},
};

const KEYS: usize = 50;
const CALLERS: usize = 8;
/// Number of searches under load. One search takes seconds in a debug build.
const SEARCHES: usize = 3;
/// Longest time until the control finds a key.
const CONTROL_TIMEOUT: Duration = Duration::from_mins(1);

fn count() -> usize {
    let count = env::var("KEYBROKER_TEST_SEALED_KEYS");
    count.map_or(KEYS, |count| count.parse().unwrap())
}

/// Keys in which no byte is 0, so that the search passes over empty memory quickly.
fn keys() -> Vec<[u8; 32]> {
    let without_zeros = |key: [u8; 32]| key.map(|byte| byte.max(1));
    (0..count()).map(|_| without_zeros(fresh_key())).collect()
}

fn user(number: usize) -> String {
    format!("user-{number}")
}

/// A broker whose database has the keys. The process that received the keys has ended.
async fn broker_with(site: Arc<Site>, keys: &[[u8; 32]]) -> Broker {
    let broker = Broker::start_on(site);
    let enroller = Caller::of(&broker, "enroller");
    stream::iter(keys.iter().enumerate())
        .for_each_concurrent(CALLERS, |(number, key)| {
            let enroller = enroller.clone();
            async move {
                enroller.create(&user(number), key).await.unwrap();
            }
        })
        .await;
    let (site, status) = broker.stop();
    assert!(status.success(), "{status}");
    Broker::start_on(site)
}

/// Releases all keys again and again while `work` runs in another thread. Returns the result of `work` and the number of releases.
async fn under_load<T: Send + 'static>(
    broker: &Broker,
    recipient: Option<Arc<Pair>>,
    count: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> (T, u64) {
    let releaser = Caller::of(broker, "releaser");
    let (stop, released) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicU64::new(0)),
    );
    let callers: Vec<_> = (0..CALLERS)
        .map(|caller| {
            let (releaser, recipient) = (releaser.clone(), recipient.clone());
            let (stop, released) = (Arc::clone(&stop), Arc::clone(&released));
            tokio::spawn(async move {
                for number in (caller..count).step_by(CALLERS).cycle() {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let user = user(number);
                    let answer = match &recipient {
                        None => releaser.unwrap(&user).await,
                        Some(pair) => releaser.unwrap_for(&user, &pair.public).await,
                    };
                    answer.unwrap();
                    released.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let result = tokio::task::spawn_blocking(work).await.unwrap();
    stop.store(true, Ordering::Relaxed);
    for caller in callers {
        caller.await.unwrap();
    }
    (result, released.load(Ordering::Relaxed))
}

/// No form of a key is in the memory of the front, under load or afterwards. In a plain run, the same search finds keys in the
/// front. The number of keys in the memory of the workers is printed and not checked, because SoftHSM computes in the workers.
#[tokio::test(flavor = "multi_thread")]
async fn no_key_of_a_sealed_release_is_in_the_memory_of_the_front() {
    let keys = keys();
    let search = Arc::new(Search::thorough(&keys));

    // The control: a search that finds nothing in a plain run would prove nothing.
    let site = Arc::new(Site::fresh(Options::default()));
    let plain = broker_with(site, &keys).await;
    let (pid, found_by) = (plain.pid(), Arc::clone(&search));
    let (found, _) = under_load(&plain, None, keys.len(), move || {
        let since = Instant::now();
        while since.elapsed() < CONTROL_TIMEOUT {
            let found = found_by.in_process(pid);
            if !found.is_empty() {
                return found;
            }
        }
        Vec::new()
    })
    .await;
    assert!(!found.is_empty(), "the search finds keys in a plain run");
    drop(plain.stop());

    let site = Site::without_keys(Options::default());
    site.expect_ok(&["store", "migrate"]);
    sealed::make_sealed_key(&site);
    let broker = broker_with(Arc::new(site), &keys).await;
    let (pid, workers) = (broker.pid(), broker.workers());
    let by = Arc::clone(&search);
    let pair = Some(Arc::new(Pair::fresh()));
    let ((front, worker), released) = under_load(&broker, pair, keys.len(), move || {
        let (mut front, mut worker) = (Vec::new(), 0);
        for _ in 0..SEARCHES {
            front.extend(by.in_process(pid));
            worker += workers
                .iter()
                .map(|pid| by.in_process(*pid).len())
                .sum::<usize>();
        }
        (front, worker)
    })
    .await;
    let expected = u64::try_from(CALLERS).unwrap();
    assert!(released > expected, "{released} releases");
    assert!(
        front.is_empty(),
        "keys {front:?} are in the memory of the front"
    );
    let left: usize = broker
        .workers()
        .iter()
        .map(|pid| search.in_process(*pid).len())
        .sum();
    println!(
        "{} keys, {released} sealed releases, {SEARCHES} searches: front 0, worker under load {worker}, worker afterwards {left}",
        keys.len()
    );
    assert_eq!(search.in_process(pid), [0_usize; 0]);
}
