//! Checks the local socket of a database server before anything is sent through it. The driver
//! sends the password in clear text if the server requests the password. Therefore a process of
//! another user must not be able to listen in place of the server.
//!
//! The path must meet the rules of `trusted_file`, but the users of the database server are also
//! accepted as owners. The listening process must run as one of the users of the database server,
//! as the broker's user or as root. In a sticky directory such as `/tmp`, another user can create a
//! socket while the server is stopped. Therefore the path of a socket in a sticky directory is
//! checked again before each use of a connection.
//!
//! Not protected: between the check and the driver's `connect`, the server may stop and another
//! user may create a socket in a sticky directory.
//!
//! Mitigation: M17 of `THREAT_MODEL.md`.

use std::path::PathBuf;

use keybroker_core::trusted_file::{self, Purpose, SocketPlace, User};
use tokio::net::UnixStream;

use super::{Error, error::Detail};

const RISK: &str =
    "other users could listen on this socket, and would receive the password of the database";

const OWNER_REMEDY: &str = "if the database server or its pooler runs as that user, name it in `store.socket_users`; otherwise correct `store.url`";

/// The remedy if none of the default users exists, as in a container.
const NO_USER_REMEDY: &str = "no default user of a database server exists here, as in most containers: if the server or its pooler runs as that user, \
     name it by its number in `store.socket_users`; otherwise correct `store.url`";

/// A socket whose path and listening process are checked.
#[derive(Clone, Debug)]
pub(super) struct Socket {
    path: PathBuf,
    users: Vec<User>,
    /// The remedy if another user owns the socket or a directory on the path, or listens on the socket.
    owner_remedy: &'static str,
}

impl Socket {
    /// Creates a socket on which only the specified users may listen. `named` contains names or
    /// numbers of users. Users in `usual` that do not exist are ignored.
    pub(super) fn new(
        path: PathBuf,
        named: Option<&[String]>,
        usual: &[&str],
    ) -> Result<Self, Error> {
        let (mut users, mut owner_remedy) = (Vec::new(), OWNER_REMEDY);
        match named {
            None => {
                for name in usual {
                    users.extend(User::find(name).map_err(refused)?);
                }
                if users.is_empty() {
                    owner_remedy = NO_USER_REMEDY;
                }
            }
            Some(names) => {
                for name in names {
                    let user = User::find(name).map_err(refused)?;
                    users.push(user.ok_or_else(|| unknown_user(name))?);
                }
            }
        }
        Ok(Self {
            path,
            users,
            owner_remedy,
        })
    }

    fn check(&self) -> Result<SocketPlace, trusted_file::Error> {
        trusted_file::check_socket(
            &self.path,
            &self.users,
            Purpose::trust_with_remedy(RISK, self.owner_remedy),
        )
    }

    /// Checks the path of the socket if it exists. A missing socket is not an error, because a
    /// configuration is often checked before the database server runs.
    pub(super) fn check_if_present(&self) -> Result<(), Error> {
        match self.check() {
            Err(error) if !error.is_missing() => Err(refused(error)),
            _ => Ok(()),
        }
    }

    /// Checks the path and the process that listens, with a separate connection through which nothing is sent.
    pub(super) async fn check_listener(&self) -> Result<SocketPlace, Error> {
        let place = self.check().map_err(|error| {
            if error.is_missing() {
                Error::Down(
                    Detail::of(error)
                        .remedy("check `store.url`, and check whether the database server runs"),
                )
            } else {
                refused(error)
            }
        })?;
        let shown = self.path.display();
        let unreachable = |error: std::io::Error| {
            let detail = Detail::caused(format!("cannot connect to {shown}"), error);
            Error::Down(detail.remedy("check whether the database server runs"))
        };
        let connection = UnixStream::connect(&self.path).await.map_err(unreachable)?;
        let listener = connection.peer_cred().map_err(unreachable)?.uid();
        let ours = rustix::process::geteuid().as_raw();
        if listener == 0 || listener == ours || self.users.iter().any(|user| user.id() == listener)
        {
            return Ok(place);
        }
        let what = format!(
            "the process that listens on {shown} runs as user {listener}, who is not trusted: the process would receive the password of \
             the database"
        );
        Err(Error::Schema(Detail::from(what).remedy(self.owner_remedy)))
    }

    /// Checks the path again. A missing socket is treated as a lost connection, because the server may be restarting.
    pub(super) fn check_again(&self) -> Result<(), Error> {
        match self.check() {
            Ok(_) => Ok(()),
            Err(error) if error.is_missing() => Err(Error::Disconnected(Detail::of(error))),
            Err(error) => Err(Error::Down(Detail::of(error))),
        }
    }
}

fn refused(error: trusted_file::Error) -> Error {
    Error::Schema(Detail::of(error))
}

fn unknown_user(name: &str) -> Error {
    let what = format!("`store.socket_users` contains {name:?}, but /etc/passwd has no such user");
    Error::Schema(Detail::from(what).remedy("correct the name, or use the user's number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A container rarely has the users of the packages. Therefore the message in a container must
    /// not suggest such a user name.
    #[test]
    fn a_refusal_says_that_no_default_user_exists() {
        let remedy = |named: Option<&[String]>, usual: &[&str]| {
            let socket = Socket::new(PathBuf::from("/run/socket"), named, usual).unwrap();
            socket.owner_remedy
        };
        let none = ["keybroker-no-such-user"];
        assert_eq!(remedy(None, &none), NO_USER_REMEDY);
        assert_eq!(
            remedy(None, &["keybroker-no-such-user", "root"]),
            OWNER_REMEDY
        );
        assert_eq!(remedy(Some(&["999".to_owned()]), &none), OWNER_REMEDY);
    }
}
