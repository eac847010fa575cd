//! Types generated from `proto/keybroker/v1`: the public wire format. Messages that carry a secret print without it.

// Generated code follows the generator's style, not ours.
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

tonic::include_proto!("keybroker.v1");

/// Descriptors of the public services, for reflection and the wire-compatibility test.
pub const FILE_DESCRIPTOR_SET: &[u8] =
    include_bytes!(concat!(env!("OUT_DIR"), "/keybroker_v1.binpb"));

macro_rules! redacted {
    ($($message:ident),*) => {$(
        impl fmt::Debug for $message {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(concat!(stringify!($message), "(redacted)"))
            }
        }
    )*};
}
redacted!(
    CreateUserKeyRequest,
    ReplaceUserKeyRequest,
    UnwrapUserKeyResponse,
    CreateClientCredentialResponse,
    AddClientSecretResponse
);
