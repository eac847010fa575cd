//! Keys on the token: made with every usage flag set, found exactly once, checked attribute by attribute, and proved by use.
//!
//! Mitigation: M16 of `THREAT_MODEL.md`.

use std::fmt;

use cryptoki::{
    error::{Error, RvError},
    mechanism::{Mechanism, MechanismType},
    object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle},
    slot::Slot,
};

use keybroker_core::key::{Fingerprint, ID_BYTES, WrappingKeyId};
use keybroker_pkcs11_ffi::{Module, Session};
use keybroker_worker_protocol::oaep;

use crate::{
    attribute_check::{self, Exception, Finding},
    calling,
    classify::{Class, Fault},
};

/// Length of an integrity key, in bytes: that of the HMAC's hash (RFC 2104 section 3).
const BINDING_KEY_BYTES: u64 = 32;
/// Length of the modulus of a pair that ends with its session.
const SESSION_PAIR_BITS: u32 = 2_048;
const PUBLIC_EXPONENT: [u8; 3] = [0x01, 0x00, 0x01];

/// A wrapping key and its integrity key as objects of one session family.
#[derive(Clone, Debug)]
pub(super) struct KeyPair {
    pub(super) id: WrappingKeyId,
    pub(super) private: ObjectHandle,
    pub(super) binding: ObjectHandle,
}

/// The public side of a wrapping key, computed from the private object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PublicSide {
    pub(super) spki: Vec<u8>,
    pub(super) fingerprint: Fingerprint,
    pub(super) modulus_bits: usize,
}

/// A session that changes nothing: read-only, or read-write on tokens that have no other.
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
        )) => Ok(module.open_rw_session(slot)?),
        other => Ok(other?),
    }
}

/// One session with the handles of the keys, owned by one thread for its life.
#[derive(Debug)]
pub(super) struct KeySession {
    pub(super) session: Session,
    pairs: Vec<KeyPair>,
}

impl KeySession {
    /// Opens a session and finds the keys again: handles die with the session family, and a stale handle may mean
    /// another object.
    pub(super) fn open(module: &Module, slot: Slot, ids: &[WrappingKeyId]) -> Result<Self, Fault> {
        let session = reading_session(module, slot)?;
        let pairs = ids
            .iter()
            .map(|id| find(&session, *id))
            .collect::<Result<_, _>>()?;
        Ok(Self { session, pairs })
    }

    pub(super) fn pair(&self, id: WrappingKeyId) -> Option<&KeyPair> {
        self.pairs.iter().find(|pair| pair.id == id)
    }
}

/// Finds both objects of an id: exactly one RSA private key, exactly one secret key.
pub(super) fn find(session: &Session, id: WrappingKeyId) -> Result<KeyPair, Fault> {
    Ok(KeyPair {
        id,
        private: find_one(session, ObjectClass::PRIVATE_KEY, id, "RSA private key")?,
        binding: find_one(session, ObjectClass::SECRET_KEY, id, "integrity key")?,
    })
}

/// Asks for two objects and demands one: with two of one id the token decides which is used, not we.
fn find_one(
    session: &Session,
    class: ObjectClass,
    id: WrappingKeyId,
    what: &str,
) -> Result<ObjectHandle, Fault> {
    let template = [
        Attribute::Class(class),
        Attribute::Id(id.as_bytes().to_vec()),
    ];
    calling::next("C_FindObjects");
    let mut found = session.find_objects(&template)?.into_iter();
    let Some(object) = found.next() else {
        return Err(Fault::new(
            Class::KeyMissing,
            format!(
                "the {what} with CKA_ID {id} is not on the token, though the registry names it; is this the \
                 right token, and was it restored whole?"
            ),
        ));
    };
    if found.next().is_some() {
        return Err(Fault::new(
            Class::Untrusted,
            format!(
                "the token holds more than one {what} with CKA_ID {id}; find out where the other came \
                 from before you remove either"
            ),
        ));
    }
    Ok(object)
}

/// The attribute check of both objects.
#[derive(Clone, Debug)]
pub(super) struct Verdict {
    pub(super) private: Vec<Finding>,
    pub(super) binding: Vec<Finding>,
}

impl Verdict {
    pub(super) fn require(&self, id: WrappingKeyId) -> Result<(), Fault> {
        attribute_check::require(&format!("RSA private key {id}"), &self.private)?;
        attribute_check::require(&format!("integrity key {id}"), &self.binding)
    }
}

/// Reads every attribute that is checked.
pub(super) fn inspect(
    session: &Session,
    pair: &KeyPair,
    exceptions: &[String],
) -> Result<Verdict, Fault> {
    Ok(Verdict {
        private: attribute_check::inspect(
            session,
            pair.private,
            attribute_check::RSA_PRIVATE,
            exceptions,
        )?,
        binding: attribute_check::inspect(
            session,
            pair.binding,
            attribute_check::BINDING,
            exceptions,
        )?,
    })
}

/// The public key, from modulus and exponent of the *private* object: any user of the token can replace a public object.
pub(super) fn public_side(session: &Session, pair: &KeyPair) -> Result<PublicSide, Fault> {
    let untrusted = |what: String| {
        Fault::new(
            Class::Untrusted,
            format!("RSA private key {}: {what}", pair.id),
        )
    };
    let Some(Attribute::KeyType(KeyType::RSA)) =
        attribute_check::read(session, pair.private, AttributeType::KeyType)?
    else {
        return Err(untrusted("it is not an RSA key".to_owned()));
    };
    let Some(Attribute::Modulus(modulus)) =
        attribute_check::read(session, pair.private, AttributeType::Modulus)?
    else {
        return Err(untrusted("it has no CKA_MODULUS".to_owned()));
    };
    let Some(Attribute::PublicExponent(exponent)) =
        attribute_check::read(session, pair.private, AttributeType::PublicExponent)?
    else {
        return Err(untrusted("it has no CKA_PUBLIC_EXPONENT".to_owned()));
    };
    let (spki, modulus_bits) =
        oaep::spki(&modulus, &exponent).map_err(|error| untrusted(error.to_string()))?;
    Ok(PublicSide {
        fingerprint: oaep::fingerprint(&spki),
        spki,
        modulus_bits,
    })
}

/// All ids under which the token holds an RSA private key.
pub(super) fn list(session: &Session) -> Result<Vec<WrappingKeyId>, Fault> {
    let template = [
        Attribute::Class(ObjectClass::PRIVATE_KEY),
        Attribute::KeyType(KeyType::RSA),
    ];
    let mut ids = Vec::new();
    calling::next("C_FindObjects");
    for object in session.find_objects(&template)? {
        if let Some(Attribute::Id(id)) = attribute_check::read(session, object, AttributeType::Id)?
            && let Some(id) = WrappingKeyId::from_slice(&id)
        {
            ids.push(id);
        }
    }
    Ok(ids)
}

/// What a run made on the token.
#[derive(Debug)]
pub(super) struct Made {
    pub(super) pair: KeyPair,
    public: ObjectHandle,
}

impl Made {
    /// Removes all three objects. A failure says which of them are left.
    pub(super) fn remove(&self, session: &Session) -> Result<(), Fault> {
        let objects = [
            ("the RSA private key", self.pair.private),
            ("the integrity key", self.pair.binding),
            ("the RSA public key", self.public),
        ];
        let left: Vec<String> = objects
            .into_iter()
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
                "Of key {}, which this run made, the token did not remove {}; remove it with the vendor's tool",
                self.pair.id,
                left.join(" and ")
            ),
        ))
    }
}

fn destroy(session: &Session, object: ObjectHandle) -> Result<(), Fault> {
    calling::next("C_DestroyObject");
    Ok(session.destroy_object(object)?)
}

/// Makes an RSA pair and an integrity key under one fresh id. The session must be read-write.
pub(super) fn generate(
    session: &Session,
    modulus_bits: u32,
    exceptions: &[String],
) -> Result<Made, Refusal> {
    make(session, modulus_bits, Lifetime::Token, exceptions)
}

/// The same with keys that end with the session, to try what the token can do.
pub(super) fn generate_for_session(
    session: &Session,
    exceptions: &[String],
) -> Result<Made, Refusal> {
    make(session, SESSION_PAIR_BITS, Lifetime::Session, exceptions)
}

/// How long a key object exists: `CKA_TOKEN`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lifetime {
    Token,
    Session,
}

/// Which of the two a token refused to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Making {
    IntegrityKey,
    RsaPair,
}

impl fmt::Display for Making {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::IntegrityKey => "the integrity key (CKM_GENERIC_SECRET_KEY_GEN)",
            Self::RsaPair => "the RSA key pair (CKM_RSA_PKCS_KEY_PAIR_GEN)",
        })
    }
}

/// Why no keys were made. What had been made before the refusal is removed.
#[derive(Debug)]
pub(super) struct Refusal {
    /// What was refused; absent when it failed before.
    pub(super) making: Option<Making>,
    pub(super) fault: Fault,
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

/// The integrity key first: it is the one that fewer tokens can make, and is made fast.
fn make(
    session: &Session,
    modulus_bits: u32,
    lifetime: Lifetime,
    exceptions: &[String],
) -> Result<Made, Refusal> {
    let id = fresh_id()?;
    calling::next("C_FindObjects");
    let taken = session.find_objects(&[Attribute::Id(id.as_bytes().to_vec())])?;
    if !taken.is_empty() {
        return Err(Fault::new(
            Class::Untrusted,
            format!("the token already holds an object with the fresh CKA_ID {id}"),
        )
        .into());
    }
    let refused = |making| {
        move |fault| Refusal {
            making: Some(making),
            fault,
        }
    };
    let left_out = |attribute: &Attribute| is_named(attribute, exceptions);
    let binding = make_integrity_key(session, id, lifetime, left_out)
        .map_err(refused(Making::IntegrityKey))?;
    let (public, private) = make_rsa_pair(session, id, modulus_bits, lifetime, left_out)
        .map_err(|fault| match destroy(session, binding) {
            Ok(()) => fault,
            Err(left) => fault.with(&format!(
                "the integrity key {id}, which this run made, was not removed ({left})"
            )),
        })
        .map_err(refused(Making::RsaPair))?;
    Ok(Made {
        pair: KeyPair {
            id,
            private,
            binding,
        },
        public,
    })
}

fn make_integrity_key(
    session: &Session,
    id: WrappingKeyId,
    lifetime: Lifetime,
    left_out: impl Fn(&Attribute) -> bool,
) -> Result<ObjectHandle, Fault> {
    let template = adapted(binding_template(id), lifetime, left_out);
    calling::next("C_GenerateKey");
    Ok(session.generate_key(&Mechanism::GenericSecretKeyGen, &template)?)
}

/// The public and the private object.
fn make_rsa_pair(
    session: &Session,
    id: WrappingKeyId,
    modulus_bits: u32,
    lifetime: Lifetime,
    left_out: impl Fn(&Attribute) -> bool,
) -> Result<(ObjectHandle, ObjectHandle), Fault> {
    let public = adapted(public_template(id, modulus_bits), lifetime, |_| false);
    let private = adapted(private_template(id), lifetime, left_out);
    calling::next("C_GenerateKeyPair");
    Ok(session.generate_key_pair(&Mechanism::RsaPkcsKeyPairGen, &public, &private)?)
}

/// A template with another lifetime, without the attributes that are left out.
fn adapted(
    mut template: Vec<Attribute>,
    lifetime: Lifetime,
    left_out: impl Fn(&Attribute) -> bool,
) -> Vec<Attribute> {
    template.retain(|attribute| !left_out(attribute));
    for attribute in &mut template {
        if let Attribute::Token(is_on_token) = attribute {
            *is_on_token = lifetime == Lifetime::Token;
        }
    }
    template
}

/// Whether an attribute may be excepted and is among the names.
fn is_named(attribute: &Attribute, names: &[String]) -> bool {
    attribute_check::exceptable(attribute.attribute_type())
        .is_some_and(|exception| names.iter().any(|name| name == exception.attribute))
}

/// What a token refuses in a template.
#[derive(Debug)]
pub(super) enum Cause {
    /// It makes the key once these are left out.
    Attributes(Vec<Exception>),
    /// The template is good for a key of a session: the token does not keep keys, or has no room for one.
    NotTheTemplate,
    /// It makes no such key for a session, even with every attribute left out that may be.
    Unknown,
}

/// Finds out by trying what in a template a token refuses, with keys that end with the session. At most one try for each
/// attribute that may be excepted, and two.
pub(super) fn cause_of_refusal(session: &Session, making: Making, exceptions: &[String]) -> Cause {
    let works = |left_out: &[Exception]| {
        let left_out = |attribute: &Attribute| {
            is_named(attribute, exceptions)
                || attribute_check::exceptable(attribute.attribute_type())
                    .is_some_and(|exception| left_out.contains(&exception))
        };
        let Ok(id) = fresh_id() else { return false };
        let made = match making {
            Making::IntegrityKey => {
                make_integrity_key(session, id, Lifetime::Session, left_out).map(|key| vec![key])
            }
            Making::RsaPair => {
                make_rsa_pair(session, id, SESSION_PAIR_BITS, Lifetime::Session, left_out)
                    .map(|(public, private)| vec![private, public])
            }
        };
        for object in made.iter().flatten() {
            // It ends with the session at the latest.
            let _destroyed = destroy(session, *object);
        }
        made.is_ok()
    };
    if works(&[]) {
        return Cause::NotTheTemplate;
    }
    let template = match making {
        Making::IntegrityKey => binding_template(WrappingKeyId::from_bytes([0; ID_BYTES])),
        Making::RsaPair => private_template(WrappingKeyId::from_bytes([0; ID_BYTES])),
    };
    let mut left_out: Vec<Exception> = template
        .iter()
        .filter(|attribute| !is_named(attribute, exceptions))
        .filter_map(|attribute| attribute_check::exceptable(attribute.attribute_type()))
        .collect();
    if !works(&left_out) {
        return Cause::Unknown;
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
    Cause::Attributes(left_out)
}

/// The id of keys that end with their session, of which nothing else is known.
pub(super) fn no_id() -> WrappingKeyId {
    WrappingKeyId::from_bytes([0; ID_BYTES])
}

/// Keys of a session that were made one by one.
pub(super) fn session_pair(private: ObjectHandle, binding: ObjectHandle) -> KeyPair {
    KeyPair {
        id: no_id(),
        private,
        binding,
    }
}

fn fresh_id() -> Result<WrappingKeyId, Fault> {
    let mut bytes = [0; ID_BYTES];
    aws_lc_rs::rand::fill(&mut bytes)
        .map_err(|_| Fault::new(Class::Configuration, "the random generator failed"))?;
    Ok(WrappingKeyId::from_bytes(bytes))
}

fn label(id: WrappingKeyId, what: &str) -> Attribute {
    Attribute::Label(format!("keybroker {what} {id}").into_bytes())
}

/// As little as the standard asks for (PKCS #11 v2.40, section 2.1.2), because tokens refuse more: public keys that must be
/// private, attributes that they have for private keys alone. What the public object may do is no risk: anyone may have
/// a public key, and wrapping uses it in software.
pub(super) fn public_template(id: WrappingKeyId, modulus_bits: u32) -> Vec<Attribute> {
    vec![
        Attribute::Token(true),
        Attribute::ModulusBits(u64::from(modulus_bits).into()),
        Attribute::PublicExponent(PUBLIC_EXPONENT.to_vec()),
        Attribute::Id(id.as_bytes().to_vec()),
        label(id, "wrapping key"),
    ]
}

/// Every usage flag is set: what is left out, tokens set to true (SoftHSM: `SIGN`, `SIGN_RECOVER`, `UNWRAP`).
pub(super) fn private_template(id: WrappingKeyId) -> Vec<Attribute> {
    vec![
        Attribute::Token(true),
        Attribute::Private(true),
        Attribute::Sensitive(true),
        Attribute::Extractable(false),
        Attribute::Modifiable(false),
        Attribute::Copyable(false),
        Attribute::Decrypt(true),
        Attribute::Sign(false),
        Attribute::SignRecover(false),
        Attribute::Unwrap(false),
        Attribute::Derive(false),
        Attribute::AllowedMechanisms(vec![MechanismType::RSA_PKCS_OAEP]),
        Attribute::Id(id.as_bytes().to_vec()),
        label(id, "wrapping key"),
    ]
}

pub(super) fn binding_template(id: WrappingKeyId) -> Vec<Attribute> {
    vec![
        Attribute::Class(ObjectClass::SECRET_KEY),
        // `CKK_SHA256_HMAC` is refused by SoftHSM for this mechanism; the allowed mechanisms bind the key instead.
        Attribute::KeyType(KeyType::GENERIC_SECRET),
        Attribute::ValueLen(BINDING_KEY_BYTES.into()),
        Attribute::Token(true),
        Attribute::Private(true),
        Attribute::Sensitive(true),
        Attribute::Extractable(false),
        Attribute::Modifiable(false),
        Attribute::Copyable(false),
        Attribute::Sign(true),
        Attribute::Verify(true),
        Attribute::Encrypt(false),
        Attribute::Decrypt(false),
        Attribute::Wrap(false),
        Attribute::Unwrap(false),
        Attribute::Derive(false),
        Attribute::AllowedMechanisms(vec![MechanismType::SHA256_HMAC]),
        Attribute::Id(id.as_bytes().to_vec()),
        label(id, "binding key"),
    ]
}
