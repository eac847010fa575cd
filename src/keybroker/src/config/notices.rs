//! The section `[notices]`: where notices to members are sent, and how they are signed.

use std::{
    collections::BTreeSet,
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use aws_lc_rs::hmac;
use base64ct::{Base64, Encoding as _};
use reqwest::{Certificate, Url};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::https;
use keybroker_broker::NoticeEvent;
use keybroker_core::{
    loopback::is_loopback_host,
    trusted_file::{self, Purpose},
};

use super::range::{range, wide};

/// Longest time for an answer of the receiver, in milliseconds.
const TIMEOUT_MS: RangeInclusive<u64> = 100..=60_000;
/// Attempts to deliver one notice.
const ATTEMPTS: RangeInclusive<u64> = 1..=10;
/// Pause before the second attempt, in milliseconds.
const RETRY_AFTER_MS: RangeInclusive<u64> = 10..=60_000;
/// Notices that wait for their delivery.
const WAITING: RangeInclusive<u64> = 1..=100_000;

/// The prefix of a secret in text form, as the Standard Webhooks specification states it.
const SECRET_PREFIX: &str = "whsec_";
/// Length of a secret in bytes, as the specification states it.
const SECRET_BYTES: RangeInclusive<usize> = 24..=64;
/// Largest number of secrets: the current secret, and the next or the previous one.
const SECRETS_MAX: usize = 2;
/// Longest secret file, in bytes.
const SECRET_FILE_BYTES_MAX: u64 = 1_024;
const SECRET: Purpose = Purpose::secret("secret of a webhook");
const AUTHORITIES: Purpose = Purpose::trust("other users could decide who receives the notices");

/// The `[notices]` section of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// URL of the receiver: https, or http to a loopback address.
    pub url: String,
    /// File with the secret that signs the notices. While the secret is replaced, the file has two lines.
    pub secret_file: PathBuf,
    /// The events about which notices are sent, by name.
    #[serde(default = "all_events")]
    pub events: BTreeSet<String>,
    /// PEM file with the CA certificates that verify the receiver; the CAs of the system by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// Longest time for an answer of the receiver, in milliseconds.
    #[serde(default = "timeout_default")]
    pub timeout_ms: u64,
    /// Attempts to deliver one notice.
    #[serde(default = "attempts_default")]
    pub attempts_max: u32,
    /// Pause before the second attempt, in milliseconds. Each further pause is four times as long, up to five minutes.
    #[serde(default = "retry_default")]
    pub retry_after_ms: u64,
    /// Notices that may wait for their delivery.
    #[serde(default = "waiting_default")]
    pub waiting_max: usize,
}

fn all_events() -> BTreeSet<String> {
    let names = NoticeEvent::ALL.map(NoticeEvent::as_str);
    names.map(str::to_owned).into()
}

const fn timeout_default() -> u64 {
    15_000
}

const fn attempts_default() -> u32 {
    6
}

const fn retry_default() -> u64 {
    1_000
}

const fn waiting_default() -> usize {
    1_000
}

/// An error of a file of the section.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The secret file cannot be read, or other users can read it.
    #[error("[notices] `secret_file`: {0}")]
    SecretFile(#[source] trusted_file::Error),
    /// The secret file has other text.
    #[error("[notices] `secret_file`: {}: {problem}", path.display())]
    Secret {
        /// The path of the file.
        path: PathBuf,
        /// What is wrong. The text of the file is not shown.
        problem: &'static str,
    },
    /// The file with CA certificates cannot be used.
    #[error("[notices] `ca_file` {}: {problem}", path.display())]
    Authorities {
        /// The path of the file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

impl Settings {
    /// The events about which notices are sent.
    pub fn known_events(&self) -> BTreeSet<NoticeEvent> {
        let names = self.events.iter();
        names.filter_map(|name| NoticeEvent::parse(name)).collect()
    }

    /// Reads the secrets that sign the notices: one, or two while a secret is replaced.
    pub fn secrets(&self) -> Result<Vec<hmac::Key>, FileError> {
        let path = &self.secret_file;
        let text = trusted_file::read(path, SECRET_FILE_BYTES_MAX, SECRET)
            .map_err(FileError::SecretFile)?;
        secrets_in(&text).map_err(|problem| FileError::Secret {
            path: path.clone(),
            problem,
        })
    }

    /// Reads the CA certificates that verify the receiver; `None` for the CAs of the system.
    pub fn authorities(&self) -> Result<Option<Vec<Certificate>>, FileError> {
        let read = |path: &PathBuf| {
            https::authorities(path, AUTHORITIES).map_err(|problem| FileError::Authorities {
                path: path.clone(),
                problem,
            })
        };
        self.ca_file.as_ref().map(read).transpose()
    }

    /// The files that other users must not change, each with its setting.
    fn files(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let authorities = self.ca_file.as_deref().map(|path| ("ca_file", path));
        std::iter::once(("secret_file", self.secret_file.as_path())).chain(authorities)
    }

    /// The problems of the files. The CA certificates are examined elsewhere.
    pub(super) fn file_problem(&self) -> Option<String> {
        if !trusted_file::is_absolute(&self.secret_file) {
            // Reported as a problem of the settings.
            return None;
        }
        self.secrets().err().map(|error| error.to_string())
    }

    /// The problems of the section.
    pub(super) fn problems(&self) -> Vec<String> {
        let mut found = Vec::new();
        let why = url_problem(&self.url);
        // The URL may contain a secret of the receiver, so it is not shown.
        found.extend(why.map(|why| format!("`url`: {why}")));
        for (name, path) in self.files() {
            if !trusted_file::is_absolute(path) {
                found.push(format!("`{name}` is {}", trusted_file::not_absolute(path)));
            }
        }
        let known = all_events();
        for event in self.events.difference(&known) {
            let known: Vec<&str> = known.iter().map(String::as_str).collect();
            found.push(format!(
                "`events` has {event:?}; the events are {}",
                known.join(", ")
            ));
        }
        if self.events.is_empty() {
            found.push(
                "`events` is empty, so no notice is sent; name at least one event, or remove the section"
                    .to_owned(),
            );
        }
        range(&mut found, "timeout_ms", self.timeout_ms, TIMEOUT_MS);
        range(
            &mut found,
            "attempts_max",
            self.attempts_max.into(),
            ATTEMPTS,
        );
        range(
            &mut found,
            "retry_after_ms",
            self.retry_after_ms,
            RETRY_AFTER_MS,
        );
        range(&mut found, "waiting_max", wide(self.waiting_max), WAITING);
        let found = found.into_iter();
        found.map(|what| format!("[notices]: {what}")).collect()
    }
}

/// Why a URL cannot be that of a receiver. Notices say who uses which devices, so they must not be sent in plain text.
fn url_problem(url: &str) -> Option<&'static str> {
    let Ok(parsed) = Url::parse(url) else {
        return Some("the value is not a URL");
    };
    if !parsed.username().is_empty() || parsed.password().is_some() {
        return Some("the URL has a user name or a password; the receiver verifies the signature");
    }
    if parsed.fragment().is_some() {
        return Some("the URL has a fragment, which is never sent");
    }
    match parsed.scheme() {
        "https" => None,
        "http" if parsed.host_str().is_some_and(is_loopback_host) => None,
        "http" => Some(
            "the URL is plain http, so everyone on the network path could read the notices; use https, or a loopback \
             address such as http://127.0.0.1:8080",
        ),
        _ => Some("the URL is neither https nor http"),
    }
}

/// The secrets in the text of a secret file.
fn secrets_in(text: &[u8]) -> Result<Vec<hmac::Key>, &'static str> {
    let text = std::str::from_utf8(text).map_err(|_| "the file is not UTF-8")?;
    let lines = text.lines().filter(|line| !line.is_empty());
    let secrets: Vec<hmac::Key> = lines.map(secret_in).collect::<Result<_, _>>()?;
    match secrets.len() {
        0 => Err("the file has no secret"),
        1..=SECRETS_MAX => Ok(secrets),
        _ => Err("the file has more than two secrets"),
    }
}

fn secret_in(line: &str) -> Result<hmac::Key, &'static str> {
    let encoded = line.strip_prefix(SECRET_PREFIX).ok_or(
        "a secret must begin with `whsec_`; make one with `printf 'whsec_%s\\n' \"$(openssl rand -base64 32)\"`",
    )?;
    let decoded = Base64::decode_vec(encoded);
    let bytes = Zeroizing::new(decoded.map_err(|_| "the text after `whsec_` is not base64")?);
    if SECRET_BYTES.contains(&bytes.len()) {
        Ok(hmac::Key::new(hmac::HMAC_SHA256, &bytes))
    } else {
        Err("a secret must have 24 to 64 bytes")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(edit: &str) -> Settings {
        let text =
            format!("url = \"https://hooks.example.org/k\"\nsecret_file = \"/secret\"\n{edit}");
        toml::from_str(&text).unwrap()
    }

    #[test]
    fn each_mistake_has_its_message() {
        assert_eq!(settings("").problems(), Vec::<String>::new());
        assert_eq!(settings("").known_events(), NoticeEvent::ALL.into());
        for (edit, expected) in [
            ("events = []", "`events` is empty"),
            ("events = [\"device.found\"]", "\"device.found\""),
            ("ca_file = \"ca.pem\"", "`ca_file` is"),
            ("timeout_ms = 99", "`timeout_ms` is 99"),
            ("attempts_max = 11", "1 to 10"),
            ("retry_after_ms = 9", "10 to 60000"),
            ("waiting_max = 0", "1 to 100000"),
        ] {
            let found = settings(edit).problems();
            assert_eq!(found.len(), 1, "{found:?}");
            assert!(found[0].contains(expected), "{found:?}");
        }
    }

    #[test]
    fn plain_http_is_only_for_loopback_addresses() {
        for (url, is_good) in [
            ("https://hooks.example.org/k?tenant=1", true),
            ("http://127.0.0.1:8080/", true),
            ("http://127.1.2.3", true),
            ("http://[::1]:8080/k", true),
            ("http://localhost:8080/", false),
            ("http://127.0.0.1.example.org/", false),
            ("http://192.0.2.1/", false),
            ("http://[2001:db8::1]/", false),
            ("https://name@hooks.example.org/", false),
            ("https://hooks.example.org/#k", false),
            ("ftp://127.0.0.1/", false),
            ("hooks.example.org", false),
        ] {
            assert_eq!(url_problem(url).is_none(), is_good, "{url}");
        }
    }

    #[test]
    fn a_secret_file_has_one_or_two_good_secrets() {
        let good = format!("whsec_{}", Base64::encode_string(&[7; 32]));
        let short = format!("whsec_{}", Base64::encode_string(&[7; 23]));
        let long = format!("whsec_{}", Base64::encode_string(&[7; 65]));
        for (text, count) in [
            (format!("{good}\n"), Some(1)),
            (format!("{good}\n\n{good}\n"), Some(2)),
            (format!("{good}\n{good}\n{good}\n"), None),
            (short, None),
            (long, None),
            (String::new(), None),
            ("whsec_?".to_owned(), None),
            (Base64::encode_string(&[7; 32]), None),
        ] {
            let found = secrets_in(text.as_bytes());
            assert_eq!(found.ok().map(|keys| keys.len()), count, "{text:?}");
        }
    }
}
