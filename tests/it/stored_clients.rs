//! API clients in the database: `store check` lets the token verify each, and names those that are bad.

use std::{collections::BTreeMap, path::Path, process::Command};

use keybroker::config::Config;
use keybroker_core::{
    call::{CallId, Timestamp},
    client_credential::Document,
    key::{ClientId, Tenant, WrappingKeyId},
    principal::{Reach, Role},
    state::StateDirectory,
};
use keybroker_hsm::admin::Admin;
use keybroker_store as store;
use keybroker_store::{ClientRow, Store};
use keybroker_worker_protocol::PinSource;
use serde_json::Value;

use crate::{
    copy,
    site::{Options, Site},
};

fn document(number: u8) -> Document {
    let mut document = Document {
        label: format!("client {number}"),
        tenant: Tenant::default(),
        roles: [Role::Release].into(),
        users: Some(Reach::All),
        key_names: None,
        created: Timestamp::now(),
        revoked: None,
        secrets: Vec::new(),
    };
    document.add_secret("$argon2id$".to_owned(), Timestamp::now(), None);
    document
}

/// As a broker writes it: the MAC is made by the token.
fn signed(admin: &Admin, number: u8, revision: u64, document: Vec<u8>) -> ClientRow {
    let key = WrappingKeyId::from_slice(admin.key_ids().unwrap()[0].as_bytes()).unwrap();
    let mut row = ClientRow {
        id: ClientId::from_bytes([number; 16]),
        revision,
        document,
        mac: [0; 32],
        key,
        created: Timestamp::now(),
        updated: Timestamp::now(),
    };
    row.mac = admin.mac(key, &row.mac_message()).unwrap();
    row
}

/// Five clients, of which the second has a second revision, and the last one a document that no broker writes.
async fn fill(store: &dyn Store, admin: &Admin) {
    for number in 1..=4 {
        let row = signed(admin, number, 1, document(number).to_bytes().unwrap());
        store.insert_client(&row, CallId::fresh()).await.unwrap();
    }
    let row = signed(admin, 2, 2, document(2).to_bytes().unwrap());
    store.update_client(&row, None).await.unwrap();
    let row = signed(admin, 5, 1, b"{\"label\": \"x\"}".to_vec());
    store.insert_client(&row, CallId::fresh()).await.unwrap();
}

fn with_clients() -> Site {
    let site = Site::fresh(Options::default());
    let config = Config::load(&site.configuration_file()).unwrap();
    let pin = PinSource::File(config.token().pin_file.clone().unwrap());
    let state = StateDirectory::below(&config.audit.directory);
    let program = Path::new(env!("CARGO_BIN_EXE_keybroker"));
    let admin = Admin::open(program, config.token(), &state, &pin, false, &[]).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let store = store::open(&config.store).await.unwrap();
        fill(&*store, &admin).await;
        store.close().await;
    });
    site
}

fn check(site: &Site) -> (Option<i32>, Value) {
    let finished = site.run(&["-o", "json", "store", "check"]);
    let report = serde_json::from_str(&finished.stdout);
    (
        finished.code,
        report.unwrap_or_else(|error| panic!("{error}: {finished:#?}")),
    )
}

/// The problem and the revision by the first byte of the client's id.
fn by_client(report: &Value) -> BTreeMap<&str, (&str, Option<u64>)> {
    let findings = report["findings"].as_array().unwrap();
    assert_eq!(report["bad"], findings.len());
    let found = findings.iter().map(|finding| {
        assert_eq!(finding["record_id"], Value::Null);
        let id = finding["client_id"].as_str().unwrap_or("none!");
        let problem = finding["problem"].as_str().unwrap();
        (&id[..2], (problem, finding["revision"].as_u64()))
    });
    found.collect()
}

#[test]
fn every_bad_client_is_named_and_nothing_is_changed() {
    let site = with_clients();
    let damaged = ("05", ("document-unreadable", Some(1)));
    let (code, report) = check(&site);
    assert_eq!((code, &report["clients"]), (Some(12), &5.into()));
    assert_eq!(by_client(&report), [damaged].into());
    site.sql("DELETE FROM clients WHERE client_id = x'05050505050505050505050505050505'");
    let (code, report) = check(&site);
    assert_eq!((code, &report["bad"]), (Some(0), &0.into()), "{report}");

    let id = |number: u8| format!("x'{}'", hex::encode([number; 16]));
    let role = "CAST(replace(CAST(document AS TEXT), 'client', 'Client') AS BLOB)";
    let damages = [
        (
            "document = CAST('garbage' AS BLOB)",
            "document-unreadable",
            Some(1),
        ),
        ("document = zeroblob(32769)", "client-unreadable", None),
        ("mac = x'01'", "client-unreadable", None),
        ("mac = zeroblob(32)", "mac-refused", Some(1)),
        (&format!("document = {role}"), "mac-refused", Some(1)),
        ("revision = 7", "mac-refused", Some(7)),
        ("revision = -1", "client-unreadable", None),
        ("key_id = zeroblob(16)", "wrapping-key-unknown", Some(1)),
        // The document and the MAC of another client.
        (
            &format!(
                "(document, mac) = (SELECT document, mac FROM clients WHERE client_id = {})",
                id(3)
            ),
            "mac-refused",
            Some(1),
        ),
    ];
    for (damage, problem, revision) in damages {
        site.sql(&format!(
            "CREATE TABLE kept AS SELECT * FROM clients; PRAGMA ignore_check_constraints = ON; \
             UPDATE clients SET {damage} WHERE client_id = {}",
            id(1)
        ));
        let before = site.sql(".dump");
        let (code, report) = check(&site);
        assert_eq!(
            (code, &report["clients"]),
            (Some(12), &4.into()),
            "{damage}"
        );
        assert_eq!(
            by_client(&report),
            [("01", (problem, revision))].into(),
            "{damage}"
        );
        assert_eq!(site.sql(".dump"), before);
        site.sql("DELETE FROM clients; INSERT INTO clients SELECT * FROM kept; DROP TABLE kept");
    }
    let (code, report) = check(&site);
    assert_eq!((code, &report["bad"]), (Some(0), &0.into()), "{report}");

    // Whoever has no id is counted all the same.
    site.sql(&format!(
        "PRAGMA ignore_check_constraints = ON; UPDATE clients SET client_id = x'01' WHERE client_id = {}",
        id(1)
    ));
    let table = site.run(&["store", "check"]);
    assert_eq!(table.code, Some(12));
    assert!(table.stdout.contains("client-unreadable"), "{table:#?}");
    assert!(table.stdout.contains("clients.client_id"), "{table:#?}");
    assert!(table.stderr.contains("4 API clients"), "{table:#?}");
}

#[test]
fn a_copy_takes_the_clients_along_and_verifies_them() {
    let site = with_clients();
    let (file, url) = copy::another(&site);
    let finished = site.run(&["-o", "json", "store", "copy", "--to", &url]);
    // The one that is bad is copied as it is, and named.
    assert_eq!(finished.code, Some(12), "{finished:#?}");
    let report: Value = serde_json::from_str(&finished.stdout).unwrap();
    assert_eq!((&report["clients"], &report["bad"]), (&5.into(), &1.into()));
    let dump = "SELECT hex(client_id), revision, hex(document), hex(mac), hex(key_id), created_us, updated_us \
                FROM clients ORDER BY 1";
    let output = Command::new("sqlite3")
        .arg(file)
        .arg(dump)
        .output()
        .unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), site.sql(dump));
}
