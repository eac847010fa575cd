//! Types for secrets: they are copied only if necessary, redacted when printed, and overwritten when dropped.

use std::fmt;

use zeroize::Zeroizing;

use crate::error::Error;

/// Longest key material, in bytes. OAEP with SHA-256 under RSA-2048 can encrypt this number of bytes, so every
/// permitted wrapping key can wrap every user key (RFC 8017 section 7.1.1: 256 - 2 * 32 - 2).
pub const KEY_MATERIAL_BYTES_MAX: usize = 190;

/// A user key in plain text, 1 to 190 bytes.
pub struct KeyMaterial(Zeroizing<Vec<u8>>);

impl KeyMaterial {
    /// Takes ownership of the bytes. The bytes are overwritten when the value is dropped, and also when they
    /// are refused.
    pub fn new(bytes: Vec<u8>) -> Result<Self, Error> {
        let bytes = Zeroizing::new(bytes);
        if (1..=KEY_MATERIAL_BYTES_MAX).contains(&bytes.len()) {
            Ok(Self(bytes))
        } else {
            Err(Error::violation("key_material", "1 to 190 bytes"))
        }
    }

    /// Returns the bytes, for the token or for the answer of a release.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for KeyMaterial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyMaterial(redacted)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_material_keeps_its_limits() {
        assert!(KeyMaterial::new(vec![]).is_err());
        assert!(KeyMaterial::new(vec![1]).is_ok());
        assert!(KeyMaterial::new(vec![1; 190]).is_ok());
        assert!(KeyMaterial::new(vec![1; 191]).is_err());
    }

    #[test]
    fn debug_shows_nothing() {
        let shown = format!("{:?}", KeyMaterial::new(b"hunter2".to_vec()).unwrap());
        assert_eq!(shown, "KeyMaterial(redacted)");
    }
}
