//! The crates depend on each other and on the libraries of the outside world as the table in `ARCHITECTURE.md` says.
//!
//! A foreign type in the wrong crate does not compile, because the library is no dependency there. This test keeps the
//! manifests to the table, so that adding the dependency is noticed as well.

#![allow(
    clippy::unwrap_used,
    reason = "a test that meets a surprise stops there"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::Command,
};

use serde_json::{Value, json};

const HEADING: &str = "| Crate | Purpose | Crates it uses | Restricted libraries it uses |";

type Names = BTreeSet<String>;

/// A row of the table.
#[derive(Debug, PartialEq, Eq)]
struct Row {
    ours: Names,
    restricted: Names,
}

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

fn code_words(cell: &str) -> Names {
    let words = cell.split('`').skip(1).step_by(2);
    words.map(str::to_owned).collect()
}

fn table() -> BTreeMap<String, Row> {
    let page = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let (_, rows) = page.split_once(HEADING).expect("the table of crates");
    rows.lines()
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .map(|line| {
            let cells: Vec<&str> = line.trim_matches('|').split('|').collect();
            let [name, _, ours, restricted] = cells[..] else {
                panic!("a row has four cells: {line}");
            };
            let name = code_words(name).pop_first().expect("the name of a crate");
            let row = Row {
                ours: code_words(ours),
                restricted: code_words(restricted),
            };
            (name, row)
        })
        .collect()
}

fn metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--no-deps",
            "--offline",
            "--format-version",
            "1",
        ])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The short name of a crate of ours: that of its directory.
fn short(package: &str) -> &str {
    package.strip_prefix("keybroker-").unwrap_or(package)
}

/// Every difference between manifests and table. Dependencies of tests and build scripts are not part of a crate.
fn differences(metadata: &Value, table: &BTreeMap<String, Row>) -> Vec<String> {
    let restricted: Names = table
        .values()
        .flat_map(|row| row.restricted.clone())
        .collect();
    let mut found = Vec::new();
    let mut seen = Names::new();
    for package in metadata["packages"].as_array().unwrap() {
        // Support for the tests is no part of the product.
        if package["manifest_path"]
            .as_str()
            .unwrap()
            .contains("/tests/")
        {
            continue;
        }
        let name = short(package["name"].as_str().unwrap());
        seen.insert(name.to_owned());
        let Some(row) = table.get(name) else {
            found.push(format!("{name} is not in the table"));
            continue;
        };
        let dependencies: Vec<&Value> = package["dependencies"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|dependency| dependency["kind"].is_null())
            .collect();
        let named = |ours: bool| -> Names {
            let chosen = dependencies
                .iter()
                .filter(|dependency| dependency["path"].is_null() != ours);
            chosen
                .map(|dependency| short(dependency["name"].as_str().unwrap()).to_owned())
                .collect()
        };
        let used = Row {
            ours: named(true),
            restricted: named(false).intersection(&restricted).cloned().collect(),
        };
        if used != *row {
            found.push(format!("{name} uses {used:?}, the table says {row:?}"));
        }
    }
    found.extend(
        table
            .keys()
            .filter(|name| !seen.contains(*name))
            .map(|name| format!("there is no crate {name}")),
    );
    found
}

#[test]
fn crates_depend_on_each_other_and_on_libraries_as_the_table_says() {
    assert_eq!(differences(&metadata(), &table()), Vec::<String>::new());
}

#[test]
fn a_planted_dependency_is_found() {
    let table = table();
    for (crate_name, dependency) in [
        (
            "keybroker-broker",
            json!({"name": "sqlx", "kind": null, "path": null}),
        ),
        (
            "keybroker-pkcs11",
            json!({"name": "cryptoki-sys", "kind": null, "path": null}),
        ),
        (
            "keybroker-store",
            json!({"name": "cryptoki", "kind": null, "path": null}),
        ),
        (
            "keybroker-hsm",
            json!({"name": "cryptoki", "kind": null, "path": null}),
        ),
        (
            "keybroker-hsm",
            json!({"name": "keybroker-pkcs11", "kind": null, "path": "/pkcs11"}),
        ),
        (
            "keybroker-pkcs11",
            json!({"name": "keybroker-hsm", "kind": null, "path": "/hsm"}),
        ),
        (
            "keybroker-worker-protocol",
            json!({"name": "cryptoki", "kind": null, "path": null}),
        ),
        (
            "keybroker-core",
            json!({"name": "keybroker-store", "kind": null, "path": "/store"}),
        ),
        (
            "keybroker-audit",
            json!({"name": "hyper", "kind": null, "path": null}),
        ),
    ] {
        let mut planted = metadata();
        let package = planted["packages"]
            .as_array_mut()
            .unwrap()
            .iter_mut()
            .find(|package| package["name"] == crate_name)
            .unwrap();
        package["dependencies"]
            .as_array_mut()
            .unwrap()
            .push(dependency.clone());
        let found = differences(&planted, &table);
        assert_eq!(found.len(), 1, "{dependency}: {found:?}");
        assert!(found[0].starts_with(short(crate_name)), "{found:?}");
    }
}

/// What the manifests cannot say: a word, the places where it may stand, and why.
const CALL_SITES: [(&str, &[&str], &str); 10] = [
    (
        "cryptoki::",
        &["src/pkcs11/", "src/pkcs11-ffi/"],
        "only the crate of the worker process knows PKCS#11",
    ),
    (
        "unsafe {",
        &["src/pkcs11-ffi/src/calls.rs"],
        "only the calls that cryptoki cannot make are unsafe",
    ),
    (
        "unsafe_code",
        &[],
        "the manifests decide where unsafe code is allowed",
    ),
    (
        "Principal::authenticated(",
        &["src/auth/"],
        "only auth creates a principal, from a credential",
    ),
    (
        "RsaPrivateKey",
        &[],
        "the private RSA key is on the token; only tests have one",
    ),
    (
        "keybroker_core::secret",
        &[
            "src/hsm/",
            "src/worker-protocol/",
            "src/pkcs11/",
            "src/broker/",
            "src/api/",
            "src/keybroker/src/cli/",
        ],
        "configuration and listeners never see key material",
    ),
    (
        "axum::",
        &["src/api/", "src/keybroker/src/server"],
        "only the APIs and the listeners know HTTP",
    ),
    (
        "tonic::",
        &["src/proto/", "src/client/", "src/api/"],
        "only the API and the client library know gRPC",
    ),
    (
        "service_client::",
        &["src/proto/", "src/client/"],
        "programs call a broker with the client library",
    ),
    (
        "fuzzing",
        &[
            "src/auth/src/fuzzing.rs",
            "src/auth/src/lib.rs",
            "src/api/src/fuzzing.rs",
            "src/api/src/lib.rs",
            "src/pkcs11/src/fuzzing.rs",
            "src/pkcs11/src/lib.rs",
        ],
        "only the fuzz targets call what skips checks for them",
    ),
];

/// Every word that stands where it must not. `files` are paths below the root and their texts.
fn misplaced(files: &[(String, String)]) -> Vec<String> {
    let mut found = Vec::new();
    for (path, text) in files {
        let product = text.split("#[cfg(test)]").next().unwrap_or_default();
        let code = product
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"));
        for line in code {
            for (word, places, why) in CALL_SITES {
                if line.contains(word) && !places.iter().any(|place| path.starts_with(place)) {
                    found.push(format!("{path}: {}: {why}", line.trim()));
                }
            }
        }
    }
    found
}

fn product_files() -> Vec<(String, String)> {
    let mut files = Vec::new();
    let mut directories = vec![root().join("src")];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if path.is_dir() {
                if !matches!(name, "tests" | "generated") {
                    directories.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs")
                && !matches!(name, "tests.rs" | "testing.rs" | "build.rs")
            {
                let below = path.strip_prefix(root()).unwrap().display().to_string();
                files.push((below, fs::read_to_string(&path).unwrap()));
            }
        }
    }
    files
}

#[test]
fn words_stand_where_they_may() {
    let files = product_files();
    assert!(files.len() > 150, "only {} files were read", files.len());
    assert_eq!(misplaced(&files), Vec::<String>::new());
}

#[test]
fn a_planted_word_is_found() {
    for (path, text) in [
        (
            "src/broker/src/release.rs",
            "Principal::authenticated(identity)",
        ),
        ("src/worker-protocol/src/oaep.rs", "use rsa::RsaPrivateKey;"),
        (
            "src/keybroker/src/config.rs",
            "use keybroker_core::secret::KeyMaterial;",
        ),
        ("src/hsm/src/link.rs", "use cryptoki::session::Session;"),
        ("src/pkcs11/src/keys.rs", "let list = unsafe { *list };"),
        ("src/pkcs11-ffi/src/lib.rs", "let list = unsafe { *list };"),
        ("src/core/src/lib.rs", "#![allow(unsafe_code)]"),
        ("src/broker/src/lib.rs", "use axum::Router;"),
        (
            "src/broker/src/lib.rs",
            "use keybroker_auth::{Tokens, fuzzing};",
        ),
        ("src/keybroker/src/config/check.rs", "use tonic::Status;"),
        (
            "src/keybroker/src/cli/bench/load.rs",
            "use keybroker_client::proto::user_key_service_client::UserKeyServiceClient;",
        ),
    ] {
        let planted = [(path.to_owned(), text.to_owned())];
        assert_eq!(misplaced(&planted).len(), 1, "{path}: {text}");
    }
    let innocent = [
        (
            "src/auth/src/lib.rs".to_owned(),
            "Principal::authenticated(identity)".to_owned(),
        ),
        (
            "src/worker-protocol/src/oaep.rs".to_owned(),
            "// RsaPrivateKey\n#[cfg(test)]\nmod tests { use rsa::RsaPrivateKey; }".to_owned(),
        ),
    ];
    assert_eq!(misplaced(&innocent), Vec::<String>::new());
}
