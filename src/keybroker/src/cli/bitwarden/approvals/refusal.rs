//! Why a request is not approved.

use keybroker_worker_protocol::{private_key::ORGANIZATION_KEY_BITS, recipient::RecipientError};

use super::pins::KeyState;

/// The reason why a request cannot be approved.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error("the request has expired")]
    Expired,
    #[error("the user is no longer a member of the organisation")]
    NoMember,
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The token does not release the key. The text is that of the token's worker.
    #[error("{0}")]
    Token(String),
    #[error(
        "{state}. If you know the reason, approve the request alone with `--accept-key {digest}`"
    )]
    Pin {
        /// What the pins say about the key.
        state: KeyState,
        /// SHA-256 of the wrapped key, as hexadecimal digits.
        digest: String,
    },
}

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

/// The reason why a request that the server sent is not accepted.
#[derive(Debug, thiserror::Error)]
pub(super) enum RequestError {
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    #[error("`{0}` is not a GUID")]
    Guid(&'static str),
    #[error("`{name}` is not 1 to {bytes_max} bytes without control characters")]
    Text {
        name: &'static str,
        bytes_max: usize,
    },
    #[error("`publicKey` is too long")]
    LongKey,
    #[error("`publicKey` is not canonical base64")]
    Base64,
    #[error("the public key of the device: {0}")]
    Recipient(#[from] RecipientError),
    #[error("the public key of the device does not have {ORGANIZATION_KEY_BITS} bits")]
    Bits,
    #[error("`requestIpAddress` is not an address")]
    Address,
    #[error("`creationDate` is not a time (RFC 3339)")]
    Time,
    #[error("`creationDate` is in the future")]
    Future,
    #[error("`requestDeviceType` is neither a text nor a number")]
    DeviceType,
    #[error("the server lists this request twice")]
    Twice,
}
