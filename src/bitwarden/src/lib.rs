//! What a Bitwarden client does with its keys, so that a migration can be rehearsed and supported without one: master keys
//! from passwords, the hash that logs in, wrapped user keys, encrypted texts.
//!
//! ```text
//! password, e-mail --KDF--> master key (32 bytes) --HKDF-Expand--> stretched key (64) --EncString 2--> user key (64)
//!                                |                                                                        |
//!                    what the broker keeps of a                                                 items, key pairs,
//!                    user who has no password any more                                          trusted devices
//! ```
//!
//! The broker itself never uses any of this: to it a master key is 32 bytes like any others.
//!
//! Not promised: type 0 is not authenticated, so a changed text of that type may decrypt to something else; it is read for
//! old accounts, and never written. Keys of type 7 (COSE) are carried as bytes, and open nothing here.

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
pub use keys::{MasterKey, SymmetricKey};

/// Length of a master key, and of what a Key Connector keeps, in bytes.
pub const MASTER_KEY_BYTES: usize = 32;

/// Why something of a Bitwarden account cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// An invalid e-mail address.
    #[error("the e-mail address is empty, longer than 256 bytes, or has control characters")]
    Email,
    /// An invalid salt.
    #[error("the salt is empty, longer than 256 bytes, or has control characters")]
    Salt,
    /// An invalid password.
    #[error("a password is 1 to {PASSWORD_BYTES_MAX} bytes of UTF-8")]
    Password,
    /// A parameter that no client accepts, or that is more than is computed here.
    #[error("{name} is {value}; it must be {min} to {max}")]
    Kdf {
        /// Which parameter.
        name: &'static str,
        /// What it is.
        value: u32,
        /// The least that is accepted.
        min: u32,
        /// The most.
        max: u32,
    },
    /// A key of the wrong length.
    #[error("{what} has {found} bytes; it must have {expected}")]
    Length {
        /// Which key.
        what: &'static str,
        /// Its length.
        found: usize,
        /// What it must be.
        expected: &'static str,
    },
    /// A text that is not an `EncString`.
    #[error("not an encrypted text of Bitwarden: {0}")]
    Form(&'static str),
    /// A type of `EncString` that is not read here.
    #[error("encrypted text of type {0}: only the types 0, 2 and 4 are read here")]
    Type(u8),
    /// The type does not belong to this kind of key.
    #[error("an encrypted text of type {0} is not for this kind of key")]
    KeyKind(u8),
    /// The key pair does not parse, or is not RSA-2048.
    #[error("not an RSA-2048 key in DER (PKCS#8 or SubjectPublicKeyInfo)")]
    KeyPair,
    /// MAC, padding or OAEP failed. The error does not tell which, so that it is no oracle.
    #[error("the key does not fit, or the encrypted text was changed")]
    Decrypt,
    /// The plain text does not fit into what it is to be encrypted as.
    #[error("too long to be encrypted")]
    TooLong,
    /// No memory, or no random bytes.
    #[error("the system gives no {0}")]
    System(&'static str),
}
