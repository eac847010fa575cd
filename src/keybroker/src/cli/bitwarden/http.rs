//! What all HTTPS clients of the `keybroker bitwarden` commands have in common.

use std::{path::Path, time::Duration};

use reqwest::{Client, Response};
use zeroize::Zeroizing;

use crate::{
    cli::exit::{Exit, Failure},
    https,
};
use keybroker_core::{error::root_cause, trusted_file::Purpose};

const AUTHORITIES: Purpose = Purpose::trust("other users could decide which server is trusted");

/// A file with CA certificates, and the name of its option or setting for messages.
#[derive(Clone, Copy, Debug)]
pub(super) struct Authorities<'a> {
    pub(super) setting: &'static str,
    pub(super) file: &'a Path,
}

/// Builds a client.
pub(super) fn client(
    authorities: Option<Authorities<'_>>,
    timeout: Duration,
    https_only: bool,
) -> Result<Client, Failure> {
    let mut builder = https::client(timeout).https_only(https_only);
    if let Some(Authorities { setting, file }) = authorities {
        let roots = https::authorities(file, AUTHORITIES).map_err(|why| {
            Failure::new(Exit::Usage, format!("{setting} {}: {why}", file.display()))
        })?;
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
