//! What callers without an account can do to the sign-ins of approvers at the same address, and to the provider.

use reqwest::StatusCode;

use crate::identity::{Answer as ProviderAnswer, DISCOVERY, TOKEN};

use super::site::{Answer, ConsoleSite, SESSION, Visitor};

/// The limit of failed attempts of an address in these tests. The attempt after the last permitted one reaches the limit for the
/// rest of the minute.
const FAILURES: u32 = 1;

/// The first part of a sign-in, and an answer with a code that the provider did not make.
async fn guess(visitor: &Visitor, site: &ConsoleSite) -> Answer {
    let begun = visitor.get("/sign-in").await;
    assert_eq!(begun.status, StatusCode::SEE_OTHER, "{}", begun.html);
    let (_, rest) = begun.location().split_once("&state=").unwrap();
    let state = rest.split('&').next().unwrap();
    let callback = format!("{}/callback?code=x&state={state}", site.origin);
    visitor.call_back(&callback).await
}

/// An answer that is not of a sign-in of this browser.
async fn forge(visitor: &Visitor) -> Answer {
    visitor.get("/callback?code=x&state=y").await
}

fn answer_with(status: u16, body: &str) -> ProviderAnswer {
    ProviderAnswer {
        status,
        body: body.to_owned(),
        ..ProviderAnswer::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn forged_answers_do_not_lock_out_approvers_of_the_same_address() {
    let site = ConsoleSite::open().with_failures_per_minute(FAILURES);
    let (carol, guest) = (Visitor::new(&site), Visitor::new(&site));
    let callback = carol.authorize("/sign-in", "carol").await;
    for _ in 0..=FAILURES {
        assert_eq!(forge(&guest).await.status, StatusCode::FORBIDDEN);
    }
    let limited = forge(&guest).await;
    assert_eq!(limited.status, StatusCode::TOO_MANY_REQUESTS);
    assert!(
        limited.html.contains("Too many failed attempts"),
        "{}",
        limited.html
    );
    assert!(limited.headers.contains_key("retry-after"));
    // A sign-in that was begun before ends, and another one begins.
    let answer = carol.call_back(&callback).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.html);
    let again = carol.sign_in("/sign-in", "carol").await;
    assert_eq!(again.status, StatusCode::OK, "{}", again.html);
    Visitor::signed_in(&site, "dave").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_code_counts_as_a_failed_attempt_whatever_the_provider_calls_it() {
    let site = ConsoleSite::open().with_failures_per_minute(FAILURES);
    let guest = Visitor::new(&site);
    site.identity.answer(
        TOKEN,
        Some(answer_with(400, r#"{"error": "invalid_request"}"#)),
    );
    for _ in 0..=FAILURES {
        let answer = guess(&guest, &site).await;
        assert_eq!(answer.status, StatusCode::FORBIDDEN, "{}", answer.html);
        assert!(!guest.page.lock().unwrap().contains_key(SESSION));
    }
    let answer = forge(&guest).await;
    assert_eq!(answer.status, StatusCode::TOO_MANY_REQUESTS);
    site.identity.answer(TOKEN, None);
    Visitor::signed_in(&site, "carol").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_of_the_provider_and_of_the_broker_count_as_no_attempt() {
    let site = ConsoleSite::open().with_failures_per_minute(FAILURES);
    let visitor = Visitor::new(&site);
    for (status, body) in [
        (401, r#"{"error": "invalid_client"}"#),
        (429, ""),
        (503, ""),
        (200, "{}"),
    ] {
        site.identity.answer(TOKEN, Some(answer_with(status, body)));
        for _ in 0..=FAILURES {
            let answer = guess(&visitor, &site).await;
            assert_eq!(
                answer.status,
                StatusCode::SERVICE_UNAVAILABLE,
                "{}",
                answer.html
            );
        }
    }
    let answer = forge(&visitor).await;
    assert_eq!(answer.status, StatusCode::FORBIDDEN, "{}", answer.html);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_exchanges_of_a_network_are_limited_but_not_those_of_a_session() {
    let site = ConsoleSite::open();
    let carol = Visitor::signed_in(&site, "carol").await;
    let guest = Visitor::new(&site);
    let mut limited = None;
    // The limit is 120 in a minute. A slow machine can begin a second minute on the way.
    for _ in 0..400 {
        let answer = guess(&guest, &site).await;
        if answer.status == StatusCode::TOO_MANY_REQUESTS {
            limited = Some(answer);
            break;
        }
        assert_eq!(answer.status, StatusCode::FORBIDDEN, "{}", answer.html);
    }
    let limited = limited.unwrap();
    assert!(
        limited.html.contains("Too many requests"),
        "{}",
        limited.html
    );
    assert!(limited.headers.contains_key("retry-after"));
    assert!(limited.html.contains("href=\"/sign-in\""));
    let before = site.identity.fetches(TOKEN);
    assert!(before >= 120, "{before}");
    // An approver who authenticates again has places of their own.
    let answer = carol.sign_in("/sign-in", "carol").await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.html);
    assert_eq!(site.identity.fetches(TOKEN), before + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn endpoints_without_tls_get_neither_browser_nor_code() {
    let site = ConsoleSite::open();
    let issuer = site.identity.issuer();
    let document = format!(
        r#"{{"issuer": "{issuer}", "jwks_uri": "{issuer}/jwks", "token_endpoint": "{issuer}{TOKEN}",
        "authorization_endpoint": "http://login.example.org/authorize"}}"#
    );
    site.identity
        .answer(DISCOVERY, Some(answer_with(200, &document)));
    let carol = Visitor::new(&site);
    let answer = carol.get("/sign-in").await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(answer.cookies().is_empty(), "{:?}", answer.cookies());
    let log = site.broker.site.log();
    for words in [
        "authorization endpoint",
        "http://login.example.org",
        "use https",
    ] {
        assert!(log.contains(words), "{words}: {log}");
    }
}
