//! Makes a wrapping key and its integrity key, and determines why a token refuses to make a key.
//!
//! Mitigation: M16 of `THREAT_MODEL.md`.

use std::fmt;

use cryptoki::{
    error::Error,
    mechanism::Mechanism,
    object::{Attribute, ObjectHandle},
};

use keybroker_core::key::{ID_BYTES, IntegrityPlace, ObjectId, ObjectIds, Purpose, WrappingKeyId};
use keybroker_pkcs11_ffi::Session;
use keybroker_worker_protocol::{IntegrityKey, Settings};

use crate::{
    attribute_check::{self, Exception},
    calling,
    classify::{Class, Fault},
    mac_key::{MacKey, WorkerKey},
    operation,
};

use super::{
    KeyPair, own_integrity_id,
    templates::{
        HmacKey, Lifetime, adapted, integrity_mechanism, integrity_template, is_named,
        public_template, template_of, unwrap_template,
    },
};

/// Modulus length of a session key pair.
const SESSION_PAIR_BITS: u32 = 2_048;
/// The message for the trial MAC of a new integrity key. No row MAC is computed over this message.
const MAC_TRIAL: &[u8] = b"keybroker trial of a new integrity key";

/// The settings for new keys.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms<'a> {
    pub(crate) exceptions: &'a [String],
    pub(crate) integrity_key: IntegrityKey,
    /// The purpose of the RSA pair.
    pub(crate) purpose: Purpose,
}

impl<'a> Terms<'a> {
    /// The settings for a plain key.
    pub(crate) fn of(settings: &'a Settings) -> Self {
        Self {
            exceptions: &settings.attribute_exceptions,
            integrity_key: settings.integrity_key,
            purpose: Purpose::Plain,
        }
    }

    /// The settings for a key with this purpose.
    pub(crate) fn for_purpose(settings: &'a Settings, purpose: Purpose) -> Self {
        Self {
            purpose,
            ..Self::of(settings)
        }
    }
}

/// The objects that this run made on the token.
#[derive(Debug)]
pub(crate) struct Made {
    pub(crate) pair: KeyPair,
    public: ObjectHandle,
}

impl Made {
    /// Removes all objects. The error names the objects that could not be removed.
    pub(crate) fn remove(&self, session: &Session) -> Result<(), Fault> {
        let integrity_key = self.pair.integrity_key.object();
        let objects = [
            Some(("the RSA private key", self.pair.private)),
            integrity_key.map(|object| ("the integrity key", object)),
            Some(("the RSA public key", self.public)),
        ];
        let left: Vec<String> = objects
            .into_iter()
            .flatten()
            .filter_map(|(what, object)| {
                let fault = destroy(session, object).err()?;
                Some(format!("{what} ({fault})"))
            })
            .collect();
        if left.is_empty() {
            return Ok(());
        }
        Err(Fault::new(
            Class::Ambiguous,
            format!(
                "the token did not remove {1} of key {0}, which this command made; remove the object with the vendor's tool",
                self.pair.id,
                left.join(" and ")
            ),
        ))
    }
}

pub(super) fn destroy(session: &Session, object: ObjectHandle) -> Result<(), Fault> {
    calling::next("C_DestroyObject");
    Ok(session.destroy_object(object)?)
}

/// Makes an RSA pair and an integrity key under a random id. The session must be read-write.
pub(crate) fn generate(
    session: &Session,
    modulus_bits: u32,
    terms: Terms<'_>,
) -> Result<Made, Refusal> {
    generate_with_id(session, fresh_id()?, modulus_bits, terms)
}

/// Makes an RSA pair and an integrity key under this id, which no object of the token may have. The session must be
/// read-write.
pub(crate) fn generate_with_id(
    session: &Session,
    id: WrappingKeyId,
    modulus_bits: u32,
    terms: Terms<'_>,
) -> Result<Made, Refusal> {
    make(session, id, modulus_bits, Lifetime::Token, terms)
}

/// Makes session keys, to test the abilities of the token.
pub(crate) fn generate_for_session(session: &Session, terms: Terms<'_>) -> Result<Made, Refusal> {
    let made = make(
        session,
        fresh_id()?,
        SESSION_PAIR_BITS,
        Lifetime::Session,
        terms,
    )?;
    // Some tokens generate a generic secret but refuse its use for HMAC.
    match operation::mac(session, &made.pair, MAC_TRIAL) {
        Err(fault) if depends_on_the_template(&fault) => {
            // If the removal fails, the token removes the keys when the session ends.
            let _removed = made.remove(session);
            Err(Refusal {
                making: HmacKey::of(terms.integrity_key).map(Making::IntegrityKey),
                fault,
            })
        }
        _ => Ok(made),
    }
}

/// The key that a token refused to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Making {
    IntegrityKey(HmacKey),
    RsaPair,
}

impl fmt::Display for Making {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::IntegrityKey(HmacKey::GenericSecret) => {
                "the integrity key (CKM_GENERIC_SECRET_KEY_GEN)"
            }
            Self::IntegrityKey(HmacKey::Sha256Hmac) => {
                "the integrity key (CKM_GENERIC_SECRET_KEY_GEN with CKK_SHA256_HMAC)"
            }
            Self::IntegrityKey(HmacKey::Nshield) => {
                "the integrity key (CKM_NC_SHA256_HMAC_KEY_GEN)"
            }
            Self::RsaPair => "the RSA key pair (CKM_RSA_PKCS_KEY_PAIR_GEN)",
        })
    }
}

/// Reason why no keys were made. Objects that were made before the refusal are removed again.
#[derive(Debug)]
pub(crate) struct Refusal {
    /// The refused key; `None` if the failure occurred before the first request for a key.
    pub(crate) making: Option<Making>,
    pub(crate) fault: Fault,
}

impl From<Fault> for Refusal {
    fn from(fault: Fault) -> Self {
        Self {
            making: None,
            fault,
        }
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Fault::from(error).into()
    }
}

/// Makes the integrity key first, because more tokens refuse the integrity key than the RSA pair, and because the
/// integrity key takes less time to make. The integrity key gets the `CKA_ID` of the RSA pair. If the token then
/// refuses the RSA pair, the integrity key is made again with a separate `CKA_ID`. Some tokens do not allow two objects
/// with the same `CKA_ID`.
fn make(
    session: &Session,
    id: WrappingKeyId,
    modulus_bits: u32,
    lifetime: Lifetime,
    terms: Terms<'_>,
) -> Result<Made, Refusal> {
    let own_id = own_integrity_id(id);
    refuse_taken(session, &ObjectId::from(id))?;
    refuse_taken(session, &own_id)?;
    let left_out = |attribute: &Attribute| is_named(attribute, terms.exceptions);
    let Some(kind) = HmacKey::of(terms.integrity_key) else {
        let secret = WorkerKey::random()?;
        let pair = make_rsa_pair(session, id, modulus_bits, lifetime, terms.purpose, left_out);
        let (public, private) = pair.map_err(|fault| Refusal {
            making: Some(Making::RsaPair),
            fault,
        })?;
        let pair = KeyPair {
            id,
            purpose: terms.purpose,
            objects: ObjectIds {
                private: None,
                integrity: IntegrityPlace::Worker,
            },
            private,
            integrity_key: MacKey::InWorker(Some(secret)),
        };
        return Ok(Made { pair, public });
    };
    let mut refused_pair = None;
    for integrity in [None, Some(own_id)] {
        let object = integrity.clone().unwrap_or_else(|| ObjectId::from(id));
        let integrity_key = match make_integrity_key(session, id, &object, kind, lifetime, left_out)
        {
            Ok(integrity_key) => integrity_key,
            Err(fault) => {
                let making = Some(Making::IntegrityKey(kind));
                return Err(refused_pair.unwrap_or(Refusal { making, fault }));
            }
        };
        match make_rsa_pair(session, id, modulus_bits, lifetime, terms.purpose, left_out) {
            Ok((public, private)) => {
                let objects = ObjectIds {
                    private: None,
                    integrity: integrity.map_or(IntegrityPlace::Token, IntegrityPlace::Object),
                };
                let pair = KeyPair {
                    id,
                    purpose: terms.purpose,
                    objects,
                    private,
                    integrity_key: integrity_key.into(),
                };
                return Ok(Made { pair, public });
            }
            Err(fault) => {
                let making = Some(Making::RsaPair);
                let may_be_the_id = depends_on_the_template(&fault);
                let refusal = Refusal { making, fault };
                if let Err(left) = destroy(session, integrity_key) {
                    let left = format!(
                        "the integrity key {id}, which this command made, was not removed ({left})"
                    );
                    let fault = refusal.fault.with(&left);
                    return Err(Refusal { making, fault });
                }
                if !may_be_the_id {
                    return Err(refusal);
                }
                refused_pair.get_or_insert(refusal);
            }
        }
    }
    Err(refused_pair.unwrap_or_else(|| {
        Fault::new(Class::Ambiguous, "no key was made, although no call failed").into()
    }))
}

pub(super) fn refuse_taken(session: &Session, id: &ObjectId) -> Result<(), Fault> {
    calling::next("C_FindObjects");
    let taken = session.find_objects(&[Attribute::Id(id.as_bytes().to_vec())])?;
    if taken.is_empty() {
        return Ok(());
    }
    Err(Fault::new(
        Class::Untrusted,
        format!("the token already has an object with the new CKA_ID {id}"),
    ))
}

/// Whether the operation might succeed with another template.
pub(super) fn depends_on_the_template(fault: &Fault) -> bool {
    !matches!(
        fault.class,
        Class::TokenLost | Class::SessionLost | Class::BackOff | Class::Pin
    )
}

pub(super) fn make_integrity_key(
    session: &Session,
    id: WrappingKeyId,
    object: &ObjectId,
    kind: HmacKey,
    lifetime: Lifetime,
    left_out: impl Fn(&Attribute) -> bool,
) -> Result<ObjectHandle, Fault> {
    let template = adapted(integrity_template(kind, id, object), lifetime, left_out);
    let mechanism = integrity_mechanism(kind)?;
    calling::next("C_GenerateKey");
    Ok(session.generate_key(&mechanism, &template)?)
}

/// Makes the public and the private object. If the token refuses the minimal template of the public key, a second
/// attempt adds `CKA_PRIVATE`. Some tokens require this attribute for every object. A sealed wrapping key gets
/// `CKA_UNWRAP_TEMPLATE` if the token supports this attribute.
fn make_rsa_pair(
    session: &Session,
    id: WrappingKeyId,
    modulus_bits: u32,
    lifetime: Lifetime,
    purpose: Purpose,
    left_out: impl Fn(&Attribute) -> bool,
) -> Result<(ObjectHandle, ObjectHandle), Fault> {
    let mut public = adapted(public_template(id, modulus_bits), lifetime, |_| false);
    let private = adapted(template_of(purpose, id), lifetime, left_out);
    let refusal = match generate_pair(session, purpose, &public, &private) {
        Ok(pair) => return Ok(pair),
        Err(refusal) => refusal,
    };
    if !depends_on_the_template(&refusal) {
        return Err(refusal);
    }
    public.push(Attribute::Private(true));
    generate_pair(session, purpose, &public, &private).map_err(|_| refusal)
}

/// Makes both objects of a pair. For a sealed wrapping key, tries first with `CKA_UNWRAP_TEMPLATE`, and without this attribute
/// only if the token refuses the template.
fn generate_pair(
    session: &Session,
    purpose: Purpose,
    public: &[Attribute],
    private: &[Attribute],
) -> Result<(ObjectHandle, ObjectHandle), Fault> {
    let mechanism = Mechanism::RsaPkcsKeyPairGen;
    calling::next("C_GenerateKeyPair");
    if purpose == Purpose::Sealed {
        let made =
            session.generate_unwrapping_pair(&mechanism, public, private, &unwrap_template());
        match made.map_err(Fault::from) {
            Ok(pair) => return Ok(pair),
            Err(fault) if !depends_on_the_template(&fault) => return Err(fault),
            Err(fault) => {
                tracing::debug!(%fault, "the token does not make a key with CKA_UNWRAP_TEMPLATE");
            }
        }
        calling::next("C_GenerateKeyPair");
    }
    Ok(session.generate_key_pair(&mechanism, public, private)?)
}

/// Reason why a token refuses to make a key, according to attempts with other templates.
#[derive(Debug)]
pub(crate) enum Cause {
    /// The token makes the RSA pair and an integrity key of the kind `integrity_key` if the templates also omit
    /// `attributes`.
    Settings {
        integrity_key: IntegrityKey,
        attributes: Vec<Exception>,
    },
    /// The token accepts the template for a session key. Therefore the token does not store keys, or has no space for
    /// another key.
    NotTheTemplate,
    /// The token does not even make a session key without the attributes that may be omitted.
    Unknown,
}

/// Tries to make session keys, to find the settings with which the token would make the key. For each kind of integrity
/// key and for the RSA pair, makes at most two attempts, plus one attempt for each attribute that may have an
/// exception.
pub(crate) fn cause_of_refusal(session: &Session, making: Making, terms: Terms<'_>) -> Cause {
    let Terms {
        exceptions,
        integrity_key,
        purpose,
    } = terms;
    let (integrity_key, mut attributes) = match making {
        Making::RsaPair => (integrity_key, Vec::new()),
        Making::IntegrityKey(configured) => {
            let found = HmacKey::all_with_first(configured.setting()).find_map(|kind| {
                let refused = refused_of_integrity_key(session, kind, exceptions)?;
                Some((kind, refused))
            });
            match found {
                None => return Cause::Unknown,
                Some((kind, refused)) if kind == configured && refused.is_empty() => {
                    return Cause::NotTheTemplate;
                }
                Some((kind, refused)) => (kind.setting(), refused),
            }
        }
    };
    // The attributes that were found so far count as excepted, so that the operator gets all refused attributes in one
    // message.
    let excepted: Vec<String> = exceptions
        .iter()
        .cloned()
        .chain(attributes.iter().map(|one| one.attribute.to_owned()))
        .collect();
    match (refused_of_rsa_pair(session, purpose, &excepted), making) {
        (Some(refused), _) => attributes.extend(refused),
        (None, Making::RsaPair) => return Cause::Unknown,
        // The refusal of the RSA pair has no known cause, but the findings about the integrity key are still useful.
        (None, Making::IntegrityKey(_)) => {}
    }
    if attributes.is_empty() && integrity_key == terms.integrity_key {
        return Cause::NotTheTemplate;
    }
    Cause::Settings {
        integrity_key,
        attributes,
    }
}

fn refused_of_integrity_key(
    session: &Session,
    kind: HmacKey,
    exceptions: &[String],
) -> Option<Vec<Exception>> {
    let any = WrappingKeyId::from_bytes([0; ID_BYTES]);
    let template = integrity_template(kind, any, &ObjectId::from(any));
    refused(&template, exceptions, |left_out| {
        let Ok(id) = fresh_id() else { return false };
        let lifetime = Lifetime::Session;
        let Ok(key) =
            make_integrity_key(session, id, &ObjectId::from(id), kind, lifetime, left_out)
        else {
            return false;
        };
        let is_of_use = operation::mac_with(session, key, MAC_TRIAL).is_ok();
        // If the removal fails, the token removes the key when the session ends.
        let _destroyed = destroy(session, key);
        is_of_use
    })
}

fn refused_of_rsa_pair(
    session: &Session,
    purpose: Purpose,
    exceptions: &[String],
) -> Option<Vec<Exception>> {
    let template = template_of(purpose, WrappingKeyId::from_bytes([0; ID_BYTES]));
    refused(&template, exceptions, |left_out| {
        let Ok(id) = fresh_id() else { return false };
        let (bits, lifetime) = (SESSION_PAIR_BITS, Lifetime::Session);
        match make_rsa_pair(session, id, bits, lifetime, purpose, left_out) {
            Ok((public, private)) => {
                // If the removal fails, the token removes the keys when the session ends.
                let _destroyed = [destroy(session, public), destroy(session, private)];
                true
            }
            Err(_) => false,
        }
    })
}

/// Returns the attributes that a token refuses in a template, in addition to the attributes that are already excepted.
/// Returns `None` if the token refuses the template even without all attributes for which an exception is permitted.
/// `works` tries the template without the given attributes.
fn refused(
    template: &[Attribute],
    exceptions: &[String],
    works: impl Fn(&dyn Fn(&Attribute) -> bool) -> bool,
) -> Option<Vec<Exception>> {
    let works = |left_out: &[Exception]| {
        works(&|attribute: &Attribute| {
            is_named(attribute, exceptions)
                || attribute_check::exceptable(attribute.attribute_type())
                    .is_some_and(|exception| left_out.contains(&exception))
        })
    };
    if works(&[]) {
        return Some(Vec::new());
    }
    let mut left_out: Vec<Exception> = template
        .iter()
        .filter(|attribute| !is_named(attribute, exceptions))
        .filter_map(|attribute| attribute_check::exceptable(attribute.attribute_type()))
        .collect();
    if !works(&left_out) {
        return None;
    }
    for attribute in left_out.clone() {
        let fewer: Vec<Exception> = left_out
            .iter()
            .copied()
            .filter(|other| *other != attribute)
            .collect();
        if works(&fewer) {
            left_out = fewer;
        }
    }
    Some(left_out)
}

fn fresh_id() -> Result<WrappingKeyId, Fault> {
    let mut bytes = [0; ID_BYTES];
    aws_lc_rs::rand::fill(&mut bytes)
        .map_err(|_| Fault::new(Class::Configuration, "the random generator failed"))?;
    Ok(WrappingKeyId::from_bytes(bytes))
}
