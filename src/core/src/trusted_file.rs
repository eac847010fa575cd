//! Opens the files and directories that decide who is trusted, what is loaded and what is configured, and the files that
//! hold a secret.
//!
//! A file is accepted only when no other user can change it or put another one in its place. The path is resolved from the
//! root directory one component at a time, through descriptors, and each symbolic link is followed by hand, so that every
//! directory on the way is examined and nothing can be exchanged between the examination and the use:
//!
//! - Each directory belongs to root or to this user, and neither its group nor others can write to it. Two kinds of directory
//!   that others can write to are accepted. In a sticky directory (`/tmp`, or a Secret that Kubernetes mounts) other users cannot
//!   rename or remove what belongs to root or to this user, so only such an entry is followed, and a file with several hard links is not.
//!   In a container, no process that sees a read-only mount can change anything in it.
//! - The file is a regular file. A FIFO, a device or a socket is refused by name; it is opened without blocking, so that a FIFO
//!   cannot hang the process. The descriptor that is examined is the one that is read.
//! - The file belongs to root or to this user, and neither its group nor others can write to it. A secret cannot be read by
//!   others; its group may read it when it belongs to root, because root chose the group (systemd credentials, Kubernetes
//!   Secrets with `fsGroup`).
//!
//! A read-only mount counts only in a container, and only when it is another file system than that of the root directory. Where systemd
//! runs, it does not count, and the front tells its workers so: settings such as `ProtectSystem=strict` show a service the file systems of the host read-only, while other
//! users of the host can still write to them. A FUSE mount never counts as read-only, because the process that serves it decides what
//! is read and who the owners are. One that another user mounted is refused. For a socket no mount counts, because the process that
//! listens can write to the directory.
//!
//! The same rule applies to the socket of another program, with the users of that program as further owners ([`check_socket`]), and
//! to the directories above a file that this process writes, where a group may have the write permission ([`check_above`]).
//!
//! Mitigation: M15 of `THREAT_MODEL.md`.

use std::{
    cell::Cell,
    collections::VecDeque,
    env,
    ffi::{OsStr, OsString},
    fmt,
    fs::File,
    io::{self, Read as _},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{ffi::OsStringExt as _, fs::MetadataExt as _},
    },
    path::{Component, Path, PathBuf, absolute},
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::{
    fs::{
        CWD, FileType, FsWord, Mode, OFlags, PROC_SUPER_MAGIC, Stat, StatVfsMountFlags, fstat,
        fstatfs, fstatvfs, major, minor, openat, readlinkat,
    },
    io::Errno,
};
use zeroize::Zeroizing;

use crate::remedy::explained;

#[cfg(test)]
mod tests;

/// First component of a path that names a systemd credential.
const CREDENTIALS_DIRECTORY: &str = "$CREDENTIALS_DIRECTORY";
const CREDENTIALS_VARIABLE: &str = "CREDENTIALS_DIRECTORY";

const DIRECTORY: &str = "a directory";
const ROOT: u32 = 0;
const STICKY: u32 = 0o1000;
const WRITABLE_BY_OTHERS: u32 = 0o022;
const WRITABLE_BY_ALL: u32 = 0o002;
const READABLE_BY_GROUP: u32 = 0o040;
const READABLE_BY_OTHERS: u32 = 0o044;
/// Permissions that only the owner may have on a secret.
const SECRET_OF_USER: u32 = 0o077;
/// The same when root owns the secret: the group may read it.
const SECRET_OF_ROOT: u32 = 0o037;
/// Symbolic links that are followed for one path; the limit of the kernel.
const LINKS_MAX: usize = 40;
/// The file system type of every FUSE mount.
const FUSE_SUPER_MAGIC: FsWord = 0x6573_5546;
/// Exists where systemd runs: `sd_booted(3)`.
const SYSTEMD: &str = "/run/systemd/system";
/// systemd sets it for each service, also for one that does not see `/run` of the host; `systemd.exec(5)`.
const SERVICE_VARIABLE: &str = "INVOCATION_ID";
const MOUNTS: &str = "/proc/self/mountinfo";
/// The users of this machine. Users of other directory services are named by their numbers.
const USERS: &str = "/etc/passwd";
const USERS_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// Largest capacity that is reserved before the length of a file is known to be right.
const RESERVED_BYTES_MAX: u64 = 64 * 1024;

/// What a file is used for: decides the rule and the text of a refusal.
#[derive(Clone, Copy, Debug)]
pub struct Purpose(Kind);

#[derive(Clone, Copy, Debug)]
enum Kind {
    /// Other users may read it.
    Trust {
        /// What another user could do, as a clause that begins with `other users could`.
        risk: &'static str,
        /// What to do about a foreign owner, when it is not `chown`.
        owner_remedy: Option<&'static str>,
    },
    /// Other users must not read it. Names the content, such as `PIN`.
    Secret(&'static str),
}

impl Purpose {
    /// A file that other users may read but not change. `risk` is the clause that says what they could do otherwise.
    pub const fn trust(risk: &'static str) -> Self {
        Self(Kind::Trust {
            risk,
            owner_remedy: None,
        })
    }

    /// The same as [`Purpose::trust`], with a remedy for what belongs to another user.
    pub const fn trust_with_remedy(risk: &'static str, owner_remedy: &'static str) -> Self {
        Self(Kind::Trust {
            risk,
            owner_remedy: Some(owner_remedy),
        })
    }

    /// A file that holds a secret, named by `what`, such as `PIN`.
    pub const fn secret(what: &'static str) -> Self {
        Self(Kind::Secret(what))
    }

    const fn is_secret(self) -> bool {
        matches!(self.0, Kind::Secret(_))
    }

    const fn content(self) -> &'static str {
        match self.0 {
            Kind::Trust { .. } => "content",
            Kind::Secret(what) => what,
        }
    }

    const fn risk(self) -> &'static str {
        match self.0 {
            Kind::Trust { risk, .. } => risk,
            Kind::Secret(_) => "other users could replace it",
        }
    }

    const fn owner_remedy(self) -> Option<&'static str> {
        match self.0 {
            Kind::Trust { owner_remedy, .. } => owner_remedy,
            Kind::Secret(_) => None,
        }
    }
}

/// A user who is trusted with a path besides root and the user of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    id: u32,
    /// The user's own group, which may write to a directory on the way; unknown without an entry in `/etc/passwd`.
    group: Option<u32>,
}

impl User {
    /// The user with this name or number. A number that `/etc/passwd` does not have is a user in a container or of a directory
    /// service, whose group is unknown: on this machine, the group with the same number has other members.
    pub fn find(name: &str) -> Result<Option<Self>, Error> {
        let purpose = Purpose::trust("other users could choose who is trusted");
        let users = read(Path::new(USERS), USERS_BYTES_MAX, purpose)?;
        Ok(Self::find_in(&String::from_utf8_lossy(&users), name))
    }

    fn find_in(users: &str, name: &str) -> Option<Self> {
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

/// Why a file or directory was refused. The text names the file, the component of its path that is at fault, and the remedy.
#[derive(Debug)]
pub struct Error {
    path: Box<Path>,
    /// The file itself, a directory above it, or a symbolic link on the way.
    component: Box<Path>,
    purpose: Purpose,
    problem: Box<Problem>,
}

#[derive(Debug)]
enum Problem {
    Io(io::Error),
    NoCredentials,
    NotRegular(&'static str),
    NotDirectory(&'static str),
    NotSocket(&'static str),
    ForeignMount {
        /// Unknown if the mount table does not name one.
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

    /// Whether the file may be read, but is longer than it may be.
    pub fn is_too_long(&self) -> bool {
        matches!(*self.problem, Problem::TooLong(_))
    }

    /// Whether a file was expected and a directory is there.
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
            // The component may be the absolute form of the same path.
            Problem::Io(error) if self.component.ends_with(&self.path) => {
                write!(f, "cannot read {path}: {error}")
            }
            Problem::Io(error) => write!(f, "cannot read {path}: {at}: {error}"),
            Problem::NoCredentials => write!(
                f,
                "cannot read {path}: the environment variable {CREDENTIALS_VARIABLE} is not set; add LoadCredential= to the \
                 systemd unit, or name the file by its absolute path"
            ),
            Problem::NotRegular(kind) => write!(
                f,
                "{at} is {kind}, and only a regular file is read; name a regular file, or write the content to one"
            ),
            Problem::NotDirectory(kind) => write!(f, "{at} is {kind} and not a directory"),
            Problem::NotSocket(kind) => write!(f, "{at} is {kind} and not a socket"),
            Problem::ForeignMount { owner } => self.fmt_mount(f, *owner),
            Problem::ProcLink => write!(
                f,
                "{at} is a link of /proc to an open descriptor, and only a regular file is read; use the option for \
                 descriptors, or write the content to a regular file"
            ),
            Problem::TooLong(limit) => write!(f, "{at} is longer than {limit} bytes"),
            Problem::HardLinks => write!(
                f,
                "{at} has more than one hard link in a directory where other users can add one: {risk}; copy the file to another \
                 directory"
            ),
            Problem::Grew => write!(f, "{at} changed while it was read"),
            Problem::Owner { what, owner } => {
                if let Some(remedy) = self.purpose.owner_remedy() {
                    return write!(
                        f,
                        "{what}{at} belongs to user {owner}, who is not trusted with it: {risk}; {remedy}"
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
                "{at} is in a FUSE file system that user {owner} mounted: {risk}; unmount it, or mount it as root"
            ),
            None => write!(
                f,
                "{at} is in a FUSE file system, and {MOUNTS} does not say which user mounted it: {risk}; use another file system"
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
            "{at} has mode {mode:04o} and belongs to user {owner}: others can read it; "
        )?;
        if is_read_only {
            // `chmod` fails there: the mode is that of the source of the mount.
            write!(
                f,
                "it is mounted read-only, so set the mode where it is mounted from (Kubernetes: `defaultMode: 0440` of the \
                 volume and `fsGroup` of the pod; Compose: `mode: 0440` with `uid` and `gid` of the secret)"
            )?;
        } else {
            write!(f, "run `chmod 600 {at}`")?;
        }
        write!(f, ", and change the {secret} if others may have read it")
    }
}

/// Whether a path is absolute or names a systemd credential: a service has no working directory to rely on.
pub fn is_absolute(path: &Path) -> bool {
    path.is_absolute() || path.starts_with(CREDENTIALS_DIRECTORY)
}

/// What is wrong with a path of the configuration that is not absolute.
pub fn not_absolute(path: &Path) -> String {
    let tilde = if path.starts_with("~") {
        "; `~` is not expanded"
    } else {
        ""
    };
    format!(
        "{:?}: it must be an absolute path, because a service has no working directory{tilde}",
        path.display().to_string()
    )
}

/// Replaces `$CREDENTIALS_DIRECTORY` at the front of a path with the directory that systemd passes to the service.
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

/// Opens a file for reading after every check.
pub fn open(path: &Path, purpose: Purpose) -> Result<File, Error> {
    let expanded = expand(path)?;
    let walk = Walk::new(&expanded, purpose);
    walk.open_file().map(|(file, _)| file)
}

/// Reads a whole file of at most `bytes_max` bytes after every check. The bytes are zeroed when they are dropped.
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
    // The whole capacity at once: a vector that grows leaves copies that are not zeroed.
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

/// Checks a directory whose entries decide something. Returns the path with credentials expanded.
pub fn check_directory(path: &Path, purpose: Purpose) -> Result<PathBuf, Error> {
    let expanded = expand(path)?;
    Walk::new(&expanded, purpose).check_directory()?;
    Ok(expanded)
}

/// Checks a file or directory that another library opens by its path, if it exists. A FIFO is refused, because the library
/// would wait for a writer. Sockets and devices are accepted: they are not read as files.
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

/// Checks the directories above a file or directory that this process writes, by the rule of [`check_directory`], except that their
/// groups may write to them (`/var/log` of some distributions). The owner of `path` is trusted, too: root runs commands on files of
/// the service's user. A path that does not exist yet is checked as far as it exists.
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

/// Where a socket that passed [`check_socket`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketPlace {
    /// A directory on the way is sticky and others can write to it: once the socket is removed, every user can make another one.
    pub is_shared: bool,
}

/// Checks the path of a socket on which another program listens: every directory on the way, and the owner of the socket. `users` are
/// the users of that program: what belongs to them is trusted like what belongs to root, and their own groups may write to
/// directories on the way (`/run/postgresql` of Debian has mode 2775).
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

/// The group that can read a file, if its group can and others cannot. Unknown counts as none.
pub fn reading_group(path: &Path) -> Option<u32> {
    let meta = std::fs::metadata(expand(path).ok()?).ok()?;
    (meta.mode() & READABLE_BY_OTHERS == READABLE_BY_GROUP).then(|| meta.gid())
}

/// A directory on the way, held open.
struct Directory {
    fd: OwnedFd,
    stat: Stat,
    at: PathBuf,
    is_read_only: bool,
}

/// Where a path ends.
enum Target {
    Directory(Directory),
    /// Anything else but a symbolic link, by its name in its directory.
    Entry {
        above: Directory,
        name: OsString,
        stat: Stat,
        at: PathBuf,
    },
}

/// Resolves one path.
struct Walk<'a> {
    path: &'a Path,
    purpose: Purpose,
    ours: u32,
    /// Users who are trusted besides root and this one.
    users: &'a [User],
    /// The write permissions that a directory on the way must not have.
    writable: u32,
    /// Whether directories in a read-only mount may belong to anyone and be writable by others.
    exempts_read_only: bool,
    /// Whether others can add entries to a directory on the way.
    is_shared: Cell<bool>,
}

impl<'a> Walk<'a> {
    fn new(path: &'a Path, purpose: Purpose) -> Self {
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

    fn error(&self, at: &Path, problem: Problem) -> Error {
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

    fn open_file(&self) -> Result<(File, PathBuf), Error> {
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
        // Before it is opened: opening a device can do something.
        self.require_regular(&stat, &at)?;
        let flags =
            OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let fd = openat(&above.fd, &name, flags, Mode::empty()).map_err(self.io(&at))?;
        let stat = fstat(&fd).map_err(self.io(&at))?;
        self.require_regular(&stat, &at)?;
        // Where the kernel permits it, another user could link a file of root's to a name that is free.
        if !above.is_read_only
            && mode_of(&above.stat) & WRITABLE_BY_OTHERS != 0
            && stat.st_nlink > 1
        {
            return Err(self.error(&at, Problem::HardLinks));
        }
        self.check_file(&fd, &stat, &at)?;
        Ok((File::from(fd), at))
    }

    fn check_directory(&self) -> Result<(), Error> {
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

    fn require_regular(&self, stat: &Stat, at: &Path) -> Result<(), Error> {
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

    fn check_owner(&self, what: &'static str, owner: u32, at: &Path) -> Result<(), Error> {
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

    /// Examines a directory that the path leads through.
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

    /// Follows the path to its end and examines every directory and link on the way.
    fn resolve(&self) -> Result<Target, Error> {
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

    /// In a sticky directory every user can make a link; elsewhere only its owner can, who was examined with the directory.
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

/// The components of a path, without those that stand for nothing.
fn names(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some("..".into()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
        })
        .collect()
}

/// Whether an entry is in a file system that is mounted read-only into a container and is not that of the root directory. FUSE is served
/// by a process that can change what is read however it is mounted. Unknown counts as changeable.
fn is_unchangeable(fd: impl AsFd + Copy, stat: &Stat) -> bool {
    fstatvfs(fd).is_ok_and(|system| system.f_flag.contains(StatVfsMountFlags::RDONLY))
        && !is_fuse(fd)
        && is_apart_from_root(stat.st_dev)
        && read_only_mounts_count()
}

/// Set by [`ignore_read_only_mounts`].
static IGNORES_READ_ONLY_MOUNTS: AtomicBool = AtomicBool::new(false);

/// Whether a read-only mount excuses owner and mode of what is in it. It does not where systemd runs: other processes may see the same
/// file systems without the read-only mounts of this one.
pub fn read_only_mounts_count() -> bool {
    // Unknown is taken as yes: then the ordinary rules apply.
    let is_beside_systemd =
        Path::new(SYSTEMD).try_exists().unwrap_or(true) || env::var_os(SERVICE_VARIABLE).is_some();
    !is_beside_systemd && !IGNORES_READ_ONLY_MOUNTS.load(Ordering::Relaxed)
}

/// Applies the ordinary rules in read-only mounts, for the rest of this process. For a process whose environment was cleared, so that it
/// cannot see what the process that started it knows.
pub fn ignore_read_only_mounts() {
    IGNORES_READ_ONLY_MOUNTS.store(true, Ordering::Relaxed);
}

fn is_fuse(fd: impl AsFd) -> bool {
    fstatfs(fd).is_ok_and(|system| system.f_type == FUSE_SUPER_MAGIC)
}

/// Who decides what a FUSE file system shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FuseServer {
    /// virtiofs: it has the type of FUSE, and the host of this virtual machine serves it.
    Hypervisor,
    /// The user who mounted it.
    User(u32),
}

/// Who serves the FUSE file system that an entry is in. Absent if the mount table cannot be read or does not say.
fn fuse_server(stat: &Stat) -> Option<FuseServer> {
    let mounts = std::fs::read_to_string(MOUNTS).ok()?;
    server_in(&mounts, (major(stat.st_dev), minor(stat.st_dev)))
}

/// The same for the file system with this device number, in a mount table in the form of proc(5).
fn server_in(mounts: &str, (major, minor): (u32, u32)) -> Option<FuseServer> {
    let device = format!("{major}:{minor}");
    let mount = mounts
        .lines()
        .find(|mount| mount.split(' ').nth(2) == Some(&device))?;
    let (_, system) = mount.split_once(" - ")?;
    if system.split(' ').next() == Some("virtiofs") {
        return Some(FuseServer::Hypervisor);
    }
    let options = system.rsplit(' ').next()?;
    let mut options = options.split(',');
    let user = options.find_map(|option| option.strip_prefix("user_id=")?.parse().ok())?;
    Some(FuseServer::User(user))
}

/// Whether a device is another one than that of the root directory. Unknown counts as the same.
fn is_apart_from_root(device: u64) -> bool {
    rustix::fs::stat("/").is_ok_and(|root| root.st_dev != device)
}

const fn mode_of(stat: &Stat) -> u32 {
    stat.st_mode & 0o7777
}

fn kind_of(stat: &Stat) -> &'static str {
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
