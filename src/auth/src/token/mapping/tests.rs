//! Tests which mapping applies to which claims, and that unclear claims give no rights.

use proptest::prelude::*;
use serde_json::json;

use keybroker_core::principal::{Reach, Role};

use super::*;

/// An issuer of users. The mapping `both` needs two groups, `operators` also a client, and `tenant-b` has users.
const MAPPINGS: &str = r#"
name = "sso"
issuer = "https://login.example.org"
audience = ["keybroker"]
tenant = "home"

[[mapping]]
name = "both"
when = [
    { claim = "groups", any_of = ["admins"] },
    { claim = "groups", any_of = ["auditors"] },
]
tenant = "default"
roles = ["admin", "auditor"]

[[mapping]]
name = "operators"
when = [
    { claim = ["realm_access", "roles"], any_of = ["keybroker-operator", "keybroker-admin"] },
    { claim = "azp", any_of = ["keybroker-cli"] },
]
roles = ["admin"]

[[mapping]]
name = "backup"
when = [{ claim = "https://example.org/groups", any_of = ["backup"] }]
roles = ["release"]
key_names = ["vault"]

[[mapping]]
name = "tenant-b"
when = [{ claim = "urn:zitadel:iam:org:project:roles", any_of = ["member"] }]
kind = "user"
tenant = "b"
"#;

fn settings(text: &str) -> Settings {
    let settings: Settings = toml::from_str(text).unwrap();
    assert_eq!(settings.problems(), Vec::<String>::new());
    settings
}

fn decide(settings: &Settings, claims: &Value) -> Result<Access, Refusal> {
    access(settings, claims.as_object().unwrap())
}

/// The mapping that applies, or the cause of the refusal.
fn outcome(settings: &Settings, claims: &Value) -> Result<Option<String>, Cause> {
    let outcome = decide(settings, claims).map(|access| access.mapping);
    outcome.map_err(|refusal| refusal.cause)
}

#[test]
fn the_first_mapping_that_matches_applies() {
    let settings = settings(MAPPINGS);
    let operator = json!({ "roles": ["offline_access", "keybroker-operator"] });
    for (claims, expected) in [
        (
            json!({ "groups": ["staff", "admins", "auditors"] }),
            Ok(Some("both".to_owned())),
        ),
        // Rights are not combined: one of two groups is not enough for the mapping of both.
        (json!({ "groups": ["admins"] }), Ok(None)),
        (json!({ "groups": "admins" }), Ok(None)),
        (
            json!({ "realm_access": operator, "azp": "keybroker-cli" }),
            Ok(Some("operators".to_owned())),
        ),
        (
            json!({ "realm_access": operator, "azp": "other" }),
            Ok(None),
        ),
        (json!({ "realm_access": operator }), Ok(None)),
        // The dot in a name has no meaning, and the URL is one name.
        (
            json!({ "realm_access.roles": ["keybroker-operator"], "azp": "keybroker-cli" }),
            Ok(None),
        ),
        (
            json!({ "https://example.org/groups": "backup" }),
            Ok(Some("backup".to_owned())),
        ),
        (
            json!({ "https://example": { "org/groups": "backup" } }),
            Ok(None),
        ),
        // The order of the configuration decides, not the order of the claims.
        (
            json!({
                "https://example.org/groups": ["backup"],
                "urn:zitadel:iam:org:project:roles": { "member": { "1": "x" } },
                "realm_access": operator, "azp": "keybroker-cli",
            }),
            Ok(Some("operators".to_owned())),
        ),
        (json!({}), Ok(None)),
    ] {
        assert_eq!(outcome(&settings, &claims), expected, "{claims}");
    }
}

#[test]
fn a_mapping_gives_its_own_rights_and_no_others() {
    let settings = settings(MAPPINGS);
    let backup = decide(
        &settings,
        &json!({ "https://example.org/groups": "backup" }),
    )
    .unwrap();
    assert_eq!(backup.kind, Kind::Service);
    assert_eq!(backup.grant.roles, [Role::Release].into());
    // The tenant of the issuer is the default.
    assert_eq!(backup.grant.tenant.as_str(), "home");
    assert_eq!(backup.grant.users(), Reach::All);
    assert_ne!(backup.grant.key_names(), Reach::All);
    let both = decide(&settings, &json!({ "groups": ["admins", "auditors"] })).unwrap();
    assert_eq!(both.grant.tenant.as_str(), "default");
    let claims = json!({ "urn:zitadel:iam:org:project:roles": { "member": {} } });
    let member = decide(&settings, &claims).unwrap();
    assert_eq!((member.kind, member.grant.roles.len()), (Kind::User, 0));
    assert_eq!(member.grant.tenant.as_str(), "b");
    let base = decide(&settings, &json!({})).unwrap();
    assert_eq!((base.kind, base.grant.roles.len()), (Kind::User, 0));
    assert_eq!(base.grant.tenant.as_str(), "home");
}

/// The forms in which providers write values.
#[test]
fn values_have_several_forms() {
    let claim = ClaimPath::top_level("x");
    for (value, expected) in [
        (json!("one"), &["one"][..]),
        (json!(["one", "two"]), &["one", "two"]),
        (json!(7), &["7"]),
        (json!(true), &["true"]),
        (json!([]), &[]),
        (json!({}), &[]),
        (json!(null), &[]),
        // Zitadel: the roles with the organisations that granted them.
        (
            json!({ "one": { "1": "a.example" }, "two": {} }),
            &["one", "two"],
        ),
        (json!([{ "one": { "1": "a.example" } }]), &["one"]),
    ] {
        let claims = json!({ "x": value });
        let found = values(&claim, claims.as_object().unwrap()).unwrap();
        assert_eq!(found, expected, "{claims}");
    }
}

#[test]
fn a_claim_of_the_wrong_type_is_refused() {
    let settings = settings(MAPPINGS);
    for claims in [
        json!({ "groups": [["admins"], "admins", "auditors"] }),
        json!({ "groups": { "admins": true, "auditors": true } }),
        json!({ "groups": { "admins": false } }),
        json!({ "groups": ["admins", null] }),
        json!({ "groups": [{ "admins": 1 }] }),
        json!({ "groups": vec!["x"; VALUES_MAX + 1] }),
        json!({ "realm_access": "keybroker-admin", "azp": "keybroker-cli" }),
        json!({ "realm_access": ["roles"], "azp": "keybroker-cli" }),
        json!({ "realm_access": { "roles": { "keybroker-admin": [] } }, "azp": "keybroker-cli" }),
    ] {
        assert_eq!(outcome(&settings, &claims), Err(Cause::Claim), "{claims}");
    }
    let most = json!({ "groups": vec!["x"; VALUES_MAX] });
    assert_eq!(outcome(&settings, &most), Ok(None));
    // Another condition of the mapping certainly does not hold, so the malformed claim does not matter.
    let other = json!({ "realm_access": "keybroker-admin", "azp": "other" });
    assert_eq!(outcome(&settings, &other), Ok(None));
}

/// Entra ID leaves the groups out if a user has too many. The holder must not silently lose a role, and must not get the
/// rights of a later mapping either.
#[test]
fn a_claim_that_the_provider_left_out_is_not_a_claim_without_values() {
    let settings = settings(MAPPINGS);
    let sources =
        json!({ "src1": { "endpoint": "https://graph.example/users/1/getMemberObjects" } });
    for claims in [
        json!({ "_claim_names": { "groups": "src1" }, "_claim_sources": sources }),
        json!({ "hasgroups": true }),
        json!({ "hasgroups": "true", "groups": null }),
        json!({ "hasgroups": true, "https://example.org/groups": "backup" }),
    ] {
        assert_eq!(outcome(&settings, &claims), Err(Cause::Overage), "{claims}");
    }
    for claims in [
        json!({ "hasgroups": false }),
        json!({ "hasgroups": true, "groups": [] }),
        json!({ "_claim_names": { "other": "src1" } }),
        json!({ "_claim_names": ["groups"] }),
    ] {
        assert_eq!(outcome(&settings, &claims), Ok(None), "{claims}");
    }
    let refusal = decide(&settings, &json!({ "hasgroups": true })).err();
    let detail = refusal.unwrap().detail;
    let words = "mapping \"both\": the provider left out the claim `groups`";
    assert!(detail.starts_with(words), "{detail}");
}

#[test]
fn an_issuer_without_rights_of_its_own_refuses_other_holders() {
    let users = settings(&MAPPINGS.replacen("tenant", "mapping_required = true\ntenant", 1));
    let services = settings(&MAPPINGS.replacen("tenant", "kind = \"service\"\ntenant", 1));
    for settings in [users, services] {
        let claims = json!({ "groups": ["staff", "a \"quoted\" one"], "azp": 7 });
        let refusal = decide(&settings, &claims).err().unwrap();
        assert_eq!(refusal.cause, Cause::Mapping);
        let words = "the `groups` is \"staff a \\\"quoted\\\" one\"";
        assert!(refusal.detail.contains(words), "{}", refusal.detail);
        let words = "the `realm_access / roles` has no value";
        assert!(refusal.detail.contains(words), "{}", refusal.detail);
        let member = json!({ "groups": ["admins", "auditors"] });
        assert_eq!(outcome(&settings, &member), Ok(Some("both".to_owned())));
    }
    // The services of the issuer have a role without a mapping.
    let lines = "kind = \"service\"\nroles = [\"enrol\"]\ntenant";
    let enrolling = settings(&MAPPINGS.replacen("tenant", lines, 1));
    let base = decide(&enrolling, &json!({ "groups": ["staff"] })).unwrap();
    assert_eq!(base.grant.roles, [Role::Enrol].into());
}

/// RFC 7519 section 4 lets a parser use the last of several claims with one name.
#[test]
fn the_last_of_several_claims_with_one_name_counts() {
    let settings = settings(MAPPINGS);
    let both = r#"["admins", "auditors"]"#;
    for (first, last, expected) in [
        (both, "[]", Ok(None)),
        ("[]", both, Ok(Some("both".to_owned()))),
    ] {
        let text = format!("{{\"groups\": {first}, \"groups\": {last}}}");
        let claims: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(outcome(&settings, &claims), expected, "{text}");
    }
}

fn any_json() -> impl Strategy<Value = Value> {
    let word = prop::sample::select(vec![
        "admins",
        "auditors",
        "backup",
        "groups",
        "keybroker-cli",
        "keybroker-operator",
        "member",
        "roles",
    ]);
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        word.clone().prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, move |inner| {
        let members =
            prop::collection::btree_map(word.clone().prop_map(str::to_owned), inner.clone(), 0..4);
        prop_oneof![
            prop::collection::vec(inner, 0..4).prop_map(Value::from),
            members.prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

fn any_claims() -> impl Strategy<Value = Value> {
    let names = prop::sample::select(vec![
        "groups",
        "realm_access",
        "azp",
        "hasgroups",
        "_claim_names",
        "https://example.org/groups",
        "urn:zitadel:iam:org:project:roles",
    ]);
    let claims = prop::collection::btree_map(names.prop_map(str::to_owned), any_json(), 0..5);
    claims.prop_map(|claims| Value::Object(claims.into_iter().collect()))
}

proptest! {
    /// All roles come from one mapping. Each claim that this mapping names contains one of the values of its condition,
    /// for any claims.
    #[test]
    fn no_claims_give_a_role_that_their_mapping_does_not_name(claims in any_claims()) {
        let settings = settings(MAPPINGS);
        let Ok(access) = decide(&settings, &claims) else { return Ok(()) };
        let mapping = settings.mappings.iter().find(|one| Some(&one.name) == access.mapping.as_ref());
        let Some(mapping) = mapping else {
            prop_assert!(access.mapping.is_none() && access.grant.roles.is_empty());
            prop_assert_eq!(access.kind, Kind::User);
            return Ok(());
        };
        prop_assert_eq!(&access.grant, &mapping.grant());
        for condition in &mapping.when {
            let claim = claims[condition.claim.first()].to_string();
            let is_there = |value: &String| claim.contains(&format!("\"{value}\""));
            prop_assert!(condition.any_of.iter().any(is_there), "{}", claims);
        }
    }

    /// A longer list of groups never makes a mapping stop to apply, and never gives the holder a later mapping.
    #[test]
    fn more_values_never_give_a_later_mapping(claims in any_claims(), more in "[a-z]{1,8}") {
        let settings = settings(MAPPINGS);
        let position = |claims: &Value| {
            let applied = outcome(&settings, claims).ok()?;
            let at = |name| settings.mappings.iter().position(|one| one.name == name);
            Some(applied.map_or(usize::MAX, |name| at(name).unwrap()))
        };
        let mut longer = claims.clone();
        let Some(Value::Array(groups)) = longer.get_mut("groups") else { return Ok(()) };
        groups.push(more.into());
        prop_assume!(position(&claims).is_some());
        prop_assert!(position(&longer).unwrap() <= position(&claims).unwrap());
    }

    #[test]
    fn the_path_of_a_claim_is_read_back(names in prop::collection::vec(".{0,6}", 0..4)) {
        let path: ClaimPath = serde_json::from_value(json!(names)).unwrap();
        let written = serde_json::to_value(&path).unwrap();
        prop_assert_eq!(written.is_string(), names.len() == 1);
        prop_assert_eq!(serde_json::from_value::<ClaimPath>(written).unwrap(), path);
    }
}
