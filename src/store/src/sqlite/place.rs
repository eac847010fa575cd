//! Whether the database is still the file that was opened: device and inode of the file, of its WAL, of its shared memory and of
//! their directory. SQLite goes on writing to a file that was renamed or removed, and what it commits there is lost.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use keybroker_core::error::chain;

use crate::{Error, error::Detail};

/// Why a file or directory is not what it was when the database was opened.
#[derive(Debug, thiserror::Error)]
enum Changed {
    #[error("{0} was replaced")]
    Replaced(PathBuf),
    #[error("cannot examine {path}")]
    Unreadable { path: PathBuf, source: io::Error },
}

/// How long a read relies on the last examination of the files. Connections stay open, so until then it reads from the file
/// that was opened, and a new connection is examined for itself.
const RECENT: Duration = Duration::from_millis(50);

/// One file or directory, as it was when the database was opened.
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

/// Where an open database is.
#[derive(Debug)]
pub(super) struct Place {
    files: Vec<Fixed>,
    last: Mutex<Last>,
}

/// The last examination.
#[derive(Debug, Default)]
struct Last {
    /// When it began, if it found nothing wrong.
    good: Option<Instant>,
    /// What was wrong, so that it is logged once.
    problem: Option<String>,
}

impl Place {
    /// Of a database with an open connection that has read from it: its WAL is there.
    pub(super) fn of(path: &Path) -> Result<Self, Error> {
        let look = || -> io::Result<Vec<Fixed>> {
            // SQLite follows links, and has the other files beside the real one.
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

    /// Fails while any of the files is another one than at the beginning.
    pub(super) fn check(&self) -> Result<(), Error> {
        let begun = Instant::now();
        let changed = self.files.iter().find_map(|file| file.check().err());
        let found = changed.as_ref().map(|changed| chain(changed));
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.problem != found {
            if let Some(what) = &found {
                keybroker_core::alert!(
                    StoreSwapped, %what,
                    "the database is not the file that was opened: nothing is read or written until it is"
                );
            } else {
                tracing::warn!("the database is the file that was opened again");
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
                .remedy("put the file back, or restart the broker"),
            )),
        }
    }

    /// As `check`, but relies on a good result that is not older than `RECENT`: each examination costs four system calls.
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
