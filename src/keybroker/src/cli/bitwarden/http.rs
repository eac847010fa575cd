//! What all HTTPS clients of the `keybroker bitwarden` commands have in common.

use std::{path::Path, time::Duration};

use reqwest::{Certificate, Client, Response, redirect};
use zeroize::Zeroizing;

use crate::cli::exit::{Exit, Failure};
use keybroker_core::{
    error::root_cause,
    pem,
    trusted_file::{self, Purpose},
};

/// Maximum length of a file with CA certificates, in bytes. The CA file of a Linux distribution is
/// about 0.3 MiB long.
const AUTHORITIES_BYTES_MAX: u64 = 4 * 1024 * 1024;
const AUTHORITIES: Purpose = Purpose::trust("other users could decide which server is trusted");

/// A file with CA certificates, and the name of its option or setting for messages.
#[derive(Clone, Copy, Debug)]
pub(super) struct Authorities<'a> {
    pub(super) setting: &'static str,
    pub(super) file: &'a Path,
}

/// Builds a client that follows no redirect and uses no proxy, because only the specified server
/// may receive the credential.
pub(super) fn client(
    authorities: Option<Authorities<'_>>,
    timeout: Duration,
    https_only: bool,
) -> Result<Client, Failure> {
    let mut builder = Client::builder()
        .user_agent(concat!("keybroker/", env!("CARGO_PKG_VERSION")))
        .timeout(timeout)
        .https_only(https_only)
        .redirect(redirect::Policy::none())
        .no_proxy();
    if let Some(Authorities { setting, file }) = authorities {
        let unusable =
            |why: String| Failure::new(Exit::Usage, format!("{setting} {}: {why}", file.display()));
        let text = trusted_file::read(file, AUTHORITIES_BYTES_MAX, AUTHORITIES)
            .map_err(|error| unusable(error.to_string()))?;
        let roots = pem::certificates(&text)
            .map_err(|error| unusable(error.to_string()))?
            .iter()
            .map(|der| Certificate::from_der(der))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| unusable(root_cause(&error)))?;
        builder = builder.tls_certs_only(roots);
    }
    builder
        .build()
        .map_err(|error| Failure::new(Exit::Internal, root_cause(&error)))
}

/// The reason why a body was not read.
pub(super) enum BodyError {
    TooLong,
    Lost(reqwest::Error),
}

/// Reads a body of at most `bytes_max` bytes.
pub(super) async fn body(
    answer: &mut Response,
    bytes_max: usize,
) -> Result<Zeroizing<Vec<u8>>, BodyError> {
    const RESERVED: usize = 16 * 1_024;
    let mut body = Zeroizing::new(Vec::with_capacity(bytes_max.min(RESERVED)));
    while let Some(chunk) = answer.chunk().await.map_err(BodyError::Lost)? {
        if body.len() + chunk.len() > bytes_max {
            return Err(BodyError::TooLong);
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}
