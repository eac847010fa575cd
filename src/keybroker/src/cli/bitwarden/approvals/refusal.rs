//! Why a request is not approved.

use super::{key::KeyError, pins::KeyState};

/// The reason why a request cannot be approved.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error("the request has expired")]
    Expired,
    #[error("the user is no longer a member of the organisation")]
    NoMember,
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("the server does not return the member's key: {0}")]
    Server(String),
    #[error(
        "too many new keys: this process has pinned the keys of many other members within an hour, and does not pin this key yet"
    )]
    NewKeys,
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
