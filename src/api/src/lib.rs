//! The APIs: gRPC ([`rpc`]) and REST for Bitwarden clients ([`rest`]). Both end in the broker.

#[doc(hidden)]
pub mod fuzzing;
mod request;
pub mod rest;
pub mod rpc;
