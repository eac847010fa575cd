//! Parsers of arguments. The parsers check the protocol's limits before the command sends a call.

use keybroker_client::{
    AccessRequestId, ApprovalId, ClientId, DeviceId, InvalidField, KeyName, RequestId, Revision,
    UserId, UserKeyRef, WrappingKeyId, parse_request_id,
};

use clap::Args;

const HEXADECIMAL: &str = "not 32 hexadecimal digits";

/// Options that select a user key.
#[derive(Args, Clone, Debug)]
pub(super) struct Key {
    /// User of the key, 1 to 255 bytes
    #[arg(long, value_parser = user)]
    user: UserId,
    /// Key name, 1 to 64 bytes of [a-z0-9._-]
    #[arg(long, default_value = "default", value_parser = key_name)]
    key_name: KeyName,
}

impl From<Key> for UserKeyRef {
    fn from(Key { user, key_name }: Key) -> Self {
        Self { user, key_name }
    }
}

pub(super) fn user(text: &str) -> Result<UserId, InvalidField> {
    Ok(UserId::parse(text)?)
}

pub(super) fn key_name(text: &str) -> Result<KeyName, InvalidField> {
    Ok(KeyName::parse(text)?)
}

pub(super) fn request_id(text: &str) -> Result<RequestId, InvalidField> {
    parse_request_id(text)
}

pub(super) fn revision(text: &str) -> Result<Revision, &'static str> {
    let number = text.parse().ok().and_then(Revision::new);
    number.ok_or("not a revision; a revision is a whole number of at least 1")
}

pub(super) fn wrapping_key_id(text: &str) -> Result<WrappingKeyId, &'static str> {
    WrappingKeyId::from_hex(text).ok_or(HEXADECIMAL)
}

pub(super) fn approval_id(text: &str) -> Result<ApprovalId, &'static str> {
    ApprovalId::from_hex(text).ok_or(HEXADECIMAL)
}

pub(super) fn access_request_id(text: &str) -> Result<AccessRequestId, &'static str> {
    AccessRequestId::from_hex(text).ok_or(HEXADECIMAL)
}

pub(super) fn device_id(text: &str) -> Result<DeviceId, &'static str> {
    DeviceId::from_hex(text).ok_or(HEXADECIMAL)
}

pub(super) fn client_id(text: &str) -> Result<ClientId, &'static str> {
    ClientId::from_hex(text).ok_or(HEXADECIMAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_outside_the_limits_of_the_protocol_are_refused() {
        assert!(user("").is_err() && user("ada\n").is_err() && user("ada").is_ok());
        let error = key_name("Vault").unwrap_err().to_string();
        assert_eq!(error, "key_name must be 1 to 64 bytes of [a-z0-9._-]");
        for text in ["0", "-1", "1.0", "9223372036854775808", ""] {
            assert!(revision(text).is_err(), "{text}");
        }
        assert_eq!(
            revision("9223372036854775807").unwrap().get(),
            (1 << 63) - 1
        );
        assert!(request_id("00000000-0000-0000-0000-000000000000").is_err());
        assert!(client_id("backup").is_err() && client_id(&"0f".repeat(16)).is_ok());
        assert!(wrapping_key_id(&"0f".repeat(15)).is_err());
    }
}
