//! The URL of a database. Parsed here and not by the driver: a driver's parameters include those that switch TLS off.
//!
//! Mitigation: M17 of `THREAT_MODEL.md`.

use std::path::PathBuf;

const FORMS: &str = "must be `sqlite:` and the absolute path of a file, `postgres://user@host/database` or \
                     `mysql://user@host/database`; for a local socket without a host and with `?socket=` and its \
                     absolute path";

/// Where a database is.
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
    pub(super) door: Door,
}

/// How a server is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Door {
    /// Over the network, which a loopback address counts as: any user of the machine can listen there.
    Network { host: String, port: Option<u16> },
    /// A socket in the file system: the directory for PostgreSQL, the socket itself for MySQL.
    Socket(PathBuf),
}

impl Target {
    /// The error says what the URL must be, and does not repeat it.
    pub(super) fn parse(url: &str) -> Result<Self, String> {
        let (scheme, rest) = url.split_once(':').ok_or(FORMS)?;
        match scheme {
            "sqlite" => {
                let path = PathBuf::from(rest);
                if path.is_absolute() && path.file_name().is_some() {
                    Ok(Self::Sqlite(path))
                } else {
                    Err("must be `sqlite:` and the absolute path of a file".to_owned())
                }
            }
            "postgres" | "postgresql" => Ok(Self::Postgres(Place::parse(rest)?)),
            "mysql" | "mariadb" => Ok(Self::MySql(Place::parse(rest)?)),
            _ => Err(FORMS.to_owned()),
        }
    }
}

impl Place {
    fn parse(rest: &str) -> Result<Self, String> {
        let rest = rest.strip_prefix("//").ok_or(FORMS)?;
        let (rest, query) = match rest.split_once('?') {
            Some((rest, query)) => (rest, Some(query)),
            None => (rest, None),
        };
        let (login, rest) = rest
            .rsplit_once('@')
            .ok_or("names no user: write `user@` before the host")?;
        if login.contains(':') {
            return Err(
                "has a password in it, where logs and process lists would show it; put it into a file named by \
                 `password_file`, or into an environment variable named by `password_variable`"
                    .to_owned(),
            );
        }
        let (host, database) = rest
            .split_once('/')
            .ok_or("names no database: end it with `/` and the name")?;
        let door = match (host, query) {
            ("", Some(query)) => socket(query)?,
            ("", None) => return Err("names no host, and no `?socket=`".to_owned()),
            (_, Some(_)) => {
                return Err(
                    "has parameters: there is only `?socket=`, without a host; the rest is in the fields of [store]"
                        .to_owned(),
                );
            }
            (host, None) => network(host)?,
        };
        let place = Self {
            user: decode(login)?,
            database: decode(database)?,
            door,
        };
        if place.user.is_empty() || place.database.is_empty() || place.database.contains('/') {
            return Err(FORMS.to_owned());
        }
        Ok(place)
    }

    /// Whether what is sent stays inside the machine's kernel.
    pub(super) fn is_local(&self) -> bool {
        matches!(self.door, Door::Socket(_))
    }

    /// For people: where it is, without the user.
    pub(super) fn shown(&self) -> String {
        match &self.door {
            Door::Network { host, .. } => format!("{} on {host}", self.database),
            Door::Socket(path) => format!("{} on {}", self.database, path.display()),
        }
    }
}

fn socket(query: &str) -> Result<Door, String> {
    let path = match query.split_once('=') {
        Some(("socket", path)) if !path.contains('&') => PathBuf::from(decode(path)?),
        _ => return Err("has parameters other than `?socket=`".to_owned()),
    };
    if path.is_absolute() {
        Ok(Door::Socket(path))
    } else {
        Err("names a socket that is not an absolute path".to_owned())
    }
}

fn network(text: &str) -> Result<Door, String> {
    let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        // IPv6: its colons are not before a port.
        Some((host, port)) => (host, port.strip_prefix(':')),
        None => match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    let port = match port {
        None => None,
        Some(port) => Some(
            port.parse()
                .ok()
                .filter(|port| *port != 0)
                .ok_or("has a port that is not 1 to 65535")?,
        ),
    };
    Ok(Door::Network {
        host: decode(host)?,
        port,
    })
}

/// Undoes percent-encoding: users of managed databases have an `@` in their names.
fn decode(text: &str) -> Result<String, String> {
    let bad = || "has a `%` that is not followed by two hexadecimal digits of UTF-8".to_owned();
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let digits = [rest.next().ok_or_else(bad)?, rest.next().ok_or_else(bad)?];
            let mut decoded = [0];
            hex::decode_to_slice(digits, &mut decoded).map_err(|_| bad())?;
            bytes.push(decoded[0]);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).map_err(|_| bad())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(user: &str, database: &str, door: Door) -> Place {
        Place {
            user: user.to_owned(),
            database: database.to_owned(),
            door,
        }
    }

    fn network(host: &str, port: Option<u16>) -> Door {
        Door::Network {
            host: host.to_owned(),
            port,
        }
    }

    #[test]
    fn each_form_is_understood() {
        let socket = |path: &str| Door::Socket(PathBuf::from(path));
        for (url, expected) in [
            ("sqlite:/a/b.db", Target::Sqlite(PathBuf::from("/a/b.db"))),
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
            let message = Target::parse(url).unwrap_err();
            assert!(message.contains(words), "{url}: {message}");
            assert!(!message.contains("secret"), "{message}");
        }
    }
}
