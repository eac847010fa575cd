//! The files of a log: how they are named, opened, checked and read back.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use super::{
    Error,
    line::{self, Parsed},
};

const OPEN_TO_OTHERS: u32 = 0o077;

fn fail(what: &str, path: &Path, cause: impl std::fmt::Display, remedy: &str) -> Error {
    Error::new(format!("{what} {}: {cause}; {remedy}", path.display()))
}

/// Makes the directory if its parent exists, and refuses one that others could write or read.
pub(super) fn prepare_directory(path: &Path) -> Result<(), Error> {
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => sync_directory(path.parent().unwrap_or(Path::new(".")))?,
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(error) => {
            let remedy = "make its parent directory and give it to the user that runs keybroker";
            return Err(fail("cannot make the directory", path, error, remedy));
        }
    }
    let meta = fs::metadata(path)
        .map_err(|error| fail("cannot read the directory", path, error, "check its owner"))?;
    let ours = rustix::process::geteuid().as_raw();
    if !meta.is_dir() || meta.mode() & OPEN_TO_OTHERS != 0 || meta.uid() != ours {
        let cause = format!("mode {:o}, owner {}", meta.mode() & 0o7777, meta.uid());
        let remedy = format!("it must be a directory of user {ours} with mode 0700");
        return Err(fail("will not write into", path, cause, &remedy));
    }
    Ok(())
}

/// The lock that makes this process the only writer. Held while the file is open.
pub(super) fn lock(directory: &Path) -> Result<File, Error> {
    let path = directory.join("lock");
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(|error| fail("cannot open", &path, error, "check owner and mode"))?;
    if file.try_lock().is_err() {
        let mut holder = String::new();
        let _unreadable = file.read_to_string(&mut holder);
        return Err(Error {
            in_use: true,
            text: format!(
                "{} is in use by process {}: another keybroker writes this log; stop it, or give this \
             one another `audit.instance`",
                directory.display(),
                holder.trim()
            ),
        });
    }
    let pid = std::process::id().to_string();
    file.set_len(0)
        .and_then(|()| file.write_all(pid.as_bytes()))
        .map_err(|error| fail("cannot write", &path, error, "check the disk"))?;
    Ok(file)
}

/// The id of the log: made once, 32 hexadecimal digits.
pub(super) fn log_id(directory: &Path) -> Result<String, Error> {
    let path = directory.join("log-id");
    match fs::read_to_string(&path) {
        Ok(text) if text.trim().len() == 32 => return Ok(text.trim().to_owned()),
        Ok(_) => {
            let remedy = "the log was tampered with; keep it for the auditors and start another";
            return Err(fail("not a log id in", &path, "wrong length", remedy));
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(fail("cannot read", &path, error, "check owner and mode")),
    }
    if !segments(directory)?.is_empty() {
        let remedy = "the log was tampered with; keep it for the auditors and start another";
        return Err(fail("segments without", &path, "file missing", remedy));
    }
    let mut bytes = [0; 16];
    aws_lc_rs::rand::fill(&mut bytes)
        .map_err(|_| Error::new("the random generator failed".to_owned()))?;
    let id = hex::encode(bytes);
    write_new(&path, id.as_bytes())?;
    sync_directory(directory)?;
    Ok(id)
}

/// Writes a file that does not exist yet, and syncs it.
pub(super) fn write_new(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let mut file = create(path)?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(|error| fail("cannot write", path, error, "check the disk"))
}

fn create(path: &Path) -> Result<File, Error> {
    OpenOptions::new()
        .append(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|error| fail("cannot make", path, error, "check owner, mode and disk"))
}

/// Makes a segment that does not exist yet.
pub(super) fn create_segment(directory: &Path, number: u64) -> Result<File, Error> {
    let file = create(&segment_path(directory, number))?;
    sync_directory(directory)?;
    Ok(file)
}

pub(super) fn sync_directory(path: &Path) -> Result<(), Error> {
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(|error| fail("cannot sync", path, error, "check the disk"))
}

pub(super) fn segment_path(directory: &Path, number: u64) -> PathBuf {
    directory.join(format!("{number:08}.jsonl"))
}

/// Numbers of the segments, ascending.
pub(super) fn segments(directory: &Path) -> Result<Vec<u64>, Error> {
    let entries = fs::read_dir(directory)
        .map_err(|error| fail("cannot list", directory, error, "check owner and mode"))?;
    let mut numbers: Vec<u64> = entries
        .filter_map(Result::ok)
        .filter_map(|entry| {
            let name = entry.file_name();
            name.to_str()?.strip_suffix(".jsonl")?.parse().ok()
        })
        .collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// Whether the path still leads to the open file: a log that was unlinked or replaced takes writes that nobody can read.
pub(super) fn still_there(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(open), Ok(named)) => open.ino() == named.ino() && open.dev() == named.dev(),
        _ => false,
    }
}

/// A segment read back: its good lines, and what follows the last of them.
#[derive(Debug)]
pub(super) struct Read {
    pub(super) lines: Vec<Parsed>,
    /// Bytes up to the end of the last good line.
    pub(super) good_bytes: u64,
    /// What follows: empty, or a torn tail.
    pub(super) tail: Vec<u8>,
}

/// Reads a segment up to the first line that is not canonical.
pub(super) fn read(path: &Path) -> Result<Read, Error> {
    let bytes =
        fs::read(path).map_err(|error| fail("cannot read", path, error, "check owner and mode"))?;
    let mut lines = Vec::new();
    let mut good = 0;
    while let Some(length) = bytes[good..].iter().position(|byte| *byte == b'\n') {
        let Some(parsed) = line::parse(&bytes[good..good + length]) else {
            break;
        };
        lines.push(parsed);
        good += length + 1;
    }
    Ok(Read {
        lines,
        good_bytes: u64::try_from(good).expect("a file's length fits in 64 bits"),
        tail: bytes[good..].to_vec(),
    })
}
