//! Principals and registry rows for the unit tests.

use keybroker_core::{
    call::Timestamp,
    key::{Fingerprint, ObjectIds, Purpose, Tenant, WrappingKeyId, WrappingKeyState},
    principal::{Claims, Credential, Identity, Kind, Principal, Reach, Role},
};
use keybroker_store::RegistryRow;

/// Returns the registry row of a key.
pub(crate) fn registered(id: WrappingKeyId, state: WrappingKeyState, sequence: u64) -> RegistryRow {
    RegistryRow {
        id,
        objects: ObjectIds::default(),
        fingerprint: Fingerprint([1; 32]),
        purpose: Purpose::Plain,
        state,
        token_serial: "0001".to_owned(),
        sequence,
        registered: Timestamp::from_micros(1),
        backup_confirmed: None,
        mac: [0; 32],
    }
}

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
        mapping: None,
        claims: Claims::default(),
    })
}
