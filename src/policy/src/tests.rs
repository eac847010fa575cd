//! Tests the documented properties of the policies.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use keybroker_core::principal::{Claims, Credential, Kind, Reach, Role};

use super::*;

mod cost;
mod examples;
mod kept;
mod matrix;
mod mistakes;
mod operator;
mod reload;

/// Midday, 2026-11-21.
const NOON: Timestamp = Timestamp::from_micros(1_795_262_400_000_000);
const PEER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 1, 2, 3));

fn user(name: &str) -> UserId {
    UserId::parse(name).unwrap()
}

fn key_name(name: &str) -> KeyName {
    KeyName::parse(name).unwrap()
}

fn tenant(name: &str) -> Tenant {
    Tenant::parse(name).unwrap()
}

/// A user with an access token.
fn person(subject: &str) -> Identity {
    Identity {
        name: format!("token:home:{subject}"),
        credential: Credential::Token,
        kind: Kind::User,
        tenant: Tenant::default(),
        roles: BTreeSet::new(),
        users: Reach::Only(BTreeSet::new()),
        key_names: Reach::Only(BTreeSet::new()),
        subject: Some(user(subject)),
        mapping: None,
        claims: Claims::default(),
    }
}

/// The user `ada`, who authenticated five minutes ago.
fn ada() -> Identity {
    let mut ada = person("ada");
    ada.claims = Claims {
        amr: BTreeSet::from(["pwd".to_owned(), "otp".to_owned()]),
        acr: Some("urn:level:2".to_owned()),
        authenticated: Some(Timestamp::from_micros(NOON.micros() - 300_000_000)),
        device: Some("laptop".to_owned()),
        organisations: BTreeSet::from(["acme".to_owned()]),
        attributes: BTreeMap::from([("groups".to_owned(), BTreeSet::from(["staff".to_owned()]))]),
        expires: None,
    };
    ada
}

/// Returns a service with the roles `roles` and a grant for all keys.
fn service(roles: &[Role]) -> Identity {
    Identity {
        name: "URI:spiffe://example.org/service".to_owned(),
        credential: Credential::Certificate,
        kind: Kind::Service,
        roles: roles.iter().copied().collect(),
        users: Reach::All,
        key_names: Reach::All,
        subject: None,
        ..person("nobody")
    }
}

fn shipped() -> Arc<Policy> {
    Policy::load(&Settings::default(), Networks::default()).unwrap()
}

/// Returns a policy set with the files `files` of an operator.
fn with_files(files: &[(&str, &str)]) -> Result<(tempfile::TempDir, Arc<Policy>), Problems> {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    let settings = Settings {
        directory: Some(folder.path().to_owned()),
        ..Settings::default()
    };
    let policy = Policy::load(&settings, Networks::default())?;
    Ok((folder, policy))
}

/// A case about `ada`'s key `vault`, at noon.
fn unwrap_of_ada(identity: &Identity, evaluate: impl FnOnce(&Case<'_>) -> Verdict) -> Verdict {
    with_case(identity, evaluate)
}

fn with_case<T>(identity: &Identity, evaluate: impl FnOnce(&Case<'_>) -> T) -> T {
    let (tenant, user, name) = (Tenant::default(), user("ada"), key_name("vault"));
    evaluate(&Case {
        identity,
        action: Action::Unwrap,
        resource: Resource::UserKey {
            tenant: &tenant,
            user: &user,
            name: &name,
        },
        release: Release::Plain,
        peer: PEER,
        place: "",
        at: NOON,
    })
}
