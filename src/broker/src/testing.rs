//! Principals for the unit tests of this crate.

use keybroker_core::{
    key::Tenant,
    principal::{Claims, Credential, Identity, Kind, Principal, Reach, Role},
};

/// A service of the default tenant that reaches all keys its roles allow.
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
