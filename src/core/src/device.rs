//! Trusted devices of members, and requests for access of new devices: states, legal transitions, limits, and the signatures of
//! devices. `docs/devices.md` has the same tables of states, and a test compares the page with this module.
//!
//! A *device* is an app of a member that opens the member's user key by itself. The keys belong to the app: the broker stores
//! three encrypted values that it cannot open. A *request for access* is the wish of a new device to receive the user key.
//!
//! Mitigation: M27 of `THREAT_MODEL.md`.

use std::fmt;

use crate::call::Timestamp;

mod signature;
#[cfg(test)]
mod tests;

pub use signature::{
    DeviceSignature, SIGNATURE_BYTES, SignatureRefused, Statement, StatementKind, VerificationKey,
};

/// Longest name of a device, in bytes.
pub const DEVICE_NAME_BYTES_MAX: usize = 128;
/// Longest type of a device, in bytes.
pub const DEVICE_TYPE_BYTES_MAX: usize = 64;
/// Longest user key that is encrypted to a public key of a device or of a request, in bytes.
pub const SEALED_KEY_BYTES_MAX: usize = 1_024;
/// Longest public key of a device that is encrypted with the user key, in bytes.
pub const SEALED_PUBLIC_KEY_BYTES_MAX: usize = 2_048;
/// Longest private key of a device that is encrypted with the device key, in bytes.
pub const SEALED_PRIVATE_KEY_BYTES_MAX: usize = 8_192;
/// Longest public key of a request for access, in bytes: a `SubjectPublicKeyInfo` of RSA-4096 has 550.
pub const PUBLIC_KEY_BYTES_MAX: usize = 1_024;
/// Shortest access code, in bytes: 128 bits.
pub const ACCESS_CODE_BYTES_MIN: usize = 16;
/// Longest access code, in bytes.
pub const ACCESS_CODE_BYTES_MAX: usize = 64;
/// Number of wrong access codes after which a request is over.
pub const ACCESS_CODE_TRIES_MAX: u32 = 5;
/// Number of approvals with wrong words of the fingerprint phrase after which a request is over.
pub const PHRASE_TRIES_MAX: u32 = 5;
/// Longest time in microseconds in which the answer to a request can be fetched again after it was fetched: five minutes.
pub const ANSWER_KEPT_US: i64 = 5 * 60 * 1_000_000;
/// Largest difference in microseconds between the time of a signature and the time of the broker: five minutes.
pub const SIGNATURE_SKEW_US: i64 = 5 * 60 * 1_000_000;

/// Defines the states with their names and their successors.
macro_rules! states {
    ($(#[$doc:meta])* $name:ident { $($(#[$state_doc:meta])* $state:ident = $text:literal => [$($next:ident),*];)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name {
            $($(#[$state_doc])* $state,)+
        }

        impl $name {
            /// All states, in the order of the documentation.
            pub const ALL: [Self; [$(Self::$state),+].len()] = [$(Self::$state),+];

            /// The name of the state in the database and in output.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$state => $text,)+
                }
            }

            /// Parses the stored text.
            pub fn parse(text: &str) -> Option<Self> {
                Self::ALL.into_iter().find(|state| state.as_str() == text)
            }

            /// The states to which this state may change.
            pub const fn next(self) -> &'static [Self] {
                match self {
                    $(Self::$state => &[$(Self::$next),*],)+
                }
            }

            /// Whether this state may change to the state `to`.
            pub fn may_become(self, to: Self) -> bool {
                self.next().contains(&to)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

states! {
    /// The state of a device.
    DeviceState {
        /// The device can fetch its encrypted keys, and its signatures count.
        Trusted = "trusted" => [Untrusted, Lost];
        /// The trust was ended. The broker has removed the encrypted keys.
        Untrusted = "untrusted" => [Trusted];
        /// The trust was ended because the device was lost. The broker has removed the encrypted keys.
        Lost = "lost" => [Trusted];
    }
}

states! {
    /// The state of a request for access.
    AccessState {
        /// The request is not decided yet.
        Pending = "pending" => [Approved, Denied, Expired];
        /// The request was approved. The requesting device can fetch the answer.
        Approved = "approved" => [Consumed, Revoked, Expired];
        /// The request was denied, its device sent too many wrong access codes, or approvers sent too many wrong words of its phrase.
        Denied = "denied" => [];
        /// The device confirmed the answer, or five minutes have passed since it fetched the answer.
        Consumed = "consumed" => [Revoked];
        /// The approval was withdrawn. If the answer was consumed before, the trust that followed from it was ended.
        Revoked = "revoked" => [];
        /// The request was not decided, or its answer not fetched, in time. This state is computed from the time.
        Expired = "expired" => [];
    }
}

impl AccessState {
    /// Whether the request can still be decided, or its answer can still be fetched.
    pub const fn is_open(self) -> bool {
        matches!(self, Self::Pending | Self::Approved)
    }

    /// The state at the time `now` of a request with this stored state. An answer that was fetched is consumed after
    /// [`ANSWER_KEPT_US`], also if the request would expire later.
    #[must_use]
    pub fn at(self, expires: Timestamp, fetched: Option<Timestamp>, now: Timestamp) -> Self {
        let is_read =
            fetched.is_some_and(|at| now.micros() >= at.micros().saturating_add(ANSWER_KEPT_US));
        match self {
            Self::Approved if is_read => Self::Consumed,
            Self::Pending | Self::Approved if now >= expires => Self::Expired,
            state => state,
        }
    }
}

/// Who is asked to approve a request for access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AccessApprover {
    /// Another trusted device of the member.
    Device,
    /// An administrator with the role `approver`.
    Administrator,
}

impl AccessApprover {
    /// The name in the database and in output.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Administrator => "administrator",
        }
    }

    /// Parses the stored text.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Device, Self::Administrator]
            .into_iter()
            .find(|approver| approver.as_str() == text)
    }
}
