//! Sealed release: the broker's token encrypts a user key to the public key of a recipient, and only the recipient opens it.

use std::fmt;

use aws_lc_rs::{
    digest,
    encoding::AsDer as _,
    rsa::{
        KeySize, OAEP_SHA1_MGF1SHA1, OAEP_SHA256_MGF1SHA256, OaepPrivateDecryptingKey,
        PrivateDecryptingKey,
    },
};
use keybroker_core::{
    envelope::Algorithm,
    key::{Fingerprint, Revision, Sealing},
    secret::KeyMaterial,
};
use keybroker_proto as proto;
use zeroize::Zeroizing;

use crate::error::AttemptError;

/// A user key that the broker's token encrypted to a recipient. [`RecipientKeyPair::open`] returns the user key.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SealedKey {
    /// The bytes that only the recipient can open.
    pub ciphertext: Vec<u8>,
    /// RSA-OAEP with SHA-256, or with SHA-1 if the token supports only SHA-1.
    pub algorithm: Algorithm,
    /// The SHA-256 of the recipient's public key.
    pub recipient: Fingerprint,
    /// How the wrapping key is protected against a program that controls a token worker of the broker; `None` for a word
    /// that a later release of the broker has added.
    pub sealing: Option<Sealing>,
    /// The revision that was released.
    pub revision: Revision,
}

impl SealedKey {
    /// Reads an answer to a request with this recipient.
    pub(crate) fn of(
        answer: proto::UnwrapUserKeyResponse,
        public_key: &[u8],
    ) -> Result<Self, AttemptError> {
        let sealed = answer
            .sealed
            .ok_or(AttemptError::Invalid("the answer is not sealed"))?;
        let recipient = fingerprint(public_key);
        if sealed.recipient_fingerprint != recipient.0 {
            return Err(AttemptError::Invalid("the answer is for another recipient"));
        }
        let algorithm = [Algorithm::RsaOaepSha256, Algorithm::RsaOaepSha1]
            .into_iter()
            .find(|algorithm| algorithm.as_str() == sealed.algorithm)
            .ok_or(AttemptError::Invalid("algorithm is unknown"))?;
        let sealing = match sealed.sealing() {
            proto::Sealing::Enforced => Some(Sealing::Enforced),
            proto::Sealing::Worker => Some(Sealing::Worker),
            proto::Sealing::Unspecified => None,
        };
        Ok(Self {
            ciphertext: sealed.ciphertext,
            algorithm,
            recipient,
            sealing,
            revision: Revision::new(answer.revision)
                .ok_or(AttemptError::Invalid("revision is out of range"))?,
        })
    }
}

/// A sealed key that cannot be opened, or a private key that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecipientError {
    /// The private key is not an RSA key of 2048, 3072 or 4096 bits in PKCS #8.
    #[error("not an RSA private key of 2048, 3072 or 4096 bits in DER-encoded PKCS #8")]
    PrivateKey,
    /// The key pair cannot be made or encoded.
    #[error("the cryptographic library cannot make or encode the key pair")]
    Generation,
    /// The sealed key is for another recipient.
    #[error("the sealed key is for another recipient")]
    OtherRecipient,
    /// The ciphertext was altered, or its content is not a user key.
    #[error("the sealed key cannot be opened")]
    Ciphertext,
}

/// The RSA key pair of a recipient.
///
/// ```no_run
/// # async fn example(client: keybroker_client::Client) -> Result<(), Box<dyn std::error::Error>> {
/// use keybroker_client::{RecipientKeyPair, UserKeyRef};
///
/// let recipient = RecipientKeyPair::generate()?;
/// let key = UserKeyRef::parse("ada@example.org", "vault")?;
/// let sealed = client.unwrap_user_key_for(&key, recipient.public_key()).await?;
/// let user_key = recipient.open(&sealed)?;
/// println!("{} bytes", user_key.expose().len());
/// # Ok(())
/// # }
/// ```
pub struct RecipientKeyPair {
    private: PrivateDecryptingKey,
    public_key: Vec<u8>,
}

impl RecipientKeyPair {
    /// Makes a key pair with a modulus of 3072 bits.
    ///
    /// # Errors
    /// Returns an error if the random generator fails.
    pub fn generate() -> Result<Self, RecipientError> {
        let key = PrivateDecryptingKey::generate(KeySize::Rsa3072);
        Self::of(key.map_err(|_| RecipientError::Generation)?)
    }

    /// Reads the private key: DER-encoded PKCS #8, for example of `openssl genpkey -algorithm RSA`.
    ///
    /// # Errors
    /// Returns an error if the key is not an RSA key of 2048, 3072 or 4096 bits.
    pub fn from_pkcs8(der: &[u8]) -> Result<Self, RecipientError> {
        let key = PrivateDecryptingKey::from_pkcs8(der);
        let key = Self::of(key.map_err(|_| RecipientError::PrivateKey)?)?;
        if matches!(key.private.key_size_bits(), 2_048 | 3_072 | 4_096) {
            Ok(key)
        } else {
            Err(RecipientError::PrivateKey)
        }
    }

    fn of(private: PrivateDecryptingKey) -> Result<Self, RecipientError> {
        let public_key = private.public_key().as_der();
        let public_key = public_key.map_err(|_| RecipientError::Generation)?;
        Ok(Self {
            public_key: public_key.as_ref().to_vec(),
            private,
        })
    }

    /// The private key as DER-encoded PKCS #8. The memory is overwritten when the value is dropped.
    ///
    /// # Errors
    /// Returns an error if the key cannot be encoded.
    pub fn to_pkcs8(&self) -> Result<Zeroizing<Vec<u8>>, RecipientError> {
        let der = self.private.as_der();
        let der = der.map_err(|_| RecipientError::Generation)?;
        Ok(Zeroizing::new(der.as_ref().to_vec()))
    }

    /// The public key as DER SubjectPublicKeyInfo.
    pub fn public_key(&self) -> &[u8] {
        &self.public_key
    }

    /// The SHA-256 of the public key, as policies name it.
    pub fn fingerprint(&self) -> Fingerprint {
        fingerprint(&self.public_key)
    }

    /// Opens a sealed key.
    ///
    /// # Errors
    /// Returns an error if the sealed key is for another recipient, or was altered.
    pub fn open(&self, sealed: &SealedKey) -> Result<KeyMaterial, RecipientError> {
        if sealed.recipient != self.fingerprint() {
            return Err(RecipientError::OtherRecipient);
        }
        let parameters = match sealed.algorithm {
            Algorithm::RsaOaepSha256 => &OAEP_SHA256_MGF1SHA256,
            Algorithm::RsaOaepSha1 => &OAEP_SHA1_MGF1SHA1,
        };
        let refused = RecipientError::Ciphertext;
        let private = OaepPrivateDecryptingKey::new(self.private.clone()).map_err(|_| refused)?;
        let mut plaintext = Zeroizing::new(vec![0; private.min_output_size()]);
        let opened = private
            .decrypt(parameters, &sealed.ciphertext, &mut plaintext, None)
            .map_err(|_| refused)?;
        KeyMaterial::new(opened.to_vec()).map_err(|_| refused)
    }
}

impl fmt::Debug for RecipientKeyPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecipientKeyPair")
            .field("fingerprint", &self.fingerprint())
            .finish_non_exhaustive()
    }
}

/// Returns the SHA-256 of a DER SubjectPublicKeyInfo.
fn fingerprint(public_key: &[u8]) -> Fingerprint {
    let digest = digest::digest(&digest::SHA256, public_key);
    Fingerprint(digest.as_ref().try_into().expect("SHA-256 gives 32 bytes"))
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::rsa::{OaepPublicEncryptingKey, PublicEncryptingKey};

    use super::*;

    fn answer(pair: &RecipientKeyPair, plaintext: &[u8]) -> proto::UnwrapUserKeyResponse {
        let public = PublicEncryptingKey::from_der(pair.public_key()).unwrap();
        let public = OaepPublicEncryptingKey::new(public).unwrap();
        let mut ciphertext = vec![0; public.ciphertext_size()];
        public
            .encrypt(&OAEP_SHA256_MGF1SHA256, plaintext, &mut ciphertext, None)
            .unwrap();
        proto::UnwrapUserKeyResponse {
            key_material: Vec::new(),
            revision: 3,
            sealed: Some(proto::SealedUserKey {
                ciphertext,
                algorithm: "RSA-OAEP-SHA-256".to_owned(),
                recipient_fingerprint: pair.fingerprint().0.to_vec(),
                sealing: proto::Sealing::Worker.into(),
            }),
        }
    }

    #[test]
    fn only_the_recipient_opens_a_sealed_key() {
        let pair = RecipientKeyPair::generate().unwrap();
        let again = RecipientKeyPair::from_pkcs8(&pair.to_pkcs8().unwrap()).unwrap();
        let sealed = SealedKey::of(answer(&pair, b"user key"), pair.public_key()).unwrap();
        assert_eq!(again.open(&sealed).unwrap().expose(), b"user key");
        assert_eq!(
            (sealed.revision.get(), sealed.sealing),
            (3, Some(Sealing::Worker))
        );

        let other = RecipientKeyPair::generate().unwrap();
        assert_eq!(
            other.open(&sealed).unwrap_err(),
            RecipientError::OtherRecipient
        );
        let mut altered = sealed.clone();
        altered.ciphertext[9] ^= 1;
        assert_eq!(pair.open(&altered).unwrap_err(), RecipientError::Ciphertext);
        altered = SealedKey {
            algorithm: Algorithm::RsaOaepSha1,
            ..sealed
        };
        assert_eq!(pair.open(&altered).unwrap_err(), RecipientError::Ciphertext);
        assert_eq!(
            RecipientKeyPair::from_pkcs8(b"no key").unwrap_err(),
            RecipientError::PrivateKey
        );
        assert!(!format!("{pair:?}").contains("private"));
    }

    #[test]
    fn an_answer_that_is_not_for_this_recipient_is_invalid() {
        let pair = RecipientKeyPair::generate().unwrap();
        let good = answer(&pair, b"user key");
        let plain = proto::UnwrapUserKeyResponse {
            sealed: None,
            ..good.clone()
        };
        assert!(SealedKey::of(plain, pair.public_key()).is_err());
        assert!(SealedKey::of(good.clone(), b"another key").is_err());
        let mut unknown = good;
        if let Some(sealed) = &mut unknown.sealed {
            sealed.algorithm = "none".to_owned();
        }
        assert!(SealedKey::of(unknown, pair.public_key()).is_err());
    }
}
