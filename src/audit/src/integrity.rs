//! Checks whether the files of a log are still the files that this process wrote. The directory, `log-id`, `lock` and
//! every segment are compared by device, inode and length.
//!
//! Not detected: bytes inside a file that are replaced without changing its length.
//!
//! Mitigation: M14 of `THREAT_MODEL.md`.

use std::{
    collections::BTreeMap,
    fs::{self, Metadata},
    io,
    path::{Path, PathBuf},
};

use super::{
    Error,
    segment::{self, FileId, LOCK, LOG_ID},
};

/// The identity and the length that a file had after this process last wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Written {
    pub(super) id: FileId,
    pub(super) bytes: u64,
}

impl Written {
    pub(super) fn of(meta: &Metadata) -> Self {
        Self {
            id: FileId::of(meta),
            bytes: meta.len(),
        }
    }
}

/// The files of a log.
#[derive(Debug)]
pub(super) struct Files {
    directory: PathBuf,
    own: FileId,
    /// The file system of the parent directory. If the device number changes, a volume was mounted
    /// or unmounted.
    parent_device: u64,
    log_id: Written,
    lock: FileId,
    segments: BTreeMap<u64, Written>,
}

impl Files {
    /// Reads the current state of the files. The caller must hold the lock of the log, and no write may be in progress.
    pub(super) fn read(directory: &Path) -> Result<Self, Error> {
        let read = || -> io::Result<Self> {
            Ok(Self {
                directory: directory.to_owned(),
                own: FileId::of(&fs::symlink_metadata(directory)?),
                parent_device: FileId::of(&fs::metadata(parent(directory))?).device,
                log_id: Written::of(&fs::symlink_metadata(directory.join(LOG_ID))?),
                lock: FileId::of(&fs::symlink_metadata(directory.join(LOCK))?),
                segments: BTreeMap::new(),
            })
        };
        let mut files = read().map_err(|error| unreadable(directory, &error))?;
        for number in segment::segments(directory)? {
            let path = segment::segment_path(directory, number);
            let meta = fs::symlink_metadata(&path).map_err(|error| unreadable(&path, &error))?;
            files.segments.insert(number, Written::of(&meta));
        }
        Ok(files)
    }

    /// Returns the number of every segment, and the length that the segment had after this process last wrote it.
    pub(super) fn lengths(&self) -> impl Iterator<Item = (u64, u64)> {
        self.segments
            .iter()
            .map(|(number, written)| (*number, written.bytes))
    }

    /// Records a new segment, or a new durable length of a segment.
    pub(super) fn note(&mut self, number: u64, written: Written) {
        self.segments.insert(number, written);
    }

    /// Records that a segment was truncated to its durable length.
    pub(super) fn cut_back(&mut self, number: u64, bytes: u64) {
        if let Some(written) = self.segments.get_mut(&number) {
            written.bytes = bytes;
        }
    }

    /// Records that this process removed a segment.
    pub(super) fn forget(&mut self, number: u64) {
        self.segments.remove(&number);
    }

    /// Checks the newest segment, before and after each group of entries. The check is a single system call, because a
    /// slower check would delay each group of entries. The path of the segment contains the directory, so the check
    /// also detects a directory that was moved or replaced. [`Files::check_all`] checks the other files.
    pub(super) fn check_newest(&self, number: u64) -> Result<(), Error> {
        self.check_segment(number)
            .or_else(|error| self.check_directory().and(Err(error)))
    }

    /// Checks every file, and searches for segments that this process did not write.
    pub(super) fn check_all(&self) -> Result<(), Error> {
        self.check_directory()?;
        Self::compare(&self.directory.join(LOG_ID), |meta| {
            Written::of(meta) == self.log_id
        })?;
        Self::compare(&self.directory.join(LOCK), |meta| {
            FileId::of(meta) == self.lock
        })?;
        for number in self.segments.keys() {
            self.check_segment(*number)?;
        }
        let listed = segment::segments(&self.directory)?;
        match listed
            .iter()
            .find(|number| !self.segments.contains_key(number))
        {
            None => Ok(()),
            Some(number) => Err(tampered(
                &segment::segment_path(&self.directory, *number),
                "the file was created by another process",
            )),
        }
    }

    fn check_directory(&self) -> Result<(), Error> {
        let looked = Self::look(&self.directory);
        if matches!(&looked, Ok(meta) if FileId::of(meta) == self.own) {
            return Ok(());
        }
        let is_elsewhere = fs::metadata(parent(&self.directory))
            .is_ok_and(|meta| FileId::of(&meta).device != self.parent_device)
            || matches!(&looked, Ok(meta) if FileId::of(meta).device != self.own.device);
        if is_elsewhere {
            let what = "the directory is on a different file system than before: the volume was unmounted, or another \
                volume was mounted at this path";
            return Err(tampered(&self.directory, what));
        }
        looked.and_then(|_| {
            Err(tampered(
                &self.directory,
                "the original file or directory was replaced",
            ))
        })
    }

    /// Checks the identity of a segment. The segment may have additional bytes at its end: they may come from a failed
    /// write, and the caller removes them after the check.
    pub(super) fn check_identity(&self, number: u64) -> Result<(), Error> {
        let Some(written) = self.segments.get(&number) else {
            return Ok(());
        };
        let path = segment::segment_path(&self.directory, number);
        Self::compare(&path, |meta| {
            FileId::of(meta) == written.id && meta.len() >= written.bytes
        })
    }

    fn check_segment(&self, number: u64) -> Result<(), Error> {
        let Some(written) = self.segments.get(&number) else {
            return Ok(());
        };
        let path = segment::segment_path(&self.directory, number);
        let meta = Self::look(&path)?;
        if FileId::of(&meta) != written.id {
            return Err(tampered(
                &path,
                "the original file or directory was replaced",
            ));
        }
        let bytes = meta.len();
        if bytes != written.bytes {
            let what = format!(
                "the file has {bytes} bytes, but {} bytes were written",
                written.bytes
            );
            return Err(tampered(&path, &what));
        }
        Ok(())
    }

    fn compare(path: &Path, same: impl Fn(&Metadata) -> bool) -> Result<(), Error> {
        if same(&Self::look(path)?) {
            Ok(())
        } else {
            Err(tampered(
                path,
                "the original file or directory was replaced",
            ))
        }
    }

    /// Reads the metadata of a file. If the file is missing, another process has removed it; all other errors come from
    /// the file system.
    fn look(path: &Path) -> Result<Metadata, Error> {
        fs::symlink_metadata(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => tampered(
                path,
                "the original file or directory was removed or renamed",
            ),
            _ => unreadable(path, &error),
        })
    }
}

/// Returns the parent directory of a path.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn tampered(path: &Path, what: &str) -> Error {
    Error::tampered(format!("{}: {what}", path.display()))
}

fn unreadable(path: &Path, error: &io::Error) -> Error {
    Error::new(format!(
        "cannot examine {}: {error}; check the file system",
        path.display()
    ))
}
