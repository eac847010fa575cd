//! Makes, finds and checks the keys on the token. The template of a new key sets every usage flag. Each key must be
//! found exactly once, and must pass the attribute check and the self-test.
//!
//! Mitigation: M16 of `THREAT_MODEL.md`.

use std::cell::RefCell;

use aws_lc_rs::digest;
use cryptoki::{
    error::{Error, RvError},
    object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle},
    slot::Slot,
};

use keybroker_core::key::{
    Fingerprint, ID_BYTES, IntegrityPlace, ObjectId, ObjectIds, Purpose, WrappingKeyId,
};
use keybroker_pkcs11_ffi::{Module, Session};
use keybroker_worker_protocol::{Settings, oaep};

use crate::{
    attribute_check::{self, Finding, Rule},
    calling,
    classify::{Class, Fault},
    mac_key::{MacKey, WorkerKey},
    recipients::Recipients,
};

mod making;
mod organization;
mod removal;
mod signing;
mod templates;

pub(super) use making::{
    Cause, Making, Refusal, Terms, cause_of_refusal, generate, generate_for_session,
    generate_with_id,
};
pub(super) use organization::{OrganizationKey, import_organization_key, organization_key};
pub(super) use removal::{Identity, remove};
pub(super) use signing::{SigningKey, has_signing_key, make_signing_key, sign};
pub(super) use templates::{
    HmacKey, Lifetime, adapted, integrity_mechanism, integrity_template, object_template,
    private_template, public_template, sealed_template, unwrap_template,
};
#[cfg(test)]
pub(super) use templates::{generic_secret_template, template_of};

/// Prefix for deriving a separate `CKA_ID` for an integrity key, on tokens that do not allow two objects with the same
/// `CKA_ID`.
const OWN_ID_DOMAIN: &[u8] = b"keybroker/integrity-key-id/v1";

/// A wrapping key, with the `CKA_ID`s by which its objects are found.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) id: WrappingKeyId,
    pub(super) objects: ObjectIds,
    pub(super) purpose: Purpose,
    /// The integrity key, if it is in the memory of this process.
    pub(super) secret: Option<WorkerKey>,
}

impl From<WrappingKeyId> for Place {
    fn from(id: WrappingKeyId) -> Self {
        Self::of(id, ObjectIds::default())
    }
}

impl Place {
    /// Returns the place of a plain key whose integrity key is on the token or is not yet unwrapped.
    pub(super) fn of(id: WrappingKeyId, objects: ObjectIds) -> Self {
        Self {
            id,
            objects,
            purpose: Purpose::Plain,
            secret: None,
        }
    }
}

/// A wrapping key and its integrity key, as handles that are valid in the sessions of one login.
#[derive(Clone, Debug)]
pub(super) struct KeyPair {
    pub(super) id: WrappingKeyId,
    /// The only use of the RSA private key.
    pub(super) purpose: Purpose,
    /// The `CKA_ID` of the objects that were found.
    pub(super) objects: ObjectIds,
    pub(super) private: ObjectHandle,
    pub(super) integrity_key: MacKey,
}

/// The public key of a wrapping key, computed from the private object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PublicSide {
    pub(super) spki: Vec<u8>,
    pub(super) fingerprint: Fingerprint,
    /// Big-endian, as the token returned it.
    pub(super) modulus: Vec<u8>,
    pub(super) modulus_bits: usize,
}

/// Opens a session for reading: read-only, or read-write on tokens without read-only sessions.
pub(super) fn reading_session(module: &Module, slot: Slot) -> Result<Session, Fault> {
    calling::next("C_OpenSession");
    match module.open_ro_session(slot) {
        Err(Error::Pkcs11(
            RvError::TokenWriteProtected
            | RvError::SessionReadOnly
            | RvError::SessionReadOnlyExists
            | RvError::FunctionNotSupported
            | RvError::FunctionFailed
            | RvError::ArgumentsBad,
            _,
        )) => writing_session(module, slot),
        other => other.map_err(no_session),
    }
}

/// Opens a session that can make and remove objects.
pub(super) fn writing_session(module: &Module, slot: Slot) -> Result<Session, Fault> {
    calling::next("C_OpenSession");
    module.open_rw_session(slot).map_err(no_session)
}

/// Adds a hint to the error of a token without a free session: the settings that reduce the number of sessions.
fn no_session(error: Error) -> Fault {
    let is_full = matches!(error, Error::Pkcs11(RvError::SessionCount, _));
    let fault = Fault::from(error);
    if is_full {
        fault.with(
            "the token has no free session; each worker opens at least one session more than `sessions_per_worker`: \
             reduce `sessions_per_worker` or `workers` in [token]",
        )
    } else {
        fault
    }
}

/// One session with the handles of the keys. Only one thread uses the session.
#[derive(Debug)]
pub(super) struct KeySession {
    pub(super) session: Session,
    pairs: Vec<KeyPair>,
    /// The recipients of sealed releases whose keys the session has. The keys end with the session.
    pub(super) recipients: RefCell<Recipients>,
}

impl KeySession {
    /// Opens a session and finds the keys again. A handle is valid only until the sessions of its login end.
    /// Afterwards, the handle may refer to another object.
    pub(super) fn open(module: &Module, slot: Slot, keys: &[Place]) -> Result<Self, Fault> {
        let session = reading_session(module, slot)?;
        let pairs = keys
            .iter()
            .map(|key| find(&session, key))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            session,
            pairs,
            recipients: RefCell::default(),
        })
    }

    pub(super) fn pair(&self, id: WrappingKeyId) -> Option<&KeyPair> {
        self.pairs.iter().find(|pair| pair.id == id)
    }
}

impl KeyPair {
    pub(super) fn place(&self) -> Place {
        Place {
            id: self.id,
            objects: self.objects.clone(),
            purpose: self.purpose,
            secret: self.integrity_key.secret().cloned(),
        }
    }
}

/// Returns the separate `CKA_ID` of an integrity key, for tokens that do not allow two objects with the same `CKA_ID`.
/// The `CKA_ID` is derived from the wrapping key's id, so that the integrity key can be found before it is registered.
fn own_integrity_id(id: WrappingKeyId) -> ObjectId {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(OWN_ID_DOMAIN);
    context.update(id.as_bytes());
    let digest = context.finish();
    ObjectId::from_slice(&digest.as_ref()[..ID_BYTES]).expect("16 bytes are a permitted length")
}

/// Finds both objects of a key: exactly one RSA private key, and exactly one secret key. If the integrity key is in the
/// memory of this process, finds only the RSA private key.
pub(super) fn find(session: &Session, key: &Place) -> Result<KeyPair, Fault> {
    let id = ObjectId::from(key.id);
    let private_id = key.objects.private.as_ref().unwrap_or(&id);
    let private = find_one(session, ObjectClass::PRIVATE_KEY, private_id)?
        .ok_or_else(|| missing(key, "RSA private key", private_id))?;
    let candidates = match &key.objects.integrity {
        IntegrityPlace::Object(named) => vec![named.clone()],
        IntegrityPlace::Token => integrity_ids(key).to_vec(),
        IntegrityPlace::Worker => {
            return Ok(KeyPair {
                id: key.id,
                purpose: key.purpose,
                objects: key.objects.clone(),
                private,
                integrity_key: MacKey::InWorker(key.secret.clone()),
            });
        }
    };
    for candidate in &candidates {
        let Some(integrity_key) = find_one(session, ObjectClass::SECRET_KEY, candidate)? else {
            continue;
        };
        return Ok(KeyPair {
            id: key.id,
            purpose: key.purpose,
            objects: ObjectIds {
                private: key.objects.private.clone(),
                integrity: if *candidate == id {
                    IntegrityPlace::Token
                } else {
                    IntegrityPlace::Object(candidate.clone())
                },
            },
            private,
            integrity_key: integrity_key.into(),
        });
    }
    Err(missing(key, "integrity key", &candidates[0]))
}

/// Returns the `CKA_ID`s that an integrity key may have if the registry does not contain its `CKA_ID`.
fn integrity_ids(key: &Place) -> [ObjectId; 2] {
    let private = key.objects.private.clone();
    [
        private.unwrap_or_else(|| key.id.into()),
        own_integrity_id(key.id),
    ]
}

/// Returns the `CKA_ID` of a secret key on the token that may be the integrity key of this wrapping key.
pub(super) fn integrity_key_on_token(
    session: &Session,
    key: &Place,
) -> Result<Option<ObjectId>, Fault> {
    for candidate in integrity_ids(key) {
        if find_one(session, ObjectClass::SECRET_KEY, &candidate)?.is_some() {
            return Ok(Some(candidate));
        }
    }
    Ok(None)
}

fn missing(key: &Place, what: &str, object: &ObjectId) -> Fault {
    let of = if *object == ObjectId::from(key.id) {
        String::new()
    } else {
        format!(" of wrapping key {}", key.id)
    };
    Fault::new(
        Class::KeyMissing,
        format!(
            "the {what}{of} with CKA_ID {object} is not on the token. If the registry contains the key, check that \
             this is the right token, and that the token was restored completely"
        ),
    )
}

/// Finds an object. Returns an error if there is a second object with the same id, because the choice would depend on
/// the token.
fn find_one(
    session: &Session,
    class: ObjectClass,
    id: &ObjectId,
) -> Result<Option<ObjectHandle>, Fault> {
    let what = if class == ObjectClass::PRIVATE_KEY {
        "RSA private key"
    } else {
        "integrity key"
    };
    let template = [
        Attribute::Class(class),
        Attribute::Id(id.as_bytes().to_vec()),
    ];
    calling::next("C_FindObjects");
    let mut found = session.find_objects(&template)?.into_iter();
    let object = found.next();
    if found.next().is_some() {
        return Err(Fault::new(
            Class::Untrusted,
            format!(
                "the token has more than one {what} with CKA_ID {id}; find out where these objects came from before \
                 you remove one of them"
            ),
        ));
    }
    Ok(object)
}

/// The results of the attribute check of both objects.
#[derive(Clone, Debug)]
pub(super) struct Verdict {
    pub(super) private: Vec<Finding>,
    /// The results for the integrity key; empty if the integrity key is not an object on the token.
    pub(super) integrity_key: Vec<Finding>,
}

impl Verdict {
    pub(super) fn require(&self, id: WrappingKeyId) -> Result<(), Fault> {
        attribute_check::require(&format!("RSA private key {id}"), &self.private)?;
        attribute_check::require(&format!("integrity key {id}"), &self.integrity_key)
    }
}

/// Checks the attributes of both objects.
pub(super) fn inspect(
    session: &Session,
    pair: &KeyPair,
    settings: &Settings,
) -> Result<Verdict, Fault> {
    let inspect = |object, rules: &[Rule]| {
        let rules = attribute_check::adapted(rules, settings.access_control);
        attribute_check::inspect(session, object, &rules, &settings.attribute_exceptions)
    };
    let of_private = match pair.purpose {
        Purpose::Plain => attribute_check::RSA_PRIVATE,
        Purpose::Sealed => attribute_check::RSA_SEALED,
    };
    Ok(Verdict {
        private: inspect(pair.private, of_private)?,
        integrity_key: match pair.integrity_key.object() {
            Some(object) => inspect(object, attribute_check::INTEGRITY_KEY)?,
            None => Vec::new(),
        },
    })
}

/// Returns the purpose that the attributes of an RSA private key show, for a key that is not registered. The attribute check
/// decides afterwards whether the key has this purpose only.
pub(super) fn purpose_of(session: &Session, private: ObjectHandle) -> Result<Purpose, Fault> {
    let is_true = |kind| -> Result<bool, Fault> {
        let flag = attribute_check::read(session, private, kind)?;
        Ok(matches!(
            flag,
            Some(Attribute::Unwrap(true) | Attribute::Decrypt(true))
        ))
    };
    let unwraps_only = is_true(AttributeType::Unwrap)? && !is_true(AttributeType::Decrypt)?;
    Ok(if unwraps_only {
        Purpose::Sealed
    } else {
        Purpose::Plain
    })
}

/// Returns the public key, computed from the modulus and exponent of the *private* object. Any user of the token can
/// replace a public object.
pub(super) fn public_side(session: &Session, pair: &KeyPair) -> Result<PublicSide, Fault> {
    public_side_of(
        session,
        pair.private,
        &format!("RSA private key {}", pair.id),
    )
}

/// Returns the public key of a private object. `name` stands at the beginning of an error message.
pub(super) fn public_side_of(
    session: &Session,
    private: ObjectHandle,
    name: &str,
) -> Result<PublicSide, Fault> {
    let untrusted = |what: String| Fault::new(Class::Untrusted, format!("{name}: {what}"));
    let Some(Attribute::KeyType(KeyType::RSA)) =
        attribute_check::read(session, private, AttributeType::KeyType)?
    else {
        return Err(untrusted("the object is not an RSA key".to_owned()));
    };
    let Some(Attribute::Modulus(modulus)) =
        attribute_check::read(session, private, AttributeType::Modulus)?
    else {
        return Err(untrusted("the object has no CKA_MODULUS".to_owned()));
    };
    let Some(Attribute::PublicExponent(exponent)) =
        attribute_check::read(session, private, AttributeType::PublicExponent)?
    else {
        return Err(untrusted(
            "the object has no CKA_PUBLIC_EXPONENT".to_owned(),
        ));
    };
    let (spki, modulus_bits) =
        oaep::spki(&modulus, &exponent).map_err(|error| untrusted(error.to_string()))?;
    Ok(PublicSide {
        fingerprint: oaep::fingerprint(&spki),
        spki,
        modulus,
        modulus_bits,
    })
}

/// Returns the `CKA_ID` of all RSA private keys on the token, except the keys that sign the transcript of a ceremony and
/// the imported keys of Bitwarden organisations. Keys without a `CKA_ID` are ignored, because the registry cannot refer to
/// them.
pub(super) fn list(session: &Session) -> Result<Vec<ObjectId>, Fault> {
    let template = [
        Attribute::Class(ObjectClass::PRIVATE_KEY),
        Attribute::KeyType(KeyType::RSA),
    ];
    let mut ids = Vec::new();
    calling::next("C_FindObjects");
    for object in session.find_objects(&template)? {
        if has_another_purpose(session, object)? {
            continue;
        }
        if let Some(Attribute::Id(id)) = attribute_check::read(session, object, AttributeType::Id)?
            && let Some(id) = ObjectId::from_slice(&id)
        {
            ids.push(id);
        }
    }
    Ok(ids)
}

/// Whether a private object is a key that signs the transcript of a ceremony, or the key of a Bitwarden organisation.
fn has_another_purpose(session: &Session, object: ObjectHandle) -> Result<bool, Fault> {
    let label = attribute_check::read(session, object, AttributeType::Label)?;
    Ok(matches!(
        label,
        Some(Attribute::Label(label))
            if label == templates::SIGNING_KEY_LABEL.as_bytes() || label == organization::LABEL.as_bytes()
    ))
}

/// Returns the common id of all session keys, which need no unique id.
pub(super) fn no_id() -> WrappingKeyId {
    WrappingKeyId::from_bytes([0; ID_BYTES])
}

/// Returns the key pair of an RSA session key and an integrity session key, which were made
/// separately.
pub(super) fn session_pair(private: ObjectHandle, integrity_key: MacKey) -> KeyPair {
    KeyPair {
        id: no_id(),
        purpose: Purpose::Plain,
        objects: ObjectIds {
            private: None,
            integrity: match integrity_key {
                MacKey::OnToken(_) => IntegrityPlace::Token,
                MacKey::InWorker(_) => IntegrityPlace::Worker,
            },
        },
        private,
        integrity_key,
    }
}
