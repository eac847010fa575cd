//! Credentials that are sent with each call. A credential in a call replaces the client certificate
//! of the connection.

use std::path::PathBuf;

use clap::Args;
use keybroker_client::{BearerToken, ClientBuilder, ClientId, ClientSecret};
use zeroize::Zeroizing;

use crate::cli::{
    exit::{Exit, Failure},
    secrets::Source,
};

/// Options for credentials that replace the client certificate.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct Credential {
    /// Id of the API client to authenticate as; requires --client-secret-file
    #[arg(long, global = true, value_name = "ID")]
    client_id: Option<String>,
    /// File with the secret of the API client, which other users must not be able to read
    #[arg(long, global = true, value_name = "FILE")]
    client_secret_file: Option<PathBuf>,
    /// Authenticate with the access token in this file, which other users must not be able to read
    #[arg(long, global = true, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

impl Credential {
    /// Whether the options contain a credential.
    pub(super) fn is_given(&self) -> bool {
        self.client_id.is_some() || self.token_file.is_some()
    }

    /// Adds the credential from the options, if the options contain a credential. Libraries copy
    /// the secret before sending it to the broker, and do not overwrite the copies in memory.
    pub(super) fn set(&self, builder: ClientBuilder) -> Result<ClientBuilder, Failure> {
        match (&self.client_id, &self.client_secret_file, &self.token_file) {
            (None, None, None) => Ok(builder),
            (Some(id), Some(file), None) => {
                let id = ClientId::from_hex(id).ok_or_else(|| {
                    let what = format!("--client-id {id:?} is not 32 hexadecimal digits");
                    Failure::new(Exit::Usage, what)
                        .hint("`keybroker client-credential list` shows the ids of the API clients")
                })?;
                let secret = line("--client-secret-file", file)?;
                Ok(builder.api_client(id, ClientSecret::new(secret.as_str())))
            }
            (None, None, Some(file)) => {
                let token = line("--token-file", file)?;
                Ok(builder.bearer_token(BearerToken::new(token.as_str())))
            }
            (_, _, Some(_)) => {
                let what =
                    "both an access token and an API client were given; pass only one of them";
                Err(Failure::new(Exit::Usage, what))
            }
            _ => {
                let what = "--client-id and --client-secret-file require each other; pass both";
                Err(Failure::new(Exit::Usage, what))
            }
        }
    }
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

    use keybroker_client::Client;

    use super::{super::connect, *};

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
    fn what_is_no_credential_or_open_to_others_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let set = |credential: &Credential| {
            credential.set(Client::builder("https://localhost:1").ca_pem(""))
        };
        let refused = |credential: &Credential, word: &str| {
            let failure = set(credential).and_then(connect::build).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage);
            assert!(failure.message.contains(word), "{failure:?}");
            assert!(!failure.message.contains("kbs_secret"), "{failure:?}");
        };
        let file = written(folder.path(), "kbs_secret", 0o644);
        refused(&client(ID, file.clone()), "other users can read");
        refused(&bearer(file), "other users can read");
        let file = written(folder.path(), "kbs_secret", 0o600);
        refused(&client("backup", file), "32 hexadecimal digits");
        for (text, word) in [
            ("\n", "is empty"),
            ("kbs_secret\nkbs_secret", "more than one line"),
        ] {
            refused(&bearer(written(folder.path(), text, 0o600)), word);
        }
        let file = written(folder.path(), "kbs_secret\u{1}", 0o600);
        refused(&bearer(file), "not allowed in access tokens");
        refused(&bearer(folder.path().join("absent")), "cannot read");
    }
}
