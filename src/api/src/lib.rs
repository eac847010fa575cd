//! The APIs of the broker: gRPC ([`rpc`]), REST for Bitwarden clients ([`rest`]), and the page for approvers ([`console`]). All
//! of them call the `broker` crate.

pub mod console;
#[doc(hidden)]
mod discard;
pub mod fuzzing;
mod request;
pub mod rest;
mod retry_after;
pub mod rpc;
