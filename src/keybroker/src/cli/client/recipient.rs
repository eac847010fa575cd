//! Reads the key of the recipient of a sealed release.

use std::{fs, path::Path};

use keybroker_client::RecipientKeyPair;
use keybroker_core::{
    pem,
    trusted_file::{self, Purpose},
};
use rustls_pki_types::{PrivateKeyDer, SubjectPublicKeyInfoDer, pem::SectionKind};

use crate::cli::exit::{Exit, Failure};

/// Maximum length of the file, in bytes. The PEM text of a private key of 4096 bits has about 3,300 bytes.
const BYTES_MAX: u64 = 64 * 1024;
const KEY: Purpose = Purpose::secret("private key");

/// The key of a recipient.
#[derive(Debug)]
pub(super) enum Recipient {
    /// The private key is known, so the command opens the answer.
    Private(Box<RecipientKeyPair>),
    /// Only the public key is known, so the command returns the ciphertext.
    Public(SubjectPublicKeyInfoDer<'static>),
}

impl Recipient {
    /// Reads a PEM file with a private key in PKCS #8, or with a public key.
    pub(super) fn read(path: &Path) -> Result<Self, Failure> {
        let length = fs::metadata(path).map_err(|error| unfit(path, &error.to_string()))?;
        if length.len() > BYTES_MAX {
            return Err(unfit(path, "the file is longer than 64 KiB"));
        }
        let bytes = fs::read(path).map_err(|error| unfit(path, &error.to_string()))?;
        let blocks = pem::blocks(&bytes).map_err(|error| unfit(path, &error.to_string()))?;
        let [block] = blocks.as_slice() else {
            return Err(unfit(path, "the file does not contain exactly one key"));
        };
        if block.is_private_key() {
            return Self::private(path);
        }
        match block.kind() {
            Some(SectionKind::PublicKey) => Ok(Self::Public(block.der().to_vec().into())),
            _ => Err(unfit(
                path,
                "the file contains neither a private nor a public key",
            )),
        }
    }

    /// Reads the private key again with the check that no other user can read the file.
    fn private(path: &Path) -> Result<Self, Failure> {
        let bytes = trusted_file::read(path, BYTES_MAX, KEY)
            .map_err(|error| Failure::new(Exit::Usage, format!("--recipient: {error}")))?;
        let key = pem::private_key(&bytes).map_err(|error| unfit(path, &error.to_string()))?;
        let PrivateKeyDer::Pkcs8(der) = key else {
            return Err(unfit(path, "the private key is not in PKCS #8")
                .hint("`openssl pkcs8 -topk8 -nocrypt -in OLD -out NEW` converts the key"));
        };
        let pair = RecipientKeyPair::from_pkcs8(der.secret_pkcs8_der());
        let pair = pair.map_err(|error| unfit(path, &error.to_string()))?;
        Ok(Self::Private(Box::new(pair)))
    }

    /// The public key as DER SubjectPublicKeyInfo.
    pub(super) fn public_key(&self) -> &[u8] {
        match self {
            Self::Private(pair) => pair.public_key(),
            Self::Public(der) => der,
        }
    }
}

fn unfit(path: &Path, why: &str) -> Failure {
    let what = format!("--recipient {}: {why}", path.display());
    Failure::new(Exit::Usage, what).hint(
        "`openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:3072 -out FILE` makes a private key of a recipient",
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use base64ct::{Base64, Encoding as _};

    use super::*;

    fn pem(label: &str, der: &[u8]) -> String {
        let text = Base64::encode_string(der);
        let lines: Vec<&str> = text
            .as_bytes()
            .chunks(64)
            .filter_map(|line| str::from_utf8(line).ok())
            .collect();
        format!(
            "-----BEGIN {label}-----\n{}\n-----END {label}-----\n",
            lines.join("\n")
        )
    }

    #[test]
    fn a_file_has_one_private_or_public_key() {
        let pair = RecipientKeyPair::generate().unwrap();
        let private = pem("PRIVATE KEY", &pair.to_pkcs8().unwrap());
        let public = pem("PUBLIC KEY", pair.public_key());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key.pem");
        let read = |text: &str, mode| {
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            Recipient::read(&path)
        };
        let found = read(&private, 0o600).unwrap();
        assert!(matches!(found, Recipient::Private(_)));
        assert_eq!(found.public_key(), pair.public_key());
        let found = read(&public, 0o644).unwrap();
        assert!(matches!(found, Recipient::Public(_)));
        assert_eq!(found.public_key(), pair.public_key());
        assert!(
            read(&private, 0o644).is_err(),
            "others can read the private key"
        );
        for bad in [
            "",
            "no key",
            &format!("{public}{public}"),
            &pem("PRIVATE KEY", b"no key"),
        ] {
            assert_eq!(read(bad, 0o600).unwrap_err().exit, Exit::Usage, "{bad:?}");
        }
    }
}
