//! One request, one member and a slow server do not hold up the others, and the service says each thing once.

use std::fs;

use base64ct::{Base64, Encoding as _};
use serde_json::json;

use super::{Desk, Device, Running, configure, desk, log};
use crate::{
    bitwarden::{Answer, Member},
    faulty_token::put_before,
    process::{WAIT_MAX, until, until_within},
    softhsm::write_private,
};

pub(super) const PERMIT: &str = "permit (principal, action, resource);";
/// The sum overflows.
const BROKEN: &str = r#"
    @id("broken")
    permit (principal, action, resource)
    when { context.email == "ada@example.org" && context.pendingOfMember + 9223372036854775807 > 0 };
    @id("eve")
    permit (principal, action, resource) when { context.email == "eve@example.org" };
"#;

/// A member who has enrolled with other bytes in place of a wrapped key.
fn member_with_a_damaged_key(desk: &Desk) -> Member {
    let damaged = format!("4.{}", Base64::encode_string(&[0x11; 256]));
    desk.server.add_member("eve@example.org", Some(&damaged))
}

/// Replaces the policy at one moment.
fn replace_policy(desk: &Desk, text: &str) {
    let [next, policy] =
        ["next.cedar", "approvals.cedar"].map(|name| desk.site.folder().join(name));
    write_private(&next, text);
    fs::rename(next, policy).unwrap();
}

/// The lines that contain these words.
pub(super) fn lines<'a>(text: &'a str, words: &str) -> Vec<&'a str> {
    text.lines().filter(|line| line.contains(words)).collect()
}

pub(super) fn looks(desk: &Desk) -> usize {
    let call = format!("GET {}", desk.server.requests_path());
    let calls = desk.server.calls();
    calls.iter().filter(|one| **one == call).count()
}

/// Waits until the service has begun this number of looks.
pub(super) fn wait_for_looks(desk: &Desk, count: usize) {
    let has_begun = || (looks(desk) >= count).then_some(());
    until_within(4 * WAIT_MAX, "looks", has_begun);
}

/// The server holds its answer with the details of a member. Returns when the service waits for it.
fn start_and_wait_for_details(desk: &Desk, member: &Member) -> Running {
    let path = desk.server.details_path(member);
    let held = Answer {
        body: json!({"resetPasswordKey": member.key}).to_string(),
        is_held: true,
        ..Answer::default()
    };
    desk.server.answer(&path, Some(held));
    let service = Running::start(desk);
    let call = format!("GET {path}");
    let has_begun = || desk.server.calls().contains(&call).then_some(());
    until_within(4 * WAIT_MAX, "the call for the details", has_begun);
    service
}

#[test]
fn a_request_that_always_fails_takes_no_slot() {
    let desk = desk("", PERMIT);
    let failing = desk.request(&member_with_a_damaged_key(&desk), &Device::new());
    // As often as there are slots, and once more.
    for _ in 0..3 {
        let finished = desk.run(&["run", "--once"]);
        assert_eq!(finished.code, Some(0), "{finished:#?}");
        let said = lines(&finished.stderr, &failing);
        assert!(
            said.len() == 1 && said[0].contains("cannot be unwrapped"),
            "{finished:#?}"
        );
    }
    let (ada, user_key) = desk.member("ada@example.org");
    let device = Device::new();
    desk.request(&ada, &device);
    let finished = desk.run(&["run", "--once"]);
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    assert_eq!(device.open(&desk.server.decisions()[0]), user_key);
}

#[test]
fn an_answer_about_one_member_does_not_hold_up_the_others() {
    let desk = desk("", PERMIT);
    let [ada, bob, eve] =
        ["ada", "bob", "eve"].map(|name| desk.member(&format!("{name}@example.org")).0);
    let [of_ada, of_bob, of_eve] =
        [&ada, &bob, &eve].map(|member| desk.request(member, &Device::new()));
    let details = desk.server.details_path(&ada);
    desk.answer(&details, 500, "");
    let approval = format!("{}/{of_bob}", desk.server.requests_path());
    desk.answer(&approval, 400, r#"{"message": "not this one"}"#);
    let finished = desk.run(&["run", "--once"]);
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    for (request, words) in [
        (&of_ada, "500"),
        (&of_bob, "not this one"),
        (&of_eve, "approved"),
    ] {
        let said = lines(&finished.stderr, request);
        assert!(
            said.len() == 1 && said[0].contains(words),
            "{words}: {finished:#?}"
        );
    }
    let decisions = desk.server.decisions();
    assert_eq!(decisions.len(), 1);
    assert_eq!(decisions[0].request, of_eve);
    let entries = desk.entries("bitwarden.approve_device");
    let failed = entries.iter().filter(|entry| entry["outcome"] == "failed");
    assert_eq!(failed.count(), 1);
    // A person sees the reason, too.
    assert!(
        desk.ok(&["list"])[0]["problem"]
            .as_str()
            .unwrap()
            .contains("500")
    );
    // A member could store a long text.
    desk.answer(&details, 200, &"x".repeat(100_000));
    let finished = desk.run(&["run", "--once"]);
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    assert!(finished.stderr.contains("longer than"), "{finished:#?}");
    // The rate of calls and the credential concern all requests.
    for status in [401, 429] {
        desk.answer(&details, status, "");
        let finished = desk.run(&["run", "--once"]);
        assert_eq!(finished.code, Some(10), "{finished:#?}");
        assert!(
            finished.stderr.contains(&status.to_string()),
            "{finished:#?}"
        );
    }
}

#[test]
fn a_signal_ends_a_look_before_the_next_decision() {
    let desk = desk("", PERMIT);
    let (ada, _) = desk.member("ada@example.org");
    let (bob, _) = desk.member("bob@example.org");
    desk.request(&ada, &Device::new());
    desk.request(&bob, &Device::new());
    let service = start_and_wait_for_details(&desk, &ada);
    service.signal();
    desk.server.release(&desk.server.details_path(&ada));
    assert_eq!(service.end(), Some(0));
    assert_eq!(desk.server.decisions(), []);
    let runs = desk.entries("bitwarden.approvals_run");
    assert_eq!(runs.last().unwrap()["outcome"], "ok");
}

#[test]
fn a_policy_that_changes_during_a_look_applies_at_once() {
    let desk = desk("", PERMIT);
    let (ada, _) = desk.member("ada@example.org");
    let request = desk.request(&ada, &Device::new());
    let service = start_and_wait_for_details(&desk, &ada);
    replace_policy(
        &desk,
        "@id(\"stop\") forbid (principal, action, resource);\n@id(\"rest\") permit (principal, action, resource);",
    );
    desk.server.release(&desk.server.details_path(&ada));
    until("the reason", || {
        let text = log(&desk);
        let said = lines(&text, &request);
        (said.len() == 1 && said[0].contains("policy stop forbids")).then_some(())
    });
    assert_eq!(service.terminate(), Some(0));
    assert_eq!(desk.server.decisions(), []);
}

#[test]
fn a_command_names_the_service_if_an_embedded_database_is_in_use() {
    let desk = desk("", PERMIT);
    let (ada, _) = desk.member("ada@example.org");
    desk.request(&ada, &Device::new());
    let service = start_and_wait_for_details(&desk, &ada);
    let listed = desk.run(&["list"]);
    assert_eq!(listed.code, Some(9), "{listed:#?}");
    assert!(
        listed.stderr.contains("`bitwarden approvals run`"),
        "{listed:#?}"
    );
    desk.server.release(&desk.server.details_path(&ada));
    assert_eq!(service.terminate(), Some(0));
}

/// A line in each look would fill the disk, and so would a request that is tried in each look.
#[test]
fn the_service_says_and_tries_each_thing_once() {
    let desk = desk("", PERMIT);
    let faulty = put_before(&desk.site);
    configure(&desk, "", BROKEN);
    let failing = desk.request(&member_with_a_damaged_key(&desk), &Device::new());
    let (ada, _) = desk.member("ada@example.org");
    let waiting = desk.request(&ada, &Device::new());
    let unreadable = desk.request(&ada, &Device::new());
    desk.server.edit(&unreadable, |one| one.id = "x".to_owned());
    let service = Running::start(&desk);
    wait_for_looks(&desk, 2);
    let tried = faulty.count("C_UnwrapKey begins");
    assert_ne!(tried, 0);
    wait_for_looks(&desk, 4);
    assert_eq!(faulty.count("C_UnwrapKey begins"), tried);
    let text = log(&desk);
    for (about, words) in [
        (&*failing, "cannot be unwrapped"),
        (&*waiting, "error in policy broken"),
        ("without a readable id", "id: 1;"),
    ] {
        let said = lines(&text, about);
        assert!(
            said.len() == 1 && said[0].contains(words),
            "{about}: {text}"
        );
    }

    replace_policy(&desk, "permit");
    let warning = "every request waits for a person";
    let has_warned = || (!lines(&log(&desk), warning).is_empty()).then_some(());
    until_within(4 * WAIT_MAX, "the warning", has_warned);
    wait_for_looks(&desk, looks(&desk) + 2);
    let text = log(&desk);
    assert_eq!(lines(&text, warning).len(), 1, "{text}");
    assert_eq!(service.terminate(), Some(0));
}

/// The token itself is the cause, and not the request: the token shows an unwrapped key with an attribute that it must not have.
#[test]
fn the_service_ends_if_the_token_does_not_protect_an_unwrapped_key() {
    let desk = desk("", PERMIT);
    let faulty = put_before(&desk.site);
    configure(&desk, "", PERMIT);
    let mut service = Running::start(&desk);
    wait_for_looks(&desk, 1);
    faulty.behave(
        "[[attribute]]\nparts = [\"secret\"]\nname = \"CKA_EXTRACTABLE\"\non_read.value = false\n",
    );
    let (ada, _) = desk.member("ada@example.org");
    desk.request(&ada, &Device::new());
    let ended = until_within(4 * WAIT_MAX, "the end of the service", || {
        service.0.try_wait().unwrap()
    });
    let text = log(&desk);
    assert_eq!(ended.code(), Some(6), "{text}");
    assert!(text.contains("is not protected"), "{text}");
    assert_eq!(desk.server.decisions(), []);
}
