//! Documents that name code, and code that names documents, agree.

#![allow(
    clippy::unwrap_used,
    reason = "a test that meets a surprise stops there"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use keybroker::config::Config;
use keybroker_broker::NoticeEvent;
use keybroker_core::{
    alert::Alert,
    error::Reason,
    key::{KeyUse, Purpose, WrappingKeyState},
};
use keybroker_pkcs11::{NEGATIVE_TESTS, attribute_check::EXCEPTIONS};

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
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

/// Every page of the repository, by its path from the root.
fn pages() -> Vec<String> {
    let mut pages = Vec::new();
    let mut folders = vec![String::new()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(root().join(&folder)).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            let path = if folder.is_empty() {
                name.clone()
            } else {
                format!("{folder}/{name}")
            };
            let is_ours = !name.starts_with('.') && name != "target";
            if entry.file_type().unwrap().is_dir() && is_ours {
                folders.push(path);
            } else if Path::new(&name)
                .extension()
                .is_some_and(|extension| extension == "md")
            {
                pages.push(path);
            }
        }
    }
    pages
}

/// The text of every Rust file below a folder, by its path from the root.
fn sources(folder: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(root().join(&folder)).unwrap() {
            let entry = entry.unwrap();
            let path = format!("{folder}/{}", entry.file_name().to_str().unwrap());
            if entry.file_type().unwrap().is_dir() {
                folders.push(path);
            } else if Path::new(&path)
                .extension()
                .is_some_and(|extension| extension == "rs")
            {
                let text = read(&path);
                found.push((path, text));
            }
        }
    }
    found
}

/// Words in back quotes.
fn code_words(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// The fields that a table of the configuration accepts, as the parser itself lists them.
fn settings(table: &str) -> BTreeSet<String> {
    let error = Config::parse(&format!("{table}\nno_such_setting = 1\n")).unwrap_err();
    let text = error.to_string();
    let words = code_words(&text);
    assert_eq!(words.first(), Some(&"no_such_setting"), "{table}: {text}");
    words[1..].iter().map(ToString::to_string).collect()
}

/// The settings that the example writes or shows in a comment, by their table.
fn settings_of_the_example() -> BTreeMap<String, BTreeSet<String>> {
    let mut tables: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut table = String::new();
    for line in read("keybroker.example.toml").lines() {
        let line = line.strip_prefix("#: ").unwrap_or(line);
        if line.starts_with('[') {
            line.trim_matches(['[', ']']).clone_into(&mut table);
            tables.entry(table.clone()).or_default();
            continue;
        }
        let line = line.strip_prefix("# ").unwrap_or(line);
        let Some((name, _)) = line.split_once(" = ") else {
            continue;
        };
        if name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c == '_' || c.is_ascii_digit())
        {
            tables.get_mut(&table).unwrap().insert(name.to_owned());
        }
    }
    tables
}

/// The example is the manual: it has every setting of every table, and no other.
#[test]
fn the_example_configuration_has_every_setting_and_no_other() {
    let example = settings_of_the_example();
    let tables = [
        ("token", "[token]"),
        ("store", "[store]"),
        ("audit", "[audit]"),
        ("status", "[status]"),
        ("policy", "[policy]"),
        ("limits", "[limits]"),
        ("rates", "[rates]"),
        ("rest", "[rest]"),
        ("client_credentials", "[client_credentials]"),
        ("wrapping_keys", "[wrapping_keys]"),
        ("release", "[release]"),
        ("bitwarden_organization", "[[bitwarden_organization]]"),
        ("approvals", "[approvals]"),
        ("approvals.person", "[[approvals.person]]"),
        ("devices", "[devices]"),
        ("network", "[[network]]"),
        ("notices", "[notices]"),
        ("console", "[console]"),
        ("listener", "[[listener]]"),
        ("listener.tls", "[[listener]]\n[listener.tls]"),
        ("principal", "[[principal]]"),
        ("issuer", "[[issuer]]"),
        ("issuer.mapping", "[[issuer]]\n[[issuer.mapping]]"),
    ];
    let mut count = 0;
    for (name, header) in tables {
        let mut accepted = settings(header);
        // Tables of their own.
        if name == "token" {
            assert!(accepted.remove("environment"));
        }
        if name == "approvals" {
            assert!(accepted.remove("person"));
        }
        if name == "issuer" {
            assert!(accepted.remove("mapping"));
        }
        if name == "listener" {
            assert!(accepted.remove("tls"));
            assert!(accepted.remove("doors"), "the earlier name of `apis`");
        }
        assert_eq!(example[name], accepted, "[{name}]");
        count += accepted.len();
    }
    assert!(count > 60, "only {count} settings");
    let mut known: BTreeSet<&str> = tables.iter().map(|(name, _)| *name).collect();
    known.insert("token.environment");
    let shown: BTreeSet<&str> = example.keys().map(String::as_str).collect();
    assert_eq!(shown, known);
    let top: BTreeSet<String> = settings("");
    let sections: BTreeSet<String> = tables
        .iter()
        .map(|(name, _)| (*name).to_owned())
        .filter(|name| !name.contains('.'))
        .collect();
    assert_eq!(top, sections);
}

/// The first column of the table of fields, without its header.
fn rows_of_the_audit_page() -> Vec<(Vec<String>, String)> {
    read("docs/audit.md")
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once(" | "))
        .map(|(names, rest)| {
            let first = format!("`{names}");
            let names = code_words(&first).iter().map(ToString::to_string).collect();
            (names, rest.to_owned())
        })
        .collect()
}

/// Every action that the audit log can hold is on its page, and each that the page has is written somewhere.
#[test]
fn the_audit_page_has_every_action_and_no_other() {
    const SUBJECTS: [&str; 17] = [
        "access_request",
        "device",
        "approval",
        "bitwarden",
        "organization_key",
        "user_key",
        "wrapping_key",
        "token",
        "audit",
        "client_credential",
        "connection",
        "alarm",
        "store",
        "bench",
        "ceremony",
        "segment",
        "log",
    ];
    let mut written = BTreeSet::new();
    let files = sources("src");
    // The events of notices have names of their own.
    let others = ["/tests", "broker/src/notices.rs"];
    let is_other = |path: &str| others.iter().any(|other| path.contains(other));
    for (_, text) in files.iter().filter(|(path, _)| !is_other(path)) {
        let code = text.split("#[cfg(test)]").next().unwrap();
        for part in code.split('"') {
            let Some((subject, verb)) = part.split_once('.') else {
                continue;
            };
            let is_verb =
                !verb.is_empty() && verb.chars().all(|c| c.is_ascii_lowercase() || c == '_');
            if is_verb && SUBJECTS.contains(&subject) {
                written.insert(part.to_owned());
            }
        }
    }
    let rows = rows_of_the_audit_page();
    let (_, actions) = rows.iter().find(|(names, _)| names == &["action"]).unwrap();
    let mut documented = BTreeSet::new();
    let mut subject = "";
    for word in code_words(actions) {
        if let Some(verb) = word.strip_prefix('.') {
            documented.insert(format!("{subject}.{verb}"));
        } else {
            subject = word.split('.').next().unwrap();
            documented.insert(word.to_owned());
        }
    }
    assert!(documented.len() > 30, "{documented:?}");
    assert_eq!(documented, written);
}

/// Every event of a notice is in the table of the page about devices, and no other.
#[test]
fn the_page_about_devices_has_every_event_and_no_other() {
    let page = read("docs/devices.md");
    let (_, table) = page.split_once("| Event in `type` | When |").unwrap();
    let rows = table
        .lines()
        .skip(2)
        .take_while(|line| line.starts_with('|'));
    let documented: Vec<&str> = rows.map(|row| code_words(row)[0]).collect();
    assert_eq!(documented, NoticeEvent::ALL.map(NoticeEvent::as_str));
}

/// Every field of an entry is on the page of the audit log, and no other.
#[test]
fn the_audit_page_has_every_field_and_no_other() {
    let code = read("src/audit/src/line.rs");
    let body = code.split("pub(super) fn encode").nth(1).unwrap();
    let body = body.split("\n}").next().unwrap();
    let written: BTreeSet<String> = body
        .split("(\"")
        .skip(1)
        .map(|part| part.split('"').next().unwrap().to_owned())
        .collect();
    let documented: BTreeSet<String> = rows_of_the_audit_page()
        .into_iter()
        .flat_map(|(names, _)| names)
        .collect();
    assert!(written.len() > 15, "{written:?}");
    assert_eq!(documented, written);
}

/// A file that says that it carries a mitigation is named there by the threat model.
#[test]
fn every_cited_mitigation_names_the_file() {
    let model = read("THREAT_MODEL.md");
    let mut cited = 0;
    for (path, text) in sources("src") {
        let lines = text
            .lines()
            .filter(|line| line.starts_with("//! Mitigation"));
        for number in lines.flat_map(|line| line.split(|c: char| !c.is_ascii_alphanumeric())) {
            let is_number = number
                .strip_prefix('M')
                .is_some_and(|rest| !rest.is_empty() && rest.chars().all(|c| c.is_ascii_digit()));
            if !is_number {
                continue;
            }
            let item = model.split(&format!("\n- **{number}**")).nth(1);
            let item = item.unwrap_or_else(|| panic!("{path} cites {number}, which is not there"));
            let item = item.split("\n- **").next().unwrap();
            let is_named = item.contains(&format!("`{path}`"));
            assert!(is_named, "{number} of THREAT_MODEL.md does not name {path}");
            cited += 1;
        }
    }
    assert!(cited > 30, "only {cited} citations");
}

/// The headings of a page, as the hosting service names them in links.
fn anchors(page: &str) -> BTreeSet<String> {
    let mut is_code = false;
    let headings = page.lines().filter_map(|line| {
        is_code ^= line.trim_start().starts_with("```");
        let heading = line.trim_start_matches('#').strip_prefix(' ')?;
        (line.starts_with('#') && !is_code).then(|| heading.trim().to_lowercase())
    });
    headings
        .map(|heading| {
            let kept = heading
                .chars()
                .filter(|c| c.is_alphanumeric() || " -_".contains(*c));
            kept.map(|c| if c == ' ' { '-' } else { c }).collect()
        })
        .collect()
}

/// Links between the documents lead to files, and to headings that are there.
#[test]
fn links_lead_to_files_and_headings() {
    let pages = pages();
    assert!(pages.len() > 15, "{pages:?}");
    let mut headings = 0;
    for document in &pages {
        let folder = Path::new(document).parent().unwrap().to_owned();
        let text = read(document);
        for link in text.split("](").skip(1) {
            let link = link.split([')', ' ']).next().unwrap();
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            if file.starts_with("http") {
                continue;
            }
            let path = if file.is_empty() {
                root().join(document)
            } else {
                root().join(&folder).join(file)
            };
            assert!(path.exists(), "{document} links to {file}");
            if heading.is_empty() {
                continue;
            }
            let page = fs::read_to_string(&path).unwrap();
            assert!(
                anchors(&page).contains(heading),
                "{document} links to {link}"
            );
            headings += 1;
        }
    }
    assert!(headings > 10, "only {headings} links to headings");
}

/// The page of wrapping keys has the table of what each state allows, and the table of transitions.
#[test]
fn the_page_of_wrapping_keys_has_the_states_and_transitions_of_the_code() {
    let page = read("docs/keys.md");
    let table = |heading: &str| -> Vec<String> {
        let rows = page.lines().skip_while(|line| !line.starts_with(heading));
        let rows = rows.skip(2).take_while(|line| line.starts_with('|'));
        rows.map(str::to_owned).collect()
    };
    let allowed = WrappingKeyState::ALL.map(|state| {
        let cells = KeyUse::ALL.map(|one| if state.allows(one) { "yes" } else { "no" });
        format!("| {state} | {} |", cells.join(" | "))
    });
    let heading = "| State | Wrap | Unwrap | Verify MACs | Make MACs | Source of a re-wrap | Source of a re-wrap of listed rows |";
    assert_eq!(table(heading), allowed);
    let transitions = WrappingKeyState::ALL.map(|from| {
        let next: Vec<&str> = from.next().iter().map(|state| state.as_str()).collect();
        format!("| {from} | {} |", next.join(", ")).replace("|  |", "| |")
    });
    assert_eq!(table("| From | To |"), transitions);
}

/// The table of alerts is the list in the code, each alert has a section, and no log line has an alert that is not on the list.
#[test]
fn the_operations_guide_has_every_alert_and_no_other() {
    let guide = read("docs/operations.md");
    let row = |alert: Alert| {
        let (name, severity) = (alert.name(), alert.severity().name());
        format!("| [`{name}`](#{name}) | {severity} | {} |", alert.meaning())
    };
    let table: Vec<&str> = guide
        .lines()
        .skip_while(|line| *line != "| Alert | Severity | Meaning |")
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .collect();
    assert_eq!(table, Alert::ALL.map(row));
    let sections: Vec<&str> = guide
        .lines()
        .filter_map(|line| line.strip_prefix("### `")?.strip_suffix('`'))
        .collect();
    assert_eq!(sections, Alert::ALL.map(Alert::name));
    for (path, text) in sources("src") {
        if path.ends_with("core/src/alert.rs") {
            continue;
        }
        for field in ["alarm = ", "alert = \"", "alert = %"] {
            assert!(
                !text.contains(field),
                "{path}: use `keybroker_core::alert!`"
            );
        }
    }
}

/// Each alert is raised by some part of the product: with the macro, or as a decision of the supervisor.
#[test]
fn every_alert_is_raised_somewhere() {
    let product: String = sources("src")
        .into_iter()
        .filter(|(path, _)| !path.ends_with("core/src/alert.rs") && !path.contains("tests"))
        .flat_map(|(_, text)| {
            text.split_whitespace()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        })
        .collect();
    for alert in Alert::ALL {
        let ways = [
            format!("alert!({alert:?},"),
            format!("Action::Alert(Alert::{alert:?},"),
        ];
        assert!(
            ways.iter().any(|way| product.contains(way)),
            "nothing raises {}",
            alert.name()
        );
    }
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

/// The page for HSM administrators lists the risk of each exception, and the consequence of each failed negative test.
#[test]
fn the_page_of_tokens_has_every_exception_and_every_negative_test() {
    let page = read("docs/tokens.md");
    let rows = |start: &str| -> Vec<String> {
        page.lines()
            .skip_while(|line| !line.starts_with(start))
            .skip(2)
            .take_while(|line| line.starts_with('|'))
            .map(str::to_owned)
            .collect()
    };
    let exceptions: Vec<String> = EXCEPTIONS
        .iter()
        .map(|exception| format!("| `{}` | {} |", exception.attribute, exception.gives_away))
        .collect();
    assert_eq!(rows("| Attribute | Risk of the exception"), exceptions);
    let tests: Vec<String> = NEGATIVE_TESTS
        .iter()
        .map(|test| {
            let only = match (test.changes_the_key, test.purpose) {
                (true, _) => " (throwaway keys only)",
                (false, Some(Purpose::Plain)) => " (plain wrapping keys only)",
                (false, Some(Purpose::Sealed)) => " (sealed wrapping keys only)",
                (false, None) => "",
            };
            let accepted_by = test
                .accepted_by
                .map_or_else(String::new, |exception| format!("`{exception}` "));
            format!(
                "| `{}` | {}{only} | {accepted_by}|",
                test.name, test.meaning
            )
        })
        .collect();
    assert_eq!(rows("| Test | Forbidden behaviour"), tests);
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

/// The files of `docs/performance` with this extension: the results of the measurements and their charts.
fn performance_files(extension: &str) -> Vec<PathBuf> {
    let files = fs::read_dir(root().join("docs/performance")).unwrap();
    let paths = files.map(|file| file.unwrap().path());
    paths
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .collect()
}

/// The tables and charts are those that `bench-report` makes from the documents; `scripts/performance.sh --tables` renews them.
#[test]
fn the_tables_and_charts_of_the_performance_page_are_those_of_its_documents() {
    let made = tempfile::tempdir().unwrap();
    let documents = performance_files("json");
    assert!(documents.len() >= 7, "{documents:?}");
    let status = Command::new(env!("CARGO_BIN_EXE_keybroker"))
        .arg("bench-report")
        .args(&documents)
        .arg("--out")
        .arg(made.path())
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    let page = read("docs/performance.md");
    let (mut tables, mut charts) = (0, BTreeSet::new());
    for file in fs::read_dir(made.path()).unwrap() {
        let path = file.unwrap().path();
        let (name, stem) = (path.file_name().unwrap(), path.file_stem().unwrap());
        let (name, stem) = (name.to_str().unwrap(), stem.to_str().unwrap());
        let text = fs::read_to_string(&path).unwrap();
        if name == format!("{stem}.md") {
            let begin = format!("<!-- table: {stem} -->\n");
            let shown = page
                .split(&begin)
                .nth(1)
                .unwrap_or_else(|| panic!("no place for {stem}"));
            let shown = shown.split("<!-- end of table -->").next().unwrap();
            assert_eq!(shown, text, "{stem}");
            tables += 1;
        } else {
            assert_eq!(read(&format!("docs/performance/{name}")), text, "{name}");
            assert!(
                page.contains(&format!("(performance/{name})")),
                "{name} is not shown"
            );
            charts.insert(name.to_owned());
        }
    }
    assert_eq!(tables, page.matches("<!-- table: ").count());
    let committed = performance_files("svg").into_iter();
    let committed: BTreeSet<String> = committed
        .map(|path| path.file_name().unwrap().to_str().unwrap().to_owned())
        .collect();
    assert_eq!(committed, charts);
}

/// Every field of the documents is explained.
#[test]
fn the_performance_page_explains_every_field_of_the_documents() {
    let text = read("docs/performance.md") + &read("docs/cli.md");
    let explained: BTreeSet<&str> = code_words(&text).into_iter().collect();
    let mut fields = BTreeSet::new();
    for path in performance_files("json") {
        let document: serde_json::Value =
            serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
        let timeline = document.get("timeline").and_then(|rows| rows.as_array());
        let rows = document["rows"]
            .as_array()
            .into_iter()
            .chain(timeline)
            .flatten();
        let objects = rows.chain([&document, &document["machine"], &document["token"]]);
        fields.extend(objects.flat_map(|object| object.as_object().unwrap().keys().cloned()));
    }
    assert!(fields.len() > 60, "{fields:?}");
    let missing: Vec<&String> = fields
        .iter()
        .filter(|field| !explained.contains(field.as_str()))
        .collect();
    assert_eq!(missing, Vec::<&String>::new());
}
