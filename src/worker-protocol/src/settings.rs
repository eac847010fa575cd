//! The settings of a token, the keys that a token must have, and the information that a token
//! returns.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use keybroker_core::{
    envelope::Mac,
    key::{Fingerprint, ObjectIds, Purpose, WrappingKeyId},
    trusted_file,
};

use crate::{
    Assurance,
    wire::{Setup, TokenIdentity},
};

/// The kind of object of an integrity key, and the mechanism with which the token generates the
/// object.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IntegrityKey {
    /// A generic secret key that may be used only with `CKM_SHA256_HMAC`.
    #[default]
    GenericSecret,
    /// A key of type `CKK_SHA256_HMAC` whose template contains neither the length nor the allowed
    /// mechanisms. For `YubiHSM` 2.
    Sha256Hmac,
    /// A key of type `CKK_SHA256_HMAC` that the vendor mechanism `CKM_NC_SHA256_HMAC_KEY_GEN`
    /// generates. For Entrust `nShield`.
    Nshield,
    /// A key in the memory of the workers instead of an object on the token. A file contains the key, wrapped under the
    /// RSA key. Integrity keys of this kind are for tokens that do not support HMAC keys.
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

    /// Returns the name of the kind in the configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::GenericSecret => "generic-secret",
            Self::Sha256Hmac => "sha256-hmac",
            Self::Nshield => "nshield",
            Self::Worker => "worker",
        }
    }

    /// Parses the name of a kind in the configuration.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == text)
    }
}

/// The access control that decides which programs may use the keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AccessControl {
    /// The token enforces a login, because the keys have `CKA_PRIVATE=true`.
    #[default]
    Login,
    /// Access is controlled outside PKCS#11, for example with the credentials of a cloud service. The keys have
    /// `CKA_PRIVATE=false`.
    OutsidePkcs11,
}

/// The `[token]` section of the configuration, which selects a token and configures its use.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Name of the token in messages, metrics, commands and the registry: 1 to 64 bytes of `[a-z0-9._-]`.
    #[serde(default = "Settings::default_name")]
    pub name: String,
    /// Priority of the token. The pool prefers tokens with a higher priority.
    #[serde(default = "Settings::default_priority")]
    pub priority: u8,
    /// Name of the original token, if this token is a copy with the same serial number, such as a
    /// copied `SoftHSM` directory.
    #[serde(default)]
    pub copy_of: Option<String>,
    /// Path of the vendor's PKCS#11 library.
    pub module: PathBuf,
    /// Label of the token. Exactly one of `label`, `serial` and `uri` is set.
    pub label: Option<String>,
    /// Serial number of the token.
    pub serial: Option<String>,
    /// RFC 7512 PKCS#11 URI of the token, with token attributes only (`pkcs11:token=…;serial=…`).
    pub uri: Option<String>,
    /// File with the user PIN, which only its owner may read. At the beginning of the path,
    /// `$CREDENTIALS_DIRECTORY/` means the directory of systemd credentials.
    pub pin_file: Option<PathBuf>,
    /// Number of worker processes. Set `workers` to 1 if the token accepts only one process at a time.
    #[serde(default = "Settings::default_workers")]
    pub workers: usize,
    /// Number of session threads in each worker.
    #[serde(default = "Settings::default_sessions_per_worker")]
    pub sessions_per_worker: usize,
    /// Largest number of waiting jobs. If the queue is full, a further job is refused with
    /// `QUEUE_FULL` or replaces a job of the principal with the most waiting jobs.
    #[serde(default = "Settings::default_queue_length_max")]
    pub queue_length_max: usize,
    /// Weights of principals, by name. While jobs of several principals wait, a principal with
    /// weight 4 gets four times the share of a principal without a weight.
    #[serde(default)]
    pub weights: BTreeMap<String, u32>,
    /// Longest time for one call of the module in a command, in milliseconds. For generating a key
    /// or initialising a token, the limit is at least five minutes.
    #[serde(default = "Settings::default_call_timeout_ms")]
    pub call_timeout_ms: u64,
    /// Allows RSA-OAEP with SHA-1 if the token supports no other hash.
    #[serde(default)]
    pub allow_oaep_sha1: bool,
    /// The access control that decides which programs may use the keys.
    #[serde(default)]
    pub access_control: AccessControl,
    /// The kind of object of the integrity keys on this token.
    #[serde(default)]
    pub integrity_key: IntegrityKey,
    /// Directory with the files of wrapped integrity keys, for `integrity_key = "worker"`. The
    /// directory contains a file `ID.json` for each wrapping key.
    #[serde(default)]
    pub integrity_key_directory: Option<PathBuf>,
    /// SHA-256 of each file in `integrity_key_directory`, by the id of its wrapping key. Ids and digests are written as
    /// hexadecimal digits.
    #[serde(default)]
    pub integrity_key_digests: BTreeMap<String, String>,
    /// Names of attributes that this token does not support (`CKA_COPYABLE`, …). Templates do not
    /// contain attributes with an exception. If a key nevertheless has an attribute with an
    /// exception, its value must be correct.
    #[serde(default)]
    pub attribute_exceptions: Vec<String>,
    /// Names of negative tests that are not run on this token (`wrap-private-aes-kw`, …).
    #[serde(default)]
    pub spared_tests: Vec<String>,
    /// What is known about the protection of the keys; `None` for the word that the module's report implies.
    #[serde(default)]
    pub assurance: Option<Assurance>,
    /// String for `C_Initialize` (`pReserved`). Some modules need this string, but most modules
    /// refuse this string.
    #[serde(default)]
    pub initialize_string: Option<String>,
    /// The complete environment of a worker, such as `SOFTHSM2_CONF`.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
}

impl Settings {
    /// Returns true if the token is used without a login: access is controlled outside PKCS#11, and
    /// no PIN file is configured.
    pub fn is_without_login(&self) -> bool {
        self.access_control == AccessControl::OutsidePkcs11 && self.pin_file.is_none()
    }

    /// Returns what is known about the protection of the keys of a token.
    pub fn assurance_of(&self, info: &TokenInfo) -> Assurance {
        let is_outside = self.access_control == AccessControl::OutsidePkcs11;
        Assurance::of(self.assurance, info.is_hardware, is_outside)
    }

    /// Whether integrity keys may be in the memory of the workers.
    pub fn permits_integrity_key_in_worker(&self) -> bool {
        self.integrity_key == IntegrityKey::Worker
    }

    /// Returns the path with `$CREDENTIALS_DIRECTORY` expanded. A path that cannot be expanded is returned unchanged,
    /// so that the error message contains this path.
    fn resolved_integrity_key_directory(&self) -> Option<PathBuf> {
        let directory = self.integrity_key_directory.as_deref()?;
        Some(trusted_file::expand(directory).unwrap_or_else(|_| directory.to_owned()))
    }

    /// The name under which the record of PINs keeps the PINs of a token with `copy_of`. Returns
    /// `None` for other tokens, whose PINs are kept under the serial number of the token. Therefore
    /// all tokens with the same serial number share a record.
    pub fn pin_record_name(&self) -> Option<&str> {
        self.copy_of.as_ref().map(|_| self.name.as_str())
    }

    fn default_name() -> String {
        "default".to_owned()
    }

    fn default_priority() -> u8 {
        100
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

    /// Creates the setup message, which specifies the token that a worker opens. The caller must
    /// set the sessions, the PIN and the keys of the setup.
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
            pin_record_name: self.pin_record_name().unwrap_or_default().to_owned(),
            token_name: self.name.clone(),
            ..Setup::default()
        }
    }

    /// Returns the settings that a worker needs. After this call, this process checks files by the
    /// same rules as the process that sent the setup.
    pub fn from_setup(setup: &Setup) -> Self {
        if !setup.read_only_mounts_count {
            trusted_file::ignore_read_only_mounts();
        }
        let given = |text: &String| (!text.is_empty()).then(|| text.clone());
        Self {
            name: Self::default_name(),
            priority: Self::default_priority(),
            copy_of: None,
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
            assurance: None,
            initialize_string: given(&setup.initialize_string),
            environment: BTreeMap::new(),
        }
    }
}

/// A wrapping key that must be on the token, according to the registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpectedKey {
    /// The id of the key.
    pub id: WrappingKeyId,
    /// The location of the objects of the wrapping key.
    pub objects: ObjectIds,
    /// Serial number of the token that contains the key.
    pub token_serial: String,
    /// The fingerprint of the public key.
    pub fingerprint: Fingerprint,
    /// The purpose of the key. A key with the attributes of another purpose is not used.
    pub purpose: Purpose,
    /// Whether the key may be on another token. If the value is true, only the token with the
    /// serial number `token_serial` must have the key.
    pub may_be_elsewhere: bool,
    /// Messages with MACs. Before the key is used, its integrity key must verify the MACs of the
    /// proofs.
    pub proofs: Vec<Proof>,
}

/// A message with its MAC. If a token can verify the MAC, the token has the integrity key that made
/// the MAC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proof {
    /// The message.
    pub message: Vec<u8>,
    /// The MAC.
    pub mac: Mac,
}

/// The token information (`C_GetTokenInfo`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenInfo {
    /// Label without padding.
    pub label: String,
    /// Serial number without padding.
    pub serial: String,
    /// Manufacturer and model.
    pub model: String,
    /// Whether the module reports the slot of the token as a hardware slot (`CKF_HW_SLOT`).
    pub is_hardware: bool,
}

impl From<TokenInfo> for TokenIdentity {
    fn from(info: TokenInfo) -> Self {
        Self {
            label: info.label,
            serial: info.serial,
            model: info.model,
            is_hardware: info.is_hardware,
        }
    }
}

impl From<TokenIdentity> for TokenInfo {
    fn from(token: TokenIdentity) -> Self {
        Self {
            label: token.label,
            serial: token.serial,
            model: token.model,
            is_hardware: token.is_hardware,
        }
    }
}

/// Removes the padding of a text field in `CK_TOKEN_INFO`. The PKCS#11 standard requires padding
/// with blanks. Some modules pad text fields with NUL bytes, or end the text with a NUL byte.
pub fn unpadded(text: &str) -> &str {
    let text = text.split('\0').next().unwrap_or_default();
    text.trim_end()
}
