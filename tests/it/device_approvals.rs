//! `keybroker bitwarden approvals` with the real binary, a real token, and a Bitwarden server that is sometimes hostile.

mod desk;
mod hostile;
mod import;
mod service;
mod tokens;

use std::sync::Arc;

use serde_json::Value;

use self::desk::{Desk, Device};
use crate::{bitwarden::at, site::Site};

use desk::ORGANIZATION;

/// Pins the key of a member of an organisation in the database of a site.
pub(crate) fn pin(site: &Arc<Site>) {
    let desk = Desk::on(Arc::clone(site));
    let (ada, _) = desk.member("ada@example.org");
    desk.request(&ada, &Device::new());
    desk.ok(&["list"]);
}

#[test]
fn an_approved_device_gets_the_user_key_and_nothing_else_does() {
    let desk = Desk::new();
    let (ada, user_key) = desk.member("ada@example.org");
    let device = Device::new();
    let request = desk.request(&ada, &device);
    let listed = desk.ok(&["list"]);
    let row = &listed[0];
    assert_eq!(row["request"], request.as_str());
    assert_eq!(row["email"], "ada@example.org");
    assert_eq!(row["key_state"], "first-seen");
    assert_eq!(row["problem"], Value::Null);
    let phrase = row["phrase"].as_str().unwrap();
    assert_eq!(phrase, device.phrase("ada@example.org"));
    // The second look finds the pin of the first.
    assert_eq!(desk.ok(&["list"])[0]["key_state"], "known");

    let wrong = desk.run(&["approve", &request, "--phrase", "zoom-zoom-zoom-zoom-zoom"]);
    assert_eq!(wrong.code, Some(12), "{wrong:#?}");
    assert!(
        wrong.stderr.contains("no request was approved"),
        "{wrong:#?}"
    );
    let silent = desk.run(&["approve", &request]);
    assert_eq!(silent.code, Some(2), "{silent:#?}");
    assert_eq!(desk.server.decisions(), []);

    let spoken = phrase.replace('-', " ").to_uppercase();
    let approved = desk.ok(&["approve", &request, "--phrase", &spoken]);
    assert_eq!(approved[0]["result"], "approved");
    let decisions = desk.server.decisions();
    assert_eq!(decisions.len(), 1);
    assert!(!decisions[0].is_bulk);
    assert_eq!(device.open(&decisions[0]), user_key);
    assert_eq!(desk.ok(&["list"]), Value::Array(Vec::new()));
    let twice = desk.run(&["approve", &request, "--yes"]);
    assert_eq!(twice.code, Some(10), "{twice:#?}");
    assert!(twice.stderr.contains("is not pending"), "{twice:#?}");

    let entries = desk.entries("bitwarden.approve_device");
    let kinds: Vec<_> = entries
        .iter()
        .map(|one| (one["kind"].clone(), one["outcome"].clone()))
        .collect();
    assert_eq!(
        kinds,
        [
            ("intent".into(), "ok".into()),
            ("outcome".into(), "ok".into())
        ]
    );
    for entry in &entries {
        assert_eq!(entry["bitwarden_organization"], ORGANIZATION);
        assert_eq!(entry["bitwarden_member"], ada.user.as_str());
        assert_eq!(entry["bitwarden_request"], request.as_str());
        assert_eq!(entry["bitwarden_device"], desk::DEVICE);
        assert_eq!(entry["bitwarden_public_key"], device.fingerprint());
        assert_eq!(entry["digest"], row["key_sha256"]);
        assert!(
            entry["principal"]
                .as_str()
                .unwrap()
                .starts_with("local-uid:")
        );
    }
    desk.assert_no_key(&user_key);
}

#[test]
fn several_requests_are_approved_in_one_call() {
    let desk = Desk::new();
    let mut expected = Vec::new();
    for name in ["ada", "bob", "eve"] {
        let (member, user_key) = desk.member(&format!("{name}@example.org"));
        let device = Device::new();
        expected.push((desk.request(&member, &device), device, user_key));
    }
    let without = desk.server.add_member("not-enrolled@example.org", None);
    let of_stranger = desk.request(&without, &Device::new());
    let mut arguments = vec!["approve", "--yes", &of_stranger];
    arguments.extend(expected.iter().map(|(request, ..)| &**request));
    let finished = desk.run(&arguments);
    // One request cannot be approved, and this does not prevent the others.
    assert_eq!(finished.code, Some(10), "{finished:#?}");
    assert!(
        finished
            .stderr
            .contains("1 of 4 requests were not approved"),
        "{finished:#?}"
    );
    assert!(
        finished.stdout.contains("not enrolled in account recovery"),
        "{finished:#?}"
    );
    let decisions = desk.server.decisions();
    assert_eq!(decisions.len(), 3);
    for (request, device, user_key) in &expected {
        let mut of_request = decisions.iter().filter(|one| one.request == *request);
        let decision = of_request.next().unwrap();
        assert!(decision.is_bulk);
        assert_eq!(device.open(decision), *user_key);
    }
    assert_eq!(desk.entries("bitwarden.approve_device").len(), 6);
    assert_eq!(desk.ok(&["list"]).as_array().unwrap().len(), 1);
}

#[test]
fn a_denied_request_needs_no_token() {
    let desk = Desk::new();
    let (ada, _) = desk.member("ada@example.org");
    let requests = [
        desk.request(&ada, &Device::new()),
        desk.request(&ada, &Device::new()),
    ];
    desk.without_pin();
    let denied = desk.ok(&["deny", &requests[0], &requests[1], &requests[1]]);
    assert_eq!(denied.as_array().unwrap().len(), 2);
    let decisions = desk.server.decisions();
    assert!(decisions.iter().all(|one| one.key.is_none()) && decisions.len() == 2);
    let entries = desk.entries("bitwarden.deny_device");
    assert_eq!(entries.len(), 4);
    assert_eq!(entries[0]["bitwarden_member"], ada.user.as_str());
    let again = desk.run(&["deny", &requests[0]]);
    assert_eq!(again.code, Some(10), "{again:#?}");
}

#[test]
fn an_expired_request_and_a_removed_member_get_nothing() {
    let desk = Desk::new();
    let (ada, _) = desk.member("ada@example.org");
    let (bob, _) = desk.member("bob@example.org");
    let old = desk.request(&ada, &Device::new());
    desk.server
        .edit(&old, |request| request.created = at(-8 * 24 * 3_600));
    let of_removed = desk.request(&bob, &Device::new());
    desk.server.remove_member(&bob);
    for (request, words) in [(&old, "has expired"), (&of_removed, "no longer a member")] {
        let finished = desk.run(&["approve", request, "--yes"]);
        assert_eq!(finished.code, Some(10), "{finished:#?}");
        assert!(finished.stdout.contains(words), "{finished:#?}");
    }
    assert_eq!(desk.server.decisions(), []);
    assert_eq!(desk.entries("bitwarden.approve_device").len(), 0);
}

/// Another administrator decides between the list and the approval.
#[test]
fn a_decision_of_another_administrator_is_reported() {
    let desk = Desk::new();
    let (ada, _) = desk.member("ada@example.org");
    let request = desk.request(&ada, &Device::new());
    let path = format!("{}/{request}", desk.server.requests_path());
    desk.answer(
        &path,
        400,
        r#"{"message": "The request was already answered.", "object": "error"}"#,
    );
    let late = desk.run(&["approve", &request, "--yes"]);
    assert_eq!(late.code, Some(10), "{late:#?}");
    assert!(
        late.stderr.contains("The request was already answered."),
        "{late:#?}"
    );
    let entries = desk.entries("bitwarden.approve_device");
    assert_eq!(entries[1]["outcome"], "failed");
    // After an error of the server, it is unknown whether the server accepted the approval.
    desk.answer(&path, 502, "<html>bad gateway</html>");
    let lost = desk.run(&["approve", &request, "--yes"]);
    assert_eq!(lost.code, Some(10), "{lost:#?}");
    let entries = desk.entries("bitwarden.approve_device");
    assert_eq!(
        entries
            .iter()
            .filter(|one| one["outcome"] == "unknown")
            .count(),
        1
    );
}

#[test]
fn mistakes_in_arguments_are_named() {
    let desk = Desk::new();
    let one = "00000000-0000-4000-8000-000000000001";
    let two = "00000000-0000-4000-8000-000000000002";
    for (arguments, words) in [
        (&["approve", "x", "--yes"][..], "is not a GUID"),
        (&["approve", one, two, "--phrase", "a"], "for one request"),
        (&["deny", one, "--organization", "x"], "is not a GUID"),
        (
            &["deny", one, "--organization", two],
            "no [[bitwarden_organization]] has the id",
        ),
    ] {
        let finished = desk.run(arguments);
        assert_eq!(finished.code, Some(2), "{arguments:?}: {finished:#?}");
        assert!(
            finished.stderr.contains(words),
            "{arguments:?}: {finished:#?}"
        );
    }
    assert_eq!(desk.server.calls(), Vec::<String>::new());
}
