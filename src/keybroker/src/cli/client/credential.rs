//! Credentials that a call brings itself, in the place of the certificate of its connection.

use std::path::PathBuf;

use base64ct::{Base64, Encoding as _};
use clap::Args;
use tonic::metadata::{Ascii, MetadataValue};
use zeroize::Zeroizing;

use crate::cli::{
    exit::{Exit, Failure},
    secrets::Source,
};
use keybroker_core::key::ClientId;

/// Credentials that replace the client's certificate.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct Credential {
    /// Id of the API client to call as; requires --client-secret-file
    #[arg(long, global = true, value_name = "ID")]
    client_id: Option<String>,
    /// File with the secret of the API client; other users must not be able to read it
    #[arg(long, global = true, value_name = "FILE")]
    client_secret_file: Option<PathBuf>,
    /// File with an access token, to call as its holder; other users must not be able to read it
    #[arg(long, global = true, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

impl Credential {
    /// The `authorization` header, when a credential is named. Libraries copy it on its way to the broker, and those copies
    /// are not overwritten.
    pub(super) fn authorization(&self) -> Result<Option<MetadataValue<Ascii>>, Failure> {
        let text = match (&self.client_id, &self.client_secret_file, &self.token_file) {
            (None, None, None) => return Ok(None),
            (Some(id), Some(file), None) => basic(id, &line("--client-secret-file", file)?)?,
            (None, None, Some(file)) => {
                Zeroizing::new(format!("Bearer {}", *line("--token-file", file)?))
            }
            (_, _, Some(_)) => {
                let what = "both an access token and an API client were given; pass only one";
                return Err(Failure::new(Exit::Usage, what));
            }
            _ => {
                let what = "--client-id and --client-secret-file belong together; pass both";
                return Err(Failure::new(Exit::Usage, what));
            }
        };
        let mut value = MetadataValue::try_from(text.as_str()).map_err(|_| {
            let what = "--token-file has characters that no token has";
            Failure::new(Exit::Usage, what)
        })?;
        // Not for logs, nor for the compression of headers.
        value.set_sensitive(true);
        Ok(Some(value))
    }
}

/// RFC 7617.
fn basic(id: &str, secret: &str) -> Result<Zeroizing<String>, Failure> {
    let id = ClientId::from_hex(id).ok_or_else(|| {
        let what = format!("--client-id {id:?} is not 32 hexadecimal digits");
        Failure::new(Exit::Usage, what).hint("`keybroker client-credential list` shows the ids")
    })?;
    let pair = Zeroizing::new(format!("{id}:{secret}"));
    let encoded = Zeroizing::new(Base64::encode_string(pair.as_bytes()));
    Ok(Zeroizing::new(format!("Basic {}", *encoded)))
}

fn line(what: &'static str, file: &std::path::Path) -> Result<Zeroizing<String>, Failure> {
    let source = Source {
        what,
        file: Some(file),
        descriptor: None,
    };
    let line = source.line()?;
    if line.is_empty() {
        let what = format!("{what} {} is empty", file.display());
        return Err(Failure::new(Exit::Usage, what));
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

    use super::*;

    const ID: &str = "000102030405060708090a0b0c0d0e0f";

    fn written(folder: &Path, text: &str, mode: u32) -> PathBuf {
        let path = folder.join("secret");
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    fn client(id: &str, file: PathBuf) -> Credential {
        Credential {
            client_id: Some(id.to_owned()),
            client_secret_file: Some(file),
            token_file: None,
        }
    }

    fn bearer(file: PathBuf) -> Credential {
        Credential {
            token_file: Some(file),
            ..Credential::default()
        }
    }

    #[test]
    fn an_id_and_a_secret_are_basic_and_a_token_is_bearer() {
        let folder = tempfile::tempdir().unwrap();
        let file = written(folder.path(), "kbs_secret\n", 0o600);
        let value = client(ID, file).authorization().unwrap().unwrap();
        assert!(value.is_sensitive());
        let encoded = value.to_str().unwrap().strip_prefix("Basic ").unwrap();
        let pair = Base64::decode_vec(encoded).unwrap();
        assert_eq!(pair, format!("{ID}:kbs_secret").into_bytes());
        let file = written(folder.path(), "aaa.bbb.ccc\r\n", 0o600);
        let value = bearer(file).authorization().unwrap().unwrap();
        assert!(value.is_sensitive());
        assert_eq!(value.to_str().unwrap(), "Bearer aaa.bbb.ccc");
        assert!(Credential::default().authorization().unwrap().is_none());
    }

    #[test]
    fn what_is_no_credential_or_open_to_others_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let refused = |credential: &Credential, word: &str| {
            let failure = credential.authorization().unwrap_err();
            assert_eq!(failure.exit, Exit::Usage);
            assert!(failure.message.contains(word), "{failure:?}");
            assert!(!failure.message.contains("kbs_secret"), "{failure:?}");
        };
        let file = written(folder.path(), "kbs_secret", 0o644);
        refused(&client(ID, file.clone()), "others can read");
        refused(&bearer(file), "others can read");
        let file = written(folder.path(), "kbs_secret", 0o600);
        refused(&client("backup", file), "32 hexadecimal digits");
        for (text, word) in [
            ("\n", "is empty"),
            ("kbs_secret\nkbs_secret", "more than one line"),
        ] {
            refused(&bearer(written(folder.path(), text, 0o600)), word);
        }
        let file = written(folder.path(), "kbs_secret\u{1}", 0o600);
        refused(&bearer(file), "no token has");
        refused(&bearer(folder.path().join("absent")), "cannot read");
    }
}
