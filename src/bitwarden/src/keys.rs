//! Master keys, and the symmetric keys that they wrap.

use std::{fmt, num::NonZeroU32};

use aws_lc_rs::{
    hkdf::{HKDF_SHA256, KeyType, Prk},
    pbkdf2,
};
use base64ct::{Base64, Encoding as _};
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

use super::{EncString, Error, MASTER_KEY_BYTES, Password, cipher};

/// Length of a symmetric key: 32 bytes for AES-256 and 32 bytes for HMAC-SHA256.
const SYMMETRIC_KEY_BYTES: usize = 64;
const HALF: usize = SYMMETRIC_KEY_BYTES / 2;
/// Number of PBKDF2 iterations for the hash that a client sends to log in.
const AUTHENTICATION_ITERATIONS: u32 = 1;
/// Number of PBKDF2 iterations for the hash with which a client checks the password offline.
const LOCAL_ITERATIONS: u32 = 2;

/// The key that wraps a user key. A master key is derived from a password, or is random for a user who never had a
/// password. A Key Connector stores the master key and returns it to the user.
pub struct MasterKey(Zeroizing<Vec<u8>>);

impl MasterKey {
    /// Creates a master key from exactly 32 bytes.
    pub fn from_bytes(bytes: Zeroizing<Vec<u8>>) -> Result<Self, Error> {
        if bytes.len() == MASTER_KEY_BYTES {
            return Ok(Self(bytes));
        }
        Err(Error::Length {
            what: "the master key",
            found: bytes.len(),
            expected: "32",
        })
    }

    /// The 32 bytes.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }

    /// Whether two keys are equal. Compares in constant time.
    pub fn is(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }

    /// The hash that a client sends to log in, in base64. If no second factor is required, this
    /// hash is sufficient to log in.
    pub fn authentication_hash(&self, password: &Password) -> Zeroizing<String> {
        self.hash(password, AUTHENTICATION_ITERATIONS)
    }

    /// The hash with which a client checks the password offline, in base64.
    pub fn local_hash(&self, password: &Password) -> Zeroizing<String> {
        self.hash(password, LOCAL_ITERATIONS)
    }

    fn hash(&self, password: &Password, iterations: u32) -> Zeroizing<String> {
        let mut hash = Zeroizing::new([0; MASTER_KEY_BYTES]);
        pbkdf2_sha256(iterations, password.expose(), &self.0, hash.as_mut());
        Zeroizing::new(Base64::encode_string(hash.as_ref()))
    }

    /// Derives 64 bytes by HKDF-Expand without the Extract step, because the master key is already uniform (RFC 5869
    /// section 3.3).
    pub fn stretch(&self) -> Result<SymmetricKey, Error> {
        let prk = Prk::new_less_safe(HKDF_SHA256, &self.0);
        let mut stretched = Zeroizing::new(vec![0; SYMMETRIC_KEY_BYTES]);
        let (encryption, mac) = stretched.split_at_mut(HALF);
        expand(&prk, b"enc", encryption)?;
        expand(&prk, b"mac", mac)?;
        SymmetricKey::from_bytes(stretched)
    }

    /// Decrypts a wrapped user key. Returns bytes, because [`SymmetricKey`] cannot contain the
    /// longer user key of a new account. In an old account, the user key has type 0 and is
    /// encrypted directly with the master key. An encrypted text of type 0 has no MAC, so only the
    /// length of the result shows whether the master key was correct.
    pub fn unprotect(&self, protected: &EncString) -> Result<Zeroizing<Vec<u8>>, Error> {
        match protected {
            EncString::Aes256Cbc { .. } => {
                let plain = SymmetricKey::from_bytes(self.0.clone())?.decrypt(protected)?;
                match plain.len() {
                    SYMMETRIC_KEY_BYTES | HALF => Ok(plain),
                    _ => Err(Error::Decrypt),
                }
            }
            _ => self.stretch()?.decrypt(protected),
        }
    }

    /// Wraps a user key as type 2.
    pub fn protect(&self, user_key: &[u8]) -> Result<EncString, Error> {
        self.stretch()?.encrypt(user_key)
    }
}

impl fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MasterKey(redacted)")
    }
}

struct OutputLength(usize);

impl KeyType for OutputLength {
    fn len(&self) -> usize {
        self.0
    }
}

pub(super) fn expand(prk: &Prk, info: &[u8], out: &mut [u8]) -> Result<(), Error> {
    let info = [info];
    prk.expand(&info, OutputLength(out.len()))
        .and_then(|okm| okm.fill(out))
        .map_err(|_| Error::TooLong)
}

/// Computes PBKDF2-HMAC-SHA256 (RFC 8018) and fills `out`.
pub(super) fn pbkdf2_sha256(iterations: u32, salt: &[u8], secret: &[u8], out: &mut [u8]) {
    let iterations = NonZeroU32::new(iterations).expect("callers name more than none");
    pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, iterations, salt, secret, out);
}

/// The key of a user, organisation or device: 64 bytes for AES-256-CBC and HMAC-SHA256, or 32 bytes
/// in an account that was created before MACs were introduced.
pub struct SymmetricKey(Zeroizing<Vec<u8>>);

impl SymmetricKey {
    /// Creates a key from 64 or 32 bytes.
    pub fn from_bytes(bytes: Zeroizing<Vec<u8>>) -> Result<Self, Error> {
        match bytes.len() {
            SYMMETRIC_KEY_BYTES | HALF => Ok(Self(bytes)),
            found => Err(Error::Length {
                what: "the symmetric key",
                found,
                expected: "64 bytes, or 32 bytes in an old account; longer keys (COSE) are not supported",
            }),
        }
    }

    /// The bytes.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }

    /// Decrypts an encrypted string whose type matches the length of this key. If the encrypted
    /// text has a MAC, the MAC is checked before the decryption.
    pub fn decrypt(&self, encrypted: &EncString) -> Result<Zeroizing<Vec<u8>>, Error> {
        match (encrypted, self.halves()) {
            (EncString::Aes256Cbc { iv, ciphertext }, None) => {
                cipher::decrypt(&self.0, iv, ciphertext)
            }
            (
                EncString::Aes256CbcHmac {
                    iv,
                    ciphertext,
                    mac,
                },
                Some((encryption, authentication)),
            ) => {
                cipher::verify(authentication, iv, ciphertext, mac)?;
                cipher::decrypt(encryption, iv, ciphertext)
            }
            _ => Err(Error::KeyKind(encrypted.number())),
        }
    }

    /// Encrypts data as type 2, which needs a key of 64 bytes.
    pub fn encrypt(&self, plain: &[u8]) -> Result<EncString, Error> {
        let Some((encryption, authentication)) = self.halves() else {
            return Err(Error::KeyKind(2));
        };
        let (iv, ciphertext) = cipher::encrypt(encryption, plain)?;
        let mac = cipher::mac(authentication, &iv, &ciphertext);
        EncString::authenticated(iv, ciphertext, mac)
    }

    /// Returns the key for encryption and the key for the MAC.
    fn halves(&self) -> Option<(&[u8], &[u8])> {
        (self.0.len() == SYMMETRIC_KEY_BYTES).then(|| self.0.split_at(HALF))
    }
}

impl fmt::Debug for SymmetricKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SymmetricKey(redacted)")
    }
}
