//! Tests what operators' policies can express, and what they cannot permit.

use std::{fs, net::Ipv6Addr};

use super::*;

const UNWRAP: &str = r#"principal, action == Keybroker::Action::"user_key.unwrap", resource"#;

fn verdict(policies: &str, edit: impl FnOnce(&mut Case<'_>)) -> Verdict {
    let (_folder, policy) = with_files(&[("one.cedar", policies)]).unwrap();
    unwrap_of_ada(&ada(), |case| {
        let mut case = *case;
        edit(&mut case);
        policy.evaluate(&case)
    })
}

/// For each kind of rule: a policy, a case that it allows, and a case that it denies.
const RULES: &[(&str, &str, &str)] = &[
    (
        "amr",
        r#"context.amr.contains("otp")"#,
        r#"context.amr.contains("hwk")"#,
    ),
    (
        "acr",
        r#"context has acr && context.acr == "urn:level:2""#,
        r#"context has acr && context.acr == "urn:level:3""#,
    ),
    (
        "age of authentication",
        "context has authAgeSeconds && context.authAgeSeconds <= 300",
        "context has authAgeSeconds && context.authAgeSeconds <= 299",
    ),
    (
        "device",
        r#"context has device && context.device like "lap*""#,
        r#"context has device && context.device == "phone""#,
    ),
    (
        "organisation",
        r#"context.organisations.contains("acme")"#,
        r#"context.organisations.contains("other")"#,
    ),
    (
        "mapping",
        "!(principal has mapping)",
        r#"principal has mapping && principal.mapping == "administrators""#,
    ),
    (
        "peer",
        r#"context.peer.isInRange(ip("10.1.0.0/16"))"#,
        r#"context.peer.isInRange(ip("192.168.0.0/16"))"#,
    ),
    (
        "time",
        r#"context.time.toTime() == duration("12h")"#,
        r#"context.time.toTime() > duration("12h")"#,
    ),
    (
        "day",
        r#"context.time < datetime("2026-11-22")"#,
        r#"context.time < datetime("2026-11-21")"#,
    ),
    (
        "release",
        r#"context.release == "plain""#,
        r#"context.release == "sealed""#,
    ),
    (
        "attribute",
        r#"principal.hasTag("groups") && principal.getTag("groups").contains("staff")"#,
        r#"principal.hasTag("groups") && principal.getTag("groups").contains("boss")"#,
    ),
    (
        "name",
        r#"principal.name like "token:home:*""#,
        r#"principal.name like "token:work:*""#,
    ),
    (
        "credential",
        r#"principal.credential == "token""#,
        r#"principal.credential == "certificate""#,
    ),
    (
        "key",
        r#"resource.keyName == "vault""#,
        r#"resource.keyName == "mail""#,
    ),
];

#[test]
fn a_forbid_can_rest_on_all_that_is_known_of_a_call() {
    for (what, passes, denies) in RULES {
        let forbid =
            |unless: &str| format!("@id(\"rule\") forbid ({UNWRAP}) unless {{ {unless} }};");
        let passing = verdict(&forbid(passes), |_| {});
        assert_eq!(
            (passing.allowed, &*passing.policy),
            (true, "own-keys"),
            "{what}"
        );
        let denying = verdict(&forbid(denies), |_| {});
        assert_eq!(
            (denying.allowed, &*denying.policy),
            (false, "rule"),
            "{what}"
        );
    }
}

/// A socket for IPv4 and IPv6 reports `::ffff:10.1.2.3`. A policy about 10.0.0.0/8 must apply to
/// this address.
#[test]
fn an_ipv4_peer_is_one_in_ipv6_too() {
    let rule = format!(
        r#"@id("office") forbid ({UNWRAP}) unless {{ context.peer.isInRange(ip("10.0.0.0/8")) }};"#
    );
    let IpAddr::V4(peer) = PEER else {
        unreachable!()
    };
    for (peer, allowed) in [
        (IpAddr::V4(peer), true),
        (IpAddr::V6(peer.to_ipv6_mapped()), true),
        (IpAddr::V6(Ipv6Addr::LOCALHOST), false),
        ([11, 1, 2, 3].into(), false),
    ] {
        assert_eq!(
            verdict(&rule, |case| case.peer = peer).allowed,
            allowed,
            "{peer}"
        );
    }
}

/// Cedar ignores a policy that it cannot evaluate. If a forbid policy were ignored, the forbidden
/// action would be allowed.
#[test]
fn a_forbid_that_cannot_be_evaluated_denies() {
    let overflow = "context has authAgeSeconds && context.authAgeSeconds * 9223372036854775807 > 0";
    let forbid = format!("@id(\"broken\") forbid ({UNWRAP}) when {{ {overflow} }};");
    let broken = verdict(&forbid, |_| {});
    assert_eq!((broken.allowed, &*broken.policy), (false, "broken"));
    assert_eq!(broken.errors.len(), 1);
    assert!(broken.errors[0].1.contains("overflow"), "{broken:?}");

    // If a forbid policy applies and another forbid policy cannot be evaluated, both cause the
    // denial, and the first is shown.
    let both = verdict(
        &format!("{forbid} @id(\"later\") forbid ({UNWRAP});"),
        |_| {},
    );
    let deciding: Vec<&str> = both.deciding.iter().map(AsRef::as_ref).collect();
    assert_eq!(deciding, ["broken", "later"]);

    // A permit that cannot be evaluated permits nothing, and does not affect other permits.
    let permit = format!("@id(\"broken\") permit ({UNWRAP}) when {{ {overflow} }};");
    let other = verdict(&permit, |_| {});
    assert_eq!(
        (other.allowed, &*other.policy, other.errors.len()),
        (true, "own-keys", 1)
    );

    // An entity that does not exist has no attributes.
    let absent = r#"@id("absent") forbid (principal, action, resource) when { Keybroker::User::"x".name == "x" };"#;
    assert_eq!(&*verdict(absent, |_| {}).policy, "absent");
}

/// Tests the mistake of writing a permit that is meant to restrict, although a permit can only add rights.
#[test]
fn a_permit_that_is_too_wide_opens_no_other_users_keys() {
    let wide = "@id(\"wide\") permit (principal, action, resource);";
    let (_folder, policy) = with_files(&[("wide.cedar", wide)]).unwrap();
    for (identity, named) in [
        (person("bob"), "users-own-keys-only"),
        (service(&[Role::Admin]), "administrators-never-unwrap"),
        (service(&[Role::Auditor]), "auditors-never-unwrap"),
        (service(&[Role::Enrol]), "release-within-grant"),
        (
            service(&[Role::Release, Role::Admin]),
            "separation-of-duties",
        ),
        (
            Identity {
                users: Reach::Only(BTreeSet::from([user("bob")])),
                ..service(&[Role::Release])
            },
            "release-within-grant",
        ),
        (
            Identity {
                tenant: tenant("elsewhere"),
                ..service(&[Role::Release])
            },
            "own-tenant",
        ),
    ] {
        let verdict = unwrap_of_ada(&identity, |case| policy.evaluate(case));
        assert_eq!((verdict.allowed, &*verdict.policy), (false, named));
    }
}

#[test]
fn a_permit_gives_what_the_shipped_ones_do_not() {
    let permit = r#"permit (principal is Keybroker::User, action == Keybroker::Action::"user_key.delete", resource)
        when { principal has subject && resource.user == principal.subject };"#;
    let (_folder, policy) = with_files(&[("20-users.cedar", permit)]).unwrap();
    let verdict = unwrap_of_ada(&ada(), |case| {
        policy.evaluate(&Case {
            action: Action::Delete,
            ..*case
        })
    });
    // A policy without an id gets a name from its file and position.
    assert_eq!(
        (verdict.allowed, &*verdict.policy),
        (true, "20-users.cedar:1")
    );
}

#[test]
fn without_the_shipped_permits_only_the_operators_are_there() {
    let folder = tempfile::tempdir().unwrap();
    let settings = Settings {
        defaults: false,
        directory: Some(folder.path().to_owned()),
    };
    let nothing = unwrap_of_ada(&ada(), |case| {
        Policy::load(&settings, Networks::default())
            .unwrap()
            .evaluate(case)
    });
    assert_eq!((nothing.allowed, &*nothing.policy), (false, "default-deny"));
    let permit = format!("@id(\"mine\") permit ({UNWRAP});");
    fs::write(folder.path().join("mine.cedar"), permit).unwrap();
    let policy = Policy::load(&settings, Networks::default()).unwrap();
    assert_eq!(
        &*unwrap_of_ada(&ada(), |case| policy.evaluate(case)).policy,
        "mine"
    );
    // The forbid policies are still in force.
    let bob = unwrap_of_ada(&person("bob"), |case| policy.evaluate(case));
    assert_eq!(&*bob.policy, "users-own-keys-only");
}

#[test]
fn the_first_that_decides_is_named() {
    let forbid = |id: &str| format!("@id(\"{id}\") forbid ({UNWRAP});");
    let files = [
        ("20.cedar", format!("{} {}", forbid("c"), forbid("d"))),
        ("10.cedar", format!("{} {}", forbid("b"), forbid("a"))),
    ];
    let files: Vec<(&str, &str)> = files
        .iter()
        .map(|(name, text)| (*name, text.as_str()))
        .collect();
    let (_folder, policy) = with_files(&files).unwrap();
    let verdict = unwrap_of_ada(&ada(), |case| policy.evaluate(case));
    let deciding: Vec<&str> = verdict.deciding.iter().map(AsRef::as_ref).collect();
    assert_eq!(deciding, ["b", "a", "c", "d"]);
    assert_eq!(&*verdict.policy, "b");
}
