//! Why a request is not approved.

use crate::cli::exit::Failure;

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
    #[error("the server does not return the member's key: {failure}")]
    Server {
        /// HTTP status of the answer, if there was one.
        status: Option<u16>,
        failure: Failure,
    },
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

impl Refusal {
    /// What identifies this reason when it occurs again. Text of the server is not part of it: the text may be different
    /// each time, for example because it contains the id of a trace.
    pub(super) fn kind(&self) -> String {
        match self {
            Self::Server { status, .. } => format!("server, {status:?}"),
            other => other.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::exit::Exit;

    #[test]
    fn the_kind_of_a_server_error_is_its_status() {
        let refusal = |status, text: &str| Refusal::Server {
            status: Some(status),
            failure: Failure::new(Exit::Refused, text),
        };
        assert_eq!(
            refusal(500, "trace 1").kind(),
            refusal(500, "trace 2").kind()
        );
        assert_ne!(
            refusal(500, "trace 1").kind(),
            refusal(502, "trace 1").kind()
        );
        assert_ne!(Refusal::Expired.kind(), Refusal::NoMember.kind());
    }
}
