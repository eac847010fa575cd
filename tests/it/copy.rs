//! `store copy`: a site moves from one engine to another, and every key unwraps there.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    thread,
    time::Duration,
};

use serde_json::Value;

use crate::{
    client::{Caller, refused},
    faulty::{Fault, code},
    faulty_token,
    process::{Broker, until},
    servers::{Kind, Server, section},
    site::{Finished, Options, Site},
};

fn json(finished: &Finished) -> Value {
    serde_json::from_str(&finished.stdout).unwrap_or_else(|error| panic!("{error}: {finished:#?}"))
}

/// The same configuration with another database, in a separate file.
fn configuration_for(site: &Site, store: &str) -> PathBuf {
    let text = fs::read_to_string(site.configuration_file()).unwrap();
    let (before, rest) = text.split_once("[store]\n").unwrap();
    let (_, after) = rest.split_once("\n\n").unwrap();
    let file = site.folder().join("other.toml");
    fs::write(&file, format!("{before}[store]\n{store}\n\n{after}")).unwrap();
    file
}

fn with<'a>(file: &'a Path, arguments: &[&'a str]) -> Vec<&'a str> {
    [arguments, &["--config", file.to_str().unwrap()]].concat()
}

/// An empty, migrated SQLite database beside the site's own: its file and its URL.
pub(crate) fn another(site: &Site) -> (PathBuf, String) {
    let file = site.folder().join("another.db");
    let url = format!("sqlite:{}", file.display());
    let configuration = configuration_for(site, &format!("url = \"{url}\""));
    site.expect_ok(&with(&configuration, &["store", "migrate"]));
    (file, url)
}

/// Three users with a superseded and a current revision each; one of them is deleted.
async fn enrolled_on(old: &Server) -> Arc<Site> {
    let options = Options {
        store: Some(section(&old.settings(&old.database()))),
        ..Options::default()
    };
    let broker = Broker::start(options);
    let [enroller, lifecycle] = ["enroller", "lifecycle"].map(|name| Caller::of(&broker, name));
    for user in ["ada", "b\u{e9}b\u{e9}", "carl"] {
        enroller.create(user, b"first material").await.unwrap();
        enroller.replace(user, b"other", 1, "").await.unwrap();
    }
    lifecycle.delete("carl", 2).await.unwrap();
    broker.stop().0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_site_moves_from_postgresql_to_mariadb() {
    let (old, new) = (
        Server::start(Kind::PostgreSql),
        Server::start(Kind::MariaDb),
    );
    let site = enrolled_on(&old).await;
    // Over the network, with a password.
    let settings = new.network_settings("127.0.0.1", &new.database());
    let (url, file) = (settings.url.as_str(), settings.password_file.unwrap());
    let file = file.to_str().unwrap();
    let other = configuration_for(
        &site,
        &format!("url = \"{url}\"\npassword_file = \"{file}\"\ntls = \"plaintext\""),
    );
    let options = ["--to-password-file", file, "--to-tls", "plaintext"];
    let copy = [&["-o", "json", "store", "copy", "--to", url], &options[..]].concat();
    let early = site.run(&copy);
    assert_eq!(early.code, Some(7), "{early:#?}");
    assert!(early.stderr.contains("store migrate"), "{early:#?}");
    site.expect_ok(&with(&other, &["store", "migrate"]));
    let copied = site.run(&copy);
    assert_eq!(copied.code, Some(0), "{copied:#?}");
    let report = json(&copied);
    for (field, count) in [
        ("records", 3),
        ("revisions", 6),
        ("wrapping_keys", 1),
        ("changes", 7),
        ("added", 17),
        ("bad", 0),
    ] {
        assert_eq!(report[field], count, "{field}: {report}");
    }
    assert!(site.audit().contains("\"action\":\"store.copy\""));
    // From where the new configuration stands it is the same, and there is nothing left to do.
    let from = fs::read_to_string(site.configuration_file()).unwrap();
    let from = from
        .split('"')
        .find(|part| part.starts_with("postgres://"))
        .unwrap();
    let again = ["-o", "json", "store", "copy", "--from", from, "--to", url];
    // The new configuration does not name the user of the old server, which is not one of a package.
    let user = &old.settings("any").socket_users.unwrap()[0];
    let again = [&again[..], &["--from-socket-user", user]].concat();
    let again = site.run(&with(&other, &again));
    assert_eq!(
        (again.code, &json(&again)["added"]),
        (Some(0), &0.into()),
        "{again:#?}"
    );

    fs::copy(&other, site.configuration_file()).unwrap();
    let broker = Broker::start_on(site);
    let [releaser, lifecycle] = ["releaser", "lifecycle"].map(|name| Caller::of(&broker, name));
    refused(releaser.unwrap("carl").await, "KEY_NOT_FOUND");
    lifecycle.undelete("carl").await.unwrap();
    lifecycle.restore("ada", 1, 2).await.unwrap();
    for (user, material) in [
        ("ada", "first material"),
        ("b\u{e9}b\u{e9}", "other"),
        ("carl", "other"),
    ] {
        assert_eq!(
            releaser.unwrap(user).await.unwrap().key_material,
            material.as_bytes()
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_copied_is_refused_and_nothing_is_changed() {
    let broker = Broker::start(Options::default());
    Caller::of(&broker, "enroller")
        .create("ada", b"material")
        .await
        .unwrap();
    let (_, url) = another(&broker.site);
    let copy = |more: &[&str]| {
        broker
            .site
            .run(&[&["store", "copy", "--to", &url], more].concat())
    };
    let busy = copy(&[]);
    assert_eq!(busy.code, Some(9), "{busy:#?}");
    assert!(busy.stderr.contains("stop the broker"), "{busy:#?}");
    let own = format!("sqlite:{}", broker.site.database().display());
    for (arguments, words) in [
        (["--to", &own], "same database"),
        (["--to", "postgres://me:hunter2@db/keys"], "password_file"),
        (["--to", "sqlite:relative.db"], "absolute"),
        (["--to-tls", "plaintext"], "--to"),
    ] {
        let refused = broker
            .site
            .run(&[&["store", "copy"], &arguments[..]].concat());
        assert_eq!(refused.code, Some(2), "{arguments:?}: {refused:#?}");
        assert!(
            refused.stderr.contains(words),
            "{arguments:?}: {refused:#?}"
        );
        assert!(!refused.stderr.contains("hunter2"), "{refused:#?}");
    }
    let (site, _) = broker.stop();
    // A database of another installation.
    let other = Site::fresh(Options::default());
    let taken = format!("sqlite:{}", other.database().display());
    let before = other.sql(".dump");
    let refused = site.run(&["store", "copy", "--to", &taken]);
    assert_eq!(refused.code, Some(12), "{refused:#?}");
    assert!(refused.stderr.contains("wrapping_keys"), "{refused:#?}");
    assert_eq!(other.sql(".dump"), before);
}

/// A broker that was forgotten writes while the token looks at the copy.
#[tokio::test(flavor = "multi_thread")]
async fn a_change_while_the_token_verifies_is_found() {
    let (site, faulty) = faulty_token::site(Options::default());
    let broker = Broker::start_on(site);
    let enroller = Caller::of(&broker, "enroller");
    enroller.create("ada", b"material").await.unwrap();
    let (site, _) = broker.stop();
    let (file, url) = another(&site);
    faulty.set(
        "C_Verify",
        &Fault {
            milliseconds: 500,
            ..Fault::always(code::LATE)
        },
    );
    let copying = {
        let site = Arc::clone(&site);
        thread::spawn(move || site.run(&["store", "copy", "--to", &url]))
    };
    // The registry is copied last.
    until("the copy", || {
        let output = std::process::Command::new("sqlite3")
            .arg(&file)
            .arg("SELECT count(*) FROM wrapping_keys")
            .output();
        (output.unwrap().stdout == b"1\n").then_some(())
    });
    let before = faulty.count("C_Verify begins");
    until("the token at work", || {
        (faulty.count("C_Verify begins") > before).then_some(())
    });
    site.sql("UPDATE records SET updated_us = updated_us + 1");
    let refused = tokio::task::block_in_place(|| copying.join().unwrap());
    assert_eq!(refused.code, Some(12), "{refused:#?}");
    assert!(refused.stderr.contains("stop every broker"), "{refused:#?}");
}

/// Killed in the middle, a copy serves nobody; run again, it is whole.
#[test]
fn a_copy_that_was_killed_goes_on() {
    const RECORDS: u64 = 20_000;
    let site = Arc::new(Site::fresh(Options::default()));
    site.sql(&format!(
        "BEGIN; WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {RECORDS})
         INSERT INTO records SELECT CAST(printf('%016d', i) AS BLOB), 'default', 'user-' || i, 'vault', \
         'active', 1, 1, 1, NULL FROM n;
         INSERT INTO revisions SELECT record_id, 1, x'01', zeroblob(16), 1 FROM records; COMMIT"
    ));
    let (file, url) = another(&site);
    let sql = |file: &Path, text: &str| {
        let output = std::process::Command::new("sqlite3")
            .args(["-cmd", ".timeout 10000"])
            .arg(file)
            .arg(text)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let copied = || -> u64 {
        sql(&file, "SELECT count(*) FROM records")
            .trim()
            .parse()
            .unwrap()
    };
    let arguments = ["-o", "json", "store", "copy", "--to", &url];
    let mut child = site
        .command(&arguments)
        .env("SOFTHSM2_CONF", site.token.configuration())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    for _ in 0..1_000 {
        if copied() > 0 {
            break;
        }
        thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let there = copied();
    assert!(there > 0 && there < RECORDS, "{there}");
    // Without its registry, which comes last, nobody serves from half a copy.
    let half = configuration_for(&site, &format!("url = \"{url}\""));
    let served = site.run_to_its_end(site.command(&with(&half, &["serve"])));
    assert_eq!(served.code, Some(6), "{served:#?}");

    let finished = site.run(&arguments);
    let report = json(&finished);
    assert_eq!(report["added"], 2 * RECORDS + 1 - there, "{report}");
    // The rows of this test were written without the token: copied as they are, and called bad.
    assert_eq!((finished.code, &report["bad"]), (Some(12), &RECORDS.into()));
    for table in ["records", "revisions", "wrapping_keys"] {
        let all = format!(".dump {table}");
        assert_eq!(sql(&file, &all), site.sql(&all), "{table}");
    }
}
