//! Encrypted texts on their way in, and where the secrets of these commands come from.

use std::{fs::File, io::Read as _, path::Path};

use crate::cli::exit::{Exit, Failure};
use keybroker_bitwarden as bitwarden;
use keybroker_bitwarden::{ENC_STRING_BYTES_MAX, EncString};

pub(super) use crate::cli::secrets::Source;

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

/// What was typed or named cannot be used.
pub(super) fn unusable(error: bitwarden::Error) -> Failure {
    let hint = match error {
        bitwarden::Error::Decrypt => {
            return Failure::new(Exit::Verification, error.to_string()).hint(
                "another account, password, KDF or KDF parameter? The e-mail address is part of the key, too",
            );
        }
        bitwarden::Error::System(_) => return Failure::new(Exit::Internal, error.to_string()),
        bitwarden::Error::Type(7) => {
            "type 7 belongs to accounts of the new kind (COSE), which this command does not read"
        }
        bitwarden::Error::Form(_) | bitwarden::Error::Type(_) => {
            "such a text is `2.…|…|…`: copy all of it, without quotation marks"
        }
        bitwarden::Error::KeyKind(_) => "a protected key has type 2, or 0 in an old account",
        bitwarden::Error::Kdf { .. } => {
            "no Bitwarden client sets up an account with less, which would make its password easy to guess: do not use it"
        }
        _ => return Failure::new(Exit::Usage, error.to_string()),
    };
    Failure::new(Exit::Usage, error.to_string()).hint(hint)
}
