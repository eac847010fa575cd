//! The URL of a database. The broker parses the URL itself, because some URL parameters of the
//! drivers disable TLS.
//!
//! Mitigation: M17 of `THREAT_MODEL.md`.

use std::{net::Ipv6Addr, path::PathBuf};

/// The problem of a URL that cannot be used. This text never contains the URL, because the URL may
/// include a password.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum UrlError {
    #[error(
        "the URL must be `sqlite:` and the absolute path of a file, `postgres://user@host/database` or \
         `mysql://user@host/database`; for a local socket, omit the host and append `?socket=` and the absolute path of \
         the socket"
    )]
    Form,
    #[error("the URL must be `sqlite:` and the absolute path of a file")]
    NotAbsolute,
    #[error(
        "the URL contains `{found}`, but a SQLite URL has no parameters: use the settings of [store]; if the path \
         contains the character, write `{encoded}`"
    )]
    FileParameters { found: char, encoded: &'static str },
    #[error(
        "the URL contains `#`, which begins a fragment and would be ignored; write `%23` if a name contains the character"
    )]
    Fragment,
    #[error("the URL has no user: write `user@` before the host")]
    NoUser,
    #[error(
        "the URL contains a password, which logs and process lists would show; set `password_file` or \
         `password_variable` instead"
    )]
    Password,
    #[error("the URL has no database name: append `/` and the name")]
    NoDatabase,
    #[error("the URL has no host and no `?socket=`")]
    NoHost,
    #[error("the URL has no host before the port")]
    NoHostBeforePort,
    #[error(
        "the URL has parameters: only `?socket=` is supported, in a URL without a host; use the settings of [store] for other options"
    )]
    ServerParameters,
    #[error("the URL has parameters other than `?socket=`")]
    SocketParameters,
    #[error("the URL has a socket path that is not absolute")]
    SocketNotAbsolute,
    #[error(
        "the URL has an IPv6 address that is not in brackets: write `[::1]`, or `[::1]:5433` with a port"
    )]
    NoBrackets,
    #[error("the text in brackets in the URL is not an IPv6 address")]
    NotIpv6,
    #[error("the URL has text after the `]` of the host: write a `:` before the port")]
    NoColon,
    #[error(
        "the URL has {0:?} in the host, but this character is not allowed in DNS names and IP addresses"
    )]
    Host(char),
    #[error("the URL has a port that is not 1 to 65535")]
    Port,
    #[error(
        "the URL has a `%` that is not followed by two hexadecimal digits, or `%` escapes that are not UTF-8"
    )]
    Encoding,
    #[error("the URL has a control character")]
    ControlCharacter,
}

/// The location of a database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// A file.
    Sqlite(PathBuf),
    /// PostgreSQL.
    Postgres(Place),
    /// MySQL or MariaDB.
    MySql(Place),
}

/// A database on a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) user: String,
    pub(super) database: String,
    pub(super) transport: Transport,
}

/// The connection between the broker and a database server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Transport {
    /// A connection over the network. A connection to a loopback address counts as a connection
    /// over the network, because any user of the machine can listen on a loopback address.
    Network { host: String, port: Option<u16> },
    /// A connection over a socket in the file system. For PostgreSQL, the path is the path of the
    /// socket's directory. For MySQL, the path is the path of the socket.
    Socket(PathBuf),
}

impl Target {
    /// Parses a URL. The error describes the required form, and does not repeat the URL.
    pub(super) fn parse(url: &str) -> Result<Self, UrlError> {
        let (scheme, rest) = url.split_once(':').ok_or(UrlError::Form)?;
        match scheme {
            "sqlite" => file(rest).map(Self::Sqlite),
            "postgres" | "postgresql" => Ok(Self::Postgres(Place::parse(rest)?)),
            "mysql" | "mariadb" => Ok(Self::MySql(Place::parse(rest)?)),
            _ => Err(UrlError::Form),
        }
    }
}

impl Place {
    fn parse(rest: &str) -> Result<Self, UrlError> {
        let rest = rest.strip_prefix("//").ok_or(UrlError::Form)?;
        if rest.contains('#') {
            return Err(UrlError::Fragment);
        }
        let (rest, query) = match rest.split_once('?') {
            Some((rest, query)) => (rest, Some(query)),
            None => (rest, None),
        };
        let (login, rest) = rest.rsplit_once('@').ok_or(UrlError::NoUser)?;
        if login.contains(':') {
            return Err(UrlError::Password);
        }
        let (host, database) = rest.split_once('/').ok_or(UrlError::NoDatabase)?;
        let transport = match (host, query) {
            ("", Some(query)) => socket(query)?,
            ("", None) => return Err(UrlError::NoHost),
            (_, Some(_)) => return Err(UrlError::ServerParameters),
            (host, None) => network(host)?,
        };
        let place = Self {
            user: decode(login)?,
            database: decode(database)?,
            transport,
        };
        if place.user.is_empty() || place.database.is_empty() || place.database.contains('/') {
            return Err(UrlError::Form);
        }
        Ok(place)
    }

    /// Whether the connection uses a local socket, so that no data leaves this machine.
    pub(super) fn is_local(&self) -> bool {
        matches!(self.transport, Transport::Socket(_))
    }

    /// The location of the database for messages, without the user name.
    pub(super) fn shown(&self) -> String {
        match &self.transport {
            Transport::Network { host, .. } => format!("{} on {host}", self.database),
            Transport::Socket(path) => format!("{} on {}", self.database, path.display()),
        }
    }
}

fn socket(query: &str) -> Result<Transport, UrlError> {
    let path = match query.split_once('=') {
        Some(("socket", path)) if !path.contains('&') => PathBuf::from(decode(path)?),
        _ => return Err(UrlError::SocketParameters),
    };
    if path.is_absolute() {
        Ok(Transport::Socket(path))
    } else {
        Err(UrlError::SocketNotAbsolute)
    }
}

/// Parses the path of a file. Parameters after the path are refused, because they would become a
/// part of the file name.
fn file(text: &str) -> Result<PathBuf, UrlError> {
    if let Some(found) = text.chars().find(|c| ['?', '#'].contains(c)) {
        let encoded = if found == '?' { "%3F" } else { "%23" };
        return Err(UrlError::FileParameters { found, encoded });
    }
    let path = PathBuf::from(decode(text)?);
    if path.is_absolute() && path.file_name().is_some() {
        Ok(path)
    } else {
        Err(UrlError::NotAbsolute)
    }
}

fn network(text: &str) -> Result<Transport, UrlError> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']').ok_or(UrlError::NoBrackets)?;
            let host = decode(host)?;
            // In a link-local address, the name of the network interface follows a `%`.
            let address = host.split('%').next().unwrap_or("");
            if address.parse::<Ipv6Addr>().is_err() {
                return Err(UrlError::NotIpv6);
            }
            let port = match port.strip_prefix(':') {
                Some(port) => Some(port),
                None if port.is_empty() => None,
                None => return Err(UrlError::NoColon),
            };
            (host, port)
        }
        None => match text.split_once(':') {
            Some((_, port)) if port.contains(':') => return Err(UrlError::NoBrackets),
            Some((host, port)) => (decode(host)?, Some(port)),
            None => (decode(text)?, None),
        },
    };
    if host.is_empty() {
        return Err(UrlError::NoHostBeforePort);
    }
    let is_of_a_host = |c: char| c.is_ascii_alphanumeric() || "._-:%".contains(c);
    if let Some(found) = host.chars().find(|c| !is_of_a_host(*c)) {
        return Err(UrlError::Host(found));
    }
    let port = match port {
        None => None,
        Some(port) => Some(
            Some(port)
                .filter(|port| port.bytes().all(|byte| byte.is_ascii_digit()))
                .and_then(|port| port.parse().ok())
                .filter(|port| *port != 0)
                .ok_or(UrlError::Port)?,
        ),
    };
    Ok(Transport::Network { host, port })
}

/// Decodes percent-encoding in a part of a URL, such as the `@` in a user name of a managed
/// database.
fn decode(text: &str) -> Result<String, UrlError> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let digits = [
                rest.next().ok_or(UrlError::Encoding)?,
                rest.next().ok_or(UrlError::Encoding)?,
            ];
            let mut decoded = [0];
            hex::decode_to_slice(digits, &mut decoded).map_err(|_| UrlError::Encoding)?;
            bytes.push(decoded[0]);
        } else {
            bytes.push(byte);
        }
    }
    let text = String::from_utf8(bytes).map_err(|_| UrlError::Encoding)?;
    if text.contains(char::is_control) {
        return Err(UrlError::ControlCharacter);
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(user: &str, database: &str, transport: Transport) -> Place {
        Place {
            user: user.to_owned(),
            database: database.to_owned(),
            transport,
        }
    }

    fn network(host: &str, port: Option<u16>) -> Transport {
        Transport::Network {
            host: host.to_owned(),
            port,
        }
    }

    #[test]
    fn each_form_is_understood() {
        let socket = |path: &str| Transport::Socket(PathBuf::from(path));
        for (url, expected) in [
            ("sqlite:/a/b.db", Target::Sqlite(PathBuf::from("/a/b.db"))),
            (
                "sqlite:/a%20b/c%3Fd%23e%25.db",
                Target::Sqlite(PathBuf::from("/a b/c?d#e%.db")),
            ),
            (
                "mysql://me@[fe80::1%25eth0]/keys",
                Target::MySql(place("me", "keys", network("fe80::1%eth0", None))),
            ),
            (
                "postgres://me@db.example.org/keys",
                Target::Postgres(place("me", "keys", network("db.example.org", None))),
            ),
            (
                "postgresql://me%40server@[::1]:6432/keys",
                Target::Postgres(place("me@server", "keys", network("::1", Some(6432)))),
            ),
            (
                "postgres://me@/keys?socket=/run/postgresql",
                Target::Postgres(place("me", "keys", socket("/run/postgresql"))),
            ),
            (
                "mysql://me@db:3307/keys",
                Target::MySql(place("me", "keys", network("db", Some(3307)))),
            ),
            (
                "mariadb://me@/keys?socket=/run/mysqld/a%20b.sock",
                Target::MySql(place("me", "keys", socket("/run/mysqld/a b.sock"))),
            ),
        ] {
            assert_eq!(Target::parse(url).unwrap(), expected, "{url}");
        }
    }

    #[test]
    fn each_mistake_has_its_message() {
        for (url, words) in [
            ("", "must be"),
            ("keys.db", "must be"),
            ("sqlite:keys.db", "absolute path"),
            ("sqlite:/a/b.db?mode=rwc", "no parameters"),
            ("sqlite:/a/b.db?mode=rwc", "%3F"),
            ("sqlite:/a/b.db#1", "%23"),
            ("sqlite:/a/b%2.db", "hexadecimal"),
            ("sqlite:/a/b%ff.db", "UTF-8"),
            ("sqlite:/a/b%00.db", "control character"),
            ("postgres://me@db/keys%00", "control character"),
            ("postgres://me@db/keys#1", "%23"),
            ("postgres://me@[::1]5433/keys", "`:` before the port"),
            ("mysql://me@[::1]x/keys", "`:` before the port"),
            ("postgres://me@[::1]:/keys", "port"),
            ("postgres://me@[::1]:+5433/keys", "port"),
            ("postgres://me@[::1/keys", "brackets"),
            ("postgres://me@::1/keys", "brackets"),
            ("postgres://me@[db]/keys", "IPv6"),
            ("postgres://me@:5433/keys", "no host"),
            ("postgres://me@local host/keys", "' ' in the host"),
            ("mysql://me@local%20host/keys", "' ' in the host"),
            ("mysql://me@%2Frun%2Fmysqld/keys", "'/' in the host"),
            ("oracle://me@db/keys", "must be"),
            ("postgres:me@db/keys", "must be"),
            ("postgres://db/keys", "no user"),
            ("postgres://me:secret@db/keys", "password_file"),
            ("postgres://me@db", "no database"),
            ("postgres://me@db/", "must be"),
            ("postgres://me@db/a/b", "must be"),
            ("postgres://me@/keys", "no host"),
            ("postgres://me@db/keys?sslmode=disable", "parameters"),
            ("postgres://me@/keys?sslmode=disable", "parameters"),
            (
                "postgres://me@/keys?socket=/a&sslmode=disable",
                "parameters",
            ),
            ("postgres://me@/keys?socket=run", "absolute"),
            ("mysql://me@db:0/keys", "port"),
            ("mysql://me@db:99999/keys", "port"),
            ("mysql://m%4@db/keys", "hexadecimal"),
            ("mysql://m%ff@db/keys", "UTF-8"),
        ] {
            let message = Target::parse(url).unwrap_err().to_string();
            assert!(message.contains(words), "{url}: {message}");
            assert!(!message.contains("secret"), "{message}");
        }
    }
}
