//! The messages between front and worker, generated from `proto/keybroker/worker/v1`.

// The generated code does not follow the style of this project.
#![allow(
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    unused_qualifications,
    clippy::pedantic,
    clippy::as_conversions,
    clippy::wildcard_enum_match_arm
)]

use std::fmt;

use keybroker_core::key::Sealing as KeySealing;

include!(concat!(env!("OUT_DIR"), "/keybroker.worker.v1.rs"));

impl Sealing {
    /// Returns the value on the wire; `None` for a key that is not a sealed wrapping key.
    pub const fn of(sealing: Option<KeySealing>) -> Self {
        match sealing {
            None => Self::Unspecified,
            Some(KeySealing::Enforced) => Self::Enforced,
            Some(KeySealing::Worker) => Self::Worker,
        }
    }

    /// Returns the protection of a sealed wrapping key; `None` for another key.
    pub const fn to_key(self) -> Option<KeySealing> {
        match self {
            Self::Unspecified => None,
            Self::Enforced => Some(KeySealing::Enforced),
            Self::Worker => Some(KeySealing::Worker),
        }
    }
}

impl fmt::Debug for Mac {
    /// The debug output omits the message, because the message for a request id contains key
    /// material.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mac").finish_non_exhaustive()
    }
}

impl fmt::Debug for VerifyMac {
    /// The debug output omits the message, because the message for a request id contains key
    /// material.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VerifyMac").finish_non_exhaustive()
    }
}

impl fmt::Debug for Reply {
    /// The debug output omits the outcome, because the outcome may be key material.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reply")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for reply::Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready(ready) => ready.fmt(f),
            Self::Output(_) => f.write_str("Output(redacted)"),
            Self::Failure(failure) => failure.fmt(f),
            Self::Calling(function) => f.debug_tuple("Calling").field(function).finish(),
        }
    }
}

impl fmt::Debug for ImportOrganizationKey {
    /// The debug output omits the private key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ImportOrganizationKey")
            .field("key_id", &self.key_id)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for PinSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PinSource")
            .field("source", &self.source)
            .finish()
    }
}

impl fmt::Debug for pin_source::Source {
    /// The debug output omits the PIN.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Text(_) => f.write_str("Text(redacted)"),
        }
    }
}
