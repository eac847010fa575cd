//! The REST API as Bitwarden clients use it: the real broker with an identity service, over HTTP/1.1 with and without TLS.

mod browsers;
mod commands;
mod contract;
mod guide;
mod outages;
mod refused;
pub(crate) mod site;
