//! Tests that only the objects of the right key are removed.

use keybroker_core::key::{ObjectIds, WrappingKeyId};
use keybroker_worker_protocol::{oaep, wire::RemoveKey};

use super::{Admin, AdminError, USER_PIN, id, init, pin, record, settings, with_softhsm};

use crate::{admin::CheckedKey, keys::Identity};

const MESSAGE: &[u8] = b"the row that names the objects";

/// Tries to remove the objects that a row names for a key with this fingerprint.
fn removed(
    admin: &mut Admin,
    named: (WrappingKeyId, ObjectIds),
    fingerprint: &CheckedKey,
    mac: &[u8],
) -> Result<u32, AdminError> {
    let (id, objects) = named;
    admin.know(id, objects);
    let job = RemoveKey {
        key_id: id.as_bytes().to_vec(),
        fingerprint: oaep::fingerprint(&fingerprint.spki).0.to_vec(),
        place_message: MESSAGE.to_vec(),
        place_mac: mac.to_vec(),
        check_only: false,
    };
    admin.remove_key(id, &Identity::of(&job))
}

/// Searches for the private key with this fingerprint under any `CKA_ID`.
fn searched(admin: &mut Admin, fingerprint: &CheckedKey) -> Result<u32, AdminError> {
    let job = RemoveKey {
        key_id: id(9).as_bytes().to_vec(),
        fingerprint: oaep::fingerprint(&fingerprint.spki).0.to_vec(),
        check_only: true,
        ..RemoveKey::default()
    };
    admin.remove_key(id(9), &Identity::of(&job))
}

/// A row that a person edited names the objects of the key in use.
#[test]
fn the_objects_of_another_key_are_not_removed() {
    with_softhsm(
        "removal::the_objects_of_another_key_are_not_removed",
        |_| {
            init();
            let mut admin = Admin::open(&settings(), &record(), &pin(USER_PIN), true).unwrap();
            let [old, used] = [0, 1].map(|_| admin.generate_key(2_048, None).unwrap());
            let [by_old, by_used] = [&old, &used].map(|key| admin.mac(key.id, MESSAGE).unwrap());
            let of =
                |key: &CheckedKey| ObjectIds::from_slices(key.id.as_bytes(), key.id.as_bytes());
            let mut refused = |objects: Option<ObjectIds>, fingerprint: &CheckedKey, mac: &[u8]| {
                let error =
                    removed(&mut admin, (id(9), objects.unwrap()), fingerprint, mac).unwrap_err();
                assert!(matches!(error, AdminError::Untrusted(_)), "{error}");
                assert!(error.to_string().contains("nothing was removed"), "{error}");
                for key in [&old, &used] {
                    assert_eq!(admin.check(key.id).unwrap().problem, None);
                }
            };
            refused(of(&used), &old, &by_old);
            refused(of(&used), &old, &by_used);
            // The row names the private key of the one and the integrity key of the other.
            let mixed = ObjectIds::from_slices(old.id.as_bytes(), used.id.as_bytes());
            refused(mixed, &old, &by_old);
            refused(of(&old), &old, &by_used);
            // Only the integrity key of the other exists.
            let absent = ObjectIds::from_slices(&[1], used.id.as_bytes());
            refused(absent, &old, &by_old);

            // A row that names nothing must not pass for a removal.
            let nothing = ObjectIds::from_slices(&[1], &[2]).unwrap();
            let error = removed(&mut admin, (id(9), nothing), &old, &by_old).unwrap_err();
            assert!(matches!(error, AdminError::Token(_)), "{error}");
            assert!(
                error.to_string().contains("still has a private key"),
                "{error}"
            );

            // A search removes nothing, and finds the key under an id that no row names.
            let error = searched(&mut admin, &old).unwrap_err();
            assert!(
                error.to_string().contains("still has a private key"),
                "{error}"
            );
            assert_eq!(admin.key_ids().unwrap().len(), 2);

            let found = removed(&mut admin, (id(9), of(&old).unwrap()), &old, &by_old);
            assert_eq!(found.unwrap(), 3);
            assert_eq!(searched(&mut admin, &old).unwrap(), 0);
            assert_eq!(admin.key_ids().unwrap(), [used.id.into()]);
            let again = removed(&mut admin, (id(9), of(&old).unwrap()), &old, &by_old);
            assert_eq!(again.unwrap(), 0);
        },
    );
}
