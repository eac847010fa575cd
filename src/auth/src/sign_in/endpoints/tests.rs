//! Tests the endpoints of a provider that answers, that hangs, and that names endpoints without TLS.

use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicUsize, Ordering},
};

use tokio::{net::TcpListener, sync::Semaphore, time::timeout};

use keybroker_test_support::identity::{Answer, DISCOVERY, Identity, Options};

use super::*;

const AUTHORIZATION: &str = "https://login.example.org/authorize";
const TOKEN: &str = "https://login.example.org/token";
/// A caller that does not wait for the provider has its answer within this time.
const AT_ONCE: Duration = Duration::from_secs(2);

fn finder(issuer: &str) -> Arc<Finder> {
    let lines = format!("name = \"sso\"\nissuer = \"{issuer}\"\nallow_http = true");
    let issuer: Issuer = toml::from_str(&lines).unwrap();
    let settings = Settings {
        issuer: "sso".to_owned(),
        client_id: "page".to_owned(),
        client_secret_file: None,
        redirect_url: "https://approvers.example.org/callback".to_owned(),
        scopes: BTreeSet::new(),
        authorization_url: None,
        token_url: None,
    };
    let http = Arc::new(Http::new(&issuer).unwrap());
    Arc::new(Finder::new(http, &issuer, &settings))
}

/// Makes the finder know endpoints that are to be refreshed.
fn know_old(finder: &Finder) -> Arc<Endpoints> {
    let known = Arc::new(finder.checked(AUTHORIZATION, TOKEN).unwrap());
    finder.state().last = Some(Last {
        found: Ok(Arc::clone(&known)),
        due: Instant::now(),
    });
    known
}

/// Waits until the fetch in progress has ended, and returns its result.
async fn fetched(finder: &Finder) -> Found {
    let mut fetch = finder.state().fetch.clone().unwrap();
    let found = fetch.wait_for(Option::is_some).await.unwrap();
    found.clone().unwrap()
}

/// A discovery document with other endpoints than those of the identity service.
fn document(service: &Identity, authorization: &str, token: &str) -> Answer {
    let body = format!(
        r#"{{"issuer": "{}", "jwks_uri": "{}/jwks", "authorization_endpoint": "{authorization}", "token_endpoint": "{token}"}}"#,
        service.issuer(),
        service.url()
    );
    Answer {
        body,
        ..Answer::default()
    }
}

/// A provider that accepts connections, and answers none of them until the test ends all of them.
struct Hanging {
    url: String,
    accepted: Arc<AtomicUsize>,
    ends: Arc<Semaphore>,
}

impl Hanging {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let hanging = Self {
            url: format!("http://{}", listener.local_addr().unwrap()),
            accepted: Arc::default(),
            ends: Arc::new(Semaphore::new(0)),
        };
        let (accepted, ends) = (Arc::clone(&hanging.accepted), Arc::clone(&hanging.ends));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                accepted.fetch_add(1, Ordering::SeqCst);
                let ends = Arc::clone(&ends);
                tokio::spawn(async move {
                    assert!(ends.acquire().await.is_err());
                    drop(stream);
                });
            }
        });
        hanging
    }

    fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }

    /// Waits until there is a connection.
    async fn reached(&self) {
        for _ in 0..500 {
            if self.accepted() > 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("no connection after five seconds");
    }

    fn end(&self) {
        self.ends.close();
    }
}

#[tokio::test]
async fn all_who_wait_share_one_fetch_and_its_failure() {
    let provider = Hanging::start().await;
    let finder = finder(&provider.url);
    let waiting: Vec<_> = (0..8)
        .map(|_| {
            let finder = Arc::clone(&finder);
            tokio::spawn(async move { finder.find().await })
        })
        .collect();
    provider.reached().await;
    // A caller that disconnects does not end the fetch for which the others wait.
    waiting[0].abort();
    provider.end();
    for task in waiting.into_iter().skip(1) {
        let error = task.await.unwrap().unwrap_err();
        assert_eq!(error.reason(), Reason::IdentityDown, "{error}");
    }
    // The failure also holds for callers that come soon afterwards.
    let error = timeout(AT_ONCE, finder.find()).await.unwrap().unwrap_err();
    let delay = error.retry_delay().unwrap();
    assert!(!delay.is_zero() && delay <= FAILURE_KEPT, "{delay:?}");
    assert_eq!(provider.accepted(), 1);
}

#[tokio::test]
async fn known_endpoints_are_used_while_one_task_refreshes_them() {
    let provider = Hanging::start().await;
    let finder = finder(&provider.url);
    let known = know_old(&finder);
    for _ in 0..8 {
        let found = timeout(AT_ONCE, finder.find()).await.unwrap().unwrap();
        assert!(Arc::ptr_eq(&found, &known));
    }
    provider.reached().await;
    let found = timeout(AT_ONCE, finder.find()).await.unwrap().unwrap();
    assert!(Arc::ptr_eq(&found, &known));
    provider.end();
    let error = fetched(&finder).await.unwrap_err();
    assert_eq!(error.reason(), Reason::IdentityDown, "{error}");
    // The endpoints stay in use after the failure, and the next fetch waits.
    let found = timeout(AT_ONCE, finder.find()).await.unwrap().unwrap();
    assert!(Arc::ptr_eq(&found, &known));
    assert_eq!(provider.accepted(), 1);
}

#[tokio::test]
async fn a_refresh_replaces_the_endpoints_and_a_failure_is_not_kept_for_long() {
    let service = Identity::start(Options::default());
    let finder = finder(service.issuer());
    let broken = Answer {
        status: 500,
        ..Answer::default()
    };
    service.answer(DISCOVERY, Some(broken));
    finder.find().await.unwrap_err();
    finder.find().await.unwrap_err();
    assert_eq!(service.fetches(DISCOVERY), 1);
    service.answer(DISCOVERY, None);
    finder.state().last.as_mut().unwrap().due = Instant::now();
    let found = finder.find().await.unwrap();
    assert!(found.token.starts_with(service.url()), "{}", found.token);
    finder.find().await.unwrap();
    assert_eq!(service.fetches(DISCOVERY), 2);

    let known = know_old(&finder);
    let found = finder.find().await.unwrap();
    assert!(Arc::ptr_eq(&found, &known));
    fetched(&finder).await.unwrap();
    let found = finder.find().await.unwrap();
    assert!(found.token.starts_with(service.url()), "{}", found.token);
    assert_eq!(service.fetches(DISCOVERY), 3);
}

#[tokio::test]
async fn discovered_endpoints_without_tls_are_refused_by_name() {
    let service = Identity::start(Options::default());
    for (authorization, token, words) in [
        (
            "http://login.example.org/a",
            TOKEN,
            "authorization endpoint \"http://login",
        ),
        (
            AUTHORIZATION,
            "http://login.example.org/t",
            "token endpoint \"http://login",
        ),
    ] {
        let finder = finder(service.issuer());
        service.answer(DISCOVERY, Some(document(&service, authorization, token)));
        let error = finder.find().await.unwrap_err();
        assert_eq!(error.reason(), Reason::IdentityDown, "{error}");
        assert!(error.detail().contains(words), "{error}");
        // Known endpoints stay in use if the discovery document gets worse.
        let known = know_old(&finder);
        finder.find().await.unwrap();
        fetched(&finder).await.unwrap_err();
        let found = finder.find().await.unwrap();
        assert!(Arc::ptr_eq(&found, &known));
    }
    service.answer(DISCOVERY, Some(document(&service, AUTHORIZATION, TOKEN)));
    let found = finder(service.issuer()).find().await.unwrap();
    assert_eq!(found.authorization.as_str(), AUTHORIZATION);
    assert_eq!(found.token, TOKEN);
}

#[test]
fn only_this_host_may_have_an_endpoint_without_tls() {
    for (url, without, with) in [
        ("https://login.example.org/token", true, true),
        ("http://login.example.org/token", false, false),
        ("http://192.0.2.1/token", false, false),
        ("http://127.0.0.1:8080/token", false, true),
        ("http://[::1]:8080/token", false, true),
        ("http://127.1:8080/token", false, true),
        ("http://localhost:8080/token", false, false),
        ("http://localhost.example.org/token", false, false),
        ("http://127.0.0.1.example.org/token", false, false),
        ("http://127.0.0.1@login.example.org/token", false, false),
        ("https://user:secret@login.example.org/token", false, false),
        ("ftp://127.0.0.1/token", false, false),
        ("login.example.org/token", false, false),
        ("", false, false),
    ] {
        assert_eq!(endpoint_problem(url, false).is_none(), without, "{url}");
        assert_eq!(endpoint_problem(url, true).is_none(), with, "{url}");
    }
}
