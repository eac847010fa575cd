//! Encrypted texts on their way in, and where the secrets of these commands come from.

use std::{fs::File, io::Read as _, path::Path};

use crate::cli::exit::{Exit, Failure};
use keybroker_bitwarden::{ENC_STRING_BYTES_MAX, EncString};

pub(super) use crate::cli::secrets::Source;

use super::account::unusable;

/// An encrypted text in a file. It is no secret without its key.
pub(super) fn enc_string(option: &str, path: &Path) -> Result<EncString, Failure> {
    let unreadable =
        |why: String| Failure::new(Exit::Usage, format!("{option} {}: {why}", path.display()));
    let mut text = String::new();
    let limit = u64::try_from(ENC_STRING_BYTES_MAX + 3).unwrap_or(u64::MAX);
    File::open(path)
        .and_then(|file| file.take(limit).read_to_string(&mut text))
        .map_err(|error| unreadable(error.to_string()))?;
    EncString::parse(text.trim_end_matches(['\r', '\n'])).map_err(|error| {
        let failure = unusable(error);
        Failure {
            message: format!("{option} {}: {}", path.display(), failure.message),
            ..failure
        }
    })
}
