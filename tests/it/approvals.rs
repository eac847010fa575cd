//! Changes that a second person must approve: destroyed keys and new administrators, with the real commands of two persons.

use std::{fmt::Write as _, sync::Arc};

use serde_json::Value;

use crate::{
    client::Caller,
    client_commands::calling,
    destruction::{destroyed, permit_now_in, rewrap},
    json::assert_as_promised,
    keys::{REFUSED, changed, key, text, with_two_keys},
    pki,
    process::Broker,
    site::{Finished, Options, Site, policy_section},
};

const USAGE: i32 = 2;
const CONFIGURATION: i32 = 3;
const DAMAGED: i32 = 12;
/// Administrators beside `admin`, who is Ada.
const BOB: &str = "admin-bob";
const CAROL: &str = "admin-carol";
/// Another certificate of Ada.
const ADA_TOO: &str = "admin-ada";
/// An administrator who belongs to no person.
const EVE: &str = "admin-eve";

fn persons(persons: &[(&str, &[&str])]) -> String {
    let mut text = "\n[approvals]\n".to_owned();
    for (name, certificates) in persons {
        let principals: Vec<String> = certificates
            .iter()
            .map(|certificate| format!("\"URI:{}\"", pki::uri(certificate)))
            .collect();
        let principals = principals.join(", ");
        write!(
            text,
            "[[approvals.person]]\nname = \"{name}\"\nprincipals = [{principals}]\n"
        )
        .unwrap();
    }
    text
}

fn three_persons() -> String {
    persons(&[
        ("Ada", &["admin", ADA_TOO]),
        ("Bob", &[BOB]),
        ("Carol", &[CAROL]),
    ])
}

/// Writes the configuration with four more administrators, permits that they may destroy keys at once, and these sections.
fn configure(site: &Site, sections: &str) {
    let policies = site.folder().join("policies");
    if !policies.exists() {
        permit_now_in(&policies);
    }
    for name in [BOB, CAROL, ADA_TOO, EVE] {
        if !site.pki.certificate_file(name).exists() {
            site.pki.issue_client_with(name, |_| {});
        }
    }
    site.write_configuration(|text| {
        for name in [BOB, CAROL, ADA_TOO, EVE] {
            let uri = pki::uri(name);
            write!(
                text,
                "\n[[principal]]\nsan = \"URI:{uri}\"\nroles = [\"admin\"]\n"
            )
            .unwrap();
        }
        text.push_str(&policy_section(&policies));
        text.push_str(sections);
    });
}

/// `keybroker … -o json` with the certificate of that name.
fn command(broker: &Broker, who: &str, arguments: &[&str]) -> Finished {
    let command = [&["-o", "json"], arguments].concat();
    Finished::from(calling(broker, &command, who, &[]).output().unwrap())
}

#[track_caller]
fn done(broker: &Broker, who: &str, arguments: &[&str]) -> Value {
    let finished = command(broker, who, arguments);
    assert_eq!(finished.code, Some(0), "{arguments:?}: {finished:#?}");
    serde_json::from_str(&finished.stdout).unwrap()
}

/// A command that the broker must refuse with this reason and these words. Returns the message.
#[track_caller]
fn refused(broker: &Broker, who: &str, arguments: &[&str], reason: &str, words: &[&str]) -> String {
    let finished = command(broker, who, arguments);
    assert_eq!(finished.code, Some(REFUSED), "{arguments:?}: {finished:#?}");
    let failure: Value = serde_json::from_str(&finished.stderr).unwrap();
    assert_eq!(failure["reason"], reason, "{finished:#?}");
    for word in words {
        assert!(finished.stderr.contains(word), "{word}: {finished:#?}");
    }
    finished.stderr
}

/// A change that waits for an approval. Returns the id of the request, which both commands in the hint name.
#[track_caller]
fn waits(broker: &Broker, who: &str, arguments: &[&str]) -> String {
    refused(broker, who, arguments, "APPROVAL_NEEDED", &[]);
    let finished = Finished::from(calling(broker, arguments, who, &[]).output().unwrap());
    let (error, hint) = finished.stderr.split_once("\nhint: ").unwrap();
    let (_, id) = hint.split_once("`keybroker approval approve ").unwrap();
    let (id, rest) = id.split_once('`').unwrap();
    assert!(error.contains(id) && error.contains("until 20"), "{error}");
    let again = format!("run the same command again: `keybroker {}", arguments[0]);
    assert!(rest.contains(&again), "{rest}");
    id.to_owned()
}

fn list(broker: &Broker, who: &str, more: &[&str]) -> Vec<Value> {
    let listed = done(broker, who, &[&["approval", "list"], more].concat());
    listed.as_array().unwrap().clone()
}

/// A broker with a deactivated key that no row needs, and a key in use.
async fn with_persons() -> (Broker, String) {
    let (site, [older, _]) = with_two_keys().await;
    configure(&site, &three_persons());
    let broker = Broker::start_on(site);
    changed(&broker, &["deactivate", &older]);
    rewrap(&broker);
    (broker, older)
}

/// Ada requests, Bob approves, Ada destroys: each step as the two persons do it.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_destroyed_by_two_persons() {
    let (broker, older) = with_persons().await;
    let now = ["key", "destroy", &older, "--yes", "--now", "irreversibly"];
    let id = waits(&broker, "admin", &now);
    // The same change of the same person is the same request.
    assert_eq!(waits(&broker, ADA_TOO, &now), id);
    let later = ["key", "destroy", &older, "--yes", "--after-days", "31"];
    let other = waits(&broker, "admin", &later);
    assert_ne!(other, id);

    let listed = list(&broker, BOB, &[]);
    assert_eq!(listed.len(), 2, "{listed:#?}");
    let request = listed.iter().find(|one| text(one, "id") == id).unwrap();
    assert_eq!(text(request, "state"), "pending");
    assert_eq!(text(request, "action"), "wrapping_key.destroy_now");
    assert_eq!(text(request, "requested_by"), "Ada");
    assert_eq!(request["change"]["wrapping_key"], older.as_str());
    assert_eq!(request["change"]["after_days"], 0);
    assert_eq!(request["verified"], true);
    assert_eq!(text(request, "digest").len(), 64);
    assert_eq!(list(&broker, "auditor", &[]).len(), 2);

    only_another_person_approves(&broker, &id);
    refused(&broker, "admin", &now, "APPROVAL_NEEDED", &[&id]);
    let approved = done(&broker, BOB, &["approval", "approve", &id, "--yes"]);
    assert_eq!(text(&approved, "state"), "approved");
    assert_eq!(text(&approved, "decided_by"), "Bob");
    let approve = ["approval", "approve", &id, "--yes"];
    for who in [CAROL, BOB] {
        refused(&broker, who, &approve, "APPROVAL_STATE", &["Bob approved"]);
    }
    // An approval of another change does not help, and a withdrawn approval does not either.
    refused(&broker, "admin", &later, "APPROVAL_NEEDED", &[&other]);
    done(&broker, BOB, &["approval", "approve", &other, "--yes"]);
    let withdrawn = done(&broker, CAROL, &["approval", "reject", &other]);
    assert_eq!(text(&withdrawn, "state"), "rejected");
    refused(
        &broker,
        "admin",
        &later,
        "APPROVAL_NEEDED",
        &["Carol rejected"],
    );
    done(&broker, "admin", &now);
    destroyed(&broker, &older);
    let all = list(&broker, "auditor", &["--all"]);
    let used = all.iter().find(|one| text(one, "id") == id).unwrap();
    assert_eq!(text(used, "state"), "used");
    let reject = ["approval", "reject", &id];
    refused(&broker, CAROL, &reject, "APPROVAL_STATE", &["Bob approved"]);
    both_names_are_in_the_audit_log(&broker, &id, &older);
    let (site, _) = broker.stop();
    site.expect_ok(&["store", "check"]);
    site.expect_ok(&["audit", "verify"]);
}

fn only_another_person_approves(broker: &Broker, id: &str) {
    let approve = ["approval", "approve", id, "--yes"];
    for who in ["admin", ADA_TOO] {
        refused(
            broker,
            who,
            &approve,
            "POLICY",
            &["another person", "Bob or Carol"],
        );
    }
    refused(broker, EVE, &approve, "POLICY", &["belongs to no"]);
    refused(broker, "auditor", &approve, "POLICY", &[]);
    // The digest and the id are read from the list, which a releaser may not read.
    refused(broker, "releaser", &["approval", "list"], "POLICY", &[]);
    let unasked = command(broker, BOB, &["approval", "approve", id]);
    assert_eq!(unasked.code, Some(USAGE), "{unasked:#?}");
    assert!(unasked.stderr.contains("--yes"), "{unasked:#?}");
    let unknown = "00".repeat(16);
    let none = command(broker, BOB, &["approval", "approve", &unknown, "--yes"]);
    assert_eq!(none.code, Some(REFUSED), "{none:#?}");
    let reject = ["approval", "reject", &unknown];
    refused(broker, BOB, &reject, "KEY_NOT_FOUND", &["no request"]);
}

fn both_names_are_in_the_audit_log(broker: &Broker, id: &str, older: &str) {
    let audit = broker.site.audit();
    let outcome = |action: &str| {
        let mut lines = audit.lines().filter(|line| {
            line.contains(&format!("\"action\":\"{action}\""))
                && line.contains("\"kind\":\"outcome\"")
                && line.contains(id)
        });
        let line = lines.next().unwrap_or_else(|| panic!("{action}: {audit}"));
        serde_json::from_str::<Value>(line).unwrap()
    };
    let (ada, bob) = (
        format!("URI:{}", pki::uri("admin")),
        format!("URI:{}", pki::uri(BOB)),
    );
    let request = outcome("approval.request");
    let approve = outcome("approval.approve");
    let change = outcome("wrapping_key.destroy_now");
    for (entry, fields) in [
        (&request, [("principal", &*ada), ("person", "Ada")]),
        (&approve, [("principal", &bob), ("person", "Bob")]),
        (
            &approve,
            [("requested_by", &ada), ("requested_by_person", "Ada")],
        ),
        (&change, [("principal", &ada), ("person", "Ada")]),
        (
            &change,
            [("approved_by", &bob), ("approved_by_person", "Bob")],
        ),
    ] {
        for (field, value) in fields {
            assert_eq!(entry[field], value, "{field}: {entry}");
        }
        assert_eq!(entry["wrapping_key"], older);
        assert_eq!(entry["digest"], request["digest"], "{entry}");
    }
}

/// One approval permits one change, also if the approved row is put back into the database.
#[tokio::test(flavor = "multi_thread")]
async fn an_approval_permits_one_change_and_no_writer_of_sql_makes_one() {
    let (broker, older) = with_persons().await;
    let site = Arc::clone(&broker.site);
    let destroy = ["key", "destroy", &older, "--yes"];
    let id = waits(&broker, "admin", &destroy);
    for edit in [
        "state = 'approved'",
        "state = 'approved', decided_by = 'URI:x', decided_person = 'Bob', decided_us = 1",
        "requested_person = 'Carol'",
        "expires_us = expires_us + 1000000",
        "document = CAST(replace(CAST(document AS TEXT), ':30', ':31') AS BLOB)",
    ] {
        site.sql("CREATE TABLE saved AS SELECT * FROM approvals");
        site.sql(&format!("UPDATE approvals SET {edit}"));
        refused(
            &broker,
            "admin",
            &destroy,
            "RECORD_DAMAGED",
            &["was altered"],
        );
        let approve = ["approval", "approve", &id, "--yes"];
        refused(
            &broker,
            BOB,
            &approve,
            "RECORD_DAMAGED",
            &["approval reject"],
        );
        let listed = list(&broker, BOB, &["--all"]);
        assert_eq!(listed[0]["verified"], false, "{edit}");
        assert!(text(&listed[0], "problem").contains("MAC"), "{listed:#?}");
        site.sql(
            "DELETE FROM approvals; INSERT INTO approvals SELECT * FROM saved; DROP TABLE saved",
        );
    }
    let approve = ["approval", "approve", &id, "--yes"];
    done(&broker, BOB, &approve);
    site.sql("CREATE TABLE saved AS SELECT * FROM approvals");
    let scheduled = done(&broker, "admin", &destroy);
    assert!(scheduled["destroy_at"].is_string(), "{scheduled}");
    done(&broker, "admin", &["key", "destroy", &older, "--cancel"]);
    site.sql("DELETE FROM approvals; INSERT INTO approvals SELECT * FROM saved");
    let again = waits(&broker, "admin", &destroy);
    assert_ne!(again, id);
    an_unreadable_request_is_removed(&broker, &destroy, &again);
}

fn an_unreadable_request_is_removed(broker: &Broker, destroy: &[&str], again: &str) {
    let site = &broker.site;
    // A row that cannot be read is listed, does not hide others, and can be removed.
    site.sql(&format!(
        "PRAGMA ignore_check_constraints = ON; UPDATE approvals SET mac = x'00' WHERE lower(hex(approval_id)) = '{again}'"
    ));
    refused(
        broker,
        "admin",
        destroy,
        "RECORD_DAMAGED",
        &["approval reject"],
    );
    let listed = list(broker, BOB, &[]);
    let damaged = listed.iter().find(|one| text(one, "id") == again).unwrap();
    assert_eq!(text(damaged, "state"), "unreadable");
    let checked = Finished::from(site.command(&["store", "check"]).output().unwrap());
    // The database file of a running broker is locked on SQLite only against other writers.
    assert!(
        [Some(DAMAGED), Some(9)].contains(&checked.code),
        "{checked:#?}"
    );
    let removed = done(broker, BOB, &["approval", "reject", again]);
    assert!(text(&removed, "removed").contains("could not be read"));
    let last = waits(broker, "admin", destroy);
    let rejected = done(broker, CAROL, &["approval", "reject", &last]);
    assert_eq!(text(&rejected, "state"), "rejected");
    let message = refused(
        broker,
        "admin",
        destroy,
        "APPROVAL_NEEDED",
        &["Carol rejected"],
    );
    assert!(!message.contains(&format!("approve {last}")), "{message}");
}

/// While the registry cannot be read, a request whose wrapping key is unknown may be authentic.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_not_removed_while_the_registry_cannot_be_read() {
    let (broker, older) = with_persons().await;
    let id = waits(&broker, "admin", &["key", "destroy", &older, "--yes"]);
    broker.site.sql(
        "UPDATE approvals SET signer_key_id = randomblob(16); \
         CREATE TABLE saved AS SELECT key_id, state FROM wrapping_keys; UPDATE wrapping_keys SET state = 'none'",
    );
    let reject = ["approval", "reject", &id];
    let words = ["nothing was changed"];
    refused(&broker, BOB, &reject, "RECORD_DAMAGED", &words);
    broker.site.sql(
        "UPDATE wrapping_keys SET state = (SELECT s.state FROM saved s WHERE s.key_id = wrapping_keys.key_id); \
         DROP TABLE saved",
    );
    let removed = done(&broker, BOB, &reject);
    assert!(text(&removed, "removed").contains("was altered"));
}

/// A full list does not prevent decisions about the requests that it does not show.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_the_list_does_not_show_is_decided_by_its_id() {
    let (broker, older) = with_persons().await;
    let id = waits(&broker, "admin", &["key", "destroy", &older, "--yes"]);
    broker.site.sql(
        "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 200) \
         INSERT INTO approvals SELECT randomblob(16), signer_key_id, state, action, document, randomblob(32), requested_by, \
         requested_person, requested_us + i, expires_us, decided_by, decided_person, decided_us, used_us, mac FROM approvals, n",
    );
    for more in [&[][..], &["--all"]] {
        let listed = list(&broker, BOB, more);
        assert_eq!(listed.len(), 200);
        assert!(listed.iter().all(|one| text(one, "id") != id));
    }
    let approved = done(&broker, BOB, &["approval", "approve", &id, "--yes"]);
    assert_eq!(text(&approved, "state"), "approved");
    let rejected = done(&broker, CAROL, &["approval", "reject", &id]);
    assert_eq!(text(&rejected, "state"), "rejected");
}

/// Two colleagues decide at the same moment: exactly one decision counts.
#[tokio::test(flavor = "multi_thread")]
async fn of_two_decisions_at_the_same_moment_one_counts() {
    let (broker, older) = with_persons().await;
    for days in ["31", "32", "33"] {
        let id = waits(
            &broker,
            "admin",
            &["key", "destroy", &older, "--yes", "--after-days", days],
        );
        let both: Vec<_> = [BOB, CAROL]
            .iter()
            .map(|who| {
                let arguments = ["-o", "json", "approval", "approve", &id, "--yes"];
                let mut command = calling(&broker, &arguments, who, &[]);
                command
                    .stdout(std::process::Stdio::piped())
                    .stderr(std::process::Stdio::piped());
                command.spawn().unwrap()
            })
            .collect();
        let codes: Vec<_> = both
            .into_iter()
            .map(|child| Finished::from(child.wait_with_output().unwrap()))
            .collect();
        let mut done: Vec<_> = codes.iter().map(|finished| finished.code).collect();
        done.sort_unstable();
        assert_eq!(done, [Some(0), Some(REFUSED)], "{codes:#?}");
        let decisions = broker.site.audit();
        let decisions = decisions.lines().filter(|line| {
            line.contains("\"action\":\"approval.approve\"")
                && line.contains("\"outcome\":\"ok\"")
                && line.contains("\"kind\":\"outcome\"")
                && line.contains(&id)
        });
        assert_eq!(decisions.count(), 1);
    }
}

/// The persons are those of the present configuration. A person who was removed from it can neither request nor decide.
#[tokio::test(flavor = "multi_thread")]
async fn a_person_who_left_the_configuration_does_not_count() {
    let (broker, older) = with_persons().await;
    let destroy = ["key", "destroy", &older, "--yes"];
    refused(&broker, EVE, &destroy, "POLICY", &["belongs to no"]);
    let pending = waits(&broker, "admin", &destroy);
    let of_bob = waits(&broker, BOB, &destroy);
    done(&broker, CAROL, &["approval", "approve", &of_bob, "--yes"]);
    let (site, _) = broker.stop();

    // Ada left, and so did Carol, who had approved.
    configure(&site, &persons(&[("Bob", &[BOB]), ("Eve", &[EVE])]));
    let broker = Broker::start_on(site);
    refused(&broker, "admin", &destroy, "POLICY", &["belongs to no"]);
    let approve = ["approval", "approve", &pending, "--yes"];
    refused(
        &broker,
        BOB,
        &approve,
        "POLICY",
        &["no longer belongs to Ada"],
    );
    let words = ["Carol does not count any more", "of Eve"];
    refused(&broker, BOB, &destroy, "APPROVAL_NEEDED", &words);
    let (site, _) = broker.stop();

    // Without persons, the same command works as before, and `compromise` took one person all the time.
    configure(&site, "");
    let broker = Broker::start_on(site);
    let off = ["approval", "approve", &pending, "--yes"];
    refused(
        &broker,
        BOB,
        &off,
        "APPROVAL_STATE",
        &["no change needs an approval"],
    );
    done(&broker, "admin", &destroy);
    let (site, _) = broker.stop();
    configure(&site, &three_persons());
    let broker = Broker::start_on(site);
    let compromised = key(&broker, EVE, &["compromise", &older]);
    assert_eq!(compromised.code, Some(0), "{compromised:#?}");
}

/// An API client that may administer needs a second person, and so does each further secret of it.
#[tokio::test(flavor = "multi_thread")]
async fn an_administrator_is_made_by_two_persons() {
    let site = Arc::new(Site::fresh(Options {
        limits: "\n[client_credentials]\ngrantable_roles = [\"admin\", \"enrol\"]".to_owned(),
        ..Options::default()
    }));
    configure(&site, &three_persons());
    let broker = Broker::start_on(Arc::clone(&site));
    let enrol = [
        "client-credential",
        "create",
        "--label",
        "x",
        "--role",
        "enrol",
    ];
    done(&broker, "admin", &enrol);
    let create = [
        "client-credential",
        "create",
        "--label",
        "night shift",
        "--role",
        "admin",
        "--expires-days",
        "30",
    ];
    let id = waits(&broker, "admin", &create);
    let listed = list(&broker, BOB, &[]);
    assert_eq!(listed[0]["change"]["label"], "night shift");
    assert_eq!(listed[0]["change"]["roles"], serde_json::json!(["admin"]));
    assert_eq!(listed[0]["change"]["secret_days"], 30);
    done(&broker, BOB, &["approval", "approve", &id, "--yes"]);
    let made = done(&broker, "admin", &create);
    assert_eq!(text(&made, "id"), id);
    crate::client::never_in_a_log(text(&made, "secret").as_bytes());

    let add = ["client-credential", "add-secret", &id];
    let second = waits(&broker, "admin", &add);
    assert_ne!(second, id);
    done(&broker, CAROL, &["approval", "approve", &second, "--yes"]);
    let added = done(&broker, "admin", &add);
    assert_eq!(added["secret_number"], 2);
    crate::client::never_in_a_log(text(&added, "secret").as_bytes());
    done(&broker, "admin", &["client-credential", "revoke", &id]);
    let (site, _) = broker.stop();
    site.expect_ok(&["store", "check"]);
}

/// A table for people shows what is asked, and the hint has both commands.
#[tokio::test(flavor = "multi_thread")]
async fn people_read_what_is_asked_and_what_to_do() {
    let (broker, older) = with_persons().await;
    let id = waits(&broker, "admin", &["key", "destroy", &older, "--yes"]);
    let run = |who: &str, arguments: &[&str]| {
        Finished::from(calling(&broker, arguments, who, &[]).output().unwrap())
    };
    let listed = run(BOB, &["approval", "list"]);
    for word in [
        &*id,
        "after_days 30",
        &older,
        "wrapping_key.destroy",
        "Ada",
        "pending",
    ] {
        assert!(listed.stdout.contains(word), "{word}: {listed:#?}");
    }
    let approved = run(BOB, &["approval", "approve", &id, "--yes"]);
    assert_eq!(approved.code, Some(0), "{approved:#?}");
    assert!(
        approved.stderr.contains("Ada can make the change once"),
        "{approved:#?}"
    );
    let none = run(CAROL, &["approval", "list", "--all"]);
    assert!(none.stdout.contains("approved"), "{none:#?}");
    let all = command(&broker, CAROL, &["approval", "list", "--all"]);
    assert_as_promised("approval list", &all);
    // The progress of a re-wrap shows that a request needs the key in use.
    let status = done(&broker, "admin", &["rewrap", "status"]);
    let uses = status["wrapping_keys"].as_array().unwrap();
    let counts: Vec<_> = uses
        .iter()
        .map(|one| one["approvals"].as_u64().unwrap())
        .collect();
    assert_eq!(counts.iter().sum::<u64>(), 1, "{status:#}");
}

/// A configuration in which one person could approve their own change, or no person could approve, is refused.
#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_that_cannot_work_is_refused() {
    let site = Site::fresh(Options::default());
    for (sections, words) in [
        (persons(&[("Ada", &["admin"])]), &["only person"][..]),
        (
            persons(&[("Ada", &["admin"]), ("Bob", &["admin", BOB])]),
            &["belongs to both \"Ada\" and \"Bob\""],
        ),
        (
            persons(&[("Ada", &["admin"]), ("Bob", &["nobody"])]),
            &["no [[principal]] has the `san`"],
        ),
        (
            "\n[approvals]\nactions = [\"wrapping_key.compromise\"]\n".to_owned(),
            &["wrapping_key.compromise", "wrapping_key.destroy"],
        ),
    ] {
        configure(&site, &sections);
        let finished = site.serve_to_its_end();
        assert_eq!(finished.code, Some(CONFIGURATION), "{finished:#?}");
        for word in words {
            let told = format!("{}{}", finished.stdout, finished.stderr);
            assert!(told.contains(word), "{word}: {finished:#?}");
        }
    }
    // The configuration of an earlier release has no such section.
    site.write_configuration(|_| {});
    let broker = Broker::start_on(Arc::new(site));
    assert!(list(&broker, "admin", &["--all"]).is_empty());
    assert!(
        Caller::of(&broker, "enroller")
            .create("ada", b"material")
            .await
            .is_ok()
    );
}
