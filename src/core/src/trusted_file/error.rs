//! The reasons why a file or directory is refused.

use std::{fmt, io, path::Path};

use super::{CREDENTIALS_VARIABLE, Purpose, ROOT, mount::MOUNTS};

/// The kind that is reported if a path leads to a directory instead of a regular file.
pub(super) const DIRECTORY: &str = "a directory";

/// Why a file or directory was refused. The text contains the path of the file, the invalid component of this path, and the
/// remedy.
#[derive(Debug)]
pub struct Error {
    pub(super) path: Box<Path>,
    /// The invalid component: the file itself, a directory above it, or a symbolic link in the path.
    pub(super) component: Box<Path>,
    pub(super) purpose: Purpose,
    pub(super) problem: Box<Problem>,
}

#[derive(Debug)]
pub(super) enum Problem {
    Io(io::Error),
    NoCredentials,
    NotRegular(&'static str),
    NotDirectory(&'static str),
    NotSocket(&'static str),
    ForeignMount {
        /// `None` if the mount table does not contain the user.
        owner: Option<u32>,
    },
    ProcLink,
    TooLong(u64),
    Grew,
    HardLinks,
    Owner {
        what: &'static str,
        owner: u32,
    },
    Writable {
        what: &'static str,
        mode: u32,
        owner: u32,
    },
    Readable {
        mode: u32,
        owner: u32,
        is_read_only: bool,
    },
}

impl Error {
    /// Whether the file does not exist.
    pub fn is_missing(&self) -> bool {
        matches!(&*self.problem, Problem::Io(error) if error.kind() == io::ErrorKind::NotFound)
    }

    /// Whether the file is accessible, but longer than the limit.
    pub fn is_too_long(&self) -> bool {
        matches!(*self.problem, Problem::TooLong(_))
    }

    /// Whether the path leads to a directory instead of a file.
    pub fn is_directory(&self) -> bool {
        matches!(*self.problem, Problem::NotRegular(DIRECTORY))
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &*self.problem {
            Problem::Io(error) => Some(error),
            _ => None,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (path, at) = (self.path.display(), self.component.display());
        let risk = self.purpose.risk();
        let ours = rustix::process::geteuid().as_raw();
        if self.path != self.component
            && !matches!(*self.problem, Problem::Io(_) | Problem::NoCredentials)
        {
            write!(f, "{path} is not trusted: ")?;
        }
        match &*self.problem {
            // If `path` is relative, the component can be the absolute form of `path`.
            Problem::Io(error) if self.component.ends_with(&self.path) => {
                write!(f, "cannot read {path}: {error}")
            }
            Problem::Io(error) => write!(f, "cannot read {path}: {at}: {error}"),
            Problem::NoCredentials => write!(
                f,
                "cannot read {path}: the environment variable {CREDENTIALS_VARIABLE} is not set; add LoadCredential= to the \
                 systemd unit, or give the absolute path of the file"
            ),
            Problem::NotRegular(kind) => write!(
                f,
                "{at} is {kind}, but must be a regular file; give the path of a regular file, or write the content to a \
                 regular file"
            ),
            Problem::NotDirectory(kind) => write!(f, "{at} is {kind}, but must be a directory"),
            Problem::NotSocket(kind) => write!(f, "{at} is {kind}, but must be a socket"),
            Problem::ForeignMount { owner } => self.fmt_mount(f, *owner),
            Problem::ProcLink => write!(
                f,
                "{at} is a link in /proc to an open file descriptor, but must be a regular file; use the option for \
                 descriptors, or write the content to a regular file"
            ),
            Problem::TooLong(limit) => write!(f, "{at} is longer than {limit} bytes"),
            Problem::HardLinks => write!(
                f,
                "{at} has more than one hard link, and is in a directory where other users can add hard links: {risk}; copy the \
                 file to another directory"
            ),
            Problem::Grew => write!(f, "{at} changed while it was read"),
            Problem::Owner { what, owner } => {
                if let Some(remedy) = self.purpose.owner_remedy() {
                    return write!(
                        f,
                        "{what}{at} belongs to user {owner}, who must not own it: {risk}; {remedy}"
                    );
                }
                write!(
                    f,
                    "{what}{at} belongs to user {owner}, and it must belong to root or to user {ours}: {risk}; run `chown root \
                     {at}`"
                )?;
                if ours == ROOT {
                    write!(f, ", or run this command as user {owner}")?;
                }
                Ok(())
            }
            Problem::Writable { what, mode, owner } => write!(
                f,
                "{what}{at} has mode {mode:04o} and belongs to user {owner}: {risk}; run `chmod go-w {at}`"
            ),
            Problem::Readable {
                mode,
                owner,
                is_read_only,
            } => self.fmt_readable(f, *mode, *owner, *is_read_only),
        }
    }
}

impl Error {
    fn fmt_mount(&self, f: &mut fmt::Formatter<'_>, owner: Option<u32>) -> fmt::Result {
        let (at, risk) = (self.component.display(), self.purpose.risk());
        match owner {
            Some(owner) => write!(
                f,
                "{at} is in a FUSE file system that user {owner} mounted: {risk}; unmount the file system, or mount \
                 it as root"
            ),
            None => write!(
                f,
                "{at} is in a FUSE file system, and {MOUNTS} does not show which user mounted this file system: \
                 {risk}; use another file system"
            ),
        }
    }

    fn fmt_readable(
        &self,
        f: &mut fmt::Formatter<'_>,
        mode: u32,
        owner: u32,
        is_read_only: bool,
    ) -> fmt::Result {
        let at = self.component.display();
        let secret = self.purpose.content();
        write!(
            f,
            "{at} has mode {mode:04o} and belongs to user {owner}: other users can read it; "
        )?;
        if is_read_only {
            // `chmod` fails in a read-only mount, so the mode has to be set at the source of the mount.
            write!(
                f,
                "the file is mounted read-only, so set its mode at the source of the mount (Kubernetes: `defaultMode: \
                 0440` of the volume and `fsGroup` of the pod; Compose: `mode: 0440` with `uid` and `gid` of the secret)"
            )?;
        } else {
            write!(f, "run `chmod 600 {at}`")?;
        }
        write!(f, ", and change the {secret} if others may have read it")
    }
}
