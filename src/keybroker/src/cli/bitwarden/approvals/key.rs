//! The key of a member as the server keeps it for the organisation: the user key, wrapped under the organisation's public key.

use aws_lc_rs::digest;
use serde::Deserialize;

use keybroker_bitwarden::EncString;

/// The reason why the wrapped key that the server keeps for a member cannot be used.
#[derive(Clone, Copy, Debug, thiserror::Error)]
pub(super) enum KeyError {
    #[error(
        "the member has not enrolled in account recovery, so the organisation does not have the member's key"
    )]
    NotEnrolled,
    #[error("the member's key is too long")]
    TooLong,
    #[error("the member's key has type {0}; type 4 is required")]
    Type(u8),
    #[error("the member's key: {0}")]
    Encoding(#[from] keybroker_bitwarden::Error),
}

/// Longest wrapped key as text, in bytes. A key of type 4 has 346 bytes.
const TEXT_BYTES_MAX: usize = 1_024;

/// The answer of the server. Other fields are not used: the organisation's private key stays on the token.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Details {
    #[serde(default)]
    reset_password_key: Option<String>,
}

/// A member's wrapped key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct WrappedKey {
    pub(super) ciphertext: Vec<u8>,
    /// SHA-256 of the ciphertext.
    pub(super) digest: [u8; 32],
}

impl Details {
    pub(super) fn wrapped_key(&self) -> Result<WrappedKey, KeyError> {
        let text = self
            .reset_password_key
            .as_deref()
            .filter(|text| !text.is_empty());
        let text = text.ok_or(KeyError::NotEnrolled)?;
        if text.len() > TEXT_BYTES_MAX {
            return Err(KeyError::TooLong);
        }
        match EncString::parse(text)? {
            EncString::RsaOaepSha1 { ciphertext } => Ok(WrappedKey::of(ciphertext)),
            other => Err(KeyError::Type(other.number())),
        }
    }
}

impl WrappedKey {
    fn of(ciphertext: Vec<u8>) -> Self {
        Self {
            digest: sha256(&ciphertext),
            ciphertext,
        }
    }
}

/// SHA-256 of what a pin binds together.
pub(super) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = digest::digest(&digest::SHA256, bytes);
    digest.as_ref().try_into().expect("SHA-256 gives 32 bytes")
}

#[cfg(test)]
mod tests {
    use base64ct::{Base64, Encoding as _};

    use super::*;

    fn wrapped(key: Option<&str>) -> Result<WrappedKey, KeyError> {
        let reset_password_key = key.map(str::to_owned);
        Details { reset_password_key }.wrapped_key()
    }

    #[test]
    fn only_type_4_is_accepted() {
        let ciphertext = vec![7; 256];
        let text = format!("4.{}", Base64::encode_string(&ciphertext));
        let key = wrapped(Some(&text)).unwrap();
        assert_eq!(key.ciphertext, ciphertext);
        for (text, word) in [
            (None, "not enrolled"),
            (Some(""), "not enrolled"),
            (Some("4.AAAA"), "256 bytes"),
            (
                Some(
                    "2.AAAAAAAAAAAAAAAAAAAAAA==|AAAAAAAAAAAAAAAAAAAAAA==|AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
                ),
                "type 2",
            ),
            (Some("3.AAAA"), "type 3"),
            (Some("x"), "type number"),
        ] {
            let refused = wrapped(text).unwrap_err().to_string();
            assert!(refused.contains(word), "{text:?}: {refused}");
        }
        assert!(
            wrapped(Some(&"4".repeat(2_000)))
                .unwrap_err()
                .to_string()
                .contains("too long")
        );
    }
}
