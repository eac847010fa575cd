//! Resolves a path one component at a time and examines every directory and link in the path.

use std::{
    cell::Cell,
    collections::VecDeque,
    ffi::{OsStr, OsString},
    fs::File,
    os::{fd::OwnedFd, unix::ffi::OsStringExt as _},
    path::{Component, Path, PathBuf, absolute},
};

use rustix::{
    fs::{CWD, FileType, Mode, OFlags, PROC_SUPER_MAGIC, Stat, fstat, fstatfs, openat, readlinkat},
    io::Errno,
};

use crate::remedy::explained;

use super::{
    Error, Purpose, ROOT, User,
    error::{DIRECTORY, Problem},
    mount::{FuseServer, fuse_server, is_fuse, is_unchangeable},
};

const STICKY: u32 = 0o1000;
const WRITABLE_BY_OTHERS: u32 = 0o022;
pub(super) const WRITABLE_BY_ALL: u32 = 0o002;
/// Permissions that only the owner may have on a secret.
const SECRET_OF_USER: u32 = 0o077;
/// Permissions that only the owner may have on a secret of root. The group may read a secret of root.
const SECRET_OF_ROOT: u32 = 0o037;
/// Highest number of symbolic links that are followed for one path; the kernel has the same limit.
const LINKS_MAX: usize = 40;

/// A directory in the path, with an open descriptor.
pub(super) struct Directory {
    fd: OwnedFd,
    pub(super) stat: Stat,
    pub(super) at: PathBuf,
    is_read_only: bool,
}

/// The end of a resolved path.
pub(super) enum Target {
    Directory(Directory),
    /// An entry that is neither a directory nor a symbolic link, with its directory and its name.
    Entry {
        above: Directory,
        name: OsString,
        stat: Stat,
        at: PathBuf,
    },
}

/// Resolves one path.
pub(super) struct Walk<'a> {
    pub(super) path: &'a Path,
    pub(super) purpose: Purpose,
    pub(super) ours: u32,
    /// Users who are trusted, in addition to root and the user of this process.
    pub(super) users: &'a [User],
    /// The write permissions that a directory in the path must not have.
    pub(super) writable: u32,
    /// Whether directories in a read-only mount may belong to anyone and be writable by others.
    pub(super) exempts_read_only: bool,
    /// Whether other users can add entries to a directory in the path.
    pub(super) is_shared: Cell<bool>,
}

impl<'a> Walk<'a> {
    pub(super) fn new(path: &'a Path, purpose: Purpose) -> Self {
        Self {
            path,
            purpose,
            ours: rustix::process::geteuid().as_raw(),
            users: &[],
            writable: WRITABLE_BY_OTHERS,
            exempts_read_only: true,
            is_shared: Cell::new(false),
        }
    }

    pub(super) fn error(&self, at: &Path, problem: Problem) -> Error {
        let problem = match problem {
            Problem::Io(error) => Problem::Io(explained(at, error)),
            problem => problem,
        };
        Error {
            path: self.path.into(),
            component: at.into(),
            purpose: self.purpose,
            problem: Box::new(problem),
        }
    }

    fn io(&self, at: &Path) -> impl Fn(Errno) -> Error {
        move |errno| self.error(at, Problem::Io(errno.into()))
    }

    pub(super) fn open_file(&self) -> Result<(File, PathBuf), Error> {
        let (above, name, stat, at) = match self.resolve()? {
            Target::Directory(directory) => {
                let kind = Problem::NotRegular(DIRECTORY);
                return Err(self.error(&directory.at, kind));
            }
            Target::Entry {
                above,
                name,
                stat,
                at,
            } => (above, name, stat, at),
        };
        // Check the type of the file before the open, because opening a device can have side effects.
        self.require_regular(&stat, &at)?;
        let flags =
            OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let fd = openat(&above.fd, &name, flags, Mode::empty()).map_err(self.io(&at))?;
        let stat = fstat(&fd).map_err(self.io(&at))?;
        self.require_regular(&stat, &at)?;
        // If the kernel permits hard links to files of other users, another user could create a hard link to a file of
        // root under an unused name.
        if !above.is_read_only
            && mode_of(&above.stat) & WRITABLE_BY_OTHERS != 0
            && stat.st_nlink > 1
        {
            return Err(self.error(&at, Problem::HardLinks));
        }
        self.check_file(&fd, &stat, &at)?;
        Ok((File::from(fd), at))
    }

    pub(super) fn check_directory(&self) -> Result<(), Error> {
        match self.resolve()? {
            Target::Directory(directory) => {
                let mode = mode_of(&directory.stat);
                // Every user can add entries to a sticky directory.
                if !directory.is_read_only && mode & WRITABLE_BY_OTHERS != 0 {
                    let owner = directory.stat.st_uid;
                    let what = "the directory ";
                    let problem = Problem::Writable { what, mode, owner };
                    return Err(self.error(&directory.at, problem));
                }
                Ok(())
            }
            Target::Entry { stat, at, .. } => {
                let problem = Problem::NotDirectory(kind_of(&stat));
                Err(self.error(&at, problem))
            }
        }
    }

    pub(super) fn require_regular(&self, stat: &Stat, at: &Path) -> Result<(), Error> {
        if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
            return Ok(());
        }
        Err(self.error(at, Problem::NotRegular(kind_of(stat))))
    }

    fn check_file(&self, fd: &OwnedFd, stat: &Stat, at: &Path) -> Result<(), Error> {
        let (mode, owner) = (mode_of(stat), stat.st_uid);
        let is_read_only = is_unchangeable(fd, stat);
        if self.purpose.is_secret() {
            let forbidden = if owner == ROOT {
                SECRET_OF_ROOT
            } else {
                SECRET_OF_USER
            };
            if mode & forbidden != 0 {
                let problem = Problem::Readable {
                    mode,
                    owner,
                    is_read_only,
                };
                return Err(self.error(at, problem));
            }
            return self.check_owner("", owner, at);
        }
        if is_read_only {
            return Ok(());
        }
        self.check_owner("", owner, at)?;
        if mode & WRITABLE_BY_OTHERS != 0 {
            let what = "";
            return Err(self.error(at, Problem::Writable { what, mode, owner }));
        }
        Ok(())
    }

    pub(super) fn check_owner(
        &self,
        what: &'static str,
        owner: u32,
        at: &Path,
    ) -> Result<(), Error> {
        if self.is_trusted(owner) {
            return Ok(());
        }
        Err(self.error(at, Problem::Owner { what, owner }))
    }

    fn is_trusted(&self, owner: u32) -> bool {
        owner == ROOT || owner == self.ours || self.users.iter().any(|user| user.id == owner)
    }

    /// Whether a user who is not trusted can add entries to a directory.
    fn is_writable_by_others(&self, stat: &Stat) -> bool {
        let mode = mode_of(stat);
        let is_own_group = self
            .users
            .iter()
            .any(|user| user.group == Some(stat.st_gid));
        mode & self.writable != 0 && (mode & WRITABLE_BY_ALL != 0 || !is_own_group)
    }

    /// Examines a directory in the path.
    fn enter(&self, fd: OwnedFd, at: PathBuf) -> Result<Directory, Error> {
        let stat = fstat(&fd).map_err(self.io(&at))?;
        if is_fuse(&fd) {
            match fuse_server(&stat) {
                Some(FuseServer::Hypervisor) => {}
                Some(FuseServer::User(owner)) if self.is_trusted(owner) => {}
                Some(FuseServer::User(owner)) => {
                    let owner = Some(owner);
                    return Err(self.error(&at, Problem::ForeignMount { owner }));
                }
                None => return Err(self.error(&at, Problem::ForeignMount { owner: None })),
            }
        }
        let is_read_only = self.exempts_read_only && is_unchangeable(&fd, &stat);
        let directory = Directory {
            fd,
            stat,
            at,
            is_read_only,
        };
        if is_read_only {
            return Ok(directory);
        }
        let (mode, owner) = (mode_of(&stat), stat.st_uid);
        let what = "the directory ";
        self.check_owner(what, owner, &directory.at)?;
        if self.is_writable_by_others(&directory.stat) {
            if mode & STICKY == 0 {
                let problem = Problem::Writable { what, mode, owner };
                return Err(self.error(&directory.at, problem));
            }
            self.is_shared.set(true);
        }
        Ok(directory)
    }

    fn root(&self) -> Result<Directory, Error> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let at = PathBuf::from("/");
        let fd = openat(CWD, &at, flags, Mode::empty()).map_err(self.io(&at))?;
        self.enter(fd, at)
    }

    /// Follows the path to its end and examines every directory and link in the path.
    pub(super) fn resolve(&self) -> Result<Target, Error> {
        let absolute =
            absolute(self.path).map_err(|error| self.error(self.path, Problem::Io(error)))?;
        let mut rest = names(&absolute);
        let mut directory = self.root()?;
        let mut links = 0;
        while let Some(name) = rest.pop_front() {
            let at = match name.to_str() {
                Some("..") => directory.at.parent().unwrap_or(&directory.at).to_owned(),
                _ => directory.at.join(&name),
            };
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let entry = openat(&directory.fd, &name, flags, Mode::empty()).map_err(self.io(&at))?;
            let stat = fstat(&entry).map_err(self.io(&at))?;
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => directory = self.enter(entry, at)?,
                FileType::Symlink => {
                    links += 1;
                    if links > LINKS_MAX {
                        return Err(self.io(&at)(Errno::LOOP));
                    }
                    self.check_link(&directory, &stat, &at)?;
                    let target = self.read_link(&entry, &at)?;
                    if target.is_absolute() {
                        directory = self.root()?;
                    }
                    for part in names(&target).into_iter().rev() {
                        rest.push_front(part);
                    }
                }
                _ if rest.is_empty() => {
                    return Ok(Target::Entry {
                        above: directory,
                        name,
                        stat,
                        at,
                    });
                }
                _ => return Err(self.error(&at, Problem::NotDirectory(kind_of(&stat)))),
            }
        }
        Ok(Target::Directory(directory))
    }

    /// Checks which users can have created a link. In a sticky directory, every user can create a link. In any other
    /// directory, only the owner of the directory can create a link, and this owner was already checked.
    fn check_link(&self, above: &Directory, stat: &Stat, at: &Path) -> Result<(), Error> {
        if above.is_read_only || mode_of(&above.stat) & WRITABLE_BY_OTHERS == 0 {
            return Ok(());
        }
        self.check_owner("the symbolic link ", stat.st_uid, at)
    }

    fn read_link(&self, link: &OwnedFd, at: &Path) -> Result<PathBuf, Error> {
        // The links below /proc/*/fd lead to an open file and not to a path.
        if fstatfs(link).is_ok_and(|system| system.f_type == PROC_SUPER_MAGIC)
            && at.parent().and_then(Path::file_name) == Some(OsStr::new("fd"))
        {
            return Err(self.error(at, Problem::ProcLink));
        }
        let target = readlinkat(link, "", Vec::new()).map_err(self.io(at))?;
        Ok(PathBuf::from(OsString::from_vec(target.into_bytes())))
    }
}

/// The components of a path, without `.` and the root.
fn names(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some("..".into()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
        })
        .collect()
}

const fn mode_of(stat: &Stat) -> u32 {
    stat.st_mode & 0o7777
}

pub(super) fn kind_of(stat: &Stat) -> &'static str {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => "a regular file",
        FileType::Directory => DIRECTORY,
        FileType::Symlink => "a symbolic link",
        FileType::Fifo => "a FIFO (named pipe)",
        FileType::Socket => "a socket",
        FileType::CharacterDevice => "a character device",
        FileType::BlockDevice => "a block device",
        FileType::Unknown => "a file of an unknown kind",
    }
}
