//! An approval is sent once, and server errors for several members end a look.

use super::{
    Desk, Device, Running, desk,
    fairness::{PERMIT, lines, looks, wait_for_looks},
    log,
};
use crate::process::{WAIT_MAX, until_within};

/// The path to which the approval of a request is sent.
fn approval(desk: &Desk, request: &str) -> String {
    format!("{}/{request}", desk.server.requests_path())
}

/// Number of approvals of a request that were sent.
fn sent(desk: &Desk, request: &str) -> usize {
    let call = format!("POST {}", approval(desk, request));
    let calls = desk.server.calls();
    calls.iter().filter(|one| **one == call).count()
}

/// A slot is not given back, so one request could use up the slots of all members.
#[test]
fn an_approval_is_sent_once_whatever_the_server_answers() {
    let desk = desk("", PERMIT);
    let [lost, listed] = ["ada", "bob"].map(|name| {
        let (member, _) = desk.member(&format!("{name}@example.org"));
        desk.request(&member, &Device::new())
    });
    desk.answer(&approval(&desk, &lost), 502, "");
    // The request stays in the list.
    desk.answer(&approval(&desk, &listed), 200, "");
    let service = Running::start(&desk);
    wait_for_looks(&desk, 5);
    let text = log(&desk);
    assert_eq!(sent(&desk, &lost), 1, "{text}");
    assert_eq!(sent(&desk, &listed), 1, "{text}");
    let said = lines(&text, &lost);
    assert!(
        said.len() == 1 && said[0].contains("its result is unknown"),
        "{text}"
    );
    let said = lines(&text, &listed);
    assert!(
        said.len() == 2 && said[0].contains(": approved") && said[1].contains("still lists"),
        "{text}"
    );
    assert_eq!(service.terminate(), Some(0));
}

/// A timer starts a process for each look.
#[test]
fn the_next_process_does_not_send_an_approval_again_within_an_hour() {
    let desk = desk("", PERMIT);
    let (ada, user_key) = desk.member("ada@example.org");
    let device = Device::new();
    let request = desk.request(&ada, &device);
    let path = approval(&desk, &request);
    desk.answer(&path, 502, "");
    let first = desk.run(&["run", "--once"]);
    assert_eq!(first.code, Some(10), "{first:#?}");
    let second = desk.run(&["run", "--once"]);
    assert_eq!(second.code, Some(0), "{second:#?}");
    let said = lines(&second.stderr, &request);
    assert!(
        said.len() == 1 && said[0].contains("within the last hour"),
        "{second:#?}"
    );
    assert_eq!(sent(&desk, &request), 1);
    let slots = "SELECT count(*) FROM bitwarden_member_keys WHERE member_id = zeroblob(16)";
    assert_eq!(desk.site.sql(slots).trim(), "1");
    assert_eq!(desk.site.run(&["store", "check"]).code, Some(0));
    // A person can still approve the request.
    desk.server.answer(&path, None);
    desk.ok(&["approve", &request, "--yes"]);
    assert_eq!(device.open(&desk.server.decisions()[0]), user_key);
}

#[test]
fn server_errors_for_three_members_end_a_look() {
    let desk = desk("", PERMIT);
    let members = ["ada", "bob", "eve", "joe"].map(|name| {
        let (member, _) = desk.member(&format!("{name}@example.org"));
        desk.request(&member, &Device::new());
        desk.answer(&desk.server.details_path(&member), 502, "");
        member
    });
    let finished = desk.run(&["run", "--once"]);
    assert_eq!(finished.code, Some(10), "{finished:#?}");
    assert!(finished.stderr.contains("502"), "{finished:#?}");
    let calls = desk.server.calls();
    let details = calls
        .iter()
        .filter(|call| call.ends_with("/reset-password-details"));
    assert_eq!(details.count(), 3, "{calls:#?}");
    // Several requests of one member do not end a look.
    let [of_one, others @ ..] = &members;
    for member in others {
        desk.server.answer(&desk.server.details_path(member), None);
    }
    for _ in 0..3 {
        desk.request(of_one, &Device::new());
    }
    let finished = desk.run(&["run", "--once"]);
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    // As many as `automatic_per_hour` permits.
    assert_eq!(desk.server.decisions().len(), 2);
}

#[test]
fn another_text_of_the_same_server_error_is_not_logged_again() {
    let desk = desk("", PERMIT);
    let (ada, _) = desk.member("ada@example.org");
    let request = desk.request(&ada, &Device::new());
    let details = desk.server.details_path(&ada);
    desk.answer(&details, 500, r#"{"message": "trace 1"}"#);
    let service = Running::start(&desk);
    wait_for_looks(&desk, 2);
    desk.answer(&details, 500, r#"{"message": "trace 2"}"#);
    wait_for_looks(&desk, looks(&desk) + 2);
    let text = log(&desk);
    let said = lines(&text, &request);
    assert!(said.len() == 1 && said[0].contains("trace 1"), "{text}");
    desk.answer(&details, 403, "");
    until_within(4 * WAIT_MAX, "the other reason", || {
        (lines(&log(&desk), &request).len() == 2).then_some(())
    });
    assert_eq!(service.terminate(), Some(0));
}
