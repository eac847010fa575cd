//! What bad input gets.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::json;

use super::site::{ADA, Answer, BOB, RestSite, body};
use crate::{
    client,
    client_credentials::credential,
    identity::{now, user},
    site::Options,
};

const JSON: &str = "application/json";

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_are_none() {
    let rest = RestSite::open();
    rest.store(Method::POST, BOB, &[0xb2; 32])
        .await
        .expect_stored();
    let key = |length: usize| body(&client::sending(&vec![0xd1; length]));
    let unpadded = |length: usize| key(length).replace('=', "");
    let mebibyte = "x".repeat(1 << 20);
    let cases = [
        (JSON, String::new(), 400),
        (JSON, "not JSON".to_owned(), 400),
        (JSON, "[]".to_owned(), 400),
        (JSON, "{}".to_owned(), 400),
        (JSON, r#"{"key":null}"#.to_owned(), 400),
        (JSON, r#"{"key":"not base64"}"#.to_owned(), 400),
        (JSON, r#"{"key":""}"#.to_owned(), 400),
        (JSON, key(31), 400),
        (JSON, key(33), 400),
        (JSON, unpadded(33), 400),
        (JSON, key(64), 400),
        (JSON, format!("{}{}", key(32), key(32)), 400),
        (JSON, mebibyte.clone(), 413),
        (JSON, format!(r#"{{"key":"{mebibyte}"}}"#), 413),
        ("text/plain", key(32), 415),
        ("application/x-www-form-urlencoded", key(32), 415),
        ("application/json; charset=utf-16", key(32), 415),
    ];
    for (content_type, text, status) in cases {
        for method in [Method::POST, Method::PUT] {
            let shown: String = text.chars().take(60).collect();
            let answer = rest.send(method.clone(), ADA, content_type, text.clone());
            let answer = answer.await;
            assert_eq!(
                answer.status.as_u16(),
                status,
                "{method} {content_type} {shown}"
            );
            answer.expect_refused(status, "REQUEST");
            assert!(!answer.body.contains("0dHR"), "{answer:?}");
        }
    }
    // A megabyte whose length nobody says beforehand.
    let chunk = format!("{:x}\r\n{}\r\n", 1 << 10, "x".repeat(1 << 10));
    let unannounced = format!(
        "POST /user-keys HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Type: {JSON}\r\n\
         Transfer-Encoding: chunked\r\n\r\n{}",
        rest.token(ADA),
        chunk.repeat(8)
    );
    let answer = tokio::task::block_in_place(|| rest.raw(&unannounced));
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    // Without a content type.
    let bare = rest.as_user(Method::POST, ADA).body(key(32)).send().await;
    Answer::of(bare.unwrap())
        .await
        .expect_refused(415, "REQUEST");
    // Nothing was stored, nothing was lost, and each refusal is in the log.
    rest.get(ADA).await.expect_refused(404, "KEY_NOT_FOUND");
    rest.get(BOB).await.expect_key(&[0xb2; 32]);
    let audit = rest.broker.site.audit();
    let refusals = audit.lines().filter(|line| {
        line.contains("\"reason\":\"REQUEST\"") && line.contains(&format!("token:bitwarden:{ADA}"))
    });
    assert_eq!(refusals.count(), 36, "{audit}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_without_padding_is_taken() {
    let rest = RestSite::open();
    let text = body(&client::sending(&[0xd2; 32])).replace('=', "");
    rest.send(Method::POST, ADA, JSON, text)
        .await
        .expect_stored();
    rest.get(ADA).await.expect_key(&[0xd2; 32]);
}

/// The body stops in the middle: an answer before the client gives up, and others are served meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_body_is_given_up() {
    let rest = RestSite::open();
    let request = format!(
        "POST /user-keys HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Type: {JSON}\r\n\
         Content-Length: 60\r\n\r\n{{\"key\":",
        rest.token(ADA)
    );
    let started = Instant::now();
    let answer = tokio::task::block_in_place(|| rest.raw(&request));
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    assert!(answer.contains("connection: close"), "{answer}");
    assert!(started.elapsed() > Duration::from_secs(9));
    rest.get(ADA).await.expect_refused(404, "KEY_NOT_FOUND");
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_that_are_none() {
    let rest = RestSite::open_with(Options::default(), "", "failures_per_minute = 1000");
    rest.store(Method::POST, ADA, &[0xd3; 32])
        .await
        .expect_stored();
    let good = rest.token(ADA);
    let mint = |claims: serde_json::Value| {
        let mut all = user(ADA);
        all.as_object_mut()
            .unwrap()
            .extend(claims.as_object().unwrap().clone());
        format!("Bearer {}", rest.identity.mint(all, json!({})))
    };
    let other = crate::identity::Identity::start(crate::identity::Options {
        issuer: Some(rest.identity.issuer().to_owned()),
        ..crate::identity::Options::default()
    });
    for authorization in [
        String::new(),
        "Bearer".to_owned(),
        "Bearer ".to_owned(),
        "Bearer nonsense".to_owned(),
        good.clone(),
        format!("Digest {good}"),
        format!("Bearer {good}x"),
        format!("Bearer {good} {good}"),
        format!("Bearer {}", "x".repeat(9_000)),
        mint(json!({ "exp": now() - 3_600 })),
        mint(json!({ "iss": "https://elsewhere.example.org" })),
        mint(json!({ "scope": ["openid"] })),
        mint(json!({ "sub": "ada" })),
        mint(json!({ "amr": null })),
        format!("Bearer {}", other.user_token(ADA)),
    ] {
        let request = rest.request(Method::GET, "/user-keys");
        let request = request.header("authorization", &authorization);
        let answer = Answer::of(request.send().await.unwrap()).await;
        answer.expect_refused(401, "CREDENTIAL");
    }
    // None at all, two good ones, and what a proxy says of the caller.
    let bare = || rest.request(Method::GET, "/user-keys");
    let bearer = format!("Bearer {good}");
    for request in [
        bare(),
        bare()
            .header("authorization", &bearer)
            .header("authorization", &bearer),
        bare()
            .header("x-forwarded-user", ADA)
            .header("x-auth-request-user", ADA)
            .header("x-forwarded-access-token", &good)
            .header("remote-user", ADA)
            .header(
                "x-forwarded-client-cert",
                "URI=spiffe://test.example/releaser",
            ),
    ] {
        let answer = Answer::of(request.send().await.unwrap()).await;
        answer.expect_refused(401, "CREDENTIAL");
    }
    // A token in the query is no credential either, and names of others in a good request change nothing.
    let query = format!("/user-keys?access_token={good}&user={BOB}");
    let answer = rest.request(Method::GET, &query).send().await.unwrap();
    Answer::of(answer).await.expect_refused(401, "CREDENTIAL");
    let named = rest
        .request(Method::GET, &format!("/user-keys?user={BOB}"))
        .bearer_auth(&good)
        .header("x-forwarded-user", BOB);
    let answer = Answer::of(named.send().await.unwrap()).await;
    answer.expect_key(&[0xd3; 32]);
    let log = rest.broker.site.log();
    assert!(!log.contains(&good), "the log shows a token");
}

/// By the service itself, or with parts of what it signed.
#[tokio::test(flavor = "multi_thread")]
async fn tokens_that_are_nearly_good() {
    let rest = RestSite::open_with(Options::default(), "", "failures_per_minute = 1000");
    let mint = |name: &str, value: serde_json::Value, header: serde_json::Value| {
        let mut claims = user(ADA);
        claims[name] = value;
        rest.identity.mint(claims, header)
    };
    let headed = |header| rest.identity.mint(user(ADA), header);
    // The payload of one token between header and signature of another.
    let (good, of_bob) = (rest.token(ADA), rest.token(BOB));
    let [mut parts, others] = [&good, &of_bob].map(|token| token.split('.').collect::<Vec<_>>());
    parts[1] = others[1];
    for (token, what) in [
        (mint("nbf", (now() + 3_600).into(), json!({})), "early"),
        // Its signature is good: it is the length that is refused.
        (mint("more", "x".repeat(16_384).into(), json!({})), "long"),
        // Issued so long ago that the provider has published the key since, if it has one of that name.
        (
            mint("iat", (now() - 600).into(), json!({ "kid": "another" })),
            "unknown key",
        ),
        (headed(json!({ "alg": "none" })), "none"),
        (headed(json!({ "alg": "HS256" })), "HS256"),
        (parts.join("."), "swapped"),
    ] {
        let request = rest.request(Method::GET, "/user-keys").bearer_auth(token);
        let answer = Answer::of(request.send().await.unwrap()).await;
        assert_eq!(answer.status, 401, "{what}");
        answer.expect_refused(401, "CREDENTIAL");
    }
    // The same, with nothing that is wrong.
    let longer = mint("more", "x".repeat(2_048).into(), json!({}));
    let request = rest.request(Method::GET, "/user-keys").bearer_auth(longer);
    let answer = Answer::of(request.send().await.unwrap()).await;
    answer.expect_refused(404, "KEY_NOT_FOUND");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_for_somebody_else_is_none() {
    let audience = r#"audience = ["keys"]"#;
    let rest = RestSite::configured(Options::default(), "", "", audience);
    for (claims, status, reason) in [
        (json!({}), 401, "CREDENTIAL"),
        (json!({ "aud": "vault" }), 401, "CREDENTIAL"),
        (json!({ "aud": ["vault", "KEYS"] }), 401, "CREDENTIAL"),
        (json!({ "aud": ["vault", "keys"] }), 404, "KEY_NOT_FOUND"),
    ] {
        let mut all = user(ADA);
        let more = claims.as_object().unwrap().clone();
        all.as_object_mut().unwrap().extend(more);
        let token = rest.identity.mint(all, json!({}));
        let request = rest.request(Method::GET, "/user-keys").bearer_auth(token);
        let answer = Answer::of(request.send().await.unwrap()).await;
        answer.expect_refused(status, reason);
    }
}

/// An API client is somebody, and has no key of its own: 403, and never the 404 that is for users.
#[tokio::test(flavor = "multi_thread")]
async fn api_clients_have_no_key_here() {
    let grant = "[client_credentials]\ngrantable_roles = [\"enrol\"]";
    let rest = RestSite::open_with(Options::default(), grant, "");
    let made = credential(
        &rest.broker,
        "admin",
        &["create", "--label", "backup", "--role", "enrol"],
    );
    let (id, secret) = (
        made["id"].as_str().unwrap(),
        made["secret"].as_str().unwrap(),
    );
    client::never_in_a_log(secret.as_bytes());
    let unknown = "0".repeat(id.len());
    for (id, secret, status, reason) in [
        (unknown.as_str(), secret, 401, "CREDENTIAL"),
        (id, "wrong", 401, "CREDENTIAL"),
        (id, "", 401, "CREDENTIAL"),
        (id, secret, 403, "POLICY"),
    ] {
        for method in [Method::GET, Method::POST, Method::PUT] {
            let request = rest
                .request(method, "/user-keys")
                .header("content-type", JSON)
                .basic_auth(id, Some(secret))
                .body(body(&[0xd5; 32]));
            let answer = Answer::of(request.send().await.unwrap()).await;
            answer.expect_refused(status, reason);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_over_the_rate_is_told_when_to_come_again() {
    let rest = RestSite::open_with(Options::default(), "", "user_calls_per_minute = 6");
    for _ in 0..6 {
        rest.get(ADA).await.expect_refused(404, "KEY_NOT_FOUND");
    }
    let answer = rest.get(ADA).await;
    answer.expect_refused(429, "RATE");
    let seconds: u64 = answer.headers["retry-after"]
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    assert!((1..=10).contains(&seconds), "{seconds}");
    // Nobody else pays for it.
    rest.get(BOB).await.expect_refused(404, "KEY_NOT_FOUND");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_bad_tokens_is_told_to_stop_and_a_good_one_goes_on() {
    let rest = RestSite::open_with(Options::default(), "", "failures_per_minute = 3");
    rest.store(Method::POST, ADA, &[0xd4; 32])
        .await
        .expect_stored();
    let knock = || async {
        let request = rest.request(Method::GET, "/user-keys");
        Answer::of(request.bearer_auth("nonsense").send().await.unwrap()).await
    };
    for _ in 0..3 {
        knock().await.expect_refused(401, "CREDENTIAL");
    }
    knock().await.expect_refused(429, "FAILURE_BUDGET");
    rest.get(ADA).await.expect_key(&[0xd4; 32]);
    // A client whose token has expired needs to renew it: to come again later would not help.
    for _ in 0..5 {
        let mut claims = user(ADA);
        claims["exp"] = (now() - 3_600).into();
        let expired = rest.identity.mint(claims, json!({}));
        let request = rest.request(Method::GET, "/user-keys");
        let answer = Answer::of(request.bearer_auth(expired).send().await.unwrap()).await;
        answer.expect_refused(401, "CREDENTIAL");
    }
    knock().await.expect_refused(429, "FAILURE_BUDGET");
    let log = rest.broker.site.log();
    let line = log
        .lines()
        .find(|line| line.contains("the `exp` has passed"));
    let line = line.unwrap_or_else(|| panic!("{log}"));
    assert!(
        line.contains(" s ago); the client needs a new access token"),
        "{line}"
    );
    let (site, _) = rest.broker.stop();
    let audit = site.audit();
    let refusals: Vec<&str> = audit
        .lines()
        .filter(|line| line.contains("connection.refused"))
        .collect();
    assert_eq!(refusals.len(), 2, "one entry for each reason: {refusals:?}");
}
