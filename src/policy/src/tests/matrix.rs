//! Tests the decision for every combination of principal, action and resource against `matrix.txt`.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::vocabulary::{VOCABULARY, Wanted};

const MATRIX: &str = include_str!("matrix.txt");

fn users(names: &[&str]) -> Reach<UserId> {
    Reach::Only(names.iter().map(|name| user(name)).collect())
}

fn key_names(names: &[&str]) -> Reach<KeyName> {
    Reach::Only(names.iter().map(|name| key_name(name)).collect())
}

fn principals() -> BTreeMap<&'static str, Identity> {
    use Role::{Admin, Approver, Auditor, Enrol, Lifecycle, Release};
    let nameless = Identity {
        subject: None,
        ..person("nobody")
    };
    // A claim that is mapped to roles gives a person no role.
    let person_with_roles = Identity {
        roles: BTreeSet::from([Enrol, Lifecycle, Admin]),
        ..person("ada")
    };
    let users_only = Identity {
        users: users(&["ada"]),
        ..service(&[Release])
    };
    let key_names_only = Identity {
        key_names: key_names(&["vault"]),
        ..service(&[Release])
    };
    let both = Identity {
        users: users(&["ada"]),
        key_names: key_names(&["vault"]),
        ..service(&[Release])
    };
    let approver_of_ada = Identity {
        users: users(&["ada"]),
        ..service(&[Approver])
    };
    let nothing = Identity {
        users: users(&[]),
        ..service(&[Release])
    };
    BTreeMap::from([
        ("user-ada", person("ada")),
        ("user-bob", person("bob")),
        ("user-nameless", nameless),
        ("user-with-roles", person_with_roles),
        ("release-users", users_only),
        ("release-names", key_names_only),
        ("release-both", both),
        ("release-nothing", nothing),
        ("release-all", service(&[Release])),
        ("enrol", service(&[Enrol])),
        ("lifecycle", service(&[Lifecycle])),
        ("admin", service(&[Admin])),
        ("auditor", service(&[Auditor])),
        ("ops", service(&[Admin, Auditor])),
        ("vault", service(&[Release, Enrol, Lifecycle])),
        ("no-role", service(&[])),
        ("approver-ada", approver_of_ada),
        ("approver-all", service(&[Approver])),
        ("conflicting", service(&[Release, Admin])),
        ("conflicting-2", service(&[Release, Auditor, Enrol])),
    ])
}

/// The parts of a resource: tenant, user and key name.
const RESOURCES: [(&str, &str, &str, &str); 16] = [
    ("own", "default", "ada", "vault"),
    ("own-mail", "default", "ada", "mail"),
    ("other", "default", "bob", "vault"),
    ("other-mail", "default", "bob", "mail"),
    ("tenant", "elsewhere", "ada", "vault"),
    ("list-own", "default", "ada", "-"),
    ("list-other", "default", "bob", "-"),
    ("list-all", "default", "-", "-"),
    ("list-tenant", "elsewhere", "ada", "-"),
    ("broker", "-", "-", "-"),
    ("devices-own", "default", "ada", "-"),
    ("devices-other", "default", "bob", "-"),
    ("devices-all", "default", "-", "-"),
    ("devices-tenant", "elsewhere", "ada", "-"),
    ("request-own", "default", "ada", "-"),
    ("request-other", "default", "bob", "-"),
];

fn evaluate(policy: &Policy, identity: &Identity, action: Action, resource: &str) -> Verdict {
    let (_, owner, whose, name) = RESOURCES
        .into_iter()
        .find(|(known, ..)| *known == resource)
        .unwrap();
    let owner = if owner == "-" {
        Tenant::default()
    } else {
        tenant(owner)
    };
    let (whose, name) = (UserId::parse(whose).unwrap(), key_name(name));
    let (tenant, user) = (&owner, &whose);
    let resource = match resource {
        "broker" => Resource::Broker,
        "list-all" => Resource::UserKeys { tenant, user: None },
        list if list.starts_with("list") => Resource::UserKeys {
            tenant,
            user: Some(user),
        },
        "devices-all" => Resource::Devices { tenant, user: None },
        devices if devices.starts_with("devices") => Resource::Devices {
            tenant,
            user: Some(user),
        },
        request if request.starts_with("request") => Resource::AccessRequest {
            tenant,
            user,
            requested_by: "token:home:other",
            device_type: "laptop",
            peer: PEER,
            place: "",
        },
        _ => Resource::UserKey {
            tenant,
            user,
            name: &name,
        },
    };
    policy.evaluate(&Case {
        identity,
        action,
        resource,
        release: Release::Plain,
        peer: PEER,
        place: "",
        at: NOON,
    })
}

#[test]
fn every_cell_has_its_answer() {
    let policy = shipped();
    let principals = principals();
    let mut lines = MATRIX
        .lines()
        .filter(|line| !line.trim().is_empty() && !line.starts_with('#'));
    let columns: Vec<&str> = lines.next().unwrap().split_whitespace().skip(2).collect();
    let actions: Vec<&str> = Action::ALL.iter().map(|action| action.as_str()).collect();
    assert_eq!(columns, actions, "a new action needs a column");

    let mut seen = BTreeSet::new();
    let mut wrong = Vec::new();
    for line in lines {
        let mut words = line.split_whitespace();
        let (principal, resource) = (words.next().unwrap(), words.next().unwrap());
        let cells: Vec<&str> = words.collect();
        assert_eq!(cells.len(), actions.len(), "{line}");
        assert!(seen.insert((principal, resource)), "twice: {line}");
        let identity = principals
            .get(principal)
            .unwrap_or_else(|| panic!("{line}"));
        for (action, cell) in Action::ALL.into_iter().zip(cells) {
            let verdict = evaluate(&policy, identity, action, resource);
            let actual = if verdict.allowed { "yes" } else { "-" };
            if actual != cell {
                wrong.push(format!(
                    "{principal} {resource} {action}: {actual}, not {cell} ({})",
                    verdict.policy
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert_eq!(
        seen.len(),
        principals.len() * RESOURCES.len(),
        "a cell is missing"
    );
}

/// The matrix shows only the result. This test checks which policy decides, for the combinations
/// that are most important to an auditor.
#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn a_decision_names_its_policy() {
    let (policy, principals) = (shipped(), principals());
    for (principal, action, resource, named) in [
        ("user-ada", Action::Unwrap, "own", "own-keys"),
        ("user-ada", Action::List, "list-own", "own-list"),
        ("user-ada", Action::Unwrap, "other", "users-own-keys-only"),
        ("user-ada", Action::Delete, "own", "default-deny"),
        (
            "user-ada",
            Action::ReadToken,
            "broker",
            "users-never-control",
        ),
        (
            "user-with-roles",
            Action::CreateClient,
            "broker",
            "users-never-control",
        ),
        ("enrol", Action::ReadToken, "broker", "control-within-roles"),
        (
            "auditor",
            Action::CreateClient,
            "broker",
            "client-changes-by-administrators",
        ),
        (
            "admin",
            Action::ReadAudit,
            "broker",
            "audit-log-by-auditors",
        ),
        (
            "auditor",
            Action::Replace,
            "own",
            "controllers-never-change-keys",
        ),
        ("release-all", Action::Unwrap, "own", "release-role"),
        (
            "release-users",
            Action::Unwrap,
            "other",
            "release-within-grant",
        ),
        ("release-all", Action::Unwrap, "tenant", "own-tenant"),
        ("enrol", Action::Create, "own", "enrol-role"),
        ("enrol", Action::Unwrap, "own", "release-within-grant"),
        ("lifecycle", Action::Restore, "own", "lifecycle-role"),
        ("auditor", Action::Get, "own", "metadata-roles"),
        ("auditor", Action::Unwrap, "own", "auditors-never-unwrap"),
        ("auditor", Action::ReadAudit, "broker", "auditor-role"),
        (
            "admin",
            Action::Unwrap,
            "own",
            "administrators-never-unwrap",
        ),
        ("admin", Action::ReadToken, "broker", "control-roles"),
        (
            "conflicting",
            Action::ReadToken,
            "broker",
            "separation-of-duties",
        ),
        ("no-role", Action::Get, "own", "default-deny"),
        ("release-all", Action::Get, "broker", "unasked"),
        (
            "user-ada",
            Action::EstablishDevice,
            "devices-own",
            "own-devices",
        ),
        (
            "user-ada",
            Action::UntrustDevice,
            "devices-other",
            "users-own-devices-only",
        ),
        (
            "approver-ada",
            Action::DenyAccess,
            "request-other",
            "devices-within-grant",
        ),
        (
            "admin",
            Action::ListAccess,
            "devices-own",
            "devices-within-grant",
        ),
    ] {
        let verdict = evaluate(&policy, &principals[principal], action, resource);
        assert_eq!(&*verdict.policy, named, "{principal} {action} {resource}");
    }
}

/// The broadest permit policy that an operator can write changes no decision about the control
/// plane, for any principal. The permit policy gives no user's key to another user. An
/// administrator or auditor still cannot replace a user's key with a different key.
/// The permit policy only lets administrators destroy wrapping keys without the waiting time.
#[test]
fn a_permit_for_everything_opens_neither_the_control_plane_nor_other_users_keys() {
    let wide = "@id(\"wide\") permit (principal, action, resource);";
    let (_folder, wide) = with_files(&[("wide.cedar", wide)]).unwrap();
    let shipped = shipped();
    let changes = [
        Action::Create,
        Action::Replace,
        Action::Delete,
        Action::Undelete,
        Action::Restore,
    ];
    let mut opened = 0;
    for (name, identity) in principals() {
        for (resource, _, whose, _) in RESOURCES {
            for action in Action::ALL {
                let verdict = evaluate(&wide, &identity, action, resource);
                let without = evaluate(&shipped, &identity, action, resource);
                opened += usize::from(verdict.allowed && !without.allowed);
                let subject = identity.subject.as_ref().map(AsRef::as_ref);
                let is_foreign = identity.kind == Kind::User && subject != Some(whose);
                let is_controller = matches!(name, "admin" | "auditor" | "ops");
                let is_change = is_controller && changes.contains(&action);
                let may_destroy = evaluate(&shipped, &identity, Action::DestroyKey, resource);
                if action == Action::DestroyKeyNow && may_destroy.allowed {
                    // The operators decide whether administrators may do it, so a permit must be able to open it.
                    assert_eq!((verdict.allowed, without.allowed), (true, false), "{name}");
                    continue;
                }
                let is_of_devices =
                    resource.starts_with("devices") || resource.starts_with("request");
                if resource == "broker"
                    || is_of_devices
                    || is_foreign
                    || is_change
                    || action == Action::Unwrap
                {
                    assert_eq!(
                        (verdict.allowed, &*verdict.policy == "wide"),
                        (without.allowed, false),
                        "{name} {action} {resource}: {}",
                        verdict.policy
                    );
                }
            }
        }
    }
    assert!(opened > 0, "the permit has no effect at all");
}

fn any_identity() -> impl Strategy<Value = Identity> {
    let texts = || prop::collection::btree_set("[a-z*\\\\\"]{0,6}", 0..3);
    let claims = (
        texts(),
        prop::option::of(".{0,8}"),
        prop::option::of(any::<i64>()),
        prop::option::of(".{0,8}"),
        texts(),
        prop::collection::btree_map("[a-z]{1,6}", texts(), 0..3),
    );
    let claims = claims.prop_map(
        |(amr, acr, authenticated, device, organisations, attributes)| Claims {
            amr,
            acr,
            authenticated: authenticated.map(Timestamp::from_micros),
            device,
            organisations,
            attributes,
            expires: None,
        },
    );
    let roles = prop::collection::btree_set(prop::sample::select(Role::ALL.to_vec()), 0..4);
    let subject = prop::option::of("[ab]{1,2}");
    let mapping = prop::option::of("[a-z]{1,3}");
    (
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
        roles,
        subject,
        mapping,
        claims,
    )
        .prop_map(
            |(is_user, all_users, all_names, roles, subject, mapping, claims)| Identity {
                kind: if is_user { Kind::User } else { Kind::Service },
                users: if all_users { Reach::All } else { users(&["a"]) },
                key_names: if all_names {
                    Reach::All
                } else {
                    key_names(&["vault"])
                },
                subject: subject.as_deref().map(user),
                mapping,
                claims,
                ..service(&Vec::from_iter(roles))
            },
        )
}

/// Tenant, user and key name. Each kind of resource has only the parts that it needs.
type Target = (Tenant, UserId, KeyName, bool);

fn any_target() -> impl Strategy<Value = Target> {
    let tenants = prop::sample::select(vec!["default", "elsewhere"]);
    (
        "[ab\"/\\\\]{1,2}",
        prop::sample::select(vec!["vault", "mail"]),
        tenants,
        any::<bool>(),
    )
        .prop_map(|(whose, name, owner, one)| (tenant(owner), user(&whose), key_name(name), one))
}

fn case<'a>(
    identity: &'a Identity,
    action: Action,
    target: &'a Target,
    release: Release,
    peer: IpAddr,
    at: i64,
) -> Case<'a> {
    let (tenant, user, name, one) = target;
    let candidates = [
        Resource::Broker,
        Resource::UserKeys {
            tenant,
            user: one.then_some(user),
        },
        Resource::UserKey { tenant, user, name },
        Resource::Devices {
            tenant,
            user: one.then_some(user),
        },
        Resource::AccessRequest {
            tenant,
            user,
            requested_by: "token:home:a",
            device_type: "laptop",
            peer,
            place: "office",
        },
    ];
    let resource = candidates
        .into_iter()
        .find(|resource| resource.suits(action))
        .unwrap();
    Case {
        identity,
        action,
        resource,
        release,
        peer,
        place: "office",
        at: Timestamp::from_micros(at),
    }
}

/// A policy that uses every attribute, so that each is passed and evaluated.
const EVERYTHING: &str = r#"
@id("everything-of-a-release")
forbid (principal, action == Keybroker::Action::"user_key.unwrap", resource) when {
    context.release == "sealed" && context has recipient && context.recipient like "0*" ||
    context.amr.contains("a") || context has acr && context.acr == "b" ||
    context has device && context.device == "c" || context.organisations.containsAny(["d", "a"]) ||
    context has authAgeSeconds && context.authAgeSeconds > 3600 || context.peer.isInRange(ip("10.0.0.0/8")) ||
    context.time < datetime("1999-01-01") || resource.keyName == "mail" || resource.tenant == "x" ||
    principal.name like "*x*" || principal.credential == "token" || principal.tenant == "y"
};
@id("everything-of-a-request")
forbid (principal, action in [Keybroker::Action::"access_request.approve", Keybroker::Action::"access_request.deny"], resource) when {
    resource.requestedBy like "*z" || resource.deviceType == "phone" || resource.requestPeer.isLoopback() || resource.requestPlace == "x" || context.place == "y" || resource.user == "b"
};
@id("everything-of-a-service")
forbid (principal is Keybroker::Service, action in Keybroker::Action::"user_keys", resource) when {
    principal.allUsers && !principal.allKeyNames || principal.hasTag("a") && principal.getTag("a").contains("b")
};
"#;

proptest! {
    /// Without a permit that applies, no principal may do anything. Every allowed action was allowed by a permit.
    #[test]
    fn without_a_permit_everything_is_denied(
        identity in any_identity(),
        action in prop::sample::select(Action::ALL.to_vec()),
        target in any_target(),
    ) {
        let case = case(&identity, action, &target, Release::Plain, PEER, 0);
        let (_folder, forbids) = {
            let folder = tempfile::tempdir().unwrap();
            let settings = Settings { defaults: false, directory: Some(folder.path().to_owned()) };
            let policy = Policy::load(&settings, Networks::default()).unwrap();
            (folder, policy)
        };
        prop_assert!(!forbids.evaluate(&case).allowed);
        let verdict = shipped().evaluate(&case);
        prop_assert_eq!(verdict.allowed, shipped_permits().contains(&&*verdict.policy), "{:?}", verdict);
    }

    /// Each case conforms to the schema, and leaving out unused policies and attributes changes no decision.
    #[test]
    fn cases_conform_and_slices_decide_like_the_whole(
        identity in any_identity(),
        action in prop::sample::select(Action::ALL.to_vec()),
        target in any_target(),
        peer: u128,
        is_v4: bool,
        at in -62_000_000_000_000_000_i64..250_000_000_000_000_000,
        recipient in prop::option::of(any::<[u8; 32]>()),
    ) {
        let peer = if is_v4 {
            IpAddr::from(peer.to_be_bytes()[..4].try_into().map(|octets: [u8; 4]| octets).unwrap())
        } else {
            IpAddr::from(peer.to_be_bytes())
        };
        let release = recipient.map_or(Release::Plain, |it| Release::Sealed(Fingerprint(it)));
        let case = case(&identity, action, &target, release, peer, at);
        VOCABULARY.ask(&case, Wanted::All, Some(&VOCABULARY.schema)).unwrap();
        let (_folder, policy) = with_files(&[("everything.cedar", EVERYTHING)]).unwrap();
        let set = policy.current.load();
        prop_assert_eq!(engine::evaluate(&set, &case), engine::evaluate_all(&set, &case));
    }
}

fn shipped_permits() -> BTreeSet<&'static str> {
    let text = include_str!("../default.cedar");
    let permits = text.split("@id(\"").skip(1).filter_map(|part| {
        let (id, rest) = part.split_once('"')?;
        rest.trim_start_matches(')')
            .trim_start()
            .starts_with("permit")
            .then_some(id)
    });
    permits.collect()
}
