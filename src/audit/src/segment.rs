//! The files of a log: their names, and how they are opened, checked and read.

use std::{
    fs::{self, DirBuilder, File, Metadata, OpenOptions},
    io::{self, BufRead, BufReader, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use keybroker_core::{
    remedy::remedy,
    trusted_file::{self, Purpose},
};

use super::{
    Class, Error,
    line::{self, Parsed},
};

/// Largest number of entries that are written together as one group.
pub(super) const GROUP_MAX: u64 = 1_024;
const OPEN_TO_OTHERS: u32 = 0o077;
const PLACE: Purpose = Purpose::trust("other users could put another directory in its place");
/// Name of the file whose lock makes a process the only writer.
pub(super) const LOCK: &str = "lock";
/// The explanation in the error for a log that does not exist.
pub(super) const BEGINS: &str = "a broker begins its audit log at its first start";
/// Name of the file with the id of the log.
pub(super) const LOG_ID: &str = "log-id";

fn fail(what: &str, path: &Path, cause: impl std::fmt::Display, remedy: &str) -> Error {
    Error::new(format!("{what} {}: {cause}; {remedy}", path.display()))
}

/// Converts an error of the operating system. The remedy depends on the kind of error; `otherwise` is the remedy for
/// all other kinds.
fn fail_io(what: &str, path: &Path, error: &io::Error, otherwise: &str) -> Error {
    let known = remedy(path, error);
    fail(what, path, error, known.as_deref().unwrap_or(otherwise))
}

/// Creates the directory if its parent exists. Refuses a directory that other users could read or write.
pub(super) fn prepare_directory(path: &Path) -> Result<(), Error> {
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => sync_directory(path.parent().unwrap_or(Path::new(".")))?,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => {
            let remedy = "create the parent directory, owned by the user that runs keybroker";
            return Err(fail_io("cannot make the directory", path, &error, remedy));
        }
    }
    let meta = fs::metadata(path)
        .map_err(|error| fail_io("cannot read the directory", path, &error, "check its owner"))?;
    let ours = rustix::process::geteuid().as_raw();
    if meta.is_dir() && meta.uid() != ours {
        let cause = format!(
            "the directory belongs to user {}, but this process runs as user {ours}",
            meta.uid()
        );
        let remedy = format!(
            "run the command as user {owner} (`sudo -u '#{owner}' keybroker …`), or change the owner of the directory to user {ours}",
            owner = meta.uid()
        );
        return Err(fail("will not write into", path, cause, &remedy));
    }
    if !meta.is_dir() {
        let remedy = format!(
            "set `[audit] directory` to a directory that belongs to user {ours} and has mode 0700"
        );
        return Err(fail(
            "will not write into",
            path,
            "the path is not a directory",
            &remedy,
        ));
    }
    if meta.mode() & OPEN_TO_OTHERS != 0 {
        let cause = format!(
            "the directory has mode {:04o}, so other users can access the directory",
            meta.mode() & 0o7777
        );
        let remedy = format!("run `chmod 700 {}`", path.display());
        return Err(fail("will not write into", path, cause, &remedy));
    }
    Ok(())
}

/// Warns if a directory above the log allows another user to replace the log's directory.
pub(super) fn note_open_directory(path: &Path) {
    if let Err(error) = trusted_file::check_above(path, PLACE) {
        tracing::warn!(
            directory = %path.display(), cause = %error,
            "other users of this machine can replace the audit directory while the broker is stopped"
        );
    }
}

/// Takes the lock that makes this process the only writer. The lock is held until the returned file is closed.
pub(super) fn lock(directory: &Path) -> Result<File, Error> {
    let path = directory.join(LOCK);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(|error| fail_io("cannot open", &path, &error, "check the owner and mode"))?;
    if file.try_lock().is_err() {
        let mut holder = String::new();
        let _unreadable = file.read_to_string(&mut holder);
        return Err(Error {
            class: Class::InUse,
            text: format!(
                "{} is in use by process {}: another keybroker process writes this audit log; stop that process, or set another `audit.instance` for this process",
                directory.display(),
                holder.trim()
            ),
        });
    }
    let pid = std::process::id().to_string();
    file.set_len(0)
        .and_then(|()| file.write_all(pid.as_bytes()))
        .map_err(|error| fail_io("cannot write", &path, &error, "check the disk"))?;
    Ok(file)
}

/// Returns the id of the log, 32 hexadecimal digits. Creates the id if the log is new.
pub(super) fn log_id(directory: &Path) -> Result<String, Error> {
    if let Some(id) = existing_log_id(directory)? {
        return Ok(id);
    }
    let path = directory.join(LOG_ID);
    if path.exists() {
        // A previous start crashed after it created the file and before it wrote the id of the log. No entry contains
        // the id of this log yet.
        remove(&path)?;
    }
    let mut bytes = [0; 16];
    aws_lc_rs::rand::fill(&mut bytes)
        .map_err(|_| Error::new("the random generator failed".to_owned()))?;
    let id = hex::encode(bytes);
    write_new(&path, id.as_bytes())?;
    sync_directory(directory)?;
    Ok(id)
}

/// Returns the id of an existing log.
pub(super) fn existing_log_id(directory: &Path) -> Result<Option<String>, Error> {
    let path = directory.join(LOG_ID);
    // The type of the file is checked first, because a FIFO with this name would block the start of the broker.
    if fs::symlink_metadata(&path).is_ok_and(|meta| !meta.is_file()) {
        let remedy = "the log was tampered with; keep it for the auditors and start a new log with another `audit.instance`";
        return Err(fail(
            "cannot read",
            &path,
            "the path is not a regular file",
            remedy,
        ));
    }
    match fs::read_to_string(&path) {
        Ok(text) if text.trim().len() == 32 => return Ok(Some(text.trim().to_owned())),
        Ok(text) if text.is_empty() && segments(directory)?.is_empty() => return Ok(None),
        Ok(_) => {
            let remedy = "the log was tampered with; keep it for the auditors and start a new log with another `audit.instance`";
            return Err(fail(
                "invalid log id in",
                &path,
                "the length of the id is wrong",
                remedy,
            ));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => {
            return Err(fail_io(
                "cannot read",
                &path,
                &error,
                "check the owner and mode",
            ));
        }
    }
    if directory.exists() && !segments(directory)?.is_empty() {
        let remedy = "the log was tampered with; keep it for the auditors and start a new log with another `audit.instance`";
        return Err(fail(
            "the audit log has segments, but no file with its id:",
            &path,
            "the file does not exist",
            remedy,
        ));
    }
    Ok(None)
}

/// Writes a new file and syncs it. If a write fails, the incomplete file is removed.
pub(super) fn write_new(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let mut file = create(path)?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(|error| {
            fs::remove_file(path).ok();
            fail_io("cannot write", path, &error, "check the disk")
        })
}

/// Creates a new file. The caller must sync the directory.
pub(super) fn create(path: &Path) -> Result<File, Error> {
    OpenOptions::new()
        .append(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|error| {
            fail_io(
                "cannot make",
                path,
                &error,
                "check the owner and mode of the directory, and the disk",
            )
        })
}

/// Removes a file, if it exists.
pub(super) fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(fail_io(
            "cannot remove",
            path,
            &error,
            "check the owner and mode",
        )),
        _ => Ok(()),
    }
}

/// Truncates a segment to its first `bytes` bytes.
pub(super) fn cut_back(path: &Path, bytes: u64) -> Result<(), Error> {
    let cut = || -> io::Result<()> {
        let file = OpenOptions::new().write(true).open(path)?;
        if file.metadata()?.len() > bytes {
            file.set_len(bytes)?;
            file.sync_all()?;
        }
        Ok(())
    };
    cut().map_err(|error| fail_io("cannot truncate", path, &error, "check the disk"))
}

pub(super) fn sync_directory(path: &Path) -> Result<(), Error> {
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(|error| fail_io("cannot sync", path, &error, "check the disk"))
}

const NUMBER_MAX: u64 = 999_999_999_999;

fn segment_name(number: u64) -> String {
    format!("{number:08}.jsonl")
}

pub(super) fn segment_path(directory: &Path, number: u64) -> PathBuf {
    directory.join(segment_name(number))
}

/// Returns the numbers of the segments, in ascending order.
pub(super) fn segments(directory: &Path) -> Result<Vec<u64>, Error> {
    let entries = fs::read_dir(directory).map_err(|error| {
        let otherwise = match error.kind() {
            io::ErrorKind::NotFound => BEGINS,
            _ => "check the owner and mode",
        };
        fail_io("cannot list", directory, &error, otherwise)
    })?;
    let mut numbers: Vec<u64> = entries
        .filter_map(Result::ok)
        .filter_map(|entry| {
            let name = entry.file_name();
            let number = name.to_str()?.strip_suffix(".jsonl")?.parse().ok()?;
            // A file is not a segment if its number is larger than the maximum, or is not written as in
            // [`segment_name`].
            let ours = number <= NUMBER_MAX && name == *segment_name(number);
            ours.then_some(number)
        })
        .collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// The identity of a file, independent of its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileId {
    pub(super) device: u64,
    inode: u64,
}

impl FileId {
    pub(super) fn of(meta: &Metadata) -> Self {
        Self {
            device: meta.dev(),
            inode: meta.ino(),
        }
    }
}

/// Maximum length of a line, in bytes. A longer line is damaged, because the log writes much shorter lines.
pub(super) const LINE_BYTES_MAX: u64 = 64 * 1024;

/// A line of a segment, or unreadable bytes in place of a line.
#[derive(Debug)]
pub(super) struct Line {
    /// The offset of the first byte of the line in the file.
    pub(super) at: u64,
    /// The length of the line in bytes, including the LF.
    pub(super) bytes: u64,
    /// The entry in the line; `None` if the line is not complete and canonical.
    pub(super) entry: Option<Parsed>,
}

/// Reads a segment line by line.
pub(super) fn lines(path: &Path, mut visit: impl FnMut(Line)) -> Result<(), Error> {
    let mut reader = BufReader::new(open(path)?);
    let mut at = 0;
    while let Some(line) = next_line(&mut reader, path, at)? {
        at += line.bytes;
        visit(line);
    }
    Ok(())
}

/// Reads the complete lines of a segment as text without their LF, even if they are not canonical.
pub(super) fn texts(path: &Path, visit: impl FnMut(String)) -> Result<(), Error> {
    texts_from(path, 0, visit)
}

/// Does the same as [`texts`], beginning `skip` bytes after the start of the segment. The first line may then be the end of a line.
pub(super) fn texts_from(
    path: &Path,
    skip: u64,
    mut visit: impl FnMut(String),
) -> Result<(), Error> {
    let mut file = open(path)?;
    file.seek(SeekFrom::Start(skip))
        .map_err(|error| fail_io("cannot read", path, &error, "check the disk"))?;
    let mut reader = BufReader::new(file);
    loop {
        let mut line = Vec::new();
        (&mut reader)
            .take(LINE_BYTES_MAX)
            .read_until(b'\n', &mut line)
            .map_err(|error| fail_io("cannot read", path, &error, "check the disk"))?;
        if line.is_empty() {
            return Ok(());
        }
        if let Some(text) = line.strip_suffix(b"\n") {
            visit(String::from_utf8_lossy(text).into_owned());
        }
    }
}

/// Length of a file, in bytes.
pub(super) fn length(path: &Path) -> Result<u64, Error> {
    fs::metadata(path)
        .map(|meta| meta.len())
        .map_err(|error| fail_io("cannot read", path, &error, "check the owner and mode"))
}

/// Returns the first entry of a segment.
pub(super) fn first_line(path: &Path) -> Result<Option<Parsed>, Error> {
    let line = next_line(&mut BufReader::new(open(path)?), path, 0)?;
    Ok(line.and_then(|line| line.entry))
}

fn open(path: &Path) -> Result<File, Error> {
    File::open(path)
        .map_err(|error| fail_io("cannot read", path, &error, "check the owner and mode"))
}

fn next_line(reader: &mut impl BufRead, path: &Path, at: u64) -> Result<Option<Line>, Error> {
    let mut line = Vec::new();
    reader
        .take(LINE_BYTES_MAX)
        .read_until(b'\n', &mut line)
        .map_err(|error| fail_io("cannot read", path, &error, "check the disk"))?;
    if line.is_empty() {
        return Ok(None);
    }
    Ok(Some(Line {
        at,
        bytes: u64::try_from(line.len()).expect("the length of a line is at most its maximum"),
        entry: line.strip_suffix(b"\n").and_then(line::parse),
    }))
}
