//! Removes the objects of a wrapping key from the token.

use cryptoki::object::{Attribute, ObjectClass, ObjectHandle};

use keybroker_core::key::{IntegrityPlace, ObjectId};
use keybroker_pkcs11_ffi::Session;

use crate::{calling, classify::Fault};

use super::{Place, find_one, integrity_ids, making::destroy};

/// Removes the RSA private key, its public key and its integrity key. Returns the number of removed objects, which is 0 if
/// the token has none of them. An interrupted removal can be repeated: missing objects are not an error.
///
/// The private key is removed first, because the other objects are useless without it. The session must be read-write.
pub(crate) fn remove(session: &Session, key: &Place) -> Result<u32, Fault> {
    let own = ObjectId::from(key.id);
    let private_id = key.objects.private.as_ref().unwrap_or(&own);
    let private = find_one(session, ObjectClass::PRIVATE_KEY, private_id)?;
    let integrity_key = integrity_key(session, key)?;
    let mut objects = Vec::new();
    objects.extend(private.map(|object| ("the RSA private key", object)));
    let public = find_all(session, ObjectClass::PUBLIC_KEY, private_id)?;
    objects.extend(
        public
            .into_iter()
            .map(|object| ("the RSA public key", object)),
    );
    objects.extend(integrity_key.map(|object| ("the integrity key", object)));
    let mut removed = 0;
    for (what, object) in objects {
        destroy(session, object).map_err(|fault| {
            fault.with(&format!(
                "the token did not remove {what} of key {}; {removed} of its objects were removed before",
                key.id
            ))
        })?;
        removed += 1;
    }
    Ok(removed)
}

/// Finds the integrity key, if it is an object on the token.
fn integrity_key(session: &Session, key: &Place) -> Result<Option<ObjectHandle>, Fault> {
    let candidates = match &key.objects.integrity {
        IntegrityPlace::Object(named) => vec![named.clone()],
        IntegrityPlace::Token => integrity_ids(key).to_vec(),
        IntegrityPlace::Worker => Vec::new(),
    };
    for candidate in candidates {
        if let Some(found) = find_one(session, ObjectClass::SECRET_KEY, &candidate)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

fn find_all(
    session: &Session,
    class: ObjectClass,
    id: &ObjectId,
) -> Result<Vec<ObjectHandle>, Fault> {
    let template = [
        Attribute::Class(class),
        Attribute::Id(id.as_bytes().to_vec()),
    ];
    calling::next("C_FindObjects");
    Ok(session.find_objects(&template)?)
}
