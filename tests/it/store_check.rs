//! `store check`: every row is read, every MAC verified on the token, and what is bad is named and left as it is.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use serde_json::Value;

use crate::{
    client::Caller,
    faulty::{Fault, code},
    faulty_token,
    process::{Broker, until},
    servers::{Kind, Server, section},
    site::{Finished, Options, Site},
};

fn check(site: &Site) -> (Finished, Value) {
    let finished = site.run(&["-o", "json", "store", "check"]);
    let report = serde_json::from_str(&finished.stdout).unwrap_or(Value::Null);
    (finished, report)
}

#[track_caller]
fn assert_good(site: &Site, records: u64, revisions: u64) {
    let (finished, report) = check(site);
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    assert_eq!(
        (&report["records"], &report["revisions"], &report["bad"]),
        (&records.into(), &revisions.into(), &0.into())
    );
    assert_eq!(report["findings"], Value::Array(Vec::new()));
}

/// So many users with a superseded and a current revision; the first one is deleted.
async fn enrolled(site: Arc<Site>, users: &[&str]) -> Broker {
    let broker = Broker::start_on(site);
    let [enroller, lifecycle] = ["enroller", "lifecycle"].map(|name| Caller::of(&broker, name));
    for user in users {
        enroller.create(user, b"first material").await.unwrap();
        enroller.replace(user, b"other", 1, "").await.unwrap();
    }
    lifecycle.delete(users[0], 2).await.unwrap();
    broker
}

/// User, SQL that damages a row of theirs, and what the check calls it.
type Damage = (&'static str, String, &'static str);

fn damages() -> Vec<Damage> {
    let current = |what: &str| {
        format!(
            "UPDATE revisions SET {what} WHERE (record_id, revision) IN \
             (SELECT record_id, revision FROM records WHERE user = '{{}}')"
        )
    };
    let first = |what: &str| {
        format!(
            "UPDATE revisions SET {what} WHERE revision = 1 AND record_id IN \
             (SELECT record_id FROM records WHERE user = '{{}}')"
        )
    };
    let bytes = |from: usize, to: &str| {
        let after = from + 1 + to.len() / 2;
        format!(
            "envelope = CAST(substr(envelope, 1, {from}) || x'{to}' || substr(envelope, {after}) AS BLOB)"
        )
    };
    let (zeros, no_key) = (bytes(300, "00000000"), "wrapping_key_id = zeroblob(16)");
    let other_key = format!("{}, {no_key}", bytes(3, &"00".repeat(16)));
    vec![
        ("deleted", current(&zeros), "mac-refused"),
        ("superseded", first(&zeros), "mac-refused"),
        ("version", current(&bytes(0, "09")), "envelope-unreadable"),
        ("cut", first("envelope = x'01'"), "envelope-unreadable"),
        ("kind", current(&bytes(1, "02")), "envelope-of-another-kind"),
        ("column", current(no_key), "wrapping-key-differs"),
        ("key", current(&other_key), "wrapping-key-unknown"),
        (
            "short",
            first("wrapping_key_id = x'01'"),
            "revision-unreadable",
        ),
        (
            "missing",
            current("revision = 3 ")
                .replace("UPDATE revisions SET revision = 3", "DELETE FROM revisions"),
            "current-revision-missing",
        ),
        (
            "beyond",
            "UPDATE records SET revision = 1 WHERE user = '{}'".to_owned(),
            "revision-beyond-current",
        ),
        (
            "state",
            "UPDATE records SET state = 'gone' WHERE user = '{}'".to_owned(),
            "record-unreadable",
        ),
    ]
}

/// The problems by user.
fn by_user<'a>(found: impl Iterator<Item = (&'a str, &'a str)>) -> BTreeMap<&'a str, Vec<&'a str>> {
    let mut problems: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (user, problem) in found {
        problems.entry(user).or_default().push(problem);
    }
    for problems in problems.values_mut() {
        problems.sort_unstable();
    }
    problems
}

#[tokio::test(flavor = "multi_thread")]
async fn every_bad_row_is_named_and_nothing_is_changed() {
    let damages = damages();
    let mut users: Vec<&str> = damages.iter().map(|(user, ..)| *user).collect();
    users.extend(["good", "orphan"]);
    let broker = enrolled(Arc::new(Site::fresh(Options::default())), &users).await;
    let count = u64::try_from(users.len()).unwrap();
    // It reads, so the broker may serve meanwhile.
    assert_good(&broker.site, count, 2 * count);
    let (site, _) = broker.stop();
    for (user, damage, _) in &damages {
        let damage = damage.replace("{}", user);
        site.sql(&format!("PRAGMA ignore_check_constraints = ON; {damage}"));
    }
    site.sql(
        "DELETE FROM revisions WHERE revision = 1 AND record_id = \
             (SELECT record_id FROM records WHERE user = 'orphan'); \
         DELETE FROM records WHERE user = 'orphan'",
    );

    let before = site.sql(".dump");
    let (finished, report) = check(&site);
    assert_eq!(finished.code, Some(12), "{finished:#?}");
    assert_eq!(site.sql(".dump"), before);
    let findings = report["findings"].as_array().unwrap();
    assert_eq!(report["bad"], findings.len());
    let found = by_user(findings.iter().map(|finding| {
        let user = finding["user"].as_str().unwrap_or("nobody");
        (user, finding["problem"].as_str().unwrap())
    }));
    let expected = damages.iter().map(|(user, _, problem)| match *problem {
        "record-unreadable" => ("nobody", *problem),
        problem => (*user, problem),
    });
    let expected = by_user(expected.chain([("nobody", "revision-without-record")]));
    assert_eq!(found, expected);
    let deleted = findings.iter().find(|finding| finding["user"] == "deleted");
    let deleted = deleted.unwrap();
    assert_eq!(deleted["revision"], 2);
    assert_eq!(deleted["record_id"].as_str().unwrap().len(), 32);
    let table = site.run(&["store", "check"]);
    assert_eq!(table.code, Some(12));
    assert!(
        table.stdout.contains("envelope-of-another-kind"),
        "{table:#?}"
    );
    assert!(table.stderr.contains("RECORD_DAMAGED"), "{table:#?}");
}

#[test]
fn an_altered_registry_ends_the_check_before_it_begins() {
    let site = Site::fresh(Options::default());
    assert_good(&site, 0, 0);
    site.sql("UPDATE wrapping_keys SET sequence = 7");
    let (finished, report) = check(&site);
    assert_eq!(
        (finished.code, report),
        (Some(6), Value::Null),
        "{finished:#?}"
    );
    assert!(finished.stderr.contains("altered"), "{finished:#?}");
}

/// What a broker writes meanwhile is seen too early, too late or in half, and is not called bad.
#[tokio::test(flavor = "multi_thread")]
async fn writes_beside_a_check_are_not_called_bad() {
    for kind in [Kind::PostgreSql, Kind::MariaDb] {
        let server = Server::start(kind);
        let options = Options {
            store: Some(section(&server.settings(&server.database()))),
            ..Options::default()
        };
        let users: Vec<String> = (0..20).map(|number| format!("user-{number}")).collect();
        let users: Vec<&str> = users.iter().map(String::as_str).collect();
        let broker = enrolled(Arc::new(Site::fresh(options)), &users).await;
        let stop = Arc::new(AtomicBool::new(false));
        let (writing, enroller) = (Arc::clone(&stop), Caller::of(&broker, "enroller"));
        let writer = tokio::spawn(async move {
            let mut revision = 2;
            while !writing.load(Ordering::Relaxed) {
                for number in 1..20 {
                    let user = format!("user-{number}");
                    enroller
                        .replace(&user, b"again", revision, "")
                        .await
                        .unwrap();
                    enroller
                        .create(&format!("new-{revision}-{number}"), b"new")
                        .await
                        .unwrap();
                }
                revision += 1;
            }
        });
        for _ in 0..5 {
            let (finished, report) = tokio::task::block_in_place(|| check(&broker.site));
            assert_eq!(finished.code, Some(0), "{finished:#?}");
            assert_eq!(report["bad"], 0);
        }
        stop.store(true, Ordering::Relaxed);
        writer.await.unwrap();
    }
}

/// A token that has no code of its own for a wrong MAC: one altered row is one finding, and every other row is verified.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_refuses_ambiguously_names_the_altered_row() {
    let (site, faulty) = faulty_token::site(Options::default());
    faulty.set(
        "C_Verify",
        &Fault::always(code::instead(code::FUNCTION_FAILED)),
    );
    let broker = enrolled(site, &["ada", "bob", "carl"]).await;
    let (site, _) = broker.stop();
    site.sql(
        "UPDATE revisions SET envelope = CAST(substr(envelope, 1, 300) || x'00000000' || substr(envelope, 305) AS BLOB) \
         WHERE revision = 2 AND record_id = (SELECT record_id FROM records WHERE user = 'bob')",
    );
    let (finished, report) = check(&site);
    assert_eq!(finished.code, Some(12), "{finished:#?}");
    let findings = report["findings"].as_array().unwrap();
    assert_eq!(findings.len(), 1, "{report}");
    assert_eq!(findings[0]["problem"], "mac-refused", "{report}");
    assert_eq!(findings[0]["user"], "bob", "{report}");
}

/// Whoever writes to the database ends no command with a panic.
#[test]
fn a_serial_number_that_no_token_has_is_an_error() {
    let site = Site::fresh(Options::default());
    site.sql("UPDATE wrapping_keys SET token_serial = printf('%.*c', 3000, 'x')");
    for command in [["token", "check"], ["store", "check"]] {
        let finished = site.run(&command);
        assert_eq!(finished.code, Some(7), "{finished:#?}");
        assert!(
            finished.stderr.contains("wrapping_keys.token_serial"),
            "{finished:#?}"
        );
    }
}

/// A key that is registered and used while a check goes on makes no bad row.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_registered_meanwhile_is_known() {
    let (site, faulty) = faulty_token::site(Options::default());
    let (site, _) = enrolled(site, &["ada"]).await.stop();
    site.expect_ok(&["key", "generate", "--bits", "2048"]);
    let (site, _) = enrolled(site, &["bob"]).await.stop();
    // The newest key is not there yet.
    site.sql(
        "CREATE TABLE kept AS SELECT * FROM wrapping_keys ORDER BY registered_us DESC LIMIT 1; \
         DELETE FROM wrapping_keys WHERE key_id IN (SELECT key_id FROM kept)",
    );
    let (_, report) = check(&site);
    assert_eq!(report["bad"], 2, "{report}");
    assert_eq!(report["findings"][0]["problem"], "wrapping-key-unknown");
    faulty.set(
        "C_Verify",
        &Fault {
            milliseconds: 500,
            ..Fault::always(code::LATE)
        },
    );
    let before = faulty.count("C_Verify begins");
    let checking = {
        let site = Arc::clone(&site);
        std::thread::spawn(move || check(&site))
    };
    // The registry was read.
    until("the token at work", || {
        (faulty.count("C_Verify begins") > before).then_some(())
    });
    site.sql("INSERT INTO wrapping_keys SELECT * FROM kept");
    let (finished, report) = tokio::task::block_in_place(|| checking.join().unwrap());
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    assert_eq!(report["revisions"], 4, "{report}");
}

/// Pages omit a row without a key. The columns reject NULL, so the writer of the row changed the table first.
#[test]
fn a_row_without_a_key_is_counted() {
    let site = Site::fresh(Options::default());
    assert_good(&site, 0, 0);
    site.sql(
        "ALTER TABLE last_uses RENAME TO before; CREATE TABLE last_uses AS SELECT * FROM before; \
         INSERT INTO last_uses VALUES (NULL, 1)",
    );
    let (finished, report) = check(&site);
    assert_eq!(finished.code, Some(12), "{finished:#?}");
    let finding = &report["findings"][0];
    assert_eq!(finding["problem"], "key-missing", "{finished:#?}");
    let detail = finding["detail"].as_str().unwrap();
    assert!(detail.starts_with("1 rows have NULL"), "{finding}");
}
