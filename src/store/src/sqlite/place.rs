//! Checks whether the database is still the file that was opened. The check compares device and
//! inode of the file, of its WAL, of its shared memory and of their directory. SQLite continues to
//! write to a file that was renamed or removed, and such commits are lost.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use keybroker_core::error::chain;

use crate::{Error, error::Detail};

/// The reason why a file or directory is not the file or directory that was opened.
#[derive(Debug, thiserror::Error)]
enum Changed {
    #[error("the file or directory {0} was replaced while the database was open")]
    Replaced(PathBuf),
    #[error("cannot examine {path}")]
    Unreadable { path: PathBuf, source: io::Error },
}

/// Time for which a read may use the result of the last examination of the files. A short delay is
/// acceptable: open connections continue to read from the opened file, and each new connection is
/// examined.
const RECENT: Duration = Duration::from_millis(50);

/// The identity of one file or directory when the database was opened.
#[derive(Debug)]
struct Fixed {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Fixed {
    fn look(path: PathBuf) -> io::Result<Self> {
        let meta = fs::metadata(&path)?;
        Ok(Self {
            path,
            device: meta.dev(),
            inode: meta.ino(),
        })
    }

    fn check(&self) -> Result<(), Changed> {
        match fs::metadata(&self.path) {
            Ok(meta) if (meta.dev(), meta.ino()) == (self.device, self.inode) => Ok(()),
            Ok(_) => Err(Changed::Replaced(self.path.clone())),
            Err(source) => Err(Changed::Unreadable {
                path: self.path.clone(),
                source,
            }),
        }
    }
}

/// The files of an open database.
#[derive(Debug)]
pub(super) struct Place {
    files: Vec<Fixed>,
    last: Mutex<Last>,
}

/// The last examination.
#[derive(Debug, Default)]
struct Last {
    /// The time at which the last examination began; absent if the examination found a problem.
    good: Option<Instant>,
    /// The problem of the last examination, so that the same problem is logged only once.
    problem: Option<String>,
}

impl Place {
    /// Records the identity of each file of a database. To ensure that the WAL exists, the caller
    /// must have a connection that has already read from the database.
    pub(super) fn of(path: &Path) -> Result<Self, Error> {
        let look = || -> io::Result<Vec<Fixed>> {
            // SQLite follows symbolic links, and creates its other files next to the target.
            let real = fs::canonicalize(path)?;
            let mut paths = vec![path.to_owned(), directory(path)];
            if real != path {
                paths.extend([real.clone(), directory(&real)]);
            }
            paths.extend([beside(&real, "-wal"), beside(&real, "-shm")]);
            paths.into_iter().map(Fixed::look).collect()
        };
        let files = look().map_err(|error| {
            let what = format!("cannot examine {} and its WAL", path.display());
            Error::Down(Detail::caused(what, error))
        })?;
        Ok(Self {
            files,
            last: Mutex::default(),
        })
    }

    /// Fails if a file was replaced or cannot be examined.
    pub(super) fn check(&self) -> Result<(), Error> {
        let begun = Instant::now();
        let changed = self.files.iter().find_map(|file| file.check().err());
        let found = changed.as_ref().map(|changed| chain(changed));
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.problem != found {
            if let Some(what) = &found {
                keybroker_core::alert!(
                    StoreSwapped, %what,
                    "the database file was replaced or removed; nothing is read or written until the original file is back"
                );
            } else {
                tracing::warn!("the original database file is back");
            }
            last.problem.clone_from(&found);
        }
        last.good = found.is_none().then_some(begun);
        drop(last);
        match changed {
            None => Ok(()),
            Some(changed) => Err(Error::Down(
                Detail::caused(
                    "the database was moved or replaced while it was in use",
                    changed,
                )
                .remedy("put the original database file back, or restart the broker"),
            )),
        }
    }

    /// Like `check`, but reuses an examination that found no problem and is not older than
    /// `RECENT`. An examination needs four system calls.
    pub(super) fn check_recent(&self) -> Result<(), Error> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let is_recent = last.good.is_some_and(|good| good.elapsed() < RECENT);
        drop(last);
        if is_recent { Ok(()) } else { self.check() }
    }
}

fn directory(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}
