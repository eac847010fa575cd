//! AES-256-CBC and its MAC. All failures return the same error, because an attacker could use different errors for
//! the padding and the MAC as an oracle.

use aws_lc_rs::{
    cipher::{
        AES_256, DecryptionContext, EncryptionContext, PaddedBlockDecryptingKey,
        PaddedBlockEncryptingKey, UnboundCipherKey,
    },
    error::Unspecified,
    hmac,
    iv::FixedLength,
    rand,
};
use zeroize::{Zeroize as _, Zeroizing};

use super::Error;

pub(super) const BLOCK_BYTES: usize = 16;
pub(super) const MAC_BYTES: usize = 32;

pub(super) type Iv = [u8; BLOCK_BYTES];
pub(super) type Mac = [u8; MAC_BYTES];

pub(super) fn decrypt(key: &[u8], iv: &Iv, ciphertext: &[u8]) -> Result<Zeroizing<Vec<u8>>, Error> {
    let open = || -> Result<Zeroizing<Vec<u8>>, Unspecified> {
        let key = PaddedBlockDecryptingKey::cbc_pkcs7(UnboundCipherKey::new(&AES_256, key)?)?;
        let mut buffer = Zeroizing::new(ciphertext.to_vec());
        let context = DecryptionContext::Iv128(FixedLength::from(iv));
        let length = key.decrypt(&mut buffer, context)?.len();
        // The plain text begins at the start of the buffer, and the padding follows.
        buffer[length..].zeroize();
        buffer.truncate(length);
        Ok(buffer)
    };
    open().map_err(|_| Error::Decrypt)
}

/// Encrypts with a new random IV.
pub(super) fn encrypt(key: &[u8], plain: &[u8]) -> Result<(Iv, Vec<u8>), Error> {
    let mut iv = [0; BLOCK_BYTES];
    rand::fill(&mut iv).map_err(|_| Error::System("random bytes"))?;
    // The full capacity is allocated first, because a vector that grows for the padding would leave a copy of the
    // plain text in freed memory.
    let mut buffer = Vec::with_capacity(plain.len() + BLOCK_BYTES);
    buffer.extend_from_slice(plain);
    let seal = |buffer: &mut Vec<u8>| -> Result<(), Unspecified> {
        let key = PaddedBlockEncryptingKey::cbc_pkcs7(UnboundCipherKey::new(&AES_256, key)?)?;
        let context = EncryptionContext::Iv128(FixedLength::from(&iv));
        key.less_safe_encrypt(buffer, context).map(drop)
    };
    if seal(&mut buffer).is_err() {
        buffer.zeroize();
        return Err(Error::TooLong);
    }
    Ok((iv, buffer))
}

pub(super) fn mac(key: &[u8], iv: &Iv, ciphertext: &[u8]) -> Mac {
    let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, key));
    context.update(iv);
    context.update(ciphertext);
    let tag = context.sign();
    tag.as_ref().try_into().expect("SHA-256 has 32 bytes")
}

/// Verifies the MAC in constant time. Callers verify the MAC before they decrypt anything.
pub(super) fn verify(key: &[u8], iv: &Iv, ciphertext: &[u8], mac: &Mac) -> Result<(), Error> {
    let key = hmac::Key::new(hmac::HMAC_SHA256, key);
    let message = [iv.as_slice(), ciphertext].concat();
    hmac::verify(&key, &message, mac).map_err(|_| Error::Decrypt)
}
