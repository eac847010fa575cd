//! RSA-OAEP with the public key, in software. Wrapping needs only the public key, so the token is
//! not needed.
//!
//! Mitigation: M9 of `THREAT_MODEL.md`.

use aws_lc_rs::{
    digest,
    rsa::{
        OAEP_SHA1_MGF1SHA1, OAEP_SHA256_MGF1SHA256, OaepPublicEncryptingKey, PublicEncryptingKey,
    },
};
use rsa::{BigUint, RsaPublicKey, pkcs8::EncodePublicKey as _};

use keybroker_core::{envelope::Algorithm, key::Fingerprint};

/// Smallest and largest permitted modulus, in bits.
pub const MODULUS_BITS: std::ops::RangeInclusive<usize> = 2_048..=4_096;

/// The reason why a public key cannot be used, or why wrapping failed.
#[derive(Debug, thiserror::Error)]
pub enum OaepError {
    /// The key is not an RSA key of a permitted size.
    #[error("the public key is not an RSA key of a permitted size")]
    NotPermitted,
    /// The modulus has a length that is not permitted.
    #[error("a modulus of {0} bits; 2048 to 4096 bits are permitted")]
    Modulus(usize),
    /// Modulus and exponent are not a valid RSA public key.
    #[error("not an RSA public key: {0}")]
    NoKey(#[from] rsa::Error),
    /// The key cannot be encoded.
    #[error("cannot encode the public key: {0}")]
    Encode(#[from] rsa::pkcs8::spki::Error),
    /// The encryption failed. The cryptographic library gives no further reason.
    #[error("RSA-OAEP encryption failed")]
    Encrypt,
}

/// A public key that can wrap user keys.
#[derive(Debug)]
pub struct WrapKey {
    key: OaepPublicEncryptingKey,
    algorithm: Algorithm,
}

impl WrapKey {
    /// Reads a DER SubjectPublicKeyInfo.
    pub fn new(spki: &[u8], algorithm: Algorithm) -> Result<Self, OaepError> {
        let key = PublicEncryptingKey::from_der(spki).map_err(|_| OaepError::NotPermitted)?;
        let key = OaepPublicEncryptingKey::new(key).map_err(|_| OaepError::NotPermitted)?;
        Ok(Self { key, algorithm })
    }

    /// The algorithm with which the key wraps.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// The modulus length in bits. All permitted lengths fit into the return type.
    pub fn modulus_bits(&self) -> u32 {
        u32::try_from(self.key.key_size_bits()).unwrap_or(0)
    }

    /// Wraps with an empty OAEP label.
    pub fn wrap(&self, plaintext: &[u8]) -> Result<Vec<u8>, OaepError> {
        let parameters = match self.algorithm {
            Algorithm::RsaOaepSha256 => &OAEP_SHA256_MGF1SHA256,
            Algorithm::RsaOaepSha1 => &OAEP_SHA1_MGF1SHA1,
        };
        let mut wrapped = vec![0; self.key.ciphertext_size()];
        let length = self
            .key
            .encrypt(parameters, plaintext, &mut wrapped, None)
            .map_err(|_| OaepError::Encrypt)?
            .len();
        wrapped.truncate(length);
        Ok(wrapped)
    }
}

/// Returns the DER SubjectPublicKeyInfo and the modulus length in bits, from big-endian modulus and
/// exponent.
pub fn spki(modulus: &[u8], exponent: &[u8]) -> Result<(Vec<u8>, usize), OaepError> {
    let (n, e) = (
        BigUint::from_bytes_be(modulus),
        BigUint::from_bytes_be(exponent),
    );
    let bits = n.bits();
    if !MODULUS_BITS.contains(&bits) {
        return Err(OaepError::Modulus(bits));
    }
    let key = RsaPublicKey::new(n, e)?;
    let der = key.to_public_key_der()?;
    Ok((der.into_vec(), bits))
}

/// Returns the SHA-256 of a DER SubjectPublicKeyInfo.
pub fn fingerprint(spki: &[u8]) -> Fingerprint {
    let digest = digest::digest(&digest::SHA256, spki);
    let bytes = digest.as_ref().try_into().expect("SHA-256 gives 32 bytes");
    Fingerprint(bytes)
}

#[cfg(test)]
mod tests {
    use rsa::{Oaep, RsaPrivateKey, rand_core::OsRng, traits::PublicKeyParts as _};

    use super::*;

    /// An independent implementation unwraps the result.
    #[test]
    fn an_independent_implementation_unwraps() {
        let private = RsaPrivateKey::new(&mut OsRng, 2_048).unwrap();
        let (n, e) = (private.n().to_bytes_be(), private.e().to_bytes_be());
        let (spki, bits) = spki(&n, &e).unwrap();
        assert_eq!(bits, 2_048);
        for algorithm in [Algorithm::RsaOaepSha256, Algorithm::RsaOaepSha1] {
            let wrapped = WrapKey::new(&spki, algorithm)
                .unwrap()
                .wrap(&[7; 190])
                .unwrap();
            let padding = match algorithm {
                Algorithm::RsaOaepSha256 => Oaep::new::<rsa::sha2::Sha256>(),
                Algorithm::RsaOaepSha1 => Oaep::new::<sha1::Sha1>(),
            };
            assert_eq!(private.decrypt(padding, &wrapped).unwrap(), [7; 190]);
        }
    }

    #[test]
    fn small_keys_are_refused() {
        let private = RsaPrivateKey::new(&mut OsRng, 1_024).unwrap();
        let (n, e) = (private.n().to_bytes_be(), private.e().to_bytes_be());
        assert!(spki(&n, &e).unwrap_err().to_string().contains("1024 bits"));
    }
}
