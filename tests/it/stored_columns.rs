//! Every column of every table: an edit of one in SQL is found by `store check`, or the documentation says why not and what it
//! can do. The columns come from the database, so that a new one is covered as soon as there is one.

use std::{collections::BTreeMap, fs};

use keybroker_proto::AccessApprover;

use crate::{
    client::{Caller, eventually},
    client_commands::calling,
    client_credentials::{made, site as site_that_grants},
    device_approvals,
    devices::member::{App, Member},
    identity::{Identity, Options as IdentityOptions},
    pki,
    site::Site,
    tokens::{ADA, start_on},
};

const HEADING: &str = "| Column | What an edit can do | Why it has no MAC |";
const REQUEST_ID: &str = "7d444840-9dc0-11d1-b245-5ffdce74fad2";

/// A database with a row in every table, whose broker has stopped.
async fn filled() -> std::sync::Arc<Site> {
    let site = site_that_grants(
        "[client_credentials]\ngrantable_roles = [\"enrol\", \"release\", \"admin\"]",
    );
    let configuration = fs::read_to_string(site.configuration_file()).unwrap();
    let persons = ["admin", "auditor"].map(|name| {
        let uri = pki::uri(name);
        format!("[[approvals.person]]\nname = \"{name}\"\nprincipals = [\"URI:{uri}\"]\n")
    });
    let service = Identity::start(IdentityOptions::default());
    let issuer = format!(
        "[[issuer]]\nname = \"vault\"\nissuer = \"{}\"\nprofile = \"bitwarden\"\nallow_http = true\n",
        service.issuer()
    );
    fs::write(
        site.configuration_file(),
        format!("{configuration}\n{}{issuer}", persons.concat()),
    )
    .unwrap();
    let broker = start_on(site);
    // A trusted device, and a request for access.
    let (member, _) = Member::with_first_device(&broker, &service, ADA).await;
    let asked = member.asks(&App::new(2), AccessApprover::Device).await;
    asked.unwrap();
    made(&broker);
    // A request for approval.
    let waits = [
        "client-credential",
        "create",
        "--label",
        "x",
        "--role",
        "admin",
    ];
    let waits = calling(&broker, &waits, "admin", &[]).output().unwrap();
    assert_eq!(waits.status.code(), Some(10), "{waits:?}");
    let [enroller, releaser, lifecycle] =
        ["enroller", "releaser", "lifecycle"].map(|name| Caller::of(&broker, name));
    let ada = enroller.create_with_id("ada", b"material", REQUEST_ID);
    ada.await.unwrap();
    enroller.replace("ada", b"other", 1, "").await.unwrap();
    enroller.create("bob", b"material").await.unwrap();
    lifecycle.delete("bob", 1).await.unwrap();
    eventually(|| releaser.unwrap("ada")).await;
    let (site, _) = broker.stop();
    // A requested re-wrap that has ended, the place of the key on a token that this configuration does not have, and a scheduled
    // destruction.
    site.sql(
        "INSERT INTO rewraps VALUES (1, randomblob(16), 'done', 0, x'', CAST('{}' AS BLOB), '', 0, 1); \
         INSERT INTO wrapping_key_places \
         SELECT key_id, 'elsewhere', token_serial, x'', x'', registered_us, NULL, mac FROM wrapping_keys; \
         INSERT INTO key_destructions \
         SELECT key_id, key_id, sequence, 1, 2, 'URI:admin', mac, '', 0 FROM wrapping_keys",
    );
    device_approvals::pin(&site);
    assert_ne!(site.sql("SELECT count(*) FROM approvals").trim(), "0");
    site
}

/// The columns with their declared types, by table.
fn columns(site: &Site) -> BTreeMap<String, Vec<(String, String)>> {
    let listed = site.sql(
        "SELECT m.name, c.name, c.type FROM sqlite_master m, pragma_table_info(m.name) c \
         WHERE m.type = 'table' AND m.name NOT LIKE 'sqlite_%' AND m.name NOT LIKE '_sqlx%'",
    );
    let mut columns: BTreeMap<String, Vec<(String, String)>> = BTreeMap::new();
    for line in listed.lines() {
        let [table, column, kind] = line.split('|').collect::<Vec<_>>()[..] else {
            panic!("{line}");
        };
        let of_table = columns.entry(table.to_owned()).or_default();
        of_table.push((column.to_owned(), kind.to_owned()));
    }
    columns
}

/// Another value of the same type and length, which a reader cannot tell from a good one by its form.
fn edit(column: &str, kind: &str) -> String {
    match kind {
        "INTEGER" => format!("coalesce({column}, 0) + 1000"),
        "TEXT" => format!("{column} || 'x'"),
        "BLOB" => format!(
            "CASE WHEN length({column}) = 0 THEN x'01' ELSE CAST(substr({column}, 1, length({column}) - 1) || \
             CASE WHEN substr({column}, -1) = x'00' THEN x'01' ELSE x'00' END AS BLOB) END"
        ),
        other => panic!("a column of type {other}"),
    }
}

/// The columns of the table in the documentation.
fn documented() -> Vec<String> {
    let page = include_str!("../../docs/store.md");
    let (_, rows) = page.split_once(HEADING).expect("the table of columns");
    let mut columns = Vec::new();
    for row in rows
        .lines()
        .skip(2)
        .take_while(|line| line.starts_with('|'))
    {
        let cell = row.split('|').nth(1).unwrap();
        columns.extend(cell.split('`').skip(1).step_by(2).map(str::to_owned));
    }
    columns.sort();
    columns
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edit_of_any_column_is_found_or_documented() {
    let site = filled().await;
    site.sql(
        "INSERT INTO client_uses (client_id, secret_number, used_us) SELECT client_id, 1, 1 FROM clients",
    );
    let original = fs::read(site.database()).unwrap();
    let clean = site.run(&["store", "check"]);
    assert_eq!(clean.code, Some(0), "{clean:#?}");

    let mut not_found = Vec::new();
    for (table, columns) in columns(&site) {
        let rows = site.sql(&format!("SELECT count(*) FROM {table}"));
        assert_ne!(rows.trim(), "0", "{table} has no row");
        for (column, kind) in columns {
            site.sql(&format!(
                "PRAGMA ignore_check_constraints = ON; PRAGMA foreign_keys = OFF; \
                 UPDATE {table} SET {column} = {}",
                edit(&column, &kind)
            ));
            let checked = site.run(&["store", "check"]);
            assert!(
                matches!(checked.code, Some(0 | 6 | 7 | 12)),
                "{table}.{column}: {checked:#?}"
            );
            if checked.code == Some(0) {
                not_found.push(format!("{table}.{column}"));
            }
            fs::write(site.database(), &original).unwrap();
        }
    }
    not_found.sort();
    assert_eq!(not_found, documented());
}
