//! The page in headless Chromium: sign-in, approve, deny, expiry, two approvers at once, text of attackers, without a mouse, and
//! without scripts.

use keybroker_proto::{self as proto, AccessApprover, AccessRequestState};

use crate::devices::member::{App, Member};

use super::{
    browser::{Browser, SPACE, Scripts, TAB, is_installed},
    pages::HOSTILE,
    site::{ConsoleSite, path_of},
};

/// The hidden words, as the member reads them to the approver.
async fn words(browser: &Browser, asked: &proto::AccessRequest) -> [String; 2] {
    let mut words = Vec::new();
    for place in ["word-1", "word-2"] {
        let label = browser.text(&format!("label[for=\"{place}\"]")).await;
        let number: usize = label.split(' ').nth(1).unwrap().parse().unwrap();
        words.push(asked.phrase[number - 1].clone());
    }
    words.try_into().unwrap()
}

async fn approve(browser: &Browser, asked: &proto::AccessRequest) {
    browser.go(&path_of(asked)).await;
    let [one, two] = words(browser, asked).await;
    browser.enter("#word-1", &one).await;
    browser.enter("#word-2", &two).await;
    browser.click("#spoken").await;
    browser.follow("#approve").await;
}

async fn state(ada: &Member, asked: &proto::AccessRequest) -> AccessRequestState {
    let requests = ada.requests().await;
    requests
        .iter()
        .find(|one| one.id == asked.id)
        .unwrap()
        .state()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_approver_decides_in_the_browser() {
    if !is_installed() {
        return;
    }
    let site = ConsoleSite::open();
    let (ada, _) = site.ada().await;
    let [first, second] = [site.request(&ada, 2).await, site.request(&ada, 3).await];
    let browser = Browser::signed_in(&site, "carol").await;
    assert_eq!(browser.title().await, "Requests - Keybroker");
    // The script says how much time is left, and the cookies are out of its reach.
    let left = browser.text(".left").await;
    assert!(left.ends_with("days left)"), "{left}");
    assert_eq!(browser.script("return document.cookie").await, "");
    approve(&browser, &first).await;
    browser.arrives_at(&path_of(&first)).await;
    assert_eq!(browser.text("#state").await, "approved");
    assert_eq!(state(&ada, &first).await, AccessRequestState::Approved);

    browser.go(&path_of(&second)).await;
    // The browser itself requires the words and the confirmation, so it would send no form.
    let required = "const form = document.querySelector('#approve').form;
        return `${form.noValidate} ${form.querySelectorAll('input:invalid').length}`";
    assert_eq!(browser.script(required).await, "false 3");
    browser.enter("#word-1", "abacus").await;
    browser.enter("#word-2", "abacus").await;
    browser.click("#spoken").await;
    browser.follow("#approve").await;
    assert!(
        browser
            .text(".problem")
            .await
            .contains("not the hidden words")
    );
    assert!(browser.title().await.starts_with("Error: "));
    browser.follow("#deny").await;
    browser.follow("#confirm-denial").await;
    browser.arrives_at(&path_of(&second)).await;
    assert_eq!(browser.text("#state").await, "denied");
    assert_eq!(state(&ada, &second).await, AccessRequestState::Denied);

    browser.follow(".person button").await;
    assert_eq!(browser.text("h1").await, "You are signed out");
    browser.go(&path_of(&second)).await;
    assert!(browser.has("#sign-in").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_approvers_decide_at_the_same_moment() {
    if !is_installed() {
        return;
    }
    let site = ConsoleSite::open();
    let (ada, _) = site.ada().await;
    let asked = site.request(&ada, 2).await;
    let carol = Browser::signed_in(&site, "carol").await;
    let dave = Browser::signed_in(&site, "dave").await;
    let deny = format!("{}/deny", path_of(&asked));
    dave.go(&deny).await;
    tokio::join!(approve(&carol, &asked), dave.follow("#confirm-denial"));
    // The second approver is told. The denial of a pending request withdraws no approval.
    let state = state(&ada, &asked).await;
    let shown = [carol.text("h1").await, dave.text("h1").await];
    match state {
        AccessRequestState::Denied => assert_eq!(shown[0], "The action failed"),
        AccessRequestState::Approved => assert_eq!(shown[1], "The action failed"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expiry_is_seen_on_the_screen() {
    if !is_installed() {
        return;
    }
    let site = ConsoleSite::open();
    let (ada, _) = site.ada().await;
    let asked = site.request(&ada, 2).await;
    let browser = Browser::signed_in(&site, "carol").await;
    browser.go(&path_of(&asked)).await;
    assert!(browser.is_enabled("#approve").await);
    // The request expires in a week. The clock of the page is set to the moment after it.
    let script = "const week = 7 * 24 * 3600 * 1000 + 1000; const now = performance.now.bind(performance); \
                  performance.now = () => now() + week";
    browser.script(script).await;
    browser.waits_for("#approve:disabled").await;
    assert_eq!(browser.text(".over").await, "The request has expired.");
    assert_eq!(browser.text(".left").await, "(expired)");
}

#[tokio::test(flavor = "multi_thread")]
async fn names_of_devices_run_no_script() {
    if !is_installed() {
        return;
    }
    let site = ConsoleSite::open();
    let (ada, _) = site.ada().await;
    let browser = Browser::signed_in(&site, "carol").await;
    for (number, name) in (2..).zip(HOSTILE) {
        let mut app = App::new(number);
        app.name = name.to_owned();
        let asked = ada.asks(&app, AccessApprover::Administrator).await.unwrap();
        browser.go(&path_of(&asked)).await;
        assert!(browser.text("dl").await.contains(name), "{name}");
        assert!(!browser.has("img").await && browser.has("#approve").await);
        browser.go("/").await;
        assert!(browser.text("table").await.contains(name), "{name}");
        assert_eq!(browser.title().await, "Requests - Keybroker");
    }
    // Script that is injected nevertheless does not run: the policy of the page allows only its own file.
    let script = "const script = document.createElement('script'); script.textContent = 'document.title = 1'; \
                  document.body.append(script); document.body.setAttribute('onclick', 'document.title = 2'); \
                  document.body.click(); return document.title";
    assert_eq!(browser.script(script).await, "Requests - Keybroker");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_keyboard_is_enough() {
    if !is_installed() {
        return;
    }
    let site = ConsoleSite::open();
    let (ada, _) = site.ada().await;
    let asked = site.request(&ada, 2).await;
    let browser = Browser::open(&site).await;
    browser.go("/").await;
    browser.press(TAB).await;
    assert_eq!(browser.focus().await, "Skip to the content");
    browser.tab_to("sign-in").await;
    browser.press_enter().await;
    browser.enter("#username", "carol").await;
    browser.press_enter().await;
    browser.arrives_at("/").await;
    browser.tab_to(&ada.user).await;
    browser.press_enter().await;
    browser.arrives_at(&path_of(&asked)).await;
    let [one, two] = words(&browser, &asked).await;
    browser.tab_to("word-1").await;
    browser.press(&one).await;
    browser.tab_to("word-2").await;
    browser.press(&two).await;
    browser.tab_to("spoken").await;
    browser.press(SPACE).await;
    browser.tab_to("approve").await;
    browser.press_enter().await;
    browser.arrives_at(&path_of(&asked)).await;
    assert_eq!(browser.text("#state").await, "approved");
    // The withdrawal needs two steps, too.
    browser.tab_to("deny").await;
    browser.press_enter().await;
    browser
        .arrives_at(&format!("{}/deny", path_of(&asked)))
        .await;
    browser.tab_to("confirm-denial").await;
    browser.press_enter().await;
    browser.arrives_at(&path_of(&asked)).await;
    assert_eq!(browser.text("#state").await, "revoked");
}

#[tokio::test(flavor = "multi_thread")]
async fn scripts_are_not_needed() {
    if !is_installed() {
        return;
    }
    let site = ConsoleSite::open();
    let (ada, _) = site.ada().await;
    let [first, second] = [site.request(&ada, 2).await, site.request(&ada, 3).await];
    let browser = Browser::open_with(&site, Scripts::Disabled).await;
    browser.sign_in("carol").await;
    assert_eq!(browser.text(".left").await, "", "the script ran");
    assert!(browser.text("table").await.contains("UTC"));
    approve(&browser, &first).await;
    browser.arrives_at(&path_of(&first)).await;
    assert_eq!(state(&ada, &first).await, AccessRequestState::Approved);
    browser.go(&path_of(&second)).await;
    browser.follow("#deny").await;
    browser.follow("#confirm-denial").await;
    browser.arrives_at(&path_of(&second)).await;
    assert_eq!(state(&ada, &second).await, AccessRequestState::Denied);
}
