//! Opens the files and directories that decide who is trusted, what is loaded and what is configured, and the files that contain
//! a secret.
//!
//! A file is accepted only if no other user can change or replace it. The path is resolved from the
//! root directory, one component at a time, through descriptors. This module resolves symbolic
//! links itself, instead of the kernel. Therefore every directory in the path is examined, and no
//! component can be replaced between the examination and the use. These rules apply:
//!
//! - Each directory belongs to root or to the user of this process, and neither its group nor
//!   others can write to it. Two kinds of directory that others can write to are also accepted. In
//!   a sticky directory (`/tmp`, or a Secret that Kubernetes mounts), other users cannot rename or
//!   remove entries of root or of the user of this process. Therefore only entries of root or of
//!   the user of this process are accepted, and a file with several hard links is refused. In a
//!   read-only mount of a container, no process that can access the mount can change its files.
//!
//! - The file is a regular file. A FIFO, a device or a socket is refused, and the error says what the file is. The file is opened
//!   without blocking, so that a FIFO cannot hang the process. The file is examined and read through the same descriptor.
//!
//! - The file belongs to root or to the user of this process, and neither its group nor others can write to it. Other
//!   users cannot read a file that contains a secret. If a secret belongs to root, its group may read it, because root
//!   chose the group (systemd credentials, Kubernetes Secrets with `fsGroup`).
//!
//! A read-only mount is accepted as protection only in a container, and only if its file system is
//! not the file system of the root directory. On a machine with systemd, no read-only mount is
//! accepted. With settings such as `ProtectSystem=strict`, the host's file systems are read-only
//! for the service, but other users of the host can still write to them. The front tells its
//! workers whether read-only mounts are accepted.
//!
//! A FUSE mount is never accepted as read-only, because the process that implements the mount
//! controls the content and owners of its files. A FUSE mount of another user is refused. For a
//! socket, no read-only mount is accepted, because the process that listens can write to the
//! directory.
//!
//! The rules of this module also apply to the path of another program's socket, but the users of
//! that program are also accepted as owners ([`check_socket`]). The directories above a file that
//! this process writes must also meet the rules of this module, but their groups may have the write
//! permission ([`check_above`]).
//!
//! Mitigation: M15 of `THREAT_MODEL.md`.

use std::{
    env,
    fs::File,
    io::Read as _,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use rustix::fs::FileType;
use zeroize::Zeroizing;

mod error;
mod mount;
mod purpose;
#[cfg(test)]
mod tests;
mod user;
mod walk;

pub use error::Error;
pub use mount::{ignore_read_only_mounts, read_only_mounts_count};
pub use purpose::Purpose;
pub use user::User;

use error::Problem;
use walk::{Target, WRITABLE_BY_ALL, Walk, kind_of};

/// First component of a path to a systemd credential.
const CREDENTIALS_DIRECTORY: &str = "$CREDENTIALS_DIRECTORY";
const CREDENTIALS_VARIABLE: &str = "CREDENTIALS_DIRECTORY";
/// The UID of the superuser.
const ROOT: u32 = 0;
const READABLE_BY_GROUP: u32 = 0o040;
const READABLE_BY_OTHERS: u32 = 0o044;
/// Smallest buffer that is reserved for a file, in bytes, unless the limit of the caller is smaller.
const RESERVED_BYTES_MAX: u64 = 64 * 1024;

/// Whether a path is absolute or refers to a systemd credential. Other paths are refused, because
/// the working directory of a service is not fixed.
pub fn is_absolute(path: &Path) -> bool {
    path.is_absolute() || path.starts_with(CREDENTIALS_DIRECTORY)
}

/// The error text for a path in the configuration that is not absolute.
pub fn not_absolute(path: &Path) -> String {
    let tilde = if path.starts_with("~") {
        "; `~` is not expanded"
    } else {
        ""
    };
    format!(
        "{:?}: the value must be an absolute path, because the working directory of a service is not fixed{tilde}",
        path.display().to_string()
    )
}

/// Replaces `$CREDENTIALS_DIRECTORY` at the start of a path with the directory that systemd passes to the service.
pub fn expand(path: &Path) -> Result<PathBuf, Error> {
    let Ok(name) = path.strip_prefix(CREDENTIALS_DIRECTORY) else {
        return Ok(path.to_owned());
    };
    match env::var_os(CREDENTIALS_VARIABLE) {
        Some(directory) => Ok(Path::new(&directory).join(name)),
        None => Err(Error {
            path: path.into(),
            component: path.into(),
            purpose: Purpose::trust(""),
            problem: Box::new(Problem::NoCredentials),
        }),
    }
}

/// Checks a file and the directories above it, and opens the file for reading.
pub fn open(path: &Path, purpose: Purpose) -> Result<File, Error> {
    let expanded = expand(path)?;
    let walk = Walk::new(&expanded, purpose);
    walk.open_file().map(|(file, _)| file)
}

/// Checks a file and the directories above it, and reads the complete file. The file may have at
/// most `bytes_max` bytes. The bytes are overwritten when they are dropped.
pub fn read(path: &Path, bytes_max: u64, purpose: Purpose) -> Result<Zeroizing<Vec<u8>>, Error> {
    let expanded = expand(path)?;
    let walk = Walk::new(&expanded, purpose);
    let (file, at) = walk.open_file()?;
    let failed = |problem| walk.error(&at, problem);
    let meta = file
        .metadata()
        .map_err(|error| failed(Problem::Io(error)))?;
    if meta.len() > bytes_max {
        return Err(failed(Problem::TooLong(bytes_max)));
    }
    // Reserve the full capacity now: a vector that grows leaves copies that are not overwritten.
    let reserved = meta.len().max(RESERVED_BYTES_MAX.min(bytes_max)) + 1;
    let mut bytes = Zeroizing::new(Vec::with_capacity(
        usize::try_from(reserved).unwrap_or_default(),
    ));
    (&file)
        .take(reserved)
        .read_to_end(&mut bytes)
        .map_err(|error| failed(Problem::Io(error)))?;
    let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    if length > bytes_max {
        return Err(failed(Problem::TooLong(bytes_max)));
    }
    if length == reserved {
        return Err(failed(Problem::Grew));
    }
    Ok(bytes)
}

/// Checks a directory whose entries affect trust or configuration. Returns the path with `$CREDENTIALS_DIRECTORY` replaced.
pub fn check_directory(path: &Path, purpose: Purpose) -> Result<PathBuf, Error> {
    let expanded = expand(path)?;
    Walk::new(&expanded, purpose).check_directory()?;
    Ok(expanded)
}

/// Checks a file or directory that another library opens by its path, if it exists. A FIFO is refused, because the library would
/// wait for a writer. Sockets and devices are accepted, because the library does not read them as files.
pub fn check_if_present(path: &Path, purpose: Purpose) -> Result<(), Error> {
    let walk = Walk::new(path, purpose);
    match walk.resolve() {
        Ok(Target::Entry { stat, at, .. }) => match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => walk.open_file().map(drop),
            FileType::Fifo => walk.require_regular(&stat, &at),
            _ => Ok(()),
        },
        Ok(Target::Directory(_)) => Ok(()),
        Err(error) if error.is_missing() => Ok(()),
        Err(error) => Err(error),
    }
}

/// Checks the directories above a file or directory that this process writes. The rules of [`check_directory`] apply, but the
/// group of a directory may write to it, as in `/var/log` of some distributions. The owner of `path` is also trusted, because
/// root runs commands on files of the service's user. If a path does not exist yet, its existing part is checked.
pub fn check_above(path: &Path, purpose: Purpose) -> Result<(), Error> {
    let owner = std::fs::metadata(path).ok().map(|meta| User {
        id: meta.uid(),
        group: Some(meta.gid()),
    });
    let walk = Walk {
        users: owner.as_slice(),
        writable: WRITABLE_BY_ALL,
        ..Walk::new(path, purpose)
    };
    match walk.resolve() {
        Err(error) if !error.is_missing() => Err(error),
        _ => Ok(()),
    }
}

/// Properties of the path of a socket that passed [`check_socket`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketPlace {
    /// Whether a directory in the path is sticky and writable by others. In a sticky directory, every user can create
    /// another socket after the first socket is removed.
    pub is_shared: bool,
}

/// Checks the path of a socket on which another program listens: every directory in the path, and the owner of the
/// socket. `users` are the users of the program that listens. Files and directories of `users` are trusted like files
/// and directories of root. The groups of `users` may write to directories in the path (`/run/postgresql` of Debian has
/// mode 2775).
pub fn check_socket(path: &Path, users: &[User], purpose: Purpose) -> Result<SocketPlace, Error> {
    let walk = Walk {
        users,
        exempts_read_only: false,
        ..Walk::new(path, purpose)
    };
    let (stat, at) = match walk.resolve()? {
        Target::Entry { stat, at, .. } => (stat, at),
        Target::Directory(directory) => (directory.stat, directory.at),
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        return Err(walk.error(&at, Problem::NotSocket(kind_of(&stat))));
    }
    walk.check_owner("the socket ", stat.st_uid, &at)?;
    Ok(SocketPlace {
        is_shared: walk.is_shared.get(),
    })
}

/// Returns the group of a file if the group can read the file and others cannot. Returns `None` if the group cannot
/// read the file, if others can read the file, or if the mode is unknown.
pub fn reading_group(path: &Path) -> Option<u32> {
    let meta = std::fs::metadata(expand(path).ok()?).ok()?;
    (meta.mode() & READABLE_BY_OTHERS == READABLE_BY_GROUP).then(|| meta.gid())
}
