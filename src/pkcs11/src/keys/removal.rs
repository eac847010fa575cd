//! Removes the objects of a wrapping key from the token.

use cryptoki::object::{Attribute, KeyType, ObjectClass, ObjectHandle};

use keybroker_core::key::{IntegrityPlace, ObjectId};
use keybroker_pkcs11_ffi::Session;
use keybroker_worker_protocol::wire::RemoveKey;

use crate::{
    calling,
    classify::{Class, Fault},
    operation,
};

use super::{KeyPair, Place, find_one, integrity_ids, making::destroy, public_side, session_pair};

/// What the objects of a key must match before they are removed. The `CKA_ID`s of the objects can come from a row that a person
/// edited, so that they are those of another key. An empty field is not compared.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Identity<'a> {
    /// The fingerprint of the public key, 32 bytes.
    fingerprint: &'a [u8],
    /// The row that names the objects. The integrity key of the wrapping key must have made its MAC.
    message: &'a [u8],
    mac: &'a [u8],
    /// Whether nothing is removed, and only the fingerprint is searched for.
    is_check: bool,
}

impl<'a> Identity<'a> {
    pub(crate) fn of(job: &'a RemoveKey) -> Self {
        Self {
            fingerprint: &job.fingerprint,
            message: &job.place_message,
            mac: &job.place_mac,
            is_check: job.check_only,
        }
    }

    fn check(
        &self,
        session: &Session,
        key: &Place,
        private: Option<ObjectHandle>,
        integrity_key: Option<ObjectHandle>,
    ) -> Result<(), Fault> {
        let untrusted = |what: String| Err(Fault::new(Class::Untrusted, what));
        if let (Some(private), false) = (private, self.fingerprint.is_empty()) {
            let found = public_side(session, &pair_of(key, private, private))?.fingerprint;
            if found.0.as_slice() != self.fingerprint {
                return untrusted(format!(
                    "the RSA private key that the registry names for key {} is another key, with the fingerprint {found}; \
                     nothing was removed",
                    key.id
                ));
            }
        }
        if let (Some(object), false) = (integrity_key, self.message.is_empty()) {
            let pair = pair_of(key, private.unwrap_or(object), object);
            match operation::verify(session, &pair, self.message, self.mac) {
                Ok(()) => {}
                Err(fault) if !matches!(fault.class, Class::Input | Class::Ambiguous) => {
                    return Err(fault);
                }
                Err(_) => {
                    return untrusted(format!(
                        "the integrity key that the registry names for key {} did not authenticate the row that names it; \
                         nothing was removed",
                        key.id
                    ));
                }
            }
        }
        Ok(())
    }
}

fn pair_of(key: &Place, private: ObjectHandle, integrity_key: ObjectHandle) -> KeyPair {
    KeyPair {
        id: key.id,
        ..session_pair(private, integrity_key.into())
    }
}

/// Removes the RSA private key, its public key and its integrity key. Returns the number of removed objects, which is 0 if
/// the token has none of them. An interrupted removal can be repeated: missing objects are not an error.
///
/// The private key is removed first, because the other objects are useless without it. The session must be read-write.
/// All objects are compared with `identity` before the first one is removed.
pub(crate) fn remove(
    session: &Session,
    key: &Place,
    identity: &Identity<'_>,
) -> Result<u32, Fault> {
    if identity.is_check {
        refuse_remaining(session, key, identity)?;
        return Ok(0);
    }
    let own = ObjectId::from(key.id);
    let private_id = key.objects.private.as_ref().unwrap_or(&own);
    let private = find_one(session, ObjectClass::PRIVATE_KEY, private_id)?;
    let integrity_key = integrity_key(session, key)?;
    identity.check(session, key, private, integrity_key)?;
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
    refuse_remaining(session, key, identity)?;
    Ok(removed)
}

/// Fails while the token still has a private key with the fingerprint of the removed key. A row that was edited can name objects
/// that do not exist, so a removal of nothing does not show that the key is gone.
fn refuse_remaining(session: &Session, key: &Place, identity: &Identity<'_>) -> Result<(), Fault> {
    if identity.fingerprint.is_empty() {
        return Ok(());
    }
    let template = [
        Attribute::Class(ObjectClass::PRIVATE_KEY),
        Attribute::KeyType(KeyType::RSA),
    ];
    calling::next("C_FindObjects");
    for object in session.find_objects(&template)? {
        // A key that does not show its modulus cannot be a wrapping key of this broker.
        let side = public_side(session, &pair_of(key, object, object));
        if side.is_ok_and(|side| side.fingerprint.0.as_slice() == identity.fingerprint) {
            return Err(Fault::new(
                Class::Configuration,
                format!(
                    "the token still has a private key with the fingerprint of key {}, under another CKA_ID: remove this key with \
                     the vendor's tool",
                    key.id
                ),
            ));
        }
    }
    Ok(())
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
