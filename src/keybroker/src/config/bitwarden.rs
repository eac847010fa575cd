//! The sections `[[bitwarden_organization]]`: the organisations whose requests of new devices `keybroker bitwarden approvals`
//! processes. `serve` does not use them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use ipnet::IpNet;
use reqwest::Url;
use serde::{Deserialize, Serialize};

use keybroker_core::{
    key::Fingerprint,
    organization::Guid,
    trusted_file::{self, Purpose},
};
use keybroker_policy::{Problems, device_approval::DeviceApprovalPolicy};

use super::range::range;

const SECTION: &str = "[[bitwarden_organization]]";
/// Beginning of the id of a personal API key. The key of an organisation cannot approve devices.
const PERSONAL: &str = "user.";
const TIMEOUT_MS: RangeInclusive<u64> = 100..=120_000;
const INTERVAL_SECONDS: RangeInclusive<u64> = 5..=86_400;
const PER_HOUR: RangeInclusive<u64> = 1..=1_000;
const NETWORKS_MAX: usize = 64;
/// The purpose of the inventory, for the check of its owner and mode.
pub(crate) const INVENTORY: Purpose =
    Purpose::trust("other users could decide which devices are known");

/// A `[[bitwarden_organization]]` section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The GUID of the organisation.
    pub id: String,
    /// URL of the server's API, such as `https://vault.example.org/api`.
    pub api_url: String,
    /// URL of the server's identity service, such as `https://vault.example.org/identity`.
    pub identity_url: String,
    /// `client_id` of the personal API key of an administrator: `user.` and a GUID.
    pub client_id: String,
    /// File with the `client_secret` of the personal API key.
    pub client_secret_file: PathBuf,
    /// SHA-256 of the organisation's public key (DER), as `key import` shows it.
    pub public_key_sha256: String,
    /// PEM file with the CA certificates that verify the server; the CAs of the system by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// Longest time for an answer of the server, in milliseconds.
    #[serde(default = "timeout_default")]
    pub timeout_ms: u64,
    /// Time between two looks of `approvals run`, in seconds.
    #[serde(default = "interval_default")]
    pub interval_seconds: u64,
    /// File with the Cedar policies that decide what `approvals run` approves; nothing by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy_file: Option<PathBuf>,
    /// File with the devices of the fleet; no device by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inventory_file: Option<PathBuf>,
    /// Highest number of requests that `approvals run` approves in an hour.
    #[serde(default = "per_hour_default")]
    pub automatic_per_hour: u32,
    /// Networks by their names in policies.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub networks: BTreeMap<String, Vec<IpNet>>,
}

const fn timeout_default() -> u64 {
    30_000
}

const fn interval_default() -> u64 {
    60
}

const fn per_hour_default() -> u32 {
    20
}

impl Settings {
    /// The identifier of the organisation; `None` if it is not a GUID.
    pub fn organization(&self) -> Option<Guid> {
        Guid::parse(&self.id)
    }

    /// The fingerprint of the organisation's public key; `None` if it is not a SHA-256.
    pub fn fingerprint(&self) -> Option<Fingerprint> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(&self.public_key_sha256, &mut bytes).ok()?;
        Some(Fingerprint(bytes))
    }

    /// The names of the networks to which an address belongs.
    pub fn networks_of(&self, address: IpAddr) -> Vec<String> {
        let address = address.to_canonical();
        let has = |networks: &Vec<IpNet>| networks.iter().any(|network| network.contains(&address));
        let named = self.networks.iter().filter(|(_, networks)| has(networks));
        named.map(|(name, _)| name.clone()).collect()
    }

    /// The files that other users must not change, each with its setting.
    pub(super) fn files(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let optional = [
            ("ca_file", &self.ca_file),
            ("policy_file", &self.policy_file),
            ("inventory_file", &self.inventory_file),
        ];
        let optional = optional
            .into_iter()
            .filter_map(|(name, path)| Some((name, path.as_deref()?)));
        [("client_secret_file", &*self.client_secret_file)]
            .into_iter()
            .chain(optional)
    }

    /// The problems of the files. The CA certificates are examined elsewhere.
    pub(super) fn file_problems(&self) -> Vec<String> {
        let secret = Purpose::secret("client secret of an API key");
        let mut found = Vec::new();
        if trusted_file::is_absolute(&self.client_secret_file) {
            let opened = trusted_file::open(&self.client_secret_file, secret);
            found.extend(
                opened
                    .err()
                    .map(|error| format!("`client_secret_file`: {error}")),
            );
        }
        if let Some(path) = &self.policy_file
            && let Err(Problems(problems)) = DeviceApprovalPolicy::load(path)
        {
            found.extend(problems.iter().map(|what| format!("`policy_file`: {what}")));
        }
        if let Some(path) = &self.inventory_file {
            let opened = trusted_file::open(path, INVENTORY);
            found.extend(
                opened
                    .err()
                    .map(|error| format!("`inventory_file`: {error}")),
            );
        }
        let place = self.place();
        found
            .into_iter()
            .map(|what| format!("{place}: {what}"))
            .collect()
    }

    /// The section with the organisation, for messages.
    pub(super) fn place(&self) -> String {
        format!("{SECTION} {:?}", self.id)
    }

    fn problems(&self) -> Vec<String> {
        let mut found = Vec::new();
        if self.organization().is_none() {
            found
                .push("`id` is not a GUID such as 4e9ee8ba-0b7a-4f5a-8dd1-5f9cbb7d2d0e".to_owned());
        }
        for (name, url) in [
            ("api_url", &self.api_url),
            ("identity_url", &self.identity_url),
        ] {
            found.extend(url_problem(url).map(|why| format!("`{name}` is {url:?}: {why}")));
        }
        let client = self.client_id.strip_prefix(PERSONAL).and_then(Guid::parse);
        if client.is_none() {
            found.push(format!(
                "`client_id` is {:?}; it must be `{PERSONAL}` and a GUID: the personal API key of an administrator who may manage \
                 account recovery. The API key of the organisation cannot approve devices",
                self.client_id
            ));
        }
        if self.fingerprint().is_none() {
            found.push(
                "`public_key_sha256` is not a SHA-256 of 64 hexadecimal digits; `keybroker key import` shows it"
                    .to_owned(),
            );
        }
        for (name, path) in self.files() {
            if !trusted_file::is_absolute(path) {
                found.push(format!("`{name}` is {}", trusted_file::not_absolute(path)));
            }
        }
        range(&mut found, "timeout_ms", self.timeout_ms, TIMEOUT_MS);
        range(
            &mut found,
            "interval_seconds",
            self.interval_seconds,
            INTERVAL_SECONDS,
        );
        range(
            &mut found,
            "automatic_per_hour",
            self.automatic_per_hour.into(),
            PER_HOUR,
        );
        if self.networks.len() > NETWORKS_MAX {
            found.push(format!("`networks` has more than {NETWORKS_MAX} names"));
        }
        let place = self.place();
        found
            .into_iter()
            .map(|what| format!("{place}: {what}"))
            .collect()
    }
}

/// Why a URL cannot be that of a server. The API key and the keys of members must not be sent in plain text.
fn url_problem(url: &str) -> Option<String> {
    let parsed = match Url::parse(url) {
        Ok(parsed) => parsed,
        Err(error) => return Some(error.to_string()),
    };
    if parsed.scheme() != "https" {
        return Some("the URL is not https".to_owned());
    }
    if !parsed.username().is_empty() || parsed.password().is_some() {
        return Some("the URL has a user name or a password".to_owned());
    }
    let is_plain = parsed.query().is_none() && parsed.fragment().is_none();
    (!is_plain).then(|| "the URL has a query or a fragment".to_owned())
}

/// The problems of all sections.
pub(super) fn problems(all: &[Settings]) -> Vec<String> {
    let mut found: Vec<String> = all.iter().flat_map(Settings::problems).collect();
    let mut ids = BTreeSet::new();
    for settings in all {
        if let Some(id) = settings.organization()
            && !ids.insert(id)
        {
            found.push(format!("{SECTION}: the organisation {id} appears twice"));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        id = "4e9ee8ba-0b7a-4f5a-8dd1-5f9cbb7d2d0e"
        api_url = "https://vault.example.org/api"
        identity_url = "https://vault.example.org/identity"
        client_id = "user.b63cd5cc-6b2e-4d0c-8b8a-1d2a1a1f5ed2"
        client_secret_file = "/etc/keybroker/bitwarden-client-secret"
        public_key_sha256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        networks = { office = ["192.0.2.0/24", "2001:db8::/32"], home = ["198.51.100.0/24"] }
    "#;

    fn settings(text: &str) -> Settings {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn a_complete_section_has_no_problem() {
        let good = settings(GOOD);
        assert_eq!(problems(std::slice::from_ref(&good)), Vec::<String>::new());
        assert_eq!(good.networks_of("192.0.2.9".parse().unwrap()), ["office"]);
        assert_eq!(
            good.networks_of("::ffff:192.0.2.9".parse().unwrap()),
            ["office"]
        );
        assert_eq!(
            good.networks_of("203.0.113.1".parse().unwrap()),
            Vec::<String>::new()
        );
        let twice = problems(&[good.clone(), good]);
        assert!(
            twice.len() == 1 && twice[0].contains("appears twice"),
            "{twice:?}"
        );
    }

    #[test]
    fn each_mistake_is_named() {
        for (old, new, word) in [
            ("4e9ee8ba-", "4e9ee8ba", "GUID"),
            (
                "https://vault.example.org/api",
                "http://vault.example.org/api",
                "not https",
            ),
            ("https://vault.example.org/api", "vault", "api_url"),
            ("/identity", "/identity?x=1", "query"),
            (
                "https://vault.example.org/identity",
                "https://a:b@vault.example.org",
                "password",
            ),
            ("user.", "organization.", "personal API key"),
            ("/etc/keybroker/bitwarden", "bitwarden", "absolute path"),
            ("e3b0", "e3", "SHA-256"),
            ("networks", "timeout_ms = 1\nnetworks", "100 to 120000"),
            ("networks", "interval_seconds = 1\nnetworks", "5 to 86400"),
            ("networks", "automatic_per_hour = 0\nnetworks", "1 to 1000"),
        ] {
            let text = GOOD.replacen(old, new, 1);
            let found = problems(&[settings(&text)]);
            assert!(
                found.len() == 1 && found[0].contains(word),
                "{new}: {found:?}"
            );
        }
        assert!(toml::from_str::<Settings>(&format!("{GOOD}\nunknown = 1")).is_err());
    }
}
