//! Files with wrapped integrity keys, for tokens that do not support HMAC keys (`token.integrity_key = "worker"`).
//!
//! Each file contains the integrity key of one wrapping key, wrapped under the RSA key of this
//! wrapping key. Everyone with the public key can wrap a key, so a ciphertext does not prove its
//! origin. Therefore the configuration contains the SHA-256 of each file, and the files are never
//! in the database. As a result, a person who can write to the database cannot choose the integrity
//! key that verifies the rows.
//!
//! Mitigation: M10 of `THREAT_MODEL.md`.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use aws_lc_rs::digest;
use rustix::fs::{Access, access};
use serde::{Deserialize, Serialize};

use keybroker_core::{
    envelope::Algorithm,
    key::WrappingKeyId,
    trusted_file::{self, Purpose},
};

use crate::Settings;

/// The value of `format`.
const FORMAT: &str = "keybroker-integrity-key/1";
/// Longest file, in bytes: the ciphertext of an RSA-4096 key has 1,024 hexadecimal digits.
const BYTES_MAX: u64 = 4_096;
/// Longest ciphertext, in bytes: the ciphertext of an RSA-4096 key.
const CIPHERTEXT_BYTES_MAX: usize = 512;
const EXTENSION: &str = "json";
const INTEGRITY_KEY: Purpose = Purpose::secret("wrapped integrity key");
const DIRECTORY: Purpose = Purpose::trust("other users could replace the wrapped integrity keys");

/// The reason why a wrapped integrity key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IntegrityFileError {
    /// The configuration does not permit integrity keys in the memory of the workers.
    #[error(
        "the integrity key of wrapping key {0} is unwrapped into the memory of the workers, which the configuration does \
         not permit; to permit this, set `integrity_key = \"worker\"` in [token]"
    )]
    NotPermitted(WrappingKeyId),
    /// The configuration has no directory for the files with integrity keys.
    #[error(
        "`integrity_key = \"worker\"` in [token] needs `integrity_key_directory`, the directory of the files with the wrapped \
         integrity keys"
    )]
    NoDirectory,
    /// The configuration has no digest of this file.
    #[error(
        "the configuration does not have the digest of the wrapped integrity key {}; add the line that `keybroker key generate` \
         printed, `{id} = \"SHA-256 of the file\"`, to [token.integrity_key_digests]",
        path.display()
    )]
    NotPinned {
        /// Id of the wrapping key.
        id: WrappingKeyId,
        /// The file.
        path: PathBuf,
    },
    /// The digest of the file differs from the configured digest.
    #[error(
        "the wrapped integrity key {} was changed: its SHA-256 differs from the digest in \
         [token.integrity_key_digests]. A person who chose the content of the file could forge rows; restore the file \
         from a backup, and find out who changed the file",
        path.display()
    )]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// The content of the file is not a wrapped integrity key.
    #[error("the wrapped integrity key {} cannot be read: {source}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The problem of the content.
        source: ContentError,
    },
    /// The file is missing, or other users can read or change it.
    #[error("{}", describe_file(.0))]
    File(#[source] trusted_file::Error),
    /// The directory is missing, or other users can change it.
    #[error("[token] `integrity_key_directory`: {0}")]
    Directory(#[source] trusted_file::Error),
    /// The directory cannot be listed.
    #[error("[token] `integrity_key_directory`: cannot list {}: {source}", path.display())]
    List {
        /// The directory.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The user of this process cannot create files in the directory.
    #[error("[token] `integrity_key_directory`: this user cannot write to {}", path.display())]
    NotWritable {
        /// The directory.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The file cannot be written.
    #[error("cannot write the wrapped integrity key {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
}

impl IntegrityFileError {
    /// Whether the error means that the content of the file differs from the content that
    /// `keybroker` wrote. All other errors are about settings, owner, mode or storage.
    pub fn is_about_content(&self) -> bool {
        matches!(self, Self::Changed { .. } | Self::Malformed { .. })
    }
}

/// The reason why the content of a file is not a wrapped integrity key.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// The content is not a JSON object with the required fields.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    /// The value of `format` is not known.
    #[error("the value of `format` is not {FORMAT:?}")]
    Format,
    /// The value of `wrapping_key` is not a key id.
    #[error("`wrapping_key` is not a key id")]
    WrappingKey,
    /// The value of `algorithm` is unknown.
    #[error("`algorithm` is not known")]
    Algorithm,
    /// The value of `ciphertext` is not hexadecimal or does not have the required length.
    #[error("`ciphertext` is not hexadecimal, or has the wrong length")]
    Ciphertext,
    /// The integrity key belongs to another wrapping key.
    #[error("the file is for wrapping key {0}")]
    OtherKey(WrappingKeyId),
}

fn describe_file(error: &trusted_file::Error) -> String {
    let remedy = if error.is_missing() {
        "; rows can be verified only with this file: restore the file from a backup"
    } else {
        ""
    };
    format!("the wrapped integrity key: {error}{remedy}")
}

/// An integrity key that is wrapped under an RSA key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrappedIntegrityKey {
    /// The wrapping key to which the integrity key belongs.
    pub wrapping_key: WrappingKeyId,
    /// The algorithm with which the integrity key is wrapped.
    pub algorithm: Algorithm,
    /// The ciphertext that the token decrypts.
    pub ciphertext: Vec<u8>,
}

/// The content of a file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    format: String,
    wrapping_key: String,
    algorithm: String,
    ciphertext: String,
}

impl WrappedIntegrityKey {
    /// The content of the file.
    pub fn to_text(&self) -> String {
        let content = Content {
            format: FORMAT.to_owned(),
            wrapping_key: self.wrapping_key.to_string(),
            algorithm: self.algorithm.as_str().to_owned(),
            ciphertext: hex::encode(&self.ciphertext),
        };
        let text = serde_json::to_string_pretty(&content).expect("four texts are JSON");
        format!("{text}\n")
    }

    fn parse(bytes: &[u8]) -> Result<Self, ContentError> {
        let content: Content = serde_json::from_slice(bytes)?;
        if content.format != FORMAT {
            return Err(ContentError::Format);
        }
        let wrapping_key =
            WrappingKeyId::from_hex(&content.wrapping_key).ok_or(ContentError::WrappingKey)?;
        let algorithm = [Algorithm::RsaOaepSha256, Algorithm::RsaOaepSha1]
            .into_iter()
            .find(|algorithm| algorithm.as_str() == content.algorithm)
            .ok_or(ContentError::Algorithm)?;
        let ciphertext = hex::decode(&content.ciphertext)
            .ok()
            .filter(|bytes| (1..=CIPHERTEXT_BYTES_MAX).contains(&bytes.len()))
            .ok_or(ContentError::Ciphertext)?;
        Ok(Self {
            wrapping_key,
            algorithm,
            ciphertext,
        })
    }
}

/// The files with wrapped integrity keys, according to the settings in `[token]`.
#[derive(Clone, Copy, Debug)]
pub struct IntegrityFiles<'a> {
    directory: &'a Path,
    digests: &'a BTreeMap<String, String>,
}

impl<'a> IntegrityFiles<'a> {
    /// Returns the files of a token whose settings permit integrity keys in the memory of the workers. `id` is the
    /// wrapping key that the error names.
    pub fn of(settings: &'a Settings, id: WrappingKeyId) -> Result<Self, IntegrityFileError> {
        Self::permitted(settings)?.ok_or(IntegrityFileError::NotPermitted(id))
    }

    /// Returns the files of a token, or `None` if the token's settings do not permit integrity keys
    /// in the memory of the workers.
    pub fn permitted(settings: &'a Settings) -> Result<Option<Self>, IntegrityFileError> {
        if !settings.permits_integrity_key_in_worker() {
            return Ok(None);
        }
        let directory = settings.integrity_key_directory.as_deref();
        Ok(Some(Self {
            directory: directory.ok_or(IntegrityFileError::NoDirectory)?,
            digests: &settings.integrity_key_digests,
        }))
    }

    /// Returns the path of the file of a wrapping key.
    pub fn path(&self, id: WrappingKeyId) -> PathBuf {
        self.directory.join(format!("{id}.{EXTENSION}"))
    }

    /// Checks that no other user can change the directory. Returns the path of the directory, in
    /// which `$CREDENTIALS_DIRECTORY` is replaced with its value.
    pub fn check_directory(&self) -> Result<PathBuf, IntegrityFileError> {
        trusted_file::check_directory(self.directory, DIRECTORY)
            .map_err(IntegrityFileError::Directory)
    }

    /// Checks the directory, and checks that the user of this process can create files in the
    /// directory.
    pub fn check_writable(&self) -> Result<(), IntegrityFileError> {
        let path = self.check_directory()?;
        access(&path, Access::WRITE_OK | Access::EXEC_OK).map_err(|error| {
            IntegrityFileError::NotWritable {
                path,
                source: error.into(),
            }
        })
    }

    /// Returns whether a wrapping key has a file. The function does not check the content of the
    /// file.
    pub fn has(&self, id: WrappingKeyId) -> bool {
        let path = self.path(id);
        trusted_file::expand(&path).is_ok_and(|path| path.symlink_metadata().is_ok())
    }

    /// Returns whether the configuration has the digest of the file of a wrapping key. A configured
    /// digest shows that the file was in use.
    pub fn is_pinned(&self, id: WrappingKeyId) -> bool {
        self.digests.contains_key(&id.to_string())
    }

    /// Reads the file of a wrapping key. Fails if the file does not have the configured digest.
    pub fn load(&self, id: WrappingKeyId) -> Result<WrappedIntegrityKey, IntegrityFileError> {
        let path = self.path(id);
        let bytes = trusted_file::read(&path, BYTES_MAX, INTEGRITY_KEY)
            .map_err(IntegrityFileError::File)?;
        match self.digests.get(&id.to_string()) {
            None => return Err(IntegrityFileError::NotPinned { id, path }),
            // Both digests are public, so a comparison in variable time is safe.
            Some(digest) if *digest != sha256(&bytes) => {
                return Err(IntegrityFileError::Changed { path });
            }
            Some(_) => {}
        }
        let malformed = |source| IntegrityFileError::Malformed {
            path: path.clone(),
            source,
        };
        let key = WrappedIntegrityKey::parse(&bytes).map_err(malformed)?;
        if key.wrapping_key == id {
            Ok(key)
        } else {
            Err(malformed(ContentError::OtherKey(key.wrapping_key)))
        }
    }

    /// Writes the file of a new integrity key, and returns its path and its SHA-256. After this function returns, the file
    /// survives a power failure. The function never replaces a file, because the file could be the only copy of the integrity key
    /// that verifies the rows.
    pub fn create(
        &self,
        id: WrappingKeyId,
        text: &str,
    ) -> Result<(PathBuf, String), IntegrityFileError> {
        let directory = self.check_directory()?;
        let path = directory.join(format!("{id}.{EXTENSION}"));
        let write = || {
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            File::open(&directory)?.sync_all()
        };
        write().map_err(|source| IntegrityFileError::Write {
            path: path.clone(),
            source,
        })?;
        Ok((path, sha256(text.as_bytes())))
    }

    /// Returns the problems of all files with a configured digest, and of all other files in the
    /// directory.
    pub fn problems(&self) -> Vec<IntegrityFileError> {
        let directory = match self.check_directory() {
            Ok(directory) => directory,
            Err(error) => return vec![error],
        };
        let mut problems: Vec<IntegrityFileError> = self
            .digests
            .keys()
            .filter_map(|id| WrappingKeyId::from_hex(id))
            .filter_map(|id| self.load(id).err())
            .collect();
        let listed = directory
            .read_dir()
            .and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let entries = match listed {
            Ok(entries) => entries,
            Err(source) => {
                let path = directory;
                problems.push(IntegrityFileError::List { path, source });
                return problems;
            }
        };
        for entry in entries {
            let name = entry.file_name();
            let id = Path::new(&name)
                .file_stem()
                .and_then(|stem| WrappingKeyId::from_hex(stem.to_str()?));
            if let Some(id) = id
                && self.path(id).file_name() == Some(&name)
                && !self.digests.contains_key(&id.to_string())
            {
                let path = self.path(id);
                problems.push(IntegrityFileError::NotPinned { id, path });
            }
        }
        problems
    }
}

/// Returns the SHA-256 in the format of `sha256sum`.
fn sha256(bytes: &[u8]) -> String {
    hex::encode(digest::digest(&digest::SHA256, bytes))
}

/// Returns whether a string is a SHA-256 in the format of the configuration.
pub fn is_sha256(text: &str) -> bool {
    let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    text.len() == 2 * digest::SHA256_OUTPUT_LEN && text.bytes().all(is_digit)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    const ID: WrappingKeyId = WrappingKeyId::from_bytes([7; 16]);

    fn key() -> WrappedIntegrityKey {
        WrappedIntegrityKey {
            wrapping_key: ID,
            algorithm: Algorithm::RsaOaepSha256,
            ciphertext: vec![1; 256],
        }
    }

    /// A directory with the file of `key()`, and its digest.
    struct Fixture {
        directory: tempfile::TempDir,
        digests: BTreeMap<String, String>,
    }

    impl Fixture {
        fn new(text: &str) -> Self {
            let directory = tempfile::tempdir().unwrap();
            let mut fixture = Self {
                directory,
                digests: BTreeMap::new(),
            };
            let (_, digest) = fixture.files().create(ID, text).unwrap();
            fixture.digests.insert(ID.to_string(), digest);
            fixture
        }

        fn files(&self) -> IntegrityFiles<'_> {
            IntegrityFiles {
                directory: self.directory.path(),
                digests: &self.digests,
            }
        }

        fn refusal(&self) -> String {
            let refused = self.files().load(ID).unwrap_err().to_string();
            let problems = self.files().problems();
            assert_eq!(
                problems[0].to_string(),
                refused,
                "config check says the same"
            );
            refused
        }
    }

    #[test]
    fn a_pinned_file_of_mode_0600_is_read() {
        let fixture = Fixture::new(&key().to_text());
        let path = fixture.files().path(ID);
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        assert_eq!(fixture.files().load(ID).unwrap(), key());
        assert!(fixture.files().problems().is_empty());
    }

    #[test]
    fn an_existing_file_is_never_replaced() {
        let fixture = Fixture::new(&key().to_text());
        let again = fixture.files().create(ID, "{}").unwrap_err().to_string();
        assert!(again.contains("File exists"), "{again}");
        assert_eq!(fixture.files().load(ID).unwrap(), key());
    }

    /// Everyone with the public key can wrap a key.
    #[test]
    fn a_file_that_another_key_was_put_into_is_refused() {
        let fixture = Fixture::new(&key().to_text());
        let mut other = key();
        other.ciphertext[0] ^= 1;
        fs::write(fixture.files().path(ID), other.to_text()).unwrap();
        assert!(fixture.refusal().contains("was changed"));
    }

    #[test]
    fn a_file_without_a_digest_is_refused() {
        let mut fixture = Fixture::new(&key().to_text());
        fixture.digests.clear();
        assert!(fixture.refusal().contains("[token.integrity_key_digests]"));
    }

    #[test]
    fn a_missing_file_is_refused_with_its_path() {
        let fixture = Fixture::new(&key().to_text());
        fs::remove_file(fixture.files().path(ID)).unwrap();
        let refused = fixture.refusal();
        assert!(refused.contains(&ID.to_string()), "{refused}");
        assert!(
            refused.contains("restore the file from a backup"),
            "{refused}"
        );
    }

    #[test]
    fn a_file_that_others_can_read_or_change_is_refused() {
        for mode in [0o644, 0o620] {
            let fixture = Fixture::new(&key().to_text());
            let path = fixture.files().path(ID);
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let refused = fixture.refusal();
            assert!(refused.contains("chmod 600"), "{refused}");
        }
    }

    #[test]
    fn a_directory_that_others_can_change_is_refused() {
        let fixture = Fixture::new(&key().to_text());
        let open = fs::Permissions::from_mode(0o777);
        fs::set_permissions(fixture.directory.path(), open).unwrap();
        assert!(fixture.files().check_directory().is_err());
        assert!(fixture.files().load(ID).is_err());
        assert!(fixture.files().create(ID, "{}").is_err());
        assert!(!fixture.files().problems().is_empty());
    }

    #[test]
    fn a_pinned_file_of_another_key_or_format_is_refused() {
        let mut other = key();
        other.wrapping_key = WrappingKeyId::from_bytes([8; 16]);
        let mut long = key();
        long.ciphertext = vec![1; 513];
        let good = key().to_text();
        for (text, word) in [
            (other.to_text(), "the file is for wrapping key 08"),
            (long.to_text(), "the wrong length"),
            (good.replace("/1", "/2"), "the value of `format`"),
            (good.replace("SHA-256", "SHA-512"), "`algorithm`"),
            (good.replace('{', "{\"more\": 1,"), "unknown field"),
            ("{}".to_owned(), "missing field"),
        ] {
            let refused = Fixture::new(&text).refusal();
            assert!(refused.contains(word), "{word}: {refused}");
        }
    }

    #[test]
    fn a_digest_is_64_small_hexadecimal_digits() {
        assert!(is_sha256(&"0a".repeat(32)));
        for bad in ["", "0a", &"0A".repeat(32), &"0g".repeat(32)] {
            assert!(!is_sha256(bad), "{bad}");
        }
    }
}
