//! The REST door as Bitwarden clients meet it: the real broker, an identity service of its own, HTTP/1.1 over TLS and without.

mod browsers;
mod commands;
mod contract;
pub(crate) mod door;
mod refused;
mod troubles;
