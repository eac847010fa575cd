//! Documents that name code, and code that names documents, agree.

#![allow(
    clippy::unwrap_used,
    reason = "a test that meets a surprise stops there"
)]

use std::{collections::BTreeSet, fs, path::Path};

use keybroker_core::error::Reason;

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join(path)).unwrap()
}

/// Every mitigation of the threat model names its files, and each of them says which mitigations it carries.
#[test]
fn mitigations_and_code_name_each_other() {
    let model = read("THREAT_MODEL.md");
    let section = model.split("## Mitigations").nth(1).unwrap();
    let section = section.split("\n## ").next().unwrap();
    let mut mitigations = 0;
    for item in section.split("\n- **").skip(1) {
        let number = item.split("**").next().unwrap();
        let files: Vec<&str> = item
            .split('`')
            .filter(|word| word.starts_with("src/"))
            .collect();
        assert!(!files.is_empty(), "{number} names no file");
        for file in files {
            let cited = read(file).lines().any(|line| {
                line.starts_with("//! Mitigation")
                    && line
                        .split(|c: char| !c.is_ascii_alphanumeric())
                        .any(|word| word == number)
            });
            assert!(cited, "{file} does not cite {number}");
        }
        mitigations += 1;
    }
    assert!(
        mitigations >= 16,
        "only {mitigations} mitigations were read"
    );
}

/// Every test that the page of earlier mistakes names exists.
#[test]
fn the_page_of_earlier_mistakes_names_tests_that_exist() {
    let mut tests = String::new();
    let mut folders = vec!["src", "tests"]
        .into_iter()
        .map(|name| Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join(name))
        .collect::<Vec<_>>();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                tests += &fs::read_to_string(path).unwrap();
            }
        }
    }
    let page = read("docs/predecessors.md");
    let mut named = 0;
    for row in page
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| Reported"))
    {
        let last = row.trim_end_matches(" |").rsplit(" | ").next().unwrap();
        let names: Vec<&str> = last.split('`').skip(1).step_by(2).collect();
        assert!(!names.is_empty(), "no test: {row}");
        for name in names {
            let found = tests.contains(&format!("fn {name}("));
            assert!(found, "{name} of docs/predecessors.md is not a test");
            named += 1;
        }
    }
    assert!(named >= 20, "only {named} tests are named");
}

/// Links between the documents lead somewhere.
#[test]
fn links_lead_to_files() {
    let documents = [
        "README.md",
        "softhsm/README.md",
        "docs/operations.md",
        "docs/identity.md",
        "THREAT_MODEL.md",
        "deploy/kubernetes/README.md",
    ];
    for document in documents {
        let folder = Path::new(document).parent().unwrap().to_owned();
        for part in read(document).split("](").skip(1) {
            let target = part.split([')', '#']).next().unwrap();
            if target.starts_with("http") || target.is_empty() {
                continue;
            }
            let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
                .join(&folder)
                .join(target);
            assert!(path.exists(), "{document} links to {target}");
        }
    }
}

/// Whoever is woken by an alarm finds a section of that name.
#[test]
fn the_operations_guide_has_every_alarm_and_no_other() {
    let mut alarms = BTreeSet::new();
    let mut folders = vec![Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join("src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            // The descriptor set of the API is binary.
            if path
                .extension()
                .is_some_and(|extension| extension == "binpb")
            {
                continue;
            }
            let text = fs::read_to_string(path).unwrap();
            for part in text.split("alarm = \"").skip(1) {
                alarms.insert(part.split('"').next().unwrap().to_owned());
            }
        }
    }
    assert!(alarms.len() >= 9, "{alarms:?}");
    let guide = read("docs/operations.md");
    let documented: BTreeSet<String> = guide
        .lines()
        .filter_map(|line| line.strip_prefix("### `")?.strip_suffix('`'))
        .map(str::to_owned)
        .collect();
    assert_eq!(documented, alarms);
}

/// Whoever sees a reason finds what to do about it, here and in the reference.
#[test]
fn the_operations_guide_has_every_reason_and_no_other() {
    let expected: Vec<&str> = Reason::ALL.iter().map(|reason| reason.as_str()).collect();
    for page in ["docs/operations.md", "docs/errors.md"] {
        let text = read(page);
        let documented: Vec<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
            .filter(|word| word.chars().all(|c| c.is_ascii_uppercase() || c == '_'))
            .collect();
        assert_eq!(documented, expected, "{page}");
    }
}

/// `docs/metrics.md` lists each metric as the code declares it, and no other; and no part of the code makes one that is not declared.
#[test]
fn the_page_of_metrics_has_every_metric_and_no_other() {
    let declared: Vec<String> = keybroker_core::metrics::ALL
        .iter()
        .map(|metric| {
            let labels = metric.labels();
            let labels: Vec<String> = labels.iter().map(|label| format!("`{label}`")).collect();
            format!(
                "| `{}` | {} | {} | {} |",
                metric.name(),
                metric.kind(),
                labels.join(", "),
                metric.help()
            )
        })
        .collect();
    let page = read("docs/metrics.md");
    let documented: Vec<&str> = page
        .lines()
        .filter(|line| line.starts_with("| `keybroker_"))
        .collect();
    assert_eq!(documented, declared);
    for document in [
        "docs/operations.md",
        "docs/identity.md",
        "docs/clients.md",
        "docs/cli.md",
    ] {
        let text = read(document);
        for word in text.split(|c: char| !(c.is_ascii_lowercase() || c == '_')) {
            let is_metric = ["_total", "_seconds"].iter().any(|end| word.ends_with(end));
            let is_known = keybroker_core::metrics::ALL
                .iter()
                .any(|metric| metric.name() == word);
            assert!(
                !word.starts_with("keybroker_") || !is_metric || is_known,
                "{document} names {word}"
            );
        }
    }
    let mut folders = vec![Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join("src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                for made in ["counter!(", "gauge!(", "histogram!("] {
                    assert!(!text.contains(made), "{} has {made}", path.display());
                }
            }
        }
    }
}
