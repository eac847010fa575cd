//! Outages of token, store and audit log: a short one is waited out, a longer one is answered with 503. No answer claims that
//! the user has no key.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use reqwest::Method;
use rustix::process::Signal;

use super::site::{ADA, Answer, BOB, RestSite};
use crate::{
    process::{send, until},
    rows::set_envelope,
    site::Options,
    wire::get,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_dies_costs_a_client_some_time_and_no_login() {
    let rest = RestSite::open();
    rest.store(Method::POST, ADA, &[0xe1; 32])
        .await
        .expect_stored();
    for user in [ADA, BOB] {
        for worker in rest.broker.workers() {
            send(worker, Signal::KILL);
        }
        if user == ADA {
            rest.get(ADA).await.expect_key(&[0xe1; 32]);
        } else {
            let stored = rest.store(Method::POST, BOB, &[0xe2; 32]).await;
            stored.expect_stored();
        }
    }
    rest.get(BOB).await.expect_key(&[0xe2; 32]);
}

/// Renames the directory of the token, and waits until the broker misses the token. Returns both names.
fn hide_token(rest: &RestSite) -> (PathBuf, PathBuf) {
    let directory = rest.broker.site.token.directory();
    let away = directory.with_extension("away");
    fs::rename(&directory, &away).unwrap();
    let site = &rest.broker.site;
    until("the token to be missed", || {
        site.log().contains("token-down").then_some(())
    });
    (directory, away)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_stays_down_is_503_and_comes_back_without_loss() {
    let rest = RestSite::open();
    rest.store(Method::POST, ADA, &[0xe3; 32])
        .await
        .expect_stored();
    let (directory, away) = hide_token(&rest);
    let started = Instant::now();
    let answer = rest.get(ADA).await;
    answer.expect_refused(503, "TOKEN_DOWN");
    let waited = started.elapsed();
    assert!(
        (Duration::from_secs(6)..Duration::from_secs(12)).contains(&waited),
        "{waited:?}"
    );
    // What needs no token is still true: a user without a key has none.
    rest.get(BOB).await.expect_refused(404, "KEY_NOT_FOUND");
    let health = rest.request(Method::GET, "/health").send().await.unwrap();
    let health = Answer::of(health).await;
    assert_eq!(
        (health.status.as_u16(), health.body.as_str()),
        (503, "Unhealthy")
    );
    assert_eq!(
        rest.request(Method::GET, "/alive")
            .send()
            .await
            .unwrap()
            .status(),
        200
    );
    fs::rename(&away, &directory).unwrap();
    // The next request finds it again, perhaps after some waiting of its own.
    rest.get(ADA).await.expect_key(&[0xe3; 32]);
}

/// 500 and not 503: trying again mends nothing. And never 404.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_row_is_500_and_is_not_overwritten() {
    let rest = RestSite::open();
    rest.store(Method::POST, ADA, &[0xe4; 32])
        .await
        .expect_stored();
    set_envelope(&rest.broker.site, ADA, &[7; 300]);
    rest.get(ADA).await.expect_refused(500, "RECORD_DAMAGED");
    let again = rest.store(Method::POST, ADA, &[0xe5; 32]).await;
    again.expect_refused(400, "KEY_EXISTS");
    let log = rest.broker.site.log();
    assert!(log.contains("record-damaged"), "{log}");
}

/// Requests that wait for the end of an outage occupy at most half of the connections. Further requests are answered at once.
#[tokio::test(flavor = "multi_thread")]
async fn waiting_requests_leave_room_for_new_ones() {
    const WAITING_MAX: usize = 4;
    let rest = RestSite::open_with(
        Options {
            limits: format!("connections_max = {}", WAITING_MAX * 2),
            ..Options::default()
        },
        "",
        "",
    );
    rest.store(Method::POST, ADA, &[0xe6; 32])
        .await
        .expect_stored();
    let (directory, away) = hide_token(&rest);
    let metric = |name: &str| {
        let page = get(rest.broker.status, "/metrics");
        let value = page
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        // A gauge is absent until it is used.
        value.map_or(0, |value| value.parse::<usize>().unwrap())
    };
    let waiting = || metric("keybroker_rest_retries_waiting");
    // One after another, because only few connections at a time may be without a principal.
    let mut requests = Vec::new();
    for number in 1..=WAITING_MAX {
        requests.push(tokio::spawn(rest.as_user(Method::GET, ADA).send()));
        until("the request to wait", || {
            (waiting() == number).then_some(())
        });
    }
    // A waiting request gives its place back for the moment of its next attempt.
    let refused = || metric("keybroker_rest_retries_refused_total");
    for _ in 0..10 {
        rest.get(ADA).await.expect_refused(503, "TOKEN_DOWN");
        assert!(waiting() <= WAITING_MAX);
        if refused() > 0 {
            break;
        }
    }
    assert!(refused() > 0, "no request was answered without waiting");
    rest.get(BOB).await.expect_refused(404, "KEY_NOT_FOUND");
    fs::rename(&away, &directory).unwrap();
    for request in requests {
        request.await.unwrap().unwrap();
    }
    rest.get(ADA).await.expect_key(&[0xe6; 32]);
    assert_eq!(waiting(), 0);
}
