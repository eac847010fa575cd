//! Keys on the token: made with every usage flag set, found exactly once, checked attribute by attribute, and proved by use.
//!
//! Mitigation: M16 of `THREAT_MODEL.md`.

use cryptoki::{
    context::Pkcs11,
    mechanism::{Mechanism, MechanismType},
    object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle},
    session::Session,
    slot::Slot,
};

use keybroker_core::key::{Fingerprint, ID_BYTES, WrappingKeyId};
use keybroker_worker_protocol::oaep;

use crate::{
    attribute_check::{self, Finding},
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

/// One session with the handles of the keys, owned by one thread for its life.
#[derive(Debug)]
pub(super) struct KeySession {
    pub(super) session: Session,
    pairs: Vec<KeyPair>,
}

impl KeySession {
    /// Opens a session and finds the keys again: handles die with the session family, and a stale handle may mean
    /// another object.
    pub(super) fn open(module: &Pkcs11, slot: Slot, ids: &[WrappingKeyId]) -> Result<Self, Fault> {
        calling::next("C_OpenSession");
        let session = module.open_ro_session(slot)?;
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

/// Generates an RSA pair and an integrity key under one fresh id. The session must be read-write.
pub(super) fn generate(session: &Session, modulus_bits: u32) -> Result<KeyPair, Fault> {
    make(session, modulus_bits, true)
}

/// The same with keys that end with the session, to try what the token can do. The public object stays until then.
pub(super) fn generate_for_session(session: &Session) -> Result<KeyPair, Fault> {
    make(session, SESSION_PAIR_BITS, false)
}

fn make(session: &Session, modulus_bits: u32, on_token: bool) -> Result<KeyPair, Fault> {
    let id = fresh_id()?;
    calling::next("C_FindObjects");
    let taken = session.find_objects(&[Attribute::Id(id.as_bytes().to_vec())])?;
    if !taken.is_empty() {
        return Err(Fault::new(
            Class::Untrusted,
            format!("the token already holds an object with the fresh CKA_ID {id}"),
        ));
    }
    let kept = |mut template: Vec<Attribute>| {
        for attribute in &mut template {
            if let Attribute::Token(is_on_token) = attribute {
                *is_on_token = on_token;
            }
        }
        template
    };
    calling::next("C_GenerateKeyPair");
    let (_public, private) = session.generate_key_pair(
        &Mechanism::RsaPkcsKeyPairGen,
        &kept(public_template(id, modulus_bits)),
        &kept(private_template(id)),
    )?;
    calling::next("C_GenerateKey");
    let binding =
        session.generate_key(&Mechanism::GenericSecretKeyGen, &kept(binding_template(id)))?;
    Ok(KeyPair {
        id,
        private,
        binding,
    })
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

/// The public object can do nothing: wrapping uses the public key in software.
pub(super) fn public_template(id: WrappingKeyId, modulus_bits: u32) -> Vec<Attribute> {
    vec![
        Attribute::Token(true),
        Attribute::Private(false),
        Attribute::Modifiable(false),
        Attribute::Copyable(false),
        Attribute::Encrypt(false),
        Attribute::Verify(false),
        Attribute::VerifyRecover(false),
        Attribute::Wrap(false),
        Attribute::Derive(false),
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
