//! Tests that a kept decision never differs from a new decision.

use proptest::prelude::*;

use super::*;
use crate::{engine, problem::Source};

const UNWRAP: &str = r#"principal, action == Keybroker::Action::"user_key.unwrap", resource"#;

/// Conditions of policies, and whether decisions may be kept while such a policy is in force.
const CONDITIONS: &[(&str, bool)] = &[
    ("true", true),
    ("context.granted", true),
    ("!context.granted", true),
    ("principal.allUsers", true),
    ("principal.allKeyNames && context.granted", true),
    (r#"principal.name like "*/one""#, true),
    (r#"principal.tenant == "acme""#, true),
    (r#"principal.credential == "certificate""#, true),
    (r#"principal in Keybroker::Role::"enrol""#, true),
    (
        r#"principal has mapping && principal.mapping == "night""#,
        true,
    ),
    ("!(principal has mapping)", true),
    (r#"resource.keyName == "vault""#, false),
    (r#"resource.user like "a*""#, false),
    ("resource.tenant == principal.tenant", false),
    ("resource in resource", false),
    (
        r#"resource == Keybroker::UserKey::"default/vault/ada""#,
        false,
    ),
    ("{ one: resource }.one.user == \"ada\"", false),
    // The attributes of a named record are known only if the record is the resource.
    (r#"Keybroker::UserKey::"default/vault/ada" has user"#, false),
    (
        r#"Keybroker::UserKey::"default/vault/ada".user == "ada""#,
        false,
    ),
    (
        r#"!(Keybroker::UserKey::"default/vault/bob" has user)"#,
        false,
    ),
    (r#"principal == Keybroker::Service::"client:one""#, false),
    (r#"Keybroker::Service::"client:one" has name"#, false),
    (
        "[context.granted].contains(context.granted) && { context: context }.context.granted",
        false,
    ),
    ("context has granted && context.granted", false),
    (r#"context.amr.contains("otp")"#, false),
    (r#"context.peer.isInRange(ip("10.0.0.0/8"))"#, false),
    (r#"context.time < datetime("2026-11-22")"#, false),
    (r#"context.release == "plain""#, false),
    (r#"principal.hasTag("groups")"#, false),
    (
        r#"principal.hasTag("groups") && principal.getTag("groups").contains("staff")"#,
        false,
    ),
    // A string that is equal to the name of a variable counts as a use of the variable.
    (r#"principal.name == "resource""#, false),
];

fn rule(effect: &str, condition: &str) -> String {
    let of_services = UNWRAP.replacen("principal", "principal is Keybroker::Service", 1);
    format!("{effect} ({of_services}) when {{ resource is Keybroker::UserKey || true }};")
        .replace("resource is Keybroker::UserKey || true", condition)
}

fn set(policies: &str) -> Option<Set> {
    let source = Source {
        name: "rules.cedar".to_owned(),
        text: policies.to_owned(),
    };
    Set::build(&Settings::default(), &[source]).ok()
}

fn kept(set: &Set) -> usize {
    let slice = set.slice_of(Action::Unwrap, Kind::Service).unwrap();
    slice.kept.len()
}

#[test]
fn decisions_are_kept_only_if_no_policy_looks_at_resource_or_call() {
    let identity = service(&[Role::Release]);
    for effect in ["permit", "forbid"] {
        for (condition, may_keep) in CONDITIONS {
            let Some(set) = set(&rule(effect, condition)) else {
                panic!("{condition} is invalid");
            };
            let decided = with_case(&identity, |case| engine::decide(&set, case));
            let expected = usize::from(*may_keep && decided.allowed);
            assert_eq!(kept(&set), expected, "{effect} {condition}");
        }
    }
}

#[test]
fn a_scope_with_a_resource_is_looked_at() {
    for (scope, may_keep) in [
        ("resource", true),
        ("resource is Keybroker::UserKey", true),
        (
            r#"resource == Keybroker::UserKey::"default/vault/ada""#,
            false,
        ),
    ] {
        let policy = format!(
            r#"permit (principal is Keybroker::Service, action == Keybroker::Action::"user_key.unwrap", {scope});"#
        );
        let set = set(&policy).unwrap();
        let identity = service(&[Role::Release]);
        assert!(with_case(&identity, |case| engine::decide(&set, case)).allowed);
        assert_eq!(kept(&set), usize::from(may_keep), "{scope}");
    }
}

#[test]
fn a_denial_is_never_kept() {
    let set = set("").unwrap();
    let identity = service(&[Role::Enrol]);
    assert!(!with_case(&identity, |case| engine::decide(&set, case)).allowed);
    assert_eq!(kept(&set), 0);
}

#[test]
fn the_decisions_of_a_user_are_not_kept() {
    let set = set("").unwrap();
    assert!(with_case(&ada(), |case| engine::decide(&set, case)).allowed);
    let slice = set.slice_of(Action::Unwrap, Kind::User).unwrap();
    assert_eq!(slice.kept.len(), 0);
}

#[test]
fn the_number_of_kept_decisions_is_bounded() {
    let set = set("").unwrap();
    for number in 0..3_000 {
        let mut identity = service(&[Role::Release]);
        identity.name = format!("URI:spiffe://example.org/{}", number % 1_500);
        identity.tenant = tenant(&format!("tenant-{number}"));
        let (user, name) = (user("ada"), key_name("vault"));
        let verdict = engine::decide(
            &set,
            &Case {
                identity: &identity,
                action: Action::Unwrap,
                resource: Resource::UserKey {
                    tenant: &identity.tenant,
                    user: &user,
                    name: &name,
                },
                release: Release::Plain,
                peer: PEER,
                place: "",
                at: NOON,
            },
        );
        assert!(verdict.allowed);
        assert!(kept(&set) <= 1_024 * 8);
    }
    assert!(kept(&set) > 0);
}

/// A reload replaces the kept decisions together with the policies.
#[test]
fn a_reload_drops_what_was_kept() {
    let (folder, policy) = with_files(&[("rules.cedar", "")]).unwrap();
    let identity = service(&[Role::Release]);
    let decide = || {
        with_case(&identity, |case| {
            engine::decide(&policy.current.load(), case).allowed
        })
    };
    assert!(decide() && decide());
    std::fs::write(
        folder.path().join("rules.cedar"),
        format!("forbid ({UNWRAP});"),
    )
    .unwrap();
    policy.reload(true);
    assert!(!decide());
}

fn services() -> impl Strategy<Value = Identity> {
    (
        prop::sample::select(vec!["URI:spiffe://x/one", "URI:spiffe://x/two"]),
        prop::sample::select(vec!["default", "acme"]),
        prop::sample::select(vec![Credential::Certificate, Credential::ClientSecret]),
        prop::sample::subsequence(Role::ALL.to_vec(), 0..=3),
        any::<[bool; 3]>(),
        prop::option::of(prop::sample::select(vec!["day", "night"])),
    )
        .prop_map(
            |(name, tenant_name, credential, roles, [users, names, staff], mapping)| {
                let mut identity = service(&roles);
                identity.name = name.to_owned();
                identity.tenant = tenant(tenant_name);
                identity.credential = credential;
                identity.mapping = mapping.map(str::to_owned);
                if !users {
                    identity.users = Reach::Only([user("ada")].into());
                }
                if !names {
                    identity.key_names = Reach::Only([key_name("vault")].into());
                }
                if staff {
                    let groups = BTreeSet::from(["staff".to_owned()]);
                    identity.claims.attributes = [("groups".to_owned(), groups)].into();
                }
                identity
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// One set of policies decides many cases one after another, as in a broker. Each decision is
    /// compared with a new decision.
    #[test]
    fn a_decision_is_the_same_as_a_new_one(
        rules in prop::collection::vec(
            (any::<bool>(), prop::sample::select(CONDITIONS)),
            0..=2,
        ),
        cases in prop::collection::vec(
            (
                services(),
                prop::sample::select(vec!["ada", "bob"]),
                prop::sample::select(vec!["vault", "other"]),
                prop::sample::select(vec![Action::Unwrap, Action::Get, Action::Create]),
                any::<bool>(),
                any::<bool>(),
            ),
            1..=24,
        ),
    ) {
        let rules = rules.iter().map(|(permit, (condition, _))| {
            rule(if *permit { "permit" } else { "forbid" }, condition)
        });
        let set = set(&rules.collect::<String>()).unwrap();
        for (identity, of, name, action, late, sealed) in &cases {
            let (of, name) = (user(of), key_name(name));
            let case = Case {
                identity,
                action: *action,
                resource: Resource::UserKey { tenant: &identity.tenant, user: &of, name: &name },
                release: if *sealed { Release::Sealed(Fingerprint([7; 32])) } else { Release::Plain },
                peer: PEER,
                place: "",
                at: if *late { Timestamp::from_micros(NOON.micros() + 86_400_000_000) } else { NOON },
            };
            prop_assert_eq!(engine::decide(&set, &case), engine::evaluate(&set, &case));
        }
    }
}
