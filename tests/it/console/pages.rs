//! What the pages show, and what they do: headers, lists, approve, deny, two approvers, devices, decisions, text of attackers.

use reqwest::StatusCode;

use keybroker_proto::{self as proto, AccessApprover, AccessRequestState, DeviceState};

use crate::{devices::member::App, tokens::ADA};

use super::site::{
    CAROL, ConsoleSite, DAVE, Visitor, Wanted, approval, heard, path_of, percent, token_of,
};

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_has_the_headers() {
    let site = ConsoleSite::open();
    let (ada, _) = site.ada().await;
    let path = path_of(&site.request(&ada, 2).await);
    let carol = Visitor::signed_in(&site, "carol").await;
    let policy = "default-src 'none'; style-src 'self'; script-src 'self'; form-action 'self'; base-uri 'none'; \
                  frame-ancestors 'none'";
    for path in [
        "/",
        "/sign-in",
        "/callback",
        "/console.css",
        "/console.js",
        &path,
        &format!("{path}/deny"),
        "/devices?user=x",
        "/decisions",
        "/nowhere",
        "/sign-out",
    ] {
        let answer = carol.get(path).await;
        let headers = &answer.headers;
        assert_eq!(headers["content-security-policy"], policy, "{path}");
        assert_eq!(headers["x-frame-options"], "DENY", "{path}");
        assert_eq!(headers["x-content-type-options"], "nosniff", "{path}");
        assert_eq!(headers["referrer-policy"], "same-origin", "{path}");
        assert_eq!(headers["cache-control"], "no-store", "{path}");
        assert_eq!(
            headers["strict-transport-security"], "max-age=31536000",
            "{path}"
        );
        assert_eq!(
            headers["cross-origin-opener-policy"], "same-origin",
            "{path}"
        );
        assert_eq!(
            headers["cross-origin-resource-policy"], "same-origin",
            "{path}"
        );
        assert!(
            !answer.html.contains("style=\"") && !answer.html.contains(" onload"),
            "{path}"
        );
    }
    assert_eq!(
        carol.get("/console.css").await.headers["content-type"],
        "text/css"
    );
    assert_eq!(
        carol.get("/console.js").await.headers["content-type"],
        "text/javascript"
    );
}

#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::too_many_lines, reason = "one story")]
async fn an_approver_gives_a_new_device_access() {
    let site = ConsoleSite::open();
    let (ada, _) = site.ada().await;
    let asked = site.request(&ada, 2).await;
    let carol = Visitor::signed_in(&site, "carol").await;
    let list = carol.get("/").await.html;
    assert!(
        list.contains(&path_of(&asked)) && list.contains("device 2"),
        "{list}"
    );
    assert!(list.contains("127.0.0.1:"), "{list}");
    assert!(list.contains("loopback"), "{list}");
    // Another page begins after a place in the list. A malformed place is the first page.
    let zeros = "0".repeat(32);
    for (after, is_listed) in [(format!("1.{zeros}"), false), ("x".to_owned(), true)] {
        let page = carol.get(&format!("/?after={after}")).await.html;
        assert_eq!(page.contains(&path_of(&asked)), is_listed, "{page}");
    }
    let (html, token) = carol.form(&asked).await;
    let words = heard(&html, &asked);
    assert_eq!(words.len(), 2, "{html}");
    // The page does not have the hidden words, and has the others.
    for word in &asked.phrase {
        let item = format!("<li>{word}</li>");
        assert_eq!(
            html.contains(&item),
            !words.contains(word),
            "{word}: {html}"
        );
    }
    let approve = format!("{}/approve", path_of(&asked));
    let post = async |one: &str, two: &str, spoken: &str| {
        let fields = [
            ("word-1", one),
            ("word-2", two),
            ("spoken", spoken),
            ("token", token.as_str()),
        ];
        carol.post(&approve, &fields).await
    };
    // Wrong words, swapped words, none, and no confirmation. Each error is tied to its field.
    for (one, two, spoken, field) in [
        ("abacus", "abacus", "yes", "#word-1"),
        (&*words[1], &*words[0], "yes", "#word-1"),
        ("", &*words[1], "yes", "#word-1"),
        (&*words[0], &"x".repeat(33), "yes", "#word-1"),
        (&*words[0], &*words[1], "", "#spoken"),
    ] {
        let answer = post(one, two, spoken).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{one} {two}");
        assert!(answer.html.contains("<title>Error: "), "{}", answer.html);
        assert!(
            answer.html.contains(&format!("href=\"{field}\"")),
            "{}",
            answer.html
        );
        assert!(
            answer.html.contains("aria-invalid=\"true\""),
            "{}",
            answer.html
        );
    }
    let upper = format!(" {} ", words[0].to_uppercase());
    let answer = post(&upper, &words[1], "yes").await;
    assert_eq!(answer.status, StatusCode::SEE_OTHER, "{}", answer.html);
    assert_eq!(answer.location(), path_of(&asked));
    let shown = carol.get(&path_of(&asked)).await.html;
    assert!(
        shown.contains("<b>approved</b>") && shown.contains(CAROL),
        "{shown}"
    );
    assert!(
        shown.contains("Withdraw the approval") && !shown.contains("word-1"),
        "{shown}"
    );
    // The new device fetches the answer, and the member sees who decided.
    let request = &ada.requests().await[0];
    assert_eq!(request.decided_by, format!("token:vault:{CAROL}"));
    let answer = ada
        .fetches(&asked, crate::devices::member::CODE)
        .await
        .unwrap();
    assert_eq!(answer.state(), AccessRequestState::Approved);
    assert!(!answer.encrypted_user_key.is_empty());
    // Again, and later: a decision does not change.
    let again = post(&words[0], &words[1], "yes").await;
    assert_eq!(again.status, StatusCode::CONFLICT, "{}", again.html);
    let decisions = carol.get("/decisions").await.html;
    assert!(decisions.contains(&path_of(&asked)) && decisions.contains("approved"));
    let entries = site.entries("access_request.approve_for_member");
    let outcome = entries
        .iter()
        .find(|entry| entry["kind"] == "outcome" && entry["outcome"] == "ok");
    let outcome = outcome.unwrap();
    assert_eq!(
        outcome["principal"],
        format!("token:vault:{CAROL}").as_str()
    );
    assert_eq!(outcome["asked_by"], format!("token:vault:{ADA}").as_str());
    assert!(outcome["peer"].as_str().unwrap().starts_with("127.0.0.1:"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_approver_denies_and_withdraws() {
    let site = ConsoleSite::open();
    let (ada, _) = site.ada().await;
    let [first, second, third] = [
        site.request(&ada, 2).await,
        site.request(&ada, 3).await,
        site.request(&ada, 4).await,
    ];
    let carol = Visitor::signed_in(&site, "carol").await;
    let dave = Visitor::signed_in(&site, "dave").await;
    let deny = format!("{}/deny", path_of(&first));
    let html = carol.get(&deny).await.html;
    assert!(html.contains("Deny this request?"), "{html}");
    let pending = ada.requests().await;
    assert!(
        pending
            .iter()
            .all(|one| one.state() == AccessRequestState::Pending)
    );
    // Both look at the request, and both deny it: the second learns that it is decided.
    let [of_carol, of_dave] = [
        token_of(&html, &deny),
        token_of(&dave.get(&deny).await.html, &deny),
    ];
    let answer = carol.post(&deny, &[("token", &of_carol)]).await;
    assert_eq!(answer.status, StatusCode::SEE_OTHER, "{}", answer.html);
    let late = dave.post(&deny, &[("token", &of_dave)]).await;
    assert_eq!(late.status, StatusCode::CONFLICT, "{}", late.html);
    assert!(
        late.html.contains("The request for access is denied"),
        "{}",
        late.html
    );
    let shown = dave.get(&path_of(&first)).await.html;
    assert!(
        shown.contains("<b>denied</b>") && shown.contains(CAROL),
        "{shown}"
    );
    assert!(dave.get(&deny).await.html.contains("can no longer change"));

    // An approval can be withdrawn, also after the device confirmed the answer.
    for (asked, is_consumed) in [(&second, false), (&third, true)] {
        let path = path_of(asked);
        let (html, token) = carol.form(asked).await;
        let words = heard(&html, asked);
        let fields = approval(&words, &token);
        let approved = carol.post(&format!("{path}/approve"), &fields).await;
        assert_eq!(approved.status, StatusCode::SEE_OTHER, "{}", approved.html);
        if is_consumed {
            ada.fetches(asked, crate::devices::member::CODE)
                .await
                .unwrap();
            ada.confirms(asked).await.unwrap();
            let shown = dave.get(&path).await.html;
            assert!(shown.contains("Withdraw the approval"), "{shown}");
            assert!(!shown.contains("<dt>Expires</dt>"), "{shown}");
        }
        let deny = format!("{path}/deny");
        let html = dave.get(&deny).await.html;
        assert!(html.contains("Withdraw this approval?"), "{html}");
        let answer = dave
            .post(&deny, &[("token", &token_of(&html, &deny))])
            .await;
        assert_eq!(answer.status, StatusCode::SEE_OTHER, "{}", answer.html);
        let shown = dave.get(&path).await.html;
        assert!(shown.contains("<b>revoked</b>"), "{shown}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_approvers_can_be_needed() {
    let site = ConsoleSite::open_with(&Wanted {
        devices: "approvers_needed = 2",
        ..Wanted::default()
    });
    let (ada, _) = site.ada().await;
    let asked = site.request(&ada, 2).await;
    let approve = format!("{}/approve", path_of(&asked));
    let approves = async |visitor: &Visitor| {
        let (html, token) = visitor.form(&asked).await;
        let words = heard(&html, &asked);
        let fields = approval(&words, &token);
        visitor.post(&approve, &fields).await
    };
    let carol = Visitor::signed_in(&site, "carol").await;
    assert_eq!(approves(&carol).await.status, StatusCode::SEE_OTHER);
    let shown = carol.get(&path_of(&asked)).await.html;
    assert!(
        shown.contains("A second approver must approve") && !shown.contains("word-1"),
        "{shown}"
    );
    let dave = Visitor::signed_in(&site, "dave").await;
    assert!(dave.get(&path_of(&asked)).await.html.contains(CAROL));
    assert_eq!(approves(&dave).await.status, StatusCode::SEE_OTHER);
    let shown = dave.get(&path_of(&asked)).await.html;
    assert!(
        shown.contains("<b>approved</b>") && shown.contains(DAVE),
        "{shown}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_approver_sees_only_the_covered_members() {
    let site = ConsoleSite::open();
    let (ada, _) = site.ada().await;
    let asked = site.request(&ada, 2).await;
    let for_device = ada
        .asks(&App::new(3), AccessApprover::Device)
        .await
        .unwrap();
    let erin = Visitor::signed_in(&site, "erin").await;
    assert!(erin.get("/").await.html.contains("No request is pending"));
    for path in [path_of(&asked), format!("{}/deny", path_of(&asked))] {
        assert_eq!(
            erin.get(&path).await.status,
            StatusCode::NOT_FOUND,
            "{path}"
        );
    }
    let listed = erin.get(&format!("/devices?user={ADA}")).await;
    assert_eq!(listed.status, StatusCode::FORBIDDEN, "{}", listed.html);
    assert!(
        erin.get("/decisions")
            .await
            .html
            .contains("There are no decisions")
    );
    // A request for another device of the member can only be denied.
    let carol = Visitor::signed_in(&site, "carol").await;
    let html = carol.get(&path_of(&for_device)).await.html;
    assert!(
        html.contains("can only deny it") && !html.contains("word-1"),
        "{html}"
    );
}

#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::too_many_lines, reason = "one story")]
async fn the_trust_of_a_device_ends_on_the_page() {
    let site = ConsoleSite::open();
    let (ada, first) = site.ada().await;
    ada.trusts(&App::new(2), &first).await.unwrap();
    let carol = Visitor::signed_in(&site, "carol").await;
    assert!(carol.get("/devices").await.html.contains("name=\"user\""));
    let list = format!("/devices?user={ADA}");
    let html = carol.get(&list).await.html;
    assert!(
        html.contains("device 1") && html.contains("device 2"),
        "{html}"
    );
    let end = "/devices/end-trust";
    let id = hex::encode(&first.id);
    let confirm = carol
        .get(&format!("{end}?user={ADA}&device={id}"))
        .await
        .html;
    assert!(
        confirm.contains("End the trust of this device?") && confirm.contains("device 1"),
        "{confirm}"
    );
    let token = token_of(&confirm, end);
    let post = async |device: &str, cause: &str, token: &str| {
        let fields = [
            ("user", ADA),
            ("device", device),
            ("cause", cause),
            ("token", token),
        ];
        carol.post(end, &fields).await
    };
    let without = post(&id, "", &token).await;
    assert_eq!(without.status, StatusCode::BAD_REQUEST);
    assert!(
        without.html.contains("Choose why the trust ends"),
        "{}",
        without.html
    );
    // The token is of this device alone.
    assert_eq!(
        post("all", "lost", &token).await.status,
        StatusCode::FORBIDDEN
    );
    let ended = post(&id, "lost", &token).await;
    assert_eq!(
        (ended.status, ended.location()),
        (StatusCode::SEE_OTHER, list.as_str())
    );
    let states: Vec<_> = ada
        .devices()
        .await
        .iter()
        .map(proto::Device::state)
        .collect();
    assert_eq!(states, [DeviceState::Lost, DeviceState::Trusted]);
    let again = post(&id, "lost", &token).await;
    assert_eq!(again.status, StatusCode::CONFLICT, "{}", again.html);

    let confirm = carol
        .get(&format!("{end}?user={ADA}&device=all"))
        .await
        .html;
    assert!(confirm.contains("all devices"), "{confirm}");
    let ended = post("all", "untrusted", &token_of(&confirm, end)).await;
    assert_eq!(ended.status, StatusCode::SEE_OTHER, "{}", ended.html);
    assert_eq!(ada.devices().await[1].state(), DeviceState::Untrusted);
    for path in [
        "/devices?user=%00".to_owned(),
        format!("{end}?user={ADA}&device=x"),
        format!("{end}?user={ADA}"),
        end.to_owned(),
    ] {
        assert_eq!(
            carol.get(&path).await.status,
            StatusCode::BAD_REQUEST,
            "{path}"
        );
    }
    let unknown = carol
        .get(&format!("{end}?user={ADA}&device={}", "0".repeat(32)))
        .await;
    assert_eq!(unknown.status, StatusCode::NOT_FOUND);
}

/// A member chooses the name and the type of a device, and an attacker who is signed in as a member does, too.
pub(super) const HOSTILE: [&str; 4] = [
    "<script>document.title='owned'</script>",
    "\"><img src=x onerror=alert(1)>",
    "' autofocus onfocus='alert(1)",
    "</td></table><form action=/sign-out method=post><button>",
];

#[tokio::test(flavor = "multi_thread")]
async fn names_of_devices_are_text() {
    let site = ConsoleSite::open();
    let (ada, first) = site.ada().await;
    let carol = Visitor::signed_in(&site, "carol").await;
    for (number, name) in (2..).zip(HOSTILE) {
        let mut app = App::new(number);
        app.name = name.to_owned();
        let mut wanted = app.wants(AccessApprover::Administrator);
        wanted.device_type = name.to_owned();
        let made = ada.create_access_request(wanted).await.unwrap();
        let path = path_of(&made.access_request.unwrap());
        ada.trusts(&app, &first).await.unwrap();
        let id = hex::encode(&app.id);
        for path in [
            "/".to_owned(),
            path.clone(),
            format!("{path}/deny"),
            format!("/devices?user={ADA}"),
            format!("/devices/end-trust?user={ADA}&device={id}"),
        ] {
            let html = carol.get(&path).await.html;
            assert!(!html.contains(name), "{path}: {html}");
            assert!(
                !html.contains("<img") && !html.contains("<script>"),
                "{path}: {html}"
            );
        }
    }
    // The text of an address is text, too.
    for text in HOSTILE {
        let encoded = percent(text);
        let html = carol.get(&format!("/devices?user={encoded}")).await.html;
        assert!(!html.contains(text), "{html}");
    }
}
