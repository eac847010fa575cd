//! Principals for the unit tests.

use keybroker_core::{
    key::Tenant,
    principal::{Claims, Credential, Identity, Kind, Principal, Reach, Role},
};

/// Returns a service of the default tenant that may use every key that its roles allow.
pub(crate) fn service(name: &str, roles: &[Role]) -> Principal {
    Principal::authenticated(Identity {
        name: name.to_owned(),
        credential: Credential::Certificate,
        kind: Kind::Service,
        tenant: Tenant::default(),
        roles: roles.iter().copied().collect(),
        users: Reach::All,
        key_names: Reach::All,
        subject: None,
        claims: Claims::default(),
    })
}
