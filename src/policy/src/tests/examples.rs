//! Tests the examples of `docs/policy.md`: the page shows the same text as the files, and each
//! example has the effect that the page describes.

use super::*;

const PAGE: &str = include_str!("../../../../docs/policy.md");

macro_rules! example {
    ($name:literal) => {
        (
            $name,
            include_str!(concat!("../../../../docs/policies/", $name)),
        )
    };
}

const EXAMPLES: [(&str, &str); 9] = [
    example!("strong-authentication.cedar"),
    example!("networks.cedar"),
    example!("organisations.cedar"),
    example!("working-hours.cedar"),
    example!("sealed-only.cedar"),
    example!("devices-only.cedar"),
    example!("approvals.cedar"),
    example!("recipients.cedar"),
    example!("users-delete.cedar"),
];

#[test]
fn the_page_shows_the_examples_as_they_are() {
    let folder =
        std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join("docs/policies");
    assert_eq!(std::fs::read_dir(folder).unwrap().count(), EXAMPLES.len());
    for (name, text) in EXAMPLES {
        assert!(
            PAGE.contains(&format!("[`{name}`](policies/{name})")),
            "{name}"
        );
        assert!(PAGE.contains(&format!("```cedar\n{text}```\n")), "{name}");
    }
}

/// `docs/policy.md` explains every word of the vocabulary and every shipped policy.
#[test]
fn the_page_names_every_word_and_policy() {
    for line in vocabulary::SCHEMA.lines() {
        if let Some(word) = line
            .trim()
            .strip_prefix('"')
            .and_then(|rest| rest.split('"').next())
        {
            assert!(PAGE.contains(&format!("`{word}`")), "{word}");
        }
    }
    for part in include_str!("../default.cedar").split("@id(\"").skip(1) {
        let id = part.split('"').next().unwrap();
        assert!(PAGE.contains(&format!("`{id}`")), "{id}");
    }
    for action in Action::ALL {
        assert!(PAGE.contains(&format!("`{action}`")), "{action}");
    }
}

/// The example's decision for a case.
fn evaluate(name: &str, case: &Case<'_>) -> String {
    let example = EXAMPLES
        .into_iter()
        .find(|(known, _)| *known == name)
        .unwrap();
    let (_folder, policy) = with_files(&[example]).unwrap();
    policy.evaluate(case).policy.to_string()
}

#[test]
fn strong_authentication() {
    let decides = |edit: &dyn Fn(&mut Claims)| {
        let mut ada = ada();
        edit(&mut ada.claims);
        with_case(&ada, |case| evaluate("strong-authentication.cedar", case))
    };
    let ago = |seconds: i64| Some(Timestamp::from_micros(NOON.micros() - seconds * 1_000_000));
    assert_eq!(decides(&|_| {}), "own-keys");
    assert_eq!(
        decides(&|claims| claims.authenticated = ago(3_600)),
        "own-keys"
    );
    assert_eq!(
        decides(&|claims| claims.authenticated = ago(3_601)),
        "strong-authentication"
    );
    assert_eq!(
        decides(&|claims| claims.authenticated = None),
        "strong-authentication"
    );
    assert_eq!(
        decides(&|claims| claims.amr = ["pwd".to_owned()].into()),
        "strong-authentication"
    );
    assert_eq!(
        decides(&|claims| claims.amr.clear()),
        "strong-authentication"
    );
}

#[test]
fn networks() {
    for (peer, decides) in [
        ("10.20.3.4", "release-role"),
        ("10.21.3.4", "service-networks"),
        ("2001:db8:20::1", "release-role"),
        ("2001:db8:21::1", "service-networks"),
        ("127.0.0.1", "service-networks"),
    ] {
        let peer = peer.parse().unwrap();
        let decided = with_case(&service(&[Role::Release]), |case| {
            evaluate("networks.cedar", &Case { peer, ..*case })
        });
        assert_eq!(decided, decides, "{peer}");
    }
    // Users are not services.
    assert_eq!(
        with_case(&ada(), |case| evaluate("networks.cedar", case)),
        "own-keys"
    );
}

#[test]
fn organisations() {
    for (name, organisation, decides) in [
        ("vault", "acme", "own-keys"),
        ("payroll", "acme", "payroll-for-finance"),
        ("payroll-2026", "acme", "payroll-for-finance"),
        ("payroll-2026", "finance", "own-keys"),
        ("payrolls", "acme", "own-keys"),
    ] {
        let mut ada = ada();
        ada.claims.organisations = [organisation.to_owned()].into();
        let (tenant, user, key) = (Tenant::default(), user("ada"), key_name(name));
        let resource = Resource::UserKey {
            tenant: &tenant,
            user: &user,
            name: &key,
        };
        let decided = with_case(&ada, |case| {
            evaluate("organisations.cedar", &Case { resource, ..*case })
        });
        assert_eq!(decided, decides, "{name} {organisation}");
    }
}

#[test]
fn working_hours() {
    let export = Identity {
        name: "URI:spiffe://example.org/export".to_owned(),
        ..service(&[Role::Release])
    };
    let midnight = NOON.micros() - 12 * 3_600_000_000;
    for (minutes, decides) in [
        (59, "export-at-night"),
        (60, "release-role"),
        (239, "release-role"),
        (240, "export-at-night"),
        (720, "export-at-night"),
    ] {
        let at = Timestamp::from_micros(midnight + minutes * 60_000_000);
        let decided = with_case(&export, |case| {
            evaluate("working-hours.cedar", &Case { at, ..*case })
        });
        assert_eq!(decided, decides, "{minutes}");
    }
    let other = with_case(&service(&[Role::Release]), |case| {
        evaluate("working-hours.cedar", case)
    });
    assert_eq!(other, "release-role");
}

#[test]
fn users_delete() {
    let delete = |identity: &Identity| {
        with_case(identity, |case| {
            evaluate(
                "users-delete.cedar",
                &Case {
                    action: Action::Delete,
                    ..*case
                },
            )
        })
    };
    assert_eq!(delete(&ada()), "users-delete-own");
    assert_eq!(delete(&person("bob")), "users-own-keys-only");
    assert_eq!(delete(&service(&[Role::Release])), "default-deny");
}

/// A release to the recipient with this fingerprint.
fn sealed_to(text: &str) -> Release {
    Release::Sealed(Fingerprint::from_hex(text).unwrap())
}

#[test]
fn sealed_only() {
    let decided = |release| {
        with_case(&ada(), |case| {
            evaluate("sealed-only.cedar", &Case { release, ..*case })
        })
    };
    assert_eq!(decided(Release::Plain), "sealed-only");
    assert_eq!(decided(sealed_to(&"0".repeat(64))), "own-keys");
}

#[test]
fn devices_only() {
    let decided = |action| {
        with_case(&ada(), |case| {
            evaluate("devices-only.cedar", &Case { action, ..*case })
        })
    };
    for action in [Action::Unwrap, Action::Replace, Action::Restore] {
        assert_eq!(decided(action), "devices-only");
    }
    assert_eq!(decided(Action::Create), "own-keys");
    let release = with_case(&service(&[Role::Release]), |case| {
        evaluate("devices-only.cedar", case)
    });
    assert_eq!(release, "release-role");
}

#[test]
fn approvals() {
    let approver = service(&[Role::Approver]);
    let midnight = NOON.micros() - 12 * 3_600_000_000;
    let (tenant, user) = (Tenant::default(), user("ada"));
    let resource = Resource::AccessRequest {
        tenant: &tenant,
        user: &user,
        requested_by: "token:home:ada",
        device_type: "laptop",
        peer: PEER,
        place: "",
    };
    let decided = |action, place, minutes: i64| {
        let at = Timestamp::from_micros(midnight + minutes * 60_000_000);
        let release = sealed_to(&"0".repeat(64));
        with_case(&approver, |case| {
            evaluate(
                "approvals.cedar",
                &Case {
                    action,
                    resource,
                    release,
                    place,
                    at,
                    ..*case
                },
            )
        })
    };
    let approve = Action::ApproveForMember;
    for (place, minutes, decides) in [
        ("office", 419, "approvals-in-office-hours"),
        ("office", 420, "approver-approve"),
        ("office", 1_019, "approver-approve"),
        ("office", 1_020, "approvals-in-office-hours"),
        ("", 720, "approvals-in-office-hours"),
        ("home", 720, "approvals-in-office-hours"),
    ] {
        assert_eq!(
            decided(approve, place, minutes),
            decides,
            "{place} {minutes}"
        );
    }
    assert_eq!(decided(Action::DenyAccess, "home", 0), "approver-deny");
}

#[test]
fn recipients() {
    let recovery = Identity {
        name: "URI:spiffe://example.org/recovery".to_owned(),
        ..service(&[Role::Release])
    };
    let decided = |identity: &Identity, release| {
        with_case(identity, |case| {
            evaluate("recipients.cedar", &Case { release, ..*case })
        })
    };
    let safe = "9c3e1b7a5d2f4e6081a2b3c4d5e6f708192a3b4c5d6e7f8091a2b3c4d5e6f708";
    assert_eq!(decided(&recovery, sealed_to(safe)), "release-role");
    for release in [Release::Plain, sealed_to(&"0".repeat(64))] {
        assert_eq!(decided(&recovery, release), "recovery-to-the-safes");
    }
    let other = service(&[Role::Release]);
    assert_eq!(decided(&other, Release::Plain), "release-role");
}
