//! Signing in: good, replayed, forged, of another browser, too old, without the role, and signing out.

use reqwest::StatusCode;
use serde_json::{Value, json};

use keybroker_proto::{AccessRequest, AccessRequestState, DeviceState};

use crate::{devices::member::CODE, identity::now, tokens::ADA};

use super::site::{
    Answer, CAROL, ConsoleSite, LOGIN, SESSION, Visitor, approval, heard, path_of, token_of,
};

#[tokio::test(flavor = "multi_thread")]
async fn an_approver_signs_in_and_out() {
    let site = ConsoleSite::open();
    let carol = Visitor::new(&site);
    let home = carol.get("/").await;
    assert_eq!(home.status, StatusCode::OK);
    assert!(home.html.contains("href=\"/sign-in\""), "{}", home.html);
    assert!(home.cookies().is_empty());

    let begun = carol.get("/sign-in").await;
    let [cookie] = begun.cookies()[..] else {
        panic!("{:?}", begun.cookies())
    };
    assert!(cookie.starts_with(LOGIN), "{cookie}");
    assert!(cookie.ends_with("; Path=/; Secure; HttpOnly; SameSite=Lax; Max-Age=600"));
    for part in [
        "response_type=code",
        "code_challenge_method=S256",
        "scope=openid",
        "nonce=",
        "state=",
    ] {
        assert!(begun.location().contains(part), "{}", begun.location());
    }
    assert!(
        !begun.location().contains("max_age"),
        "{}",
        begun.location()
    );

    let answer = carol.sign_in("/sign-in", "carol").await;
    let cookies = answer.cookies();
    assert_eq!(cookies.len(), 2, "{cookies:?}");
    assert!(cookies[0].starts_with(SESSION), "{cookies:?}");
    assert!(cookies[0].ends_with("; Path=/; Secure; HttpOnly; SameSite=Strict"));
    assert!(cookies[1].starts_with(&format!("{LOGIN}=;")) && cookies[1].ends_with("Max-Age=0"));
    assert!(
        answer.html.contains("content=\"0; url=/\""),
        "{}",
        answer.html
    );

    let home = carol.get("/").await.html;
    assert!(home.contains("No request is pending"), "{home}");
    assert!(home.contains(&format!("token:vault:{CAROL}")), "{home}");
    let old = carol.page.lock().unwrap()[SESSION].clone();
    let out = carol
        .post("/sign-out", &[("token", &token_of(&home, "/sign-out"))])
        .await;
    assert_eq!(out.status, StatusCode::OK);
    assert!(out.html.contains("You are signed out"), "{}", out.html);
    assert!(!carol.page.lock().unwrap().contains_key(SESSION));
    // The session has ended on the server, too.
    carol.page.lock().unwrap().insert(SESSION.to_owned(), old);
    assert!(carol.get("/").await.html.contains("href=\"/sign-in\""));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_counts_once_and_only_in_the_browser_that_began() {
    let site = ConsoleSite::open();
    let refused = |answer: &Answer| {
        assert_eq!(answer.status, StatusCode::FORBIDDEN, "{}", answer.html);
        assert!(answer.cookies().is_empty(), "{:?}", answer.cookies());
    };
    let (carol, other) = (Visitor::new(&site), Visitor::new(&site));
    let callback = carol.authorize("/sign-in", "carol").await;
    // A browser without a sign-in, and one with another.
    refused(&other.call_back(&callback).await);
    other.get("/sign-in").await;
    refused(&other.call_back(&callback).await);
    // Another state, and none.
    let forged = callback.replace("state=", "state=A");
    refused(&carol.call_back(&forged).await);
    let without = callback.split("&state=").next().unwrap();
    refused(&carol.call_back(without).await);
    // The address itself is still good, once.
    let cookies = carol.page.lock().unwrap().clone();
    assert_eq!(carol.call_back(&callback).await.status, StatusCode::OK);
    *carol.page.lock().unwrap() = cookies;
    refused(&carol.call_back(&callback).await);

    // A code that was exchanged before, in a new sign-in of the same browser.
    let code = |url: &str| {
        let (_, rest) = url.split_once("code=").unwrap();
        rest.split('&').next().unwrap().to_owned()
    };
    let fresh = carol.authorize("/sign-in", "carol").await;
    refused(
        &carol
            .call_back(&fresh.replace(&code(&fresh), &code(&callback)))
            .await,
    );
    // The code of another sign-in, which has another PKCE verifier and another nonce.
    let victim = other.authorize("/sign-in", "dave").await;
    let fresh = carol.authorize("/sign-in", "carol").await;
    refused(
        &carol
            .call_back(&fresh.replace(&code(&fresh), &code(&victim)))
            .await,
    );
    // An error of the provider, with text of an attacker.
    let fresh = carol.authorize("/sign-in", "carol").await;
    let error = fresh.replace("code=", "error=%3Cscript%3E&error_description=%3Cb%3E&x=");
    let answer = carol.call_back(&error).await;
    refused(&answer);
    assert!(!answer.html.contains("<script") && !answer.html.contains("<b>"));
    // The answer of another issuer (RFC 9207).
    let fresh = carol.authorize("/sign-in", "carol").await;
    refused(
        &carol
            .call_back(&format!("{fresh}&iss=https://attacker.example"))
            .await,
    );
    assert_eq!(
        carol.sign_in("/sign-in", "carol").await.status,
        StatusCode::OK
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_id_token_signs_no_one_in() {
    let site = ConsoleSite::open();
    let carol = Visitor::new(&site);
    let cases: [(&str, Value, Value); 13] = [
        ("nonce", json!({"nonce": "another"}), json!({})),
        ("no nonce", json!({"nonce": null}), json!({})),
        ("audience", json!({"aud": "another client"}), json!({})),
        (
            "no azp",
            json!({"aud": ["approvers page", "another"]}),
            json!({}),
        ),
        ("azp", json!({"azp": "another client"}), json!({})),
        (
            "issuer",
            json!({"iss": "https://attacker.example"}),
            json!({}),
        ),
        (
            "expired",
            json!({"exp": now() - 3_600, "iat": now() - 7_200}),
            json!({}),
        ),
        ("not yet valid", json!({"nbf": now() + 3_600}), json!({})),
        ("auth_time", json!({"auth_time": now() + 3_600}), json!({})),
        ("subject", json!({"sub": null}), json!({})),
        ("unsigned", json!({}), json!({"alg": "none"})),
        ("symmetric", json!({}), json!({"alg": "HS256"})),
        ("access token", json!({}), json!({"typ": "at+jwt"})),
    ];
    for (what, claims, header) in cases {
        site.identity.change_id_tokens(claims, header);
        let answer = carol.sign_in("/sign-in", "carol").await;
        assert_eq!(
            answer.status,
            StatusCode::FORBIDDEN,
            "{what}: {}",
            answer.html
        );
        assert!(!carol.page.lock().unwrap().contains_key(SESSION), "{what}");
    }
    // The log has the reasons, and neither the page nor the log has a token.
    let log = site.broker.site.log();
    for reason in [
        "the `nonce` is not",
        "`azp` is \\\"another client",
        "not the type of an ID token",
    ] {
        assert!(log.contains(reason), "{reason}: {log}");
    }
    assert!(!log.contains("eyJ"), "{log}");
    let several = json!({"aud": ["approvers page", "another"], "azp": "approvers page"});
    for good in [several, json!({})] {
        site.identity.change_id_tokens(good, json!({"typ": null}));
        let answer = carol.sign_in("/sign-in", "carol").await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.html);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_without_the_role_gets_no_session() {
    let site = ConsoleSite::open();
    let ada = Visitor::new(&site);
    let answer = ada.sign_in("/sign-in", "ada").await;
    assert_eq!(answer.status, StatusCode::FORBIDDEN);
    assert!(
        answer.html.contains("You are not an approver"),
        "{}",
        answer.html
    );
    assert!(!ada.page.lock().unwrap().contains_key(SESSION));
    let refusals = site.entries("access_request.list");
    assert_eq!(refusals.len(), 1, "{refusals:?}");
    assert_eq!(refusals[0]["reason"], "POLICY");
}

/// A person at an unattended browser, or one whose role was taken away after the sign-in, can read and deny, and nothing else.
#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::too_many_lines, reason = "one story")]
async fn to_withdraw_and_to_end_trust_needs_a_recent_authentication() {
    let site = ConsoleSite::open();
    let (ada, first) = site.ada().await;
    let [approved, pending] = [site.request(&ada, 2).await, site.request(&ada, 3).await];
    let carol = Visitor::signed_in(&site, "carol").await;
    let (html, token) = carol.form(&approved).await;
    let words = heard(&html, &approved);
    let fields = approval(&words, &token);
    let approve = format!("{}/approve", path_of(&approved));
    assert_eq!(
        carol.post(&approve, &fields).await.status,
        StatusCode::SEE_OTHER
    );
    let end = "/devices/end-trust";
    let of_device = format!("{end}?user={ADA}&device={}", hex::encode(&first.id));
    let withdraw = format!("{}/deny", path_of(&approved));
    let forms = [
        (
            &withdraw,
            token_of(&carol.get(&withdraw).await.html, &withdraw),
        ),
        (
            &end.to_owned(),
            token_of(&carol.get(&of_device).await.html, end),
        ),
    ]
    .map(|(path, token)| (path.clone(), token));

    site.identity.age_sign_ins(700);
    let session = carol.page.lock().unwrap()[SESSION].clone();
    carol.page.lock().unwrap().clear();
    carol.sign_in("/sign-in", "carol").await;
    for path in [&withdraw, &of_device] {
        let answer = carol.get(path).await;
        assert_eq!(answer.status, StatusCode::FORBIDDEN, "{path}");
        assert!(
            answer.html.contains("Your last sign-in is too old"),
            "{}",
            answer.html
        );
    }
    for (path, token) in &forms {
        let id = hex::encode(&first.id);
        let fields = [
            ("user", ADA),
            ("device", &id),
            ("cause", "lost"),
            ("token", token),
        ];
        let answer = carol.post(path, &fields).await;
        assert_eq!(answer.status, StatusCode::FORBIDDEN, "{path}");
        assert!(
            answer.html.contains("Your last sign-in is too old"),
            "{path}: {}",
            answer.html
        );
    }
    assert_eq!(ada.devices().await[0].state(), DeviceState::Trusted);
    let deny = format!("{}/deny", path_of(&pending));
    let token = token_of(&carol.get(&deny).await.html, &deny);
    let denied = carol.post(&deny, &[("token", &token)]).await;
    assert_eq!(denied.status, StatusCode::SEE_OTHER, "{}", denied.html);
    let states: Vec<_> = ada
        .requests()
        .await
        .iter()
        .map(AccessRequest::state)
        .collect();
    assert_eq!(
        states,
        [AccessRequestState::Denied, AccessRequestState::Approved]
    );
    // The session with the recent sign-in can do both.
    carol
        .page
        .lock()
        .unwrap()
        .insert(SESSION.to_owned(), session);
    let (path, token) = &forms[0];
    let withdrawn = carol.post(path, &[("token", token)]).await;
    assert_eq!(
        withdrawn.status,
        StatusCode::SEE_OTHER,
        "{}",
        withdrawn.html
    );
}

/// The token of a form is of what the approver confirmed. Carol signed in recently, so nothing else refuses her form.
#[tokio::test(flavor = "multi_thread")]
async fn the_form_of_a_pending_request_withdraws_no_approval() {
    let site = ConsoleSite::open();
    let (ada, _) = site.ada().await;
    let asked = site.request(&ada, 2).await;
    let carol = Visitor::signed_in(&site, "carol").await;
    let deny = format!("{}/deny", path_of(&asked));
    let token = token_of(&carol.get(&deny).await.html, &deny);
    let dave = Visitor::signed_in(&site, "dave").await;
    let (html, of_dave) = dave.form(&asked).await;
    let words = heard(&html, &asked);
    let approve = format!("{}/approve", path_of(&asked));
    let approved = dave.post(&approve, &approval(&words, &of_dave)).await;
    assert_eq!(approved.status, StatusCode::SEE_OTHER, "{}", approved.html);
    let is_refused = async |state: AccessRequestState, word: &str| {
        let late = carol.post(&deny, &[("token", &token)]).await;
        assert_eq!(late.status, StatusCode::CONFLICT, "{}", late.html);
        assert!(late.html.contains(word), "{}", late.html);
        assert_eq!(ada.requests().await[0].state(), state);
    };
    is_refused(
        AccessRequestState::Approved,
        "is approved, and no longer pending",
    )
    .await;
    ada.fetches(&asked, CODE).await.unwrap();
    ada.confirms(&asked).await.unwrap();
    is_refused(
        AccessRequestState::Consumed,
        "is consumed, and no longer pending",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_approval_needs_a_recent_authentication() {
    let site = ConsoleSite::open();
    let (ada, _) = site.ada().await;
    let asked = site.request(&ada, 2).await;
    let path = path_of(&asked);
    let carol = Visitor::signed_in(&site, "carol").await;
    // The provider has a session of Carol that is older than ten minutes, and signs her in again without asking.
    site.identity.age_sign_ins(700);
    let (_, token) = carol.form(&asked).await;
    carol.page.lock().unwrap().clear();
    carol.sign_in("/sign-in", "carol").await;
    let html = carol.get(&path).await.html;
    assert!(html.contains("Sign in again to approve"), "{html}");
    assert!(!html.contains("word-1"), "{html}");
    // Also if the form is sent nevertheless: the token is of the earlier session.
    let approve = format!("{path}/approve");
    let answer = carol
        .post(&approve, &[("token", &token), ("spoken", "yes")])
        .await;
    assert_eq!(answer.status, StatusCode::FORBIDDEN);
    // With a session, the provider must ask again.
    let again = format!("/sign-in?request={}", hex::encode(&asked.id));
    let begun = carol.get(&again).await;
    assert!(
        begun.location().contains("prompt=login&max_age=600"),
        "{}",
        begun.location()
    );
    // A provider that does not ask is not believed.
    site.identity.disregard_prompts(true);
    let lax = carol.sign_in(&again, "carol").await;
    assert_eq!(lax.status, StatusCode::FORBIDDEN, "{}", lax.html);
    site.identity
        .change_id_tokens(json!({"auth_time": null}), json!({}));
    let silent = carol.sign_in(&again, "carol").await;
    assert_eq!(silent.status, StatusCode::FORBIDDEN, "{}", silent.html);
    site.identity.restore_id_tokens();
    site.identity.disregard_prompts(false);
    let before = carol.page.lock().unwrap()[SESSION].clone();
    let answer = carol.sign_in(&again, "carol").await;
    assert!(
        answer.html.contains(&format!("url={path}")),
        "{}",
        answer.html
    );
    assert!(carol.get(&path).await.html.contains("word-1"));
    // The earlier session has ended.
    carol
        .page
        .lock()
        .unwrap()
        .insert(SESSION.to_owned(), before);
    assert!(carol.get(&path).await.html.contains("href=\"/sign-in"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unavailable_provider_is_said() {
    let mut site = ConsoleSite::open();
    let carol = Visitor::new(&site);
    let callback = carol.authorize("/sign-in", "carol").await;
    site.identity.stop();
    let answer = carol.call_back(&callback).await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(
        answer.html.contains("identity provider is unavailable"),
        "{}",
        answer.html
    );
    assert!(answer.headers.contains_key("retry-after"));
    site.identity.resume();
    assert_eq!(
        carol.sign_in("/sign-in", "carol").await.status,
        StatusCode::OK
    );
}
