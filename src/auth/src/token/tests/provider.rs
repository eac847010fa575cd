//! Tests the sources of keys: providers that change their keys, fail or answer badly, and files.

use std::{fs::Permissions, os::unix::fs::PermissionsExt as _};

use keybroker_core::error::chain;

use super::*;

#[tokio::test]
async fn a_pem_file_is_read_again_when_it_changes() {
    let service = Identity::start(Options::default());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("key.pem");
    std::fs::write(&path, service.pem()).unwrap();
    let running = Running::ready(&service, &format!("pem_file = {path:?}")).await;
    let old = service.user_token(ADA);
    running.accepted(&old).await;
    // If the set's keys have no names, the token's `kid` is ignored.
    running
        .accepted(&service.mint(user(ADA), json!({"kid": null})))
        .await;

    let before = service.pem();
    service.rotate_key();
    let new = service.user_token(ADA);
    running.refused(&new, "signature does not verify").await;
    // The set contains both keys, so that no access token is refused while the provider changes its
    // key.
    std::fs::write(&path, format!("{before}{}", service.pem())).unwrap();
    let verifies = async |token: &str| running.tokens.verify(token.as_bytes()).await.is_ok();
    for _ in 0..500 {
        if verifies(&new).await {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    running.accepted(&new).await;
    running.accepted(&old).await;

    // An invalid file leaves the old keys in use.
    std::fs::write(&path, "nothing").unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    running.accepted(&service.user_token(ADA)).await;
    assert_eq!(service.fetches(JWKS) + service.fetches(DISCOVERY), 0);
}

#[tokio::test]
async fn a_bad_key_file_stops_the_start() {
    let service = Identity::start(Options::default());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys");
    let private = rcgen::KeyPair::generate().unwrap().serialize_pem();
    let long = " ".repeat(70_000);
    for (text, line, words) in [
        (None, "pem_file", "cannot read"),
        (Some(private.as_str()), "pem_file", "private key"),
        (Some("x"), "pem_file", "no public key"),
        (Some(""), "jwks_file", "not a JSON Web Key Set"),
        (Some("{\"keys\": []}"), "jwks_file", "no public key"),
        (
            Some("{\"keys\": [{\"kty\": \"oct\", \"k\": \"AA\"}]}"),
            "jwks_file",
            "the key's type is",
        ),
        (
            Some("{\"keys\": [{\"kty\": \"RSA\", \"n\": \"AQAB\", \"e\": \"AQAB\"}]}"),
            "jwks_file",
            "2048",
        ),
        (Some(long.as_str()), "jwks_file", "longer than"),
    ] {
        if let Some(text) = text {
            std::fs::write(&path, text).unwrap();
        }
        let bad = settings(&service, &format!("{line} = {path:?}"));
        let problem = chain(&Tokens::new(&[bad]).unwrap_err());
        assert!(problem.contains(words), "{words}: {problem}");
    }
}

/// Key files are checked at the start and at each later read. A later failure leaves the last valid keys in use.
#[tokio::test]
async fn a_key_file_that_others_can_write_is_not_taken() {
    let service = Identity::start(Options::default());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("key.pem");
    let allow = |mode| std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
    std::fs::write(&path, service.pem()).unwrap();
    let line = format!("pem_file = {path:?}");
    for mode in [0o664, 0o646, 0o666] {
        allow(mode);
        let problem = chain(&Tokens::new(&[settings(&service, &line)]).unwrap_err());
        let words = format!("has mode 0{mode:o} and belongs to user");
        assert!(
            problem.contains(&words) && problem.contains("chmod go-w"),
            "{problem}"
        );
    }
    allow(0o444);
    let running = Running::ready(&service, &line).await;
    allow(0o646);
    let read_again = |tokens: &Tokens| tokens.issuers[0].keys.problem();
    running
        .until(|tokens| read_again(tokens).is_some_and(|problem| problem.contains("has mode")))
        .await;
    running.accepted(&service.user_token(ADA)).await;

    let pipe = folder.path().join("pipe");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    assert!(made.unwrap().success());
    let line = format!("jwks_file = {pipe:?}");
    let problem = chain(&Tokens::new(&[settings(&service, &line)]).unwrap_err());
    assert!(problem.contains("named pipe"), "{problem}");
}

#[tokio::test]
async fn a_new_key_is_fetched_once_and_random_names_do_not_hammer_the_provider() {
    let service = Identity::start(Options::default());
    let running = Running::ready(&service, "").await;
    let old = service.user_token(ADA);
    running.accepted(&old).await;
    assert_eq!(service.fetches(JWKS), 1);

    service.rotate_key();
    let new: Vec<String> = (0..20).map(|_| service.user_token(ADA)).collect();
    let verifying = new.iter().map(|token| running.accepted(token));
    futures_util::future::join_all(verifying).await;
    assert_eq!(
        service.fetches(JWKS),
        2,
        "calls at the same time share one fetch"
    );
    // The new set lacks the old key, so a remembered access token that was verified with the old
    // key is not accepted any more. The set may still be an outdated copy.
    running.postponed(&old, "none of", false).await;

    for n in 0..50 {
        let token = service.mint(user(ADA), json!({"kid": format!("random-{n}")}));
        running.postponed(&token, "none of", false).await;
    }
    assert_eq!(service.fetches(JWKS), 2, "at most once a minute");
}

/// Without a `kid`, only the signature shows that the set is old.
#[tokio::test]
async fn a_token_without_a_kid_has_the_set_fetched_once_when_no_key_verifies_it() {
    let service = Identity::start(Options::default());
    let running = Running::ready(&service, "").await;
    let unnamed = || service.mint(user(ADA), json!({"kid": null}));
    running.accepted(&unnamed()).await;
    service.rotate_key();
    running.accepted(&unnamed()).await;
    assert_eq!(service.fetches(JWKS), 2);
    let foreign = Identity::start(Options {
        issuer: Some(service.issuer().to_owned()),
        ..Options::default()
    });
    for _ in 0..10 {
        let token = foreign.mint(user(ADA), json!({"kid": null}));
        running
            .postponed(&token, "signature does not verify", true)
            .await;
    }
    assert_eq!(service.fetches(JWKS), 2, "at most once a minute");
}

/// An access token with an invented `kid` uses up the only fetch of the minute. Valid access tokens
/// with a new key get a retry delay, and are accepted after the delay.
#[tokio::test]
async fn an_invented_kid_does_not_have_good_tokens_rejected() {
    const REFETCH: Duration = Duration::from_secs(2);
    let service = Identity::start(Options::default());
    let paced = |settings: &_| Pace {
        refetch: REFETCH,
        ..quick(settings)
    };
    let running = Running::with(&[settings(&service, "")], paced);
    running
        .until(|tokens| tokens.issuers[0].keys.current().is_ok())
        .await;
    let invented = service.mint(user(ADA), json!({"kid": "invented"}));
    // The provider answered with the same set, but the answer may come from a cache.
    running.postponed(&invented, "none of", false).await;
    service.rotate_key();
    let good = service.user_token(ADA);
    let mut refusals = 0;
    while let Err(error) = running.tokens.verify(good.as_bytes()).await {
        assert_eq!(error.reason(), Reason::IdentityDown, "{error}");
        refusals += 1;
        assert!(refusals < 10, "{error}");
        tokio::time::sleep(error.retry_delay().unwrap()).await;
    }
}

/// While the provider does not answer, it is unknown whether it has the key.
#[tokio::test]
async fn an_unknown_kid_is_not_rejected_while_the_provider_is_down() {
    let mut service = Identity::start(Options::default());
    let running = Running::ready(&service, "").await;
    service.rotate_key();
    let good = service.user_token(ADA);
    service.stop();
    running.postponed(&good, "none of", false).await;
}

/// A withdrawn key is never treated as a new key, despite a restart or key ids that callers invent.
#[tokio::test]
async fn a_withdrawn_key_stays_rejected_whatever_key_ids_callers_invent() {
    const PUBLISHED_WITHIN: Duration = Duration::from_secs(4);
    let service = Identity::start(Options::default());
    let pace = |settings: &Settings| Pace {
        refresh: Duration::from_millis(100),
        published_within: PUBLISHED_WITHIN,
        ..quick(settings)
    };
    let running = Running::with(&[settings(&service, "")], pace);
    running
        .until(|tokens| tokens.issuers[0].keys.current().is_ok())
        .await;
    let issued = |issued: u64, header: Value| {
        let mut claims = user(ADA);
        claims["iat"] = json!(issued);
        service.mint(claims, header)
    };
    // Without `iat`, only the fetched sets show that the key was withdrawn.
    let mut claims = user(ADA);
    claims["iat"] = Value::Null;
    let undated = service.mint(claims, json!({}));
    running.accepted(&undated).await;
    let (older, recent) = (
        issued(now() - 600, json!({})),
        issued(now() - 60, json!({})),
    );
    service.rotate_key();
    running.accepted(&service.user_token(ADA)).await;
    let invented = |number: usize| issued(now(), json!({"kid": format!("random-{number}")}));
    for number in 0..500 {
        running.postponed(&invented(number), "none of", false).await;
    }
    let begun = Instant::now();
    while let Err(error) = running.tokens.verify(undated.as_bytes()).await
        && error.reason() == Reason::IdentityDown
    {
        assert!(begun.elapsed() < Duration::from_mins(1), "{error}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    running.refused(&undated, "none of").await;

    let restarted = Running::ready(&service, "").await;
    // This access token uses up the fetch of the minute.
    restarted.postponed(&invented(0), "none of", false).await;
    restarted.refused(&older, "none of").await;
    // A key that seems to have been withdrawn less than five minutes ago may also be a key that is
    // not published yet.
    restarted.postponed(&recent, "none of", false).await;
    // No key can verify an access token that was issued in the future.
    let future = issued(now() + 3_600, json!({"kid": "random-1"}));
    restarted.refused(&future, "none of").await;
}

/// A cache between the provider and the broker may return an older set once. A key that the older set lacks may still
/// be in use.
#[tokio::test]
async fn one_outdated_copy_of_the_key_set_has_no_good_token_rejected() {
    let service = Identity::start(Options::default());
    let pace = |settings: &Settings| Pace {
        refresh: Duration::from_millis(50),
        ..quick(settings)
    };
    let running = Running::with(&[settings(&service, "")], pace);
    let until_fetched = async || {
        let before = service.fetches(JWKS);
        running.until(|_| service.fetches(JWKS) >= before + 3).await;
    };
    until_fetched().await;
    let outdated = Answer {
        body: service.jwks().to_string(),
        ..Answer::default()
    };
    service.rotate_key();
    until_fetched().await;
    let good = service.user_token(ADA);
    running.accepted(&good).await;
    service.answer(JWKS, Some(outdated));
    until_fetched().await;
    running.postponed(&good, "none of", false).await;
    service.answer(JWKS, None);
    until_fetched().await;
    running.accepted(&good).await;
}

/// A caller who can guess the next key name of a provider may send that name first.
#[tokio::test]
async fn a_key_id_that_a_caller_named_before_its_time_is_not_held_against_the_key() {
    let service = Identity::start(Options::default());
    let pace = |settings: &Settings| Pace {
        refresh: Duration::from_millis(50),
        ..quick(settings)
    };
    let running = Running::with(&[settings(&service, "")], pace);
    running
        .until(|tokens| tokens.issuers[0].keys.current().is_ok())
        .await;
    let early = service.mint(user(ADA), json!({"kid": "the next key"}));
    running.postponed(&early, "none of", false).await;
    let before = service.fetches(JWKS);
    running.until(|_| service.fetches(JWKS) >= before + 3).await;
    // The set was fetched again and lacks the key, and the fetch of the minute is used up.
    running.postponed(&early, "none of", false).await;
}

#[tokio::test]
async fn a_caller_that_hangs_up_does_not_take_the_fetch_with_it() {
    let service = Identity::start(Options::default());
    let running = Running::ready(&service, "").await;
    service.rotate_key();
    let token = service.user_token(ADA);
    let first = running.tokens.verify(token.as_bytes());
    // The call is polled once and dropped after the fetch has begun.
    tokio::select! {
        biased;
        _ = first => panic!("it cannot be done at once"),
        () = std::future::ready(()) => {}
    }
    running.until(|_| service.fetches(JWKS) == 2).await;
    running.accepted(&token).await;
    assert_eq!(service.fetches(JWKS), 2);
}

#[tokio::test]
async fn a_provider_that_is_down_at_the_start_is_asked_again() {
    let mut service = Identity::start(Options::default());
    service.stop();
    let running = Running::with(&[settings(&service, "")], quick);
    let token = service.user_token(ADA);
    running.undecided(&token, "no key set is available").await;
    service.resume();
    running
        .until(|tokens| tokens.issuers[0].keys.current().is_ok())
        .await;
    running.accepted(&token).await;
}

#[tokio::test]
async fn the_last_good_set_is_used_while_the_provider_is_down_but_not_for_ever() {
    let mut service = Identity::start(Options::default());
    let pace = |settings: &Settings| Pace {
        refresh: Duration::from_millis(50),
        keep: Duration::from_secs(1),
        ..quick(settings)
    };
    let running = Running::with(&[settings(&service, "")], pace);
    running
        .until(|tokens| tokens.issuers[0].keys.current().is_ok())
        .await;
    service.stop();
    let token = service.user_token(ADA);
    running.accepted(&token).await;
    running
        .until(|tokens| tokens.issuers[0].keys.current().is_err())
        .await;
    // An access token that was verified while the key was valid is not accepted either.
    running.undecided(&token, "older than `keep_hours`").await;
    service.resume();
    running
        .until(|tokens| tokens.issuers[0].keys.current().is_ok())
        .await;
    running.accepted(&token).await;
}

#[tokio::test]
#[expect(clippy::too_many_lines, reason = "a table")]
async fn a_bad_answer_leaves_the_last_good_set() {
    let service = Identity::start(Options::default());
    let pace = |settings: &Settings| Pace {
        refresh: Duration::from_millis(20),
        ..quick(settings)
    };
    let running = Running::with(&[settings(&service, "")], pace);
    running
        .until(|tokens| tokens.issuers[0].keys.current().is_ok())
        .await;
    let elsewhere = Identity::start(Options::default());
    let body = |body: Value| Answer {
        body: body.to_string(),
        ..Answer::default()
    };
    let bad = [
        (
            DISCOVERY,
            body(
                json!({"issuer": "http://other", "jwks_uri": format!("{}{JWKS}", elsewhere.url())}),
            ),
            "byte for byte",
        ),
        (
            DISCOVERY,
            body(json!({"issuer": service.issuer(), "jwks_uri": "file:///etc/passwd"})),
            "neither https nor http",
        ),
        (
            DISCOVERY,
            body(json!({"issuer": service.issuer()})),
            "not a discovery document",
        ),
        (JWKS, body(json!({"keys": []})), "no public key"),
        (JWKS, body(json!([1, 2])), "not a JSON Web Key Set"),
        (
            JWKS,
            Answer {
                body: "x".repeat(70_000),
                ..Answer::default()
            },
            "longer than 65536",
        ),
        (
            JWKS,
            Answer {
                status: 500,
                ..Answer::default()
            },
            "500",
        ),
        (
            JWKS,
            Answer {
                status: 302,
                location: Some(format!("{}{JWKS}", elsewhere.url())),
                ..Answer::default()
            },
            "does not follow redirects",
        ),
    ];
    for (path, answer, words) in bad {
        service.answer(path, Some(answer));
        running
            .until(|tokens| {
                tokens.issuers[0]
                    .keys
                    .problem()
                    .is_some_and(|p| p.contains(words))
            })
            .await;
        running.accepted(&service.user_token(ADA)).await;
        service.answer(path, None);
        running
            .until(|tokens| tokens.issuers[0].keys.problem().is_none())
            .await;
    }
    assert_eq!(elsewhere.fetches(JWKS), 0, "no redirect is followed");
}

#[tokio::test]
async fn http_needs_its_word() {
    let service = Identity::start(Options::default());
    let without = Settings {
        allow_http: false,
        ..settings(&service, "")
    };
    let problem = chain(&Tokens::new(&[without]).unwrap_err());
    assert!(problem.contains("allow_http"), "{problem}");
}
