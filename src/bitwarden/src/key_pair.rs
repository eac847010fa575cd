//! RSA-2048 with OAEP and SHA-1, with which clients encrypt a user key for a trusted device or an
//! organisation. OAEP does not require a collision-resistant hash, and all clients use SHA-1.

use std::fmt;

use aws_lc_rs::rsa::{
    OAEP_SHA1_MGF1SHA1, OaepPrivateDecryptingKey, OaepPublicEncryptingKey, PrivateDecryptingKey,
    PublicEncryptingKey,
};
use zeroize::Zeroizing;

use super::{EncString, Error, enc_string::RSA_BYTES};

/// The private half of a key pair, as a device stores it.
pub struct PrivateKey(OaepPrivateDecryptingKey);

impl PrivateKey {
    /// Reads a PKCS#8 key in DER.
    pub fn from_pkcs8(der: &[u8]) -> Result<Self, Error> {
        let key = PrivateDecryptingKey::from_pkcs8(der).map_err(|_| Error::KeyPair)?;
        if key.key_size_bytes() != RSA_BYTES {
            return Err(Error::KeyPair);
        }
        let key = OaepPrivateDecryptingKey::new(key).map_err(|_| Error::KeyPair)?;
        Ok(Self(key))
    }

    /// Decrypts an encrypted string of type 4.
    pub fn decrypt(&self, encrypted: &EncString) -> Result<Zeroizing<Vec<u8>>, Error> {
        let EncString::RsaOaepSha1 { ciphertext } = encrypted else {
            return Err(Error::KeyKind(encrypted.number()));
        };
        let mut buffer = Zeroizing::new(vec![0; self.0.min_output_size()]);
        let algorithm = &OAEP_SHA1_MGF1SHA1;
        let length = self
            .0
            .decrypt(algorithm, ciphertext, &mut buffer, None)
            .map_err(|_| Error::Decrypt)?
            .len();
        buffer.truncate(length);
        Ok(buffer)
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(redacted)")
    }
}

/// The public half of a key pair.
#[derive(Debug)]
pub struct PublicKey(OaepPublicEncryptingKey);

impl PublicKey {
    /// Reads a `SubjectPublicKeyInfo` in DER.
    pub fn from_spki(der: &[u8]) -> Result<Self, Error> {
        let key = PublicEncryptingKey::from_der(der).map_err(|_| Error::KeyPair)?;
        if key.key_size_bytes() != RSA_BYTES {
            return Err(Error::KeyPair);
        }
        let key = OaepPublicEncryptingKey::new(key).map_err(|_| Error::KeyPair)?;
        Ok(Self(key))
    }

    /// Encrypts at most 214 bytes as type 4.
    pub fn encrypt(&self, plain: &[u8]) -> Result<EncString, Error> {
        let mut ciphertext = vec![0; RSA_BYTES];
        self.0
            .encrypt(&OAEP_SHA1_MGF1SHA1, plain, &mut ciphertext, None)
            .map_err(|_| Error::TooLong)?;
        Ok(EncString::RsaOaepSha1 { ciphertext })
    }
}
