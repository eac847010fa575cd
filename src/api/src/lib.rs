//! The APIs of the broker: gRPC ([`rpc`]), and REST for Bitwarden clients ([`rest`]). Both APIs call the `broker`
//! crate.

#[doc(hidden)]
mod discard;
pub mod fuzzing;
mod request;
pub mod rest;
pub mod rpc;
