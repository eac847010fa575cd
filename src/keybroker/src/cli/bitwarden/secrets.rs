//! Reads the encrypted strings and the secrets for the `keybroker bitwarden` commands.

use std::{fs::File, io::Read as _, path::Path};

use crate::cli::exit::{Exit, Failure};
use keybroker_bitwarden as bitwarden;
use keybroker_bitwarden::{ENC_STRING_BYTES_MAX, EncString};

pub(super) use crate::cli::secrets::Source;

/// Reads an encrypted string from a file. The text is not secret, so the file's mode is not
/// checked.
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

/// Returns the failure for an input that cannot be used.
pub(super) fn unusable(error: bitwarden::Error) -> Failure {
    let hint = match error {
        bitwarden::Error::Decrypt => {
            return Failure::new(Exit::Verification, error.to_string()).hint(
                "check the account, the password, the KDF and its parameters; the master key also depends on the e-mail address",
            );
        }
        bitwarden::Error::System(_) => return Failure::new(Exit::Internal, error.to_string()),
        bitwarden::Error::Type(7) => {
            "type 7 (COSE) is used by newer accounts, which this command does not support"
        }
        bitwarden::Error::Form(_) | bitwarden::Error::Type(_) => {
            "an encrypted string has the form `2.…|…|…`: copy the complete text, without quotation marks"
        }
        bitwarden::Error::KeyKind(_) => {
            "a protected user key has type 2, or type 0 in an old account"
        }
        bitwarden::Error::Kdf { .. } => {
            "no Bitwarden client creates an account with weaker parameters: weaker parameters would make the password \
             easy to guess"
        }
        _ => return Failure::new(Exit::Usage, error.to_string()),
    };
    Failure::new(Exit::Usage, error.to_string()).hint(hint)
}
