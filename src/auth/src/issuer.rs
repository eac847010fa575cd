//! `[[issuer]]`: whose tokens are believed, with which keys they are verified, and what they must say.
//!
//! Every rule about a token is here. None of them is ever taken from the token.
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

pub use check::problems;

/// An algorithm of signatures. Only asymmetric ones: with a shared secret the verifier could also sign.
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
    /// All of them.
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

    /// As in the header of a token.
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

    /// By that name.
    pub(super) fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.as_str() == text)
    }
}

/// What a `sub` must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Subject {
    /// A GUID; the user is its lower-case form with hyphens.
    Guid,
    /// Any text that can be a user.
    Text,
}

/// Settings that stand in for those that are not written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// The identity service of a Bitwarden server.
    Bitwarden,
}

/// One `[[issuer]]` of the configuration, with the profile and the defaults in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Written")]
pub struct Settings {
    /// Short name, in the names of principals, in logs and metrics.
    pub name: String,
    /// The `iss` of its tokens, compared bytewise.
    pub issuer: String,
    /// What is not written is as this profile has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub profile: Option<Profile>,
    /// Where the discovery document is, if not below `issuer`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub discovery_url: Option<String>,
    /// Where the key set is, instead of discovery.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jwks_url: Option<String>,
    /// A file with the key set, instead of discovery.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jwks_file: Option<PathBuf>,
    /// A PEM file with public keys, instead of discovery.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pem_file: Option<PathBuf>,
    /// Whether keys may come over plain HTTP.
    pub allow_http: bool,
    /// The authority of the provider's certificate, instead of the public ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// How often the key set is fetched.
    pub refresh_minutes: u32,
    /// How long the last valid key set is used while the provider is down.
    pub keep_hours: u32,
    /// Longest life of its access tokens, from `iat` to `exp`.
    pub token_lifetime_max_minutes: u32,
    /// How its tokens may be signed.
    pub algorithms: BTreeSet<Algorithm>,
    /// How far its clock and ours may differ.
    pub leeway_s: u32,
    /// One of these must be in `aud`; empty: `aud` is not checked.
    pub audience: BTreeSet<String>,
    /// `typ` of the header must be one of these; empty: it is not checked.
    pub token_types: BTreeSet<String>,
    /// All of these must be in `scope` or `scp`.
    pub required_scopes: BTreeSet<String>,
    /// Each claim must have one of its values; with none listed it must be there.
    pub required_claims: BTreeMap<String, BTreeSet<String>>,
    /// What `sub` must be.
    pub subject: Subject,
    /// What the holders of its tokens are.
    pub kind: Kind,
    /// Whose records they reach.
    pub tenant: Tenant,
    /// Whether another issuer may name the same users.
    pub shared_users: bool,
    /// Of services: what they may do.
    pub roles: BTreeSet<Role>,
    /// Of services with the role `release`: whose keys they may release.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub users: Option<Reach<UserId>>,
    /// Of services with the role `release`: which of their keys.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_names: Option<Reach<KeyName>>,
    /// Claims for policies, and the names they have there.
    pub attributes: BTreeMap<String, String>,
    /// Claims with organisations.
    pub organisation_claims: BTreeSet<String>,
    /// The claim with the device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_claim: Option<String>,
}

/// Where the keys come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum KeySource {
    /// The discovery document says where.
    Discovery(String),
    /// A key set by URL.
    Url(String),
    /// A key set in a file.
    Set(PathBuf),
    /// Public keys in a PEM file.
    Pem(PathBuf),
}

/// `[[issuer]]` as it is written.
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
    attributes: Option<BTreeMap<String, String>>,
    organisation_claims: Option<BTreeSet<String>>,
    device_claim: Option<String>,
}

const fn default_refresh_minutes() -> u32 {
    15
}

const fn default_keep_hours() -> u32 {
    24
}

/// A day.
const fn default_token_lifetime_max_minutes() -> u32 {
    1_440
}

const fn default_leeway_s() -> u32 {
    30
}

const fn default_kind() -> Kind {
    Kind::User
}

/// What a profile says where the configuration says nothing.
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
    /// Tokens of a login by password, passkey or single sign-on, and of a user's API key; of no other client.
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
            kind: written.kind,
            tenant: written.tenant,
            shared_users: written.shared_users,
            roles: written.roles,
            users: written.users,
            key_names: written.key_names,
            attributes: written.attributes.unwrap_or_else(attributes),
            organisation_claims: written
                .organisation_claims
                .unwrap_or_else(|| texts(presets.organisation_claims)),
            device_claim: written
                .device_claim
                .or_else(|| presets.device_claim.map(str::to_owned)),
        }
    }
}

impl Settings {
    /// Where the keys come from; discovery below the issuer when nothing else is written.
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
        KeySource::Discovery(self.discovery_url.clone().unwrap_or_else(|| {
            let base = self.issuer.trim_end_matches('/');
            format!("{base}/.well-known/openid-configuration")
        }))
    }

    /// What its tokens grant to services.
    pub(super) fn grant(&self) -> Grant {
        Grant {
            tenant: self.tenant.clone(),
            roles: self.roles.clone(),
            users: self.users.clone(),
            key_names: self.key_names.clone(),
        }
    }
}

/// What is wrong with a URL that keys are fetched from.
pub(super) fn url_problem(text: &str, allow_http: bool) -> Option<&'static str> {
    let Ok(url) = Url::parse(text) else {
        return Some("is not a URL");
    };
    if !url.username().is_empty() || url.password().is_some() {
        return Some("has a name or a password in it, which no key set needs");
    }
    match url.scheme() {
        "https" => None,
        "http" if allow_http => None,
        "http" => Some(
            "is plain http, so everyone on the network path could replace the keys; use https, or set \
             `allow_http = true` if that path is a network of yours",
        ),
        _ => Some("is neither https nor http"),
    }
}
