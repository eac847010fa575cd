//! Tests of the delivery to receivers that refuse the notices of some members, or do not answer about them.

use std::{collections::BTreeSet, future::pending};

use aws_lc_rs::hmac;
use axum::Router;
use serde_json::Value;
use tokio::{net::TcpListener, sync::Semaphore, task::JoinHandle};

use keybroker_broker::NoticeEvent;
use keybroker_core::{
    call::{CallId, Timestamp},
    key::{Tenant, UserId},
};

use super::{
    turns::{MEMBER_TURNS_MAX, TURNS_MAX},
    *,
};

/// More notices than turns.
const MANY: usize = 3 * TURNS_MAX;
const PLACES: usize = 4 * MANY;
/// A delivery takes far less, also on a busy machine, and a pause far longer.
const PROMPT: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_mins(10);
/// How the names of the members begin whose notices fail.
const FAILING: &str = "failing";

/// What the receiver does with a notice that fails.
#[derive(Clone, Copy, Debug)]
enum Failure {
    Answered(StatusCode),
    Unanswered,
}

/// Running deliveries to a receiver.
struct Running {
    queue: mpsc::Sender<QueuedNotice>,
    places: Arc<Semaphore>,
    /// The members of the notices, in the order in which the receiver gets them.
    received: mpsc::UnboundedReceiver<String>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

/// Starts a receiver, and returns its URL and the members of the notices that it gets.
async fn receiver(failure: Failure) -> (Url, mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let (sender, received) = mpsc::unbounded_channel();
    let answer = move |body: String| {
        let sender = sender.clone();
        async move {
            let body: Value = serde_json::from_str(&body).unwrap();
            let user = body["data"]["user"].as_str().unwrap().to_owned();
            let fails = user.starts_with(FAILING);
            sender.send(user).unwrap();
            match failure {
                _ if !fails => StatusCode::NO_CONTENT,
                Failure::Answered(status) => status,
                Failure::Unanswered => pending().await,
            }
        }
    };
    let routes = Router::new().fallback(answer);
    tokio::spawn(async move { axum::serve(listener, routes).await });
    (Url::parse(&url).unwrap(), received)
}

impl Running {
    async fn start(failure: Failure) -> Self {
        let (url, received) = receiver(failure).await;
        let client = https::client(PAUSE).tls_certs_only([]);
        let receiver = Receiver {
            client: client.build().unwrap(),
            url,
            signer: Signer::new(vec![hmac::Key::new(hmac::HMAC_SHA256, &[7; 32])]),
            attempts_max: 6,
            first_pause: PAUSE,
        };
        let (sender, queue) = mpsc::channel(PLACES);
        let stop = CancellationToken::new();
        let deliveries = Deliveries {
            queue,
            receiver: Arc::new(receiver),
            turns: Turns::default(),
            stop: stop.clone(),
            stop_timeout: PROMPT,
        };
        Self {
            queue: sender,
            places: Arc::new(Semaphore::new(2 * PLACES)),
            received,
            stop,
            task: tokio::spawn(deliveries.run()),
        }
    }

    fn put(&self, user: &str) {
        let notice = Notice {
            event: NoticeEvent::DeviceTrusted,
            at: Timestamp::now(),
            call: CallId::fresh(),
            tenant: Tenant::default(),
            user: UserId::parse(user).unwrap(),
            principal: String::new(),
            peer: String::new(),
            place: String::new(),
            device: None,
            request: None,
            expires: None,
            key: None,
        };
        let place = || Arc::clone(&self.places).try_acquire_owned().unwrap();
        self.queue.try_send((notice, [place(), place()])).unwrap();
    }

    /// The member of the next notice that the receiver gets.
    async fn next(&mut self) -> String {
        let received = time::timeout(PROMPT, self.received.recv()).await;
        received.expect("a notice in time").unwrap()
    }

    /// Waits until this number of notices have their places.
    async fn waiting(&self, count: usize) {
        let places = 2 * PLACES - 2 * count;
        let reached = async {
            while self.places.available_permits() != places {
                time::sleep(Duration::from_millis(1)).await;
            }
        };
        time::timeout(PROMPT, reached).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn notices_that_fail_hold_up_no_notice_of_another_member() {
    for status in [
        StatusCode::SERVICE_UNAVAILABLE,
        StatusCode::TOO_MANY_REQUESTS,
    ] {
        let mut running = Running::start(Failure::Answered(status)).await;
        for number in 0..MANY {
            // Many notices of one member, and notices of many members.
            running.put(FAILING);
            running.put(&format!("{FAILING}-{number}"));
        }
        // Each of them is tried, although all of them fail and wait for their next attempt.
        for _ in 0..2 * MANY {
            assert!(running.next().await.starts_with(FAILING));
        }
        running.put("ada");
        assert_eq!(running.next().await, "ada");
        // Only the delivered notice has given its places back.
        running.waiting(2 * MANY).await;
        running.task.abort();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_about_whom_the_receiver_does_not_answer_has_only_some_turns() {
    let mut running = Running::start(Failure::Unanswered).await;
    for _ in 0..MANY {
        running.put(FAILING);
    }
    for _ in 0..MEMBER_TURNS_MAX {
        assert_eq!(running.next().await, FAILING);
    }
    for user in ["ada", "bob", "carol"] {
        running.put(user);
        assert_eq!(running.next().await, user);
    }
    running.waiting(MANY).await;
    running.task.abort();
}

/// In one thread, so that a delivery whose attempt has ended is in its pause as soon as it has given its turn back.
#[tokio::test]
async fn a_stop_ends_the_pauses_with_one_last_attempt() {
    let failure = Failure::Answered(StatusCode::SERVICE_UNAVAILABLE);
    let mut running = Running::start(failure).await;
    for number in 0..MANY {
        running.put(&format!("{FAILING}-{number}"));
    }
    let mut tried = BTreeSet::new();
    for _ in 0..MANY {
        assert!(tried.insert(running.next().await));
    }
    running.stop.cancel();
    let ended = time::timeout(PROMPT, &mut running.task).await;
    ended.unwrap().unwrap();
    running.waiting(0).await;
    let mut again = BTreeSet::new();
    while let Ok(user) = running.received.try_recv() {
        assert!(again.insert(user));
    }
    // A notice whose first attempt had a turn at the stop is given up. All others were in a pause, and come once more.
    assert!(again.len() >= MANY - TURNS_MAX, "{again:?}");
    assert!(again.is_subset(&tried));
}
