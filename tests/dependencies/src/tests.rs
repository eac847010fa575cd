use std::{error::Error as _, fs, path::Path, sync::LazyLock};

use super::*;

type Failure = Box<dyn std::error::Error>;

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

fn text() -> String {
    fs::read_to_string(root().join("deny.toml")).expect("the policy of this repository")
}

fn policy() -> Policy {
    Policy::parse(&text()).expect("the policy of this repository")
}

/// Asking Cargo takes a second, so each process asks once.
static THIS_WORKSPACE: LazyLock<Workspace> =
    LazyLock::new(|| Workspace::read(root(), &policy()).expect("cargo describes this workspace"));

#[test]
fn this_workspace_keeps_to_the_policy() {
    let workspace = &*THIS_WORKSPACE;
    assert!(workspace.packages.len() > 300, "the tree is incomplete");
    assert!(workspace.locked.len() >= workspace.packages.len());
    assert_eq!(violations(&policy(), workspace), Vec::<String>::new());
}

/// Adds one mistake to the facts about this workspace and expects exactly one violation.
fn only_violation(plant: impl FnOnce(&mut Workspace)) -> String {
    let mut workspace = THIS_WORKSPACE.clone();
    plant(&mut workspace);
    let found = violations(&policy(), &workspace);
    assert_eq!(found.len(), 1, "{found:?}");
    found.into_iter().next().unwrap_or_default()
}

fn crate_with(name: &str, licence: &str) -> Package {
    Package {
        name: name.to_owned(),
        version: "v1.0.0".to_owned(),
        licence: licence.to_owned(),
    }
}

#[test]
fn each_banned_crate_is_found() {
    for name in ["ring", "openssl-sys", "openssl", "native-tls"] {
        let violation = only_violation(|workspace| {
            workspace.packages.insert(crate_with(name, "MIT"));
        });
        assert_eq!(violation, format!("{name} v1.0.0: the crate is banned"));
    }
}

#[test]
fn licences_that_are_not_allowed_are_found() {
    for (licence, violation) in [
        ("GPL-3.0-only", "licence GPL-3.0-only is not allowed"),
        (
            "MIT AND AGPL-3.0-only",
            "licence MIT AND AGPL-3.0-only is not allowed",
        ),
        ("MPL-2.0/BSL-1.0", "licence MPL-2.0/BSL-1.0 is not allowed"),
        (
            "GPL-2.0-only WITH Classpath-exception-2.0",
            "licence GPL-2.0-only WITH Classpath-exception-2.0 is not allowed",
        ),
        ("", "the manifest names no licence"),
        ("free", "licence free is no SPDX expression: unknown term"),
    ] {
        let found = only_violation(|workspace| {
            workspace.packages.insert(crate_with("planted", licence));
        });
        assert_eq!(found, format!("planted v1.0.0: {violation}"));
    }
}

#[test]
fn one_allowed_alternative_is_enough() {
    for licence in ["GPL-3.0-only OR MIT", "Unlicense/MIT", "Zlib AND ISC"] {
        assert_eq!(licence_of(licence), None);
    }
}

fn licence_of(expression: &str) -> Option<String> {
    licence(&policy(), &crate_with("planted", expression))
}

#[test]
fn sources_that_are_not_allowed_are_found() {
    for (source, expected) in [
        (
            Some("git+https://example.org/planted?rev=1#1"),
            "source git+https://example.org/planted?rev=1#1 is not allowed",
        ),
        (
            Some("registry+https://example.org/index"),
            "source registry+https://example.org/index is not allowed",
        ),
        (None, "comes from a directory outside the workspace"),
    ] {
        let found = only_violation(|workspace| {
            workspace.locked.push(Locked {
                name: "planted".to_owned(),
                version: "1.0.0".to_owned(),
                source: source.map(str::to_owned),
            });
        });
        assert_eq!(found, format!("planted 1.0.0: {expected}"));
    }
}

#[test]
fn wildcards_are_found_except_between_private_crates() {
    let dependency = |is_path| Dependency {
        name: "planted".to_owned(),
        requirement: "*".to_owned(),
        is_path,
    };
    let member = |private, is_path| Member {
        name: "ours".to_owned(),
        private,
        dependencies: vec![dependency(is_path)],
    };
    let violation = "ours: dependency planted has no version requirement";
    for (private, is_path) in [(true, false), (false, true), (false, false)] {
        let found = only_violation(|workspace| workspace.members.push(member(private, is_path)));
        assert_eq!(found, violation, "private {private}, path {is_path}");
    }
    assert_eq!(
        wildcards(&policy(), &member(true, true)),
        Vec::<String>::new()
    );
}

#[test]
fn settings_that_are_not_enforced_are_refused() {
    for (before, after) in [
        ("wildcards = \"deny\"", "wildcards = \"warn\""),
        (
            "multiple-versions = \"allow\"",
            "multiple-versions = \"deny\"",
        ),
        ("unknown-git = \"deny\"", "unknown-git = \"allow\""),
        ("unknown-registry = \"deny\"", "unknown-registry = \"warn\""),
        ("[bans]", "[bans]\nskip = []"),
        ("[licenses]", "[licenses]\nexceptions = []"),
        (
            "{ crate = \"ring\" }",
            "{ crate = \"ring\", wrappers = [\"rustls\"] }",
        ),
    ] {
        let changed = text().replacen(before, after, 1);
        assert_ne!(changed, text(), "{before} is not in deny.toml");
        let error = Policy::parse(&changed).expect_err(after);
        assert!(matches!(error, PolicyError::Setting(_)), "{after}: {error}");
        assert!(error.source().is_some(), "{after}");
    }
    let error = Policy::parse(&text().replacen("\"ISC\"", "\"Isc-ish\"", 1)).expect_err("ISC");
    assert!(matches!(error, PolicyError::Licence { .. }), "{error}");
}

/// A workspace on disk with every mistake that a manifest can have without network access.
#[test]
fn mistakes_in_real_manifests_are_found() -> Result<(), Failure> {
    let folder = tempfile::tempdir()?;
    let manifest = |name: &str, rest: &str| -> Result<(), Failure> {
        let folder = folder.path().join(name);
        fs::create_dir_all(folder.join("src"))?;
        fs::write(folder.join("src/lib.rs"), "")?;
        let package = format!("[package]\nname = \"{name}\"\nversion = \"0.1.0\"\n{rest}");
        Ok(fs::write(folder.join("Cargo.toml"), package)?)
    };
    manifest("ring", "license = \"GPL-3.0-only\"\n[workspace]\n")?;
    manifest(
        "product",
        "license = \"MIT\"\n[workspace]\n[dependencies]\nring = { path = \"../ring\" }\n",
    )?;
    let product = folder.path().join("product");
    fs::write(
        product.join("Cargo.lock"),
        "version = 4\n\n[[package]]\nname = \"product\"\nversion = \"0.1.0\"\ndependencies = [\"ring\"]\n\n\
         [[package]]\nname = \"ring\"\nversion = \"0.1.0\"\n",
    )?;
    let found = violations(&policy(), &Workspace::read(&product, &policy())?);
    assert_eq!(
        found,
        [
            "ring v0.1.0: the crate is banned",
            "ring v0.1.0: licence GPL-3.0-only is not allowed",
            "product: dependency ring has no version requirement",
            "ring 0.1.0: comes from a directory outside the workspace",
        ]
    );
    Ok(())
}

#[test]
fn a_missing_lock_file_is_an_error() -> Result<(), Failure> {
    let folder = tempfile::tempdir()?;
    let error = Workspace::read(folder.path(), &policy()).expect_err("there is no manifest");
    assert!(matches!(error, WorkspaceError::Failed { .. }), "{error}");
    Ok(())
}
