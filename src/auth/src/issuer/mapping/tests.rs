//! Tests the checks of `[[issuer.mapping]]` tables.

use super::super::{Settings, problems as problems_of_all, remarks as remarks_of_all};
use super::*;

const PLAIN: &str = r#"
name = "sso"
issuer = "https://login.example.org"
audience = ["keybroker"]

[[mapping]]
name = "auditors"
when = [{ claim = "groups", any_of = ["auditors", "reviewers"] }]
roles = ["auditor"]

[[mapping]]
name = "backup"
when = [{ claim = ["realm_access", "roles"], any_of = ["backup"] }]
roles = ["release"]
key_names = ["vault"]
"#;

fn parse(text: &str) -> Settings {
    toml::from_str(text).unwrap()
}

#[test]
fn mappings_are_read_and_written_in_order() {
    let settings = parse(PLAIN);
    assert_eq!(settings.problems(), Vec::<String>::new());
    let names = settings.mappings.iter().map(|mapping| &mapping.name[..]);
    assert_eq!(names.collect::<Vec<_>>(), ["auditors", "backup"]);
    assert_eq!(parse(&toml::to_string(&settings).unwrap()), settings);
    assert!(settings.can_identify(Kind::User) && settings.can_identify(Kind::Service));
    // The name of a claim and a list of one name are the same path.
    let listed = parse(&PLAIN.replace("\"groups\"", "[\"groups\"]"));
    assert_eq!(listed, settings);
}

/// An issuer without mappings is what it was before mappings existed.
#[test]
fn an_issuer_without_mappings_has_the_former_defaults() {
    let (plain, _) = PLAIN.split_once("[[mapping]]").unwrap();
    let settings = parse(plain);
    assert!(settings.mappings.is_empty() && !settings.refuses_unmapped());
    assert_eq!(settings.subject_claim, ClaimPath::top_level("sub"));
    assert!(settings.can_identify(Kind::User) && !settings.can_identify(Kind::Service));
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn each_mistake_has_its_message() {
    let many_values: Vec<String> = (0..=ACCEPTED_MAX).map(|n| format!("\"{n}\"")).collect();
    let many_values = many_values.join(", ");
    let long = format!("\"{}\"", "x".repeat(VALUE_BYTES_MAX + 1));
    let condition = "{ claim = \"groups\", any_of = [\"auditors\", \"reviewers\"] }";
    let many_conditions = [condition; CONDITIONS_MAX + 1].join(", ");
    let values = "\"auditors\", \"reviewers\"";
    for (good, bad, words) in [
        ("\"auditors\"\nwhen", "\"A b\"\nwhen", "[a-z0-9._-]"),
        (condition, "", "would apply to every access token"),
        (condition, &many_conditions, "1 to 8 conditions"),
        (values, "", "can never apply"),
        (values, "\"\"", "can never apply"),
        (values, &long, "1 to 512 bytes"),
        (values, &many_values, "1 to 256 values"),
        ("claim = \"groups\"", "claim = \"\"", "names of 1 to 256"),
        ("claim = \"groups\"", "claim = []", "1 to 8 names"),
        ("roles = [\"auditor\"]", "", "has no role"),
        (
            "roles = [\"auditor\"]",
            "roles = [\"auditor\", \"release\"]\nusers = [\"*\"]",
            "must not be able to obtain keys",
        ),
        ("key_names = [\"vault\"]", "", "without a limit"),
        (
            "roles = [\"auditor\"]",
            "roles = [\"auditor\"]\nusers = [\"ada\"]",
            "limit only the role `release`",
        ),
        (
            "roles = [\"auditor\"]",
            "roles = [\"auditor\"]\nkind = \"user\"",
            "users have no role",
        ),
        (
            "audience",
            "tenant = \"acme\"\naudience",
            "use the tenant `default`",
        ),
        ("\"backup\"\nwhen", "\"auditors\"\nwhen", "configured twice"),
        (
            "[\"realm_access\", \"roles\"], any_of = [\"backup\"]",
            "\"groups\", any_of = [\"reviewers\"]",
            "mapping \"auditors\" above it",
        ),
        (
            "audience",
            "mapping_required = true\nkind = \"service\"\nroles = [\"enrol\"]\naudience",
            "has no effect",
        ),
        (
            "audience",
            "kind = \"service\"\nkey_names = [\"vault\"]\naudience",
            "has no role",
        ),
        (
            "audience",
            "subject_claim = []\naudience",
            "the claim [] must have",
        ),
        (
            "audience",
            "subject_claim = \"email\"\naudience",
            "assign to another person",
        ),
        (
            "audience",
            "subject_claim = [\"preferred_username\"]\naudience",
            "assign to another person",
        ),
    ] {
        assert!(PLAIN.contains(good), "{good}");
        let problems = parse(&PLAIN.replacen(good, bad, 1)).problems();
        let is_named = problems.iter().any(|problem| problem.contains(words));
        assert!(is_named, "{bad}: {problems:?}");
        assert_eq!(problems.len(), 1, "{bad}: {problems:?}");
    }
    let (plain, _) = PLAIN.split_once("[[mapping]]").unwrap();
    let problems = parse(&format!("{plain}mapping_required = true")).problems();
    assert!(problems[0].contains("every access token would be refused"));
}

#[test]
fn a_wrong_form_does_not_parse() {
    for (good, bad, words) in [
        (
            "claim = \"groups\"",
            "claim = 7",
            "write the name of a claim",
        ),
        ("any_of = [\"backup\"]", "any = [\"backup\"]", "`any`"),
        ("when = [{", "if = 1\nwhen = [{", "`if`"),
        ("[\"auditor\"]", "[\"root\"]", "`root`"),
        (", any_of = [\"backup\"]", "", "any_of"),
    ] {
        assert!(PLAIN.contains(good), "{good}");
        let error = toml::from_str::<Settings>(&PLAIN.replacen(good, bad, 1)).unwrap_err();
        assert!(error.to_string().contains(words), "{bad}: {error}");
    }
}

#[test]
fn too_many_mappings_are_refused() {
    let mut settings = parse(PLAIN);
    let first = settings.mappings[0].clone();
    settings.mappings = (0..=MAPPINGS_MAX)
        .map(|number| Mapping {
            name: format!("number-{number}"),
            when: vec![Condition {
                claim: ClaimPath::top_level("groups"),
                any_of: [number.to_string()].into(),
            }],
            ..first.clone()
        })
        .collect();
    let problems = settings.problems();
    assert!(
        problems.len() == 1 && problems[0].contains("the maximum is 64"),
        "{problems:?}"
    );
    settings.mappings.pop();
    assert_eq!(settings.problems(), Vec::<String>::new());
}

/// A mapping is hidden only by an earlier mapping whose every condition it implies.
#[test]
fn a_mapping_that_can_never_apply_is_found() {
    let mapping = |when: &str| -> Mapping {
        let text = format!("name = \"x\"\nwhen = [{when}]\nroles = [\"enrol\"]");
        toml::from_str(&text).unwrap()
    };
    let groups = |values: &str| format!("{{ claim = \"groups\", any_of = [{values}] }}");
    let client = "{ claim = \"azp\", any_of = [\"cli\"] }";
    let (one, two, both) = (groups("\"1\""), groups("\"2\""), groups("\"1\", \"2\""));
    for (earlier, later, is_hidden) in [
        (one.clone(), one.clone(), true),
        (both.clone(), one.clone(), true),
        (one.clone(), both.clone(), false),
        (one.clone(), two.clone(), false),
        (one.clone(), format!("{one}, {two}"), true),
        (format!("{one}, {two}"), one.clone(), false),
        (one.clone(), format!("{one}, {client}"), true),
        (format!("{both}, {client}"), one.clone(), false),
        (
            format!("{both}, {client}"),
            format!("{client}, {two}"),
            true,
        ),
        (one.clone(), client.to_owned(), false),
    ] {
        let covers = mapping(&earlier).covers(&mapping(&later));
        assert_eq!(covers, is_hidden, "{earlier} / {later}");
    }
}

/// Two issuers must not identify the same users, neither by their own tenants nor by those of mappings.
#[test]
fn issuers_of_one_tenant_are_found_in_mappings_too() {
    let one = parse(&format!(
        "{PLAIN}[[mapping]]\nname = \"branch\"\nwhen = [{{ claim = \"branch\", any_of = [\"b\"] }}]\nkind = \"user\"\ntenant = \"b\"\n"
    ));
    let other = |lines: &str| {
        let text = format!(
            "name = \"other\"\nissuer = \"https://other.example\"\naudience = [\"x\"]\n{lines}"
        );
        problems_of_all(&[one.clone(), parse(&text)]).join("\n")
    };
    assert!(other("").contains("users of the tenant `default`"));
    assert!(other("tenant = \"b\"").contains("users of the tenant `b`"));
    assert_eq!(other("tenant = \"c\""), "");
    // Services are not identified by their tenant.
    assert_eq!(other("kind = \"service\"\nroles = [\"enrol\"]"), "");
    let only_mapped = "kind = \"service\"\n[[mapping]]\nname = \"x\"\nwhen = [{ claim = \"y\", any_of = [\"z\"] }]\n";
    assert!(
        other(&format!("{only_mapped}kind = \"user\"")).contains("users of the tenant `default`")
    );
    assert_eq!(other(&format!("{only_mapped}roles = [\"enrol\"]")), "");
}

#[test]
fn a_path_that_is_written_with_dots_is_remarked() {
    let remarks = |claim: &str| {
        let settings = parse(&PLAIN.replacen("\"groups\"", claim, 1));
        remarks_of_all(&[settings]).join("\n")
    };
    let remark = remarks("\"realm_access.roles\"");
    assert!(
        remark.contains("write [\"realm_access\", \"roles\"]"),
        "{remark}"
    );
    for claim in [
        "\"groups\"",
        "\"https://example.org/groups\"",
        "[\"a.b\", \"c\"]",
    ] {
        assert_eq!(remarks(claim), "");
    }
}
