//! Imports the key of a Bitwarden organisation, and releases the user keys of its members to their devices: the token
//! unwraps the user key into a session object, and wraps the object under the public key of the device. The user key is
//! never in the memory of a process of Keybroker, unless the token is software that the module runs in this process.
//!
//! Mitigation: M28 of `THREAT_MODEL.md`.

use cryptoki::object::AttributeType;
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

use keybroker_core::{envelope::Algorithm, key::WrappingKeyId};
use keybroker_pkcs11_ffi::Session;
use keybroker_worker_protocol::{
    Settings,
    oaep::WrapKey,
    private_key::{ORGANIZATION_KEY_BITS, PrivateParts},
    recipient::RecipientKey,
};

use crate::{
    attribute_check, calling,
    classify::{Class, Fault, is_a_refusal},
    keys::{self, OrganizationKey},
    oaep,
    open::OpenToken,
    recipients::Recipients,
    sealed::{RecipientPair, SealedKey},
};

/// The algorithm of every key that Bitwarden's clients wrap for an organisation or for a device. OAEP does not need a hash
/// without collisions.
const ALGORITHM: Algorithm = Algorithm::RsaOaepSha1;
/// Length of the key that the self-test releases: that of a user key.
const SELF_TEST_BYTES: usize = 64;

/// The answer to a request to release a user key. A failure of the token, or of the organisation's key on it, is a fault instead.
#[derive(Debug)]
pub(crate) enum Release {
    /// The user key, wrapped under the public key of the device.
    ForDevice(Vec<u8>),
    /// Why the wrapped key or the public key of the device is not accepted.
    Refused(String),
}

/// Imports the key of an organisation, checks its attributes, and tests it. A key that fails is removed again.
pub(crate) fn import(
    token: &OpenToken,
    settings: &Settings,
    id: WrappingKeyId,
    pkcs8: &[u8],
) -> Result<OrganizationKey, Fault> {
    let parts = PrivateParts::from_pkcs8(pkcs8)
        .map_err(|error| Fault::new(Class::Untrusted, error.to_string()))?;
    let session = &token.anchor;
    let imported = keys::import_organization_key(session, settings, id, &parts)?;
    check(token, settings, id).map_err(|fault| imported.removed_after(session, fault))
}

/// Checks the attributes of an organisation key, and tests what it does and what the token refuses.
pub(crate) fn check(
    token: &OpenToken,
    settings: &Settings,
    id: WrappingKeyId,
) -> Result<OrganizationKey, Fault> {
    let session = token.session(&[])?;
    let key = keys::organization_key(&session.session, settings, id)?;
    self_test(&session.session, &key)?;
    // A refusal is proof only in a session in which the operation before it succeeded.
    refuses_to_decrypt(&session.session, &key)?;
    refuses_to_reveal(&session.session, &key)?;
    Ok(key)
}

/// Releases a member's user key to a device. `fingerprint` is that of the organisation's public key.
pub(crate) fn release(
    token: &OpenToken,
    settings: &Settings,
    id: WrappingKeyId,
    fingerprint: &[u8],
    wrapped: &[u8],
    recipient: &[u8],
) -> Result<Release, Fault> {
    let recipient = match device_key(recipient) {
        Ok(recipient) => recipient,
        Err(why) => return Ok(Release::Refused(why)),
    };
    // The session ends with this function, and with it every object that a failed release leaves.
    let session = token.session(&[])?.session;
    let key = keys::organization_key(&session, settings, id)?;
    if key.public.fingerprint.0.as_slice() != fingerprint {
        let what = format!(
            "organisation key {id} on the token has the public key {}, which is not the configured one",
            key.public.fingerprint
        );
        return Err(Fault::new(Class::Untrusted, what));
    }
    let released =
        sealed(&key, wrapped).and_then(|sealed| release_to(&session, &sealed, &recipient));
    let fault = match released {
        Ok(released) => return Ok(Release::ForDevice(released)),
        Err(fault) => fault,
    };
    drop(session);
    if is_of_token(&fault) {
        return Err(fault);
    }
    // Tokens report a damaged ciphertext with the same codes as a failure of their own. The self-test decides.
    let session = token.session(&[])?.session;
    self_test(&session, &key)?;
    Ok(Release::Refused(format!(
        "the member's key cannot be unwrapped with the key of the organisation: it is damaged, or belongs to another key pair ({fault})"
    )))
}

/// Reads the public key of a device. The error is the reason why the key is not accepted.
fn device_key(spki: &[u8]) -> Result<RecipientKey, String> {
    let key = RecipientKey::from_spki(spki)
        .map_err(|error| format!("the public key of the device: {error}"))?;
    let bits = key.modulus().len() * 8;
    if bits == ORGANIZATION_KEY_BITS {
        return Ok(key);
    }
    Err(format!(
        "the public key of the device has {bits} bits; Bitwarden's clients make keys of {ORGANIZATION_KEY_BITS} bits"
    ))
}

fn is_of_token(fault: &Fault) -> bool {
    matches!(
        fault.class,
        Class::TokenLost | Class::SessionLost | Class::BackOff | Class::Pin | Class::Untrusted
    )
}

fn sealed(key: &OrganizationKey, wrapped: &[u8]) -> Result<SealedKey, Fault> {
    if wrapped.len() * 8 != ORGANIZATION_KEY_BITS {
        let what = format!("the wrapped key has {} bytes", wrapped.len());
        return Err(Fault::new(Class::Input, what));
    }
    // RSA computes modulo the modulus, so a ciphertext plus the modulus could be unwrapped to the same user key. The sum has another
    // digest, and would not be recognised as the key of another member.
    if !is_below(wrapped, &key.public.modulus) {
        let what = "the wrapped key is not below the modulus of the organisation's key";
        return Err(Fault::new(Class::Input, what));
    }
    Ok(SealedKey {
        private: key.private,
        algorithm: ALGORITHM,
        wrapped: wrapped.to_vec(),
    })
}

/// Whether a number is smaller than another one. Both are big-endian, and may have leading zeros.
fn is_below(number: &[u8], limit: &[u8]) -> bool {
    let [number, limit] = [number, limit].map(without_leading_zeros);
    // Numbers of the same length are ordered like their bytes.
    (number.len(), number) < (limit.len(), limit)
}

fn without_leading_zeros(number: &[u8]) -> &[u8] {
    let zeros = number.iter().take_while(|byte| **byte == 0).count();
    &number[zeros..]
}

fn release_to(
    session: &Session,
    sealed: &SealedKey,
    recipient: &RecipientKey,
) -> Result<Vec<u8>, Fault> {
    let recipient = Recipients::default().object(session, recipient.spki())?;
    sealed.release(session, recipient, ALGORITHM)
}

/// Releases a random key to the key pair of this process, opens it, and compares.
fn self_test(session: &Session, key: &OrganizationKey) -> Result<(), Fault> {
    let about = "the self-test of the organisation key";
    let failed = |what: &str| Fault::new(Class::Untrusted, format!("{about} failed: {what}"));
    let mut expected = Zeroizing::new([0; SELF_TEST_BYTES]);
    aws_lc_rs::rand::fill(expected.as_mut()).map_err(|_| failed("no random bytes"))?;
    let wrapped = wrap(key, expected.as_ref())?;
    let device = RecipientPair::of_process().map_err(|fault| fault.about(about))?;
    let released = release_to(session, &sealed(key, &wrapped)?, &device.public)
        .map_err(|fault| fault.about(about))?;
    let opened = device
        .open(&released, ALGORITHM)
        .map_err(|fault| fault.about(about))?;
    if bool::from(opened.ct_eq(expected.as_ref())) {
        return Ok(());
    }
    Err(failed("the device decrypts another key"))
}

fn wrap(key: &OrganizationKey, plain: &[u8]) -> Result<Vec<u8>, Fault> {
    WrapKey::new(&key.public.spki, ALGORITHM)
        .and_then(|public| public.wrap(plain))
        .map_err(|error| Fault::new(Class::Untrusted, error.to_string()))
}

/// `C_Decrypt` with the organisation key must fail, because it would put a user key into the memory of a process.
fn refuses_to_decrypt(session: &Session, key: &OrganizationKey) -> Result<(), Fault> {
    let wrapped = wrap(key, &[0; SELF_TEST_BYTES])?;
    calling::next("C_Decrypt");
    let mut plain = Zeroizing::new(vec![0; 512]);
    match session.decrypt_into(
        &oaep::mechanism(ALGORITHM),
        key.private,
        &wrapped,
        &mut plain,
    ) {
        Ok(_) => Err(Fault::new(
            Class::Untrusted,
            "the token decrypts with the organisation key, although CKA_DECRYPT is false",
        )),
        Err(error) if is_a_refusal(&error) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn refuses_to_reveal(session: &Session, key: &OrganizationKey) -> Result<(), Fault> {
    match attribute_check::reveals(session, key.private, AttributeType::PrivateExponent) {
        Ok(true) => Err(Fault::new(
            Class::Untrusted,
            "the token reveals the private exponent of the organisation key",
        )),
        Err(error) if !is_a_refusal(&error) => Err(error.into()),
        Ok(false) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::rsa::KeySize;

    use super::*;

    /// A number of 256 bytes.
    fn number(first: u8, middle: u8, last: u8) -> Vec<u8> {
        let mut bytes = vec![middle; 256];
        bytes[0] = first;
        bytes[255] = last;
        bytes
    }

    /// A ciphertext has one spelling: that below the modulus.
    #[test]
    fn numbers_are_compared_by_their_value() {
        let with_zero = |number: &[u8]| [&[0_u8][..], number].concat();
        let modulus = number(0xc1, 0x5a, 0x5b);
        for (smaller, is_smaller) in [
            (vec![0; 256], true),
            (number(0xc1, 0x5a, 0x5a), true),
            (number(0xc1, 0x5a, 0x5b), false),
            (number(0xc1, 0x5a, 0x5c), false),
            (number(0xc0, 0xff, 0xff), true),
            (number(0xc2, 0, 0), false),
            // Leading zeros do not change a number.
            (with_zero(&number(0xc1, 0x5a, 0x5a)), true),
            (with_zero(&modulus), false),
            (vec![1; 257], false),
            (vec![0xff; 255], true),
        ] {
            assert_eq!(is_below(&smaller, &modulus), is_smaller, "{smaller:02x?}");
            let padded = with_zero(&modulus);
            assert_eq!(is_below(&smaller, &padded), is_smaller, "{smaller:02x?}");
        }
        assert!(!is_below(&[], &[]) && !is_below(&[0], &[]));
    }

    #[test]
    fn public_keys_of_devices_have_2048_bits() {
        let device = RecipientPair::of_process().unwrap();
        assert_eq!(device_key(device.public.spki()).unwrap(), device.public);
        let longer = RecipientPair::generate(KeySize::Rsa3072).unwrap();
        let why = device_key(longer.public.spki()).unwrap_err();
        assert!(why.contains("3072 bits"), "{why}");
        let why = device_key(b"key").unwrap_err();
        assert!(why.contains("DER"), "{why}");
    }
}
