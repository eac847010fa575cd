//! Identifiers of a Bitwarden organisation, of its members and of their requests.

use std::fmt;

use aws_lc_rs::digest;

use crate::key::{ID_BYTES, WrappingKeyId};

/// Prefix for deriving the `CKA_ID` of an organisation's key.
const KEY_ID_DOMAIN: &[u8] = b"keybroker/bitwarden-organization-key-id/v1";
/// The lengths of the groups of hexadecimal digits (RFC 9562, section 4).
const GROUPS: [usize; 5] = [8, 4, 4, 4, 12];

/// A UUID, which Bitwarden calls GUID.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Guid([u8; ID_BYTES]);

impl Guid {
    /// Parses the text form with hyphens, in upper or lower case. No other form is accepted.
    pub fn parse(text: &str) -> Option<Self> {
        let groups = text.split('-').map(str::len);
        if !groups.eq(GROUPS) {
            return None;
        }
        let mut bytes = [0; ID_BYTES];
        hex::decode_to_slice(text.replace('-', ""), &mut bytes).ok()?;
        Some(Self(bytes))
    }

    /// An identifier from its bytes, in the order of the text form.
    pub const fn from_bytes(bytes: [u8; ID_BYTES]) -> Self {
        Self(bytes)
    }

    /// The bytes in the order of the text form.
    pub const fn as_bytes(&self) -> &[u8; ID_BYTES] {
        &self.0
    }

    /// The id of the key of the organisation with this identifier. The `CKA_ID` of its objects on a token is derived from the
    /// identifier, so a token has at most one key of an organisation.
    pub fn key_id(&self) -> WrappingKeyId {
        let mut context = digest::Context::new(&digest::SHA256);
        context.update(KEY_ID_DOMAIN);
        context.update(&self.0);
        let digest = context.finish();
        WrappingKeyId::from_slice(&digest.as_ref()[..ID_BYTES]).expect("an id has 16 bytes")
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = hex::encode(self.0);
        let mut rest = digits.as_str();
        for (number, length) in GROUPS.into_iter().enumerate() {
            let (group, after) = rest.split_at(length);
            if number > 0 {
                f.write_str("-")?;
            }
            f.write_str(group)?;
            rest = after;
        }
        Ok(())
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "a09726a0-9590-49d1-a5f5-afe300b6a515";

    #[test]
    fn only_the_form_with_hyphens_is_accepted() {
        let guid = Guid::parse(TEXT).unwrap();
        assert_eq!(guid.to_string(), TEXT);
        assert_eq!(Guid::parse(&TEXT.to_uppercase()), Some(guid));
        assert_eq!(Guid::from_bytes(*guid.as_bytes()), guid);
        for other in [
            "",
            "a09726a0959049d1a5f5afe300b6a515",
            "{a09726a0-9590-49d1-a5f5-afe300b6a515}",
            "a09726a0-9590-49d1-a5f5-afe300b6a51",
            "a09726a0-9590-49d1-a5f5-afe300b6a51g",
            "a09726a09-590-49d1-a5f5-afe300b6a515",
            " a09726a0-9590-49d1-a5f5-afe300b6a515",
        ] {
            assert_eq!(Guid::parse(other), None, "{other}");
        }
    }

    /// Computed with `sha256sum`. The id must never change, because keys are found by it.
    #[test]
    fn the_id_of_a_key_is_derived_from_the_organisation() {
        let key = Guid::parse(TEXT).unwrap().key_id();
        assert_eq!(key.to_string(), KEY_OF_TEXT);
        assert_ne!(key, Guid::from_bytes([0; 16]).key_id());
    }

    const KEY_OF_TEXT: &str = "128278bc731610d1ab98b255bbde87d1";
}
