//! The public key of the recipient of a sealed release.
//!
//! Mitigation: M26 of `THREAT_MODEL.md`.

use std::sync::LazyLock;

use keybroker_core::key::Fingerprint;
use rsa::{BigUint, RsaPublicKey, pkcs8::DecodePublicKey as _, traits::PublicKeyParts as _};

use crate::oaep;

/// The permitted lengths of a modulus, in bits. The report on a token tests sealed releases to keys of these lengths. Callers
/// choose the key, so every other length would be untested.
const MODULUS_BITS: [usize; 3] = [2_048, 3_072, 4_096];
/// The only permitted public exponent, big-endian: 65537.
const EXPONENT: [u8; 3] = [0x01, 0x00, 0x01];
/// A modulus must not have a factor below this number (NIST SP 800-89 section 5.3.3).
const FACTOR_MIN: u32 = 752;

/// The odd prime numbers below [`FACTOR_MIN`], multiplied in groups whose products fit into 32 bits. One division of the
/// modulus by a product replaces a division by each prime number of the group.
static SMALL_PRIMES: LazyLock<Vec<u32>> = LazyLock::new(|| {
    let is_prime = |number: &u32| {
        (3..*number)
            .step_by(2)
            .all(|factor| !number.is_multiple_of(factor))
    };
    let mut products = vec![1_u32];
    for prime in (3..FACTOR_MIN).step_by(2).filter(is_prime) {
        match products
            .last_mut()
            .map(|last| (last.checked_mul(prime), last))
        {
            Some((Some(product), last)) => *last = product,
            _ => products.push(prime),
        }
    }
    products
});

/// Longest accepted DER SubjectPublicKeyInfo, in bytes: that of a key of 4096 bits has 550 bytes.
pub const SPKI_BYTES_MAX: usize = 1_024;

/// The reason why a public key cannot be the key of a recipient.
#[derive(Debug, thiserror::Error)]
pub enum RecipientError {
    /// The bytes are not exactly one key of this form.
    #[error("not the DER SubjectPublicKeyInfo of a valid RSA public key of at most 4096 bits")]
    Encoding,
    /// The public exponent is not permitted.
    #[error("the public exponent is not 65537")]
    Exponent,
    /// The length of the modulus is not permitted.
    #[error("a modulus of {0} bits; 2048, 3072 or 4096 bits are permitted")]
    Length(usize),
    /// The modulus is easy to factor.
    #[error("the modulus has a factor below {FACTOR_MIN}, so the key is weak")]
    Weak,
}

/// An RSA public key with a modulus of 2048, 3072 or 4096 bits and the exponent 65537.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecipientKey {
    spki: Vec<u8>,
    modulus: Vec<u8>,
    fingerprint: Fingerprint,
}

impl RecipientKey {
    /// Reads a DER SubjectPublicKeyInfo. Each key has only one accepted encoding, so the fingerprint identifies the key.
    pub fn from_spki(spki: &[u8]) -> Result<Self, RecipientError> {
        if spki.len() > SPKI_BYTES_MAX {
            return Err(RecipientError::Encoding);
        }
        let key = RsaPublicKey::from_public_key_der(spki).map_err(|_| RecipientError::Encoding)?;
        if *key.e() != BigUint::from_bytes_be(&EXPONENT) {
            return Err(RecipientError::Exponent);
        }
        let bits = key.n().bits();
        if !MODULUS_BITS.contains(&bits) {
            return Err(RecipientError::Length(bits));
        }
        let modulus = key.n().to_bytes_be();
        let (canonical, _) =
            oaep::spki(&modulus, &EXPONENT).map_err(|_| RecipientError::Encoding)?;
        if canonical != spki {
            return Err(RecipientError::Encoding);
        }
        if SMALL_PRIMES
            .iter()
            .any(|product| shares_factor(&modulus, *product))
        {
            return Err(RecipientError::Weak);
        }
        Ok(Self {
            spki: canonical,
            modulus,
            fingerprint: oaep::fingerprint(spki),
        })
    }

    /// The DER SubjectPublicKeyInfo.
    pub fn spki(&self) -> &[u8] {
        &self.spki
    }

    /// The modulus, big-endian and without leading zeros.
    pub fn modulus(&self) -> &[u8] {
        &self.modulus
    }

    /// The SHA-256 of the DER SubjectPublicKeyInfo.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }
}

/// Whether a modulus and a number have a common factor (Euclid's algorithm). The remainder is computed with numbers of 64
/// bits, because each sealed release checks the key, and divisions of big numbers took a quarter of the front's time.
fn shares_factor(modulus: &[u8], number: u32) -> bool {
    let number = u64::from(number);
    let (head, words) = modulus.split_at(modulus.len() % 4);
    let append = |rest: u64, bytes: &[u8]| {
        let joined = bytes
            .iter()
            .fold(rest, |joined, byte| (joined << 8) | u64::from(*byte));
        joined % number
    };
    let rest = words.chunks_exact(4).fold(append(0, head), append);
    let (mut larger, mut smaller) = (number, rest);
    while smaller != 0 {
        (larger, smaller) = (smaller, larger % smaller);
    }
    larger != 1
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::{
        encoding::AsDer as _,
        rsa::{KeySize, PrivateDecryptingKey},
    };
    use rsa::pkcs8::EncodePublicKey as _;

    use super::*;

    fn generated(size: KeySize) -> Vec<u8> {
        let key = PrivateDecryptingKey::generate(size).unwrap().public_key();
        key.as_der().unwrap().as_ref().to_vec()
    }

    /// The encoding of a key that is not checked.
    fn encoded(modulus: &BigUint, exponent: u32) -> Vec<u8> {
        let key = RsaPublicKey::new_unchecked(modulus.clone(), BigUint::from(exponent));
        key.to_public_key_der().unwrap().into_vec()
    }

    fn refused(spki: &[u8]) -> String {
        RecipientKey::from_spki(spki).unwrap_err().to_string()
    }

    #[test]
    fn keys_of_the_permitted_sizes_are_accepted() {
        for (size, bytes) in [
            (KeySize::Rsa2048, 256),
            (KeySize::Rsa3072, 384),
            (KeySize::Rsa4096, 512),
        ] {
            let spki = generated(size);
            let key = RecipientKey::from_spki(&spki).unwrap();
            assert_eq!(key.modulus().len(), bytes);
            assert_eq!(key.fingerprint(), oaep::fingerprint(&spki));
        }
    }

    /// The check finds each small prime factor, and accepts a modulus without an odd factor, at each length of the modulus.
    #[test]
    fn the_products_are_those_of_the_small_primes() {
        for bits in [2_047_usize, 2_055, 2_063, 2_071] {
            let modulus = BigUint::from(1_u8) << bits;
            for prime in [3_u32, 5, 7, 11, 373, 743, 751] {
                let prime = BigUint::from(prime);
                let multiple = (&modulus / &prime * &prime).to_bytes_be();
                let found = SMALL_PRIMES
                    .iter()
                    .any(|one| shares_factor(&multiple, *one));
                assert!(found, "{prime}, {bits} bits");
            }
            let modulus = modulus.to_bytes_be();
            let found = SMALL_PRIMES.iter().any(|one| shares_factor(&modulus, *one));
            assert!(!found, "a power of two has no odd factor");
        }
    }

    #[test]
    fn other_keys_are_refused() {
        let spki = generated(KeySize::Rsa2048);
        let key = RecipientKey::from_spki(&spki).unwrap();
        let modulus = BigUint::from_bytes_be(key.modulus());
        let odd = |bits: usize| (BigUint::from(1_u8) << (bits - 1)) + BigUint::from(1_u8);
        for (bytes, words) in [
            (spki[1..].to_vec(), "DER"),
            ([&spki[..], &[0]].concat(), "DER"),
            (encoded(&(&modulus - BigUint::from(1_u8)), 65_537), "DER"),
            (encoded(&odd(8_192), 65_537), "at most 4096 bits"),
            (encoded(&modulus, 3), "65537"),
            (encoded(&modulus, 65_539), "65537"),
            (encoded(&odd(1_024), 65_537), "1024 bits"),
            (encoded(&odd(2_047), 65_537), "2047 bits"),
            (encoded(&odd(2_049), 65_537), "2049 bits"),
            // Lengths in whole bytes between the permitted lengths.
            (encoded(&odd(2_056), 65_537), "2056 bits"),
            (encoded(&odd(2_560), 65_537), "2560 bits"),
            (encoded(&odd(3_064), 65_537), "3064 bits"),
            (encoded(&odd(4_088), 65_537), "4088 bits"),
            // 751 is the largest prime number below the limit.
            (
                encoded(&(odd(2_039) * BigUint::from(751_u32)), 65_537),
                "weak",
            ),
        ] {
            let message = refused(&bytes);
            assert!(message.contains(words), "{words}: {message}");
        }
    }
}
