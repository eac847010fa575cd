//! The `[store]` section of the configuration: the database, its connection, and the required settings.
//!
//! The URL must not contain a password. The password is read from a file or from the environment
//! whenever a connection is opened. No field of the settings contains the password.
//!
//! Mitigation: M17 of `THREAT_MODEL.md`.

use std::{
    env, fmt, mem,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize, Serializer};
use zeroize::Zeroizing;

use keybroker_core::{
    pem,
    trusted_file::{self, Purpose},
};

use super::{
    Error, durability,
    error::Detail,
    mysql, postgres,
    socket::Socket,
    sqlite,
    url::{Place, Target, Transport, UrlError},
};

/// Longest content of a password file.
const PASSWORD_BYTES_MAX: usize = 4_096;
/// Longest `ca_file`, in bytes. The file with all CAs of a Linux distribution is about 0.3 MiB
/// long.
const AUTHORITIES_BYTES_MAX: u64 = 4 * 1024 * 1024;
const AUTHORITIES: Purpose =
    Purpose::trust("other users could decide which database server is trusted");

#[derive(Debug, thiserror::Error)]
#[error("`store.url`: {0}")]
struct InUrl(#[source] UrlError);

/// The `[store]` section of the configuration.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The URL of the database: `sqlite:/absolute/path.db`, `postgres://user@host/database` or `mysql://user@host/database`. For
    /// a local socket, add `?socket=` and an absolute path.
    pub url: Url,
    /// Users, by name or number, that may listen on the local socket of `url`, in addition to root and the broker's
    /// user. The default is a list of the users that the packages of the database server and its pooler create.
    #[serde(default)]
    pub socket_users: Option<Vec<String>>,
    /// File with the database user's password.
    #[serde(default)]
    pub password_file: Option<PathBuf>,
    /// Environment variable with the database user's password.
    #[serde(default)]
    pub password_variable: Option<String>,
    /// Whether connections use TLS with a verified server certificate, or no TLS.
    #[serde(default)]
    pub tls: Tls,
    /// PEM file with the CAs that may have issued the server's certificate.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    /// Whether the broker runs pending migrations at its start, instead of refusing to start.
    #[serde(default)]
    pub migrate_at_start: bool,
    /// Highest number of connections to a database server.
    #[serde(default = "defaults::connections_max")]
    pub connections_max: u32,
    /// Longest time for which a call waits for a connection, in milliseconds.
    #[serde(default = "defaults::acquire_timeout_ms")]
    pub acquire_timeout_ms: u64,
    /// Longest time for which a statement may run on a database server, in milliseconds.
    #[serde(default = "defaults::statement_timeout_ms")]
    pub statement_timeout_ms: u64,
    /// Longest time for which a statement waits for a lock of another transaction, in milliseconds.
    #[serde(default = "defaults::lock_timeout_ms")]
    pub lock_timeout_ms: u64,
    /// Number of days for which a superseded revision or a deleted record can be restored. `store
    /// purge` removes only revisions and records that are older than `retention_days`.
    #[serde(default = "defaults::retention_days")]
    pub retention_days: u32,
    /// Highest number of stored revisions of a record, including superseded revisions.
    #[serde(default = "defaults::revisions_max")]
    pub revisions_max: u32,
    /// Highest number of user keys of one user, including deleted user keys.
    #[serde(default = "defaults::keys_per_user_max")]
    pub keys_per_user_max: u32,
    /// Names of database settings whose values are accepted although they may lose acknowledged writes.
    #[serde(default)]
    pub accept_weaker_durability: Vec<String>,
}

/// The protection of a network connection. This setting does not apply to a local socket, which
/// needs no TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tls {
    /// TLS with a verified certificate is required.
    #[default]
    Verify,
    /// No TLS is used. Every machine on the network path can read and change all data except the
    /// content of the envelopes.
    Plaintext,
}

mod defaults {
    pub(super) fn connections_max() -> u32 {
        10
    }

    /// The default is less than a second, so that an unavailable database is detected within a second.
    pub(super) fn acquire_timeout_ms() -> u64 {
        800
    }

    pub(super) fn statement_timeout_ms() -> u64 {
        2_000
    }

    pub(super) fn lock_timeout_ms() -> u64 {
        1_000
    }

    pub(super) fn retention_days() -> u32 {
        30
    }

    pub(super) fn revisions_max() -> u32 {
        1_000
    }

    pub(super) fn keys_per_user_max() -> u32 {
        1_000
    }
}

/// The URL of a database. The text form of the URL hides the password of a URL that contains a
/// password by mistake.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Url(String);

impl<T: Into<String>> From<T> for Url {
    fn from(text: T) -> Self {
        Self(text.into())
    }
}

impl Url {
    /// The URL as configured. Use this text for connections, but not for logs.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((scheme, rest)) = self.0.split_once("://") else {
            return f.write_str(&self.0);
        };
        // Split at the last `@`, because a password can contain an `@`.
        match rest.rsplit_once('@') {
            Some((login, place)) if login.contains(':') => {
                let user = login.split(':').next().unwrap_or("");
                write!(f, "{scheme}://{user}:[hidden]@{place}")
            }
            _ => f.write_str(&self.0),
        }
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Url {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Settings {
    /// Settings for the database of `url`, with the default for every other setting.
    pub fn new(url: impl Into<Url>) -> Self {
        Self {
            url: url.into(),
            socket_users: None,
            password_file: None,
            password_variable: None,
            tls: Tls::default(),
            ca_file: None,
            migrate_at_start: false,
            connections_max: defaults::connections_max(),
            acquire_timeout_ms: defaults::acquire_timeout_ms(),
            statement_timeout_ms: defaults::statement_timeout_ms(),
            lock_timeout_ms: defaults::lock_timeout_ms(),
            retention_days: defaults::retention_days(),
            revisions_max: defaults::revisions_max(),
            keys_per_user_max: defaults::keys_per_user_max(),
            accept_weaker_durability: Vec::new(),
        }
    }

    /// The parsed location of the database.
    pub(super) fn target(&self) -> Result<Target, Error> {
        Target::parse(self.url.as_str()).map_err(|error| Error::Schema(Detail::of(InUrl(error))))
    }

    /// The local socket of the database server, if `url` contains a local socket.
    pub(super) fn socket(&self) -> Result<Option<Socket>, Error> {
        let (path, usual) = match self.target()? {
            Target::Postgres(Place {
                transport: Transport::Socket(path),
                ..
            }) => (postgres::socket_file(&path), postgres::SOCKET_USERS),
            Target::MySql(Place {
                transport: Transport::Socket(path),
                ..
            }) => (path, mysql::SOCKET_USERS),
            _ => return Ok(None),
        };
        Socket::new(path, self.socket_users.as_deref(), &usual).map(Some)
    }

    /// Checks the path of the local socket, if `url` contains a socket.
    fn check_socket(&self) -> Result<(), Error> {
        match self.socket()? {
            Some(socket) => socket.check_if_present(),
            None => Ok(()),
        }
    }

    /// The file of an embedded database; `None` for a database server.
    pub fn file(&self) -> Option<PathBuf> {
        match Target::parse(self.url.as_str()) {
            Ok(Target::Sqlite(path)) => Some(path),
            _ => None,
        }
    }

    /// All problems of the settings, each with a remedy.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        match Target::parse(self.url.as_str()) {
            Ok(_) => {}
            Err(what) => problems.push(format!("[store]: `url`: {what}")),
        }
        if self.password_file.is_some() && self.password_variable.is_some() {
            problems.push(
                "[store]: `password_file` and `password_variable` are both set; remove one of them"
                    .to_owned(),
            );
        }
        if self.tls == Tls::Plaintext && self.ca_file.is_some() {
            problems.push(
                "[store]: `ca_file` is set, but `tls = \"plaintext\"` verifies no certificate; remove one of the two \
                 settings"
                    .to_owned(),
            );
        }
        for (name, path) in [
            ("password_file", &self.password_file),
            ("ca_file", &self.ca_file),
        ] {
            if let Some(path) = path
                && !trusted_file::is_absolute(path)
            {
                problems.push(format!(
                    "[store] `{name}` is {}",
                    trusted_file::not_absolute(path)
                ));
            }
        }
        let mut range = |name: &str, value: u64, range: RangeInclusive<u64>| {
            if !range.contains(&value) {
                problems.push(format!(
                    "[store]: `{name}` is {value}; it must be {} to {}",
                    range.start(),
                    range.end()
                ));
            }
        };
        range("connections_max", self.connections_max.into(), 1..=1_000);
        range("acquire_timeout_ms", self.acquire_timeout_ms, 50..=60_000);
        range(
            "statement_timeout_ms",
            self.statement_timeout_ms,
            100..=600_000,
        );
        range("lock_timeout_ms", self.lock_timeout_ms, 100..=600_000);
        range("retention_days", self.retention_days.into(), 1..=36_500);
        // A user key that was replaced once has two revisions.
        range("revisions_max", self.revisions_max.into(), 2..=1_000_000);
        range(
            "keys_per_user_max",
            self.keys_per_user_max.into(),
            1..=1_000_000,
        );
        for name in &self.accept_weaker_durability {
            if !durability::is_known(name) {
                problems.push(format!(
                    "[store]: `accept_weaker_durability` contains {name:?}, which is not a checked setting; the checked settings are: {}",
                    durability::NAMES.join(", ")
                ));
            }
        }
        problems
    }

    /// All problems of the configured files and of the environment, each with a remedy.
    pub fn file_problems(&self) -> Vec<String> {
        let mut problems = match Target::parse(self.url.as_str()) {
            Ok(Target::Postgres(_)) => postgres::environment_problems(),
            Ok(Target::Sqlite(path)) if path.exists() => sqlite::file::check(&path)
                .err()
                .map(|error| format!("[store] `url`: {error}"))
                .into_iter()
                .collect(),
            _ => Vec::new(),
        };
        if self.target().is_ok() {
            let refused = self.check_socket().err();
            problems.extend(refused.map(|error| format!("[store] `url`: {error}")));
        }
        if self.password_file.is_some() || self.password_variable.is_some() {
            problems.extend(self.password().err().map(|error| error.to_string()));
        }
        problems.extend(self.authorities().err().map(|error| error.to_string()));
        problems
    }

    /// The password. Each call of this function reads the password again, and no field stores it.
    pub(super) fn password(&self) -> Result<Option<Zeroizing<String>>, Error> {
        if let Some(path) = &self.password_file {
            return read_password(path).map(Some);
        }
        let Some(name) = &self.password_variable else {
            return Ok(None);
        };
        let password = env::var(name).map_err(|error| {
            let what = format!("[store] `password_variable`: cannot read {name}");
            Error::Schema(
                Detail::caused(what, error)
                    .remedy("set the variable in the environment of keybroker"),
            )
        })?;
        Ok(Some(Zeroizing::new(password)))
    }

    /// The number of certificates in `ca_file`; `None` without a usable file.
    pub fn authorities_count(&self) -> Option<usize> {
        let pem = self.authorities().ok()??;
        pem::certificates(&pem)
            .ok()
            .map(|certificates| certificates.len())
    }

    /// The certificates of `ca_file` as PEM without other content. Each call of this function reads the file again.
    pub(super) fn authorities(&self) -> Result<Option<Vec<u8>>, Error> {
        let Some(path) = &self.ca_file else {
            return Ok(None);
        };
        let text = trusted_file::read(path, AUTHORITIES_BYTES_MAX, AUTHORITIES)
            .map_err(|error| Error::Schema(Detail::caused("[store] `ca_file`", error)))?;
        let certificates = pem::certificates(&text).map_err(|error| {
            let what = format!("[store] `ca_file`: {}", path.display());
            Error::Schema(Detail::caused(what, error))
        })?;
        tracing::info!(
            file = %path.display(), certificates = certificates.len(),
            "the CA certificates for the database server were read"
        );
        Ok(Some(pem::encode(&certificates).into_bytes()))
    }

    /// The settings for a command. A command has longer time limits, because no caller waits for
    /// its result.
    pub(super) fn for_command(&self) -> Self {
        const STATEMENT_MS: u64 = 60_000;
        const CONNECTION_MS: u64 = 10_000;
        Self {
            statement_timeout_ms: self.statement_timeout_ms.max(STATEMENT_MS),
            acquire_timeout_ms: self.acquire_timeout_ms.max(CONNECTION_MS),
            ..self.clone()
        }
    }

    pub(super) fn acquire_timeout(&self) -> Duration {
        Duration::from_millis(self.acquire_timeout_ms)
    }

    pub(super) fn statement_timeout(&self) -> Duration {
        Duration::from_millis(self.statement_timeout_ms)
    }
}

fn read_password(path: &Path) -> Result<Zeroizing<String>, Error> {
    let refused = |what: &str| {
        let what = format!("[store] `password_file`: {}: {what}", path.display());
        Err(Error::Schema(what.into()))
    };

    let limit = u64::try_from(PASSWORD_BYTES_MAX).expect("a small number");
    let mut bytes = trusted_file::read(path, limit, Purpose::secret("password"))
        .map_err(|error| Error::Schema(Detail::caused("[store] `password_file`", error)))?;
    let mut text = match String::from_utf8(mem::take(&mut *bytes)) {
        Ok(text) => Zeroizing::new(text),
        Err(error) => {
            drop(Zeroizing::new(error.into_bytes()));
            return refused("the password is not UTF-8");
        }
    };
    if text.starts_with('\u{feff}') {
        return refused(
            "the password begins with a UTF-8 byte order mark, which is not part of a password; save the file without \
             a byte order mark",
        );
    }
    // Remove the line break that an editor may have added at the end of the file. A password never
    // ends with a line break.
    let length = text.trim_end_matches(['\r', '\n']).len();
    text.truncate(length);
    if text.is_empty() {
        return refused("the password is empty");
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    #[test]
    fn a_password_in_the_url_is_never_shown() {
        let settings = Settings::new("postgres://me:hunter2@pw@db.example.org/keys");
        let shown = format!(
            "{settings:?} {} {} {:?}",
            settings.url,
            toml::to_string(&settings).unwrap(),
            settings.problems()
        );
        assert!(
            !shown.contains("hunter2") && !shown.contains("pw@"),
            "{shown}"
        );
        assert!(shown.contains("me:[hidden]@db.example.org"), "{shown}");
        let refused = settings.target().unwrap_err().to_string();
        assert!(
            refused.contains("password_file") && !refused.contains("hunter2"),
            "{refused}"
        );
    }

    #[test]
    fn a_password_file_that_others_can_read_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("password");
        fs::write(&path, "hunter2\n").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o604)).unwrap();
        let settings = Settings {
            password_file: Some(path.clone()),
            ..Settings::new("postgres://me@db/keys")
        };
        let refused = settings.password().unwrap_err().to_string();
        assert!(refused.contains("chmod 600"), "{refused}");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(settings.password().unwrap().unwrap().as_str(), "hunter2");
        for (content, words) in [("\n".to_owned(), "empty"), ("x".repeat(5_000), "bytes")] {
            fs::write(&path, content).unwrap();
            let refused = settings.password().unwrap_err().to_string();
            assert!(refused.contains(words), "{refused}");
        }
    }

    #[test]
    fn every_authority_of_the_database_server_counts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ca.pem");
        let authority = || {
            let key = rcgen::KeyPair::generate().unwrap();
            let parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
            parameters.self_signed(&key).unwrap().pem()
        };
        let (first, second) = (authority(), authority());
        let joined = format!("\u{feff}{}{}", first.trim_end(), second.trim_end());
        fs::write(&path, joined).unwrap();
        let settings = Settings {
            ca_file: Some(path.clone()),
            ..Settings::new("postgres://me@db/keys")
        };
        assert_eq!(settings.authorities_count(), Some(2));
        fs::write(&path, first.replace("CERTIFICATE", "TRUSTED CERTIFICATE")).unwrap();
        let problems = settings.file_problems();
        assert!(problems[0].contains("openssl x509 -in"), "{problems:?}");
        assert_eq!(settings.authorities_count(), None);
    }

    #[test]
    fn a_password_variable_that_is_not_set_is_named() {
        let settings = Settings {
            password_variable: Some("KEYBROKER_NO_SUCH_VARIABLE".to_owned()),
            ..Settings::new("mysql://me@db/keys")
        };
        let refused = settings.password().unwrap_err().to_string();
        assert!(refused.contains("KEYBROKER_NO_SUCH_VARIABLE"), "{refused}");
        assert_eq!(settings.file_problems().len(), 1);
    }
}
