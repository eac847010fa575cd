//! The key operations of a Bitwarden client: master keys from passwords, the hash for the login,
//! wrapped user keys, encrypted strings and fingerprint phrases. With this crate, an operator can
//! test a migration without a Bitwarden client.
//!
//! ```text
//! password, e-mail --KDF--> master key (32 bytes) --HKDF-Expand--> stretched key (64) --EncString 2--> user key (64)
//!                                |                                                                        |
//!                    what the broker keeps of a                                                 items, key pairs,
//!                    user who has no password any more                                          trusted devices
//! ```
//!
//! The broker itself does not use the operations of this crate. For the broker, a master key is 32 arbitrary bytes.
//!
//! Not protected: an encrypted string of type 0 has no MAC, so a changed text may decrypt to a
//! wrong value. For old accounts, this crate decrypts texts of type 0, but it never creates them.
//! This crate treats a key of type 7 (COSE) as bytes, and cannot decrypt with a key of type 7.

mod account;
mod cipher;
mod enc_string;
mod kdf;
mod key_pair;
mod keys;
#[cfg(test)]
mod tests;

pub use account::{Email, PASSWORD_BYTES_MAX, Password, Salt};
pub use enc_string::{ENC_STRING_BYTES_MAX, EncString};
pub use kdf::Kdf;
pub use key_pair::{PrivateKey, PublicKey};
pub use keybroker_core::fingerprint_phrase::{
    FINGERPRINT_PHRASE_WORDS, FingerprintPhrase, split_phrase,
};
pub use keys::{MasterKey, SymmetricKey};

/// Length in bytes of a master key, and of the key that a Key Connector stores.
pub const MASTER_KEY_BYTES: usize = 32;

/// The reason why an input or a key of a Bitwarden account cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The e-mail address is not valid.
    #[error("the e-mail address is empty, longer than 256 bytes, or has control characters")]
    Email,
    /// The salt is not valid.
    #[error("the salt is empty, longer than 256 bytes, or has control characters")]
    Salt,
    /// The password is not valid.
    #[error("a password must be 1 to {PASSWORD_BYTES_MAX} bytes of UTF-8")]
    Password,
    /// A parameter is below the minimum of all clients, or above the limit of this crate.
    #[error("{name} is {value}; it must be {min} to {max}")]
    Kdf {
        /// The name of the parameter.
        name: &'static str,
        /// The value.
        value: u32,
        /// The smallest accepted value.
        min: u32,
        /// The largest accepted value.
        max: u32,
    },
    /// A key has the wrong length.
    #[error("{what} has {found} bytes; it must have {expected}")]
    Length {
        /// The name of the key.
        what: &'static str,
        /// The length of the key.
        found: usize,
        /// The required length.
        expected: &'static str,
    },
    /// The text is not an `EncString`.
    #[error("not an encrypted string in Bitwarden's format: {0}")]
    Form(&'static str),
    /// This crate does not read this type of `EncString`.
    #[error("encrypted string of type {0}: only the types 0, 2 and 4 are supported")]
    Type(u8),
    /// This kind of key cannot be used with this type of `EncString`.
    #[error("an encrypted string of type {0} cannot be decrypted with this kind of key")]
    KeyKind(u8),
    /// The key pair does not parse, or is not RSA-2048.
    #[error("not an RSA-2048 key in DER (PKCS#8 or SubjectPublicKeyInfo)")]
    KeyPair,
    /// The MAC, the padding or OAEP is wrong. The error does not distinguish these causes, so that
    /// an attacker cannot use the error as an oracle.
    #[error("the key is wrong, or the encrypted string was changed")]
    Decrypt,
    /// The plaintext is too long for the type of encrypted string.
    #[error("the plaintext is too long to be encrypted")]
    TooLong,
    /// The system cannot provide memory or random bytes.
    #[error("the system did not provide {0}")]
    System(&'static str),
}
