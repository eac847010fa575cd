//! Forms that are refused: without a token, with another token, from another site, too long, of the wrong type.

use reqwest::{Method, StatusCode};

use keybroker_proto::AccessRequestState;

use super::site::{CAROL, ConsoleSite, Visitor, approval, heard, path_of, token_of};

#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::too_many_lines, reason = "one story")]
async fn only_forms_of_the_page_itself_decide() {
    let site = ConsoleSite::open();
    let (ada, _) = site.ada().await;
    let [asked, other] = [site.request(&ada, 2).await, site.request(&ada, 3).await];
    let carol = Visitor::signed_in(&site, "carol").await;
    let dave = Visitor::signed_in(&site, "dave").await;
    let outsider = Visitor::new(&site);
    let (html, token) = carol.form(&asked).await;
    let (_, token_of_other) = carol.form(&other).await;
    let (_, token_of_dave) = dave.form(&asked).await;
    let words = heard(&html, &asked);
    let approve = format!("{}/approve", path_of(&asked));
    let good = approval(&words, &token);

    // A missing or wrong token, of another form, and of another session.
    let denial = carol.get(&format!("{}/deny", path_of(&asked))).await.html;
    let denial = token_of(&denial, &format!("{}/deny", path_of(&asked)));
    for token in ["", "A", "AAAA", &token_of_other, &token_of_dave, &denial] {
        let answer = carol.post(&approve, &approval(&words, token)).await;
        assert_eq!(answer.status, StatusCode::FORBIDDEN, "{token}");
        assert!(
            answer.html.contains("Nothing was changed"),
            "{}",
            answer.html
        );
    }
    let answer = carol.post(&approve, &good[..3]).await;
    assert_eq!(answer.status, StatusCode::FORBIDDEN);
    let twice = [&good[..], &[("token", token.as_str())]].concat();
    assert_eq!(
        carol.post(&approve, &twice).await.status,
        StatusCode::FORBIDDEN
    );

    // Another origin, and none.
    for origin in [
        "https://attacker.example",
        "null",
        "http://localhost",
        "https://localhost",
    ] {
        let answer = carol.post_from(origin, &approve, &good).await;
        assert_eq!(answer.status, StatusCode::FORBIDDEN, "{origin}");
    }
    let form = [("content-type", "application/x-www-form-urlencoded")];
    let body = format!(
        "word-1={}&word-2={}&spoken=yes&token={token}",
        words[0], words[1]
    );
    let answer = carol
        .request(Method::POST, &approve, &form, body.clone())
        .await;
    assert_eq!(answer.status, StatusCode::FORBIDDEN);
    let from_page =
        |more: (&'static str, &'static str)| [form[0], ("origin", site.origin.as_str()), more];
    let cross = from_page(("sec-fetch-site", "cross-site"));
    let answer = carol
        .request(Method::POST, &approve, &cross, body.clone())
        .await;
    assert_eq!(answer.status, StatusCode::FORBIDDEN);

    // Without a session: also with a credential that the other APIs accept.
    let answer = outsider.post(&approve, &good).await;
    assert_eq!(answer.status, StatusCode::FORBIDDEN);
    let bearer = format!("Bearer {}", site.identity.user_token(CAROL));
    let headers = [
        form[0],
        ("origin", site.origin.as_str()),
        ("authorization", bearer.as_str()),
    ];
    let answer = outsider
        .request(Method::POST, &approve, &headers, body.clone())
        .await;
    assert_eq!(answer.status, StatusCode::FORBIDDEN);

    // Too long, or of another type.
    let same = from_page(("sec-fetch-site", "same-origin"));
    for length in [8 * 1_024, 512 * 1_024] {
        let huge = format!("{body}&x={}", "x".repeat(length));
        let answer = carol.request(Method::POST, &approve, &same, huge).await;
        assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE);
    }
    for kind in [
        "application/json",
        "text/plain",
        "multipart/form-data; boundary=x",
    ] {
        let headers = [("content-type", kind), ("origin", site.origin.as_str())];
        let answer = carol
            .request(Method::POST, &approve, &headers, body.clone())
            .await;
        assert_eq!(answer.status, StatusCode::UNSUPPORTED_MEDIA_TYPE, "{kind}");
    }
    // Nothing of all this decided.
    let all = ada.requests().await;
    assert!(
        all.iter()
            .all(|one| one.state() == AccessRequestState::Pending),
        "{all:?}"
    );
    assert!(site.entries("access_request.approve_for_member").is_empty());
    let answer = carol.request(Method::POST, &approve, &same, body).await;
    assert_eq!(answer.status, StatusCode::SEE_OTHER, "{}", answer.html);
}

#[tokio::test(flavor = "multi_thread")]
async fn other_methods_and_paths_are_not_there() {
    let site = ConsoleSite::open();
    let (ada, _) = site.ada().await;
    let asked = site.request(&ada, 2).await;
    let path = path_of(&asked);
    let carol = Visitor::signed_in(&site, "carol").await;
    for (method, path, allowed) in [
        (Method::GET, format!("{path}/approve"), "POST"),
        (Method::GET, "/sign-out".to_owned(), "POST"),
        (Method::POST, path.clone(), "GET"),
        (Method::POST, "/".to_owned(), "GET"),
        (Method::PUT, format!("{path}/deny"), "GET, POST"),
        (Method::DELETE, "/devices/end-trust".to_owned(), "GET, POST"),
        (Method::HEAD, "/".to_owned(), "GET"),
        (Method::OPTIONS, "/console.css".to_owned(), "GET"),
    ] {
        let answer = carol.request(method, &path, &[], String::new()).await;
        assert_eq!(answer.status, StatusCode::METHOD_NOT_ALLOWED, "{path}");
        assert_eq!(answer.headers["allow"], allowed, "{path}");
    }
    for path in [
        "/requests/",
        "/requests/00",
        &format!("{path}/"),
        &format!("{path}/confirm"),
        "/index.html",
        "/user-keys",
        "/keybroker.v1.DeviceService/ListDevices",
        "/metrics",
    ] {
        assert_eq!(
            carol.get(path).await.status,
            StatusCode::NOT_FOUND,
            "{path}"
        );
    }
    let unknown = format!("/requests/{}", "0".repeat(32));
    for path in [unknown.clone(), format!("{unknown}/deny")] {
        assert_eq!(
            carol.get(&path).await.status,
            StatusCode::NOT_FOUND,
            "{path}"
        );
    }
}
