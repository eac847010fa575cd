//! What all HTTPS clients of this program have in common.

use std::{path::Path, time::Duration};

use reqwest::{Certificate, Client, ClientBuilder, redirect};

use keybroker_core::{
    error::root_cause,
    pem,
    trusted_file::{self, Purpose},
};

/// Maximum length of a file with CA certificates, in bytes. The CA file of a Linux distribution is about 0.3 MiB long.
const AUTHORITIES_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Begins a client that follows no redirect and uses no proxy, because only the specified server may receive what the client
/// sends.
pub(crate) fn client(timeout: Duration) -> ClientBuilder {
    Client::builder()
        .user_agent(concat!("keybroker/", env!("CARGO_PKG_VERSION")))
        .timeout(timeout)
        .redirect(redirect::Policy::none())
        .no_proxy()
}

/// Reads a file with CA certificates. The error says what is wrong, and does not name the file.
pub(crate) fn authorities(file: &Path, purpose: Purpose) -> Result<Vec<Certificate>, String> {
    let text = trusted_file::read(file, AUTHORITIES_BYTES_MAX, purpose)
        .map_err(|error| error.to_string())?;
    let ders = pem::certificates(&text).map_err(|error| error.to_string())?;
    ders.iter()
        .map(|der| Certificate::from_der(der))
        .collect::<Result<_, _>>()
        .map_err(|error| root_cause(&error))
}
