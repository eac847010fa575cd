//! Which token a worker opens, which keys must be on it, and the token information.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use keybroker_core::{
    key::{Fingerprint, ObjectIds, WrappingKeyId},
    trusted_file,
};

use crate::wire::{Setup, TokenIdentity};

/// What kind of object an integrity key is, and by which mechanism the token makes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IntegrityKey {
    /// A generic secret that may be used with `CKM_SHA256_HMAC` alone.
    #[default]
    GenericSecret,
    /// `CKK_SHA256_HMAC`, without a length and without allowed mechanisms in the template: `YubiHSM` 2.
    Sha256Hmac,
    /// `CKK_SHA256_HMAC` by the vendor mechanism `CKM_NC_SHA256_HMAC_KEY_GEN`: Entrust `nShield`.
    Nshield,
    /// No object of the token: a key in the memory of the workers, wrapped under the RSA key in a file. For tokens without keys for
    /// HMAC.
    Worker,
}

impl IntegrityKey {
    /// All kinds.
    pub const ALL: [Self; 4] = [
        Self::GenericSecret,
        Self::Sha256Hmac,
        Self::Nshield,
        Self::Worker,
    ];

    /// As in the configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::GenericSecret => "generic-secret",
            Self::Sha256Hmac => "sha256-hmac",
            Self::Nshield => "nshield",
            Self::Worker => "worker",
        }
    }

    /// From the text of the configuration.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == text)
    }
}

/// Who decides which program may use the keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AccessControl {
    /// The token enforces the login, because the keys have `CKA_PRIVATE=true`.
    #[default]
    Login,
    /// Something that PKCS#11 does not know, such as the credentials of a cloud: the keys have `CKA_PRIVATE=false`.
    OutsidePkcs11,
}

/// Which token to use and how to reach it: the `[token]` section of the configuration.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Path of the vendor's PKCS#11 library.
    pub module: PathBuf,
    /// The token by its label. Exactly one of `label`, `serial` and `uri` is set.
    pub label: Option<String>,
    /// The token by its serial number.
    pub serial: Option<String>,
    /// The token by an RFC 7512 PKCS#11 URI with token attributes only (`pkcs11:token=…;serial=…`).
    pub uri: Option<String>,
    /// File that holds the user PIN; only its owner may read it. `$CREDENTIALS_DIRECTORY/` at the front stands for
    /// the directory of systemd credentials.
    pub pin_file: Option<PathBuf>,
    /// Worker processes; 1 where the token allows only one client.
    #[serde(default = "Settings::default_workers")]
    pub workers: usize,
    /// Session threads in each worker.
    #[serde(default = "Settings::default_sessions_per_worker")]
    pub sessions_per_worker: usize,
    /// Jobs that may wait; one more is refused with `QUEUE_FULL`, or takes the place of a job of the principal with the most.
    #[serde(default = "Settings::default_queue_length_max")]
    pub queue_length_max: usize,
    /// Share of a principal, by its name, while jobs of several wait: one with 4 gets four times the share of one that is not
    /// listed.
    #[serde(default)]
    pub weights: BTreeMap<String, u32>,
    /// Longest time for one call of the module in a command, in milliseconds; a command that makes a key or initialises a token
    /// allows at least five minutes for that call.
    #[serde(default = "Settings::default_call_timeout_ms")]
    pub call_timeout_ms: u64,
    /// Allows RSA-OAEP with SHA-1 when the token can do no other.
    #[serde(default)]
    pub allow_oaep_sha1: bool,
    /// Who decides which program may use the keys.
    #[serde(default)]
    pub access_control: AccessControl,
    /// What kind of object the integrity keys of this token are.
    #[serde(default)]
    pub integrity_key: IntegrityKey,
    /// Directory of the files with wrapped integrity keys, for `integrity_key = "worker"`: `ID.json` for each wrapping key.
    #[serde(default)]
    pub integrity_key_directory: Option<PathBuf>,
    /// SHA-256 of each of these files, by the id of its wrapping key; both in hexadecimal digits.
    #[serde(default)]
    pub integrity_key_digests: BTreeMap<String, String>,
    /// Attributes that this token cannot express, by name (`CKA_COPYABLE`, …): they are left out of templates, and may be absent, never wrong.
    #[serde(default)]
    pub attribute_exceptions: Vec<String>,
    /// Negative tests that this token is spared, by name (`wrap-private-aes-kw`, …).
    #[serde(default)]
    pub spared_tests: Vec<String>,
    /// String for `C_Initialize` (`pReserved`), which some modules need. Most modules refuse one.
    #[serde(default)]
    pub initialize_string: Option<String>,
    /// The whole environment of a worker, such as `SOFTHSM2_CONF`; nothing else is passed on.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
}

impl Settings {
    /// Whether the token is used without a login: it has no PIN, and the settings say that something else controls access.
    pub fn is_without_login(&self) -> bool {
        self.access_control == AccessControl::OutsidePkcs11 && self.pin_file.is_none()
    }

    /// Whether integrity keys may be in the memory of the workers.
    pub fn permits_integrity_key_in_worker(&self) -> bool {
        self.integrity_key == IntegrityKey::Worker
    }

    /// With credentials expanded. A path that cannot be expanded stays as it is, so that the message about it names it.
    fn resolved_integrity_key_directory(&self) -> Option<PathBuf> {
        let directory = self.integrity_key_directory.as_deref()?;
        Some(trusted_file::expand(directory).unwrap_or_else(|_| directory.to_owned()))
    }

    fn default_workers() -> usize {
        2
    }

    fn default_sessions_per_worker() -> usize {
        2
    }

    fn default_queue_length_max() -> usize {
        4_096
    }

    fn default_call_timeout_ms() -> u64 {
        30_000
    }

    /// How a worker is told which token to open. Sessions, PIN and keys are set by the caller.
    pub fn to_setup(&self, state_directory: &Path) -> Setup {
        Setup {
            module: self.module.to_string_lossy().into_owned(),
            label: self.label.clone().unwrap_or_default(),
            serial: self.serial.clone().unwrap_or_default(),
            uri: self.uri.clone().unwrap_or_default(),
            state_directory: state_directory.to_string_lossy().into_owned(),
            allow_oaep_sha1: self.allow_oaep_sha1,
            integrity_key: self.integrity_key.as_str().to_owned(),
            integrity_key_directory: self
                .resolved_integrity_key_directory()
                .map(|path| path.to_string_lossy().into_owned())
                .unwrap_or_default(),
            integrity_key_digests: self.integrity_key_digests.clone().into_iter().collect(),
            access_outside_pkcs11: self.access_control == AccessControl::OutsidePkcs11,
            attribute_exceptions: self.attribute_exceptions.clone(),
            spared_tests: self.spared_tests.clone(),
            read_only_mounts_count: trusted_file::read_only_mounts_count(),
            initialize_string: self.initialize_string.clone().unwrap_or_default(),
            ..Setup::default()
        }
    }

    /// The part of the settings that a worker needs. From here on, this process opens files by the rule of the process that sent
    /// the setup.
    pub fn from_setup(setup: &Setup) -> Self {
        if !setup.read_only_mounts_count {
            trusted_file::ignore_read_only_mounts();
        }
        let given = |text: &String| (!text.is_empty()).then(|| text.clone());
        Self {
            module: PathBuf::from(&setup.module),
            label: given(&setup.label),
            serial: given(&setup.serial),
            uri: given(&setup.uri),
            pin_file: None,
            workers: 1,
            sessions_per_worker: 1,
            queue_length_max: 1,
            weights: BTreeMap::new(),
            call_timeout_ms: Self::default_call_timeout_ms(),
            allow_oaep_sha1: setup.allow_oaep_sha1,
            access_control: if setup.access_outside_pkcs11 {
                AccessControl::OutsidePkcs11
            } else {
                AccessControl::Login
            },
            integrity_key: IntegrityKey::parse(&setup.integrity_key).unwrap_or_default(),
            integrity_key_directory: given(&setup.integrity_key_directory).map(PathBuf::from),
            integrity_key_digests: setup.integrity_key_digests.clone().into_iter().collect(),
            attribute_exceptions: setup.attribute_exceptions.clone(),
            spared_tests: setup.spared_tests.clone(),
            initialize_string: given(&setup.initialize_string),
            environment: BTreeMap::new(),
        }
    }
}

/// A wrapping key that must be on the token, as the registry knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpectedKey {
    /// Its id.
    pub id: WrappingKeyId,
    /// Where its objects are.
    pub objects: ObjectIds,
    /// Serial number of the token that holds it.
    pub token_serial: String,
    /// Of the public key.
    pub fingerprint: Fingerprint,
}

/// The token information (`C_GetTokenInfo`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenInfo {
    /// Label, padding removed.
    pub label: String,
    /// Serial number, padding removed.
    pub serial: String,
    /// Manufacturer and model.
    pub model: String,
}

impl From<TokenInfo> for TokenIdentity {
    fn from(info: TokenInfo) -> Self {
        Self {
            label: info.label,
            serial: info.serial,
            model: info.model,
        }
    }
}

impl From<TokenIdentity> for TokenInfo {
    fn from(token: TokenIdentity) -> Self {
        Self {
            label: token.label,
            serial: token.serial,
            model: token.model,
        }
    }
}

/// A text of `CK_TOKEN_INFO` without its padding. The standard pads with blanks; some modules pad with NUL, or end the text
/// with one.
pub fn unpadded(text: &str) -> &str {
    let text = text.split('\0').next().unwrap_or_default();
    text.trim_end()
}
