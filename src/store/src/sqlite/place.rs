//! Whether the database is still the file that was opened: device and inode of the file, of its WAL, of its shared memory and of
//! their directory. SQLite goes on writing to a file that was renamed or removed, and what it commits there is lost.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use crate::Error;

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

    fn check(&self) -> Result<(), String> {
        let shown = self.path.display();
        match fs::metadata(&self.path) {
            Ok(meta) if (meta.dev(), meta.ino()) == (self.device, self.inode) => Ok(()),
            Ok(_) => Err(format!("{shown} was replaced")),
            Err(error) => Err(format!("{shown}: {error}")),
        }
    }
}

/// Where an open database is.
#[derive(Debug)]
pub(super) struct Place {
    files: Vec<Fixed>,
    /// What was wrong when it was last looked at, so that it is logged once.
    problem: Mutex<Option<String>>,
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
            let shown = path.display();
            Error::Down(format!("cannot examine {shown} and its WAL: {error}").into())
        })?;
        Ok(Self {
            files,
            problem: Mutex::default(),
        })
    }

    /// Fails while any of the files is another one than at the beginning.
    pub(super) fn check(&self) -> Result<(), Error> {
        let found = self.files.iter().find_map(|file| file.check().err());
        let mut problem = self.problem.lock().unwrap_or_else(PoisonError::into_inner);
        if *problem != found {
            if let Some(what) = &found {
                keybroker_core::alert!(
                    StoreSwapped, %what,
                    "the database is not the file that was opened: nothing is read or written until it is"
                );
            } else {
                tracing::warn!("the database is the file that was opened again");
            }
            problem.clone_from(&found);
        }
        match found {
            None => Ok(()),
            Some(what) => Err(Error::Down(
                format!("{what} while it was in use; put the file back, or restart the broker")
                    .into(),
            )),
        }
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
