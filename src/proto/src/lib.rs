//! The messages and gRPC stubs of the Keybroker API (`keybroker.v1`). The code is generated from `proto/keybroker/v1`
//! and committed to the repository.
//!
//! The `Debug` output of a message that carries key material or another secret is redacted. Most programs use the
//! `keybroker-client` crate instead of the stubs.

// Generated code follows the style of the generator.
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

include!("generated/keybroker.v1.rs");

/// The encoded `google.protobuf.FileDescriptorSet` of the public services, for server reflection and for checks of
/// wire compatibility.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!("generated/keybroker_v1.binpb");

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
    AddClientSecretResponse,
    RotateDevicesRequest,
    CreateAccessRequestRequest,
    FetchAccessAnswerRequest,
    ConfirmAccessAnswerRequest
);
