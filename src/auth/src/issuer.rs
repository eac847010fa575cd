//! The `[[issuer]]` sections specify the trusted issuers, the keys that verify their access tokens,
//! and the required content of the access tokens.
//!
//! All rules about access tokens come from the `[[issuer]]` sections, and never from the content of
//! an access token.
//!
//! Mitigation: M19 of `THREAT_MODEL.md`.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use reqwest::Url;
use serde::{Deserialize, Serialize};

use keybroker_core::{
    key::{KeyName, Tenant, UserId},
    principal::{Grant, Kind, Reach, Role},
};

mod check;
mod mapping;

pub use check::{problems, remarks};
pub use mapping::{ClaimPath, Condition, Mapping};

/// A signature algorithm. All algorithms are asymmetric. With a symmetric algorithm, the verifier
/// could also sign access tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names of RFC 7518 and RFC 8037")]
pub enum Algorithm {
    RS256,
    RS384,
    RS512,
    PS256,
    PS384,
    PS512,
    ES256,
    ES384,
    EdDSA,
}

impl Algorithm {
    /// All algorithms.
    pub(super) const ALL: [Self; 9] = [
        Self::RS256,
        Self::RS384,
        Self::RS512,
        Self::PS256,
        Self::PS384,
        Self::PS512,
        Self::ES256,
        Self::ES384,
        Self::EdDSA,
    ];

    /// Returns the name that the header of an access token uses for the algorithm.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::RS256 => "RS256",
            Self::RS384 => "RS384",
            Self::RS512 => "RS512",
            Self::PS256 => "PS256",
            Self::PS384 => "PS384",
            Self::PS512 => "PS512",
            Self::ES256 => "ES256",
            Self::ES384 => "ES384",
            Self::EdDSA => "EdDSA",
        }
    }

    /// Parses the name of an algorithm in the header of an access token.
    pub(super) fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.as_str() == text)
    }
}

/// The format of the `sub` claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Subject {
    /// A GUID. The name of the user is the GUID in lower case with hyphens.
    Guid,
    /// The claim is any string that is a valid user name.
    Text,
}

/// Default values for the settings of an `[[issuer]]` section, for each kind of issuer software
/// that Keybroker supports. A value in the `[[issuer]]` section takes precedence over the default
/// value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// The identity service of a Bitwarden server.
    Bitwarden,
}

/// One `[[issuer]]` section of the configuration, with the values of its profile and with defaults
/// for settings that are not set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Written")]
pub struct Settings {
    /// Short name, used in the names of principals, in logs and in metrics.
    pub name: String,
    /// The `iss` of the issuer's access tokens, compared bytewise.
    pub issuer: String,
    /// The profile that provides values for settings that are not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub profile: Option<Profile>,
    /// The URL of the discovery document, if it is not below `issuer`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub discovery_url: Option<String>,
    /// The URL of the key set, used instead of discovery.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jwks_url: Option<String>,
    /// A file with the key set, used instead of discovery.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jwks_file: Option<PathBuf>,
    /// A PEM file with public keys, used instead of discovery.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pem_file: Option<PathBuf>,
    /// Whether keys may be fetched over plain HTTP.
    pub allow_http: bool,
    /// A PEM file with the CAs for the provider's certificate, used instead of the public CAs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// Interval at which the key set is fetched.
    pub refresh_minutes: u32,
    /// Time for which the last valid key set is used while the provider is unavailable.
    pub keep_hours: u32,
    /// Longest lifetime of the issuer's access tokens, from `iat` to `exp`.
    pub token_lifetime_max_minutes: u32,
    /// The algorithms with which access tokens may be signed.
    pub algorithms: BTreeSet<Algorithm>,
    /// Largest accepted difference between the clock of the provider and the clock of the broker, in seconds.
    pub leeway_s: u32,
    /// The accepted audiences. The claim `aud` must contain at least one of the audiences. If this
    /// list is empty, `aud` is not checked.
    pub audience: BTreeSet<String>,
    /// The accepted types. The member `typ` in the header must be one of the types. If this list is
    /// empty, `typ` is not checked.
    pub token_types: BTreeSet<String>,
    /// The required scopes. The claim `scope` or `scp` must contain all required scopes.
    pub required_scopes: BTreeSet<String>,
    /// The claims that an access token must have, each with its permitted values. A claim without
    /// listed values may have any value.
    pub required_claims: BTreeMap<String, BTreeSet<String>>,
    /// The form of the claim that identifies the holder.
    pub subject: Subject,
    /// The claim that identifies the holder.
    pub subject_claim: ClaimPath,
    /// Whether the holders of the access tokens are users or services.
    pub kind: Kind,
    /// The tenant whose records the holders of the access tokens can access.
    pub tenant: Tenant,
    /// Whether another issuer may also identify the users that this issuer identifies.
    pub shared_users: bool,
    /// The roles of the services, if the holders are services.
    pub roles: BTreeSet<Role>,
    /// The users whose keys services with the role `release` may release.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub users: Option<Reach<UserId>>,
    /// The names of the keys that services with the role `release` may release.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_names: Option<Reach<KeyName>>,
    /// Whether an access token to which no mapping applies is refused.
    pub mapping_required: bool,
    /// The claims that policies can use, each with its name in policies.
    pub attributes: BTreeMap<String, String>,
    /// The claims that contain organisations.
    pub organisation_claims: BTreeSet<String>,
    /// The claim that contains the device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_claim: Option<String>,
    /// The `[[issuer.mapping]]` tables, in the order of the configuration.
    #[serde(rename = "mapping")]
    pub mappings: Vec<Mapping>,
}

/// The source of an issuer's keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum KeySource {
    /// The URL of a discovery document, which contains the URL of the key set.
    Discovery(String),
    /// The URL of a key set.
    Url(String),
    /// A file with a key set.
    Set(PathBuf),
    /// A PEM file with public keys.
    Pem(PathBuf),
}

/// An `[[issuer]]` section with exactly the settings that the configuration file contains.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    name: String,
    issuer: String,
    profile: Option<Profile>,
    discovery_url: Option<String>,
    jwks_url: Option<String>,
    jwks_file: Option<PathBuf>,
    pem_file: Option<PathBuf>,
    #[serde(default)]
    allow_http: bool,
    ca_file: Option<PathBuf>,
    #[serde(default = "default_refresh_minutes")]
    refresh_minutes: u32,
    #[serde(default = "default_keep_hours")]
    keep_hours: u32,
    #[serde(default = "default_token_lifetime_max_minutes")]
    token_lifetime_max_minutes: u32,
    algorithms: Option<BTreeSet<Algorithm>>,
    #[serde(default = "default_leeway_s")]
    leeway_s: u32,
    #[serde(default)]
    audience: BTreeSet<String>,
    token_types: Option<BTreeSet<String>>,
    required_scopes: Option<BTreeSet<String>>,
    required_claims: Option<BTreeMap<String, BTreeSet<String>>>,
    subject: Option<Subject>,
    subject_claim: Option<ClaimPath>,
    #[serde(default = "default_kind")]
    kind: Kind,
    #[serde(default)]
    tenant: Tenant,
    #[serde(default)]
    shared_users: bool,
    #[serde(default)]
    roles: BTreeSet<Role>,
    users: Option<Reach<UserId>>,
    key_names: Option<Reach<KeyName>>,
    #[serde(default)]
    mapping_required: bool,
    attributes: Option<BTreeMap<String, String>>,
    organisation_claims: Option<BTreeSet<String>>,
    device_claim: Option<String>,
    #[serde(rename = "mapping", default)]
    mappings: Vec<Mapping>,
}

const fn default_refresh_minutes() -> u32 {
    15
}

const fn default_keep_hours() -> u32 {
    24
}

/// One day.
const fn default_token_lifetime_max_minutes() -> u32 {
    1_440
}

const fn default_leeway_s() -> u32 {
    30
}

const fn default_kind() -> Kind {
    Kind::User
}

/// The values of a profile for settings that the configuration does not set.
#[derive(Default)]
struct Presets {
    token_types: &'static [&'static str],
    required_scopes: &'static [&'static str],
    required_claims: &'static [(&'static str, &'static [&'static str])],
    subject: Option<Subject>,
    organisation_claims: &'static [&'static str],
    device_claim: Option<&'static str>,
    attributes: &'static [&'static str],
}

impl Profile {
    /// Returns the values for access tokens that a user gets by a login with password, passkey,
    /// single sign-on or API key. Access tokens that a Bitwarden server issues for other purposes
    /// do not match the returned values.
    fn presets(self) -> Presets {
        match self {
            Self::Bitwarden => Presets {
                token_types: &["at+jwt"],
                required_scopes: &["api"],
                required_claims: &[("amr", &["Application", "external"])],
                subject: Some(Subject::Guid),
                organisation_claims: &["orguser", "orgadmin", "orgowner", "orgcustom"],
                device_claim: Some("device"),
                attributes: &["client_id", "devicetype", "email", "email_verified"],
            },
        }
    }
}

impl From<Written> for Settings {
    fn from(written: Written) -> Self {
        let presets = written.profile.map(Profile::presets).unwrap_or_default();
        let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
        let claims = || {
            let claims = presets.required_claims.iter();
            claims
                .map(|(claim, values)| ((*claim).to_owned(), texts(values)))
                .collect()
        };
        let attributes = || {
            let names = presets.attributes.iter().map(|name| (*name).to_owned());
            names.map(|name| (name.clone(), name)).collect()
        };
        let mappings = written.mappings.into_iter();
        let mappings = mappings.map(|mapping| Mapping {
            tenant: mapping.tenant.or_else(|| Some(written.tenant.clone())),
            ..mapping
        });
        let mappings = mappings.collect();
        Self {
            name: written.name,
            issuer: written.issuer,
            profile: written.profile,
            discovery_url: written.discovery_url,
            jwks_url: written.jwks_url,
            jwks_file: written.jwks_file,
            pem_file: written.pem_file,
            allow_http: written.allow_http,
            ca_file: written.ca_file,
            refresh_minutes: written.refresh_minutes,
            keep_hours: written.keep_hours,
            token_lifetime_max_minutes: written.token_lifetime_max_minutes,
            algorithms: written
                .algorithms
                .unwrap_or_else(|| BTreeSet::from([Algorithm::RS256])),
            leeway_s: written.leeway_s,
            audience: written.audience,
            token_types: written
                .token_types
                .unwrap_or_else(|| texts(presets.token_types)),
            required_scopes: written
                .required_scopes
                .unwrap_or_else(|| texts(presets.required_scopes)),
            required_claims: written.required_claims.unwrap_or_else(claims),
            subject: written.subject.or(presets.subject).unwrap_or(Subject::Text),
            subject_claim: written
                .subject_claim
                .unwrap_or_else(|| ClaimPath::top_level("sub")),
            kind: written.kind,
            tenant: written.tenant,
            shared_users: written.shared_users,
            roles: written.roles,
            users: written.users,
            key_names: written.key_names,
            mapping_required: written.mapping_required,
            attributes: written.attributes.unwrap_or_else(attributes),
            organisation_claims: written
                .organisation_claims
                .unwrap_or_else(|| texts(presets.organisation_claims)),
            device_claim: written
                .device_claim
                .or_else(|| presets.device_claim.map(str::to_owned)),
            mappings,
        }
    }
}

impl Settings {
    /// Returns the source of the issuer's keys. The default is the discovery document below the URL of the issuer.
    pub(super) fn key_source(&self) -> KeySource {
        if let Some(path) = &self.pem_file {
            return KeySource::Pem(path.clone());
        }
        if let Some(path) = &self.jwks_file {
            return KeySource::Set(path.clone());
        }
        if let Some(url) = &self.jwks_url {
            return KeySource::Url(url.clone());
        }
        KeySource::Discovery(self.discovery_place())
    }

    /// Returns the URL of the discovery document.
    pub(super) fn discovery_place(&self) -> String {
        self.discovery_url.clone().unwrap_or_else(|| {
            let base = self.issuer.trim_end_matches('/');
            format!("{base}/.well-known/openid-configuration")
        })
    }

    /// Whether an access token to which no mapping applies is refused. Services without a role could do nothing.
    pub(super) fn refuses_unmapped(&self) -> bool {
        self.mapping_required || (self.kind == Kind::Service && self.roles.is_empty())
    }

    /// Whether access tokens of this issuer can have holders of a kind.
    pub fn can_identify(&self, kind: Kind) -> bool {
        let is_base = self.kind == kind && !self.refuses_unmapped();
        is_base || self.mappings.iter().any(|mapping| mapping.kind == kind)
    }

    /// Whether holders of tokens of this issuer can have a role.
    pub fn can_give(&self, role: Role) -> bool {
        let is_base = self.kind == Kind::Service && self.roles.contains(&role);
        is_base
            || self
                .mappings
                .iter()
                .any(|mapping| mapping.roles.contains(&role))
    }

    /// Returns the tenants of the users that this issuer identifies.
    fn user_tenants(&self) -> BTreeSet<&Tenant> {
        let is_base = self.kind == Kind::User && !self.refuses_unmapped();
        let of_users = self
            .mappings
            .iter()
            .filter(|mapping| mapping.kind == Kind::User);
        of_users
            .filter_map(|mapping| mapping.tenant.as_ref())
            .chain(is_base.then_some(&self.tenant))
            .collect()
    }

    /// Returns the grant for services of this issuer to which no mapping applies.
    pub(super) fn grant(&self) -> Grant {
        Grant {
            tenant: self.tenant.clone(),
            roles: self.roles.clone(),
            users: self.users.clone(),
            key_names: self.key_names.clone(),
        }
    }
}

/// Returns the reason why keys must not be fetched from a URL, or `None` if the URL is accepted.
pub(super) fn url_problem(text: &str, allow_http: bool) -> Option<&'static str> {
    let Ok(url) = Url::parse(text) else {
        return Some("the value is not a URL");
    };
    if !url.username().is_empty() || url.password().is_some() {
        return Some(
            "this URL contains a user name or a password, but the broker fetches keys without credentials",
        );
    }
    match url.scheme() {
        "https" => None,
        "http" if allow_http => None,
        "http" => Some(
            "this URL is plain http, so everyone on the network path could replace the keys; use https, or set \
             `allow_http = true` if you control the whole network path",
        ),
        _ => Some("this URL is neither https nor http"),
    }
}
