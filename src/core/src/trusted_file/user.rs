//! Users whose files and directories are trusted, in addition to those of root and of the user of this process.

use std::path::Path;

use super::{Error, Purpose, read};

/// The file that lists the users of this machine. A user who is only in a directory service must be specified by
/// number.
const USERS: &str = "/etc/passwd";
const USERS_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// A user whose files and directories are trusted, in addition to those of root and of the user of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    pub(super) id: u32,
    /// The user's own group, which may write to a directory in the path; unknown if `/etc/passwd` has no entry for the
    /// user.
    pub(super) group: Option<u32>,
}

impl User {
    /// The user with this name or number. If `/etc/passwd` does not have the number, the user belongs to a container or a
    /// directory service. The group of a user who is not in `/etc/passwd` is unknown, because the group with the same number can
    /// have other members on this machine.
    pub fn find(name: &str) -> Result<Option<Self>, Error> {
        let purpose = Purpose::trust("other users could choose which users are trusted");
        let users = read(Path::new(USERS), USERS_BYTES_MAX, purpose)?;
        Ok(Self::find_in(&String::from_utf8_lossy(&users), name))
    }

    pub(super) fn find_in(users: &str, name: &str) -> Option<Self> {
        let number = name.parse::<u32>().ok();
        let known = users.lines().find_map(|line| {
            let mut fields = line.split(':');
            let found = fields.next()?;
            let id = fields.nth(1)?.parse().ok()?;
            let group = Some(fields.next()?.parse().ok()?);
            (found == name || number == Some(id)).then_some(Self { id, group })
        });
        known.or(number.map(|id| Self { id, group: None }))
    }

    /// The number of the user.
    pub const fn id(self) -> u32 {
        self.id
    }
}
