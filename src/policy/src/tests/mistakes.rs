//! Tests operators' files that are rejected, and the reported problems.

use std::{fs, os::unix::fs::PermissionsExt as _};

use proptest::prelude::*;

use super::*;
use crate::files::{FILE_BYTES_MAX, FILES_MAX};

type Place = Option<(usize, usize)>;

/// An invalid file, the place of its problem, and words of the message.
const MISTAKES: &[(&str, Place, &str)] = &[
    (
        "permit (principal, action, resource)",
        Some((1, 37)),
        "unexpected end",
    ),
    (
        "permit (principal, action, resource);\nforbidden;",
        Some((2, 10)),
        "unexpected token",
    ),
    (
        "permit (\n  principal,\n  action == Keybroker::Action::\"user_key.unrap\",\n  resource\n);",
        Some((3, 13)),
        "user_key.unrap",
    ),
    (
        "forbid (principal, action, resource) when { context.amrs.contains(\"x\") };",
        Some((1, 45)),
        "`amrs`",
    ),
    (
        "forbid (principal is Keybroker::Person, action, resource);",
        Some((1, 22)),
        "Keybroker::Person",
    ),
    (
        "forbid (principal in Keybroker::Role::\"relase\", action, resource);",
        Some((1, 22)),
        "relase",
    ),
    // A policy must check that an optional attribute is present before it uses it.
    (
        "forbid (principal, action, resource) when { context.acr == \"x\" };",
        Some((1, 45)),
        "optional attribute `acr`",
    ),
    (
        "forbid (principal, action, resource) when { context.peer == \"10.0.0.1\" };",
        Some((1, 45)),
        "ipaddr",
    ),
    // The policy would never apply, and the operator would not notice the mistake.
    (
        "forbid (principal is Keybroker::User, action == Keybroker::Action::\"user_key.get\", resource is Keybroker::Broker);",
        Some((1, 1)),
        "impossible",
    ),
    (
        "permit (principal == ?principal, action, resource);",
        None,
        "template",
    ),
    (
        "@id(\"own-keys\") permit (principal, action, resource);",
        None,
        "used twice",
    ),
    (
        "@id(\"default-deny\") permit (principal, action, resource);",
        None,
        "another meaning",
    ),
    (
        "@id(\"a b\") permit (principal, action, resource);",
        None,
        "[A-Za-z0-9._-]",
    ),
    (
        "@id(\"x\") permit (principal, action, resource); @id(\"x\") forbid (principal, action, resource);",
        None,
        "used twice",
    ),
];

#[test]
fn each_mistake_has_its_message_and_its_place() {
    for (text, place, words) in MISTAKES {
        let Problems(problems) = with_files(&[("mine.cedar", text)]).unwrap_err();
        let fits = problems.iter().any(|problem| {
            problem.file.as_deref() == Some("mine.cedar")
                && problem.place == *place
                && problem.message.contains(words)
        });
        assert!(fits, "{text}: {problems:#?}");
    }
}

#[test]
fn all_mistakes_are_told_at_once() {
    let bad = "forbid (principal, action, resource) when { context.nonsense };";
    let Problems(problems) =
        with_files(&[("a.cedar", bad), ("b.cedar", bad), ("c.cedar", "nonsense")]).unwrap_err();
    for file in ["a.cedar", "b.cedar", "c.cedar"] {
        assert!(
            problems
                .iter()
                .any(|problem| problem.file.as_deref() == Some(file)),
            "{problems:?}"
        );
    }
}

#[test]
fn files_keep_their_limits() {
    let comment = |bytes: u64| format!("//{}", "x".repeat(usize::try_from(bytes).unwrap() - 2));
    assert!(with_files(&[("a.cedar", &comment(FILE_BYTES_MAX))]).is_ok());
    let refused = |files: &[(&str, &str)], words: &str| {
        let problems = with_files(files).unwrap_err().to_string();
        assert!(problems.contains(words), "{problems}");
    };
    refused(
        &[("a.cedar", &comment(FILE_BYTES_MAX + 1))],
        "longer than 65536 bytes",
    );
    refused(&[("a b.cedar", "")], "[A-Za-z0-9._-]");

    let names: Vec<String> = (0..=FILES_MAX).map(|n| format!("{n}.cedar")).collect();
    let many: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "")).collect();
    assert!(with_files(&many[1..]).is_ok());
    refused(&many, "more than 64 files");

    let policy = "forbid (principal, action, resource) when { context.amr.contains(\"x\") };\n";
    assert!(with_files(&[("a.cedar", &policy.repeat(256))]).is_ok());
    refused(&[("a.cedar", &policy.repeat(257))], "at most 256");
}

/// A file with the deepest nesting and the longest chains that the limits allow is either rejected or valid. The
/// parser, the validator and the decision must not exhaust the stack.
#[test]
fn nesting_ends_in_a_problem_and_not_in_a_crash() {
    for (open, inner, close) in [
        ("(", "true", ")"),
        ("!", "true", ""),
        ("-", "1", " == 1"),
        ("[", "", "]"),
        ("{a:", "1", "}"),
        ("if true then ", "true", " else true"),
        ("if true then true else ", "true", ""),
        ("true && ", "true", ""),
        ("false || ", "true", ""),
        ("1 + ", "1 == 1", ""),
        ("", "context", ".a"),
        ("", "context has a", ".a"),
        ("", "context", "[\"a\"]"),
        ("ip(", "\"::1\"", ").isLoopback()"),
        ("principal.hasTag(\"a\") && ", "true", ""),
        ("context.amr.contains(\"a\") || ", "true", ""),
    ] {
        for depth in [20, 100, 249, 332, 499, 500, 999, 1_000, 4_000, 20_000] {
            let body = format!("{}{inner}{}", open.repeat(depth), close.repeat(depth));
            let text = format!("forbid (principal, action, resource) when {{ {body} }};");
            if let Ok((_folder, policy)) = with_files(&[("deep.cedar", &text)]) {
                unwrap_of_ada(&ada(), |case| policy.evaluate(case));
            }
        }
    }
}

#[test]
fn only_files_that_no_other_user_can_write_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("mine.cedar");
    fs::write(&file, "").unwrap();
    // Temporary files of an editor, and a file with notes.
    fs::write(folder.path().join(".mine.cedar.swp"), "nonsense").unwrap();
    fs::write(folder.path().join(".cedar"), "nonsense").unwrap();
    fs::write(folder.path().join("README"), "nonsense").unwrap();
    let settings = Settings {
        directory: Some(folder.path().to_owned()),
        ..Settings::default()
    };
    assert_eq!(settings.check().unwrap().files, 1);
    for (path, good, bad) in [
        (&file, 0o644, 0o664),
        (&file, 0o600, 0o606),
        (&folder.path().to_owned(), 0o755, 0o777),
    ] {
        for (mode, is_good) in [(bad, false), (good, true)] {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
            let checked = settings.check();
            assert_eq!(checked.is_ok(), is_good, "{mode:o}");
            if let Err(problems) = checked {
                assert!(problems.to_string().contains("chmod go-w"), "{problems}");
            }
        }
    }
    fs::write(folder.path().join("latin.cedar"), [0xe4]).unwrap();
    assert!(
        settings
            .check()
            .unwrap_err()
            .to_string()
            .contains("not UTF-8")
    );
    fs::remove_file(folder.path().join("latin.cedar")).unwrap();
    fs::create_dir(folder.path().join("folder.cedar")).unwrap();
    assert!(
        settings
            .check()
            .unwrap_err()
            .to_string()
            .contains("is a directory")
    );
}

/// Kubernetes mounts a `ConfigMap` as links to a hidden directory, which is replaced as a unit.
#[test]
fn links_of_a_mounted_volume_are_followed() {
    use std::os::unix::fs::symlink;
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("..2026_11_21")).unwrap();
    fs::write(
        at("..2026_11_21/mine.cedar"),
        "@id(\"mine\") forbid (principal, action, resource);",
    )
    .unwrap();
    symlink("..2026_11_21", at("..data")).unwrap();
    symlink("..data/mine.cedar", at("mine.cedar")).unwrap();
    let settings = Settings {
        directory: Some(folder.path().to_owned()),
        ..Settings::default()
    };
    let policy = Policy::load(&settings, Networks::default()).unwrap();
    assert_eq!(
        &*unwrap_of_ada(&ada(), |case| policy.evaluate(case)).policy,
        "mine"
    );
}

proptest! {
    /// Any text is either parsed as a set of policies, or reported as a problem with its position
    /// in the file.
    #[test]
    fn no_text_makes_the_loader_panic(
        words in prop::collection::vec(prop::sample::select(WORDS.to_vec()), 0..40),
        noise in "\\PC{0,20}",
    ) {
        for text in [words.join(" "), words.concat(), noise] {
            match with_files(&[("a.cedar", &text)]) {
                Ok((_folder, policy)) => drop(unwrap_of_ada(&ada(), |case| policy.evaluate(case))),
                Err(Problems(problems)) => for problem in problems {
                    prop_assert_eq!(problem.file.as_deref(), Some("a.cedar"));
                    if let Some((line, column)) = problem.place {
                        let line = text.lines().nth(line - 1).unwrap_or("");
                        prop_assert!(column <= line.chars().count() + 1, "{}: {}", text, problem);
                    }
                },
            }
        }
    }
}

const WORDS: [&str; 34] = [
    "permit (principal, action, resource)",
    "forbid (principal, action, resource)",
    "when {",
    "unless {",
    "}",
    "(",
    ")",
    "[",
    "]",
    ";",
    "@id(\"a\")",
    "@id(\"\u{e4}\")",
    "principal",
    "action",
    "resource",
    "context",
    ".",
    "amr",
    "has",
    "like",
    "\"*\"",
    "==",
    "in",
    "is",
    "&&",
    "||",
    "!",
    "Keybroker::User",
    "Keybroker::Action::\"user_key.unwrap\"",
    "ip(\"::1\")",
    "// comment\n",
    "\"",
    "1",
    "?principal",
];
