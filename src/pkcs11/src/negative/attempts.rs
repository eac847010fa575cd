//! The operations that the negative tests try on the token.

use cryptoki::{
    context::Function,
    error::{Error, RvError},
    mechanism::{
        Mechanism, MechanismType,
        aead::GcmParams,
        misc::{ExtractParams, KeyDerivationStringData},
        rsa::{PkcsMgfType, PkcsOaepParams, PkcsOaepSource},
    },
    object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle},
};
use keybroker_pkcs11_ffi::{Session, WrapMechanism};

use crate::{
    attribute_check, calling,
    classify::{Fault, is_a_refusal},
    keys::{KeyPair, object_template},
    mac_key::MacKey,
    recipients::recipient_template,
};

use super::{Done, Subjects};

/// Length of an AES-256 key, and of the sample, in bytes.
pub(super) const SECRET_KEY_BYTES: u64 = 32;
/// Length of a key that is derived from a part of another key, in bytes. The part is so short that an attacker finds
/// its value with 256 guesses.
pub(super) const PART_BYTES: u64 = 1;
/// Length of the nonce of AES-GCM, in bytes.
const NONCE_BYTES: usize = 12;
const TAG_BITS: u64 = 128;
/// The message that is signed.
const MESSAGE: &[u8] = b"keybroker";

/// Further session objects for the tests. A field is `None` if the token does not make the object.
#[derive(Clone, Copy, Debug)]
pub(super) struct Helpers {
    /// An AES key that is allowed to wrap.
    aes: Option<ObjectHandle>,
    /// An RSA public key that is allowed to wrap.
    rsa: Option<ObjectHandle>,
    /// A secret key that is allowed to be wrapped.
    sample: Option<ObjectHandle>,
    /// A secret key from which keys may be derived.
    base: Option<ObjectHandle>,
}

impl Helpers {
    pub(super) fn make(session: &Session, pair: &KeyPair) -> Self {
        Self {
            aes: aes_key(session).ok(),
            rsa: rsa_public_key(session, pair),
            sample: sample_key(session, None).ok(),
            base: sample_key(session, Some(Attribute::Derive(true))).ok(),
        }
    }
}

/// Makes an AES session key that is allowed to wrap.
pub(crate) fn aes_key(session: &Session) -> Result<ObjectHandle, Error> {
    let template = [
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(KeyType::AES),
        Attribute::ValueLen(SECRET_KEY_BYTES.into()),
        Attribute::Token(false),
        Attribute::Private(true),
        Attribute::Sensitive(true),
        Attribute::Extractable(false),
        Attribute::Wrap(true),
    ];
    calling::next("C_GenerateKey");
    session.generate_key(&Mechanism::AesKeyGen, &template)
}

fn sample_key(session: &Session, more: Option<Attribute>) -> Result<ObjectHandle, Error> {
    let mut template = vec![
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(KeyType::GENERIC_SECRET),
        Attribute::ValueLen(SECRET_KEY_BYTES.into()),
        Attribute::Token(false),
        Attribute::Private(true),
        Attribute::Extractable(true),
    ];
    template.extend(more);
    calling::next("C_GenerateKey");
    session.generate_key(&Mechanism::GenericSecretKeyGen, &template)
}

fn rsa_public_key(session: &Session, pair: &KeyPair) -> Option<ObjectHandle> {
    let modulus = attribute_check::read(session, pair.private, AttributeType::Modulus).ok()??;
    let template = recipient_template(modulus);
    calling::next("C_CreateObject");
    session.create_object(&template).ok()
}

pub(super) fn readable(
    on: &Subjects<'_>,
    object: ObjectHandle,
    kind: AttributeType,
) -> Result<Done, Error> {
    let is_there = attribute_check::reveals(on.session, object, kind)?;
    Ok(if is_there { Done::It } else { Done::Nothing })
}

/// Wraps a key under the AES key.
pub(super) fn wraps(
    on: &Subjects<'_>,
    mechanism: &Mechanism<'_>,
    key: ObjectHandle,
) -> Result<Done, Error> {
    wraps_under(on, on.helpers.aes, key, |wrapping, key| {
        Some(on.session.wrap_key(mechanism, wrapping, key))
    })
}

/// Wraps a key under the AES key with a mechanism that `cryptoki` does not support.
pub(super) fn wraps_with(
    on: &Subjects<'_>,
    mechanism: WrapMechanism,
    key: ObjectHandle,
) -> Result<Done, Error> {
    wraps_under(on, on.helpers.aes, key, |wrapping, key| {
        on.session.wrap_key_with(mechanism, wrapping, key)
    })
}

/// Wraps a key under the AES key with AES-GCM. The nonce may repeat, because the result is never used.
pub(super) fn wraps_with_gcm(on: &Subjects<'_>, key: ObjectHandle) -> Result<Done, Error> {
    let mut nonce = [0; NONCE_BYTES];
    let parameters = GcmParams::new(&mut nonce, &[], TAG_BITS.into())?;
    wraps(on, &Mechanism::AesGcm(parameters), key)
}

/// Wraps a key under an RSA public key with `CKM_RSA_AES_KEY_WRAP`, which wraps keys of any length.
pub(super) fn wraps_with_rsa_aes(on: &Subjects<'_>, key: ObjectHandle) -> Result<Done, Error> {
    wraps_under(on, on.helpers.rsa, key, |wrapping, key| {
        on.session
            .wrap_key_with(WrapMechanism::RsaAesKeyWrap, wrapping, key)
    })
}

/// Wraps the integrity key under an RSA public key. Any program could import an RSA public key. The test imports the
/// public key of the wrapping key as a session object, and wraps the integrity key under this object.
pub(super) fn wraps_under_rsa(on: &Subjects<'_>, mechanism: &Mechanism<'_>) -> Result<Done, Error> {
    wraps_under(on, on.helpers.rsa, on.integrity(), |wrapping, key| {
        Some(on.session.wrap_key(mechanism, wrapping, key))
    })
}

/// Whether the token lacks the operation. No key can leave the token through a missing operation.
fn is_not_offered(error: &Error) -> bool {
    matches!(
        error,
        Error::Pkcs11(RvError::MechanismInvalid | RvError::FunctionNotSupported, _)
            | Error::NotSupported
            | Error::NullFunctionPointer
    )
}

/// Wraps a key with the function `wrap`, which returns `None` if the module cannot be called. A refusal is a valid
/// result only if the token wraps a permitted key in the same way.
fn wraps_under(
    on: &Subjects<'_>,
    wrapping: Option<ObjectHandle>,
    key: ObjectHandle,
    wrap: impl Fn(ObjectHandle, ObjectHandle) -> Option<Result<Vec<u8>, Error>>,
) -> Result<Done, Error> {
    let (Some(wrapping), Some(sample)) = (wrapping, on.helpers.sample) else {
        return Ok(Done::NotMade);
    };
    let attempt = || {
        calling::next("C_WrapKey");
        match wrap(wrapping, key) {
            None => Ok(Done::NotMade),
            Some(Ok(wrapped)) if wrapped.is_empty() => Ok(Done::Nothing),
            // The token returned the length of a result, so the token would perform the operation.
            Some(Ok(_) | Err(Error::Pkcs11(RvError::BufferTooSmall, _))) => Ok(Done::It),
            Some(Err(refusal)) => Err(refusal),
        }
    };
    let first = attempt();
    if first.is_ok() {
        return first;
    }
    match wrap(wrapping, sample) {
        // The token may have refused the key only because it was busy.
        Some(Ok(_)) => attempt(),
        Some(Err(error)) if is_not_offered(&error) => Ok(Done::Nothing),
        Some(Err(error)) if !is_a_refusal(&error) => Err(error),
        Some(Err(_)) | None => Ok(Done::NotMade),
    }
}

/// Returns the mechanisms that derive a key from a part of another key.
pub(super) fn of_a_part() -> [Mechanism<'static>; 3] {
    let data = KeyDerivationStringData::new(MESSAGE);
    [
        Mechanism::ExtractKeyFromKey(ExtractParams::new(0)),
        Mechanism::ConcatenateBaseAndData(data),
        Mechanism::XorBaseAndData(data),
    ]
}

/// Returns the mechanisms that derive a key from another key and from data that the caller chooses.
pub(super) fn with_known_data() -> [Mechanism<'static>; 3] {
    let data = KeyDerivationStringData::new(MESSAGE);
    [
        Mechanism::ConcatenateBaseAndData(data),
        Mechanism::ConcatenateDataAndBase(data),
        Mechanism::XorBaseAndData(data),
    ]
}

pub(super) fn readable_template() -> [Attribute; 2] {
    [Attribute::Sensitive(false), Attribute::Extractable(true)]
}

/// Derives a key with each of the mechanisms, and removes the derived key. A refusal is a valid result only if the
/// token derives a key from a permitted key in the same way.
pub(super) fn derives(
    on: &Subjects<'_>,
    mechanisms: &[Mechanism<'_>],
    key: ObjectHandle,
    bytes: u64,
    more: &[Attribute],
) -> Result<Done, Error> {
    let Some(base) = on.helpers.base else {
        return Ok(Done::NotMade);
    };
    let template: Vec<Attribute> = [
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(KeyType::GENERIC_SECRET),
        Attribute::ValueLen(bytes.into()),
        Attribute::Token(false),
        Attribute::Private(true),
    ]
    .into_iter()
    .chain(more.iter().cloned())
    .collect();
    let derive = |mechanism, from| {
        calling::next("C_DeriveKey");
        on.session.derive_key(mechanism, from, &template)
    };
    let mut done = Ok(Done::Nothing);
    for mechanism in mechanisms {
        match derive(mechanism, key) {
            Ok(derived) => return Ok(removed(on, derived)),
            Err(refusal) if is_a_refusal(&refusal) => match derive(mechanism, base) {
                Ok(derived) => {
                    if let Done::Kept(fault) = removed(on, derived) {
                        return Ok(Done::Kept(fault));
                    }
                    // The token may have refused the key only because it was busy.
                    match derive(mechanism, key) {
                        Ok(derived) => return Ok(removed(on, derived)),
                        Err(refusal) if is_a_refusal(&refusal) => done = Err(refusal),
                        Err(error) => return Err(error),
                    }
                }
                Err(error) if is_not_offered(&error) => {}
                Err(error) if is_a_refusal(&error) => {
                    done = done.and(Ok(Done::NotMade));
                }
                Err(error) => return Err(error),
            },
            Err(error) => return Err(error),
        }
    }
    done
}

/// Removes an object that the token should not have made, and returns the result of the test.
fn removed(on: &Subjects<'_>, object: ObjectHandle) -> Done {
    calling::next("C_DestroyObject");
    match on.session.destroy_object(object) {
        Ok(()) => Done::It,
        Err(error) => Done::Kept(Fault::from(error)),
    }
}

/// Returns OAEP with SHA-1, because every token with OAEP supports this hash function.
pub(super) fn oaep_sha1() -> Mechanism<'static> {
    Mechanism::RsaPkcsOaep(PkcsOaepParams::new(
        MechanismType::SHA1,
        PkcsMgfType::MGF1_SHA1,
        PkcsOaepSource::empty(),
    ))
}

pub(super) fn copies(
    on: &Subjects<'_>,
    key: ObjectHandle,
    weaker: Option<Attribute>,
) -> Result<Done, Error> {
    let template: Vec<Attribute> = [Attribute::Token(false)]
        .into_iter()
        .chain(weaker)
        .collect();
    calling::next("C_CopyObject");
    let copy = on.session.copy_object(key, &template)?;
    Ok(removed(on, copy))
}

/// Decrypts with a forbidden mechanism. A token may refuse the mechanism at the beginning or at the end of the
/// operation. If the token reports a problem with the ciphertext, the token has accepted the mechanism.
pub(super) fn decrypts(
    on: &Subjects<'_>,
    mechanism: &Mechanism<'_>,
    wrapped: Option<&[u8]>,
) -> Result<Done, Error> {
    let Some(wrapped) = wrapped else {
        return Ok(Done::NotMade);
    };
    calling::next("C_Decrypt");
    match on.session.decrypt(mechanism, on.pair.private, wrapped) {
        Ok(_)
        | Err(Error::Pkcs11(
            RvError::EncryptedDataInvalid | RvError::EncryptedDataLenRange,
            Function::Decrypt,
        )) => Ok(Done::It),
        Err(error) => Err(error),
    }
}

pub(super) fn decrypts_oaep(on: &Subjects<'_>, wrapped: &[u8]) -> Result<Done, Error> {
    calling::next("C_Decrypt");
    let plaintext = on
        .session
        .decrypt(&on.self_test.mechanism(), on.pair.private, wrapped)?;
    Ok(if plaintext.is_empty() {
        Done::Nothing
    } else {
        Done::It
    })
}

/// Unwraps bytes with the key, with a mechanism that may be forbidden.
pub(super) fn unwraps_bytes(
    on: &Subjects<'_>,
    mechanism: &Mechanism<'_>,
    wrapped: &[u8],
) -> Result<Done, Error> {
    calling::next("C_UnwrapKey");
    let template = object_template();
    let object = on
        .session
        .unwrap_key(mechanism, on.pair.private, wrapped, &template)?;
    Ok(removed(on, object))
}

/// Unwraps the known ciphertext with a sealed wrapping key, tries an operation with the object, and removes the object.
pub(super) fn on_unwrapped(
    on: &Subjects<'_>,
    attempt: impl FnOnce(ObjectHandle) -> Result<Done, Error>,
) -> Result<Done, Error> {
    let object = on
        .self_test
        .sealed(on.pair)
        .unwrap(on.session, &object_template())?;
    let done = attempt(object);
    calling::next("C_DestroyObject");
    // If the removal fails, the token removes the object when the session of the test ends.
    let _removed = on.session.destroy_object(object);
    done
}

pub(super) fn unwraps(on: &Subjects<'_>) -> Result<Done, Error> {
    let template = [
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(KeyType::GENERIC_SECRET),
        Attribute::Token(false),
        Attribute::Private(true),
    ];
    calling::next("C_UnwrapKey");
    let object = on.session.unwrap_key(
        &on.self_test.mechanism(),
        on.pair.private,
        on.self_test.wrapped(),
        &template,
    )?;
    Ok(removed(on, object))
}

pub(super) fn signs(
    on: &Subjects<'_>,
    mechanism: &Mechanism<'_>,
    key: ObjectHandle,
) -> Result<Done, Error> {
    calling::next("C_Sign");
    on.session.sign(mechanism, key, MESSAGE)?;
    Ok(Done::It)
}

/// Verifies the first bytes of a MAC. In memory, wrong bytes follow the first bytes of the MAC, because opencryptoki
/// 3.8 ignores the length and compares all 32 bytes. This defect of opencryptoki does not allow a forgery, because the
/// broker always passes 32 bytes.
pub(super) fn verifies(on: &Subjects<'_>, length: usize) -> Result<Done, Error> {
    let mechanism = Mechanism::Sha256Hmac;
    let object = match &on.pair.integrity_key {
        MacKey::OnToken(object) => *object,
        MacKey::InWorker(Some(secret)) => {
            let mac = secret.mac(MESSAGE);
            let shown = &mac[..length.min(mac.len())];
            return Ok(if secret.verifies(MESSAGE, shown) {
                Done::It
            } else {
                Done::Nothing
            });
        }
        // Unreachable: the self-test has already used the integrity key.
        MacKey::InWorker(None) => return Ok(Done::NotMade),
    };
    calling::next("C_Sign");
    let mut mac = on.session.sign(&mechanism, object, MESSAGE)?;
    let length = length.min(mac.len());
    for byte in &mut mac[length..] {
        *byte = !*byte;
    }
    let shown = &mac[..length];
    calling::next("C_Verify");
    on.session.verify(&mechanism, object, MESSAGE, shown)?;
    Ok(Done::It)
}

pub(super) fn sets(
    on: &Subjects<'_>,
    key: ObjectHandle,
    attribute: Attribute,
) -> Result<Done, Error> {
    calling::next("C_SetAttributeValue");
    on.session.update_attributes(key, &[attribute])?;
    Ok(Done::It)
}
