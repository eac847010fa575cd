//! The parts of an RSA private key that is imported into a token. Only the key of a Bitwarden organisation is imported:
//! every other key is made on a token.

use aws_lc_rs::rsa::PrivateDecryptingKey;
use rsa::pkcs8::{
    PrivateKeyInfo,
    der::{Reader as _, SliceReader, asn1::UintRef},
};
use zeroize::Zeroizing;

/// Length of the modulus of an organisation key, in bits. Bitwarden's clients accept no other length.
pub const ORGANIZATION_KEY_BITS: usize = 2_048;
/// The object identifier of RSA keys: 1.2.840.113549.1.1.1 (RFC 8017, appendix C).
const RSA_ENCRYPTION: &str = "1.2.840.113549.1.1.1";
/// Number of integers in the structure of a private key, after the version (RFC 8017, appendix A.1.2).
const INTEGERS: usize = 8;

/// The reason why a private key cannot be imported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PrivateKeyError {
    /// The bytes are not a PKCS#8 RSA key.
    #[error("not an RSA private key in PKCS#8 (DER) without a password")]
    Encoding,
    /// The parts of the key contradict each other, or the key is too weak.
    #[error("the parts of the RSA private key contradict each other")]
    Inconsistent,
    /// The modulus has another length.
    #[error(
        "a modulus of {0} bits; the key of a Bitwarden organisation has {ORGANIZATION_KEY_BITS} bits"
    )]
    Length(usize),
}

/// The integers of an RSA private key, big-endian and without leading zeros.
pub struct PrivateParts([Zeroizing<Vec<u8>>; INTEGERS]);

impl std::fmt::Debug for PrivateParts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PrivateParts(redacted)")
    }
}

impl PrivateParts {
    /// Reads a PKCS#8 key, and checks that its parts belong together.
    pub fn from_pkcs8(der: &[u8]) -> Result<Self, PrivateKeyError> {
        let info = PrivateKeyInfo::try_from(der).map_err(|_| PrivateKeyError::Encoding)?;
        if info.algorithm.oid.to_string() != RSA_ENCRYPTION {
            return Err(PrivateKeyError::Encoding);
        }
        let parts = integers(info.private_key).ok_or(PrivateKeyError::Encoding)?;
        let key =
            PrivateDecryptingKey::from_pkcs8(der).map_err(|_| PrivateKeyError::Inconsistent)?;
        if key.key_size_bits() != ORGANIZATION_KEY_BITS {
            return Err(PrivateKeyError::Length(key.key_size_bits()));
        }
        Ok(Self(parts))
    }

    /// The modulus.
    pub fn modulus(&self) -> &[u8] {
        &self.0[0]
    }

    /// The public exponent.
    pub fn public_exponent(&self) -> &[u8] {
        &self.0[1]
    }

    /// The secret parts in the order of PKCS#1: the private exponent, both primes, both exponents of the Chinese
    /// remainder theorem, and the coefficient.
    pub fn secrets(&self) -> [&[u8]; INTEGERS - 2] {
        [2, 3, 4, 5, 6, 7].map(|part: usize| &**self.0[part])
    }
}

/// The integers of a PKCS#1 private key with two primes. Such a key has the version 0.
fn integers(der: &[u8]) -> Option<[Zeroizing<Vec<u8>>; INTEGERS]> {
    let mut reader = SliceReader::new(der).ok()?;
    let (version, parts) = reader
        .sequence(|reader| {
            let version: u8 = reader.decode()?;
            let mut parts: [Zeroizing<Vec<u8>>; INTEGERS] = Default::default();
            for part in &mut parts {
                let number: UintRef<'_> = reader.decode()?;
                *part = Zeroizing::new(number.as_bytes().to_vec());
            }
            Ok((version, parts))
        })
        .ok()?;
    reader.finish(()).ok()?;
    (version == 0).then_some(parts)
}

#[cfg(test)]
mod tests {
    use rsa::{
        BigUint, RsaPrivateKey,
        pkcs8::EncodePrivateKey as _,
        rand_core::OsRng,
        traits::{PrivateKeyParts as _, PublicKeyParts as _},
    };

    use super::*;

    fn pkcs8(key: &RsaPrivateKey) -> Vec<u8> {
        key.to_pkcs8_der().unwrap().as_bytes().to_vec()
    }

    /// Another implementation computes the parts.
    #[test]
    fn the_parts_are_those_of_the_key() {
        let mut key = RsaPrivateKey::new(&mut OsRng, 2_048).unwrap();
        key.precompute().unwrap();
        let parts = PrivateParts::from_pkcs8(&pkcs8(&key)).unwrap();
        assert_eq!(parts.modulus(), key.n().to_bytes_be());
        assert_eq!(parts.public_exponent(), [1, 0, 1]);
        let [d, p, q, dp, dq, _] = parts.secrets();
        assert_eq!(d, key.d().to_bytes_be());
        assert_eq!(p, key.primes()[0].to_bytes_be());
        assert_eq!(q, key.primes()[1].to_bytes_be());
        assert_eq!(dp, key.dp().unwrap().to_bytes_be());
        assert_eq!(dq, key.dq().unwrap().to_bytes_be());
        assert_eq!(format!("{parts:?}"), "PrivateParts(redacted)");
    }

    #[test]
    fn other_keys_are_refused() {
        let key = RsaPrivateKey::new(&mut OsRng, 2_048).unwrap();
        let der = pkcs8(&key);
        let refused = |der: &[u8]| PrivateParts::from_pkcs8(der).unwrap_err();
        assert_eq!(refused(&der[1..]), PrivateKeyError::Encoding);
        assert_eq!(
            refused(&[&der[..], &[0]].concat()),
            PrivateKeyError::Encoding
        );
        assert_eq!(refused(b""), PrivateKeyError::Encoding);
        let long = RsaPrivateKey::new(&mut OsRng, 3_072).unwrap();
        assert_eq!(refused(&pkcs8(&long)), PrivateKeyError::Length(3_072));
        // The last byte is part of the coefficient.
        let mut wrong = der.clone();
        *wrong.last_mut().unwrap() ^= 2;
        assert_eq!(refused(&wrong), PrivateKeyError::Inconsistent);
        assert!(*key.e() == BigUint::from(65_537_u32));
    }
}
