//! The call rate of persons who sign in to the page.

use reqwest::StatusCode;

use crate::tokens::start_on;

use super::site::{ConsoleSite, Visitor};

/// Sign-ins until the limit is reached, with a margin for a machine on which the sign-ins take long.
const SIGN_INS_MAX: usize = 20;

/// Each refusal has a durable audit entry, and a person without the role has no session whose requests are counted.
#[tokio::test(flavor = "multi_thread")]
async fn sign_ins_without_the_role_are_limited_for_each_person() {
    let mut site = ConsoleSite::open();
    let (installation, _) = site.broker.stop();
    installation.edit_configuration(|text| {
        let before = "user_calls_per_minute = 100000";
        assert!(text.contains(before), "{text}");
        *text = text.replacen(before, "user_calls_per_minute = 3", 1);
    });
    site.broker = start_on(installation);
    let ada = Visitor::new(&site);
    let mut forbidden = 0;
    let mut limited = None;
    for _ in 0..SIGN_INS_MAX {
        let answer = ada.sign_in("/sign-in", "ada").await;
        if answer.status != StatusCode::FORBIDDEN {
            limited = Some(answer);
            break;
        }
        forbidden += 1;
    }
    let limited = limited.unwrap();
    assert_eq!(
        limited.status,
        StatusCode::TOO_MANY_REQUESTS,
        "{}",
        limited.html
    );
    assert!(limited.headers.contains_key("retry-after"));
    // A sign-in beyond the limit leaves no separate entry.
    let refusals = site.entries("access_request.list");
    assert_eq!(refusals.len(), forbidden, "{refusals:?}");
    // An approver at the same address is not affected.
    Visitor::signed_in(&site, "carol").await;
}
