//! Documents that name code, and code that names documents, agree.

#![allow(
    clippy::unwrap_used,
    reason = "a test that meets a surprise stops there"
)]

use std::{fs, path::Path};

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
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

/// Links between the documents lead somewhere.
#[test]
fn links_lead_to_files() {
    for document in ["README.md", "softhsm/README.md"] {
        let folder = Path::new(document).parent().unwrap().to_owned();
        for part in read(document).split("](").skip(1) {
            let target = part.split(')').next().unwrap();
            if target.starts_with("http") || target.starts_with('#') {
                continue;
            }
            let path = Path::new(env!("CARGO_MANIFEST_DIR"))
                .join(&folder)
                .join(target);
            assert!(path.exists(), "{document} links to {target}");
        }
    }
}
