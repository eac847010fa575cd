//! The key that signs the transcript of a ceremony. It can only sign, and never leaves the token.
//!
//! Mitigation: M24 of `THREAT_MODEL.md`.

use cryptoki::{
    mechanism::{
        Mechanism, MechanismType,
        rsa::{PkcsMgfType, PkcsPssParams},
    },
    object::{Attribute, KeyType, ObjectClass, ObjectHandle},
};

use keybroker_core::key::{ID_BYTES, ObjectId};
use keybroker_pkcs11_ffi::Session;
use keybroker_worker_protocol::Settings;

use crate::{
    attribute_check::{self, Finding, SIGNING_KEY},
    calling,
    classify::{Class, Fault},
};

use super::{
    making::destroy,
    public_side_of,
    templates::{Lifetime, SIGNING_KEY_LABEL, adapted, is_named, signing_templates},
};

/// Length of the modulus of a signing key, in bits (112 bits of security and more: NIST SP 800-57 part 1, table 2).
const MODULUS_BITS: u32 = 3_072;
/// Length of the salt of RSASSA-PSS: that of the digest (RFC 8017, section 9.1).
const SALT_BYTES: u64 = 32;
/// Room for a signature, in bytes.
const SIGNATURE_BYTES_MAX: usize = 512;

/// A key that was made to sign a transcript.
#[derive(Clone, Debug)]
pub(crate) struct SigningKey {
    /// `CKA_ID` of its objects.
    pub(crate) object: ObjectId,
    /// DER SubjectPublicKeyInfo, computed from the private object.
    pub(crate) spki: Vec<u8>,
    /// The results of the attribute check.
    pub(crate) findings: Vec<Finding>,
}

/// Makes a signing key and checks its attributes. A key that fails the check is removed again. The session must be
/// read-write. Refuses a token that has a signing key already.
pub(crate) fn make_signing_key(
    session: &Session,
    settings: &Settings,
) -> Result<SigningKey, Fault> {
    refuse_existing(session)?;
    let mut bytes = [0; ID_BYTES];
    aws_lc_rs::rand::fill(&mut bytes)
        .map_err(|_| Fault::new(Class::Configuration, "the random generator failed"))?;
    let object = ObjectId::from_slice(&bytes).expect("16 bytes are a permitted length");
    let (public, private) = signing_templates(&object, MODULUS_BITS);
    let left_out = |attribute: &Attribute| is_named(attribute, &settings.attribute_exceptions);
    let private = adapted(private, Lifetime::Token, left_out);
    calling::next("C_GenerateKeyPair");
    let (public, private) =
        session.generate_key_pair(&Mechanism::RsaPkcsKeyPairGen, &public, &private)?;
    let checked = check(session, settings, object, private);
    if checked.is_err() {
        // The error about the attributes is the more important one.
        let _removed = [destroy(session, private), destroy(session, public)];
    }
    checked
}

fn check(
    session: &Session,
    settings: &Settings,
    object: ObjectId,
    private: ObjectHandle,
) -> Result<SigningKey, Fault> {
    let rules = attribute_check::adapted(SIGNING_KEY, settings.access_control);
    let findings =
        attribute_check::inspect(session, private, &rules, &settings.attribute_exceptions)?;
    let name = format!("signing key {object}");
    attribute_check::require(&name, &findings)?;
    Ok(SigningKey {
        spki: public_side_of(session, private, &name)?.spki,
        object,
        findings,
    })
}

/// Whether the token has a key of [`make_signing_key`].
pub(crate) fn has_signing_key(session: &Session) -> Result<bool, Fault> {
    calling::next("C_FindObjects");
    let found = session.find_objects(&[
        Attribute::Class(ObjectClass::PRIVATE_KEY),
        Attribute::Label(SIGNING_KEY_LABEL.as_bytes().to_vec()),
    ])?;
    Ok(!found.is_empty())
}

fn refuse_existing(session: &Session) -> Result<(), Fault> {
    if !has_signing_key(session)? {
        return Ok(());
    }
    Err(Fault::new(
        Class::Untrusted,
        "the token has a signing key of an earlier ceremony; a second one would not say which ceremony signed",
    ))
}

/// Signs a message, and returns the signature and whether it is RSASSA-PSS. A token that refuses RSASSA-PSS signs with
/// RSASSA-PKCS1-v1_5.
pub(crate) fn sign(
    session: &Session,
    object: &ObjectId,
    message: &[u8],
) -> Result<(Vec<u8>, bool), Fault> {
    calling::next("C_FindObjects");
    let found = session.find_objects(&[
        Attribute::Class(ObjectClass::PRIVATE_KEY),
        Attribute::KeyType(KeyType::RSA),
        Attribute::Id(object.as_bytes().to_vec()),
        Attribute::Label(SIGNING_KEY_LABEL.as_bytes().to_vec()),
    ])?;
    let [key] = found[..] else {
        let what = format!(
            "the token has {} signing keys with CKA_ID {object}",
            found.len()
        );
        return Err(Fault::new(Class::KeyMissing, what));
    };
    let pss = Mechanism::Sha256RsaPkcsPss(PkcsPssParams {
        hash_alg: MechanismType::SHA256,
        mgf: PkcsMgfType::MGF1_SHA256,
        s_len: SALT_BYTES.into(),
    });
    if let Ok(signature) = sign_with(session, &pss, key, message) {
        return Ok((signature, true));
    }
    let signature = sign_with(session, &Mechanism::Sha256RsaPkcs, key, message)?;
    Ok((signature, false))
}

fn sign_with(
    session: &Session,
    mechanism: &Mechanism<'_>,
    key: ObjectHandle,
    message: &[u8],
) -> Result<Vec<u8>, Fault> {
    calling::next("C_Sign");
    let mut signature = vec![0; SIGNATURE_BYTES_MAX];
    let length = session.sign_into(mechanism, key, message, &mut signature)?;
    signature.truncate(length);
    Ok(signature)
}
