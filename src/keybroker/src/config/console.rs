//! The section `[console]`: the page for approvers, and how they sign in.

use std::{collections::BTreeSet, path::PathBuf, time::Duration};

use reqwest::Url;
use serde::{Deserialize, Serialize};

use keybroker_api::console;
use keybroker_auth::{issuer, sign_in};
use keybroker_core::{principal::Role, trusted_file};

use super::range::range;

/// The path of the page to which the provider sends the browser back.
const CALLBACK: &str = "/callback";
/// Longest client id, in bytes.
const CLIENT_ID_BYTES_MAX: usize = 255;
/// Longest session, in minutes: eight hours.
const SESSION_MINUTES_MAX: u64 = 8 * 60;
/// Longest time between the authentication and an approval, in minutes.
const REAUTHENTICATION_MINUTES_MAX: u64 = 60;

/// The `[console]` section of the configuration.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Name of the `[[issuer]]` at which approvers sign in.
    pub issuer: String,
    /// The id of the page as a client of the provider.
    pub client_id: String,
    /// File with the secret of the client. Without this setting, the page is a public client, which has only PKCE.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_secret_file: Option<PathBuf>,
    /// The address of the page in the browser: `https://host` or `https://host:port`.
    pub external_url: String,
    /// The scopes that are requested from the provider.
    #[serde(default = "default_scopes")]
    pub scopes: BTreeSet<String>,
    /// The authorization endpoint of the provider, if it is not in the discovery document.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authorization_url: Option<String>,
    /// The token endpoint of the provider, if it is not in the discovery document.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_url: Option<String>,
    /// Time in minutes after which a session ends, 1 to 480.
    #[serde(default = "default_session_minutes")]
    pub session_minutes: u32,
    /// Time in minutes without a request after which a session ends, 1 to 480.
    #[serde(default = "default_idle_minutes")]
    pub idle_minutes: u32,
    /// Time in minutes after a sign-in with credentials within which an approver can approve, 1 to 60.
    #[serde(default = "default_reauthentication_minutes")]
    pub reauthentication_minutes: u32,
}

fn default_scopes() -> BTreeSet<String> {
    BTreeSet::from(["openid".to_owned()])
}

const fn default_session_minutes() -> u32 {
    60
}

const fn default_idle_minutes() -> u32 {
    15
}

const fn default_reauthentication_minutes() -> u32 {
    10
}

fn minutes(count: u32) -> Duration {
    Duration::from_mins(count.into())
}

impl Settings {
    /// The registration at the provider.
    pub fn registration(&self) -> sign_in::Settings {
        sign_in::Settings {
            issuer: self.issuer.clone(),
            client_id: self.client_id.clone(),
            client_secret_file: self.client_secret_file.clone(),
            redirect_url: format!("{}{CALLBACK}", self.external_url),
            scopes: self.scopes.clone(),
            authorization_url: self.authorization_url.clone(),
            token_url: self.token_url.clone(),
        }
    }

    /// The settings of the page.
    pub fn page(&self) -> console::Settings {
        console::Settings {
            origin: self.external_url.clone(),
            idle: minutes(self.idle_minutes),
            lifetime: minutes(self.session_minutes),
            reauthentication: minutes(self.reauthentication_minutes),
        }
    }

    /// The problems of the section.
    pub(super) fn problems(&self, issuers: &[issuer::Settings]) -> Vec<String> {
        let mut problems = Vec::new();
        problems.extend(self.issuer_problem(issuers));
        problems.extend(self.endpoint_problems(issuers));
        if !(1..=CLIENT_ID_BYTES_MAX).contains(&self.client_id.len()) {
            problems.push(format!(
                "[console]: `client_id` must have 1 to {CLIENT_ID_BYTES_MAX} bytes"
            ));
        }
        if !is_origin(&self.external_url) {
            problems.push(format!(
                "[console]: `external_url` is {:?}; write the address that browsers show, `https://host` or \
                 `https://host:port` in lower case, without a path and without a slash at the end",
                self.external_url
            ));
        }
        if !self.scopes.contains("openid") {
            problems.push(
                "[console]: `scopes` must contain \"openid\", because the provider otherwise issues no ID token"
                    .to_owned(),
            );
        }
        if let Some(path) = &self.client_secret_file
            && !trusted_file::is_absolute(path)
        {
            problems.push(format!(
                "[console]: `client_secret_file` is {}",
                trusted_file::not_absolute(path)
            ));
        }
        let limits = [
            ("session_minutes", self.session_minutes, SESSION_MINUTES_MAX),
            ("idle_minutes", self.idle_minutes, SESSION_MINUTES_MAX),
            (
                "reauthentication_minutes",
                self.reauthentication_minutes,
                REAUTHENTICATION_MINUTES_MAX,
            ),
        ];
        for (name, value, max) in limits {
            let name = format!("[console] {name}");
            range(&mut problems, &name, value.into(), 1..=max);
        }
        problems
    }

    fn issuer_problem(&self, issuers: &[issuer::Settings]) -> Option<String> {
        let issuer = issuers.iter().find(|issuer| issuer.name == self.issuer);
        let Some(issuer) = issuer else {
            return Some(format!(
                "[console]: `issuer` is {:?}, but no [[issuer]] has this `name`",
                self.issuer
            ));
        };
        if issuer.can_give(Role::Approver) {
            return None;
        }
        Some(format!(
            "[console]: no person could use the page, because no [[issuer.mapping]] of the issuer {:?} gives the role \
             `approver`",
            self.issuer
        ))
    }

    fn endpoint_problems(&self, issuers: &[issuer::Settings]) -> Vec<String> {
        let issuer = issuers.iter().find(|issuer| issuer.name == self.issuer);
        let allow_http = issuer.is_some_and(|issuer| issuer.allow_http);
        let urls = [
            ("authorization_url", &self.authorization_url),
            ("token_url", &self.token_url),
        ];
        let problems = urls.into_iter().filter_map(|(name, url)| {
            let url = url.as_ref()?;
            let problem = sign_in::endpoint_problem(url, allow_http)?;
            Some(format!("[console]: `{name}` is {url:?}, but {problem}"))
        });
        problems.collect()
    }
}

/// Whether a text is an origin with HTTPS exactly as browsers send it.
fn is_origin(text: &str) -> bool {
    Url::parse(text).is_ok_and(|url| {
        url.scheme() == "https"
            && url.host_str().is_some()
            && url.origin().ascii_serialization() == text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        toml::from_str(
            "issuer = \"sso\"\nclient_id = \"page\"\nexternal_url = \"https://approvers.example.org\"",
        )
        .unwrap()
    }

    #[test]
    fn the_address_is_an_origin() {
        for (url, is_good) in [
            ("https://approvers.example.org", true),
            ("https://approvers.example.org:8443", true),
            ("https://[::1]:8443", true),
            ("https://approvers.example.org/", false),
            ("https://approvers.example.org:443", false),
            ("https://Approvers.example.org", false),
            ("https://approvers.example.org/page", false),
            ("https://me@approvers.example.org", false),
            ("http://approvers.example.org", false),
            ("approvers.example.org", false),
            ("https://", false),
        ] {
            assert_eq!(is_origin(url), is_good, "{url}");
        }
    }

    #[test]
    fn every_limit_is_checked() {
        let wrong = Settings {
            client_id: String::new(),
            external_url: "https://x/".to_owned(),
            scopes: BTreeSet::from(["groups".to_owned()]),
            client_secret_file: Some("secret".into()),
            session_minutes: 481,
            idle_minutes: 0,
            reauthentication_minutes: 61,
            ..settings()
        };
        assert_eq!(wrong.problems(&[]).len(), 8, "{:?}", wrong.problems(&[]));
        assert_eq!(settings().problems(&[]).len(), 1);
    }

    #[test]
    fn an_endpoint_has_tls_unless_it_is_on_this_host() {
        let issuers = |allow_http: bool| {
            let lines = format!(
                "name = \"sso\"\nissuer = \"https://login.example.org\"\nallow_http = {allow_http}"
            );
            [toml::from_str::<issuer::Settings>(&lines).unwrap()]
        };
        for (url, allow_http, words) in [
            ("https://login.example.org/token", false, None),
            ("http://127.0.0.1:8080/token", true, None),
            (
                "http://127.0.0.1:8080/token",
                false,
                Some("set `allow_http = true`"),
            ),
            ("http://localhost:8080/token", true, Some("use https")),
            ("http://login.example.org/token", false, Some("use https")),
            ("http://login.example.org/token", true, Some("use https")),
            ("login.example.org", true, Some("not a URL")),
        ] {
            let settings = Settings {
                authorization_url: Some(url.to_owned()),
                token_url: Some(url.to_owned()),
                ..settings()
            };
            let problems = settings.problems(&issuers(allow_http));
            for name in ["authorization_url", "token_url"] {
                let setting = format!("`{name}` is \"{url}\"");
                let problem = problems.iter().find(|one| one.contains(&setting));
                match words {
                    None => assert!(problem.is_none(), "{url}: {problems:?}"),
                    Some(words) => assert!(
                        problem.is_some_and(|problem| problem.contains(words)),
                        "{url}: {problems:?}"
                    ),
                }
            }
        }
    }

    #[test]
    fn the_provider_sends_the_browser_to_the_page() {
        let registration = settings().registration();
        assert_eq!(
            registration.redirect_url,
            "https://approvers.example.org/callback"
        );
    }
}
